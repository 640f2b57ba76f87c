"""The figures of a report: quality against cost, diagnostics, and samples."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from madformer.config import load_run
from madformer.data.image_files import to_tiles
from madformer.errors import InputError
from madformer.evaluation.request import SamplingRequest
from madformer.report.diagnostics_report import Diagnosis, Diagnostics
from madformer.report.formatting import AGAINST, NFE, in_words
from madformer.report.points import TUNED, Row, common_columns
from madformer.report.statistics import Estimate
from madformer.report.tables import Report
from madformer.runs.checkpoints import checkpoint_path

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
_THIN = 0.6
"""Of the lines at the fixed sampler where others are tuned."""
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
    colors = _colors(len(hues))
    made = {}
    for label, (base, difference) in labels.items():
        hue = hues.index((difference if difference != TUNED else "") if len(bases) == 1 else base)
        marker, dashes = _MARKERS[hue % len(_MARKERS)], _LINES[differences.index(difference) % len(_LINES)]
        size = _THIN if TUNED in differences and not difference else 1.0
        made[label] = Look(colors[hue], marker, dashes, min(0.18, 0.9 / len(labels)), size)
    return made


def line(panel: Axes, label: str, look: Look, x: Sequence[float], estimates: Sequence[Estimate]) -> None:
    """The means with markers, in a band as wide as their spread, no wider than the panel, which is to be fitted before."""
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
    """Ticks at 1, 2 and 5 times the powers of ten; fewer over many decades, even ones within one; no minor ones."""
    ratio = max(values) / min(values)
    subs = (1.0, 2.0, 5.0) if ratio < 1000 else (1.0,)
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


def draw(report: Report, against: Sequence[str] = AGAINST) -> dict[str, bytes]:
    """The report's metric against costs: kind of file (`png`, `svg`) -> its contents.

    Args:
        report: what to draw.
        against: a panel for each, `nfe` or a name in `COSTS`.
    """
    chosen = looks({group.label: (group.base, group.difference) for group in report.groups})
    tuned = [group.base for group in report.groups if group.is_tuned]
    # A design that was tuned is named once: its dashed line has a name that legends leave out.
    names = {group.label: group.base if group.is_tuned else group.label for group in report.groups}
    names |= {base: f"_{base}" for base in tuned}
    fixed = next(in_words(group.sampling) for group in report.groups if not group.difference)
    key = {"tuned": Look("0.4", "", "-", 0), f"fixed: {fixed}": Look("0.4", "", "--", 0, _THIN)} if tuned else {}

    def fill(panels: Sequence[Axes]) -> None:
        for panel, cost in zip(panels, against, strict=True):
            _against(panel, report, cost, chosen, names)
        for name, look in key.items():
            line(panels[0], name, look, [], [])
        panels[0].set_ylabel(f"{report.metric} ({report.better} is better)")

    shown = [name for name in names.values() if not name.startswith("_")]
    labels = [*shown, *(["Pareto front"] if len(chosen) > 1 else []), *key]
    return pictures(len(against), labels, report.title, fill, sharey=True)


def draw_diagnostics(diagnostics: Diagnostics, title: str) -> dict[str, bytes]:
    """Where models err, by timestep and by block: kind of file (`png`, `svg`) -> its contents."""
    diagnoses = diagnostics.diagnoses
    chosen = looks({diagnosis.label: (diagnosis.label, "") for diagnosis in diagnoses})
    denoised = [diagnosis for diagnosis in diagnoses if diagnosis.denoising_error]

    def fill(panels: Sequence[Axes]) -> None:
        by_timestep, gap, condition = panels[0], *panels[-2:]
        _series(by_timestep, diagnoses, chosen, lambda entry: entry.loss_by_timestep, lambda entry: entry.timesteps)
        _series(gap, diagnoses, chosen, lambda entry: entry.exposure_gap)
        _series(condition, diagnoses, chosen, lambda entry: entry.condition_explains)
        by_timestep.set(xlabel="timestep (noise level)", ylabel="denoising loss")
        gap.set(xlabel="block, in the order of generation", ylabel="exposure gap")
        condition.set(xlabel="block, in the order of generation", ylabel="variance that the condition explains")

        if denoised:
            _denoising(panels[1], denoised, chosen)

    return pictures(4 if denoised else 3, list(chosen), f"{title}: diagnostics", fill)


def _against(panel: Axes, report: Report, cost: str, chosen: dict[str, Look], names: Mapping[str, str]) -> None:
    """One line for each label at the costs of its rows, and the Pareto front of all of them below."""
    costs = _costs(report, cost)
    estimates = [row.quality[report.metric] for row in report.rows]
    fit(panel, estimates, log=True)
    for label, look in chosen.items():
        measured = zip(report.rows, costs, estimates, strict=True)
        points = [(spent, estimated) for row, spent, estimated in measured if row.label == label and spent is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        line(panel, names[label], look, x, y)
    if len(chosen) > 1:
        front = report.front(cost)
        cheapest_first = sorted(
            (spent, estimated.mean)
            for row, spent, estimated in zip(report.rows, costs, estimates, strict=True)
            if spent is not None and row in front
        )
        highlight(panel, "Pareto front", cheapest_first)
    known = [spent for spent in costs if spent is not None]
    if cost == NFE:
        panel.set_xlabel("layer evaluations per block (NFE)")
        _budget_ticks(panel, report.budgets)
    else:
        panel.set_xlabel(report.unit(cost).title)
        if known:
            panel.set_xscale("log")
            log_ticks(panel.xaxis, known)
        else:
            panel.set_xticks([])
    if len(known) < len(costs):
        _remark(panel, "not measured for all" if known else "not measured")


def _costs(report: Report, cost: str) -> list[float | None]:
    """What each row cost, in the unit of the report."""
    if cost == NFE:
        return [row.nfe for row in report.rows]
    factor, spent = report.unit(cost).factor, [row.costs[cost] for row in report.rows]
    return [None if value is None else value * factor for value in spent]


def _series(
    panel: Axes,
    diagnoses: Sequence[Diagnosis],
    chosen: dict[str, Look],
    values_of: Callable[[Diagnosis], Sequence[Estimate]],
    steps_of: Callable[[Diagnosis], Sequence[int]] | None = None,
) -> None:
    """One line for each label, by timestep or by block."""
    known = [value for diagnosis in diagnoses for value in values_of(diagnosis)]
    if not known:
        panel.set(xticks=[], yticks=[])
        _remark(panel, "no condition")
        return
    fit(panel, known, log=steps_of is not None)
    for diagnosis in diagnoses:
        values = values_of(diagnosis)
        steps = steps_of(diagnosis) if steps_of else range(len(values))
        line(panel, diagnosis.label, chosen[diagnosis.label], steps, values)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _denoising(panel: Axes, diagnoses: Sequence[Diagnosis], chosen: dict[str, Look]) -> None:
    """The denoising error of each label, and in grey those of the first label's trivial denoisers."""
    first = diagnoses[0]
    trivial = {"the noisy block": (":", first.noisy_error), "the mean image": ("--", first.mean_error)}
    fit(
        panel, [*(value for entry in diagnoses for value in entry.denoising_error), *first.noisy_error, *first.mean_error], True
    )
    for diagnosis in diagnoses:
        line(panel, diagnosis.label, chosen[diagnosis.label], diagnosis.denoising_timesteps, diagnosis.denoising_error)
    grey = [
        panel.plot(first.denoising_timesteps, [value.mean for value in values], color="0.5", linestyle=dashes, label=text)[0]
        for text, (dashes, values) in trivial.items()
    ]
    panel.legend(handles=grey, loc="lower right", fontsize="small", title="error of returning", title_fontsize="small")
    panel.set_xscale("symlog", linthresh=1)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.set(xlabel="timestep (noise level)", ylabel="denoising error")


def _budget_ticks(panel: Axes, budgets: Sequence[int]) -> None:
    """The budgets themselves as ticks, thinned where there are many."""
    panel.set_xscale("log", base=2)
    shown = budgets[:: math.ceil(len(budgets) / 8)]
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_minor_locator(NullLocator())


def _remark(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color="0.5")


def draw_samples(report: Report, count: int) -> dict[str, bytes]:
    """Images of each label's first run, at the least and the greatest budget of all: kind of file (`png`) -> its contents.

    Image i of every row grew from the same noise, drawn for the whole image, and has the same prompt. The files are kept in
    RUN/samples/compared and not made again.

    Raises:
        InputError: no budget that all labels have, images of several sizes, a run without the checkpoint that was evaluated,
            or files there that were made in another way.
    """
    columns = common_columns(report.rows)
    if not columns:
        raise InputError("--samples: there is no budget that all labels were evaluated at")
    sheets = []
    for column in dict.fromkeys([columns[0], columns[-1]]):
        rows = [row for row in report.rows if column.holds(row)]
        images = [_samples(row, count) for row in rows]
        if len(sizes := {" x ".join(map(str, each.shape[1:3])) for each in images}) > 1:
            raise InputError(f"--samples: images of {' and '.join(sorted(sizes))} pixels have no noise in common")
        tiles_YX3 = to_tiles(np.concatenate(images), columns=count)
        sheets.append((str(column), [row.label for row in rows], tiles_YX3))
    return {"png": _contact_sheet(f"{report.title}: samples from the same noise", sheets)}


def _contact_sheet(title: str, sheets: Sequence[tuple[str, Sequence[str], np.ndarray]]) -> bytes:
    """Sheets below each other, each with a title, and a label for every row of images."""
    width = 3 * PANEL[0]
    heights = [0.4 + 0.85 * width * tiles_YX3.shape[0] / tiles_YX3.shape[1] for _, _, tiles_YX3 in sheets]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 0.4 + sum(heights)), layout="constrained")
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


def _samples(row: Row, count: int) -> np.ndarray:
    """Images [B, Y, X, 3] of a row's first run, sampled as its points were, from the newest of their checkpoints."""
    from madformer.evaluation.write_samples import sample_path, write_samples

    first, sampling = row.group.seeds.index(row.seeds[0]), row.samplings[0]
    run, points = row.group.runs[first], row.group.curves[first].points[row.nfe]
    path = checkpoint_path(run, max(point["step"] for point in points))
    if not path.is_file():
        raise InputError(f"--samples: {path} was evaluated and is gone; evaluate one that is there: madformer evaluate {run}")
    folder = (
        run
        / "samples/compared"
        / "-".join(
            [path.stem, *(str(value) for value in sampling.curve_fields.values() if value is not None), f"{row.steps}steps"]
        )
    )
    write_samples(SamplingRequest(load_run(run), path, sampling, count), folder)
    return np.stack([_read(sample_path(folder, index)) for index in range(count)])


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
