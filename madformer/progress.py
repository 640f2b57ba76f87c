"""What commands print: the progress of a long one, and tables. Each has a form for a terminal and one for a log.

Progress is also written to a file, for other processes.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, MarkdownElement, TableElement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from madformer.config import ExperimentConfig
from madformer.config.identity import is_imported
from madformer.errors import printable
from madformer.runs.checkpoints import checkpoint_step, list_checkpoints
from madformer.runs.files import is_claimed, is_finite, parse_json, progress_path, to_json, write_text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 0.2
SECONDS_BETWEEN_WRITES = 5.0
SILENT_SECONDS = 120.0
"""Without progress for so long, a process is reported as silent."""

_STYLES = {("state", "failed"): "red", ("state", "done"): "green", ("state", "waiting"): "dim"}
"""Heading and text of a cell -> its style in a terminal. Rich leaves colours out where `NO_COLOR` is set."""


class ProgressFile:
    """Writes the file that `read_progress` reads. Each label has its own entry, which stays when another command begins.

    Args:
        path: the file.
        details: further keys of the entry, such as the number of devices.
    """

    def __init__(self, path: Path, details: Mapping[str, Any]) -> None:
        self.path, self._details, self._last_write = path, dict(details), float("-inf")

    def write(self, label: str, done: int, total: int | None, per_second: float) -> None:
        """Write the entry of a label; every few seconds, and when `done` is `total`."""
        if done != total and time.monotonic() - self._last_write < SECONDS_BETWEEN_WRITES:
            return
        self._last_write = time.monotonic()
        entry = {"done": done, "total": total, "per_second": per_second, "time": time.time(), **self._details}
        write_text(self.path, to_json({**read_progress(self.path), label: entry}))


def read_progress(path: Path) -> dict[str, dict[str, Any]]:
    """Label -> `done`, `total`, `per_second`, `time` (seconds since 1970) and details.

    Entries of other content are left out; empty: there is no such file.
    """
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    entries = entries.items() if isinstance(entries, dict) else ()
    numbers = ("done", "per_second", "time")
    return {
        label: entry
        for label, entry in entries
        if isinstance(entry, dict) and all(is_finite(entry.get(number)) for number in numbers)
    }


def training_state(config: ExperimentConfig) -> str:
    """How far a run's training is, whether a process trains it now, and what it can go on from."""
    run, last = config.run_dir, config.trainer.max_steps
    if is_imported(run):
        return "its weights are imported: nothing is trained here"
    steps = [checkpoint_step(path) for path in list_checkpoints(run)]
    kept = f"newest checkpoint: step {steps[-1]}" if steps else "no checkpoint yet"
    entry, claimed = read_progress(progress_path(run)).get("step"), is_claimed(run, "train")
    silence = time.time() - entry["time"] if entry else math.inf
    if steps and steps[-1] >= last:
        return f"done, {last} steps; {kept}"
    step = max([int(entry["done"]) if entry else 0, *steps])
    if claimed or (claimed is None and silence < SILENT_SECONDS):
        rate = entry["per_second"] if entry else 0
        left = f", {rate:.3g} steps/s, about {format_duration((last - step) / rate)} left" if rate else ""
        return f"training, step {step} of {last}{left}; {kept}"
    elsewhere = f", or trained on another machine ({silence:.0f} s ago)" if silence < SILENT_SECONDS else ""
    return f"stopped at step {step} of {last}{elsewhere}; {kept}; to go on: madformer train --resume {shlex.quote(str(run))}"


class ProgressDisplay:
    """Shows `done` of `total` units with the rate and the remaining time: a bar on a terminal, lines in a log.

    Args:
        label: what is counted, as in "step 10/100".
        unit: of the rate, as in "12.50 steps/s".
        total: number of units; None: unknown, and no remaining time is shown.
        done: units that were done earlier; they do not count in the rate.
        silent: show nothing; for every process but the first.
        file: progress is written there as well.
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
        self._first = self._last_shown = self._done = done
        self._start = self._last_shown_at = time.monotonic()
        self._file = None if silent else file
        self._silent, self._bar = silent, None if silent or not sys.stdout.isatty() else self._make_bar(done)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def show(self, done: int, note: Callable[[], str] = str) -> None:
        """Update the number of units; it is printed every few seconds and at the end.

        Args:
            done: units that are done.
            note: further text. It is only called when something is printed: it may have to wait for a GPU.
        """
        self._done = done = done if self.total is None else min(done, self.total)
        if self._file and done > self._first:
            self._file.write(self.label, done, self.total, self._rate())
        interval = SECONDS_BETWEEN_REDRAWS if self._bar else SECONDS_BETWEEN_LINES
        if done == self.total or time.monotonic() - self._last_shown_at >= interval:
            self._print(note)

    def close(self) -> None:
        """Leave the terminal as it was; print the number of units if the total is unknown."""
        if self.total is None:
            self._print(str)
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _print(self, note: Callable[[], str]) -> None:
        now, done = time.monotonic(), self._done
        if self._silent or done == self._last_shown:
            return
        self._last_shown_at, self._last_shown = now, done
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
            words.append(f"{format_duration((self.total - done) / max(rate, 1e-9))} left")
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


@dataclass
class TextTable:
    """A table for a terminal, or lines of a log, which are never cut and are printed fast however many rows there are."""

    title: str
    headings: Sequence[str]
    left_aligned: frozenset[str]
    """Headings of columns that are not numbers."""
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> Table:
        """The table for a terminal."""
        title = Text(printable(self.title))
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in self.headings:
            table.add_column(heading, justify="left" if heading in self.left_aligned else "right", overflow="fold")
        for row in self._shown_rows():
            table.add_row(*(Text(word, _STYLES.get((name, word), "")) for name, word in zip(self.headings, row, strict=True)))
        return table

    def _shown_rows(self) -> list[list[str]]:
        """Names and messages may be a stranger's: each cell stays one line, and steers no terminal."""
        return [[printable(cell).replace("\n", " ") for cell in row] for row in self.rows]

    def plain(self) -> str:
        """The table for a log."""
        rows = self._shown_rows()
        widths = [max(map(len, column)) for column in zip(self.headings, *rows, strict=True)]

        def line(words: Sequence[str]) -> str:
            columns = zip(self.headings, words, widths, strict=True)
            aligned = (word.ljust(width) if name in self.left_aligned else word.rjust(width) for name, word, width in columns)
            return f"│ {' │ '.join(aligned)} │"

        rule = "├─" + "─┼─".join("─" * width for width in widths) + "─┤"
        return "\n".join([printable(self.title), line(self.headings), rule, *map(line, rows)])


def print_table(table: TextTable, lines: Sequence[str]) -> None:
    """Print a table, and lines below it."""
    if sys.stdout.isatty():
        Console().print(table.rich())
    else:
        print(table.plain())
    print(printable("\n".join(lines)))


class _WholeTable(TableElement):
    """A table in Markdown whose cells are folded where the terminal is narrow. Rich would cut their ends off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "table_open": _WholeTable}


def print_markdown(text: str) -> None:
    """Print Markdown: typeset on a terminal, as it is in a log."""
    if sys.stdout.isatty():
        Console().print(_Markdown(text))
    else:
        print(text)


def with_unit(number: float) -> str:
    """Three digits and a unit: 1.23 T."""
    for unit in ("", " k", " M", " G", " T", " P", " E", " Z"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} Y"


def format_duration(seconds: float) -> str:
    """Days, hours, minutes, seconds: 1 day, 2:03:04."""
    return str(timedelta(seconds=round(seconds)))
