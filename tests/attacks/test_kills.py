"""Kills and signals at random moments. SLOW=1 runs it; each attack prints its tries and how many were survived."""

import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from madformer.evaluation.record import read_points
from madformer.runs.checkpoints import checkpoint_path, find_flaw, list_checkpoints
from tests.runs.test_exchange import released
from tests.tiny_runs import command, differences, environment, perform, run_until, scalars, train_command

pytestmark = pytest.mark.slow

LAST = 24
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGUSR2, signal.SIGHUP]


def say(capsys, what, tries, survived):
    with capsys.disabled():
        print(f"\n{what}: {tries} tries, {survived} survived")
    assert survived == tries


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    perform(train_command(folder))
    return folder / "digits"


def test_kills_of_train(undisturbed, tmp_path, capsys):
    """Whatever signal comes whenever: the same command goes on, and ends with the same weights and logs."""
    run, chosen, survived, tries = tmp_path / "digits", random.Random(0), 0, 0
    while not checkpoint_path(run, LAST).exists() and tries < 12:
        number = SIGNALS[tries % len(SIGNALS)]
        status, printed = run_until(train_command(tmp_path), after(chosen.uniform(0, 4)), tmp_path / "log", number)
        tries += 1
        survived += "Traceback" not in printed and not any(map(find_flaw, list_checkpoints(run))) and status is not None
    perform(train_command(tmp_path))
    assert differences(*(torch.load(checkpoint_path(each, LAST), weights_only=True) for each in (undisturbed, run))) == []
    assert scalars(run) == scalars(undisturbed) and not list(run.rglob("checkpoints/.*.tmp"))
    say(capsys, "kills of train", tries, survived)


def test_kills_of_evaluate(undisturbed, tmp_path, capsys):
    run, whole = (shutil.copytree(undisturbed, tmp_path / name / "digits") for name in ("killed", "whole"))
    perform(command("evaluate", whole))
    expected, chosen, survived, tries = read_points(whole), random.Random(1), 0, 0
    while len(read_points(run)) < len(expected) and tries < 10:
        number = SIGNALS[tries % len(SIGNALS)]
        _, printed = run_until(command("evaluate", run), after(chosen.uniform(0, 4)), tmp_path / "log", number)
        tries += 1
        survived += "Traceback" not in printed
    perform(command("evaluate", run))
    assert [point["metrics"] for point in read_points(run)] == [point["metrics"] for point in expected]
    assert not list(run.glob("features/*"))
    say(capsys, "kills of evaluate", tries, survived)


def test_kills_of_import(tmp_path, capsys):
    """Killed at random moments, of which the last tenth of a second matters: the same command imports it."""
    file, survived, tries = released(tmp_path / "released.pt"), 0, 8
    start = time.monotonic()
    expected = perform(command("import", file, "--out", tmp_path / "whole"))
    assert expected
    subprocess.run(command("import", file, "--out", tmp_path / "timed"), env=environment(), check=True, capture_output=True)
    seconds = time.monotonic() - start
    for number in range(tries):
        run = tmp_path / f"run{number}"
        process = subprocess.Popen(command("import", file, "--out", run), env=environment(), stdout=subprocess.DEVNULL)
        time.sleep(seconds * random.Random(number).uniform(0.5, 1.0))
        process.kill()
        process.wait()
        perform(command("import", file, "--out", run))
        survived += [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000000.ckpt"]
    say(capsys, "kills of import", tries, survived)
