"""One attempt to bring a cell forward: its commands, their log, and how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from madformer.config import load_run
from madformer.errors import InputError
from madformer.evaluation.measurement import AXES
from madformer.runs.folder import is_run
from madformer.sweep.cells import Cell
from madformer.sweep.needs import cell_needs

Kind = Literal[
    "out of memory",
    "diverged",
    "bad data",
    "mistake",
    "error",
    "killed",
    "lost",
    "driver died",
    "interrupted",
    "hindered",
]
"""Of a failure: `killed` by a signal, `lost` with its machine or job; `retryable` are commands that say that they can go on, as
after a full disk; `error` is a program's own, such as a defect."""

TRANSIENT = frozenset(("killed", "lost", "driver died", "hindered"))
"""Kinds that a trial is tried again after: it did nothing wrong."""

IN_USE = "is in use by"
"""In the message of a command that exits with 2 because another process, such as an orphan of a killed driver, has the run."""

_OUT_OF_MEMORY = r"out of memory|OutOfMemoryError|\bMemoryError\b|can't allocate memory|oom[-_ ]kill"
_SAYS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(_OUT_OF_MEMORY, re.IGNORECASE), "out of memory"),
    (re.compile(r"^madformer: .*(is|are) not finite", re.MULTILINE), "diverged"),
    (re.compile(r"^madformer: bad data: ", re.MULTILINE), "bad data"),
    (re.compile(r"^madformer: .*(the same command goes on|to go on: madformer)", re.MULTILINE), "hindered"),
)
_REASON_LINES = 5
_REASON_CHARACTERS = 2000


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    state: Literal["done", "interrupted", "failed"]
    kind: Kind | None = None
    """Of a failure."""
    reason: str = ""
    """Of a failure: what happened, then the last lines of the log."""


DONE = Outcome("done")
INTERRUPTED = Outcome("interrupted", "interrupted", "interrupted")


def failure(status: int, output: str) -> Outcome:
    """Of a command that did not exit with 0.

    Args:
        status: its exit status; negative: the signal that killed it.
        output: the end of what it printed.
    """
    tail = "\n".join(_last_lines(output))
    kinds = (kind for pattern, kind in _SAYS if pattern.search(tail))
    kind = next(kinds, "killed" if status < 0 else "mistake" if status == 2 else "error")
    how = f"exit status {status}" if status >= 0 else f"killed by {_signal_name(-status)}"
    if status == -signal.SIGKILL and kind == "killed":
        how += ", as the system does when memory runs out"
    return Outcome("failed", kind, f"{how}\n{tail}".strip()[:_REASON_CHARACTERS])


def _last_lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.splitlines() if line.strip()][-_REASON_LINES:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


Commands = Callable[[Cell], list[list[str]]]
"""What is left to run of a cell, in order; asked again whenever the run turns out to be in use by another process."""

_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 15.0
_OUTPUT_BYTES = 65536
_BEGIN = re.compile(rb"^\$ ", re.MULTILINE)
_END = re.compile(rb"^\[exit status (-?\d+) after ", re.MULTILINE)


def trial_commands(cell: Cell) -> list[list[str]]:
    """The commands that do what a cell needs."""
    needs, madformer = cell_needs(cell), [sys.executable, "-m", "madformer"]
    commands = []
    if needs.training:
        commands.append([*madformer, "train", cell.experiment, *cell.overrides])
    if needs.budgets:
        nfe = ",".join(map(str, needs.budgets))
        commands.append([*madformer, "evaluate", str(cell.run), "--nfe", nfe, *_evaluation_options(cell)])
    return commands


def _evaluation_options(cell: Cell) -> list[str]:
    """What the sweep asks for, and fields of the evaluation that the run was not begun with: they may change at any time."""
    axes = cell.inference
    given = {axis.option: getattr(axes, axis.sweep_key) for axis in AXES.values()}
    words = [word for option, values in given.items() if values for word in (option, ",".join(map(str, values)))]
    if axes.checkpoints != "newest":
        words += ["--checkpoints", axes.checkpoints]
    if is_run(cell.run):
        before, now = load_run(cell.run), cell.config
        if before.trainer.devices != now.trainer.devices:
            words.append(f"trainer.devices={now.trainer.devices}")
        changed = {name: value for name, value in asdict(now.evaluation).items() if value != getattr(before.evaluation, name)}
        words += [f"evaluation.{name}={json.dumps(value)}" for name, value in changed.items() if name != "nfe"]
    return words


def log_path(cell: Cell, rank: int = 0) -> Path:
    """Where the output of a cell's commands is appended; of processes on several devices, that of the first one."""
    return cell.run / (f"log.rank{rank}.txt" if rank else "log.txt")


class TrialProcesses:
    """The processes of one trial. Each leads a session of its own: a Ctrl-C of the terminal reaches the driver alone."""

    def __init__(
        self,
        cell: Cell,
        commands: Commands,
        say: Callable[[str], None],
        environment: Mapping[str, str],
        rank: int | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        """Nothing runs yet.

        Args:
            cell: what is to be done.
            commands: what does it.
            say: takes one line for each event.
            environment: of the processes.
            rank: of this one among several that do the same commands together; None: it is alone.
            inherited: open files that the processes keep open.
        """
        self._cell, self._commands, self._say = cell, commands, say
        self._environment, self._log, self._inherited = dict(environment), log_path(cell, rank or 0), tuple(inherited)
        self._shared = rank is not None
        # A signal's handler may come upon the very thread that holds it.
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def run(self) -> Outcome:
        """Run what is left of the cell, to begin again when another process has been at it."""
        try:
            return self._run()
        except _Stopped:
            return INTERRUPTED
        except (OSError, InputError) as error:  # no room for the log, a broken record, ...
            return Outcome("failed", "error", str(error))

    def stop(self, signal_number: signal.Signals) -> None:
        """Send a signal to all processes of the trial, and start no more."""
        self._stopped.set()
        with self._lock:
            if self._child is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal_number)

    def wait(self) -> None:
        """Wait for the process that runs now, also in the middle of `run`, in a signal's handler."""
        with self._lock:
            child = self._child
        if child is not None:
            with contextlib.suppress(ChildProcessError):  # waited for already
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    def _run(self) -> Outcome:
        pause = _SHORTEST_WAIT_SECONDS
        while True:
            status, output = 0, ""
            for command in self._commands(self._cell):
                status, output = self._execute(command)
                if status != 0:
                    break
            if status == 0 and self._shared:
                return DONE  # of this process; the others may still be at work
            if status == 0:
                left = cell_needs(self._cell)
                what = f"its commands exited with 0, yet it is still {left}"
                return Outcome("failed", "error", what) if left else DONE
            if not (status == 2 and IN_USE in output):
                return failure(status, output)
            if pause == _SHORTEST_WAIT_SECONDS:
                self._say(f"{self._cell.name}: waits, the run {IN_USE} another process")
            self._stopped.wait(pause)
            pause = min(2 * pause, _LONGEST_WAIT_SECONDS)

    def _execute(self, command: list[str]) -> tuple[int, str]:
        """Run a command to its end; its exit status (negative: the signal that killed it) and the end of its output.

        Raises:
            _Stopped: the trial is not wanted any more, and the command was not done.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            begin, before = file.tell(), time.monotonic()
            with self._lock:
                if self._stopped.is_set():
                    raise _Stopped
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                    pass_fds=self._inherited,
                )
            self.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)  # what it has started itself, and left behind, as when it was killed
            status = self._child.wait()
            with self._lock:
                self._child = None
            end = file.seek(0, os.SEEK_END)
            file.write(f"[exit status {status} after {time.monotonic() - before:.0f} s]\n".encode())
        if status != 0 and self._stopped.is_set():
            raise _Stopped
        with self._log.open("rb") as file:
            file.seek(max(begin, end - _OUTPUT_BYTES))
            return status, file.read(end - file.tell()).decode(errors="replace")


class _Stopped(Exception):  # noqa: N818 - no error: it was asked for
    """The trial is not wanted any more."""


def append_log(cell: Cell, line: str, rank: int = 0) -> None:
    """Add a line to a cell's log."""
    path = log_path(cell, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(f"[{line}]\n".encode())


def read_outcome(cell: Cell, begin: str = "", hint: str = "") -> Outcome:
    """How a trial ended that ran elsewhere, by the cell's run and the logs of its processes.

    Args:
        cell: what was to be done.
        begin: what was noted when the trial began; what stands before it is of earlier ones.
        hint: where else to look, where there is no log.
    """
    left = cell_needs(cell)
    if not left:
        return DONE
    contents = (_behind(path, begin) for path in sorted(cell.run.glob("log*.txt")))
    outcomes = [_outcome(content, f"still {left}") for content in contents if content is not None]
    # Of several processes, one that failed by itself has made the others fail.
    outcomes.sort(key=lambda outcome: outcome.kind in TRANSIENT)
    return outcomes[0] if outcomes else Outcome("failed", "lost", f"it left no log{hint}")


def _behind(path: Path, begin: str) -> bytes | None:
    """The end of a log, no further back than a note; None: the note is not there."""
    content = path.read_bytes()
    if begin:
        mark = f"[{begin}]\n".encode()
        if mark not in content:
            return None
        content = content[content.rindex(mark) + len(mark) :]
    return content[-_OUTPUT_BYTES:]


def _outcome(content: bytes, left: str) -> Outcome:
    """What the end of a log says."""
    last = content[max((match.end() for match in _BEGIN.finditer(content)), default=0) :]
    if end := _END.search(last):
        status, output = int(end[1]), last[last.find(b"\n") : end.start()].decode(errors="replace")
        return failure(status, output) if status else Outcome("failed", "lost", f"it ended, yet it is {left}")
    return Outcome("failed", "lost", f"it ended without a word, {left}\n" + last.decode(errors="replace")[-500:])


def last_lines(cell: Cell, count: int) -> list[str]:
    """The end of a cell's log."""
    try:
        with log_path(cell).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
            return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-count:]
    except FileNotFoundError:
        return []
