"""How a trial ended: done, put off, or failed, and then of what kind the failure is."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

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
"""Of a failure: `killed` by a signal, `lost` with its machine or job; `hindered` are commands that say that they can go on, as
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
