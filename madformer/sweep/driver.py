"""`madformer sweep run`: claim trials, have them run, tell what became of them, until nothing is left."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from madformer.errors import ConfigError, InputError
from madformer.sweep.cells import Cell, sweep_cells
from madformer.sweep.needs import cell_needs
from madformer.sweep.spec import Sweep
from madformer.sweep.trial import DONE, INTERRUPTED, TRANSIENT, Commands, Outcome, log_path, trial_commands

if TYPE_CHECKING:
    from madformer.sweep.queue import Queue, Trial

_POLL_SECONDS = 0.5
_QUICK_SECONDS = 60.0
_QUICK_FAILURES = 3
_SECONDS_BETWEEN_LOOKS = 5.0
"""For waiting trials of other drivers, and at previews."""


class Launcher(Protocol):
    """Where trials run. All methods are called by one thread."""

    outlives_driver: bool
    """Whether trials go on when the driver is told to stop."""

    @property
    def trials(self) -> list[Trial]:
        """Those that run."""

    def room(self) -> int:
        """How many trials can be started now."""

    def start(self, trials: Sequence[Trial]) -> None:
        """Start trials, no more than there is room for; those that have a `job` run already."""

    def ended(self, seconds: float) -> Iterable[tuple[Trial, Outcome]]:
        """Trials that have ended; waits for one so long."""

    def end(self, trial: Trial) -> bool:
        """Have a trial save its state and end; whether it was told."""

    def stop(self, how: signal.Signals) -> None:
        """Send all trials a signal, and wait for them."""

    def close(self) -> None:
        """Let go of everything; no trial runs any more."""


def run_sweep(
    sweep: Sweep,
    retry_failed: bool = False,
    commands: Commands = trial_commands,
    say: Callable[[str], None] | None = None,
) -> int:
    """Do what the cells of a sweep need; several drivers may do so at once.

    Args:
        retry_failed: whether cells that have failed are tried again.
        commands: what a trial runs.
        say: takes one line for each event; default: to stdout.

    Returns:
        The exit status: 0 all is done, 1 some cell failed, 130 interrupted.

    Raises:
        InputError: a cell has no data, its folder holds another experiment's run, or there is no storage; nothing was started.
    """
    say = say or _print
    cells = sweep_cells(sweep)
    needs = [cell_needs(cell) for cell in cells]
    if cells and not any(needs):
        say(f"{sweep.name}: all {len(cells)} cells are done, nothing to do")
        return 0
    for cell in cells:
        if cell.config.data.source is None and cell.config.data.latents is None:
            raise ConfigError(f"cell {cell.name}: data.source = None: nothing to train on; such a sweep can only be planned")
    try:
        with _sigterm_interrupts(), contextlib.ExitStack() as open_things:
            queue = open_things.enter_context(_open_queue(sweep, cells, say))
            launcher = _make_launcher(sweep, queue, commands, say)
            open_things.callback(launcher.close)
            if retry_failed:
                queue.retry_failed()
            return Driver(sweep, queue, launcher, say).run()
    except KeyboardInterrupt:
        say(f"{sweep.name}: interrupted; the same command goes on from here")
        return 130


class Driver:
    """One process that works on a sweep."""

    def __init__(self, sweep: Sweep, queue: Queue, launcher: Launcher, say: Callable[[str], None]) -> None:
        self._sweep, self._queue, self._launcher, self._say = sweep, queue, launcher, say
        self._started, self._ended_early, self._done = dict[int, float](), set[int](), set[str]()
        self._may_be_more = True
        """What the queue said when it was last asked for a trial."""
        self._asked = self._looked = float("-inf")
        self._waits = False
        """Whether there is no room although no trial runs."""
        self._claimed: list[Trial] = []
        """Trials that are this driver's, and not the launcher's yet."""
        self._at_once, self._quick = 1, set[str]()
        """The most trials that ran at once, and cells that failed in a row, soon after their start."""

    def run(self) -> int:
        """Work until nothing is left.

        Returns:
            The exit status: 0 all is done, 1 some cell failed.

        Raises:
            KeyboardInterrupt: all trials have ended and are put back, or are left where they go on.
        """
        try:
            while self._start_what_fits() or self._launcher.trials:
                for trial, outcome in self._launcher.ended(_POLL_SECONDS):
                    self._conclude(trial, outcome)
                self._end_hopeless()
        except BaseException:  # Ctrl-C, or an error of whatever kind: no trial is to be left without its driver
            self._stop()
            raise
        return self._summarise()

    def _start_what_fits(self) -> bool:
        """Claim and start trials; whether there is, or may be, something left to start."""
        if self._too_many_quick_failures:
            return False
        if time.monotonic() - self._asked < _SECONDS_BETWEEN_LOOKS:
            return self._may_be_more
        room = self._launcher.room()
        if not room:
            if not self._launcher.trials and not self._waits:
                self._say(f"{self._sweep.name}: waits, there is no room for a trial now")
            self._waits = not self._launcher.trials
            return True
        claim = self._queue.claim(room)
        if len(claim.trials) < room:
            self._asked, self._may_be_more = time.monotonic(), claim.others
        self._claimed = claim.trials
        for trial in claim.trials:
            self._started[trial.number] = time.monotonic()
            what = (_flaw(trial.cell) or "done").removeprefix("still ")
            begins = f"runs already, {trial.job}" if trial.job else f"starts, {what}"
            self._say(f"{trial.cell.name}: {begins}, log {log_path(trial.cell)}")
        self._launcher.start(claim.trials)
        self._claimed, self._at_once = [], max(self._at_once, len(self._launcher.trials))
        return self._may_be_more or bool(claim.trials)

    def _conclude(self, trial: Trial, outcome: Outcome) -> None:
        self._asked, self._may_be_more = float("-inf"), True  # it may be there to be tried again
        seconds = time.monotonic() - self._started.pop(trial.number)
        if outcome == DONE:
            self._quick.clear()
            self._queue.complete(trial)
            event = "finished"
        elif outcome == INTERRUPTED and trial.number in self._ended_early:
            self._queue.prune(trial)
            event = "ended early, others are better"
        elif outcome == INTERRUPTED:
            self._queue.put_back(trial)
            self._say(f"{trial.cell.name}: interrupted")
            return
        else:
            self._queue.fail(trial, outcome)
            verb = "died" if outcome.kind in TRANSIENT else f"failed ({outcome.kind})"
            event = f"{verb}, {outcome.reason.splitlines()[0]}, log {log_path(trial.cell)},"
            if seconds < _QUICK_SECONDS and outcome.kind not in ("diverged", "out of memory"):
                self._quick.add(trial.cell.key)
        self._say(f"{trial.cell.name}: {event} after {seconds:.0f} s, {self._progress()}")

    @property
    def _too_many_quick_failures(self) -> bool:
        """Whether trial after trial fails at once: then it is the machine, or what all of them have in common."""
        return len(self._quick) >= max(_QUICK_FAILURES, 2 * self._at_once)

    def _end_hopeless(self) -> None:
        if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        for trial in self._launcher.trials:
            hopeless = trial.number not in self._ended_early and self._queue.is_hopeless(trial)
            if hopeless and self._launcher.end(trial):
                self._ended_early.add(trial.number)

    def _stop(self) -> None:
        """Have all trials save their state and wait for them; another Ctrl-C kills them."""
        if self._launcher.outlives_driver:
            self._say(f"{self._sweep.name}: {len(self._launcher.trials)} trials go on; the same command watches them again")
            return
        self._queue.storage.patient = False  # what is not told is seen by its owner's end
        with contextlib.suppress(InputError):
            for trial in self._claimed:
                if trial not in self._launcher.trials:
                    self._queue.put_back(trial)
        how = signal.SIGINT
        while self._launcher.trials:
            try:
                self._say(f"{self._sweep.name}: stopping ({how.name}), waiting for the trials")
                self._launcher.stop(how)
                for trial, outcome in self._launcher.ended(0):
                    with contextlib.suppress(InputError):
                        self._conclude(trial, outcome)
            except KeyboardInterrupt:
                how = signal.SIGKILL

    def _progress(self) -> str:
        cells, search = self._queue.cells, self._sweep.search
        # What is done stays done: the folders of a thousand cells are not read after each trial.
        self._done |= {cell.key for cell in cells if cell.key not in self._done and _flaw(cell) is None}
        return f"{len(self._done)}/{search.trials if search else len(cells)} cells done"

    def _summarise(self) -> int:
        cells, cell_statuses = self._queue.cells, self._queue.cell_statuses()
        left = [(cell, flaw) for cell in cells if (flaw := _flaw(cell)) is not None]
        self._say(f"{self._sweep.name}: {len(cells) - len(left)} of {len(cells)} cells are done")
        for cell, flaw in left:
            standing = cell_statuses.get(cell.key)
            if standing is None or standing.state != "pruned":
                lines = standing.reason.splitlines() if standing and standing.reason else [flaw]
                kind = f"{standing.kind}, " if standing and standing.kind else ""
                self._say(f"  {cell.name}: {kind}{' ... '.join(dict.fromkeys((lines[0], lines[-1])))}, log {log_path(cell)}")
        for line in self._queue.findings():
            self._say(f"  {line}")
        failed = any(standing.state == "failed" for standing in cell_statuses.values())
        if self._too_many_quick_failures:
            what = f"{len(self._quick)} cells in a row failed within {_QUICK_SECONDS:.0f} s, no more were started"
            self._say(f"{self._sweep.name}: {what}: look for what they have in common")
        if failed:
            self._say(f"{self._sweep.name}: what has failed is tried again with --retry-failed")
        enough = len(left) < len(cells) if self._sweep.search is not None else not left
        return 0 if enough and not failed and not self._too_many_quick_failures else 1


def _flaw(cell: Cell) -> str | None:
    """What a cell lacks, or why that cannot be read; None: nothing."""
    try:
        needs = cell_needs(cell)
    except (InputError, OSError) as error:
        return str(error)
    return f"still {needs}" if needs else None


def _open_queue(sweep: Sweep, cells: Sequence[Cell], say: Callable[[str], None]) -> Queue:
    from madformer.sweep.queue import Queue
    from madformer.sweep.study import Storage

    storage = Storage(sweep, say)
    if sweep.search is None:
        return Queue(sweep, storage, cells)
    from madformer.sweep.search import SearchQueue

    return SearchQueue(sweep, storage)


def _make_launcher(sweep: Sweep, queue: Queue, commands: Commands, say: Callable[[str], None]) -> Launcher:
    if sweep.launcher == "slurm":
        from madformer.sweep.launch_slurm import SlurmLauncher

        return SlurmLauncher(sweep, queue, commands, say)
    from madformer.sweep.launch_local import LocalLauncher

    return LocalLauncher(sweep, sweep.accelerator, commands, say)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, as a job scheduler sends it, is a Ctrl-C; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(line: str) -> None:
    print(line + "\n", end="", flush=True)  # one write, threads do not break each other's lines
