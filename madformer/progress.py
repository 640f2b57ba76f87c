"""How far a long command is: a bar on a terminal, plain lines in a log; both with a rate and the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 0.2


class ProgressDisplay:
    """Shows `done` of `total` units.

    Args:
        label: what is counted, as in "step 10/100".
        unit: of the rate, as in "12.50 steps/s".
        total: how many there are; None: nobody knows, no time left is shown.
        done: how many there were before; they do not count in the rate.
        silent: show nothing, as processes beside the first one do.
    """

    def __init__(self, label: str, unit: str, total: int | None, done: int = 0, silent: bool = False) -> None:
        self.label, self.unit, self.total = label, unit, total
        self._first = self._shown = self._done = done
        self._start = self._said = time.monotonic()
        self._silent, self._bar = silent, None if silent or not sys.stdout.isatty() else self._make_bar(done)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def show(self, done: int, note: Callable[[], str] = str) -> None:
        """Say how far it is, not too often but at the end; `note` is asked only then, a GPU may have to finish for it."""
        self._done = done = done if self.total is None else min(done, self.total)
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
        rate = (done - self._first) / max(now - self._start, 1e-9)
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
