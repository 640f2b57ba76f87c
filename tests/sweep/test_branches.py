"""Cells that differ in `trainer.max_steps` alone: the longest is trained, the others branch off.

`KILLS=10 pytest -s tests/sweep/test_branches.py` kills a real sweep more often, and says how it went.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from madformer.config import write_config
from madformer.config.identity import read_branch_step
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from madformer.runs.files import read_previews
from madformer.sweep.cells import sweep_cells
from madformer.sweep.driver import run_sweep
from madformer.sweep.forecast import training_flops
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.needs import cell_needs, drop_branch_points
from madformer.sweep.status import print_plan, print_status
from madformer.sweep.trial import trial_commands
from tests.sweep.claimer import finish
from tests.sweep.driver import stand_ins
from tests.tiny_runs import DIGITS, TINY, command, differences, environment, perform, scalars
from tests.training.test_train_resume import loaded

KILLS = int(os.environ.get("KILLS", "1"))
LONGEST_PAUSE = 30
"""Seconds between two kills."""

BUDGETS = (
    "grid={trainer.max_steps: [16, 20, 40], model.diffusion_depth: [2]}",
    "overrides={evaluation.num_samples: 8, evaluation.held_out_split: null, optimizer.warmup_steps: 2, "
    "optimizer.decay_fraction: 0.25, trainer.checkpoint_every: 10, trainer.keep_checkpoints: 2}",
)
"""Branches begin after steps 12 and 15 of 40."""


def cells_of(sweep_file, *overrides):
    """The cells by their lengths."""
    return {cell.max_steps: cell for cell in sweep_cells(load_sweep(sweep_file, [*BUDGETS, *overrides]))}


def save(cell, *steps):
    """Whole files in the places of checkpoints."""
    if not list_checkpoints(cell.run):
        write_config(cell.config, cell.run)
    for step in steps:
        path = checkpoint_path(cell.run, step)
        path.parent.mkdir(exist_ok=True)
        zipfile.ZipFile(path, "w").close()


def steps_of(cell):
    return [checkpoint_step(path) for path in list_checkpoints(cell.run)]


def test_the_longest_is_trained_and_saves_where_the_others_branch_off(sweep_file):
    cells = cells_of(sweep_file, "seeds=[0,1]")
    longest = cells[40]
    assert longest.trunk is None and longest.overrides[-1] == "trainer.checkpoint_steps=[12,15]"
    assert longest.config.trainer.checkpoint_steps == (12, 15)
    assert [(cells[steps].trunk, cells[steps].branch_step) for steps in (16, 20)] == [(longest, 12), (longest, 15)]
    for alone in (["optimizer.warmup_steps=null"], ["optimizer.warmup_steps=0", "optimizer.decay_fraction=1"]):
        assert [cell.trunk for cell in cells_of(sweep_file, *alone).values()] == [None] * 3
    many = cells_of(sweep_file, "evaluate.checkpoints=last2", "trainer.checkpoint_every=7")
    assert [cell.trunk is None for cell in many.values()] == [False, True, True], "after step 15 only the last one is saved"
    own = cells_of(sweep_file, "trainer.checkpoint_steps=[5]")
    assert own[40].overrides[-1] == "trainer.checkpoint_steps=[5,12,15]" and own[16].config.trainer.checkpoint_steps == (5,)


def test_a_branch_waits_for_its_trunk_and_begins_where_that_has_a_checkpoint(sweep_file):
    cells = cells_of(sweep_file)
    trunk, branch = cells[40], cells[20]
    waiting = "to train, waits for its trunk, max_steps40-d2-s0, to reach step 15"
    for steps in ((), (10,), (14,)):
        save(trunk, *steps)
        needs = cell_needs(branch)
        assert str(needs) == waiting and not needs and not needs.is_done and trial_commands(branch) == []
    save(trunk, 15)
    assert cell_needs(branch) and str(cell_needs(branch)) == "to train, branches from max_steps40-d2-s0 after step 15"
    train, evaluate = trial_commands(branch)
    assert train[-2:] == ["--branch", str(trunk.run)] and evaluate[3] == "evaluate"
    for step in (15, 14, 10):
        checkpoint_path(trunk.run, step).unlink()
    assert str(cell_needs(branch)) == waiting
    save(trunk, 10, 20)
    assert str(cell_needs(branch)).endswith("after step 10"), "the trunk has gone past it"
    checkpoint_path(trunk.run, 10).unlink()
    assert str(cell_needs(branch)) == "to train" and "--branch" not in trial_commands(branch)[0]
    save(trunk, 15)
    save(branch, 3)
    assert str(cell_needs(branch)) == "to train" and "--branch" not in trial_commands(branch)[0], "it goes on with its own"


def test_runs_that_lie_elsewhere_are_trunks_and_branches_too(sweep_file):
    cells = cells_of(sweep_file)
    save(cells[40], 15)
    cells[40].run.rename("runs/by_hand")
    branch = cells_of(sweep_file)[20]
    assert trial_commands(branch)[0][-2:] == ["--branch", "runs/by_hand"]


def test_the_checkpoints_of_branches_go_when_these_are_trained(sweep_file):
    cells = cells_of(sweep_file)
    trunk = cells[40]
    save(trunk, 12, 15)
    save(cells[16], 16)
    save(cells[20], 20)
    drop_branch_points(list(cells.values()), trunk.run.parent)
    assert steps_of(trunk) == [15], "the trunk goes on from its newest"
    save(trunk, 12, 30, 40)
    checkpoint_path(cells[20].run, 20).unlink()
    drop_branch_points(list(cells.values()), trunk.run.parent)
    assert steps_of(trunk) == [15, 30, 40]
    save(cells[20], 20)
    own = cells_of(sweep_file, "trainer.checkpoint_steps=[15]")
    drop_branch_points(list(own.values()), trunk.run.parent)
    assert steps_of(trunk) == [15, 30, 40], "the sweep asks for it"
    drop_branch_points(list(cells.values()), trunk.run.parent.parent)
    assert steps_of(trunk) == [15, 30, 40], "a run of somebody else's keeps its checkpoints"
    drop_branch_points(list(cells.values()), trunk.run.parent)
    assert steps_of(trunk) == [30, 40]


def test_the_plan_and_the_status_count_what_is_really_trained(sweep_file, capsys):
    sweep = load_sweep(sweep_file, BUDGETS)
    cells = cells_of(sweep_file)
    print_plan(sweep)
    text = capsys.readouterr().out
    assert "2 branches share a trunk: 49 of 76 steps are trained" in text
    own = training_flops(cells[40].config) / 40 * 49
    assert float(re.search(r"Training ([\d.]+) GFLOPs", text)[1]) == pytest.approx(own / 1e9, rel=0.01)
    for cell, step in ((cells[40], 0), (cells[20], 10), (cells[16], 0)):
        finish(cell)
        write_config(cell.config, cell.run, {"step": step, "run": "elsewhere"} if step else None)
    print_status(sweep)
    assert "1 branch shares a trunk: 66 of 76 steps are trained" in capsys.readouterr().out


def test_the_driver_ends_and_says_what_branches_of_a_failed_trunk_wait_for(sweep_file):
    Path("fail-max_steps40-d2-s0").touch()
    lines = []
    assert run_sweep(load_sweep(sweep_file, BUDGETS), commands=stand_ins, say=lines.append) == 1
    waiting = "  max_steps20-d2-s0: still to train, waits for its trunk, max_steps40-d2-s0, to reach step 15, log "
    assert any(line.startswith(waiting) for line in lines) and "small: 0 of 3 cells are done" in lines


def real_sweep(folder, steps):
    """A sweep of real trainings, of lengths that depend on how often it is killed."""
    settings = dict(override.split("=", 1) for override in TINY)
    overrides = {
        key: yaml.safe_load(value) for key, value in settings.items() if key not in ("trainer.max_steps", "evaluation.nfe")
    }
    overrides |= {"optimizer.warmup_steps": 4, "optimizer.decay_fraction": 0.25, "evaluation.preview_every": 12}
    spec = {"name": "lengths", "experiment": str(DIGITS), "overrides": overrides, "workers": 2, "output_dir": str(folder)}
    spec |= {"grid": {"trainer.max_steps": steps}, "evaluate": {"nfe": [3]}, "retries": 1000}
    path = folder / "lengths.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_killed_at_random_moments_all_runs_are_those_that_were_trained_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("REAL_TRAINING", "1")
    longest = 48 * KILLS
    path, chance, count = real_sweep(tmp_path, [longest // 3, longest // 2, longest]), random.Random(0), Counter()
    log = (tmp_path / "drivers.log").open("ab")

    def start():
        argv = [sys.executable, "-m", "tests.sweep.driver", str(path)]
        return subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log, env=environment())

    driver, (first, second, trunk) = start(), sweep_cells(load_sweep(path))
    while KILLS == 1 and not steps_of(first):
        time.sleep(0.02)
    for _ in range(KILLS):
        time.sleep(chance.uniform(0, LONGEST_PAUSE) if KILLS > 1 else 0)
        assert driver.poll() is None, "it was over before all kills"
        driver.kill()
        driver.wait()
        count["driver"] += 1
        listed = subprocess.run(["pgrep", "-f", f"madformer train .*{tmp_path}"], capture_output=True, text=True, check=False)
        for number in map(int, listed.stdout.split()):
            os.kill(number, signal.SIGKILL)
            count["trial"] += 1
        driver = start()
    assert driver.wait(3600) == 0, (tmp_path / "drivers.log").read_text()[-2000:]
    print(f"killed {count['driver']} drivers and {count['trial']} trials")
    assert [read_branch_step(cell.run) for cell in (first, second, trunk)] == [first.branch_step, second.branch_step, 0]
    assert all(step % 6 == 0 or step == longest for step in steps_of(trunk)), "branch points are gone"
    for cell in (first, second, trunk):
        alone = tmp_path / "alone" / cell.name
        perform(command("train", cell.experiment, *cell.overrides, f"output_dir={alone.parent}", "trainer.checkpoint_steps=[]"))
        assert differences(loaded(alone, cell.max_steps), loaded(cell.run, cell.max_steps)) == []
        assert scalars(alone) == scalars(cell.run) and read_previews(alone) == read_previews(cell.run) != []
        text = (cell.run / "log.txt").read_text()
        assert text.count(": trained, ") <= 1 and (cell is trunk or ": training " not in text), "nothing is trained twice"
