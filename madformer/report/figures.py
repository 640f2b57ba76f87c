"""The figures of a report: quality against cost, diagnostics, and samples."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from madformer.evaluation.measurement import METRICS, higher_is_better, metric_key
from madformer.report.contrasts import Contrast, by_training, without_training
from madformer.report.formatting import AGAINST, COSTS, NFE, in_words
from madformer.report.points import FIXED, TUNED
from madformer.report.statistics import Estimate

if TYPE_CHECKING:
    from madformer.report.tables import Report

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
_PER_ROW, _MOST = 4, 40
"""Panels of contrasts in a row, and designs in a panel."""
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito (2008), which the colour-blind tell apart; without their yellow, which is pale on white."""
_MARKERS = "os^Dv<>p"
_LINES = ("-", "--", ":", "-.")
_THIN = 0.6
"""Of the lines at the fixed sampler where others are tuned."""
_ROW = 120
"""Characters in one row of the legend under three panels; its marker and its margin count as 8."""
_MARGIN = 0.05
"""Beyond the values, as a share of what they span."""


@dataclass(frozen=True)
class Look:
    """How one label is drawn, the same in all panels."""

    color: str
    marker: str
    line: str
    shade: float
    """Opacity of the seeds' lines: many of them lie over each other."""
    size: float = 1.0
    """Width of the line and size of the markers, as shares of the usual ones."""


def looks(labels: Mapping[str, tuple[str, str]]) -> dict[str, Look]:
    """A look for each label: its base decides on colour and marker, how it was sampled on the line's dashes.

    Args:
        labels: label -> its base, and what sets it apart from other labels of this base.
    """
    bases = list(dict.fromkeys(base for base, _ in labels.values()))
    differences = sorted(dict.fromkeys(difference for _, difference in labels.values()), key=lambda each: each != TUNED)
    hues = [each for each in differences if each != TUNED] if len(bases) == 1 else bases
    made = {}
    for label, (base, difference) in labels.items():
        hue = hues.index((difference if difference != TUNED else "") if len(bases) == 1 else base)
        marker, dashes = _MARKERS[hue % len(_MARKERS)], _LINES[differences.index(difference) % len(_LINES)]
        size = _THIN if TUNED in differences and not difference else 1.0
        made[label] = Look(_COLORS[hue % len(_COLORS)], marker, dashes, max(0.2, min(0.45, 3 / len(labels))), size)
    return made


def line(
    panel: Axes, label: str, look: Look, x: Sequence[float], estimates: Sequence[Estimate], same_seeds: bool = True
) -> None:
    """The means with markers, and a thin line for each seed; dots for a single point, or points of other seeds."""
    panel.plot(
        x,
        [estimated.mean for estimated in estimates],
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        linewidth=look.size * STYLE["lines.linewidth"],
        markersize=look.size * STYLE["lines.markersize"],
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.8 * look.size,
        zorder=3,
    )
    counts = {len(estimated.values) for estimated in estimates}
    if len(x) > 1 and len(counts) == 1 and same_seeds and counts != {1}:
        for values in zip(*(estimated.values for estimated in estimates), strict=True):
            panel.plot(
                x, values, color=look.color, linestyle=look.line, linewidth=0.5, marker=".", markersize=2.5, alpha=look.shade
            )
        return
    for place, estimated in zip(x, estimates, strict=True):
        if len(estimated.values) > 1:
            panel.plot([place] * len(estimated.values), estimated.values, ".", color=look.color, markersize=4, alpha=look.shade)


def highlight(panel: Axes, label: str, points: Sequence[tuple[float, float]]) -> None:
    """A broad light line through points, below all others."""
    x, y = zip(*points, strict=True) if points else ((), ())
    round_ends: dict[str, Any] = {"solid_capstyle": "round", "solid_joinstyle": "round"}
    dot: dict[str, Any] = {"marker": "o", "markersize": 9, "markeredgewidth": 0} if len(points) == 1 else {}
    panel.plot(x, y, color="0.72", linewidth=9, zorder=0.5, label=label, **round_ends, **dot)


def fit(panel: Axes, estimates: Iterable[Estimate], log: bool) -> None:
    """Scale, ticks and limits by the values.

    Args:
        panel: still empty.
        estimates: what will be drawn in it, at least one.
        log: whether a logarithmic scale is wanted; values of zero or less have a linear one.
    """
    found = [value for estimated in estimates for value in (estimated.mean, *estimated.values)]
    log = log and min(found) > 0
    if log:
        panel.set_yscale("log")
        log_ticks(panel.yaxis, found)
    forth, back = (math.log, math.exp) if log else (float, float)
    least, most = forth(min(found)), forth(max(found))
    margin = _MARGIN * ((most - least) or abs(most) * 0.2 or 1.0)
    panel.set_ylim(back(least - margin), back(most + margin))


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """At least three ticks: at 1, 2, 5 times the powers of ten, fewer over many decades, more within one; no minor ones."""
    ratio = max(values) / min(values)
    subs = (1.0,) if ratio >= 1000 else (1.0, 2.0, 5.0) if ratio >= 20 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs) if ratio > 5 else MaxNLocator(5))
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
        found = {name: handle for panel in axes for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        named = {name: handle for name, handle in found.items() if name in labels}
        columns = math.ceil(len(named) / rows)
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.6
        )
        return {kind: save(figure, kind) for kind in ("png", "svg")}


def save(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The contents of a file, the same for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=DPI, facecolor="white", metadata={"Software" if kind == "png" else "Date": None})
    return file.getvalue()


def draw(report: Report, against: Sequence[str] = AGAINST) -> dict[str, bytes]:
    """The report's metric against costs: kind of file (`png`, `svg`) -> its contents.

    Args:
        report: what to draw.
        against: a panel for each, `nfe` or a name in `COSTS`.
    """
    return _curves(report, {group.label: group.base for group in report.groups}, dict.fromkeys(against, report))


def draw_training(report: Report) -> dict[str, bytes]:
    """The report's metric against FLOPs, a panel for each training budget: kind of file -> its contents."""
    bases = {row.label: without_training(row).removesuffix(f" · {row.group.difference}") for row in report.rows}
    parts = {f"{steps:,} training steps": replace(report, rows=tuple(rows)) for steps, rows in by_training(report.rows).items()}
    return _curves(report, bases, parts, "flops")


def _curves(report: Report, bases: Mapping[str, str], parts: Mapping[str, Report], cost: str | None = None) -> dict[str, bytes]:
    """A panel for each part of a report, over the cost, or over the cost that names the part.

    Args:
        bases: label -> the name that it has in the legend.
    """
    differences = {group.label: group.difference for group in report.groups}
    chosen = looks({label: (base, differences[label]) for label, base in bases.items()})
    # A design that was tuned is named once: its dashed line has a name that legends leave out.
    tuned = {bases[group.label] for group in report.groups if group.is_tuned}
    names = {}
    for label, base in bases.items():
        hidden = "_" if base in tuned and not differences[label] else ""
        names[label] = hidden + (f"{base} · {differences[label]}" if differences[label] not in ("", TUNED) else base)
    repeated = dict.fromkeys(row.quality[report.metric].over for row in report.rows)
    kinds = dict.fromkeys("checkpoint" if over == "checkpoints" else "seed" for over in repeated if over)
    several = f"a {' or '.join(kinds)}" if kinds else ""
    fixed = next(in_words(group.sampling) for group in report.groups if not group.difference)
    key = {"tuned": Look("0.4", "", "-", 0), f"fixed: {fixed}": Look("0.4", "", "--", 0, _THIN)} if tuned else {}

    def fill(panels: Sequence[Axes]) -> None:
        for panel, (title, part) in zip(panels, parts.items(), strict=True):
            fit(panel, [row.quality[report.metric] for row in report.rows], log=True)
            _against(panel, part, cost or title, chosen, names)
            panel.set_title(title if cost else "", fontsize=9.5)
        for name, look in key.items():
            line(panels[0], name, look, [], [])
        if several:
            panels[0].plot([], [], ".-", color="0.4", linewidth=0.5, markersize=4, label=several)
        panels[0].set_ylabel(f"{METRICS[metric_key(report.metric) or ''].title}\n{report.metric} ({report.better} is better)")

    shown = list(dict.fromkeys(name for name in names.values() if not name.startswith("_")))
    labels = [*shown, *(["Pareto front"] if len(chosen) > 1 else []), *key, *([several] if several else [])]
    title = report.title + (f" ({report.short_names})" if report.short_names else "")
    return pictures(len(parts), labels, title, fill, sharey=True)


def draw_contrasts(report: Report) -> dict[str, bytes]:
    """Each design's difference from the reference, a panel for each budget and sampling: kind of file -> its contents."""
    verdict, contrasts = report.verdict, report.verdict.contrasts
    chosen = looks({name: (name, "") for name in verdict.designs})
    panels = list(dict.fromkeys((contrast.sampling, contrast.column) for contrast in contrasts))
    rows = [
        of_sampling[start : start + _PER_ROW]
        for sampling in dict.fromkeys(sampling for sampling, _ in panels)
        for of_sampling in [[panel for panel in panels if panel[0] == sampling]]
        for start in range(0, len(of_sampling), _PER_ROW)
    ]
    columns, designs = max(map(len, rows)), list(dict.fromkeys(contrast.design for contrast in contrasts))
    some = f" (the first {_MOST} of {len(designs)} designs)" if len(designs) > _MOST else ""
    designs = designs[:_MOST]
    with rc_context({**STYLE, "axes.grid": False}):
        width = max(5.0, 0.6 + 0.08 * max(map(len, designs)) + 2.2 * columns)
        figure = Figure(figsize=(width, 1.0 + len(rows) * (0.75 + 0.27 * len(designs))), layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line_of_axes, line_of_panels in zip(axes, rows, strict=True):
            for index, axis in enumerate(line_of_axes):
                if index >= len(line_of_panels):
                    axis.set_axis_off()
                    continue
                sampling, column = line_of_panels[index]
                found = [
                    each
                    for each in contrasts
                    if (each.sampling, each.column, each.design in designs) == (sampling, column, True)
                ]
                _forest(axis, found, designs, chosen)
                axis.set_title(f"{column}, {sampling}", fontsize=9.5)
                axis.set_yticks(range(len(designs)), designs if index == 0 else [""] * len(designs))
        title = f"{report.title}: {report.metric} minus that of {verdict.reference}{verdict.trained}{some}"
        side = "right" if report.better == "higher" else "left"
        text = (
            f"{side} of the line: better than {verdict.reference}; bars: 95 % interval of the difference over training seeds; "
            "filled: p < 0.05 after Holm's correction"
        )
        figure.suptitle(textwrap.fill(title, int(12 * width)), fontsize=11, color="0.1")
        figure.supxlabel(textwrap.fill(text, int(14 * width)), fontsize=8.5, color="0.3")
        return {kind: save(figure, kind) for kind in ("png", "svg")}


def _forest(axis: Axes, contrasts: Sequence[Contrast], designs: Sequence[str], chosen: Mapping[str, Look]) -> None:
    axis.axvline(0, color="0.6", linewidth=1)
    for contrast in contrasts:
        look, found = chosen[contrast.design], contrast.difference
        fill = look.color if contrast.is_clear else "white"
        place = [found.mean], [designs.index(contrast.design)]
        axis.errorbar(*place, xerr=found.half_width, fmt=look.marker, color=look.color, markerfacecolor=fill, elinewidth=1.4)
    axis.set_ylim(len(designs) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _against(panel: Axes, report: Report, cost: str, chosen: dict[str, Look], names: Mapping[str, str]) -> None:
    """One line for each label at the costs of its rows, and the Pareto front of all of them below; the panel is fitted."""
    costs = _costs(report, cost)
    estimates = [row.quality[report.metric] for row in report.rows]
    for label, look in chosen.items():
        measured = zip(report.rows, costs, estimates, strict=True)
        points = [(spent, estimated) for row, spent, estimated in measured if row.label == label and spent is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        same_seeds = len({row.seeds for row in report.rows if row.label == label}) == 1
        if points or not names[label].startswith("_"):
            line(panel, names[label], look, x, y, same_seeds)
    if len(chosen) > 1:
        front = report.front(cost)
        cheapest_first = sorted(
            (spent, estimated.mean)
            for row, spent, estimated in zip(report.rows, costs, estimates, strict=True)
            if spent is not None and row in front
        )
        highlight(panel, "Pareto front", cheapest_first)
    known = [spent for spent in costs if spent is not None]
    panel.set_xlabel(report.axis(cost))
    if cost == NFE:
        _budget_ticks(panel, report.budgets)
    elif known:
        panel.set_xscale("log")
        log_ticks(panel.xaxis, known)
    else:
        panel.set_xticks([])
    if len(known) < len(costs):
        remark(panel, "not measured for all" if known else "not measured")


def _costs(report: Report, cost: str) -> list[float | None]:
    """What each row cost, in the unit of the report."""
    if cost == NFE:
        return [row.nfe for row in report.rows]
    factor, spent = report.unit(cost).factor, [row.costs[cost] for row in report.rows]
    return [None if value is None else value * factor for value in spent]


def _budget_ticks(panel: Axes, budgets: Sequence[int]) -> None:
    """The budgets themselves as ticks, thinned where there are many."""
    panel.set_xscale("log", base=2)
    shown = budgets[:: math.ceil(len(budgets) / 8)]
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_minor_locator(NullLocator())


def view(report: Report, against: Sequence[str]) -> dict[str, Any]:
    """How the report's page draws its curves: as the figures, with lines in SVG's terms."""
    chosen = looks({group.label: (group.base, group.difference) for group in report.groups})
    drawn = {
        group.label: {
            "design": group.base,
            "sampling": group.difference or f"{FIXED}: {in_words(group.sampling)}",
            "color": look.color.replace("#000000", "currentColor"),
            "marker": look.marker,
            "dashes": {"-": "", "--": "6 3", ":": "1.5 3", "-.": "7 3 1.5 3"}[look.line],
        }
        for group, look in zip(report.groups, chosen.values(), strict=True)
    }
    axes = [{"key": NFE, "title": report.axis(NFE), "unit": "NFE", "factor": 1.0, "shown": NFE in against}]
    for name, cost in COSTS.items():
        if any(row.costs[name] is not None for row in report.rows):
            unit = report.unit(name)
            of_cost = {"key": cost.column, "title": report.axis(name), "shown": name in against}
            axes.append({**of_cost, "unit": unit.title, "factor": unit.factor})
    better = {None: None, True: "higher", False: "lower"}
    metrics = {name: better[higher_is_better(name)] for name in report.metrics}
    titles = dict.fromkeys(f"{key}: {METRICS[key].title}" for key in map(metric_key, metrics) if key in ("fd", "kid"))
    return {"looks": drawn, "costs": axes, "metrics": metrics, "key": ", ".join(filter(None, [report.short_names, *titles]))}


def remark(panel: Axes, text: str) -> None:
    """Grey words in the middle of a panel."""
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color="0.5")


def contact_sheet(title: str, sheets: Sequence[tuple[str, Sequence[str], np.ndarray]]) -> bytes:
    """Sheets below each other, each with a title, and a label for every row of images."""
    width = 3 * PANEL[0]
    heights = [0.4 + 0.85 * width * tiles_YX3.shape[0] / tiles_YX3.shape[1] for _, _, tiles_YX3 in sheets]
    with rc_context(STYLE):
        longest = max(len(label) for _, labels, _ in sheets for label in labels)
        figure = Figure(figsize=(width + 0.07 * max(0, longest - 10), 0.4 + sum(heights)), layout="compressed")
        panels = figure.subplots(len(sheets), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, labels, tiles_YX3) in zip(panels, sheets, strict=True):
            panel.imshow(tiles_YX3)
            row = tiles_YX3.shape[0] / len(labels)
            panel.set_yticks([row * (index + 0.5) for index in range(len(labels))], labels)
            panel.set(xticks=[], title=name, frame_on=False)
            panel.tick_params(length=0)
            panel.grid(False)
        figure.suptitle(title, fontsize=11, color="0.1")
        return save(figure, "png")
