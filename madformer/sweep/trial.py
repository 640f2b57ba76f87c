"""A trial: its commands (`madformer train`, `madformer evaluate`), their log, and how they ended (killed, failed, done)."""

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
from madformer.config.identity import is_run, to_yaml
from madformer.errors import InputError
from madformer.evaluation.measurement import AXES, DEPTH
from madformer.runs.checkpoints import newest_intact
from madformer.runs.files import write_text
from madformer.sweep.cells import Cell
from madformer.sweep.needs import cell_needs, drop_torn

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
"""Kind of a failure: `killed` by a signal, `lost` with its machine or job, `hindered` if the command says that it can go on
later, as after a full disk, `error` for a defect. The study on disk holds these words."""

RETRYABLE = frozenset(("killed", "lost", "driver died", "hindered"))
"""Kinds that say nothing about the cell: it is tried again."""

IN_USE = "is in use by"
"""In the message of a command that exits with 2 because another process, such as a killed driver's, holds the run."""

_OUT_OF_MEMORY = r"out of memory|OutOfMemoryError|\bMemoryError\b|can't allocate memory|oom[-_ ]kill"
_KIND_PATTERNS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(_OUT_OF_MEMORY, re.IGNORECASE), "out of memory"),
    (re.compile(r"^madformer: .*(is|are) not finite", re.MULTILINE), "diverged"),
    (re.compile(r"^madformer: bad data: ", re.MULTILINE), "bad data"),
    (re.compile(r"^madformer: .*(the same command goes on|to go on: madformer)", re.MULTILINE), "hindered"),
)
_REASON_LINES = 5
_REASON_CHARACTERS = 2000
_OUTPUT_BYTES = 65536
_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 15.0
_BEGIN = re.compile(rb"^\$ ", re.MULTILINE)
_TUNE = b" -m madformer tune "
_END = re.compile(rb"^\[exit status (-?\d+) after ", re.MULTILINE)

CELL = "cell.yaml"
"""File in a run's folder: the configuration that the sweep was loaded with. Its YAML files may change while it runs."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables of the environment that set the CPU threads of a process."""

Commands = Callable[[Cell], list[list[str]]]
"""The commands that a cell needs, in order; called again if another process had the run."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    state: Literal["done", "interrupted", "failed"]
    kind: Kind | None = None
    """Of a failure."""
    reason: str = ""
    """Of a failure: the exit status, then the last lines of the log."""


DONE = Outcome("done")
INTERRUPTED = Outcome("interrupted", "interrupted", "interrupted")


def failure(status: int, output: str) -> Outcome:
    """The outcome of a command that did not exit with 0.

    Args:
        status: exit status; negative: the signal that killed it.
        output: the end of its output.
    """
    tail = "\n".join(_last_lines(output, _REASON_LINES))
    kinds = (kind for pattern, kind in _KIND_PATTERNS if pattern.search(tail))
    kind = next(kinds, "killed" if status < 0 else "mistake" if status == 2 else "error")
    ending = f"exit status {status}" if status >= 0 else f"killed by {_signal_name(-status)}"
    if status == -signal.SIGKILL and kind == "killed":
        ending += ", as the system does when memory runs out"
    return Outcome("failed", kind, f"{ending}\n{tail}".strip()[:_REASON_CHARACTERS])


def _last_lines(text: str, count: int) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def trial_commands(cell: Cell) -> list[list[str]]:
    """The commands that a cell needs: training, then evaluation; or tuning, together with the design's other seeds."""
    needs, madformer = cell_needs(cell), [sys.executable, "-m", "madformer"]
    commands = list[list[str]]()
    if needs.waits:
        return commands
    if needs and not needs.training and drop_torn(cell):
        needs = cell_needs(cell)
    if needs.training:
        can_branch = cell.trunk and needs.beginning and newest_intact(cell.trunk.run, limit=cell.branch_step)
        branch = ["--branch", str(cell.trunk.run)] if cell.trunk and can_branch else []
        write_text(cell.run / CELL, to_yaml(cell.config))
        commands.append([*madformer, "train", str(cell.run / CELL), *branch])
    for options in _budget_options(cell, needs.budgets):
        commands.append([*madformer, "evaluate", str(cell.run), *options, *_inference_options(cell), *_overrides(cell)])
    if needs.tuning:
        torn = [each for each in cell.tuned_with or () if drop_torn(each)]
        commands += [[*madformer, "train", "--resume", str(each.run)] for each in torn]
        runs = [str(each.run) for each in (cell, *(cell.tuned_with or ()))]
        for options in _budget_options(cell, needs.tuning):
            commands.append([*madformer, "tune", *runs, *_overrides(cell), *options, "--tries", str(cell.inference.tries)])
    return commands


def _budget_options(cell: Cell, budgets: Sequence[int]) -> list[list[str]]:
    """Budgets and diffusion depths for each command: depths of the same budgets share one."""
    depths_of: dict[str, list[str]] = {}
    for depth in cell.depths:
        if nfe := ",".join(str(nfe) for nfe in cell.budgets_at(depth) if nfe in budgets):
            depths_of.setdefault(nfe, []).extend([] if depth is None else [str(depth)])
    return [["--nfe", nfe, *(["--diffusion-depth", ",".join(depths)] if depths else [])] for nfe, depths in depths_of.items()]


def _inference_options(cell: Cell) -> list[str]:
    """The sweep's inference axes, but for the depth."""
    axes = cell.inference
    options = {axis.option: getattr(axes, axis.sweep_key) for name, axis in AXES.items() if name != DEPTH}
    words = [word for option, values in options.items() if values for word in (option, ",".join(map(str, values)))]
    if axes.checkpoints != "newest":
        words += ["--checkpoints", axes.checkpoints]
    return words


def _overrides(cell: Cell) -> list[str]:
    """Fields of the evaluation that differ from the run's: they may change at any time."""
    words = list[str]()
    if is_run(cell.run):
        stored, config = load_run(cell.run), cell.config
        trainer = {name: getattr(config.trainer, name) for name in ("devices", "threads", "checkpoint_steps")}
        changes = {name: value for name, value in trainer.items() if value != getattr(stored.trainer, name)}
        words += [f"trainer.{name}={json.dumps(value)}" for name, value in changes.items()]
        evaluation = asdict(config.evaluation)
        changes = {name: value for name, value in evaluation.items() if value != getattr(stored.evaluation, name)}
        words += [f"evaluation.{name}={json.dumps(value)}" for name, value in changes.items() if name != "nfe"]
    return words


def log_path(cell: Cell, rank: int = 0) -> Path:
    """The log of a cell's commands; with rank 0, of the first process of several."""
    return cell.run / (f"log.rank{rank}.txt" if rank else "log.txt")


class TrialProcesses:
    """The processes of one trial. Each leads its own session: Ctrl-C in the terminal reaches only the driver."""

    def __init__(
        self,
        cell: Cell,
        commands: Commands,
        say: Callable[[str], None],
        environment: Mapping[str, str],
        rank: int | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Starts no process yet.

        Args:
            cell: the trial's cell.
            commands: gives the commands that the cell needs.
            say: called with a line for each event.
            environment: of the processes.
            rank: of this process among several that run the same commands together; None: there is one process.
            descriptors: file descriptors that the processes keep open.
        """
        self._cell, self._commands, self._say = cell, commands, say
        self._environment, self._log, self._descriptors = dict(environment), log_path(cell, rank or 0), tuple(descriptors)
        self._has_other_ranks = rank is not None
        # Reentrant: a signal's handler may run in the thread that holds it.
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stop_event = threading.Event()

    def run(self) -> Outcome:
        """Run the commands that the cell needs, from the start if another process had the run."""
        try:
            return self._run()
        except _StopRequested:
            return INTERRUPTED
        except (OSError, InputError) as error:  # a full disk, a broken record, ...
            return Outcome("failed", "error", str(error))

    def stop(self, signal_number: signal.Signals) -> None:
        """Send a signal to all processes of the trial and start no others."""
        self._stop_event.set()
        with self._lock:
            if self._child is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal_number)

    def wait(self) -> None:
        """Wait for the running process; may be called by a signal's handler during `run`."""
        with self._lock:
            child = self._child
        if child is not None:
            with contextlib.suppress(ChildProcessError):  # waited for already
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    def _run(self) -> Outcome:
        pause, before = _SHORTEST_WAIT_SECONDS, list[list[str]]()
        while True:
            status, output = 0, ""
            commands = self._commands(self._cell)
            if not commands:
                return DONE
            for command in commands:
                status, output = self._execute(command)
                if status != 0:
                    break
            if status == 0 and self._has_other_ranks:
                return DONE  # this process is; the others may still run
            if status == 0:
                needs = cell_needs(self._cell)
                if needs and commands == before:
                    return Outcome("failed", "error", f"its commands exited with 0, yet it is still {needs}")
                if not needs:
                    return DONE
                before = commands  # what can start now that they are done, such as tuning, is next
                continue
            if not (status == 2 and IN_USE in output):
                return failure(status, output)
            if pause == _SHORTEST_WAIT_SECONDS:
                self._say(f"{self._cell.name}: waits, the run {IN_USE} another process")
            self._stop_event.wait(pause)
            pause = min(2 * pause, _LONGEST_WAIT_SECONDS)

    def _execute(self, command: list[str]) -> tuple[int, str]:
        """Run a command; its exit status (negative: the signal that killed it) and the end of its output.

        Raises:
            _StopRequested: the trial was stopped before the command was done.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            begin, start = file.tell(), time.monotonic()
            with self._lock:
                if self._stop_event.is_set():
                    raise _StopRequested
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                    pass_fds=self._descriptors,
                )
            self.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)  # processes that it started and left behind, as when it was killed
            status = self._child.wait()
            with self._lock:
                self._child = None
            end = file.seek(0, os.SEEK_END)
            file.write(f"[exit status {status} after {time.monotonic() - start:.0f} s]\n".encode())
        if status != 0 and self._stop_event.is_set():
            raise _StopRequested
        with self._log.open("rb") as file:
            file.seek(max(begin, end - _OUTPUT_BYTES))
            return status, file.read(end - file.tell()).decode(errors="replace")


class _StopRequested(Exception):  # noqa: N818 - no error
    """The trial was stopped."""


def append_log(cell: Cell, line: str, rank: int = 0) -> None:
    """Add a line to a cell's log."""
    path = log_path(cell, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(f"[{line}]\n".encode())


def read_outcome(cell: Cell, begin: str = "", hint: str = "") -> Outcome:
    """How a trial ended that another process ran, by the cell's run and the logs of its processes.

    Args:
        cell: the trial's cell.
        begin: the log's line at the start of the trial; earlier lines belong to earlier trials.
        hint: where else to look if there is no log.
    """
    needs = cell_needs(cell)
    if not needs:
        return DONE
    contents = [_content_after(path, begin) for path in sorted(cell.run.glob("log*.txt"))]
    only_tuning_left = not (needs.training or needs.budgets)
    if only_tuning_left and not any(content is not None and _TUNE in content for content in contents):
        return DONE  # tuning has become possible meanwhile: it gets a trial of its own
    outcomes = [_outcome(content, f"still {needs}") for content in contents if content is not None]
    # A process that failed by itself made the others fail: its outcome counts.
    outcomes.sort(key=lambda outcome: outcome.kind in RETRYABLE)
    return outcomes[0] if outcomes else Outcome("failed", "lost", f"it left no log{hint}")


def _content_after(path: Path, begin: str) -> bytes | None:
    """The end of a log, back to a line at most; None: the line is not there."""
    content = path.read_bytes()
    if begin:
        mark = f"[{begin}]\n".encode()
        if mark not in content:
            return None
        content = content[content.rindex(mark) + len(mark) :]
    return content[-_OUTPUT_BYTES:]


def _outcome(content: bytes, state: str) -> Outcome:
    """The outcome by the last command of a log."""
    command = content[max((match.end() for match in _BEGIN.finditer(content)), default=0) :]
    if end := _END.search(command):
        status, output = int(end[1]), command[command.find(b"\n") : end.start()].decode(errors="replace")
        return failure(status, output) if status else Outcome("failed", "lost", f"it ended, yet it is {state}")
    return Outcome("failed", "lost", f"it ended without a word, {state}\n" + command.decode(errors="replace")[-500:])


def last_lines(cell: Cell, count: int) -> list[str]:
    """The last lines of a cell's log."""
    try:
        with log_path(cell).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
            return _last_lines(file.read().decode(errors="replace"), count)
    except FileNotFoundError:
        return []
