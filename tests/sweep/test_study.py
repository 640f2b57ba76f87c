"""Who does what, and what is done: the queue of trials, over a real study and real run folders."""

import contextlib
import re
import sqlite3

import optuna
import pytest
from optuna.trial import TrialState

from madformer.checkpoints import checkpoint_path
from madformer.config import InputError, freeze
from madformer.evaluation.record import append_point
from madformer.sweep.needs import Needs, cell_needs, largest_budget_metric
from madformer.sweep.spec import load_sweep
from madformer.sweep.study import LastTrial, Queue, _open_study, last_trials
from tests.sweep.trial import point


def train(cell):
    freeze(cell.config, cell.run)
    checkpoint_path(cell.run, cell.max_steps).parent.mkdir(exist_ok=True)
    checkpoint_path(cell.run, cell.max_steps).touch()


def finish(cell):
    train(cell)
    for nfe in cell.budgets:
        append_point(cell.run, point(cell.config, nfe))


def trials(sweep):
    return optuna.load_study(study_name="small", storage=f"sqlite:///{sweep.folder}/study.db").trials


def claim_all(queue):
    return [trial.cell.name for trial in iter(queue.claim, None)]


@pytest.fixture
def sweep(sweep_file):
    return load_sweep(sweep_file)


def test_needs_follow_the_run_s_folder(sweep):
    cell = sweep.cells()[0]
    assert cell_needs(cell) == Needs(training=True, budgets=(16, 24)) and str(cell_needs(cell)) == "to train"
    freeze(cell.config, cell.run)
    assert cell_needs(cell).training
    train(cell)
    assert cell_needs(cell) == Needs(training=False, budgets=(16, 24)) and str(cell_needs(cell)) == "to evaluate at 16, 24"
    append_point(cell.run, point(cell.config, 16))
    assert cell_needs(cell).budgets == (24,) and largest_budget_metric(cell) is None
    append_point(cell.run, point(cell.config, 24))
    assert not cell_needs(cell) and largest_budget_metric(cell) == ("fd_digits", 1000 / 24)


@pytest.mark.parametrize(
    "change", [{"step": 9}, {"weights": "model"}, {"num_samples": 9}, {"seed": 1}, {"config_hash": "0" * 16}, {"nfe": 17}]
)
def test_another_measurement_does_not_count(sweep, change):
    cell = sweep.cells()[0]
    train(cell)
    append_point(cell.run, point(cell.config, 16))
    assert cell_needs(cell).budgets == (24,)
    append_point(cell.run, {**point(cell.config, 24), **change})
    assert cell_needs(cell).budgets == (24,)


def test_a_checkpoint_before_the_last_step_is_no_training(sweep):
    cell = sweep.cells()[0]
    train(cell)
    checkpoint_path(cell.run, cell.max_steps).rename(checkpoint_path(cell.run, cell.max_steps - 1))
    assert cell_needs(cell).training


def test_a_run_of_another_experiment_is_refused_by_field(sweep, sweep_file):
    finish(sweep.cells()[0])
    other = load_sweep(sweep_file, ["optimizer.lr=0.5"]).cells()[0]
    with pytest.raises(InputError, match=r"runs/small/d2-s0 .* optimizer.lr = 0.003 there, 0.5 asked for"):
        cell_needs(other)


def test_each_cell_that_needs_work_is_claimed_once(sweep):
    finish(sweep.cells()[0])
    with Queue(sweep.folder, sweep.cells()) as queue:
        assert claim_all(queue) == ["d4-s0"]
        [trial] = trials(sweep)
        assert trial.user_attrs.items() >= {"model.diffusion_depth": 4, "seed": 0, "cell": "d4-s0"}.items()


def test_a_second_driver_waits_for_the_first_one_s_cells_and_gets_those_of_a_dead_one(sweep):
    with contextlib.ExitStack() as first, Queue(sweep.folder, sweep.cells()) as second:
        first_queue = first.enter_context(Queue(sweep.folder, sweep.cells()))
        assert first_queue.claim().cell.name == "d2-s0" and second.claim().cell.name == "d4-s0"
        assert first_queue.claim() == "wait" and second.claim() == "wait"
        first.close()
        assert second.claim().cell.name == "d2-s0"
        assert second.claim() is None
    assert [trial.state for trial in trials(sweep)] == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]
    assert trials(sweep)[0].user_attrs["reason"] == "driver died"


def test_a_driver_that_died_between_claim_and_signature_loses_no_cell(sweep):
    with Queue(sweep.folder, sweep.cells()) as queue:
        queue.put_back(queue.claim())
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{sweep.folder}/study.db")
    assert study.ask().user_attrs["cell"] == "d4-s0"  # RUNNING now, of nobody
    with Queue(sweep.folder, sweep.cells()) as queue:
        assert sorted(claim_all(queue)) == ["d2-s0", "d4-s0"]


def test_a_failed_cell_is_tried_again_by_the_next_driver_only(sweep):
    with Queue(sweep.folder, sweep.cells()) as queue:
        queue.fail(queue.claim(), "out of luck")
        assert claim_all(queue) == ["d4-s0"] and queue.failures() == {"d2-s0": "out of luck"}
    with Queue(sweep.folder, sweep.cells()) as queue:
        assert queue.failures() == {}
        assert sorted(claim_all(queue)) == ["d2-s0", "d4-s0"]


def test_what_an_interrupted_driver_puts_back_falls_to_another(sweep):
    with Queue(sweep.folder, sweep.cells()) as first, Queue(sweep.folder, sweep.cells()) as second:
        trial = first.claim()
        assert second.claim().cell.name == "d4-s0"
        first.put_back(trial)
        assert second.claim().cell.name == "d2-s0" and second.failures() == {}


def test_the_study_tells_the_story(sweep):
    with Queue(sweep.folder, sweep.cells()) as queue:
        trial = queue.claim()
        finish(trial.cell)
        queue.complete(trial)
        done, waiting = trials(sweep)
        assert done.state == TrialState.COMPLETE and done.value == 1000 / 24
        assert done.user_attrs["fd_digits@16"] == 1000 / 16 and done.user_attrs["fd_digits@24"] == 1000 / 24
        assert waiting.state == TrialState.WAITING


def test_a_driver_leaves_the_trials_of_other_cells_alone(sweep, sweep_file):
    with Queue(sweep.folder, sweep.cells()) as queue:
        queue.put_back(queue.claim())  # the other one stays waiting
    other = load_sweep(sweep_file, ["grid.model.diffusion_depth=[8]"])
    with Queue(other.folder, other.cells()) as queue:
        assert claim_all(queue) == ["d8-s0"]
    assert [trial.state for trial in trials(sweep)] == [TrialState.FAIL, TrialState.WAITING, TrialState.RUNNING]


def test_how_the_newest_trial_of_a_cell_stands(sweep):
    one, other = (cell.config_hash for cell in sweep.cells())
    assert last_trials(sweep.folder) == {} and not sweep.folder.exists()
    with Queue(sweep.folder, sweep.cells()) as queue:
        queue.fail(queue.claim(), "out of luck")
        assert last_trials(sweep.folder) == {one: LastTrial("failed", "out of luck"), other: LastTrial("waiting", "")}
        queue.claim()
        assert last_trials(sweep.folder)[other] == LastTrial("running", "")
    assert last_trials(sweep.folder)[other] == LastTrial("waiting", "")


def test_a_transaction_locks_the_database_when_it_begins(sweep):
    sweep.folder.mkdir(parents=True)
    _, storage = _open_study(sweep.folder)
    outsider = sqlite3.connect(sweep.folder / "study.db", timeout=0, isolation_level=None)
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            outsider.execute("BEGIN IMMEDIATE")
    outsider.execute("BEGIN IMMEDIATE")
    outsider.close()


def test_drivers_leave_no_locks_behind(sweep):
    with Queue(sweep.folder, sweep.cells()) as queue:
        assert len(list((sweep.folder / ".drivers").iterdir())) == 1
        queue.claim()
    assert list((sweep.folder / ".drivers").iterdir()) == []


def test_a_broken_study_says_what_to_do(sweep):
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "study.db").write_text("no database" * 1000)
    message = "runs/small/study.db: no study of a sweep (file is not a database); delete it: what is done is read from the runs"
    with pytest.raises(InputError, match=re.escape(message)):
        Queue(sweep.folder, sweep.cells()).__enter__()
