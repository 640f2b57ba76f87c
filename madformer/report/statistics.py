"""Means over seeds with their intervals, tests of differences, and Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Literal, TypeVar

from scipy.special import stdtr  # type: ignore[import-untyped]  # scipy.stats takes a second to import

from madformer.evaluation.measurement import Point, half_width

Over = Literal["training seeds", "evaluation seeds", "checkpoints"]
"""What was repeated. Only training seeds say how much another training would differ."""

MARKS: dict[Over, str] = {"training seeds": "", "evaluation seeds": " †", "checkpoints": " ‡"}
"""What follows a spread in a table, so that none is taken for another."""


@dataclass(frozen=True)
class Estimate:
    """A quantity at one budget of one label."""

    mean: float
    """Over training runs, each of which counts as the mean of its evaluation seeds and checkpoints."""
    values: tuple[float, ...]
    """One for each of what `over` names."""
    over: Over | None = None
    """What was repeated; None: nothing, there is one value."""
    checkpoint_deviation: float | None = None
    """Standard deviation over the checkpoints of a run, pooled over runs; None: one checkpoint each."""

    @property
    def spread(self) -> float | None:
        """What follows ±: the half-width of the confidence interval of the mean, over checkpoints their standard deviation."""
        if self.over is None:
            return None
        return stdev(self.values) if self.over == "checkpoints" else half_width(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean; None where only checkpoints were repeated: they are no independent draws."""
        if self.spread is None or self.over == "checkpoints":
            return None
        return self.mean - self.spread, self.mean + self.spread


def estimate(runs: Sequence[Sequence[Point]], value: Callable[[Point], float]) -> Estimate:
    """The mean over training runs, and its spread over the outermost of what was repeated.

    Args:
        runs: for each training seed its points, over evaluation seeds and checkpoints.
        value: what to take of a point.
    """
    trained = tuple(fmean(map(value, points)) for points in runs)
    deviations = [stdev(means) for points in runs if len(means := _means(points, "checkpoint", value)) > 1]
    within = math.sqrt(fmean(deviation**2 for deviation in deviations)) if deviations else None
    if len(trained) > 1:
        return Estimate(fmean(trained), trained, "training seeds", within)
    for key, over in _REPEATED.items():
        if len(values := _means(runs[0], key, value)) > 1:
            return Estimate(trained[0], values, over, within)
    return Estimate(trained[0], trained)


def over_training(values: Sequence[float]) -> Estimate:
    """The mean of one value for each training seed."""
    return Estimate(fmean(values), tuple(values), "training seeds" if len(values) > 1 else None)


SIGNIFICANCE = 0.05
"""The p-value below which two means differ."""


def differ(one: Estimate, other: Estimate, paired: bool) -> bool | None:
    """Whether two means over training seeds differ, by a two-sided t-test.

    Args:
        one: over at least two seeds.
        other: likewise.
        paired: whether both are of the same seeds in the same order. Runs of one seed have data order, timesteps and noise in
            common, so differences seed by seed scatter less than either value; else the test is Welch's.

    Returns:
        None: one of them is of a single seed.
    """
    if one.over != "training seeds" or other.over != "training seeds":
        return None
    if paired:
        gaps = [first - second for first, second in zip(one.values, other.values, strict=True)]
        errors, freedoms = [variance(gaps) / len(gaps)], [len(gaps) - 1]
    else:
        errors = [variance(each.values) / len(each.values) for each in (one, other)]
        freedoms = [len(each.values) - 1 for each in (one, other)]
    if not sum(errors):
        return one.mean != other.mean
    freedom = sum(errors) ** 2 / sum(error**2 / degrees for error, degrees in zip(errors, freedoms, strict=True))
    return bool(2 * stdtr(freedom, -abs(one.mean - other.mean) / math.sqrt(sum(errors))) < SIGNIFICANCE)


_REPEATED: dict[str, Over] = {"seed": "evaluation seeds", "checkpoint": "checkpoints"}


def _means(points: Sequence[Point], key: str, value: Callable[[Point], float]) -> tuple[float, ...]:
    """The mean for each seed, or for each checkpoint."""
    names = dict.fromkeys(point[key] for point in points)
    return tuple(fmean(value(point) for point in points if point[key] == name) for name in names)


Priced = TypeVar("Priced")


def pareto_front(
    rows: Sequence[Priced], cost: Callable[[Priced], float | None], loss: Callable[[Priced], float]
) -> list[Priced]:
    """Rows that are better than every row that costs no more, the cheapest first; means alone count, not their intervals.

    Args:
        rows: any; those without a cost are left out.
        cost: what a row costs.
        loss: how bad it is, lower is better.
    """
    priced = sorted(((spent, loss(row), row) for row in rows if (spent := cost(row)) is not None), key=lambda entry: entry[:2])
    front: list[Priced] = []
    for _, lost, row in priced:
        if not front or lost < loss(front[-1]):
            front.append(row)
    return front
