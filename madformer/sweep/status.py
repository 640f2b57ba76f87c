"""`madformer sweep status`: how far a sweep is, in a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from madformer.progress import read_progress
from madformer.runs.checkpoints import checkpoint_step, list_checkpoints
from madformer.runs.folder import progress_path, read_previews
from madformer.sweep.cells import Cell, sweep_cells
from madformer.sweep.needs import A100, Estimates, Needs, cell_needs, cell_ways, device_count, main_metrics
from madformer.sweep.spec import Search, Sweep
from madformer.sweep.trial import last_lines, log_path

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from madformer.sweep.queue import CellStatus
    from madformer.sweep.study import Storage


@dataclass
class TextTable:
    """A table: for a terminal, or as lines of a log, which are not cut and take no time however many there are."""

    title: str
    headings: Sequence[str]
    left: frozenset[str]
    """Headings of columns that are not numbers."""
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=Text(self.title), title_justify="left")
        for heading in self.headings:
            table.add_column(heading, justify="left" if heading in self.left else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def plain(self) -> str:
        """For a log."""
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            columns = zip(self.headings, cells, widths, strict=True)
            aligned = (cell.ljust(width) if name in self.left else cell.rjust(width) for name, cell, width in columns)
            return f"│ {' │ '.join(aligned)} │"

        rule = "├─" + "─┼─".join("─" * width for width in widths) + "─┤"
        return "\n".join([self.title, line(self.headings), rule, *map(line, self.rows)])


def show(grid: TextTable, lines: Sequence[str]) -> None:
    """Print a table, and lines below it."""
    if sys.stdout.isatty():
        Console().print(grid.rich())
    else:
        print(grid.plain())
    print("\n".join(lines))


def with_unit(number: float) -> str:
    """Three digits and a unit: 1.23 T."""
    for unit in ("", " k", " M", " G", " T", " P", " E", " Z"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} Y"


def duration(seconds: float) -> str:
    """Days, hours, minutes, seconds."""
    return str(timedelta(seconds=round(seconds)))


_REFRESH_SECONDS = 2.0
_SILENT_SECONDS = 120.0
_LOG_LINES = 5
_ROOM = 12
"""Lines of a terminal that are not the table's."""


@dataclass(frozen=True)
class Row:
    """A cell, and all that is known of how it is."""

    cell: Cell
    needs: Needs
    state: str
    kind: str = ""
    """Of a failure."""
    reason: str = ""
    """Of a failure."""

    @property
    def step(self) -> int:
        """Training steps that it has made."""
        found = read_progress(progress_path(self.cell.run)).get("step") if self.state == "running" else None
        checkpoints = list_checkpoints(self.cell.run)
        return int(found["done"]) if found else checkpoint_step(checkpoints[-1]) if checkpoints else 0


@dataclass(frozen=True)
class Overview:
    """All cells of a sweep at one moment."""

    sweep: Sweep
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.rows) and not any(row.state in ("running", "waiting") for row in self.rows)


def print_status(sweep: Sweep) -> None:
    """Print how far every cell is: live on a terminal, until all is done or Ctrl-C; once elsewhere.

    Raises:
        InputError: a cell's folder holds a run of another experiment, or the storage does not answer.
    """
    with Watch(sweep) as watch:
        overview = watch.look()
        if not sys.stdout.isatty():
            show(status_grid(overview, overview.rows), below(overview))
            return
        try:
            with Live(_fit(overview), console=Console(), auto_refresh=False, vertical_overflow="visible") as live:
                while not overview.is_over:
                    time.sleep(_REFRESH_SECONDS)
                    overview = watch.look()
                    live.update(_fit(overview), refresh=True)
        except KeyboardInterrupt:
            return


class Watch:
    """A look at a sweep, again and again; a context manager."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._storage: Storage | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._storage is not None:
            self._storage.close()

    def look(self) -> Overview:
        """How it is now."""
        if self._sweep.search is not None:
            return self._look_at_search(self._sweep.search)
        cells = sweep_cells(self._sweep)
        return Overview(self._sweep, self._rows(cells, [cell_needs(cell) for cell in cells]))

    def _look_at_search(self, search: Search) -> Overview:
        from madformer.sweep.search import begun, describe_best, search_cells

        trials = self._trials()
        cells = search_cells(self._sweep, trials)
        notes = [f"a search: {begun(trials)} of {search.trials} trials begun"]
        if self._storage is not None and any(trial.values for trial in trials):
            notes += describe_best(self._storage.study.best_trials, search)
        return Overview(self._sweep, self._rows(cells, [cell_needs(cell) for cell in cells]), notes)

    def _rows(self, cells: Sequence[Cell], needs: Sequence[Needs]) -> list[Row]:
        open_cells = {cell.key: cell for cell, left in zip(cells, needs, strict=True) if left}
        known: dict[str, CellStatus] = {}
        if open_cells and (trials := self._trials()):
            from madformer.sweep.queue import cell_statuses

            known = cell_statuses(trials, self._sweep.retries, open_cells)
        rows = []
        for cell, left in zip(cells, needs, strict=True):
            standing = known.get(cell.key)
            if not left or standing is None:
                rows.append(Row(cell, left, "waiting" if left else "done"))
            else:
                state = "waiting" if standing.state == "complete" else standing.state
                rows.append(Row(cell, left, state, standing.kind, standing.reason))
        return rows

    def _trials(self) -> list[FrozenTrial]:
        """All trials of the study; the database is opened when it is needed, that takes a while."""
        if self._storage is None:
            from madformer.sweep.study import Storage, exists

            if not exists(self._sweep):
                return []
            self._storage = Storage(self._sweep, only_look=True)
            self._storage.patient = False
        study = self._storage.study
        return self._storage.retry(lambda: study.get_trials(deepcopy=False))


def below(overview: Overview) -> list[str]:
    """What is to be said of the whole, and the ends of the logs of cells that failed."""
    lines = [*overview.notes, *_whole(overview)]
    for row in (row for row in overview.rows if row.state == "failed"):
        end = row.reason.splitlines()[1:] or last_lines(row.cell, _LOG_LINES)
        lines += [f"{row.cell.name} failed ({row.kind}), {log_path(row.cell)}:", *(f"    {line}" for line in end)]
    return lines


def status_grid(overview: Overview, rows: Sequence[Row]) -> TextTable:
    """Every cell with its state, how far its training and its evaluations are, and why it failed."""
    headings = ("cell", "state", "step", "rate", "points", "metric", "reason")
    grid = TextTable(overview.sweep.name, headings, frozenset(("cell", "state", "metric", "reason")))
    for row in rows:
        cell, total = row.cell, len(row.cell.budgets) * cell_ways(row.cell)
        reason = f"{row.kind}: {row.reason.splitlines()[0]}" if row.reason and row.state == "failed" else ""
        points = f"{total - row.needs.points}/{total}"
        grid.rows.append([cell.name, row.state, f"{row.step}/{cell.max_steps}", _rate(row), points, _metric(row), reason])
    return grid


def _whole(overview: Overview) -> list[str]:
    """Cells by state, and when all will be done."""
    rows = overview.rows
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    running = [row for row in rows if row.state == "running"]
    if not running:
        return [f"{len(rows)} cells: {counts}"]
    estimates = Estimates([row.cell for row in rows], A100)
    open_rows = [row for row in rows if row.state in ("running", "waiting")]
    times = [estimates.left(row.cell, row.needs, row.step) for row in open_rows]
    seconds = [time.total / device_count(row.cell) for time, row in zip(times, open_rows, strict=True)]
    if not all(time.measured for time in times):
        return [f"{len(rows)} cells: {counts}"]
    if overview.sweep.search is not None:  # those to come are as those that are known
        seconds += [sum(seconds) / len(seconds)] * max(0, overview.sweep.search.trials - len(rows))
    left = max(sum(seconds) / len(running), max(seconds))
    return [f"{len(rows)} cells: {counts}; about {duration(left)} left with {len(running)} at a time"]


def _rate(row: Row) -> str:
    """What a running cell does, and how fast."""
    found = read_progress(progress_path(row.cell.run)) if row.state == "running" else {}
    if not found:
        return ""
    label = max(found, key=lambda name: float(found[name]["time"]))
    entry: Mapping[str, float] = found[label]
    silent = time.time() - entry["time"]
    if silent > _SILENT_SECONDS:
        return f"silent for {duration(silent)}"
    return f"{entry['per_second']:.3g} {'steps' if label == 'step' else 'images'}/s"


def _metric(row: Row) -> str:
    """The main metric at the largest budget that was measured, or of the newest preview."""
    measured = {} if row.needs.training else main_metrics(row.cell)
    if measured:
        name, value = next(iter(measured[max(measured)].items()))
        return f"{name} {value:.4g} at NFE {max(measured)}"
    previews = read_previews(row.cell.run)
    if not previews:
        return ""
    name, value = next(iter(previews[-1]["metrics"].items()))
    return f"{name} {value:.4g} at step {previews[-1]['step']}"


def _fit(overview: Overview) -> RenderableType:
    """As much as a terminal has lines for: first what fails and what runs."""
    rows, lines = overview.rows, max(5, Console().height - _ROOM)
    notes = list(below(overview))
    if len(rows) > lines:
        order = {"failed": 0, "running": 1, "waiting": 2, "pruned": 3, "done": 4}
        chosen = sorted(range(len(rows)), key=lambda number: (order[rows[number].state], number))[:lines]
        notes.insert(0, f"{len(rows) - lines} more cells are not shown here; madformer sweep status ... | cat shows all")
        rows = [rows[number] for number in sorted(chosen)]
    return Group(status_grid(overview, rows).rich(), *map(Text, notes[: _ROOM + lines - len(rows)]))
