"""Comparison of a report's designs: their differences, and the best design at each budget."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from statistics import fmean

import numpy as np

from madformer.config import load_run
from madformer.errors import InputError
from madformer.evaluation.measurement import higher_is_better
from madformer.progress import with_unit
from madformer.report.formatting import COSTS, NFE, NOTHING, chance, number, p_value, table, with_spread
from madformer.report.points import FIXED, TUNED, Column, Row, columns_of
from madformer.report.statistics import (
    FEWEST_SEEDS,
    SIGNIFICANCE,
    BySeed,
    Crossing,
    Difference,
    Winner,
    crossing,
    difference,
    winners,
)
from madformer.sweep.forecast import training_flops
from madformer.sweep.spec import label

AXES = {NFE: "NFE", "flops": "FLOPs", "seconds": "seconds"}
"""Costs at which designs are compared."""
TRAINING = "trainer.max_steps"
_TOO_FEW = f"fewer than {FEWEST_SEEDS} training seeds in common"


@dataclass(frozen=True)
class Contrast:
    """A design against the reference, at one budget."""

    design: str
    sampling: str
    """`fixed` or `tuned`, for both designs."""
    column: Column
    difference: Difference
    """The design's metric minus the reference's."""
    p: float | None
    """p-value, corrected for the number of all pairs of designs at all budgets (Holm); None: there are too few seeds."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference is significant."""
        return self.p is not None and self.p < SIGNIFICANCE


@dataclass(frozen=True)
class Choice:
    """The best design at one cost."""

    axis: str
    """`nfe`, or a name in `COSTS`."""
    sampling: str
    cost: float
    """The budget, or the cost in the unit of `COSTS`."""
    values: Mapping[str, BySeed]
    """Design -> values over training seeds, for each design that has a value at this cost."""
    winner: Winner

    @property
    def mean(self) -> float:
        """The mean of the best design."""
        return fmean(self.values[self.winner.name].values())


@dataclass(frozen=True)
class Neighbours:
    """The crossing of the curves of two designs that are neighbours in tables."""

    axis: str
    sampling: str
    designs: tuple[str, str]
    crossing: Crossing


@dataclass(frozen=True)
class Training:
    """The comparison of the designs that were trained for `steps` steps."""

    steps: int
    flops: tuple[float, float]
    """The least and the greatest training FLOPs of the designs."""
    choices: tuple[Choice, ...]
    """The best design for each sampling budget. Names of designs do not contain the training budget."""


@dataclass(frozen=True)
class Verdict:
    """All comparisons of a report's designs."""

    metric: str
    designs: tuple[str, ...]
    """With several training budgets, the designs of the greatest, named without it. All fields but `trainings` are on these."""
    reference: str
    contrasts: tuple[Contrast, ...]
    choices: tuple[Choice, ...]
    """The best designs by axis, sampling and cost."""
    neighbours: tuple[Neighbours, ...]
    trainings: tuple[Training, ...]
    """One comparison for each training budget; empty: there is only one budget."""
    units: Mapping[str, tuple[str, float]]
    """Axis -> the unit in which its costs are shown, and the factor that converts to it."""

    @property
    def answer(self) -> str:
        """A sentence for each sampling on the best design for each budget; empty: there are fewer than two designs."""
        sentences = []
        by_nfe = [choice for choice in self.choices if choice.axis == NFE]
        designs = dict.fromkeys(name for choice in by_nfe for name in choice.values)
        for sampling in (FIXED, TUNED):
            choices = [choice for choice in by_nfe if choice.sampling == sampling]
            if choices:
                found = f"{_sentence(choices)}{_gaps(choices, designs)}"
                sentences.append(f"**{'Fixed sampler' if sampling == FIXED else 'Tuned'}**: {found}.")
        if sentences and self.trainings:
            sentences[0] = f"Trained for {self.trainings[-1].steps:,} steps. {sentences[0]}"
        return " ".join(sentences)

    @property
    def trained(self) -> str:
        """The training steps of the compared designs in words; empty: there is only one training budget."""
        return f", after {self.trainings[-1].steps:,} training steps" if self.trainings else ""

    def markdown(self) -> list[str]:
        """Sections on the best design for each cost, with crossings, on each training budget, and on differences."""
        parts = []
        if self.choices:
            is_tested = any(choice.winner.probability is not None for choice in self.choices)
            parts += [f"### Which design for which budget{self.trained}", _CHOICES if is_tested else _UNTESTED, self._choices()]
            parts += [self._crossings()] if self.neighbours else []
        if self.trainings:
            parts += ["### Which design for which training budget", _TRAININGS, self._trainings()]
        if self.contrasts:
            is_tested = any(contrast.p is not None for contrast in self.contrasts)
            explained = _CONTRASTS.format(self.reference) if is_tested else f"The design minus {self.reference}. {_UNTESTED}"
            parts += [f"### Differences from {self.reference}{self.trained}", explained, self._contrasts()]
        return parts

    def _choices(self) -> str:
        better = "highest" if higher_is_better(self.metric) else "lowest"
        lines = [["sampling", "at", f"{better} {self.metric}", "mean", "P(best)", "level with it", "compared"]]
        most = max(len(choice.values) for choice in self.choices)
        for choice in self.choices:
            best = choice.winner
            likely = NOTHING if best.probability is None else chance(best.probability)
            level = NOTHING if best.probability is None else ", ".join(best.level) or "none"
            among = "all" if len(choice.values) == most else ", ".join(choice.values)
            texts = [_bold(best), number(choice.mean), likely, level, among]
            lines.append([choice.sampling, self._cost(choice.axis, choice.cost), *texts])
        return table(lines)

    def _cost(self, axis: str, cost: float) -> str:
        unit, factor = self.units[axis]
        return f"NFE {number(cost) if cost % 1 else int(cost)}" if axis == NFE else f"{number(cost * factor)} {unit}"

    def _crossings(self) -> str:
        lines = [["designs", "sampling", "against", "cross at", "95 % interval", "resamples that cross"]]
        for pair in self.neighbours:
            found, axis = pair.crossing, pair.axis
            at, ends = "none", NOTHING
            if found.cost is not None:
                at = self._cost(axis, found.cost) + (f" (the first of {found.count})" if found.count > 1 else "")
            if found.cost is not None and found.interval is not None:
                ends = " – ".join(number(end * self.units[axis][1]) for end in found.interval)
            share = NOTHING if found.share is None else f"{100 * found.share:.0f} %"
            lines.append([" and ".join(pair.designs), pair.sampling, AXES[axis], at, ends, share])
        return table(lines)

    def _trainings(self) -> str:
        budgets = list(dict.fromkeys(choice.cost for training in self.trainings for choice in training.choices))
        lines = [["training steps", "training FLOPs", "sampling", *(f"NFE {budget:g}" for budget in sorted(budgets))]]
        for training in self.trainings:
            flops = " – ".join(dict.fromkeys(with_unit(value) for value in training.flops))
            for sampling in dict.fromkeys(choice.sampling for choice in training.choices):
                at = {choice.cost: choice.winner for choice in training.choices if choice.sampling == sampling}
                cells = [_brief(at[budget]) if budget in at else NOTHING for budget in sorted(budgets)]
                lines.append([f"{training.steps:,}", flops, sampling, *cells])
        return table(lines)

    def _contrasts(self) -> str:
        lines = [["design", "sampling", "at", f"difference in {self.metric}", "in SD", "p (Holm)", "seeds"]]
        for contrast in self.contrasts:
            found = contrast.difference
            text = with_spread(found.mean, found.half_width)
            effect = NOTHING if found.effect is None else f"{found.effect:+.2f}"
            p = NOTHING if contrast.p is None else p_value(contrast.p)
            seeds = f"{found.seeds}{'' if found.is_paired or found.p is None else ' (not paired)'}"
            line = [contrast.design, contrast.sampling, str(contrast.column), f"**{text}**" if contrast.is_clear else text]
            lines.append([*line, effect, p, seeds])
        return table(lines)


_UNTESTED = f"With {_TOO_FEW} nothing is tested: another training may order designs otherwise."
_CHOICES = (
    "P(best): the share of 10,000 resamples of the seeds, drawn for all designs together, in which it is the best. Level: not "
    "told from it by t-tests, seed by seed, corrected for the number of all pairs at all costs of one axis and sampling (Holm, "
    "p < 0.05). Bold: none is level. At FLOPs and seconds each seed's curve is interpolated linearly in log cost and log "
    "metric, between its points only. Crossings are those of the means, their intervals those of the resamples that cross."
)
_TRAININGS = "The best mean at each sampling budget, its P(best), and what is level with it, as above; bold: none is level."
_CONTRASTS = (
    "The design minus {}, seed by seed, with the 95 % interval (Student's t), and in standard deviations of these differences; "
    "p of the t-test, corrected for the number of all pairs of designs at all budgets of one sampling (Holm). Bold: p < 0.05."
)


def judge(rows: Sequence[Row], metric: str, reference: str | None = None) -> Verdict:
    """Compare all designs with each other.

    Args:
        rows: rows of the report.
        metric: the metric to compare by.
        reference: the design that contrasts are against; None: the first one.

    Raises:
        InputError: no design has the reference's name.
    """
    trained = by_training(rows)
    longest = list(trained.values())[-1] if trained else rows
    name = without_training if trained else attrgetter("group.design")
    designs = tuple(dict.fromkeys(map(name, longest)))
    if reference is not None and reference not in designs:
        raise InputError(f"--reference {reference}: no design has this label; there are {', '.join(designs)}")
    reference = reference or designs[0]
    sides = [side for axis in AXES for side in _sides(longest, metric, axis, name)]
    return Verdict(
        metric,
        designs,
        reference,
        tuple(_contrasts(longest, metric, reference, name)),
        tuple(choice for side in sides for choice in side.choices()),
        tuple(pair for side in sides for pair in side.neighbours()),
        tuple(_training(steps, of_budget, metric) for steps, of_budget in trained.items()),
        {NFE: ("NFE", 1.0), **{axis: _unit(rows, axis) for axis in AXES if axis != NFE}},
    )


def by_training(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Training steps, rising -> the rows of runs with so many steps; empty: the sweep does not vary them."""
    steps = sorted({row.group.axes[TRAINING] for row in rows if TRAINING in row.group.axes})
    return {each: [row for row in rows if row.group.axes.get(TRAINING) == each] for each in steps} if len(steps) > 1 else {}


def without_training(row: Row) -> str:
    """The name of a row's design without its training steps."""
    text = re.escape(label(TRAINING, row.group.axes[TRAINING]))
    name = re.sub(rf"(^|-){text}(?=-|$| ·)", "", row.group.design).removeprefix("-")
    return name.removeprefix(" · ") or "all"


def _unit(rows: Sequence[Row], axis: str) -> tuple[str, float]:
    unit = COSTS[axis].unit(row.costs[axis] for row in rows)
    return unit.title.removesuffix(" per image"), unit.factor


def _contrasts(rows: Sequence[Row], metric: str, reference: str, name: Callable[[Row], str]) -> Iterator[Contrast]:
    columns = columns_of(rows)
    for sampling in (FIXED, TUNED):
        having = [row for row in rows if _sampling(row) == sampling]
        panels = [{name(row): row.by_seed(metric) for row in having if column.holds(row)} for column in columns]
        for column, panel, best in zip(columns, panels, winners(panels, 1), strict=True):
            for design in panel:
                if best and design != reference and reference in panel:
                    found = difference(panel[design], panel[reference])
                    yield Contrast(design, sampling, column, found, best.p[frozenset({design, reference})])


def _sampling(row: Row) -> str:
    return TUNED if row.group.is_tuned else FIXED


@dataclass(frozen=True)
class _Side:
    """The curves of all designs over one cost, either at the fixed sampler or tuned."""

    axis: str
    sampling: str
    metric: str
    curves: Mapping[str, tuple[tuple[float, ...], tuple[BySeed, ...]]]
    """Design -> rising costs, and the values at each."""
    budgets: tuple[int, ...]
    """NFE budgets; empty: designs share numbers of steps instead."""

    @cached_property
    def log(self) -> bool:
        """Whether to interpolate the logarithms of values. A kernel distance may be zero or less, and has none."""
        return all(value > 0 for _, points in self.curves.values() for values in points for value in values.values())

    def costs(self) -> list[float]:
        """Costs to compare designs at: the budgets, else as many costs, even in log cost, where two designs have values."""
        if self.axis == NFE and self.budgets:
            return [float(budget) for budget in self.budgets]
        if len(self.curves) < 2:
            return []
        low, high = (sorted(costs[end] for costs, _ in self.curves.values()) for end in (0, -1))
        least, most = low[1], high[-2]
        count = max(len(costs) for costs, _ in self.curves.values())
        return [float(cost) for cost in np.geomspace(least, most, count)] if least <= most else []

    def at(self, cost: float) -> dict[str, BySeed]:
        """The values of each design at a cost."""
        found = {name: self._value(costs, points, cost) for name, (costs, points) in self.curves.items()}
        return {name: values for name, values in found.items() if values}

    def _value(self, costs: Sequence[float], points: Sequence[BySeed], cost: float) -> BySeed:
        if self.axis == NFE and self.budgets:
            return points[costs.index(cost)] if cost in costs else {}
        forth, back = (math.log, math.exp) if self.log else (float, float)
        values = {}
        for seed in dict.fromkeys(seed for each in points for seed in each):
            x = [math.log(spent) for spent, each in zip(costs, points, strict=True) if seed in each]
            y = [forth(each[seed]) for each in points if seed in each]
            if x[0] <= math.log(cost) <= x[-1]:
                values[seed] = back(float(np.interp(math.log(cost), x, y)))
        return values

    def choices(self) -> Iterator[Choice]:
        sign = -1 if higher_is_better(self.metric) else 1
        panels = {cost: values for cost in self.costs() if len(values := self.at(cost)) > 1}
        for (cost, values), best in zip(panels.items(), winners(list(panels.values()), sign), strict=True):
            if best is not None:
                yield Choice(self.axis, self.sampling, cost, values, best)

    def neighbours(self) -> Iterator[Neighbours]:
        for one, other in itertools.pairwise(self.curves):
            curves = [self.curves[one], self.curves[other]]
            low, high = max(costs[0] for costs, _ in curves), min(costs[-1] for costs, _ in curves)
            shared = set.intersection(*(set(values) for _, points in curves for values in points))
            if shared and low < high:  # a crossing needs two costs
                yield Neighbours(self.axis, self.sampling, (one, other), crossing(curves, self.log))


def _sides(rows: Sequence[Row], metric: str, axis: str, name: Callable[[Row], str]) -> Iterator[_Side]:
    columns = columns_of(rows)
    budgets = tuple(column.value for column in columns if column.kind == "nfe")
    for sampling in (FIXED, TUNED):
        found: dict[str, list[tuple[float, BySeed]]] = {}
        for row in rows:
            cost = row.nfe if axis == NFE else row.costs[axis]
            if _sampling(row) == sampling and cost:
                found.setdefault(name(row), []).append((float(cost), row.by_seed(metric)))
        curves = {}
        for design, points in found.items():
            points.sort(key=lambda point: point[0])
            costs, values = zip(*points, strict=True)
            curves[design] = costs, values
        yield _Side(axis, sampling, metric, curves, budgets)


def _training(steps: int, rows: Sequence[Row], metric: str) -> Training:
    flops = [training_flops(load_run(group.runs[0])) for group in {row.label: row.group for row in rows}.values()]
    choices = tuple(choice for side in _sides(rows, metric, NFE, without_training) for choice in side.choices())
    return Training(steps, (min(flops), max(flops)), choices)


def _sentence(choices: Sequence[Choice]) -> str:
    """The best designs in a sentence, such as `up to NFE 64, d2 (p = 0.97); from 128 on, undecided`."""
    if all(choice.winner.probability is None for choice in choices):
        return f"{_TOO_FEW}, nothing is tested"
    spans = [(key, list(found)) for key, found in itertools.groupby(choices, key=_decision)]
    texts = []
    for index, (name, span) in enumerate(spans):
        first, last = (f"{choice.cost:g}" for choice in (span[0], span[-1]))
        if len(spans) == 1:
            where = "at every budget" if len(span) > 1 else f"at NFE {first}"
        elif index == 0:
            where = f"up to NFE {last}"
        elif index == len(spans) - 1:
            where = f"from {first} on"
        else:
            where = f"at {first}" if len(span) == 1 else f"from {first} to {last}"
        least = min(choice.winner.probability or 0.0 for choice in span)
        likely = f"(p = {chance(least)})".replace("= >", ">")
        texts.append(f"{where}, {f'{name} {likely}' if name else 'undecided'}")
    return "; ".join(texts)


def _gaps(choices: Sequence[Choice], designs: Iterable[str]) -> str:
    """The designs that were not compared at a budget, in words."""
    missing = {name: [f"{choice.cost:g}" for choice in choices if name not in choice.values] for name in designs}
    texts = [f"{name} at NFE {', '.join(costs)}" for name, costs in missing.items() if costs]
    return f" (not measured: {'; '.join(texts)})" if texts else ""


def _decision(choice: Choice) -> str | None:
    return choice.winner.name if choice.winner.is_decided else None


def _bold(best: Winner) -> str:
    return f"**{best.name}**" if best.is_decided else best.name


def _brief(best: Winner) -> str:
    if best.probability is None:
        return f"{best.name} (not tested)"
    level = [f"level: {', '.join(best.level)}"] if best.level else []
    return f"{_bold(best)} ({'; '.join([f'P {chance(best.probability)}', *level])})"
