"""From the records of runs to rows, and from rows to Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from madformer.config import InputError, load_run
from madformer.evaluation.record import latest_points, read_points

HIGHER_IS_BETTER = frozenset({"inception_score", "precision", "recall"})
"""Metrics to be maximised; all others are distances."""

NOTHING = "–"
"""In place of what was not measured."""

_SAME = ("num_samples", "sampler", "guidance", "weights", "seed", "codec", "reference", "feature_network")
"""Keys of a point that must agree for two curves to be compared."""


@dataclass(frozen=True)
class Curve:
    """One trained run in a report."""

    label: str
    """Its name in tables and legends; runs that differ in the seed alone share it."""
    run: Path
    """The run's folder."""
    axes: Mapping[str, Any]
    """What sets it apart from the other runs, as `section.field` -> value."""
    seed: int
    """Seed of training."""


@dataclass(frozen=True)
class Row:
    """One label at one budget, over its seeds."""

    label: str
    axes: Mapping[str, Any]
    nfe: int
    """The budget, in layer evaluations per block."""
    steps: int
    """Denoising steps per block."""
    values: tuple[float, ...]
    """The metric of each seed."""
    tflops: float | None
    """TFLOPs per image."""
    seconds: float | None
    """Seconds per image, the mean over seeds; None: not measured for each of them."""

    @property
    def mean(self) -> float:
        """The metric's mean over seeds."""
        return fmean(self.values)


@dataclass(frozen=True)
class Unit:
    """How a quantity is shown: in its own unit, or in thousandths where all of it is small."""

    name: str
    factor: float
    """What a value is multiplied with."""

    def show(self, value: float | None) -> str:
        """The value as text."""
        return NOTHING if value is None else number(value * self.factor)


@dataclass(frozen=True)
class Report:
    """Curves of one metric, their rows sorted by label and NFE."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """How it was measured, a sentence each."""

    @property
    def labels(self) -> list[str]:
        """All labels, in their natural order."""
        return list(dict.fromkeys(row.label for row in self.rows))

    @property
    def budgets(self) -> list[int]:
        """All NFE budgets, rising."""
        return sorted({row.nfe for row in self.rows})

    @property
    def better(self) -> str:
        """Which values are better, `lower` or `higher`."""
        return "higher" if self.metric in HIGHER_IS_BETTER else "lower"

    @property
    def compute_unit(self) -> Unit:
        """Of the FLOPs of an image."""
        return _unit((row.tflops for row in self.rows), "TFLOPs", "GFLOPs")

    @property
    def time_unit(self) -> Unit:
        """Of the seconds of an image."""
        return _unit((row.seconds for row in self.rows), "s", "ms")

    def markdown(self) -> str:
        """The report as Markdown: quality by budget, then what every point cost."""
        parts = [f"## {self.title}", "\n".join(f"- {note}" for note in self.notes), self._quality(), self._costs()]
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """One line a row, in full precision, with the unit in each column's name."""
        axes = list(dict.fromkeys(name for row in self.rows for name in row.axes))
        metric = [self.metric, f"{self.metric}_min", f"{self.metric}_max"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["label", *axes, "nfe", "steps", "seeds", *metric, "tflops_per_image", "seconds_per_image"])
        for row in self.rows:
            values = [len(row.values), row.mean, min(row.values), max(row.values), row.tflops, row.seconds]
            writer.writerow([row.label, *(row.axes.get(name) for name in axes), row.nfe, row.steps, *values])
        return text.getvalue()

    def _quality(self) -> str:
        cells = {(row.label, row.nfe): row for row in self.rows}
        choose, arrow = (max, "↑") if self.better == "higher" else (min, "↓")
        best = {nfe: choose(row.mean for row in self.rows if row.nfe == nfe) for nfe in self.budgets}
        lines = [[f"{self.metric} {arrow}", *(f"NFE {nfe}" for nfe in self.budgets)]]
        for label in self.labels:
            line = [label]
            for nfe in self.budgets:
                row = cells.get((label, nfe))
                text = spread(row.values) if row else NOTHING
                line.append(f"**{text}**" if row and row.mean == best[nfe] and len(self.labels) > 1 else text)
            lines.append(line)
        return _table(lines)

    def _costs(self) -> str:
        compute, seconds = self.compute_unit, self.time_unit
        lines = [["", "NFE", "steps", "seeds", self.metric, f"{compute.name} / image", f"{seconds.name} / image"]]
        for row in self.rows:
            counts = [str(row.nfe), str(row.steps), str(len(row.values))]
            lines.append([row.label, *counts, spread(row.values), compute.show(row.tflops), seconds.show(row.seconds)])
        return _table(lines)


def curves_of_runs(runs: Sequence[Path]) -> list[Curve]:
    """Any runs side by side, each under its name; those that share a name under parent/name.

    Raises:
        InputError: a folder is no run, or is named twice.
    """
    folders = [run.resolve() for run in runs]
    names = Counter(folder.name for folder in folders)
    labels = [folder.name if names[folder.name] == 1 else f"{folder.parent.name}/{folder.name}" for folder in folders]
    for label, times in Counter(labels).items():
        if times > 1:
            raise InputError(f"{label}: {times} runs of this name; give each run once, in a folder of its own name")
    return [Curve(label, run, {}, load_run(run).seed) for label, run in zip(labels, runs, strict=True)]


def build_report(curves: Sequence[Curve], title: str, metric: str | None = None) -> Report:
    """Gather the newest evaluations of runs.

    Args:
        curves: the runs; those of one label are seeds of one configuration.
        title: heads the report.
        metric: name of the metric; None: the first one recorded.

    Raises:
        InputError: no runs, a run that was not evaluated or not with this metric, or a broken record.
    """
    if not curves:
        raise InputError("no runs to report on; name at least one")
    groups: dict[str, list[tuple[Curve, list[dict[str, Any]]]]] = {}
    for curve in sorted(curves, key=lambda curve: (natural(curve.label), curve.seed)):
        points = latest_points(read_points(curve.run))
        if not points:
            raise InputError(f"{curve.run}: no evaluations; make them: madformer evaluate {curve.run}")
        metric = metric or next(iter(points[0]["metrics"]))
        if metric not in points[0]["metrics"]:
            raise InputError(f"{curve.run}: not evaluated with {metric}, but {', '.join(points[0]['metrics'])}")
        groups.setdefault(curve.label, []).append((curve, points))
    assert metric is not None
    rows = [row for group in groups.values() for row in _rows(group, metric)]
    return Report(title, metric, tuple(rows), tuple(_notes(groups, metric)))


def natural(text: str) -> list[str | float]:
    """A key that sorts d2 before d16: words and numbers by turns."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def number(value: float) -> str:
    """Three significant digits, more where there are more before the point."""
    if abs(value) < 1:
        return f"{value:#.3g}"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, 3 - whole)}f}"


def spread(values: Sequence[float]) -> str:
    """The mean, with the least and the greatest value where there are several."""
    mean = number(fmean(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))} – {number(max(values))})"


def _rows(group: Sequence[tuple[Curve, Sequence[Mapping[str, Any]]]], metric: str) -> list[Row]:
    first, rows = group[0][0], []
    for nfe in sorted({point["nfe"] for _, points in group for point in points}):
        seeds = [point for _, points in group for point in points if point["nfe"] == nfe]
        tflops, seconds = _mean(seeds, "tflops_per_image"), _mean(seeds, "seconds_per_image")
        values = tuple(point["metrics"][metric] for point in seeds)
        rows.append(Row(first.label, first.axes, nfe, seeds[0]["steps"], values, tflops, seconds))
    return rows


def _mean(points: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [point.get(key) for point in points]
    return None if None in values else fmean(value for value in values if value is not None)


def _notes(groups: Mapping[str, Sequence[tuple[Curve, Sequence[Mapping[str, Any]]]]], metric: str) -> list[str]:
    points = [point for group in groups.values() for _, run in group for point in run]
    seeds = sorted({len(group) for group in groups.values()})
    counts = f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'} each"
    spreads = "" if seeds == [1] else ": the mean (least – greatest)"
    weights = _distinct(points, "weights").replace("model", "raw")
    notes = [
        f"Metric {metric}, {'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better; {counts}{spreads}.",
        f"{_distinct(points, 'num_samples')} samples a point; {_distinct(points, 'sampler')} sampler; "
        f"guidance {_distinct(points, 'guidance')}; {weights} weights; training step {_distinct(points, 'step')}.",
        _measured(points),
    ]
    if differing := [key for key in _SAME if len({repr(point.get(key)) for point in points}) > 1]:
        notes.append(f"**Not all points are comparable**: they differ in {', '.join(differing)}.")
    return notes


def _measured(points: Sequence[Mapping[str, Any]]) -> str:
    timed = [point for point in points if point.get("seconds_per_image") is not None]
    if not timed:
        return "FLOPs are counted from the configuration; seconds were not measured."
    where = sorted({f"{point.get('device', 'unknown')}" + _threads(point) for point in timed})
    some = "" if len(timed) == len(points) else f" for {len(timed)} of {len(points)} points"
    return f"FLOPs are counted from the configuration; seconds were measured{some} on {', '.join(where)}."


def _threads(point: Mapping[str, Any]) -> str:
    threads = point.get("threads")
    return "" if threads is None else f" ({threads} thread{'' if threads == 1 else 's'})"


def _distinct(points: Iterable[Mapping[str, Any]], key: str) -> str:
    values = sorted({point[key] for point in points}, key=lambda value: natural(str(value)))
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def _unit(values: Iterable[float | None], name: str, small: str) -> Unit:
    greatest = max((value for value in values if value is not None), default=0.0)
    return Unit(name, 1.0) if greatest >= 1 else Unit(small, 1e3)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown: the first line heads it, the first column to the left and the others to the right."""
    ruler = ["---", *("---:" for _ in lines[0][1:])]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ruler, *cells[1:]))
