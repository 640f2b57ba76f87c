"""What the figures of a report share: their look, lines with a band, the legend, the files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from madformer.report.estimate import Estimate

PANEL = (10.0 / 3, 3.8)
"""Inches of one panel with its share of title and legend; several rows of a legend add to the height."""
DPI = 200
"""Pixels per inch of the PNG: twice what a README shows."""

STYLE: dict[Any, Any] = {
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
_LINES = ("-", "--", ":", "-.")
_ROW = 120
"""Characters in one row of the legend under three panels; its marker and its margin count as 8."""
_MARGIN, _ROOM = 0.05, 0.25
"""Beyond the values, as shares of what they span: always, and at most for a wide interval."""


@dataclass(frozen=True)
class Look:
    """How one label is drawn, the same in all panels."""

    color: str
    marker: str
    line: str
    shade: float
    """Opacity of the band: many of them lie over each other."""


def looks(labels: Mapping[str, tuple[str, str]]) -> dict[str, Look]:
    """A look for each label: its base decides on colour and marker, how it was sampled on the line's dashes.

    Args:
        labels: label -> its base, and what sets it apart from other labels of this base.
    """
    bases = list(dict.fromkeys(base for base, _ in labels.values()))
    asides = list(dict.fromkeys(aside for _, aside in labels.values()))
    hues = asides if len(bases) == 1 else bases
    colors = _colors(len(hues))
    made = {}
    for label, (base, aside) in labels.items():
        hue = hues.index(aside if len(bases) == 1 else base)
        marker, dashes = _MARKERS[hue % len(_MARKERS)], _LINES[asides.index(aside) % len(_LINES)]
        made[label] = Look(colors[hue], marker, dashes, min(0.18, 0.9 / len(labels)))
    return made


def line(panel: Axes, label: str, look: Look, x: Sequence[float], estimates: Sequence[Estimate]) -> None:
    """The means with markers, in a band as wide as their spread, no wider than the panel, which is to be fitted before."""
    panel.plot(
        x,
        [estimated.mean for estimated in estimates],
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.8,
    )
    if any(estimated.spread for estimated in estimates):
        least, most = panel.get_ylim()
        lows, highs = zip(*map(_ends, estimates), strict=True)
        visible = [max(least, low) for low in lows], [min(most, high) for high in highs]
        # A single budget makes no band: its spread is a bar.
        panel.fill_between(x, *visible, color=look.color, alpha=look.shade, linewidth=0 if len(x) > 1 else 5)


def highlight(panel: Axes, label: str, points: Sequence[tuple[float, float]]) -> None:
    """A broad light line through points, below all others."""
    x, y = zip(*points, strict=True) if points else ((), ())
    panel.plot(x, y, color="0.72", linewidth=9, solid_capstyle="round", solid_joinstyle="round", zorder=0.5, label=label)


def fit(panel: Axes, estimates: Iterable[Estimate], log: bool) -> None:
    """Scale, ticks and limits by the values: an interval of two seeds can be far wider than all that there is to see.

    Args:
        panel: still empty.
        estimates: what will be drawn in it, at least one.
        log: whether a logarithmic scale is wanted; values of zero or less have a linear one.
    """
    listed = list(estimates)
    found = [value for estimated in listed for value in (estimated.mean, *estimated.values)]
    log = log and min(found) > 0
    if log:
        panel.set_yscale("log")
        log_ticks(panel.yaxis, found)
    forth, back = (math.log, math.exp) if log else (float, float)
    values = list(map(forth, found))
    least, most = min(values), max(values)
    span = (most - least) or abs(most) * 0.2 or 1.0
    lows, highs = zip(*map(_ends, listed), strict=True)
    low = max(least - _ROOM * span, min(forth(value) if value > 0 or not log else -math.inf for value in lows))
    high = min(most + _ROOM * span, max(map(forth, highs)))
    panel.set_ylim(back(min(low, least) - _MARGIN * span), back(max(high, most) + _MARGIN * span))


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, even ones where these would be too few; no minor ones."""
    wide = max(values) > 5 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def pictures(
    panels: int, labels: Sequence[str], title: str, fill: Callable[[Sequence[Axes]], None], **options: Any
) -> dict[str, bytes]:
    """A row of panels above their legend, on white: kind of file (`png`, `svg`) -> its contents, the same for the same input.

    Args:
        panels: how many.
        labels: what the legend will name.
        title: above all panels.
        fill: draws into the panels.
        options: of matplotlib's `subplots`.
    """
    with rc_context(STYLE):
        width = PANEL[0] * panels
        fitting = max(1, int(_ROW * panels / 3) // (8 + max(map(len, labels))))
        rows = math.ceil(len(labels) / fitting)
        figure = Figure(figsize=(width, PANEL[1] + 0.22 * (rows - 1)), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False, **options)[0])
        fill(axes)
        figure.suptitle(title, fontsize=11, color="0.1")
        handles, names = axes[0].get_legend_handles_labels()
        columns = math.ceil(len(names) / rows)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.6)
        return {kind: save(figure, kind) for kind in ("png", "svg")}


def save(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The contents of a file, the same for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=DPI, facecolor="white", metadata={"Software" if kind == "png" else "Date": None})
    return file.getvalue()


def _ends(estimated: Estimate) -> tuple[float, float]:
    return estimated.mean - (estimated.spread or 0.0), estimated.mean + (estimated.spread or 0.0)


def _colors(count: int) -> list[str]:
    """Colours from dark to light in the order of the labels, told apart by the colour-blind too; no pale yellow."""
    return [to_hex(colormaps["viridis"](0.8 * index / max(1, count - 1))) for index in range(count)]
