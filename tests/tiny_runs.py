"""Runs of a tiny model on digits, as a user starts them: in processes of their own, or without the seconds that these take."""

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
    "data.split=train",
    "data.batch_size=16",
    "trainer.max_steps=24",
    "trainer.checkpoint_every=6",
    "trainer.log_every=2",
    "evaluation.nfe=[3,5]",
    "evaluation.num_samples=16",
    "evaluation.held_out_split=null",
    "evaluation.preview_every=6",
    "evaluation.preview_nfe=5",
    "evaluation.preview_samples=4",
    f"evaluation.references={HUB.name}/references",
)


PRELOADED = ["tests.tiny_runs", "madformer.training.train", "madformer.evaluation.write_samples", "torch.utils.tensorboard"]
"""What the commands that are killed import, once for all of them."""


def tiny_run(output_dir: Path, *overrides: str) -> ExperimentConfig:
    return load_experiment(DIGITS, [*TINY, f"output_dir={output_dir}", *overrides])


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "madformer", *map(str, arguments)]


def train_command(output_dir: Path, *overrides: str) -> list[str]:
    return command("train", DIGITS, *TINY, f"output_dir={output_dir}", *overrides)


def environment() -> dict[str, str]:
    """The caller's variables, with one thread, and this checkout in front of the caller's `PYTHONPATH`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def execute(argv: Sequence[str], status: int = 0, **options: Any) -> str:
    """Run a command, require its exit status, return its output."""
    result = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=environment(), **{"cwd": ROOT, "timeout": 300, **options}
    )
    printed = result.stdout + result.stderr
    assert result.returncode == status, printed
    return printed


def perform(argv: Sequence[str], status: int = 0, cwd: Path = ROOT) -> str:
    """`execute` in this process, which has made the imports: for tests that neither kill a process nor test one."""
    torch.set_num_threads(1)  # as `environment` has it; a module-scoped fixture may come before `one_thread`
    printed, code = io.StringIO(), 0
    logger, handler = logging.getLogger(), logging.StreamHandler(printed)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))  # `main` sets up none beside pytest's
    logger.addHandler(handler)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            contextlib.chdir(cwd),
            patch.object(sys, "argv", ["madformer", *argv[3:]]),
        ):
            main()
    except SystemExit as error:
        code = error.code
    finally:
        logger.removeHandler(handler)
    assert code == status, printed.getvalue()
    return printed.getvalue()


def run_until(
    argv: Sequence[str], condition: Callable[[], bool], log: Path, number: int = signal.SIGKILL, seconds: float = 200
) -> tuple[int, str]:
    """Start a command and send it a signal once `condition()` holds. Return its exit status and its output, written to `log`.

    A command that gets SIGINT is started as a user starts it. Others are forked from a process that has made the imports.
    """
    log.touch()  # the process may be killed before it opens it
    process = _start(argv, log) if number == signal.SIGINT else _Forked(argv, log)
    try:
        end = time.monotonic() + seconds
        while not condition() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, number)
        status = process.wait(seconds)
    finally:
        process.kill()
    return status, log.read_text()


def _start(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(argv, stdout=output, stderr=output, cwd=ROOT, env=environment())


class _Forked:
    """A command in a process that has not started an interpreter, with the methods of `subprocess.Popen` that are needed."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=_become, args=(list(argv[3:]), log, environment()))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


def _become(arguments: list[str], log: Path, variables: dict[str, str]) -> None:
    """Be a command, in a process that has just been forked."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(ROOT)
    os.environ |= variables
    torch.set_num_threads(1)
    sys.argv = ["madformer", *arguments]
    main()


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
    """Everything that TensorBoard would draw of a run, but speeds; by step, for files of one second lie in any order."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in tags}
