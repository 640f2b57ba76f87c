"""A real sweep whose trials and drivers are killed at random moments ends with the table of one that was left alone.

`KILLS=100 pytest -s tests/sweep/test_driver_killed.py` kills more often, and says how it went.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import yaml

from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.trial import trial_commands
from tests.conftest import ROOT
from tests.tiny_runs import DIGITS, TINY, command, environment, perform

KILLS = int(os.environ.get("KILLS", "2"))
LEAST_STEPS = 80
STEPS_A_KILL = 45
"""So that training is not over before the kills are."""
LONGEST_PAUSE = 14 if KILLS > 3 else 7
"""Seconds between two kills; the shortest is 1."""


def sweep_file(folder: Path) -> Path:
    settings = dict(override.split("=", 1) for override in TINY)
    overrides = {
        key: yaml.safe_load(value) for key, value in settings.items() if key not in ("model.diffusion_depth", "evaluation.nfe")
    }
    steps = max(LEAST_STEPS, KILLS * STEPS_A_KILL) if KILLS > 3 else LEAST_STEPS
    overrides |= {"trainer.max_steps": steps, "trainer.checkpoint_every": 20, "evaluation.preview_every": 40}
    spec = {"name": "killed", "experiment": str(DIGITS), "overrides": overrides, "workers": 2, "output_dir": str(folder)}
    spec |= {"grid": {"model.diffusion_depth": [1, 3]}, "evaluate": {"nfe": [3, 9]}, "retries": 1000}
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def leave_alone(folder: Path) -> None:
    """What the sweep does, without drivers and processes that could die."""
    for cell in sweep_cells(load_sweep(sweep_file(folder))):
        for argv in trial_commands(cell):
            perform(argv)


def quality(folder: Path) -> list[tuple[str, ...]]:
    """The report's columns but for what a clock measured."""
    perform(command("report", folder / "killed.yaml"))
    with (folder / "killed/report.csv").open() as file:
        return [tuple(row[:-4]) for row in csv.reader(file)]


def trials(folder: Path) -> list[int]:
    """Processes that work on the sweep's cells: they outlive a killed driver."""
    listed = subprocess.run(
        ["pgrep", "-f", f"madformer (train|evaluate).*{folder}"], capture_output=True, text=True, check=False
    )
    return [int(number) for number in listed.stdout.split()]


def kill(numbers: list[int]) -> int:
    """Kill processes; how many there were."""
    killed = 0
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
            killed += 1
    return killed


class Mishaps:
    """One driver after another, and what is killed of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.argv = folder, command("sweep", "run", sweep_file(folder))
        self.count: Counter[str] = Counter()
        self.driver = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        log = (self.folder / "drivers.log").open("ab")
        return subprocess.Popen(self.argv, cwd=ROOT, stdout=log, stderr=log, env=environment())

    def happen(self, what: str) -> None:
        """Kill a trial, the driver, or the driver and all its trials; whatever is gone is started again."""
        assert self.driver.poll() is None, "it was over before all kills: raise STEPS_A_KILL"
        if what == "trial":
            self.count[what] += kill(trials(self.folder)[:1])
            return
        self.driver.kill()
        self.driver.wait()
        self.count["driver"] += 1
        if what == "all":
            self.count["trial"] += kill(trials(self.folder))
        self.driver = self._start()


def test_killed_at_random_moments(tmp_path):
    chance = random.Random(0)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    leave_alone(whole)
    mishaps = Mishaps(torn)
    while mishaps.count.total() < KILLS:
        time.sleep(chance.uniform(1, LONGEST_PAUSE))
        mishaps.happen(chance.choice(["trial", "driver", "all"]))
    assert mishaps.driver.wait(3600) == 0, (torn / "drivers.log").read_text()[-2000:]
    print(f"killed {mishaps.count['driver']} drivers and {mishaps.count['trial']} trials")
    assert quality(torn) == quality(whole)
    for cell in ("d1-s0", "d3-s0"):
        log = (torn / "killed" / cell / "log.txt").read_text()
        assert log.count(": trained, ") <= 1, "no cell is trained twice"
        lines = (torn / "killed" / cell / "evaluations.jsonl").read_text().splitlines()
        assert len(lines) == 2, "each point is recorded once"
    again = perform(mishaps.argv)
    assert "all 2 cells are done, nothing to do" in again
