"""The figure of a report: quality against NFE, FLOPs and seconds, one line for each label."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from madformer.report.table import Report, Row

SIZE = (10.0, 3.8)
"""Inches; a legend of several rows adds to the height."""
DPI = 200
"""Pixels per inch of the PNG: twice what a README shows."""

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.3",
    "axes.labelcolor": "0.15",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "madformer",
}
_MARKERS = "os^Dv<>p"
_ROW = 120
"""Characters in one row of the legend; its marker and its margin count as 8."""


def draw(report: Report) -> dict[str, bytes]:
    """The report as a picture on white: kind of file (`png`, `svg`) -> its contents, the same for the same report."""
    pictures = {}
    with rc_context(_STYLE):
        figure = _figure(report)
        for kind, undated in (("png", {"Software": None}), ("svg", {"Date": None})):
            file = io.BytesIO()
            figure.savefig(file, format=kind, dpi=DPI, facecolor="white", metadata=undated)
            pictures[kind] = file.getvalue()
    return pictures


def _figure(report: Report) -> Figure:
    fitting = max(1, _ROW // (8 + max(map(len, report.labels))))
    legend_rows = math.ceil(len(report.labels) / fitting)
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.22 * (legend_rows - 1)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    compute, seconds = report.compute_unit, report.time_unit
    _panel(panels[0], report, "layer evaluations per block (NFE)", [row.nfe for row in report.rows])
    _panel(panels[1], report, f"{compute.name} per image", [_times(row.tflops, compute.factor) for row in report.rows])
    _panel(panels[2], report, f"{seconds.name} per image", [_times(row.seconds, seconds.factor) for row in report.rows])
    _budget_ticks(panels[0], report.budgets)
    panels[0].set_ylabel(f"{report.metric} ({report.better} is better)")
    figure.suptitle(report.title, fontsize=11, color="0.1")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = math.ceil(len(labels) / legend_rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.6)
    return figure


def _panel(panel: Axes, report: Report, title: str, costs: Sequence[float | None]) -> None:
    """One line with markers for each label, a band between the least and the greatest seed."""
    panel.set_xlabel(title)
    for label, color, marker in zip(report.labels, _colors(len(report.labels)), cycle(_MARKERS), strict=False):
        points = [(cost, row) for cost, row in zip(costs, report.rows, strict=True) if row.label == label and cost is not None]
        _line(panel, label, sorted(points, key=lambda point: point[1].nfe), color, marker)
    known, values = [cost for cost in costs if cost is not None], [value for row in report.rows for value in row.values]
    if min(values) > 0:
        panel.set_yscale("log")
        _log_ticks(panel.yaxis, values)
    if known:
        panel.set_xscale("log")
        _log_ticks(panel.xaxis, known)
    else:
        panel.set_xticks([])
    if len(known) < len(costs):
        missing = "not measured for all" if known else "not measured"
        panel.text(0.5, 0.5, missing, transform=panel.transAxes, ha="center", color="0.5")


def _log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, even ones where these would be too few; no minor ones."""
    wide = max(values) > 5 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _line(panel: Axes, label: str, points: Sequence[tuple[float, Row]], color: str, marker: str) -> None:
    x = [cost for cost, _ in points]
    panel.plot(
        x,
        [row.mean for _, row in points],
        color=color,
        marker=marker,
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.8,
    )
    if any(len(row.values) > 1 for _, row in points):
        least, greatest = [min(row.values) for _, row in points], [max(row.values) for _, row in points]
        panel.fill_between(x, least, greatest, color=color, alpha=0.18, linewidth=0)


def _budget_ticks(panel: Axes, budgets: Sequence[int]) -> None:
    """The budgets themselves as ticks, thinned where there are many."""
    panel.set_xscale("log", base=2)
    shown = budgets[:: math.ceil(len(budgets) / 8)]
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_minor_locator(NullLocator())


def _colors(count: int) -> list[str]:
    """Colours from dark to light in the order of the labels, told apart by the colour-blind too; no pale yellow."""
    return [to_hex(colormaps["viridis"](0.8 * index / max(1, count - 1))) for index in range(count)]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
