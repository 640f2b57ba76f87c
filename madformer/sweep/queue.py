"""Who does what: the trials of a sweep's study as one driver sees them.

Trials are only ever claimed, added and given up under the storage's lock. A trial that runs belongs to its owner for as long as
that gives signs of life: one on this machine by being there, others by heartbeats in the storage. One without an owner, seen
under the lock, was claimed by a driver that died in the middle. What became of a cell is told by its newest trial.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from madformer.errors import InputError
from madformer.sweep.cells import Cell
from madformer.sweep.needs import cell_needs, main_metrics, progress
from madformer.sweep.spec import Sweep
from madformer.sweep.study import GRACE_SECONDS, HEARTBEAT_SECONDS, Storage, is_gone, new_owner, quiet
from madformer.sweep.trial import TRANSIENT, Outcome

KEY, OWNER, KIND, REASON, STRIKES, PROGRESS, JOB = "config_hash", "owner", "kind", "reason", "strikes", "progress", "job"
"""Attributes of a trial."""

_OPEN = (TrialState.WAITING, TrialState.RUNNING)
_STATES: dict[TrialState, Any] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
}


@dataclass(frozen=True)
class Trial:
    """A cell that this driver has claimed."""

    number: int
    id: int
    """In the storage."""
    cell: Cell
    job: str | None = None
    """Where it runs already, if another driver has started it; as its launcher says it."""


@dataclass(frozen=True)
class Claim:
    """What a driver has got."""

    trials: list[Trial]
    others: bool
    """Whether there may be more later: other drivers run cells of this sweep, which fall to this one if they die."""


@dataclass(frozen=True)
class CellStatus:
    """How a cell stands, by its newest trial."""

    state: Literal["waiting", "running", "failed", "pruned", "complete"]
    kind: str = ""
    """Of a failure."""
    reason: str = ""
    """Of a failure."""
    failed_attempts: int = 0
    """How often in a row it has died without having got any further."""


class Queue:
    """The trials of a grid; a context manager, heartbeats are given for as long as it is open."""

    def __init__(self, sweep: Sweep, storage: Storage, cells: Sequence[Cell]) -> None:
        self._sweep, self.storage = sweep, storage
        self._cells, self._done = {cell.key: cell for cell in cells}, set[str]()
        self._owner, self._claimed, self._closing = new_owner(), set[int](), threading.Event()
        self._unreadable = dict[str, str]()
        """Cells whose runs cannot be read -> why; they are said once, and left alone."""
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Queue:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._heart.join()
        self.storage.close()

    @property
    def cells(self) -> list[Cell]:
        """All cells, as far as they are known."""
        return list(self._cells.values())

    def claim(self, most: int = 1) -> Claim:
        """Waiting trials, from now on this driver's; fewer than it asks for where there are no more."""
        return self.storage.retry(lambda: self._claim(most))

    def retry_failed(self) -> None:
        """Forget that cells have failed."""
        self.storage.retry(self._retry_failed)

    def complete(self, trial: Trial) -> None:
        """Tell that a claimed trial is done: its value is the main metric at the largest budget, attributes have the others."""
        firsts = {budget: next(iter(values.items())) for budget, values in main_metrics(trial.cell).items()}
        facts = {f"{name}@{budget}": value for budget, (name, value) in firsts.items()}
        last = firsts.get(max(trial.cell.budgets))
        self._tell(trial, TrialState.COMPLETE, facts, [last[1] if last else float("inf")])

    def fail(self, trial: Trial, outcome: Outcome) -> None:
        """Tell that a claimed trial has failed, and why; one that died is enqueued again, as often as `retries` says."""
        self._tell(trial, TrialState.FAIL, {KIND: outcome.kind, REASON: outcome.reason})

    def put_back(self, trial: Trial) -> None:
        """Give up a claimed trial: any driver may claim the cell again."""
        self._tell(trial, TrialState.FAIL, {KIND: "interrupted"})

    def is_hopeless(self, trial: Trial) -> bool:
        """Whether a running trial is to be ended early; never one of a grid."""
        return False

    def prune(self, trial: Trial) -> None:
        """Tell that a claimed trial was ended early."""
        self._tell(trial, TrialState.PRUNED, {})

    def findings(self) -> list[str]:
        """What there is to say at the end, beside what was not done."""
        return []

    def remember_job(self, trial: Trial, job: str) -> None:
        """Note where a trial is about to run, for a driver that finds this one dead."""
        self.storage.retry(lambda: self.storage.rdb.set_trial_user_attr(trial.id, JOB, job))

    def cell_statuses(self) -> dict[str, CellStatus]:
        """How the cells stand that ever had a trial, by their keys."""
        return cell_statuses(self.storage.retry(self._trials), self._sweep.retries, self._cells)

    def _claim(self, most: int) -> Claim:
        with self.storage.lock():
            trials = self._free_trials_of_the_dead(self._trials())
            claimed: list[Trial] = []
            try:
                for trial in self._next(trials, most):
                    self._sign(trial)
                    claimed.append(trial)
            except BaseException:  # nobody will run them: they are nobody's, and found to be so
                self._claimed -= {trial.id for trial in claimed}
                raise
            running = (trial._trial_id for trial in trials if trial.state == TrialState.RUNNING)
            return Claim(claimed, len(claimed) == most or any(trial_id not in self._claimed for trial_id in running))

    def _next(self, trials: Sequence[FrozenTrial], most: int) -> Iterator[Trial]:
        """Trials that run from now on, not signed yet."""
        if self._enqueue(trials):
            trials = self._trials()
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        for trial in waiting[:most]:
            if self.storage.rdb.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                yield Trial(trial.number, trial._trial_id, self._cells[trial.user_attrs[KEY]], trial.user_attrs.get(JOB))

    def _sign(self, trial: Trial) -> None:
        self.storage.rdb.set_trial_user_attr(trial.id, PROGRESS, progress(trial.cell))
        self.storage.rdb.record_heartbeat(trial.id)
        self.storage.rdb.set_trial_user_attr(trial.id, OWNER, self._owner)
        self._claimed.add(trial.id)

    def _enqueue(self, trials: Sequence[FrozenTrial]) -> bool:
        """One waiting trial for each cell that needs work and has none open, unless it failed for good; whether any is new."""
        newest, added = newest_trials(trials), False
        for key, cell in self._cells.items():
            last = newest.get(key)
            if key in self._done or (last is not None and last.state in _OPEN):
                continue
            if not self._needs_work(cell):
                continue
            standing = standing_of(last, self._sweep.retries, cell) if last is not None else CellStatus("waiting")
            if standing.state not in ("failed", "pruned"):
                self._add(cell, {STRIKES: standing.failed_attempts, **job_of(last)})
                added = True
        return added

    def _needs_work(self, cell: Cell) -> bool:
        """Whether there is something to do, as far as the cell's run can be read."""
        try:
            if cell_needs(cell):
                return True
            self._done.add(cell.key)
        except (InputError, OSError) as error:
            if self._unreadable.get(cell.key) != str(error):
                self.storage.say(f"{cell.name}: {error}")
            self._unreadable[cell.key] = str(error)
        return False

    def _add(self, cell: Cell, facts: Mapping[str, Any]) -> None:
        """A trial more of a cell."""
        attributes = {**cell.axes, "seed": cell.seed}
        self.storage.study.enqueue_trial(attributes, user_attrs={KEY: cell.key, "cell": cell.name, **attributes, **facts})

    def _retry_failed(self) -> None:
        with self.storage.lock():
            for key, last in newest_trials(self._trials()).items():
                cell = self._cells[key]
                if standing_of(last, self._sweep.retries, cell).state == "failed" and cell_needs(cell):
                    self._add(cell, {STRIKES: 0, **job_of(last)})

    def _free_trials_of_the_dead(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """End the trials of drivers that are no more; all trials as they are then."""
        others = [trial for trial in trials if trial.state == TrialState.RUNNING and trial._trial_id not in self._claimed]
        if not others:
            return trials
        # Not soon after trouble with the database: nobody's heart could be heard.
        if self.storage.last_error_at + GRACE_SECONDS < time.monotonic():
            with quiet():
                fail_stale_trials(self.storage.study)
        for trial in others:
            owner = trial.user_attrs.get(OWNER)
            if owner in (None, self._owner) or is_gone(owner):
                with contextlib.suppress(UpdateFinishedTrialError):  # its heart was silent too
                    self.storage.rdb.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return self._trials()

    def _tell(self, trial: Trial, state: TrialState, facts: Mapping[str, Any], values: Sequence[float] | None = None) -> None:
        def tell() -> None:
            # Finished: told before the connection broke, or taken over by a driver that believed this one dead.
            with contextlib.suppress(UpdateFinishedTrialError):
                for name, value in facts.items():
                    self.storage.rdb.set_trial_user_attr(trial.id, name, value)
                self.storage.rdb.set_trial_state_values(trial.id, state, values)

        self.storage.retry(tell)
        self._claimed.discard(trial.id)

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS):
            for trial_id in tuple(self._claimed):
                try:
                    self.storage.rdb.record_heartbeat(trial_id)
                except Exception:  # whatever the database has: the next beat will do
                    self.storage.rdb.remove_session()
                    break

    def _trials(self) -> list[FrozenTrial]:
        """Trials of this driver's cells; the sweep may have had others, or another driver may."""
        trials = self.storage.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs.get(KEY) in self._cells]


def cell_statuses(trials: Sequence[FrozenTrial], retries: int, cells: Mapping[str, Cell]) -> dict[str, CellStatus]:
    """How cells stand, by their newest trials."""
    return {key: standing_of(trial, retries, cells[key]) for key, trial in newest_trials(trials).items() if key in cells}


def newest_trials(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """The newest trial of each cell."""
    return {trial.user_attrs[KEY]: trial for trial in trials if KEY in trial.user_attrs}


def standing_of(trial: FrozenTrial, retries: int, cell: Cell) -> CellStatus:
    """How a cell stands whose newest trial this is."""
    facts = trial.user_attrs
    failed_attempts = facts.get(STRIKES, 0)
    if trial.state == TrialState.RUNNING and JOB not in facts and (OWNER not in facts or is_gone(facts[OWNER])):
        return CellStatus("waiting", failed_attempts=failed_attempts)  # its driver has died
    if trial.state != TrialState.FAIL:
        return CellStatus(_STATES[trial.state], failed_attempts=failed_attempts)
    kind, reason = facts.get(KIND, "driver died"), facts.get(REASON, "")
    if kind == "interrupted" or (KIND not in facts and JOB in facts):  # its job goes on without a driver
        return CellStatus("waiting", failed_attempts=failed_attempts)
    if kind in TRANSIENT:
        failed_attempts = 0 if progress(cell) > facts.get(PROGRESS, []) else failed_attempts + 1
        if failed_attempts <= retries:
            return CellStatus("waiting", failed_attempts=failed_attempts)
        reason = f"{reason}\nit died {failed_attempts} times in a row without having got any further".strip()
    return CellStatus("failed", kind, reason, failed_attempts)


def job_of(trial: FrozenTrial | None) -> dict[str, str]:
    """Of a trial whose driver died or was stopped, its `JOB`: it may run there still."""
    if trial is None or trial.state != TrialState.FAIL or KIND in trial.user_attrs:
        return {}
    return {JOB: trial.user_attrs[JOB]} if JOB in trial.user_attrs else {}
