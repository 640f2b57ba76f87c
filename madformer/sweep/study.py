"""Who does what: an Optuna study in a SQLite file, shared by all drivers of a sweep.

A driver is a process that runs a sweep. It holds a lock of its own for as long as it lives, which the system takes from a dead
one. Whatever moves a trial to RUNNING or adds one happens under the queue's lock. So a trial that runs under an owner whose
lock is free, or that has no owner yet while somebody else holds the queue's lock, belongs to a dead driver.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DatabaseError

from madformer.config import InputError
from madformer.sweep.needs import cell_needs, cell_points, largest_budget_metric
from madformer.sweep.spec import Cell

DRIVER_DIED = "driver died"
INTERRUPTED = "interrupted"

_KEY, _OWNER, _REASON = "config_hash", "owner", "reason"
_BUSY_TIMEOUT_SECONDS = 60
_OPEN = (TrialState.WAITING, TrialState.RUNNING)


@dataclass(frozen=True)
class Trial:
    """A cell that this driver has claimed."""

    number: int
    cell: Cell


@dataclass(frozen=True)
class LastTrial:
    """How the newest trial of a cell stands."""

    state: str
    """waiting, running, failed or complete; that of a dead or interrupted driver is waiting."""
    reason: str
    """Why it failed."""


class Queue:
    """The trials of a sweep as one driver sees them; a context manager, the driver lives as long as it is open.

    Raises:
        InputError: when it is opened, the study's file is broken.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self._folder, self._cells = folder, {cell.config_hash: cell for cell in cells}
        self._owner, self._done = uuid.uuid4().hex, set[str]()

    def __enter__(self) -> Queue:
        _lock_path(self._folder, self._owner).parent.mkdir(parents=True, exist_ok=True)
        # Not thread-local: whichever thread closes it, the driver ends.
        self._life = FileLock(_lock_path(self._folder, self._owner), thread_local=False)
        self._life.acquire(timeout=0)
        with _queue_lock(self._folder):
            self._study, self._storage = _open_study(self._folder)
            self._old_failures = {trial.number for trial in self._trials(TrialState.FAIL)}
        return self

    def __exit__(self, *_: object) -> None:
        _lock_path(self._folder, self._owner).unlink(missing_ok=True)
        self._life.release()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def claim(self) -> Trial | Literal["wait"] | None:
        """The next waiting trial, now this driver's.

        Without one: "wait" while other drivers run cells of this sweep, which fall to this one if they die; None after that.
        """
        with _queue_lock(self._folder):
            self._free_trials_of_the_dead()
            self._enqueue()
            for trial in self._trials(TrialState.WAITING):
                if self._storage.set_trial_state_values(self._id(trial.number), TrialState.RUNNING):
                    self._storage.set_trial_user_attr(self._id(trial.number), _OWNER, self._owner)
                    return Trial(trial.number, self._cells[trial.user_attrs[_KEY]])
            others = any(trial.user_attrs[_OWNER] != self._owner for trial in self._trials(TrialState.RUNNING))
            return "wait" if others else None

    def complete(self, trial: Trial) -> None:
        """Tell that a claimed trial is done: its value is the metric at the largest budget, its attributes all others."""
        for budget, point in sorted(cell_points(trial.cell).items()):
            for name, value in point["metrics"].items():
                self._storage.set_trial_user_attr(self._id(trial.number), f"{name}@{budget}", value)
        metric = largest_budget_metric(trial.cell)
        self._study.tell(trial.number, metric[1] if metric is not None else float("inf"))

    def fail(self, trial: Trial, reason: str) -> None:
        """Tell that a claimed trial failed, and why; the cell is not tried again before the next driver begins."""
        self._tell_failure(trial.number, reason)

    def put_back(self, trial: Trial) -> None:
        """Give up a claimed trial: any driver may claim the cell again."""
        self._tell_failure(trial.number, INTERRUPTED)

    def failures(self) -> dict[str, str]:
        """Cells of this sweep that failed since this driver began: name -> reason."""
        return {self._cells[key].name: reason for key, reason in self._failed().items()}

    def _free_trials_of_the_dead(self) -> None:
        for trial in self._trials(TrialState.RUNNING):
            owner = trial.user_attrs.get(_OWNER)
            if owner != self._owner and not _is_alive(self._folder, owner):
                self._tell_failure(trial.number, DRIVER_DIED)

    def _enqueue(self) -> None:
        """One waiting trial for each cell that needs work, unless somebody has it or it failed since this driver began."""
        taken = {trial.user_attrs[_KEY] for trial in self._trials(*_OPEN)} | self._failed().keys() | self._done
        for key, cell in self._cells.items():
            if key in taken:
                continue
            if cell_needs(cell):
                attributes = {**cell.axes, "seed": cell.seed}
                self._study.enqueue_trial(attributes, user_attrs={_KEY: key, "cell": cell.name, **attributes})
            else:
                self._done.add(key)

    def _failed(self) -> dict[str, str]:
        new = (trial for trial in self._trials(TrialState.FAIL) if trial.number not in self._old_failures)
        reasons = {trial.user_attrs[_KEY]: trial.user_attrs.get(_REASON, "") for trial in new}
        return {key: reason for key, reason in reasons.items() if reason not in (DRIVER_DIED, INTERRUPTED)}

    def _tell_failure(self, number: int, reason: str) -> None:
        self._storage.set_trial_user_attr(self._id(number), _REASON, reason)
        self._study.tell(number, state=TrialState.FAIL)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials of this driver's cells; the sweep may have had others, or another driver may."""
        trials = self._study.get_trials(deepcopy=False, states=states)
        return [trial for trial in trials if trial.user_attrs.get(_KEY) in self._cells]

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(self._study.study_name), number
        )


def last_trials(folder: Path) -> dict[str, LastTrial]:
    """The newest trial of every cell that ever had one, by config hash."""
    if not _study_path(folder).is_file():
        return {}
    with _queue_lock(folder):
        study, storage = _open_study(folder)
        trials = study.get_trials(deepcopy=False)
        storage.remove_session()
        storage.engine.dispose()
        return {trial.user_attrs[_KEY]: _last_trial(folder, trial) for trial in trials if _KEY in trial.user_attrs}


def _last_trial(folder: Path, trial: FrozenTrial) -> LastTrial:
    state, reason = trial.state.name.lower(), trial.user_attrs.get(_REASON, "")
    if trial.state == TrialState.RUNNING and not _is_alive(folder, trial.user_attrs.get(_OWNER)):
        state = "waiting"
    elif trial.state == TrialState.FAIL:
        state = "waiting" if reason in (DRIVER_DIED, INTERRUPTED) else "failed"
    return LastTrial(state, reason if state == "failed" else "")


def _study_path(folder: Path) -> Path:
    return folder / "study.db"


def _lock_path(folder: Path, owner: str) -> Path:
    return folder / ".drivers" / f"{owner}.lock"


@contextlib.contextmanager
def _queue_lock(folder: Path) -> Iterator[None]:
    with FileLock(folder / ".queue.lock"):
        yield


def _is_alive(folder: Path, owner: str | None) -> bool:
    """Whether a driver lives; called under the queue's lock, where a trial without an owner is a dead driver's."""
    if owner is None or not (path := _lock_path(folder, owner)).exists():
        return False
    try:
        with FileLock(path, timeout=0):
            path.unlink(missing_ok=True)
    except Timeout:
        return True
    return False


def _open_study(folder: Path) -> tuple[optuna.Study, RDBStorage]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, timeout = _study_path(folder), {"connect_args": {"timeout": _BUSY_TIMEOUT_SECONDS}}
    try:
        storage = RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs=timeout)
        _make_transactions_atomic(storage.engine)
        return optuna.create_study(storage=storage, study_name=folder.name, load_if_exists=True), storage
    except (DatabaseError, StorageInternalError) as error:
        what = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{path}: no study of a sweep ({what}); delete it: what is done is read from the runs") from error


def _make_transactions_atomic(engine: Engine) -> None:
    """Take the write lock when a transaction begins: two that read first and write later would both claim a trial."""

    def leave_transactions_to_us(connection: Any, _: object) -> None:
        connection.isolation_level = None

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", leave_transactions_to_us)
    event.listen(engine, "begin", begin)
    engine.dispose()  # connections from before
