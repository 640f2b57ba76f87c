"""A report as Markdown and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from madformer.evaluation.measurement import CURVE_FIELDS, Sampling, higher_is_better
from madformer.report.diagnostics_report import Diagnostics, gather_diagnostics
from madformer.report.formatting import COSTS, NFE, NOTHING, Unit, arrow, csv_text, distinct, in_words, show, table, with_spread
from madformer.report.notes import notes
from madformer.report.paper import Comparison, compare
from madformer.report.points import Column, Curve, Group, Row, columns_of, gather, make_rows
from madformer.report.statistics import pareto_front

_ALWAYS = ("flops", "seconds")
"""Costs that always have a column in Markdown, measured or not."""

_FRONTS = {NFE: "NFE", "flops": "FLOPs", "seconds": "seconds"}
"""Costs that have a Pareto front in tables, and their names there; what a clock measures is the last."""


@dataclass(frozen=True)
class Report:
    """Curves of one metric, their rows sorted by label and NFE, and what else is known of the runs."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """How it was measured, a sentence each."""
    diagnostics: Diagnostics | None = None
    """The models' diagnostics; None: none were computed."""
    comparison: Comparison | None = None
    """The comparison with the paper; None: no two runs have the designs of its models."""

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

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        """The report as Markdown: quality by budget, the paper's numbers, costs, other metrics, tuned samplings, diagnostics.

        Args:
            pictures: names of files that are shown below the first table.
        """
        parts = [f"## {self.title}", "\n".join(f"- {note}" for note in self.notes), self._quality()]
        parts += [f"![{self.title}]({name})" for name in pictures]
        if self.comparison is not None:
            parts += [self.comparison.markdown(), "### What it cost"]
        parts.append(self._costs())
        if len(self.metrics) > 1:
            parts += ["### Other metrics", self._others()]
        if any(row.choices for row in self.rows):
            interval = "± is the 95 % interval of the difference, paired by run and evaluation seed."
            parts += ["### Sampling chosen", f"Chosen by `madformer tune`. {interval}", self._chosen()]
        if self.diagnostics is not None:
            parts.append(self.diagnostics.markdown())
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """One line a row, in full precision, with the unit in each column's name; what was measured by a clock comes last."""
        axes = list(dict.fromkeys(name for row in self.rows for name in row.group.axes))
        heading = ["label", *axes, *CURVE_FIELDS, "nfe", "steps", "seeds", "interval_over", "n"]
        fronts = {f"pareto_{cost}": self.front(cost) for cost in _FRONTS}
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

    def _quality(self) -> str:
        lines = [[arrow(self.metric), *map(str, self.columns)]]
        best = {column: min(self._loss(row) for row in self.rows if column.holds(row)) for column in self.columns}
        for group in self.groups:
            group_rows = [row for row in self.rows if row.label == group.label]
            line = [group.label]
            for column in self.columns:
                row = next((row for row in group_rows if column.holds(row)), None)
                text = NOTHING if row is None else show(row.quality[self.metric])
                line.append(f"**{text}**" if row and self._loss(row) == best[column] and len(self.groups) > 1 else text)
            lines.append(line)
        return table(lines)

    def _costs(self) -> str:
        known = [name for name in COSTS if name in _ALWAYS or any(row.costs[name] is not None for row in self.rows)]
        units = {name: self.unit(name) for name in known}
        fronts = {cost: self.front(cost) for cost in _FRONTS} if len(self.groups) > 1 else {}
        lines = [["", "NFE", "steps", "seeds", self.metric, *(unit.title.replace(" per ", " / ") for unit in units.values())]]
        lines[0] += ["Pareto front of"] if fronts else []
        for row in self.rows:
            counts = [str(row.nfe), str(row.steps), str(len(row.seeds))]
            costs = [unit.show(row.costs[name]) for name, unit in units.items()]
            lines.append([row.label, *counts, show(row.quality[self.metric]), *costs])
            lines[-1] += [", ".join(_FRONTS[cost] for cost, front in fronts.items() if row in front)] if fronts else []
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


def build_report(curves: Sequence[Curve], title: str, metric: str | None = None) -> Report:
    """Gather the newest evaluations and diagnostics of runs.

    Args:
        curves: the runs; those of one label are seeds of one configuration.
        title: heads the report.
        metric: name of the metric; None: the first one that all runs have.

    Raises:
        InputError: no runs, a run that was not evaluated or not with this metric, or a broken record.
    """
    metric, groups = gather(curves, metric)
    rows = [row for group in groups for row in make_rows(group)]
    said, diagnostics = tuple(notes(groups, rows, metric)), gather_diagnostics(curves)
    return Report(title, metric, tuple(rows), said, diagnostics, compare(groups, rows, metric))


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
