"""Sweeps: the time of plan and status for many cells, and the time that the driver adds to each trial's own process.

    python -m benchmarks.sweep

Trials copy runs that were made before, so that only the driver, its storage and its reading of run folders are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import optuna
import yaml

from benchmarks.harness import cpu_name, positive, table
from madformer.config import write_config
from madformer.evaluation.record import append_point
from madformer.model import cost
from madformer.runs.checkpoints import checkpoint_path
from madformer.sweep.cells import Cell, sweep_cells
from madformer.sweep.driver import run_sweep
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.needs import network_sha256

PLAN_GOAL, STATUS_GOAL, TRIAL_GOAL = 10.0, 2.0, 5.0
"""Seconds: of the two commands, and of the driver for each trial."""

_EXPERIMENT = Path(__file__).parents[1] / "experiments/digits.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=positive, default=1000, help="of the sweep")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each command; the median counts")
    given = parser.parse_args(arguments)
    print(f"optuna {optuna.__version__}, Python {platform.python_version()}, {cpu_name()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.cells, given.repeats)
    cells = [(what, [f"{seconds:.3f}", f"below {goal:g}"]) for what, seconds, goal in rows]
    print(f"{given.cells} cells", *table(["seconds", "goal"], cells), sep="\n")


def measure(folder: Path, count: int, repeats: int) -> list[tuple[str, float, float]]:
    """A line on the time of a command and its goal."""
    path = write_sweep(folder, count)
    plan = median(time_command("plan", path) for _ in range(repeats))
    waiting = median(time_command("status", path) for _ in range(repeats))
    driver = time_driver(path, folder)
    done = median(time_command("status", path) for _ in range(repeats))
    for cell in sweep_cells(load_sweep(path))[::2]:
        shutil.rmtree(cell.run)
    half = median(time_command("status", path) for _ in range(repeats))
    return [
        ("plan, nothing begun", plan, PLAN_GOAL),
        ("status, nothing begun", waiting, STATUS_GOAL),
        ("status, all done", done, STATUS_GOAL),
        ("status, half of it done", half, STATUS_GOAL),
        ("driver, each trial", driver, TRIAL_GOAL),
    ]


def write_sweep(folder: Path, count: int) -> Path:
    """A sweep with a grid of `count` cells."""
    spec = {
        "name": "many",
        "experiment": str(_EXPERIMENT),
        "overrides": {"trainer.max_steps": 10, "evaluation.held_out_split": None},
        "grid": {"model.diffusion_depth": [8]},
        "seeds": list(range(count)),
        "workers": 2,
        "output_dir": str(folder),
    }
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def time_command(verb: str, sweep: Path) -> float:
    """Seconds of `madformer sweep VERB`, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "madformer", "sweep", verb, sweep], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_driver(path: Path, folder: Path) -> float:
    """Seconds of one worker for each trial, but for those of the trial's process."""
    sweep = load_sweep(path)
    made = {cell.name: make_run(cell, folder / "made" / cell.name) for cell in sweep_cells(sweep)}

    def copy(cell: Cell) -> list[list[str]]:
        return [["cp", "-r", f"{made[cell.name]}/.", str(cell.run)]]

    start = time.perf_counter()
    assert run_sweep(sweep, commands=copy, say=lambda line: None) == 0
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "made")
    return seconds * (sweep.workers or 1) / len(made)


def make_run(cell: Cell, folder: Path) -> Path:
    """The files of a run that a sweep reads, as a trial leaves them."""
    write_config(cell.config, folder)
    checkpoint_path(folder, cell.max_steps).parent.mkdir()
    checkpoint_path(folder, cell.max_steps).touch()
    evaluation = cell.config.evaluation
    point = {
        "kind": "point",
        "step": cell.max_steps,
        "config_hash": cell.config_hash,
        "weights": "ema",
        "sampler": evaluation.sampler,
        "guidance": evaluation.guidance,
        "seed": evaluation.seed,
        "num_samples": evaluation.num_samples,
        "feature_networks": [{"name": name, "sha256": network_sha256(name)} for name in evaluation.feature_networks],
        "codec": {"sha256": None, "dtype": "float32"},
        "references": [],
        "metrics": {"fd_digits": 1.0},
        "tflops_per_image": 1e-3,
        "seconds_spent": {"sampling": 1.0},
    }
    unread = ("weights_sha256", "prompts", "precision", "checkpoint", "time")
    for nfe in cell.budgets:
        steps = cost.steps_for_nfe(cell.config.model, nfe)
        append_point(folder, {**dict.fromkeys(unread), **point, "nfe": nfe, "nfe_actual": nfe, "steps": steps})
    entry = {"done": 10, "total": 10, "per_second": 10.0, "time": time.time(), "devices": 1}
    (folder / "progress.json").write_text(json.dumps({"step": entry}))
    return folder


if __name__ == "__main__":
    main()
