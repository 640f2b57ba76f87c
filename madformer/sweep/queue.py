"""The trials of a sweep's study as one driver sees them: it claims trials and records how they end.

Trials are added, claimed and given up under the storage's lock only. A running trial belongs to its owner while the owner is
alive: on this machine its process exists, on other machines it writes heartbeats. A running trial without an owner, seen under
the lock, was claimed by a driver that died in the middle. The newest trial of a cell tells the cell's status.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from madformer.errors import InputError
from madformer.sweep.adaptive import assess, wanted_cells
from madformer.sweep.cells import Cell
from madformer.sweep.needs import cell_needs, cell_progress, main_metrics
from madformer.sweep.spec import Sweep
from madformer.sweep.study import GRACE_SECONDS, HEARTBEAT_SECONDS, Storage, is_at_work, is_dead, new_owner
from madformer.sweep.trial import RETRYABLE, Outcome

KEY, OWNER, KIND, REASON, PROGRESS, JOB = "config_hash", "owner", "kind", "reason", "progress", "job"
"""Attributes of a trial in the study. Studies on disk have them: their names never change."""

FAILED_ATTEMPTS = "strikes"
"""Attribute of a trial: how often in a row the cell's trials died without progress before it."""

_OPEN_STATES = (TrialState.WAITING, TrialState.RUNNING)
_STATE_NAMES: dict[TrialState, Any] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
}


@dataclass(frozen=True)
class Trial:
    """A trial that this driver has claimed."""

    number: int
    id: int
    """In the storage."""
    cell: Cell
    job: str | None = None
    """The job that runs it already, started by another driver, as the launcher names it."""


@dataclass(frozen=True)
class Claim:
    """The answer to a driver that claims trials."""

    trials: list[Trial]
    may_have_more: bool
    """Whether there may be more trials later: those of other drivers, if these die."""


@dataclass(frozen=True)
class CellStatus:
    """The status of a cell, by its newest trial."""

    state: Literal["waiting", "running", "failed", "pruned", "complete"]
    kind: str = ""
    """Of a failure."""
    reason: str = ""
    """Of a failure."""
    failed_attempts: int = 0
    """How often in a row its trials died without progress."""
    started: float = 0.0
    """When a running trial began, in seconds since 1970."""


class Queue:
    """The trials of a grid; a context manager that writes heartbeats while it is open."""

    def __init__(self, sweep: Sweep, storage: Storage, cells: Sequence[Cell]) -> None:
        self._sweep, self.storage = sweep, storage
        self._cells, self._done = {cell.key: cell for cell in cells}, set[str]()
        self._wanted = list(self._cells)
        """Keys of the cells that are wanted now; a sweep that decides adds some."""
        if sweep.decide is not None:
            self._want(wanted_cells(sweep))
        self._owner, self._claimed_ids, self._closing = new_owner(), set[int](), threading.Event()
        self._unreadable = dict[str, str]()
        """Cells whose runs cannot be read -> why. Each is reported once and skipped."""
        self._heart = threading.Thread(target=self._write_heartbeats, daemon=True)

    def __enter__(self) -> Queue:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._heart.join()
        self.storage.close()

    @property
    def cells(self) -> list[Cell]:
        """All cells; of a search, those of its trials so far; of a sweep that decides, those that are wanted so far."""
        return [self._cells[key] for key in self._keys]

    @property
    def _keys(self) -> Sequence[str]:
        return list(self._cells) if self._sweep.decide is None else self._wanted

    def claim(self, limit: int = 1) -> Claim:
        """Claim waiting trials for this driver, as many as there are up to a limit."""
        return self.storage.retry(lambda: self._claim(limit))

    def retry_failed(self) -> None:
        """Enqueue the cells that failed once more."""
        self.storage.retry(self._retry_failed)

    def complete(self, trial: Trial) -> None:
        """Record that a trial is done. Its value is the main metric at the largest budget; its attributes hold all budgets."""
        metrics = {budget: next(iter(values.items())) for budget, values in main_metrics(trial.cell).items()}
        attributes = {f"{name}@{budget}": value for budget, (name, value) in metrics.items()}
        main = metrics.get(max(trial.cell.budgets))
        self._finish(trial, TrialState.COMPLETE, attributes, [main[1] if main else float("inf")])

    def fail(self, trial: Trial, outcome: Outcome) -> None:
        """Record that a trial failed. A cell whose trial died is enqueued again, as often as `retries` says."""
        self._finish(trial, TrialState.FAIL, {KIND: outcome.kind, REASON: outcome.reason})

    def put_back(self, trial: Trial) -> None:
        """Give up a trial: any driver may claim the cell again."""
        self._finish(trial, TrialState.FAIL, {KIND: "interrupted"})

    def should_prune(self, trial: Trial) -> bool:
        """Whether a running trial is to be ended early; never one of a grid."""
        return False

    def prune(self, trial: Trial) -> None:
        """Record that a trial was ended early."""
        self._finish(trial, TrialState.PRUNED, {})

    def summary(self) -> list[str]:
        """Lines to print at the end."""
        return assess(self._sweep).lines

    def save_job(self, trial: Trial, job: str) -> None:
        """Record the job that is about to run a trial, for the driver that takes over if this one dies."""
        self.storage.retry(lambda: self.storage.rdb.set_trial_user_attr(trial.id, JOB, job))

    def cell_statuses(self) -> dict[str, CellStatus]:
        """Key of a cell -> its status, for the cells that have had a trial."""
        return cell_statuses(self.storage.retry(self._trials), self._sweep.retries, self._cells)

    def _claim(self, limit: int) -> Claim:
        with self.storage.lock():
            trials = self._fail_dead_trials(self._trials())
            claimed: list[Trial] = []
            try:
                for trial in self._start_trials(trials, limit):
                    self._record_owner(trial)
                    claimed.append(trial)
            except BaseException:  # nobody will run them: without an owner, the next claim finds them
                self._claimed_ids -= {trial.id for trial in claimed}
                raise
            running = (trial._trial_id for trial in trials if trial.state == TrialState.RUNNING)
            return Claim(claimed, len(claimed) == limit or any(trial_id not in self._claimed_ids for trial_id in running))

    def _start_trials(self, trials: Sequence[FrozenTrial], limit: int) -> Iterator[Trial]:
        """Set waiting trials to running; they have no owner yet."""
        if self._enqueue(trials):
            trials = self._trials()
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        for trial in waiting[:limit]:
            if self.storage.rdb.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                yield Trial(trial.number, trial._trial_id, self._cells[trial.user_attrs[KEY]], trial.user_attrs.get(JOB))

    def _record_owner(self, trial: Trial) -> None:
        self.storage.rdb.set_trial_user_attr(trial.id, PROGRESS, cell_progress(trial.cell))
        self.storage.rdb.record_heartbeat(trial.id)
        self.storage.rdb.set_trial_user_attr(trial.id, OWNER, self._owner)
        self._claimed_ids.add(trial.id)

    def _enqueue(self, trials: Sequence[FrozenTrial]) -> bool:
        """Add a trial for each cell that needs work, has no open trial and did not fail for good; whether any was added."""
        newest, added = newest_trials(trials), False
        if self._sweep.decide is not None:
            self._want(wanted_cells(self._sweep))
        for key in self._keys:
            cell = self._cells[key]
            trial = newest.get(key)
            if key in self._done or (trial is not None and trial.state in _OPEN_STATES):
                continue
            if not self._needs_work(cell):
                continue
            status = cell_status(trial, self._sweep.retries, cell) if trial is not None else CellStatus("waiting")
            if status.state not in ("failed", "pruned"):
                self._add(cell, {FAILED_ATTEMPTS: status.failed_attempts, **job_attribute(trial)})
                added = True
        return added

    def _want(self, cells: Sequence[Cell]) -> None:
        """Take over the cells of a sweep that decides; with one more seed a design may have to be tuned again."""
        if [cell.key for cell in cells] != self._wanted:
            self._cells |= {cell.key: cell for cell in cells}
            self._wanted = [cell.key for cell in cells]
            self._done.clear()

    def _needs_work(self, cell: Cell) -> bool:
        """Whether a cell needs anything that can start; False if its run cannot be read."""
        try:
            needs = cell_needs(cell)
            if needs.is_done:
                self._done.add(cell.key)
            return bool(needs)
        except (InputError, OSError) as error:
            if self._unreadable.get(cell.key) != str(error):
                self.storage.say(f"{cell.name}: {error}")
            self._unreadable[cell.key] = str(error)
        return False

    def _add(self, cell: Cell, attributes: Mapping[str, Any]) -> None:
        """Add a waiting trial of a cell."""
        axes = {**cell.axes, "seed": cell.seed}
        self.storage.study.enqueue_trial(axes, user_attrs={KEY: cell.key, "cell": cell.name, **axes, **attributes})

    def _retry_failed(self) -> None:
        with self.storage.lock():
            for key, trial in newest_trials(self._trials()).items():
                cell = self._cells[key]
                if key in self._keys and cell_status(trial, self._sweep.retries, cell).state == "failed" and cell_needs(cell):
                    self._add(cell, {FAILED_ATTEMPTS: 0, **job_attribute(trial)})

    def _fail_dead_trials(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Fail the running trials of dead drivers; all trials afterwards."""
        foreign = [trial for trial in trials if trial.state == TrialState.RUNNING and trial._trial_id not in self._claimed_ids]
        if not foreign:
            return trials
        # Heartbeats are trusted again some time after the database failed: until then no driver could write them.
        silent = set[int]()
        if self.storage.last_error_at + GRACE_SECONDS < time.monotonic():
            silent = set(self.storage.rdb._get_stale_trial_ids(self.storage.study._study_id))
        for trial in foreign:
            owner = trial.user_attrs.get(OWNER)
            # The clock may have been set: a process that is seen to live needs no heartbeats.
            is_silent = trial._trial_id in silent and not (owner and is_at_work(owner))
            if owner in (None, self._owner) or is_silent or is_dead(owner):
                with contextlib.suppress(UpdateFinishedTrialError):  # its heartbeats had stopped too
                    self.storage.rdb.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return self._trials()

    def _finish(
        self, trial: Trial, state: TrialState, attributes: Mapping[str, Any], values: Sequence[float] | None = None
    ) -> None:
        def record() -> None:
            # Finished already: recorded before the connection broke, or claimed by a driver that took this one for dead.
            with contextlib.suppress(UpdateFinishedTrialError):
                for name, value in attributes.items():
                    self.storage.rdb.set_trial_user_attr(trial.id, name, value)
                self.storage.rdb.set_trial_state_values(trial.id, state, values)

        self.storage.retry(record)
        self._claimed_ids.discard(trial.id)

    def _write_heartbeats(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS):
            for trial_id in tuple(self._claimed_ids):
                try:
                    self.storage.rdb.record_heartbeat(trial_id)
                except Exception:  # whatever the database has: the next heartbeat will do
                    self.storage.rdb.remove_session()
                    break

    def _trials(self) -> list[FrozenTrial]:
        """Trials of this driver's cells. The study may have others: of an earlier form of the sweep, or of another driver."""
        trials = self.storage.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs.get(KEY) in self._cells]


def cell_statuses(trials: Sequence[FrozenTrial], retries: int, cells: Mapping[str, Cell]) -> dict[str, CellStatus]:
    """Key of a cell -> its status, for the cells that have had a trial."""
    return {key: cell_status(trial, retries, cells[key]) for key, trial in newest_trials(trials).items() if key in cells}


def newest_trials(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """Key of a cell -> its newest trial."""
    return {trial.user_attrs[KEY]: trial for trial in trials if KEY in trial.user_attrs}


def cell_status(trial: FrozenTrial, retries: int, cell: Cell) -> CellStatus:
    """The status of a cell by its newest trial."""
    attributes = trial.user_attrs
    failed_attempts = attributes.get(FAILED_ATTEMPTS, 0)
    waiting = CellStatus("waiting", failed_attempts=failed_attempts)
    if trial.state == TrialState.RUNNING and JOB not in attributes and (OWNER not in attributes or is_dead(attributes[OWNER])):
        return waiting  # its driver has died
    if trial.state != TrialState.FAIL:
        started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return CellStatus(_STATE_NAMES[trial.state], failed_attempts=failed_attempts, started=started)
    kind, reason = attributes.get(KIND, "driver died"), attributes.get(REASON, "")
    if kind == "interrupted" or (KIND not in attributes and JOB in attributes):  # its job goes on without a driver
        return waiting
    if kind in RETRYABLE:
        failed_attempts = 0 if cell_progress(cell) > attributes.get(PROGRESS, []) else failed_attempts + 1
        if failed_attempts <= retries:
            return CellStatus("waiting", failed_attempts=failed_attempts)
        reason = f"{reason}\nit died {failed_attempts} times in a row without having got any further".strip()
    return CellStatus("failed", kind, reason, failed_attempts)


def job_attribute(trial: FrozenTrial | None) -> dict[str, str]:
    """The `JOB` of a trial whose driver died or was stopped: the job may still run. Otherwise nothing."""
    if trial is None or trial.state != TrialState.FAIL or KIND in trial.user_attrs:
        return {}
    return {JOB: trial.user_attrs[JOB]} if JOB in trial.user_attrs else {}
