"""`madformer sweep run`: the driver, which claims trials, starts them and records how they end."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from madformer.errors import ConfigError, InputError, printable
from madformer.sweep.adaptive import assess, wanted_cells
from madformer.sweep.cells import Cell, sweep_cells
from madformer.sweep.forecast import fitting_trials
from madformer.sweep.needs import cell_needs, drop_branch_points
from madformer.sweep.spec import Sweep
from madformer.sweep.trial import DONE, INTERRUPTED, RETRYABLE, Commands, Outcome, log_path, trial_commands

if TYPE_CHECKING:
    from madformer.sweep.queue import Queue, Trial

_POLL_SECONDS = 0.5
_QUICK_FAILURE_SECONDS = 60.0
_MAX_QUICK_FAILURES = 3
_SECONDS_BETWEEN_QUERIES = 5.0
"""Between two claims while there are no trials, and between two calls of the pruner."""


class Launcher(Protocol):
    """Runs trials. One thread calls all methods."""

    outlives_driver: bool
    """Whether trials go on when the driver is stopped."""

    @property
    def trials(self) -> list[Trial]:
        """The running trials."""

    def free_slots(self) -> int:
        """Trials that can be started now."""

    def start(self, trials: Sequence[Trial]) -> None:
        """Start trials, no more than there are free slots; those that have a `job` run already."""

    def finished_trials(self, seconds: float) -> Iterable[tuple[Trial, Outcome]]:
        """Trials that have ended; waits so long for one."""

    def interrupt(self, trial: Trial) -> bool:
        """Let a trial save its state and end; whether it received the signal."""

    def stop(self, signal_number: signal.Signals) -> None:
        """Send a signal to all trials and wait for them."""

    def close(self) -> None:
        """Free all resources; no trial runs any more."""


def run_sweep(
    sweep: Sweep,
    retry_failed: bool = False,
    commands: Commands = trial_commands,
    say: Callable[[str], None] | None = None,
) -> int:
    """Train and evaluate what the cells of a sweep need. Several drivers may do so at once.

    Args:
        retry_failed: whether failed cells are tried again.
        commands: gives the commands of a trial.
        say: called with a line for each event; default: prints it.

    Returns:
        The exit status: 0 all cells are done, 1 a cell failed, 130 interrupted.

    Raises:
        InputError: a cell has no data, its folder holds another experiment's run, or the storage cannot be opened; nothing was
            started.
    """
    say = say or _print
    cells = wanted_cells(sweep)
    drop_branch_points(cells, sweep.folder)  # a driver may have been killed before it did
    needs = [cell_needs(cell) for cell in cells]
    if cells and all(need.is_done for need in needs):
        say(f"{sweep.name}: all {len(cells)} cells are done, nothing to do")
        for line in assess(sweep).lines:
            say(f"  {line}")
        return 0
    for cell in cells:
        if cell.config.data.source is None and cell.config.data.latents is None:
            raise ConfigError(f"cell {cell.name}: data.source = null: nothing to train on; such a sweep can only be planned")
    try:
        with _sigterm_interrupts(), contextlib.ExitStack() as stack:
            queue = stack.enter_context(_open_queue(sweep, say))
            launcher = _make_launcher(sweep, queue, commands, say)
            stack.callback(launcher.close)
            if retry_failed:
                queue.retry_failed()
            return Driver(sweep, queue, launcher, say).run()
    except KeyboardInterrupt:
        say(f"{sweep.name}: interrupted; the same command goes on from here")
        return 130


class Driver:
    """A process that works on a sweep."""

    def __init__(self, sweep: Sweep, queue: Queue, launcher: Launcher, say: Callable[[str], None]) -> None:
        self._sweep, self._queue, self._launcher, self._say = sweep, queue, launcher, say
        self._start_times, self._pruned_trials, self._done_cells = dict[int, float](), set[int](), set[str]()
        self._may_have_more = True
        """The queue's answer to the last claim."""
        self._last_claim_at = self._last_pruning_at = float("-inf")
        self._waits_for_slot = False
        """Whether there is no free slot although no trial runs."""
        self._unstarted_trials: list[Trial] = []
        """Claimed trials that the launcher does not have yet."""
        self._most_running, self._quick_failures = 1, set[str]()
        """The most trials that ran at once; cells that failed soon after their start, since the last success."""

    def run(self) -> int:
        """Work until no trial is left.

        Returns:
            The exit status: 0 all cells are done, 1 a cell failed.

        Raises:
            KeyboardInterrupt: all trials have ended and are put back, or go on as jobs.
        """
        try:
            while self._start_trials() or self._launcher.trials:
                for trial, outcome in self._launcher.finished_trials(_POLL_SECONDS):
                    self._conclude(trial, outcome)
                self._prune_trials()
        except BaseException:  # Ctrl-C or any error: no trial may be left without its driver
            self._stop()
            raise
        return self._summarise()

    def _start_trials(self) -> bool:
        """Claim and start trials; whether there are, or may be, more."""
        if self._too_many_quick_failures:
            return False
        if time.monotonic() - self._last_claim_at < _SECONDS_BETWEEN_QUERIES:
            return self._may_have_more
        slots = self._launcher.free_slots()
        if not slots:
            if not self._launcher.trials and not self._waits_for_slot:
                self._say(f"{self._sweep.name}: waits, there is no room for a trial now")
            self._waits_for_slot = not self._launcher.trials
            return True
        claim = self._queue.claim(slots)
        if len(claim.trials) < slots:
            self._last_claim_at, self._may_have_more = time.monotonic(), claim.may_have_more
        self._unstarted_trials = claim.trials
        for trial in claim.trials:
            self._start_times[trial.number] = time.monotonic()
            needs = (_unmet_needs(trial.cell) or "done").removeprefix("still ")
            event = f"runs already, {trial.job}" if trial.job else f"starts, {needs}"
            self._say(f"{trial.cell.name}: {event}, log {log_path(trial.cell)}")
        self._launcher.start(claim.trials)
        self._unstarted_trials, self._most_running = [], max(self._most_running, len(self._launcher.trials))
        return self._may_have_more or bool(claim.trials)

    def _conclude(self, trial: Trial, outcome: Outcome) -> None:
        self._last_claim_at, self._may_have_more = float("-inf"), True  # the cell may be enqueued again
        seconds = time.monotonic() - self._start_times.pop(trial.number)
        if outcome == DONE:
            self._quick_failures.clear()
            self._queue.complete(trial)
            drop_branch_points(self._queue.cells, self._sweep.folder)
            event = "finished"
        elif outcome == INTERRUPTED and trial.number in self._pruned_trials:
            self._queue.prune(trial)
            event = "ended early, others are better"
        elif outcome == INTERRUPTED:
            self._queue.put_back(trial)
            self._say(f"{trial.cell.name}: interrupted")
            return
        else:
            self._queue.fail(trial, outcome)
            verb = "died" if outcome.kind in RETRYABLE else f"failed ({outcome.kind})"
            event = f"{verb}, {outcome.reason.splitlines()[0]}, log {log_path(trial.cell)},"
            if seconds < _QUICK_FAILURE_SECONDS and outcome.kind not in ("diverged", "out of memory"):
                self._quick_failures.add(trial.cell.key)
        self._say(f"{trial.cell.name}: {event} after {seconds:.0f} s, {self._progress()}")

    @property
    def _too_many_quick_failures(self) -> bool:
        """Whether the machine, or what all trials have in common, is at fault: one trial after another fails at once."""
        return len(self._quick_failures) >= max(_MAX_QUICK_FAILURES, 2 * self._most_running)

    def _prune_trials(self) -> None:
        if time.monotonic() - self._last_pruning_at < _SECONDS_BETWEEN_QUERIES:
            return
        self._last_pruning_at = time.monotonic()
        for trial in self._launcher.trials:
            if trial.number not in self._pruned_trials and self._queue.should_prune(trial) and self._launcher.interrupt(trial):
                self._pruned_trials.add(trial.number)

    def _stop(self) -> None:
        """Let all trials save their state and wait for them; another Ctrl-C kills them."""
        if self._launcher.outlives_driver:
            self._say(f"{self._sweep.name}: {len(self._launcher.trials)} trials go on; the same command watches them again")
            return
        self._queue.storage.waits_for_database = False  # the next driver recovers unrecorded outcomes
        with contextlib.suppress(InputError):
            for trial in self._unstarted_trials:
                if trial not in self._launcher.trials:
                    self._queue.put_back(trial)
        signal_number = signal.SIGINT
        while self._launcher.trials:
            try:
                self._say(f"{self._sweep.name}: stopping ({signal_number.name}), waiting for the trials")
                self._launcher.stop(signal_number)
                for trial, outcome in self._launcher.finished_trials(0):
                    with contextlib.suppress(InputError):
                        self._conclude(trial, outcome)
            except KeyboardInterrupt:
                signal_number = signal.SIGKILL

    def _progress(self) -> str:
        cells, search = self._queue.cells, self._sweep.search
        if self._sweep.decide is not None:
            self._done_cells.clear()  # one more seed, and a design has to be tuned again
        # A done cell stays done: do not read the folders of a thousand cells after each trial.
        self._done_cells |= {cell.key for cell in cells if cell.key not in self._done_cells and _unmet_needs(cell) is None}
        return f"{len(self._done_cells)}/{search.trials if search else len(cells)} cells done"

    def _summarise(self) -> int:
        cells, statuses = self._queue.cells, self._queue.cell_statuses()
        open_cells = [(cell, needs) for cell in cells if (needs := _unmet_needs(cell)) is not None]
        self._say(f"{self._sweep.name}: {len(cells) - len(open_cells)} of {len(cells)} cells are done")
        for cell, needs in open_cells:
            status = statuses.get(cell.key)
            if status is None or status.state != "pruned":
                lines = status.reason.splitlines() if status and status.reason else [needs]
                kind = f"{status.kind}, " if status and status.kind else ""
                self._say(f"  {cell.name}: {kind}{' ... '.join(dict.fromkeys((lines[0], lines[-1])))}, log {log_path(cell)}")
        for line in self._queue.summary():
            self._say(f"  {line}")
        has_failures = any(status.state == "failed" for status in statuses.values())
        if self._too_many_quick_failures:
            count = len(self._quick_failures)
            event = f"{count} cells in a row failed within {_QUICK_FAILURE_SECONDS:.0f} s, no more were started"
            self._say(f"{self._sweep.name}: {event}: look for what they have in common")
        if has_failures:
            self._say(f"{self._sweep.name}: what has failed is tried again with --retry-failed")
        is_enough = len(open_cells) < len(cells) if self._sweep.search is not None else not open_cells
        return 0 if is_enough and not has_failures and not self._too_many_quick_failures else 1


def _unmet_needs(cell: Cell) -> str | None:
    """What a cell still needs, or why its run cannot be read; None: nothing."""
    try:
        needs = cell_needs(cell)
    except (InputError, OSError) as error:
        return str(error)
    return None if needs.is_done else f"still {needs}"


def _open_queue(sweep: Sweep, say: Callable[[str], None]) -> Queue:
    from madformer.sweep.queue import Queue
    from madformer.sweep.study import Storage

    storage = Storage(sweep, say)
    if sweep.search is None:
        return Queue(sweep, storage, sweep_cells(sweep))
    from madformer.sweep.search import SearchQueue

    return SearchQueue(sweep, storage)


def _make_launcher(sweep: Sweep, queue: Queue, commands: Commands, say: Callable[[str], None]) -> Launcher:
    if sweep.launcher == "slurm":
        from madformer.sweep.launch_slurm import SlurmLauncher

        return SlurmLauncher(sweep, queue, commands, say)
    from madformer.sweep.launch_local import LocalLauncher

    launcher = LocalLauncher(sweep, sweep.accelerator, commands, say)
    if sweep.trials_per_device > 1:
        _check_sharing(sweep, queue, say)
    return launcher


def _check_sharing(sweep: Sweep, queue: Queue, say: Callable[[str], None]) -> None:
    """Refuse trials that do not fit one GPU together."""
    from madformer.sweep.launch_local import gpu_memory_gib

    count, gib = sweep.trials_per_device, gpu_memory_gib()
    if gib is None:
        say(f"{sweep.name}: not checked whether {count} trials fit one GPU: nvidia-smi does not tell its memory")
        return
    cells = queue.cells
    if sweep.search is not None:
        from madformer.sweep.search import sample_cells

        cells = sample_cells(sweep)
    fitting, text = fitting_trials(cells, gib)
    if fitting < count:
        raise ConfigError(f"trials_per_device = {count}: {text}")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM, which job schedulers send, as Ctrl-C; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _print(line: str) -> None:
    print(printable(line) + "\n", end="", flush=True)  # one write: threads must not break each other's lines
