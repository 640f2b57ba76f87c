"""A real sweep that is killed at random moments ends with the table of one that was not, digit for digit.

`KILLS=10 pytest tests/sweep/test_killed.py` kills more often.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.runs import DIGITS, TINY, command, execute

KILLS = int(os.environ.get("KILLS", "3"))


def sweep_file(folder: Path) -> Path:
    settings = dict(override.split("=", 1) for override in TINY)
    overrides = {
        key: yaml.safe_load(value) for key, value in settings.items() if key not in ("model.diffusion_depth", "evaluation.nfe")
    }
    overrides |= {"trainer.max_steps": 120, "trainer.checkpoint_every": 20}
    spec = {"name": "killed", "experiment": str(DIGITS), "overrides": overrides, "workers": 2, "output_dir": str(folder)}
    spec |= {"grid": {"model.diffusion_depth": [1, 3]}, "evaluate": {"nfe": [3, 9]}}
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def quality(folder: Path) -> list[tuple[str, ...]]:
    """The report's columns but for the seconds."""
    execute(command("report", folder / "killed.yaml"))
    with (folder / "killed/report.csv").open() as file:
        return [tuple(row[:-3]) for row in csv.reader(file)]


def trials(folder: Path) -> list[int]:
    """Processes that work on the sweep's cells: they outlive a killed driver."""
    listed = subprocess.run(
        ["pgrep", "-f", f"madformer (train|evaluate).*{folder}"], capture_output=True, text=True, check=False
    )
    return [int(number) for number in listed.stdout.split()]


def kill(driver: subprocess.Popen[bytes], folder: Path, with_trials: bool) -> None:
    driver.kill()
    driver.wait()
    for number in trials(folder) if with_trials else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_killed_at_random_moments(tmp_path):
    chance = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, killed):
        folder.mkdir()
    execute(command("sweep", "run", sweep_file(whole)))
    argv = command("sweep", "run", sweep_file(killed))
    for number in range(KILLS):
        driver = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(1, 14))
        kill(driver, killed, with_trials=number % 3 != 2)
    printed = execute(argv)
    assert "killed: 2 of 2 cells are done" in printed or "all 2 cells are done" in printed
    assert quality(killed) == quality(whole)
    for cell in ("d1-s0", "d3-s0"):
        log = (killed / "killed" / cell / "log.txt").read_text()
        assert log.count(": trained, 120 steps") <= 1, "no cell is trained twice"
        lines = (killed / "killed" / cell / "evaluations.jsonl").read_text().splitlines()
        assert len(lines) == 2, "each point is recorded once"
    again = execute(argv)
    assert "all 2 cells are done, nothing to do" in again
