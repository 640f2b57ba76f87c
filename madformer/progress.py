"""How far a long command is: a bar on a terminal, plain lines in a log; both with a rate and the time that is left.

Whoever watches from outside reads it from a file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from madformer.runs.files import write_text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 0.2
SECONDS_BETWEEN_WRITES = 5.0


class ProgressFile:
    """What `read_progress` reads; each label has an entry of its own, which stays when another command begins.

    Args:
        path: the file.
        facts: written with the rest, such as the number of devices.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self._facts, self._written = path, dict(facts), float("-inf")

    def write(self, label: str, done: int, total: int | None, per_second: float) -> None:
        """Write how far it is, not too often but at the end."""
        if done != total and time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        self._written = time.monotonic()
        entry = {"done": done, "total": total, "per_second": per_second, "time": time.time(), **self._facts}
        write_text(self.path, json.dumps({**read_progress(self.path), label: entry}))


def read_progress(path: Path) -> dict[str, dict[str, Any]]:
    """Label -> `done`, `total`, `per_second`, `time` (seconds since 1970), further facts; empty: nothing is known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class ProgressDisplay:
    """Shows `done` of `total` units.

    Args:
        label: what is counted, as in "step 10/100".
        unit: of the rate, as in "12.50 steps/s".
        total: how many there are; None: nobody knows, no time left is shown.
        done: how many there were before; they do not count in the rate.
        silent: show nothing, as processes beside the first one do.
        file: where it is written as well.
    """

    def __init__(
        self,
        label: str,
        unit: str,
        total: int | None,
        done: int = 0,
        silent: bool = False,
        file: ProgressFile | None = None,
    ) -> None:
        self.label, self.unit, self.total = label, unit, total
        self._first = self._shown = self._done = done
        self._start = self._said = time.monotonic()
        self._file = None if silent else file
        self._silent, self._bar = silent, None if silent or not sys.stdout.isatty() else self._make_bar(done)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def show(self, done: int, note: Callable[[], str] = str) -> None:
        """Say how far it is, not too often but at the end; `note` is asked only then, a GPU may have to finish for it."""
        self._done = done = done if self.total is None else min(done, self.total)
        if self._file and done > self._first:
            self._file.write(self.label, done, self.total, self._rate())
        interval = SECONDS_BETWEEN_REDRAWS if self._bar else SECONDS_BETWEEN_LINES
        if done == self.total or time.monotonic() - self._said >= interval:
            self._say(note)

    def close(self) -> None:
        """Leave the terminal as it was; where nobody knew the total, say how far it came."""
        if self.total is None:
            self._say(str)
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _say(self, note: Callable[[], str]) -> None:
        now, done = time.monotonic(), self._done
        if self._silent or done == self._shown:
            return
        self._said, self._shown = now, done
        rate = self._rate()
        if self._bar:
            self._bar.update(self._task, completed=done, note=note(), rate=f"{rate:.2f} {self.unit}/s")
            return
        words = [
            f"{self.label} {done}" + (f"/{self.total}" if self.total is not None else ""),
            note(),
            f"{rate:.2f} {self.unit}/s",
        ]
        if self.total is not None:
            words.append(f"{timedelta(seconds=round((self.total - done) / max(rate, 1e-9)))} left")
        print("  ".join(word for word in words if word), flush=True)

    def _rate(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def _make_bar(self, done: int) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console())
        bar.start()
        self._task = bar.add_task(self.label, total=self.total, completed=done, rate="", note="")
        return bar
