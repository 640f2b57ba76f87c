"""Loggers beside TensorBoard: what they get, and that a resumed run goes on with it."""

import csv
import importlib.util
import shutil
import signal
import time

import pytest

from madformer.evaluation.tensorboard import board_address
from madformer.runs.checkpoints import checkpoint_path
from madformer.training.logging import RunCsvLogger, copy_rows
from tests.tiny_runs import command, perform, run_until, scalars, train_command

CSV = "trainer.loggers=[tensorboard,csv]"


def rows(run):
    """Of `metrics.csv`, without speeds: step -> column -> value."""
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in table]
    assert steps == sorted(set(steps)), "each step once"
    return {
        step: {name: float(value) for name, value in row.items() if value and name != "step" and "speed/" not in name}
        for step, row in zip(steps, table, strict=True)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    printed = perform(train_command(folder, CSV))
    assert f"as a table:     {folder / 'digits/metrics.csv'}" in printed
    address = board_address(runFilter="^digits$")
    assert f"in TensorBoard: tensorboard --logdir {folder}\n                {address}\n" in printed
    return folder / "digits"


def test_the_table_has_what_tensorboard_has(undisturbed):
    curves = {tag: points for tag, points in scalars(undisturbed).items() if not tag.startswith("preview/")}
    table = rows(undisturbed)
    assert list(table) == list(range(2, 25, 2))
    assert {tag: [(step, pytest.approx(row[tag])) for step, row in table.items() if tag in row] for tag in curves} == curves
    assert {name for row in table.values() for name in row} == curves.keys()


def test_killed_and_resumed_has_each_row_once(undisturbed, tmp_path):
    run, again = tmp_path / "digits", train_command(tmp_path, CSV)
    for step, delay in ((6, 0.0), (12, 0.07)):

        def reached(step=step, delay=delay):
            exists = checkpoint_path(run, step).exists()
            time.sleep(delay if exists else 0)
            return exists

        status, printed = run_until(again, reached, tmp_path / "log", signal.SIGKILL)
        assert status == -signal.SIGKILL, printed
        again = command("train", "--resume", run)
    perform(again)
    assert rows(run) == rows(undisturbed) and scalars(run) == scalars(undisturbed)


def test_another_logger_makes_no_new_run_and_may_come_later(undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "digits")
    (run / "metrics.csv").unlink()
    for step in (18, 24):
        checkpoint_path(run, step).unlink()
    perform(command("train", "--resume", run, "trainer.loggers=[csv]"))
    assert rows(run) == {step: row for step, row in rows(undisturbed).items() if step > 12}
    assert max(step for step, _ in scalars(run)["loss/total"]) == 12, "TensorBoard was not named"


def test_a_branch_begins_with_its_trunks_rows(tmp_path):
    settings = (CSV, "optimizer.warmup_steps=2", "evaluation.preview_every=null")
    perform(train_command(tmp_path, *settings, "name=trunk"))
    perform(
        command(
            "train",
            *train_command(tmp_path, *settings, "name=branch", "trainer.max_steps=36")[4:],
            "--branch",
            tmp_path / "trunk",
        )
    )
    trunk, branch = rows(tmp_path / "trunk"), rows(tmp_path / "branch")
    assert list(branch) == list(range(2, 37, 2)) and all(branch[step] == trunk[step] for step in range(2, 13, 2))


@pytest.mark.parametrize("end", ["", "0.5", "0.5,", "0.5,4", "0.5,4\r\n0.1,6\r\n"], ids=repr)
def test_what_a_killed_run_wrote_behind_its_checkpoint_is_cut_off(end, tmp_path):
    """The row of the checkpoint's step is whole: it was on the disk before the checkpoint was."""
    (tmp_path / "metrics.csv").write_text("loss,step\r\n0.9,2\r\n" + end, newline="")
    copy_rows(tmp_path, tmp_path, 2)
    assert (tmp_path / "metrics.csv").read_text() == "loss,step\n0.9,2\n"
    logger = RunCsvLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 0.5}, 4)
    logger.log_metrics({"loss": 0.1, "late": 7.0}, 6)
    assert rows(tmp_path) == {2: {"loss": 0.9}, 4: {"loss": 0.5}, 6: {"loss": 0.1, "late": 7.0}}


def test_a_table_of_another_kind_stays_as_it_is(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    copy_rows(tmp_path, tmp_path, 0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,0.5\n"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_without_wandb_the_message_says_how_to_install_it(tmp_path):
    printed = perform(train_command(tmp_path, "trainer.loggers=[wandb]"), status=2)
    assert printed == "madformer: trainer.loggers = ['wandb']: wandb is not installed: pip install 'madformer[wandb]'\n"
    assert not (tmp_path / "digits").exists()


def test_a_resumed_run_goes_on_with_its_run_of_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    perform(train_command(tmp_path, "trainer.loggers=[wandb]"))
    run = tmp_path / "digits"
    checkpoint_path(run, 24).unlink()
    time.sleep(1)  # wandb names its folders by the second
    perform(command("train", "--resume", run))
    number = (run / "wandb-id.txt").read_text().strip()
    assert [path.name.endswith(f"-{number}") for path in (run / "wandb").glob("offline-run-*")] == [True, True]
