"""Sweeps on a real Slurm and a real PostgreSQL, which break in the middle. `make test-cluster` runs these."""

import csv
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState

from tests.conftest import ROOT
from tests.sweep.servers import database, needs_servers, script, slurm
from tests.sweep.test_queue import trials
from tests.tiny_runs import DIGITS, TINY, command, execute

pytestmark = needs_servers

SECONDS = 1200


def write_sweep(folder: Path, **changes: object) -> Path:
    settings = dict(override.split("=", 1) for override in TINY)
    overrides = {key: yaml.safe_load(value) for key, value in settings.items()}
    for key in ("model.diffusion_depth", "evaluation.nfe"):
        del overrides[key]
    overrides |= {"trainer.checkpoint_every": 20, "evaluation.preview_every": 40, **changes.pop("overrides", {})}
    spec = {
        "name": "cells",
        "experiment": str(DIGITS),
        "overrides": overrides,
        "output_dir": str(folder),
        "workers": 2,
        **changes,
    }
    path = folder / "cells.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def wait_for(condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.5)


def quality(sweep: Path) -> list[tuple[str, ...]]:
    """The report's columns but for what a clock measured."""
    execute(command("report", sweep))
    with (sweep.parent / "cells/report.csv").open() as file:
        return [tuple(row[:-4]) for row in csv.reader(file)]


def steps(folder: Path) -> list[int]:
    """Newest checkpoints of all cells."""
    found: dict[Path, int] = {}
    for path in folder.glob("cells/*/checkpoints/step-*.ckpt"):
        found[path.parent] = max(found.get(path.parent, 0), int(path.stem.removeprefix("step-")))
    return list(found.values())


def test_slurm_preempts_and_ends_trials_that_go_on_from_their_checkpoint(tmp_path):
    grid = {"grid": {"model.diffusion_depth": [1, 3]}, "seeds": [0, 1], "evaluate": {"nfe": [3, 9]}}
    grid |= {"overrides": {"trainer.max_steps": 900}}
    (tmp_path / "here").mkdir()
    here = write_sweep(tmp_path / "here", **grid)
    gpus = tmp_path / "gpus"
    jobs = {"minutes": 3, "signal_seconds": 60, "options": {"gres": "gpu:1"}}
    jobs["setup"] = [f'echo "$SLURM_ARRAY_TASK_ID $SLURM_RESTART_COUNT $CUDA_VISIBLE_DEVICES" >> {gpus}']
    on_slurm = write_sweep(tmp_path, **grid, launcher="slurm", slurm=jobs)
    with slurm() as environment, (tmp_path / "driver.log").open("w") as log:

        def start():
            argv = command("sweep", "run", on_slurm)
            return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=log)

        driver = start()
        wait_for(lambda: len(steps(tmp_path)) == 4)
        driver.kill()  # its jobs go on, and the next one finds them
        driver.wait()
        subprocess.run(
            ["sbatch", "-p", "urgent", "--gres=gpu:4", "--wrap", "sleep 5"], env=environment, cwd=tmp_path, check=True
        )
        driver = start()
        assert driver.wait(SECONDS) == 0, (tmp_path / "driver.log").read_text()
    said = (tmp_path / "driver.log").read_text()
    assert said.count("submitted as job") == 1 and said.count("runs already, madformer-cells-") == 4, said
    first = [line.split() for line in gpus.read_text().splitlines() if len(line.split()) == 2]
    assert sorted(gpu for _, gpu in first) == ["0", "1", "2", "3"], "each of four trials at once has a GPU of its own"
    put_off = resumed = 0
    for cell in ("d1-s0", "d1-s1", "d3-s0", "d3-s1"):
        text = (tmp_path / "cells" / cell / "log.txt").read_text()
        resumed += len(re.findall("resuming after step", text))
        put_off += text.count("[the job's time is over, it is queued again]")
        assert text.count(": trained, 900 steps") == 1
    print(f"{put_off} jobs met their time limit, trials went on {resumed} times")
    assert put_off >= 1 and resumed > 4, "all four were preempted, and some met their time limit in training"
    execute(command("sweep", "run", here), timeout=SECONDS)
    assert quality(on_slurm) == quality(here)


def test_the_tasks_of_a_job_are_the_processes_of_one_run(tmp_path):
    """Two of DDP; and what they train and measure is what two processes of this machine do."""
    both = {"grid": {"model.diffusion_depth": [2]}, "evaluate": {"nfe": [3, 9]}, "devices_per_trial": 2}
    (tmp_path / "here").mkdir()
    here = write_sweep(tmp_path / "here", **both)
    on_slurm = write_sweep(tmp_path, **both, launcher="slurm", slurm={"minutes": 10})
    with slurm() as environment:
        done = subprocess.run(
            command("sweep", "run", on_slurm), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    log = tmp_path / "cells/d2-s0/log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert log.read_text().count(": trained, 24 steps") == 1 and (log.parent / "log.rank1.txt").is_file()
    execute(command("sweep", "run", here))
    distance = quality(here)[0].index("fd_digits")
    distances = [[float(row[distance]) for row in quality(sweep)[1:]] for sweep in (on_slurm, here)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4), "equal up to the order of sums"


def test_a_job_that_slurm_does_not_take_is_one_line(tmp_path):
    sweep = write_sweep(tmp_path, grid={"model.diffusion_depth": [1]}, launcher="slurm", slurm={"partition": "nowhere"})
    with slurm() as environment:
        done = subprocess.run(
            command("sweep", "run", sweep), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert re.search(r"madformer: slurm: the jobs were not taken: .*invalid partition specified: nowhere", done.stderr), (
        done.stderr
    )


def test_a_postgresql_that_is_away_for_half_a_minute_costs_no_trial(sweep_file, monkeypatch):
    monkeypatch.setenv("TRIAL_SECONDS", "4")
    journal = Path("journal")
    with database("postgresql") as (url, folder):
        options = [f"storage={url}", "grid.model.diffusion_depth=[1,2,3,4,5,6]"]
        argv = [sys.executable, "-m", "tests.sweep.driver", sweep_file, *options]
        drivers = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
        wait_for(lambda: journal.exists() and "trained" in journal.read_text())
        script("postgresql.sh", "stop", folder)
        time.sleep(30)
        script("postgresql.sh", "start", folder, 15437)
        outputs = [driver.communicate(timeout=SECONDS)[0] for driver in drivers]
        from madformer.sweep.load_sweep import load_sweep

        states = Counter(trial.state for trial in trials(load_sweep(sweep_file, options)))
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert all("the storage does not answer, trials go on, waiting" in text for text in outputs), outputs
    assert states == {TrialState.COMPLETE: 6}
    counts = Counter(journal.read_text().splitlines())
    assert len(counts) == 3 * 6 and set(counts.values()) == {1}


@pytest.mark.parametrize("storage", ["sqlite", "postgresql"])
def test_two_drivers_really_train_each_of_twelve_cells_once(tmp_path, storage):
    """4 depths x 5 budgets x 3 seeds."""
    grid = {"grid": {"model.diffusion_depth": [1, 2, 3, 4]}, "seeds": [0, 1, 2], "evaluate": {"nfe": [4, 8, 12, 16, 20]}}
    grid |= {"overrides": {"model.depth": 4, "trainer.max_steps": 6, "evaluation.num_samples": 4}}
    with database("postgresql") as (url, _):
        sweep = write_sweep(tmp_path, **grid, **({"storage": url} if storage == "postgresql" else {}))
        argv = command("sweep", "run", sweep)
        drivers = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [driver.communicate(timeout=SECONDS)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0] and all(": finished" in text for text in outputs), outputs
    logs = [path.read_text() for path in tmp_path.glob("cells/*/log.txt")]
    assert len(logs) == 12
    assert all(text.count(": trained, 6 steps") == 1 and text.count("madformer evaluate") == 1 for text in logs)
