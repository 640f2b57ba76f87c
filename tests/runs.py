"""Runs of a tiny model on digits, as a user starts them: in processes of their own, or without the seconds that these take."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from madformer.cli import main
from madformer.config import ExperimentConfig, load_experiment
from tests.conftest import HUB, ROOT

DIGITS = ROOT / "experiments/digits.yaml"

TINY = (
    "model.width=16",
    "model.num_heads=2",
    "model.ffn_width=24",
    "model.depth=3",
    "model.diffusion_depth=2",
    "model.unet.channels=[8,16]",
    "model.unet.layers=[1,1]",
    "model.unet.attention=[false,false]",
    "data.batch_size=16",
    "trainer.max_steps=24",
    "trainer.checkpoint_every=6",
    "trainer.log_every=2",
    "evaluation.nfe=[3,5]",
    "evaluation.num_samples=16",
    "evaluation.preview_every=6",
    "evaluation.preview_nfe=5",
    "evaluation.preview_samples=4",
    f"evaluation.references={HUB.name}/references",
)


def tiny_run(output_dir: Path, *overrides: str) -> ExperimentConfig:
    return load_experiment(DIGITS, [*TINY, f"output_dir={output_dir}", *overrides])


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "madformer", *map(str, arguments)]


def train_command(output_dir: Path, *overrides: str) -> list[str]:
    return command("train", DIGITS, *TINY, f"output_dir={output_dir}", *overrides)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def execute(argv: Sequence[str], status: int = 0, **options: Any) -> str:
    """Run a command, require its exit status, give what it printed."""
    result = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=environment(), **{"cwd": ROOT, "timeout": 300, **options}
    )
    printed = result.stdout + result.stderr
    assert result.returncode == status, printed
    return printed


def perform(argv: Sequence[str], status: int = 0, cwd: Path = ROOT) -> str:
    """`execute` in this process, whose imports are paid for: where a process is neither killed nor what is tested."""
    torch.set_num_threads(1)  # as `environment` has it; a fixture of a module may be here before `one_thread`
    printed, code = io.StringIO(), 0
    log, here = logging.getLogger(), logging.StreamHandler(printed)
    here.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))  # `main` sets up none beside pytest's
    log.addHandler(here)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            contextlib.chdir(cwd),
            patch.object(sys, "argv", ["madformer", *argv[3:]]),
        ):
            main()
    except SystemExit as ended:
        code = ended.code
    finally:
        log.removeHandler(here)
    assert code == status, printed.getvalue()
    return printed.getvalue()


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two nested structures of tensors and values are not equal, bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        missing = [f"{where}.{key}" for key in first.keys() ^ second.keys()]
        return missing + [
            line for key in first.keys() & second.keys() for line in differences(first[key], second[key], f"{where}.{key}")
        ]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [line for i, (a, b) in enumerate(zip(first, second, strict=True)) for line in differences(a, b, f"{where}[{i}]")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    return [] if first == second else [f"{where}: {first} != {second}"]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything that TensorBoard would draw of a run, but speeds."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
