"""`madformer sweep plan` and `madformer sweep status`: the cells of a sweep in a table, or as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from madformer.errors import InputError, printable
from madformer.evaluation.measurement import DEPTH
from madformer.progress import SILENT_SECONDS, TextTable, format_duration, print_table, read_progress
from madformer.runs.checkpoints import checkpoint_step, list_checkpoints
from madformer.runs.files import progress_path, read_previews, to_json
from madformer.sweep.adaptive import assess, wanted_cells
from madformer.sweep.cells import Cell
from madformer.sweep.forecast import (
    A100,
    Device,
    Estimates,
    Suite,
    assumed_device,
    basis,
    hours_line,
    hours_unit,
    image_flops,
    memory_lines,
    parameter_count,
    plan_table,
    sharing_line,
    skipped_budgets,
    total_lines,
    training_flops,
)
from madformer.sweep.needs import Needs, cell_needs, main_metrics, own_share, trunk_lines
from madformer.sweep.spec import Search, Sweep
from madformer.sweep.trial import last_lines, log_path

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from madformer.sweep.queue import CellStatus
    from madformer.sweep.study import Storage

_REFRESH_SECONDS = 2.0
_LOG_LINES = 5
_LINES_AROUND_TABLE = 12
"""Lines of a terminal that the table does not take."""


@dataclass(frozen=True)
class Row:
    """A cell and its state."""

    cell: Cell
    needs: Needs
    state: str
    kind: str = ""
    """Of a failure."""
    reason: str = ""
    """Of a failure."""
    started: float = 0.0
    """When a running cell's trial began, in seconds since 1970."""

    @property
    def progress(self) -> dict[str, dict[str, Any]]:
        """What a running cell's trial has written to the progress file; entries of earlier trials are left out."""
        entries = read_progress(progress_path(self.cell.run)) if self.state == "running" else {}
        return {label: entry for label, entry in entries.items() if entry["time"] >= self.started}

    @property
    def step(self) -> int:
        """Training steps that are done."""
        if self.state == "done":
            return self.cell.max_steps  # its checkpoints may have been deleted
        entry = self.progress.get("step")
        checkpoints = list_checkpoints(self.cell.run)
        return int(entry["done"]) if entry else checkpoint_step(checkpoints[-1]) if checkpoints else 0


@dataclass(frozen=True)
class Overview:
    """All cells of a sweep at one moment."""

    sweep: Sweep
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def is_over(self) -> bool:
        """Whether no cell runs or waits."""
        return bool(self.rows) and not any(row.state in ("running", "waiting") for row in self.rows)


def print_status(sweep: Sweep) -> None:
    """Print the state of every cell: live on a terminal, until all is done or Ctrl-C; elsewhere once.

    Raises:
        InputError: a cell's folder holds a run of another experiment, or the storage does not answer.
    """
    with Watcher(sweep) as watcher:
        overview = watcher.overview()
        if not sys.stdout.isatty():
            print_table(status_table(overview, overview.rows), footer(overview))
            return
        try:
            with Live(_fit(overview), console=Console(), auto_refresh=False, vertical_overflow="visible") as live:
                while not overview.is_over:
                    time.sleep(_REFRESH_SECONDS)
                    overview = watcher.overview()
                    live.update(_fit(overview), refresh=True)
        except KeyboardInterrupt:
            return


class Watcher:
    """Reads the state of a sweep repeatedly; a context manager that closes the study."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._storage: Storage | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._storage is not None:
            self._storage.close()

    def overview(self) -> Overview:
        """The state of all cells now."""
        if self._sweep.search is not None:
            return self._search_overview(self._sweep.search)
        assessment = assess(self._sweep)
        return Overview(self._sweep, self._rows(assessment.cells), assessment.lines)

    def _search_overview(self, search: Search) -> Overview:
        from madformer.sweep.search import count_trials, describe_best, search_cells

        trials = self._trials()
        notes = [f"a search: {count_trials(trials)} of {search.trials} trials begun"]
        if self._storage is not None and any(trial.values for trial in trials):
            notes += describe_best(self._storage.study.best_trials, search)
        return Overview(self._sweep, self._rows(search_cells(self._sweep, trials)), notes)

    def _rows(self, cells: Sequence[Cell]) -> list[Row]:
        needs = [cell_needs(cell) for cell in cells]
        open_cells = {cell.key: cell for cell, need in zip(cells, needs, strict=True) if not need.is_done}
        statuses: dict[str, CellStatus] = {}
        if open_cells and (trials := self._trials()):
            from madformer.sweep.queue import cell_statuses

            statuses = cell_statuses(trials, self._sweep.retries, open_cells)
        rows = []
        for cell, need in zip(cells, needs, strict=True):
            status = statuses.get(cell.key)
            if need.is_done or status is None:
                rows.append(Row(cell, need, "done" if need.is_done else "waiting"))
            else:
                state = "waiting" if status.state == "complete" else status.state
                rows.append(Row(cell, need, state, status.kind, status.reason, status.started))
        return rows

    def _trials(self) -> list[FrozenTrial]:
        """All trials of the study. The database takes a while to open: that happens at the first call."""
        if self._storage is None:
            from madformer.sweep.study import Storage, study_exists

            if not study_exists(self._sweep):
                return []
            try:
                self._storage = Storage(self._sweep, read_only=True)
            except KeyError:  # a database without this study
                return []
            self._storage.waits_for_database = False
        study = self._storage.study
        return self._storage.retry(lambda: study.get_trials(deepcopy=False))


def footer(overview: Overview) -> list[str]:
    """The lines below the table: notes, totals, and the ends of the logs of failed cells."""
    lines = [*overview.notes, _totals(overview), *trunk_lines([row.cell for row in overview.rows])]
    for row in (row for row in overview.rows if row.state == "failed"):
        log_lines = row.reason.splitlines()[1:] or last_lines(row.cell, _LOG_LINES)
        lines += [f"{row.cell.name} failed ({row.kind}), {log_path(row.cell)}:", *(f"    {line}" for line in log_lines)]
    return lines


def status_table(overview: Overview, rows: Sequence[Row]) -> TextTable:
    """A row for each cell: state, training steps, points, main metric, and why it failed."""
    headings = ("cell", "state", "step", "rate", "points", "metric", "reason")
    table = TextTable(overview.sweep.name, headings, frozenset(("cell", "state", "metric", "reason")))
    for row in rows:
        cell, total = row.cell, row.cell.point_count
        reason = str(row.needs) if row.needs.tuning else row.needs.beginning
        reason = f"{row.kind}: {row.reason.splitlines()[0]}" if row.reason and row.state == "failed" else reason
        points = f"{total - row.needs.points}/{total}"
        table.rows.append([cell.name, row.state, f"{row.step}/{cell.max_steps}", _rate(row), points, _metric(row), reason])
    return table


def _totals(overview: Overview) -> str:
    """Cells by state, and the remaining time if it can be told from measured rates."""
    rows = overview.rows
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    line, running = f"{len(rows)} cells: {counts}", states.count("running")
    if not running:
        return line
    estimates = Estimates([row.cell for row in rows], A100)
    open_rows = [row for row in rows if row.state in ("running", "waiting")]
    times = [estimates.remaining_time(row.cell, row.needs, row.step) for row in open_rows]
    if not all(time.is_measured for time in times):
        return line
    seconds = [time.total / row.cell.device_count for time, row in zip(times, open_rows, strict=True)]
    if overview.sweep.search is not None:  # trials to come are assumed to take as long as these
        seconds += [sum(seconds) / len(seconds)] * max(0, overview.sweep.search.trials - len(rows))
    seconds_left = max(sum(seconds) / running, max(seconds))
    return f"{line}; about {format_duration(seconds_left)} left with {running} at a time"


def _rate(row: Row) -> str:
    """The rate of a running cell; empty: it does not run."""
    if row.state != "running":
        return ""
    entries = row.progress
    silence = time.time() - max([row.started, *(float(entry["time"]) for entry in entries.values())])
    if row.started and silence > SILENT_SECONDS:
        return f"silent for {format_duration(silence)}"
    if not entries:
        return ""
    label = max(entries, key=lambda name: float(entries[name]["time"]))
    entry: Mapping[str, float] = entries[label]
    return f"{entry['per_second']:.3g} {'steps' if label == 'step' else 'images'}/s"


def _metric(row: Row) -> str:
    """The main metric at the largest evaluated budget, or of the newest preview."""
    metrics = {} if row.needs.training else main_metrics(row.cell)
    if metrics:
        name, value = next(iter(metrics[max(metrics)].items()))
        return f"{name} {value:.4g} at NFE {max(metrics)}"
    previews = read_previews(row.cell.run)
    if not previews:
        return ""
    name, value = next(iter(previews[-1]["metrics"].items()))
    return f"{name} {value:.4g} at step {previews[-1]['step']}"


def _fit(overview: Overview) -> RenderableType:
    """As many rows as the terminal has lines for: failed and running cells come first."""
    rows, lines = overview.rows, max(5, Console().height - _LINES_AROUND_TABLE)
    notes = footer(overview)
    if len(rows) > lines:
        order = {"failed": 0, "running": 1, "waiting": 2, "pruned": 3, "done": 4}
        chosen = sorted(range(len(rows)), key=lambda number: (order[rows[number].state], number))[:lines]
        notes.insert(0, f"{len(rows) - lines} more cells are not shown here; madformer sweep status ... | cat shows all")
        rows = [rows[number] for number in sorted(chosen)]
    return Group(
        status_table(overview, rows).rich(),
        *(Text(printable(note)) for note in notes[: _LINES_AROUND_TABLE + lines - len(rows)]),
    )


def print_plan(sweep: Sweep, tflops: float | None = None, mfu: float | None = None, memory_gib: float | None = None) -> None:
    """Print every cell with its cost and its state, and what all of them cost.

    Args:
        tflops: peak of a device, in TFLOP/s; None: an A100's, or a CPU core's.
        mfu: part of the peak that is reached; None: the usual one.
        memory_gib: of a device in GiB; says which cells do not fit, and what would.

    Raises:
        InputError: a cell's folder holds a run of another experiment.
    """
    device = assumed_device(sweep, tflops, mfu)
    if sweep.search is None:
        assessment = assess(sweep)
        cells = assessment.cells
        needs, estimates = [cell_needs(cell) for cell in cells], Estimates(cells, device)
        lines = total_lines(sweep, cells, needs, estimates, device)
        lines += [*skipped_budgets(cells), *memory_lines({cell.name: cell for cell in cells}, sweep.accelerator, memory_gib)]
        lines += sharing_line(sweep, cells, memory_gib)
        if sweep.decide is not None:
            lines += assessment.lines
            if not assessment.is_too_long:
                lines.append(f"Some {assessment.expected_runs} runs in all, until everything is decided or at its limit.")
        print_table(plan_table(sweep, cells, needs, estimates), lines)
    else:
        print(printable("\n".join(search_lines(sweep, sweep.search, device, memory_gib))))


def search_lines(sweep: Sweep, search: Search, device: Device, memory_gib: float | None = None) -> list[str]:
    """The space of a search, and what its trials cost: an estimate from trials drawn at random."""
    from madformer.sweep.search import SAMPLED_TRIALS, sample_cells, study_cells

    cells = sample_cells(sweep)
    estimates = Estimates([*study_cells(sweep), *cells], device)
    times = [estimates.cell_time(cell) for cell in cells]
    hours = fmean([time.total / 3600 for time in times])
    longest = max(time.total / cell.device_count for time, cell in zip(times, cells, strict=True))
    unit, budgets = hours_unit(sweep), ", ".join(map(str, search.nfe))
    return [
        f"{sweep.name}: {sweep.experiment}, a search of {search.trials} trials by {search.sampler}",
        *(f"  {key}: {choices}" for key, choices in search.space.items()),
        f"  objectives {', '.join(search.objectives)} at NFE {budgets}, pruner {search.pruner}",
        f"  of {SAMPLED_TRIALS} trials drawn at random {len(cells)} are legal; one takes {hours:.3g} {unit}",
        f"  all {search.trials}: {hours * search.trials:.3g} {unit}, the longest trial {format_duration(longest)}",
        *(f"  {line}" for line in hours_line(sweep, hours * search.trials)),
        f"  {basis(times[0].is_measured, device)}",
        *(f"  {line}" for line in sharing_line(sweep, cells, memory_gib)),
    ]


def print_suite(
    sweeps: Sequence[Sweep], tflops: float | None = None, mfu: float | None = None, memory_gib: float | None = None
) -> None:
    """Print what each sweep adds to those above it, and the sum.

    Args:
        sweeps: grids. Two models are the same if their configurations have the same hash.
        tflops: as in `print_plan`.
        mfu: as in `print_plan`.
        memory_gib: as in `print_plan`.

    Raises:
        InputError: one is a search, whose trials are not known in advance, or they are for different kinds of devices.
    """
    for sweep in sweeps:
        if sweep.search is not None:
            raise InputError(f"{sweep.name} is a search, whose models are not known before: plan it alone")
    if len(units := sorted({hours_unit(sweep) for sweep in sweeps})) > 1:
        raise InputError(f"some of the sweeps count {units[0]} and some {units[1]}: plan them apart")
    device = assumed_device(sweeps[0], tflops, mfu)
    suite = Suite(device)
    headings = ["sweep", "cells", "new models", "parameters", "training FLOPs", "evaluation FLOPs", hours_unit(sweeps[0])]
    table = TextTable(f"{len(sweeps)} sweeps", headings, frozenset(["sweep"]))
    for sweep in sweeps:
        table.rows.append([sweep.name, *suite.add(wanted_cells(sweep))])
    table.rows.append(["together", *suite.total()])
    cells = {f"{sweep.name}/{cell.name}": cell for sweep in sweeps for cell in wanted_cells(sweep)}
    shared = f"What a sweep shares with one above it is counted there. {basis(suite.is_measured, device)}"
    print_table(table, [shared, *memory_lines(cells, sweeps[0].accelerator, memory_gib)])


def print_json(sweep: Sweep, tflops: float | None = None, mfu: float | None = None) -> None:
    """Print every cell with its state, its costs and what it needs as one JSON document, for programs.

    Of a search the cells are those of the trials begun, and `notes` says how many that are.

    Args:
        tflops: peak of a device in TFLOP/s, where nothing was measured; None: an A100's, or a CPU core's.
        mfu: part of the peak that is reached; None: the usual one.

    Raises:
        InputError: a cell's folder holds a run of another experiment, or the storage does not answer.
    """
    with Watcher(sweep) as watcher:
        overview = watcher.overview()
    device = assumed_device(sweep, tflops, mfu)
    estimates = Estimates([row.cell for row in overview.rows], device)
    cells = [_record(row, estimates) for row in overview.rows]
    document: dict[str, Any] = {
        "sweep": sweep.name,
        "experiment": sweep.experiment,
        "device": asdict(device),
        "notes": overview.notes,
    }
    document |= {} if sweep.decide is None else {"contrasts": assess(sweep).records}
    print(to_json({**document, "cells": cells}, indent=1))


def _record(row: Row, estimates: Estimates) -> dict[str, Any]:
    cell, step, needed = row.cell, row.step, estimates.cell_time(row.cell)
    return {
        "cell": cell.name,
        "run": str(cell.run),
        "axes": cell.axes,
        "seed": cell.seed,
        "state": row.state,
        "failure": {"kind": row.kind, "reason": row.reason} if row.state == "failed" else None,
        "step": step,
        "max_steps": cell.max_steps,
        "needs": asdict(row.needs),
        "metrics": {} if row.needs.training else main_metrics(cell),
        "parameters": parameter_count(cell.config.model),
        "training_flops": own_share(cell) * training_flops(cell.config),
        "flops_per_image": [
            {"nfe": each.nfe, "steps": each.steps, DEPTH: each.diffusion_depth, "flops": image_flops(cell, each)}
            for each in cell.main_samplings
        ],
        "skipped": dict(cell.skipped),
        "device_seconds": needed.total,
        "device_seconds_left": estimates.remaining_time(cell, row.needs, step).total,
        "is_measured": needed.is_measured,
    }
