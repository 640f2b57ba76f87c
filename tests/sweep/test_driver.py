"""Drivers: real processes, which run stand-ins for the trials, and are killed, interrupted and started side by side."""

import contextlib
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from madformer.config import load_experiment
from madformer.errors import ConfigError, InputError
from madformer.evaluation.record import read_points
from madformer.runs.checkpoints import checkpoint_path
from madformer.runs.files import claim_folder
from madformer.sweep.cells import sweep_cells
from madformer.sweep.driver import run_sweep
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.needs import cell_needs
from madformer.sweep.trial import log_path, trial_commands
from tests.conftest import ROOT
from tests.sweep.driver import SECONDS, journal, output, run, stand_ins, start, wait_for
from tests.sweep.trial import INTACT
from tests.sweep.trial import train as train_stand_in

ONE = "grid.model.diffusion_depth=[2]"
FOUR = "grid.model.diffusion_depth=[1,2,4,8]"


def test_the_commands_are_those_that_a_user_would_type(sweep_file):
    cell = sweep_cells(load_sweep(sweep_file))[0]
    assert trial_commands(cell) == [
        [sys.executable, "-m", "madformer", "train", "runs/small/d2-s0/cell.yaml"],
        [sys.executable, "-m", "madformer", "evaluate", "runs/small/d2-s0", "--nfe", "16,24"],
    ]


def test_what_is_evaluated_may_change_after_a_run_has_begun(sweep_file):
    assert run(sweep_file, ONE)[0] == 0
    changed = "overrides.evaluation.sampler=unipc"
    [*_, command] = trial_commands(sweep_cells(load_sweep(sweep_file, [changed]))[0])
    assert command[3:] == ["evaluate", "runs/small/d2-s0", "--nfe", "16,24", 'evaluation.sampler="unipc"']
    before = len(journal())
    assert run(sweep_file, ONE, changed)[0] == 0
    assert journal()[before:] == ["evaluate d2-s0 16,24"]
    assert run(sweep_file, ONE, changed)[1] == run(sweep_file, ONE)[1] == ["small: all 1 cells are done, nothing to do"]


def test_every_cell_is_trained_and_evaluated_and_a_second_run_does_nothing(sweep_file):
    status, lines = run(sweep_file)
    assert status == 0
    assert sorted(journal()) == [
        "evaluate d2-s0 16,24", "evaluate d4-s0 16,24", "train d2-s0", "train d4-s0", "trained d2-s0 1", "trained d4-s0 1"
    ]  # fmt: skip
    assert sorted(lines[:2]) == [f"d{d}-s0: starts, to train, log runs/small/d{d}-s0/log.txt" for d in (2, 4)]
    assert re.fullmatch(r"d[24]-s0: finished after \d+ s, 2/2 cells done", lines[-2])
    assert lines[-1] == "small: 2 of 2 cells are done"
    assert "$ " in Path("runs/small/d2-s0/log.txt").read_text()

    before = journal()
    assert run(sweep_file) == (0, ["small: all 2 cells are done, nothing to do"]) and journal() == before
    driver = start()
    assert output(driver) == "small: all 2 cells are done, nothing to do\nheavy:\n" and driver.returncode == 0


def test_the_threads_of_a_trial_are_pinned(sweep_file):
    run(sweep_file, "threads=3", ONE)
    assert "trained d2-s0 3" in journal()


def test_a_budget_more_is_an_evaluation_more(sweep_file):
    run(sweep_file, ONE)
    before = len(journal())
    assert run(sweep_file, ONE, "evaluate.nfe=[16,32,24]")[0] == 0
    assert journal()[before:] == ["evaluate d2-s0 32"]


def test_a_value_more_in_the_grid_is_a_training_more(sweep_file):
    run(sweep_file, ONE)
    before = len(journal())
    assert run(sweep_file, "grid.model.diffusion_depth=[2,8]")[0] == 0
    assert journal()[before:] == ["train d8-s0", "trained d8-s0 1", "evaluate d8-s0 16,24"]


def test_a_failing_trial_says_why_and_is_tried_again_when_asked(sweep_file):
    Path("fail-d2-s0").touch()
    status, lines = run(sweep_file)
    assert status == 1
    failed = r"d2-s0: failed \(error\), exit status 1, log runs/small/d2-s0/log.txt, after \d+ s, [01]/2 cells done"
    assert any(re.fullmatch(failed, line) for line in lines)
    left = [
        "small: 1 of 2 cells are done",
        "  d2-s0: error, exit status 1 ... RuntimeError: out of luck, log runs/small/d2-s0/log.txt",
        "small: what has failed is tried again with --retry-failed",
    ]
    assert lines[-3:] == left
    Path("fail-d2-s0").unlink()
    assert run(sweep_file) == (1, left), "it would fail again, for all one knows"
    assert run(sweep_file, retry_failed=True)[0] == 0
    assert Counter(journal())["train d2-s0"] == 2 and Counter(journal())["train d4-s0"] == 1


def test_a_trial_that_died_is_tried_again_up_to_a_limit(sweep_file):
    Path("die-d2-s0").write_text("here\n" * 9)
    status, lines = run(sweep_file, ONE, "retries=1")
    assert status == 1 and Counter(journal())["train d2-s0"] == 2
    died = r"d2-s0: died, killed by SIGKILL, as the system does when memory runs out, log runs/small/d2-s0/log.txt, after .*"
    assert sum(re.fullmatch(died, line) is not None for line in lines) == 2
    assert any("it died 2 times in a row without having got any further" in line for line in lines)
    assert run(sweep_file, ONE, "retries=1", retry_failed=True)[0] == 1 and Counter(journal())["train d2-s0"] == 4


def test_a_trial_that_gets_further_may_die_more_often(sweep_file):
    Path("die-d2-s0").write_text("further\n" * 3)
    assert run(sweep_file, ONE, "retries=0")[0] == 0
    assert Counter(journal())["train d2-s0"] == 4


def test_commands_that_do_not_do_their_work_are_a_failure(sweep_file):
    status, lines = run(sweep_file, commands=lambda cell: [[sys.executable, "-c", ""]])
    assert status == 1
    assert "  d2-s0: error, its commands exited with 0, yet it is still to train, log runs/small/d2-s0/log.txt" in lines


def test_a_trial_that_cannot_start_is_a_failure(sweep_file):
    status, lines = run(sweep_file, commands=lambda cell: [["./nowhere"]])
    assert status == 1
    assert "  d2-s0: error, [Errno 2] No such file or directory: './nowhere', log runs/small/d2-s0/log.txt" in lines


def test_gpus_are_shared_out_in_groups(sweep_file, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    four = [FOUR, "trainer.accelerator=auto", "workers=null", "devices_per_trial=2"]
    monkeypatch.setenv("TRIAL_SECONDS", "0.3")
    assert run(sweep_file, *four)[0] == 0
    given = Counter(line.split()[2] for line in journal() if line.startswith("gpus"))
    assert given == {"4,5": 2, "6,7": 2}
    threads = {line.split()[2] for line in journal() if line.startswith("trained")}
    assert threads == {"5"}, "the user's: only trials on the CPU are pinned"


def test_two_drivers_do_not_share_a_gpu(sweep_file):
    """Nor does one whose predecessor was killed, and left a trial behind."""
    options = ["trainer.accelerator=auto", "workers=null"]
    Path("hold-d2-s0").touch()
    first = start(ONE, *options, CUDA_VISIBLE_DEVICES="uuid-1,uuid-2")
    wait_for(lambda: "train d2-s0" in journal())
    first.kill()
    first.wait()
    second = start("grid.model.diffusion_depth=[4]", *options, CUDA_VISIBLE_DEVICES="uuid-1,uuid-2")
    assert second.wait(SECONDS) == 0
    Path("hold-d2-s0").unlink()
    wait_for(lambda: sum(line.startswith("gpus") for line in journal()) == 2)
    assert sorted(line for line in journal() if line.startswith("gpus")) in (
        ["gpus d2-s0 uuid-1", "gpus d4-s0 uuid-2"], ["gpus d2-s0 uuid-2", "gpus d4-s0 uuid-1"]
    )  # fmt: skip


@pytest.mark.parametrize("accelerator", ["cuda", "auto"])
def test_too_few_gpus_are_said_at_once(sweep_file, monkeypatch, accelerator):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="devices_per_trial = 2: there are 1 GPUs here"):
        run(sweep_file, f"trainer.accelerator={accelerator}", "devices_per_trial=2")


def test_cells_that_fail_one_after_the_other_stop_the_driver(sweep_file):
    depths = range(1, 9)
    for depth in depths:
        Path(f"fail-d{depth}-s0").touch()
    status, lines = run(sweep_file, f"grid.model.diffusion_depth={list(depths)}")
    assert status == 1 and 4 <= sum(line.startswith("train ") for line in journal()) <= 6
    assert lines[-2].startswith("small: ") and "cells in a row failed within 60 s, no more were started" in lines[-2]
    assert "  d8-s0: still to train, log runs/small/d8-s0/log.txt" in lines


def test_every_way_of_sampling_is_evaluated(sweep_file):
    ways = [
        "evaluate.samplers=[ddim,unipc]",
        "evaluate.seeds=[0,1]",
        "evaluate.checkpoints=last2",
        "trainer.checkpoint_every=5",
    ]
    cell = sweep_cells(load_sweep(sweep_file, [*ways, ONE]))[0]
    checkpoint = checkpoint_path(cell.run, 5)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(INTACT)
    assert cell_needs(cell).points == 2 * 2 * 2 * 2
    assert run(sweep_file, *ways)[0] == 0
    assert len(read_points(cell.run)) == 16 and not cell_needs(cell)
    [*_, command] = trial_commands(sweep_cells(load_sweep(sweep_file, [*ways, "evaluate.seeds=[0,1,2]"]))[0])
    assert command[4:] == [
        "runs/small/d2-s0", "--nfe", "16,24", "--sampler", "ddim,unipc", "--seeds", "0,1,2", "--checkpoints", "last2"
    ]  # fmt: skip


def test_an_edited_experiment_is_refused_before_anything_starts(sweep_file):
    run(sweep_file, "grid.model.diffusion_depth=[4]")
    before = journal()
    message = "runs/small/d4-s0 is a run of another experiment: optimizer.lr = 0.003 there, 0.5 asked for"
    with pytest.raises(InputError, match=re.escape(message)):
        run(sweep_file, "optimizer.lr=0.5")
    assert journal() == before


def test_a_run_finished_by_hand_is_recognised(sweep_file):
    by_hand = load_experiment(
        ROOT / "experiments/digits.yaml", ["name=mine", "trainer.max_steps=10", "model.diffusion_depth=2"]
    )
    train_stand_in(str(ROOT / "experiments/digits.yaml"), "name=mine", "trainer.max_steps=10", "model.diffusion_depth=2")
    before = len(journal())
    assert run(sweep_file)[0] == 0
    assert sorted(journal()[before:]) == ["evaluate d4-s0 16,24", "evaluate mine 16,24", "train d4-s0", "trained d4-s0 1"]
    assert not Path("runs/small/d2-s0").exists() and len(read_points(by_hand.run_dir)) == 2


def test_a_sweep_without_data_is_planned_only(sweep_file):
    with pytest.raises(
        ConfigError, match="cell d2-s0: data.source = null: nothing to train on; such a sweep can only be planned"
    ):
        run(sweep_file, "data.source=null")
    assert not Path("runs").exists()


def test_drivers_started_at_once_share_the_cells(sweep_file):
    drivers = [start(FOUR, "seeds=[0,1]", TRIAL_SECONDS="0.2") for _ in range(2)]
    outputs = [output(driver) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert all("small: 8 of 8 cells are done" in text for text in outputs)
    assert all(": finished" in text for text in outputs), "one driver did it all"
    counts = Counter(journal())
    assert len(counts) == 3 * 8 and set(counts.values()) == {1}


@pytest.mark.parametrize("moment", ["train ", "trained ", "evaluate "])
def test_a_killed_driver_is_taken_over_by_the_next(sweep_file, moment):
    driver = start(FOUR, TRIAL_SECONDS="0.5")
    wait_for(lambda: any(line.startswith(moment) for line in journal()))
    driver.kill()
    driver.wait()
    status, lines = run(sweep_file, FOUR)
    assert status == 0 and "small: 4 of 4 cells are done" in lines, lines
    counts = Counter(line for line in journal() if line.startswith("train"))
    assert len(counts) == 2 * 4 and set(counts.values()) == {1}, "an orphan's training is waited for, not done again"


def test_a_live_driver_takes_over_from_a_killed_one(sweep_file):
    Path("hold-d2-s0").touch()
    first = start("workers=1")
    wait_for(lambda: "train d2-s0" in journal())
    second = start("workers=1")
    wait_for(lambda: "evaluate d4-s0 16,24" in journal())
    first.kill()
    first.wait()
    Path("hold-d2-s0").unlink()
    text = output(second)
    assert second.returncode == 0 and "d2-s0: finished" in text and "small: 2 of 2 cells are done" in text, text


def test_a_run_in_use_is_waited_for(sweep_file):
    sweep = load_sweep(sweep_file, [ONE])
    [cell] = sweep_cells(sweep)
    lines, held = [], contextlib.ExitStack()
    held.enter_context(claim_folder(cell.run, "train"))

    def say(line):
        lines.append(line)
        if line == "d2-s0: waits, the run is in use by another process":
            held.close()

    assert run_sweep(sweep, False, stand_ins, say) == 0
    assert sum("waits" in line for line in lines) == 1
    assert "is in use by another process (train)" in log_path(cell).read_text()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_interrupts_its_trials_and_the_next_goes_on(sweep_file, how):
    driver = start(TRIAL_SECONDS="50")
    wait_for(lambda: len(journal()) == 2)
    driver.send_signal(how)
    text = output(driver)
    assert driver.returncode == 130, text
    assert "small: interrupted; the same command goes on from here" in text and "Traceback" not in text
    assert sorted(journal())[:2] == ["interrupted d2-s0", "interrupted d4-s0"]
    assert run(sweep_file)[0] == 0
    assert not any(cell_needs(cell) for cell in sweep_cells(load_sweep(sweep_file)))


def test_a_second_interrupt_kills(sweep_file):
    driver = start(TRIAL_SECONDS="50", STUBBORN="1")
    wait_for(lambda: len(journal()) == 2)
    driver.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(0.5)
    driver.send_signal(signal.SIGINT)
    text = output(driver)
    assert driver.returncode == 130 and "interrupted" in text, text
    assert len(journal()) == 2
