"""A report as Markdown and as CSV, with the notes on how its numbers were made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madformer.errors import InputError
from madformer.evaluation.measurement import (
    CURVE_FIELDS,
    DEFAULTS,
    HELD_OUT,
    MEMORISATION,
    Measurement,
    Point,
    Sampling,
    higher_is_better,
    metric_key,
)
from madformer.report.contrasts import AXES, Verdict, judge
from madformer.report.diagnostics_report import Diagnostics, gather_diagnostics
from madformer.report.formatting import (
    COSTS,
    NFE,
    NOTHING,
    Unit,
    arrow,
    counted,
    csv_text,
    distinct,
    in_words,
    incomparable,
    inert,
    show,
    table,
    trained_for,
    with_spread,
)
from madformer.report.paper import Comparison, compare
from madformer.report.points import Column, Curve, Group, Row, columns_of, gather, make_rows
from madformer.report.statistics import FEWEST_SEEDS, Over, pareto_front, winners
from madformer.sweep.adaptive import Assessment
from madformer.sweep.spec import ALIASES, label

_NO_BRACKETS = str.maketrans("", "", "[]")

_ALWAYS = ("flops", "seconds")
"""Costs that always have a column in Markdown, measured or not."""


@dataclass(frozen=True)
class Report:
    """Curves of one metric, their rows sorted by label and NFE, and what else is known of the runs."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """How it was measured, a sentence each."""
    verdict: Verdict
    """How the designs differ, and which is the best for each budget."""
    diagnostics: Diagnostics | None = None
    """The models' diagnostics; None: none were computed."""
    comparison: Comparison | None = None
    """The comparison with the paper; None: no two runs have the designs of its models."""
    decided: Assessment | None = None
    """What a sweep that decides has decided."""
    sweep: Path | None = None
    """The sweep's file; None: runs side by side."""
    command: str = ""
    """Of the command line that asked for it."""

    @property
    def groups(self) -> list[Group]:
        """What has a label of its own, in the order of tables and legends."""
        return list({row.label: row.group for row in self.rows}.values())

    @property
    def budgets(self) -> list[int]:
        """All NFE budgets, rising."""
        return sorted({row.nfe for row in self.rows})

    @property
    def columns(self) -> list[Column]:
        """What the table of quality has columns for."""
        return columns_of(self.rows)

    def front(self, cost: str) -> list[Row]:
        """The Pareto front of quality against a cost, `nfe` or a name in `COSTS`, the cheapest first."""
        return pareto_front(self.rows, lambda row: row.nfe if cost == NFE else row.costs[cost], self._loss)

    def _loss(self, row: Row) -> float:
        mean = row.quality[self.metric].mean
        return -mean if self.better == "higher" else mean

    @property
    def metrics(self) -> list[str]:
        """All metrics, that of the report first."""
        return list(dict.fromkeys([self.metric, *(name for row in self.rows for name in row.quality)]))

    @property
    def better(self) -> str:
        """Which values are better, `lower` or `higher`."""
        return "higher" if higher_is_better(self.metric) else "lower"

    def unit(self, cost: str) -> Unit:
        """In which a cost is shown, by its name in `COSTS`."""
        return COSTS[cost].unit(row.costs[cost] for row in self.rows)

    def axis(self, cost: str) -> str:
        """The name of an axis of costs, with the unit."""
        return "layer evaluations per block (NFE)" if cost == NFE else f"sampling {COSTS[cost].name}, {self.unit(cost).title}"

    @property
    def caution(self) -> str:
        """What is to be said where designs were not trained for as many steps; empty: they were."""
        steps = {group.base: distinct(point["step"] for point in group.points) for group in self.groups}
        if len(set(steps.values())) == 1:
            return ""
        named = ", ".join(f"{name}: {count}" for name, count in steps.items())
        counts = distinct(point["step"] for group in self.groups for point in group.points)
        across = "comparisons are of the longest training" if self.verdict.trainings else "all comparisons are across these"
        return (
            f"**Not all designs were trained for as many steps** ({named if len(steps) <= 4 else counts}): "
            f"{across}; the first table and the Pareto fronts show all."
        )

    @property
    def short_names(self) -> str:
        """What short names of axes in labels stand for, such as `d: model.diffusion_depth`; empty: there are none."""
        labelled = {(key, label(key, value)) for group in self.groups for key, value in group.axes.items() if key in ALIASES}
        used = {key for key, text in labelled if any(text in re.split("[- ]", group.base) for group in self.groups)}
        return ", ".join(f"{name}: {key}" for key, name in ALIASES.items() if key in used)

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        """The report as Markdown: quality by budget, the paper's numbers, costs, other metrics, tuned samplings, diagnostics.

        Args:
            pictures: names of files that are shown below the first table.
        """
        shown = [f"![{self.title.translate(_NO_BRACKETS)}]({name})" for name in pictures]
        parts = [
            f"## {self.title}",
            *self.answer(),
            *filter(None, [self.caution]),
            self.measured(),
            self.quality(),
            *shown,
            *self.details(),
        ]
        return "\n\n".join(part if part in shown else inert(part) for part in parts) + "\n"

    def answer(self) -> list[str]:
        """What was found, as Markdown."""
        decided = [] if self.decided is None else [_DECIDED, "\n".join(f"- {line}" for line in self.decided.lines)]
        return [*decided, *filter(None, [self.verdict.answer])]

    def measured(self) -> str:
        """How the numbers were made, as a list of Markdown."""
        return "\n".join(f"- {note}" for note in self.notes)

    def details(self) -> list[str]:
        """All that follows the first table, as Markdown."""
        parts = self.verdict.markdown()
        if self.comparison is not None:
            parts.append(self.comparison.markdown())
        parts += ["### What it cost", self._costs()]
        if len(self.metrics) > 1:
            parts += ["### Other metrics", self._others()]
        if any(row.choices for row in self.rows):
            interval = "± is the 95 % interval of the difference, paired by run and evaluation seed."
            parts += ["### Sampling chosen", f"Chosen by `madformer tune`. {interval}", self._chosen()]
        if self.diagnostics is not None:
            parts.append(self.diagnostics.markdown())
        return parts

    def csv(self) -> str:
        """One line a row, in full precision, with the unit in each column's name; what was measured by a clock comes last."""
        axes = list(dict.fromkeys(name for row in self.rows for name in row.group.axes))
        heading = ["label", *axes, *CURVE_FIELDS, "nfe", "steps", "seeds", "interval_over", "n"]
        fronts = {f"pareto_{cost}": self.front(cost) for cost in AXES}
        for metric in self.metrics:
            heading += [metric, *(f"{metric}_{column}" for column in _COLUMNS)]
        *counted, measured = fronts
        lines: list[list[Any]] = [[*heading, *counted, *(cost.column for cost in COSTS.values()), measured]]
        for row in self.rows:
            chosen = row.quality[self.metric]
            values = [
                *(row.group.axes.get(name) for name in axes),
                *map(distinct, zip(*(sampling.curve_fields.values() for sampling in row.samplings), strict=True)),
                row.nfe,
                row.steps,
                len(row.seeds),
            ]
            values += [chosen.over, len(chosen.values)]
            for metric in self.metrics:
                values += _numbers(row, metric)
            *on_counted, on_measured = (int(row in front) for front in fronts.values())
            lines.append([row.label, *values, *on_counted, *(row.costs[name] for name in COSTS), on_measured])
        return csv_text(lines)

    def quality(self) -> str:
        """The metric of each label by budget, as a table of Markdown."""
        lines = [[arrow(self.metric), *map(str, self.columns)]]
        clear = self._clear()
        for group in self.groups:
            group_rows = [row for row in self.rows if row.label == group.label]
            line = [group.label]
            for column in self.columns:
                row = next((row for row in group_rows if column.holds(row)), None)
                text = NOTHING if row is None else show(row.quality[self.metric])
                line.append(f"**{text}**" if group.label == clear.get(column) else text)
            lines.append(line)
        return table(lines)

    def _clear(self) -> dict[Column, str]:
        """Of each column the label from which every other one differs, if there is one."""
        sign = -1 if self.better == "higher" else 1
        panels = [{row.label: row.by_seed(self.metric) for row in self.rows if column.holds(row)} for column in self.columns]
        clear = {}
        for tuned in (False, True):  # decided among its own sampling as below, and against all of the column
            labels = {group.label for group in self.groups if group.is_tuned == tuned}
            own = [{label: values for label, values in panel.items() if label in labels} for panel in panels]
            for column, panel, best in zip(self.columns, panels, winners(own, sign), strict=True):
                [overall] = winners([panel], sign)
                if len(panel) > 1 and best and overall and best.name == overall.name and best.is_decided and overall.is_decided:
                    clear[column] = best.name
        return clear

    def _costs(self) -> str:
        known = [name for name in COSTS if name in _ALWAYS or any(row.costs[name] is not None for row in self.rows)]
        units = {name: self.unit(name) for name in known}
        fronts = {cost: self.front(cost) for cost in AXES} if len(self.groups) > 1 else {}
        lines = [["", "NFE", "steps", "seeds", self.metric, *(unit.title.replace(" per ", " / ") for unit in units.values())]]
        lines[0] += ["Pareto front of"] if fronts else []
        for row in self.rows:
            counts = [str(row.nfe), str(row.steps), str(len(row.seeds))]
            costs = [unit.show(row.costs[name]) for name, unit in units.items()]
            lines.append([row.label, *counts, show(row.quality[self.metric]), *costs])
            lines[-1] += [", ".join(AXES[cost] for cost, front in fronts.items() if row in front)] if fronts else []
        return table(lines)

    def _others(self) -> str:
        others = self.metrics[1:]
        lines = [["", "NFE", *map(arrow, others)]]
        lines += [[row.label, str(row.nfe), *(show(row.quality.get(name)) for name in others)] for row in self.rows]
        return table(lines)

    def _chosen(self) -> str:
        """What `madformer tune` chose for each design and budget."""
        choices = [(row, line) for row in self.rows for line in row.choices]
        metric = distinct(line["metric"] for _, line in choices)
        lines = [["", "NFE", "sampling", "tries", f"{metric} against the default"]]
        for row, line in choices:
            words = in_words(Sampling(row.nfe, row.steps, **line["sampling"]))
            change = with_spread(line["difference"], line["half_width"])
            if line["sampling"] == line["default"]:
                words, change = f"{words} (the default)", NOTHING
            lines.append([row.group.base, str(row.nfe), words, str(line["tries"]), change])
        return table(lines)


def build_report(
    curves: Sequence[Curve],
    title: str,
    metric: str | None = None,
    reference: str | None = None,
    decided: Assessment | None = None,
) -> Report:
    """Gather the newest evaluations and diagnostics of runs.

    Args:
        curves: the runs; those of one label are seeds of one configuration.
        title: heads the report.
        metric: name of the metric; None: the first one that all runs have.
        reference: label of the design that others are compared with; None: the first.
        decided: of a sweep that decides, what it has decided; its first contrast names the reference if nothing else does.

    Raises:
        InputError: no runs, a run that was not evaluated or not with this metric, a metric without a best value, a broken
            record, or no such reference.
    """
    if metric is not None and higher_is_better(metric) is None:
        raise InputError(f"--metric {metric}: neither a high nor a low value is the best; see it among the other metrics")
    metric, groups = gather(curves, metric)
    rows = [row for group in groups for row in make_rows(group)]
    if decided is not None and reference is None:
        label = next(iter(decided.decisions)).reference.label
        reference = label if label in {group.design for group in groups} else None
    said, diagnostics = tuple(_notes(groups, rows, metric)), gather_diagnostics(curves)
    verdict, paper = judge(rows, metric, reference), compare(groups, rows, metric)
    return Report(title, metric, tuple(rows), said, verdict, diagnostics, paper, decided)


_COLUMNS = ("ci_low", "ci_high", "min", "max", "sd_over_checkpoints", "bias")
"""What follows a metric's name in CSV."""


def _numbers(row: Row, metric: str) -> list[float | None]:
    """A metric's mean and what `_COLUMNS` names; of one that some run lacks nothing."""
    if metric not in row.quality:
        return [None] * (1 + len(_COLUMNS))
    estimated = row.quality[metric]
    low, high = estimated.interval or (None, None)
    extremes = [min(estimated.values), max(estimated.values)]
    return [estimated.mean, low, high, *extremes, estimated.checkpoint_deviation, row.bias.get(metric)]


_DECIDED = (
    "**Decided by the sweep**, which added seeds until it knew. These decisions hold however often one looks. "
    "The tests below do not take the looks into account."
)
_BOLD = (
    "Bold: every other value of the column differs (t-tests seed by seed, p < 0.05, corrected by Holm for the number of pairs: "
    "those of the column, and those of all columns at the same sampling)."
)
_SPREADS: dict[Over, str] = {
    "training seeds": "± is the 95 % confidence interval of the mean over training seeds (Student's t).",
    "evaluation seeds": "± … † is the 95 % confidence interval of the mean over evaluation seeds (Student's t): "
    "it is about sampling and says nothing about training again.",
    "checkpoints": "± … ‡ is the standard deviation over checkpoints of one run, no confidence interval.",
}
_PAIRS = "Of two seeds both values are shown, in the order of the seeds: too few for an interval."

_MEMORISATION = (
    "Memorisation: the probability that a sample is nearer to its nearest training image than a held-out image is to its own. "
    "0.5: as near as new images; above: copies; below: too far from the training images."
)

_NOTEWORTHY = 0.05
"""Share of a value from which its bias is mentioned."""


def _notes(groups: Sequence[Group], rows: Sequence[Row], metric: str) -> list[str]:
    """How a report's numbers were measured, a sentence or two each."""
    points = [point for group in groups for point in group.points]
    estimates = [estimated for row in rows for estimated in row.quality.values()]
    used = {estimated.over for estimated in estimates if not (estimated.is_pair and estimated.over == "training seeds")}
    return [
        f"Metric {metric}, {'higher' if higher_is_better(metric) else 'lower'} is better; {_repeated(groups)}.",
        *(text for over, text in _SPREADS.items() if over in used),
        *([_PAIRS] if any(estimated.is_pair for estimated in estimates) else []),
        *([_MEMORISATION] if MEMORISATION in {metric_key(name) for row in rows for name in row.quality} else []),
        *([_BOLD] if len(groups) > 1 and any(len(row.seeds) >= FEWEST_SEEDS for row in rows) else []),
        _sampled(groups, points),
        _measured(points),
        *incomparable([Measurement.of_point(point).conditions for point in points], "points"),
        *_biases(rows),
    ]


def _repeated(groups: Sequence[Group]) -> str:
    """How many seeds and checkpoints are behind the numbers."""
    runs = [curve for group in groups for curve in group.curves]
    texts = [counted((len(group.curves) for group in groups), "training seed")]
    for key, noun in (("seed", "evaluation seed"), ("checkpoint", "checkpoint")):
        counts = {len({point[key] for point in points}) for curve in runs for points in curve.points.values()}
        if counts != {1}:
            texts.append(counted(counts, noun))
    return f"{', '.join(texts)} each"


def _sampled(groups: Sequence[Group], points: Sequence[Point]) -> str:
    main = next(group.sampling for group in groups if not group.difference)
    otherwise = " unless a label says otherwise" if any(group.difference for group in groups) else ""
    otherwise += " (tuned: see *Sampling chosen*)" if any(group.is_tuned for group in groups) else ""
    texts = {**main.texts, "sampler": f"{main.sampler} sampler"}
    for name in ("spacing", "guidance_interval"):
        if main.curve_fields[name] == DEFAULTS[name]:
            del texts[name]
    texts.pop("diffusion_depth", None)  # which labels say
    samples = distinct(point["num_samples"] for point in points)
    return f"{samples} samples a point; {', '.join(texts.values())}{otherwise}; {trained_for(points)}."


def _measured(points: Sequence[Point]) -> str:
    """Where seconds come from."""
    timed = [point for point in points if point.get("seconds_per_image") is not None]
    if not timed:
        return "FLOPs are counted from the configuration; seconds were not measured."
    where = sorted({f"{point.get('device', 'unknown')}" + _shared(point) for point in timed})
    some = "" if len(timed) == len(points) else f" for {len(timed)} of {len(points)} points"
    apart = " and cannot be compared" if len(where) > 1 else ""
    return f"FLOPs are counted from the configuration; seconds were measured{some} on {', '.join(where)}{apart}."


def _shared(point: Point) -> str:
    """The threads of a processor, and processes where several shared the work."""
    texts = [] if point.get("threads") is None else [counted([point["threads"]], "thread")]
    if point.get("processes", 1) > 1:
        texts.append(f"{point['processes']} processes")
    return f" ({', '.join(texts)})" if texts else ""


def _biases(rows: Sequence[Row]) -> Iterator[str]:
    """Where a good part of a distance is there for the number of samples alone."""
    for metric in dict.fromkeys(name for row in rows for name in row.bias):
        having = [row for row in rows if metric in row.bias and row.quality[metric].mean > 0]
        shares = [row.bias[metric] / row.quality[metric].mean for row in having]
        high = [row for row, share in zip(having, shares, strict=True) if share > _NOTEWORTHY]
        if not high:
            continue
        worst = having[shares.index(max(shares))]
        biases = [row.bias[metric] for row in high]
        about = " – ".join(dict.fromkeys(f"{value:.2g}" for value in (min(biases), max(biases))))
        samples = distinct(point["num_samples"] for row in high for point in row.group.points)
        images = " and of the held-out images" if metric.endswith(HELD_OUT) else ""
        yield (
            f"Of {metric}, about {about} are the bias of {samples} samples{images}, which perfect ones would have too: "
            f"more than 5 % of {len(high)} of {len(having)} values, up to {100 * max(shares):.0f} % "
            f"({worst.label} at NFE {worst.nfe})."
        )
