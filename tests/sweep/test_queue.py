"""The queue of trials, over a real study and real run folders."""

import json
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from madformer.config import write_config
from madformer.errors import InputError
from madformer.evaluation.record import append_point
from madformer.runs.checkpoints import checkpoint_path
from madformer.sweep import study as study_module
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.needs import Needs, cell_needs, cell_progress, main_metrics
from madformer.sweep.queue import OWNER, CellStatus, Queue
from madformer.sweep.study import Storage
from madformer.sweep.trial import Outcome
from tests.sweep.claimer import finish, open_queue, train, work
from tests.sweep.servers import database, needs_servers
from tests.sweep.trial import point

MISFORTUNE = Outcome("failed", "error", "out of luck")


def trials(sweep):
    storage = Storage(sweep)
    found = storage.study.trials
    storage.close()
    return found


def claim(queue):
    [trial] = queue.claim().trials
    return trial


def claim_all(queue):
    return [trial.cell.name for trial in queue.claim(99).trials]


SERVERS = [pytest.param(name, marks=needs_servers) for name in ("postgresql", "mariadb")]


@pytest.fixture(scope="module", params=["sqlite", *SERVERS])
def storage_url(request):
    """Where studies are kept: all tests here hold for all of them."""
    if request.param == "sqlite":
        yield None
    else:
        with database(request.param) as (url, _):
            yield url


@pytest.fixture
def sweep(sweep_file, storage_url):
    if storage_url is not None:
        sweep_file.write_text(f"storage: {storage_url}\n{sweep_file.read_text()}")
    sweep = load_sweep(sweep_file)
    yield sweep
    if storage_url is not None:
        optuna.delete_study(study_name="small", storage=Storage(sweep).rdb)


def test_needs_follow_the_run_s_folder(sweep):
    cell = sweep_cells(sweep)[0]
    assert cell_needs(cell) == Needs(training=True, budgets=(16, 24), points=2) and str(cell_needs(cell)) == "to train"
    write_config(cell.config, cell.run)
    assert cell_needs(cell).training
    train(cell)
    assert (
        cell_needs(cell) == Needs(training=False, budgets=(16, 24), points=2)
        and str(cell_needs(cell)) == "to evaluate at 16, 24"
    )
    append_point(cell.run, point(cell.config, 16))
    assert cell_needs(cell).budgets == (24,) and list(main_metrics(cell)) == [16]
    append_point(cell.run, point(cell.config, 24))
    assert not cell_needs(cell) and main_metrics(cell)[24] == {"fd_digits": 1000 / 24}


@pytest.mark.parametrize(
    "change", [{"step": 9}, {"weights": "model"}, {"num_samples": 9}, {"seed": 1}, {"config_hash": "0" * 16}, {"nfe": 17}]
)
def test_another_measurement_does_not_count(sweep, change):
    cell = sweep_cells(sweep)[0]
    train(cell)
    append_point(cell.run, point(cell.config, 16))
    assert cell_needs(cell).budgets == (24,)
    append_point(cell.run, {**point(cell.config, 24), **change})
    assert cell_needs(cell).budgets == (24,)


def test_a_checkpoint_before_the_last_step_is_no_training(sweep):
    cell = sweep_cells(sweep)[0]
    train(cell)
    checkpoint_path(cell.run, cell.max_steps).rename(checkpoint_path(cell.run, cell.max_steps - 1))
    assert cell_needs(cell).training


def test_a_run_of_another_experiment_is_refused_by_field(sweep, sweep_file):
    finish(sweep_cells(sweep)[0])
    other = sweep_cells(load_sweep(sweep_file, ["optimizer.lr=0.5"]))[0]
    with pytest.raises(InputError, match=r"runs/small/d2-s0 .* optimizer.lr = 0.003 there, 0.5 asked for"):
        cell_needs(other)


def test_each_cell_that_needs_work_is_claimed_once(sweep):
    finish(sweep_cells(sweep)[0])
    with open_queue(sweep) as queue:
        assert claim_all(queue) == ["d4-s0"]
        [trial] = trials(sweep)
        assert trial.user_attrs.items() >= {"model.diffusion_depth": 4, "seed": 0, "cell": "d4-s0"}.items()


def test_of_many_no_more_are_claimed_than_asked_for(sweep):
    with open_queue(sweep) as queue:
        assert len(queue.claim(1).trials) == 1
        claim = queue.claim(5)
        assert len(claim.trials) == 1 and not claim.may_have_more
        assert queue.claim(5).trials == []


def test_what_a_killed_driver_of_this_machine_had_is_another_s_at_once(sweep, sweep_file):
    assert subprocess.run([sys.executable, "-m", "tests.sweep.claimer", sweep_file], check=False).returncode == 1
    [first, _] = trials(sweep)
    assert (first.user_attrs["cell"], first.state) == ("d2-s0", TrialState.RUNNING)
    with open_queue(sweep) as queue:
        assert queue.cell_statuses()[first.user_attrs["config_hash"]].state == "waiting"
        assert sorted(claim_all(queue)) == ["d2-s0", "d4-s0"]


def test_what_a_lost_machine_had_is_another_s_when_its_heart_is_silent(sweep, monkeypatch):
    monkeypatch.setattr(study_module, "GRACE_SECONDS", 1)
    monkeypatch.setattr("madformer.sweep.queue.GRACE_SECONDS", 1)
    with open_queue(sweep) as lost, open_queue(sweep) as queue:
        trial = claim(lost)
        lost._claimed_ids.clear()  # no heartbeat any more
        lost.storage.rdb.set_trial_user_attr(trial.id, OWNER, json.dumps(["another machine", 1, 0.0, ""]))
        assert claim_all(queue) == ["d4-s0"]
        claimed = queue.claim()
        assert claimed.trials == [] and claimed.may_have_more
        time.sleep(2.1)
        assert claim(queue).cell == trial.cell
        lost.complete(trial)  # it lived after all: what it says comes too late, and does no harm
        assert queue.cell_statuses()[trial.cell.key].state == "running"


def test_a_heart_is_not_listened_to_soon_after_trouble_with_the_database(sweep, monkeypatch):
    monkeypatch.setattr(study_module, "GRACE_SECONDS", 1)
    with open_queue(sweep) as lost, open_queue(sweep) as queue:
        trial = claim(lost)
        lost._claimed_ids.clear()
        lost.storage.rdb.set_trial_user_attr(trial.id, OWNER, json.dumps(["another machine", 1, 0.0, ""]))
        time.sleep(2.1)
        queue.storage.last_error_at = time.monotonic()
        assert claim_all(queue) == ["d4-s0"]


def test_hearts_beat(sweep, monkeypatch):
    monkeypatch.setattr("madformer.sweep.queue.HEARTBEAT_SECONDS", 0.02)
    beats = []
    with open_queue(sweep) as queue:
        monkeypatch.setattr(queue.storage.rdb, "record_heartbeat", beats.append)
        trial = claim(queue)
        end = time.monotonic() + 30
        while len(beats) < 4:
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.01)
        queue.put_back(trial)
        time.sleep(0.1)
        count = len(beats)
        time.sleep(0.2)
        assert set(beats) == {trial.id} and len(beats) == count


def test_a_driver_that_died_between_claim_and_signature_loses_no_cell(sweep):
    with open_queue(sweep) as queue:
        queue.put_back(claim(queue))
        assert queue.storage.study.ask().user_attrs["cell"] == "d4-s0"  # RUNNING now, of nobody
    with open_queue(sweep) as queue:
        assert sorted(claim_all(queue)) == ["d2-s0", "d4-s0"]


def test_a_failed_cell_is_tried_again_when_asked(sweep):
    with open_queue(sweep) as queue:
        trial, other = queue.claim(2).trials
        queue.fail(trial, MISFORTUNE)
        queue.put_back(other)
        assert queue.cell_statuses()[trial.cell.key] == CellStatus("failed", "error", "out of luck")
    with open_queue(sweep) as queue:
        assert claim_all(queue) == ["d4-s0"]
        queue.retry_failed()
        assert claim_all(queue) == ["d2-s0"]


@pytest.mark.parametrize("kind", ["killed", "lost"])
def test_failed_attempts_are_counted_until_a_cell_gets_further(sweep, kind):
    died = Outcome("failed", kind, "a reason")
    with Queue(sweep, Storage(sweep), sweep_cells(sweep)[:1]) as queue:
        for failed_attempts in (1, 2, 3):
            trial = claim(queue)
            queue.fail(trial, died)
            assert queue.cell_statuses()[trial.cell.key] == CellStatus("waiting", failed_attempts=failed_attempts)
        trial = claim(queue)
        train(trial.cell)
        queue.fail(trial, died)
        assert queue.cell_statuses()[trial.cell.key] == CellStatus("waiting", failed_attempts=0)
        for _ in range(4):
            trial = claim(queue)
            queue.fail(trial, died)
        status = queue.cell_statuses()[trial.cell.key]
        assert (status.state, status.kind, status.failed_attempts) == ("failed", kind, 4)
        assert status.reason == "a reason\nit died 4 times in a row without having got any further"
        assert claim_all(queue) == []


def test_progress_rises_with_what_is_not_done_again(sweep):
    cell = sweep_cells(sweep)[0]
    seen = [cell_progress(cell)]
    write_config(cell.config, cell.run)
    checkpoint_path(cell.run, 5).parent.mkdir()
    checkpoint_path(cell.run, 5).touch()
    seen.append(cell_progress(cell))
    train(cell)
    seen.append(cell_progress(cell))
    part = cell.run / "features/hash/part-0.safetensors"
    part.parent.mkdir(parents=True)
    part.touch()
    seen.append(cell_progress(cell))
    append_point(cell.run, point(cell.config, 16))
    part.unlink()
    seen.append(cell_progress(cell))
    assert seen == sorted(seen) and len({tuple(entry) for entry in seen}) == len(seen)


def test_what_an_interrupted_driver_puts_back_falls_to_another(sweep):
    with open_queue(sweep) as first, open_queue(sweep) as second:
        trial = claim(first)
        assert claim(second).cell.name == "d4-s0"
        first.put_back(trial)
        assert claim(second).cell.name == "d2-s0"
        assert {status.state for status in second.cell_statuses().values()} == {"running"}


def test_the_study_tells_the_story(sweep):
    with open_queue(sweep) as queue:
        trial = claim(queue)
        finish(trial.cell)
        queue.complete(trial)
        done, waiting = trials(sweep)
        assert done.state == TrialState.COMPLETE and done.value == 1000 / 24
        assert done.user_attrs["fd_digits@16"] == 1000 / 16 and done.user_attrs["fd_digits@24"] == 1000 / 24
        assert waiting.state == TrialState.WAITING


def test_a_driver_leaves_the_trials_of_other_cells_alone(sweep, sweep_file):
    with open_queue(sweep) as queue:
        queue.put_back(claim(queue))  # the other one stays waiting
    other = load_sweep(sweep_file, ["grid.model.diffusion_depth=[8]"])
    with open_queue(other) as queue:
        assert claim_all(queue) == ["d8-s0"]
    assert [trial.state for trial in trials(sweep)] == [TrialState.FAIL, TrialState.WAITING, TrialState.RUNNING]


def test_a_claim_that_breaks_in_the_middle_strands_nothing(sweep, monkeypatch):
    with open_queue(sweep) as queue:
        record, calls = queue.storage.rdb.record_heartbeat, []

        def fail_once(trial_id):
            calls.append(trial_id)
            if len(calls) == 2:
                raise OperationalError("gone", None, Exception("gone"))
            record(trial_id)

        monkeypatch.setattr(queue.storage.rdb, "record_heartbeat", fail_once)
        assert sorted(claim_all(queue)) == ["d2-s0", "d4-s0"]
        running = [trial._trial_id for trial in trials(sweep) if trial.state == TrialState.RUNNING]
        assert sorted(running) == sorted(queue._claimed_ids) and len(running) == 2


def test_a_run_that_cannot_be_read_does_not_hold_up_the_others(sweep, sweep_file):
    bad = sweep_cells(sweep)[0]
    train(bad)
    (bad.run / "evaluations.jsonl").write_text("{}\ngarbage\n{}\n")
    said = []
    with Queue(sweep, Storage(sweep, said.append), sweep_cells(sweep)) as queue:
        assert claim_all(queue) == ["d4-s0"] and claim_all(queue) == []
    assert said == [
        "d2-s0: runs/small/d2-s0/evaluations.jsonl, line 2: not a JSON object of finite numbers; delete the line or restore the file"
    ]


def test_a_job_without_a_driver_is_no_failed_attempt_and_one_that_is_done_is_no_job(sweep, monkeypatch):
    monkeypatch.setattr("madformer.sweep.queue.is_dead", lambda owner: True)
    with Queue(sweep, Storage(sweep), sweep_cells(sweep)[:1]) as queue:
        for _ in range(6):  # drivers that are stopped while it waits in Slurm's queue
            trial = claim(queue)
            queue.save_job(trial, "array/0")
            queue._claimed_ids.clear()
        assert queue.cell_statuses()[trial.cell.key].state == "running"
        trial = claim(queue)
        assert trial.job == "array/0"
        finish(trial.cell)
        queue.complete(trial)
    with open_queue(
        load_sweep("small.yaml", ["evaluate.nfe=[16,24,32]", *([f"storage={sweep.storage}"] if sweep.storage else [])])
    ) as queue:
        assert [trial.job for trial in queue.claim(2).trials] == [None, None]


def test_a_job_is_carried_over_to_the_driver_that_takes_up_a_trial(sweep, monkeypatch):
    with open_queue(sweep) as queue:
        queue.save_job(claim(queue), "array/0")
        queue._claimed_ids.clear()
        monkeypatch.setattr("madformer.sweep.queue.is_dead", lambda owner: True)
        first, second = queue.claim(2).trials
        assert {first.job, second.job} == {"array/0", None}
        queue.fail(first if first.job else second, Outcome("failed", "lost", "gone"))
        assert claim(queue).job is None


def test_with_sqlite_a_transaction_locks_the_database_when_it_begins(sweep, storage_url):
    if storage_url is not None:
        pytest.skip("SQLite alone")
    storage = Storage(sweep)
    outsider = sqlite3.connect(sweep.folder / "study.db", timeout=0, isolation_level=None)
    with storage.rdb.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            outsider.execute("BEGIN IMMEDIATE")
    outsider.execute("BEGIN IMMEDIATE")
    assert outsider.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    outsider.close()


def test_a_broken_study_says_what_to_do(sweep_file):
    sweep = load_sweep(sweep_file)
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "study.db").write_text("no database" * 1000)
    message = "runs/small/study.db: no study of a sweep (file is not a database); delete it: what is done is read from the runs"
    with pytest.raises(InputError, match=re.escape(message)):
        Storage(sweep)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount the small file system that fills up")
@pytest.mark.parametrize("free", [0, 40, 100])
def test_a_study_on_a_full_disk_is_not_to_be_deleted(free, sweep_file, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        sweep = load_sweep(sweep_file, [f"output_dir={folder}"])
        (folder / "filling").write_bytes(bytes(1024 * (1024 - 8 - free)))
        with pytest.raises(OSError, match="No space left on device"):
            Storage(sweep)
        (folder / "filling").unlink()
        with open_queue(sweep) as queue:
            assert len(queue.claim(2).trials) == 2, "the same command goes on"
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("oracle://a", "storage = oracle://a: must be a database of sqlite, postgresql, mysql"),
        ("postgresql+nothing://a", r"storage = postgresql\+nothing://a: .*: pip install 'madformer\[postgresql\]'"),
        (
            "postgresql://me:secret@127.0.0.1:9/a",
            r"storage = postgresql\+psycopg://me:\*\*\*@127.0.0.1:9/a: cannot be used \(.*refused",
        ),
    ],
)
def test_a_storage_that_cannot_be_had_is_one_line_without_the_password(sweep_file, url, message):
    with pytest.raises(InputError, match=message) as caught:
        Storage(replace(load_sweep(sweep_file), storage=url))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


REPETITIONS = int(os.environ.get("REPETITIONS", "1"))


def test_four_workers_claim_every_cell_exactly_once_each_time(sweep, storage_url, sweep_file):
    """4 depths x 5 budgets x 3 seeds are 12 cells."""
    axes = ["grid.model.diffusion_depth=[1,2,4,8]", "evaluate.nfe=[16,24,32,64,128]", "seeds=[0,1,2]"]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=work, args=(axes, REPETITIONS, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    claimed: dict[int, Counter[str]] = {}
    for _ in range(4 * REPETITIONS):
        repetition, names = results.get(timeout=120)
        claimed.setdefault(repetition, Counter()).update(names)
    for process in processes:
        process.join()
    cells = {f"d{depth}-s{seed}": 1 for depth in (1, 2, 4, 8) for seed in range(3)}
    assert claimed == dict.fromkeys(range(REPETITIONS), cells)
