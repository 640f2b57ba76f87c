"""Run a sweep on this machine: each trial is the commands that a user would type, in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from madformer.config import ConfigError, InputError, load_run
from madformer.run import is_run
from madformer.sweep.needs import cell_needs
from madformer.sweep.spec import Cell, Sweep

if TYPE_CHECKING:
    from madformer.sweep.study import Queue, Trial

Commands = Callable[[Cell], list[list[str]]]
"""What is left to run of a cell, in order; asked again whenever the run turns out to be in use by another process."""

IN_USE = "is in use by"
"""In the message of a command that exits with 2 because another process, such as an orphan of a killed driver, has the run."""

_POLL_SECONDS = 1.0
_LONGEST_POLL_SECONDS = 15.0
_REASON_LINES = 5
_REASON_CHARACTERS = 2000
_OUTPUT_BYTES = 65536


def trial_commands(cell: Cell) -> list[list[str]]:
    """The commands that do what a cell needs."""
    needs, madformer = cell_needs(cell), [sys.executable, "-m", "madformer"]
    commands = []
    if needs.training:
        commands.append([*madformer, "train", cell.experiment, *cell.overrides])
    if needs.budgets:
        nfe = ",".join(map(str, needs.budgets))
        commands.append([*madformer, "evaluate", str(cell.run), "--nfe", nfe, *_evaluation_overrides(cell)])
    return commands


def _evaluation_overrides(cell: Cell) -> list[str]:
    """Fields of the evaluation that the run was not begun with: they may change at any time."""
    if not is_run(cell.run):
        return []
    before, now = load_run(cell.run).evaluation, cell.config.evaluation
    changed = {name: value for name, value in asdict(now).items() if value != getattr(before, name)}
    return [f"evaluation.{name}={json.dumps(value)}" for name, value in changed.items()]


def log_path(cell: Cell) -> Path:
    """Where the output of a cell's commands is appended."""
    return cell.run / "log.txt"


def run_sweep(sweep: Sweep, commands: Commands = trial_commands, say: Callable[[str], None] | None = None) -> int:
    """Do what the cells of a sweep need; several drivers may do so at once.

    Args:
        commands: what a trial runs.
        say: takes one line for each event; default: to stdout.

    Returns:
        The exit status: 0 all is done, 1 some cell failed, 130 interrupted.

    Raises:
        InputError: a cell has no data, or its folder holds a run of another experiment; nothing was started.
    """
    say = say or _print
    cells = sweep.cells()
    needs = [cell_needs(cell) for cell in cells]
    if not any(needs):
        say(f"{sweep.name}: all {len(cells)} cells are done, nothing to do")
        return 0
    for cell in cells:
        if cell.config.data.source is None:
            raise ConfigError(f"cell {cell.name}: data.source = None: nothing to train on; such a sweep can only be planned")
    try:
        with _sigterm_interrupts():
            from madformer.sweep.study import Queue

            with Queue(sweep.folder, cells) as queue:
                return Driver(sweep, queue, commands, say).run()
    except KeyboardInterrupt:
        say(f"{sweep.name}: interrupted; the same command goes on from here")
        return 130


class Driver:
    """The workers of one process."""

    def __init__(self, sweep: Sweep, queue: Queue, commands: Commands, say: Callable[[str], None]) -> None:
        self._sweep, self._queue, self._commands, self._say = sweep, queue, commands, say
        self._children = Children(sweep.threads)

    def run(self) -> int:
        """Work until nothing is left.

        Returns:
            The exit status: 0 all is done, 1 some cell failed.

        Raises:
            KeyboardInterrupt: all children have ended, their trials are put back.
        """
        with ThreadPoolExecutor(self._sweep.worker_count) as pool:
            workers: list[Future[None]] = []
            try:
                workers.extend(pool.submit(self._work) for _ in range(self._sweep.worker_count))
                _await(workers)
            except KeyboardInterrupt:
                self._stop(workers)
                raise
        return self._summarise()

    def _stop(self, workers: list[Future[None]]) -> None:
        """Interrupt all children and wait for them; another Ctrl-C kills them."""
        how = signal.SIGINT
        while True:
            try:
                self._children.stop(how)
                self._say(f"{self._sweep.name}: stopping ({how.name}), waiting for the trials")
                wait(workers)
                return
            except KeyboardInterrupt:
                how = signal.SIGKILL

    def _work(self) -> None:
        """Claim and run trials until none is left."""
        while not self._children.stopped.is_set():
            trial = self._queue.claim()
            if trial is None:
                return
            if trial == "wait":
                self._children.stopped.wait(_POLL_SECONDS)
                continue
            self._run(trial)

    def _run(self, trial: Trial) -> None:
        cell, start = trial.cell, time.monotonic()
        self._say(f"{cell.name}: starts, {cell_needs(cell)}, log {log_path(cell)}")
        try:
            reason = self._run_commands(cell)
        except Stopped:
            self._queue.put_back(trial)
            self._say(f"{cell.name}: interrupted")
            return
        except (OSError, InputError) as error:  # no room for the log, a broken record, ...
            reason = str(error)
        if reason is None:
            self._queue.complete(trial)
            event = "finished"
        else:
            self._queue.fail(trial, reason)
            event = f"failed, {reason.splitlines()[0]}, log {log_path(cell)},"
        self._say(f"{cell.name}: {event} after {time.monotonic() - start:.0f} s, {self._progress()}")

    def _progress(self) -> str:
        cells = self._sweep.cells()
        return f"{sum(not cell_needs(cell) for cell in cells)}/{len(cells)} cells done"

    def _run_commands(self, cell: Cell) -> str | None:
        """Run what is left of a cell, to begin again when another process has been at it; why it failed, None: it did not.

        Raises:
            Stopped: the driver was interrupted.
        """
        pause = _POLL_SECONDS
        while True:
            status, output = 0, ""
            for command in self._commands(cell):
                status, output = self._children.run(command, log_path(cell))
                if status != 0:
                    break
            if status == 0:
                left = cell_needs(cell)
                return f"its commands exited with 0, yet it is still {left}" if left else None
            if not (status == 2 and IN_USE in output):
                return _describe_failure(status, output)
            if pause == _POLL_SECONDS:
                self._say(f"{cell.name}: waits, the run {IN_USE} another process")
            self._children.stopped.wait(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)

    def _summarise(self) -> int:
        reasons, cells = self._queue.failures(), self._sweep.cells()
        left = [cell for cell in cells if cell_needs(cell)]
        self._say(f"{self._sweep.name}: {len(cells) - len(left)} of {len(cells)} cells are done")
        for cell in left:
            last = reasons.get(cell.name, "not done").splitlines()
            self._say(f"  {cell.name}: {' ... '.join(dict.fromkeys((last[0], last[-1])))}, log {log_path(cell)}")
        return 1 if left else 0


class Stopped(Exception):  # noqa: N818 - no error: it was asked for
    """The driver is stopping: no command is started any more, and one that was running did not end well."""


class Children:
    """Processes that run now. Each leads a session of its own: a Ctrl-C of the terminal reaches the driver alone."""

    def __init__(self, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._environment = {**os.environ, **dict.fromkeys(names, str(threads))}
        self._lock, self._running = threading.Lock(), set[subprocess.Popen[bytes]]()
        self.stopped = threading.Event()

    def run(self, command: list[str], log: Path) -> tuple[int, str]:
        """Run a command to its end; its exit status (negative: the signal that killed it) and the end of its output.

        Raises:
            Stopped: the driver is stopping.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            with self._lock:
                if self.stopped.is_set():
                    raise Stopped
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
                self._running.add(child)
        status = child.wait()
        with self._lock:
            self._running.discard(child)
        if status != 0 and self.stopped.is_set():
            raise Stopped
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - _OUTPUT_BYTES))
            return status, file.read().decode(errors="replace")

    def stop(self, signal_number: signal.Signals) -> None:
        """Send a signal to all processes of all children, and start no more."""
        self.stopped.set()
        with self._lock:
            for child in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal_number)


def _await(workers: list[Future[None]]) -> None:
    """Wait for all workers; a defect of one is raised when the others have ended."""
    wait(workers)
    for worker in workers:
        worker.result()


def _describe_failure(status: int, output: str) -> str:
    how = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return "\n".join([how, *lines[-_REASON_LINES:]])[:_REASON_CHARACTERS]


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
    print(line + "\n", end="", flush=True)  # one write, workers do not break each other's lines
