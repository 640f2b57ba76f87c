"""The outcome of a trial, from real processes that end in each possible way."""

import signal
import sys
import time
from dataclasses import replace

import psutil
import pytest

from madformer.config import load_experiment
from madformer.sweep.cells import Cell, sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.trial import DONE, Outcome, TrialProcesses, failure, last_lines, log_path, read_outcome, trial_commands
from tests.sweep.claimer import finish, write_config
from tests.tiny_runs import DIGITS, TINY, environment


def run(cell, command):
    return TrialProcesses(cell, lambda cell: [command], print, environment()).run()


def python(text):
    return [sys.executable, "-c", text]


@pytest.fixture
def cell(sweep_file) -> Cell:
    return sweep_cells(load_sweep(sweep_file))[0]


@pytest.mark.parametrize(
    ("program", "kind", "reason"),
    [
        ("import torch; torch.empty(10**16)", "out of memory", "exit status 1"),
        ("[0] * 10**18", "out of memory", "exit status 1"),
        ("raise ZeroDivisionError", "error", "exit status 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed", "killed by SIGSEGV"),
        (
            "import sys; sys.exit('madformer: [Errno 28] No space left on device; what was complete is kept, the same command goes on')",
            "hindered",
            "exit status 1",
        ),
        ("import sys; print('madformer: bad data: a.arrow: not a shard'); sys.exit(2)", "bad data", "exit status 2"),
        ("import sys; print('madformer: unknown key'); sys.exit(2)", "mistake", "exit status 2"),
    ],
)
def test_how_a_process_ended(cell, program, kind, reason):
    outcome = run(cell, python(program))
    assert (outcome.state, outcome.kind) == ("failed", kind) and outcome.reason.splitlines()[0] == reason
    assert read_outcome(cell) == outcome, "another driver reads the same of the log"


def test_a_diverged_training_says_so(tmp_path, sweep_file):
    tiny = [
        f"overrides.{override}" for override in TINY if not override.startswith(("model.diffusion_depth", "evaluation.nfe"))
    ]
    changes = ["optimizer.lr=1e30", "grid.model.diffusion_depth=[2]", "evaluate.nfe=[3]", f"experiment={DIGITS}"]
    [cell] = sweep_cells(load_sweep(sweep_file, [*tiny, *changes]))
    outcome = TrialProcesses(cell, trial_commands, print, environment()).run()
    assert (outcome.state, outcome.kind) == ("failed", "diverged"), outcome
    assert "is not finite; " in outcome.reason
    assert read_outcome(cell) == outcome


@pytest.mark.parametrize("change", ["lr: 0.5", "max_steps: 7", "depth: 6", "name: other"])
def test_a_trial_trains_what_the_sweep_was_loaded_with(change, sweep_file, tmp_path):
    """Its files may change, or vanish, while the sweep runs."""
    experiment = tmp_path / "own.yaml"
    experiment.write_text(f"base: {DIGITS}\nname: own\n")
    cell = sweep_cells(load_sweep(sweep_file, [f"experiment={experiment}"]))[0]
    section = {"lr": "optimizer", "max_steps": "trainer", "depth": "model"}.get(change.partition(":")[0])
    experiment.write_text(f"base: {DIGITS}\n" + (f"{section}: {{{change}}}\n" if section else f"{change}\n"))
    sweep_file.unlink()
    [train, *_] = trial_commands(cell)
    assert train[3:] == ["train", str(cell.run / "cell.yaml")] and load_experiment(train[4]) == cell.config
    experiment.unlink()
    assert load_experiment(trial_commands(cell)[0][4]) == cell.config


def test_the_reason_is_the_end_of_what_was_printed(cell):
    run(cell, python("print('of an earlier command')"))
    outcome = run(cell, python("import sys; print(*range(20), sep='\\n'); sys.exit(1)"))
    assert outcome.reason == "exit status 1\n15\n16\n17\n18\n19"
    assert last_lines(cell, 2)[0] == "19" and last_lines(cell, 2)[1].startswith("[exit status 1 after ")


def test_a_run_that_is_done_has_not_failed_whatever_its_log_says(cell):
    assert read_outcome(cell).kind == "lost" and read_outcome(cell).reason == "it left no log"
    run(cell, python("raise SystemExit(1)"))
    finish(cell)
    assert read_outcome(cell) == DONE


def test_tuning_that_failed_has_failed_and_tuning_that_is_next_has_not(cell):
    finish(cell)
    first = replace(cell, tuned_with=())
    log_path(first).write_text("$ python -m madformer evaluate run\n[exit status 0 after 1 s]\n")
    assert read_outcome(first) == DONE, "tuning has only become possible"
    log_path(first).write_text("$ python -m madformer tune run\nRuntimeError: out of luck\n[exit status 1 after 1 s]\n")
    assert read_outcome(first).kind == "error"
    log_path(first).write_text("$ python -m madformer tune run\n[exit status 0 after 1 s]\n")
    assert read_outcome(first).reason.endswith("still to tune at 16, 24")


def test_a_log_without_an_end_is_that_of_a_lost_machine(cell):
    write_config(cell.config, cell.run)
    log_path(cell).write_text("$ madformer train\nstep 1\n[exit status 0 after 1 s]\n$ madformer evaluate\nsampled 1")
    outcome = read_outcome(cell)
    assert outcome.kind == "lost" and "sampled 1" in outcome.reason


def test_of_several_processes_the_one_that_failed_by_itself_says_why(cell):
    write_config(cell.config, cell.run)
    log_path(cell).write_text("[job a/0]\n$ madformer train\n[exit status -9 after 5 s]\n")
    log_path(cell, 1).write_text("[job a/0]\n$ madformer train\nmadformer: out of memory: 1 GiB\n[exit status 1 after 4 s]\n")
    assert read_outcome(cell, "job a/0").kind == "out of memory"


def test_what_an_earlier_job_left_in_the_log_does_not_count(cell):
    write_config(cell.config, cell.run)
    log_path(cell).write_text("[job a/0]\n$ madformer train\nmadformer: out of memory: 1 GiB\n[exit status 1 after 4 s]\n")
    assert read_outcome(cell, "job a/1", "; see there") == Outcome("failed", "lost", "it left no log; see there")


def test_a_process_alone_among_several_is_done_when_its_share_is(cell):
    processes = TrialProcesses(cell, lambda cell: [python("")], print, environment(), rank=1)
    assert processes.run() == DONE and log_path(cell, 1).is_file()


def test_what_a_killed_process_has_started_ends_with_it(cell, tmp_path):
    """As the other ranks of a local trial of several GPUs."""
    program = (
        "import os, signal, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    )
    program += f"open('{tmp_path}/child', 'w').write(str(child.pid)); os.kill(os.getpid(), signal.SIGKILL)"
    assert run(cell, python(program)).kind == "killed"
    child, end = int((tmp_path / "child").read_text()), time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < end, "it sleeps for a minute"
        time.sleep(0.05)


def is_alive(number):
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_name_of_a_signal_that_has_none():
    assert failure(-64, "").reason.startswith(f"killed by {signal.Signals(64).name}")
    assert failure(-63, "").reason == "killed by signal 63"
