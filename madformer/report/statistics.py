"""Means over seeds with their intervals; differences, winners and crossings with their uncertainty; Pareto fronts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev, variance
from typing import Literal, TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]  # scipy.stats takes a second to import

from madformer.evaluation.measurement import CONFIDENCE, Point, half_width

Over = Literal["training seeds", "evaluation seeds", "checkpoints"]
"""Kinds of repetition. Only training seeds show how much another training would differ."""

MARKS: dict[Over, str] = {"training seeds": "", "evaluation seeds": " †", "checkpoints": " ‡"}
"""Marks after a spread in a table, by its kind of repetition."""


@dataclass(frozen=True)
class Estimate:
    """A quantity at one budget of one label."""

    mean: float
    """The mean over training runs. The value of a run is the mean over its evaluation seeds and checkpoints."""
    values: tuple[float, ...]
    """One value for each repetition."""
    over: Over | None = None
    """The kind of repetition; None: there is only one value."""
    checkpoint_deviation: float | None = None
    """Standard deviation over the checkpoints of a run, pooled over runs; None: each run has one checkpoint."""

    @property
    def spread(self) -> float | None:
        """The number after ±: half-width of the mean's confidence interval; over checkpoints, their standard deviation."""
        if self.over is None:
            return None
        return stdev(self.values) if self.over == "checkpoints" else half_width(self.values)

    @property
    def is_pair(self) -> bool:
        """Whether these are two seeds, which are shown as they are."""
        return len(self.values) == 2 and self.over != "checkpoints"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean; None: there are only checkpoints, which are not independent draws."""
        if self.spread is None or self.over == "checkpoints":
            return None
        return self.mean - self.spread, self.mean + self.spread


def estimate(runs: Sequence[Sequence[Point]], value: Callable[[Point], float]) -> Estimate:
    """The mean over training runs. Its spread is over training seeds, else over evaluation seeds, else over checkpoints.

    Args:
        runs: for each training seed its points, over evaluation seeds and checkpoints.
        value: the quantity of a point.
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
    """The mean over training seeds, from one value for each seed."""
    return Estimate(fmean(values), tuple(values), "training seeds" if len(values) > 1 else None)


SIGNIFICANCE = 0.05
"""Two means differ if the p-value, corrected for the number of tests, is below this."""
FEWEST_SEEDS = 3
"""Fewest training seeds for a test of differences."""
RESAMPLES = 10_000
"""Number of bootstrap resamples."""

BySeed = Mapping[int, float]
"""Training seed -> a quantity of its run."""


@dataclass(frozen=True)
class Difference:
    """One mean minus another, over training seeds."""

    mean: float
    seeds: int
    """Number of pairs; without pairs, the smaller number of seeds."""
    is_paired: bool
    deviation: float | None = None
    """Standard deviation of the differences seed by seed; without pairs, of the difference of two draws. This and the next two
    fields are None if there are too few seeds."""
    half_width: float | None = None
    """Half-width of the difference's 95 % confidence interval, not corrected for the number of tests."""
    p: float | None = None
    """p-value of the two-sided t-test, not corrected for the number of tests."""

    @property
    def effect(self) -> float | None:
        """The difference in its standard deviations; None: there are too few seeds, or they do not scatter."""
        return self.mean / self.deviation if self.deviation else None


def difference(one: BySeed, other: BySeed) -> Difference:
    """The difference of two means over training seeds.

    Runs of one seed share data order, timesteps and noise, so differences seed by seed scatter less than the values. The t-test
    is paired over the seeds that both have. If these are fewer than `FEWEST_SEEDS`, it is Welch's test (1947).
    """
    shared = [seed for seed in one if seed in other]
    fewest = min(len(one), len(other))
    if len(shared) >= FEWEST_SEEDS:
        gaps = [one[seed] - other[seed] for seed in shared]
        deviation, errors, freedoms = stdev(gaps), [variance(gaps) / len(gaps)], [len(gaps) - 1]
        mean, seeds, is_paired = fmean(gaps), len(shared), True
    else:
        samples = list(one.values()), list(other.values())
        mean, seeds, is_paired = fmean(samples[0]) - fmean(samples[1]), fewest, False
        if fewest < FEWEST_SEEDS:
            return Difference(mean, seeds, is_paired)
        deviation = math.sqrt(sum(map(variance, samples)))
        errors, freedoms = [variance(each) / len(each) for each in samples], [len(each) - 1 for each in samples]
    if not sum(errors):
        return Difference(mean, seeds, is_paired, 0.0, 0.0, float(mean == 0))
    freedom = sum(errors) ** 2 / sum(error**2 / degrees for error, degrees in zip(errors, freedoms, strict=True))
    error = math.sqrt(sum(errors))
    half_width = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * error
    return Difference(mean, seeds, is_paired, deviation, half_width, float(2 * stdtr(freedom, -abs(mean) / error)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm 1979). The probability of any false difference is then `SIGNIFICANCE` at most.

    Args:
        p_values: p-values in any order; None: not tested. It stays None and does not count.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, index) in enumerate(known):
        greatest = max(greatest, min(1.0, (len(known) - rank) * p))
        corrected[index] = greatest
    return corrected


@cache
def resamples(seeds: int) -> np.ndarray:
    """The share of each of S seeds in each bootstrap resample (Efron 1979), [`RESAMPLES`, S]. The draw is always the same."""
    draws_RS = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    return np.stack([(draws_RS == seed).mean(axis=1) for seed in range(seeds)], axis=1)


@dataclass(frozen=True)
class Winner:
    """The best of several means."""

    name: str
    """The name with the best mean."""
    level: tuple[str, ...]
    """Names that are not significantly worse."""
    probability: float | None
    """Probability that it is the best: the share of resamples, over the seeds that all have. None: there are too few seeds."""
    p: Mapping[frozenset[str], float | None]
    """p-value of each pair's difference, corrected for the number of tests; None: there are too few seeds."""

    @property
    def is_decided(self) -> bool:
        """Whether every other mean is significantly worse."""
        return self.probability is not None and not self.level


def winners(panels: Sequence[Mapping[str, BySeed]], sign: int) -> list[Winner | None]:
    """The best mean in each panel, for instance at each budget; None: the panel is empty.

    p-values are corrected for the number of all pairs in all panels (Holm).

    Args:
        panels: name -> values over training seeds, in each panel.
        sign: 1 if lower is better, else -1.
    """
    pairs = [list(itertools.combinations(panel, 2)) for panel in panels]
    tested = [_p_values(panel, of_panel) for panel, of_panel in zip(panels, pairs, strict=True)]
    corrected = iter(holm(list(itertools.chain.from_iterable(tested))))
    found = [{frozenset(pair): next(corrected) for pair in of_panel} for of_panel in pairs]
    return [_winner(panel, sign, p) if panel else None for panel, p in zip(panels, found, strict=True)]


def _p_values(panel: Mapping[str, BySeed], pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """The p-value of `difference` for each pair. If all designs have the same seeds, all are computed at once."""
    seeds = next((list(values) for values in panel.values()), [])
    if len(seeds) < FEWEST_SEEDS or any(values.keys() != set(seeds) for values in panel.values()):
        return [difference(panel[one], panel[other]).p for one, other in pairs]
    values_DS = np.array([[values[seed] for seed in seeds] for values in panel.values()])
    ones_P, others_P = np.triu_indices(len(panel), 1)  # in the order of the pairs
    gaps_PS = values_DS[ones_P] - values_DS[others_P]
    means_P, errors_P = gaps_PS.mean(axis=1), gaps_PS.std(axis=1, ddof=1) / math.sqrt(len(seeds))
    with np.errstate(divide="ignore", invalid="ignore"):
        t_P = np.where(means_P == 0, 0.0, np.abs(means_P) / errors_P)
    return [float(p) for p in 2 * stdtr(len(seeds) - 1, -t_P)]


def _winner(panel: Mapping[str, BySeed], sign: int, p: Mapping[frozenset[str], float | None]) -> Winner:
    shared = sorted(set.intersection(*(set(values) for values in panel.values())))
    # Designs vary together over seeds. So compare means over shared seeds, else seeds would count more than designs.
    best = min(panel, key=lambda name: sign * fmean(panel[name][seed] for seed in shared or panel[name]))
    told = {
        name
        for name in panel
        if (corrected := p.get(frozenset({name, best}))) is not None
        and corrected < SIGNIFICANCE
        and sign * difference(panel[name], panel[best]).mean > 0
    }
    probability = None
    if len(shared) >= FEWEST_SEEDS:
        values_DS = np.array([[values[seed] for seed in shared] for values in panel.values()])
        means_DR = sign * values_DS @ resamples(len(shared)).T
        is_best_DR = np.isclose(means_DR, means_DR.min(axis=0), rtol=1e-12, atol=0.0)  # the order of sums breaks no tie
        probability = float((is_best_DR / is_best_DR.sum(axis=0))[list(panel).index(best)].mean())
    return Winner(best, tuple(name for name in panel if name not in {*told, best}), probability, p)


@dataclass(frozen=True)
class Crossing:
    """The first crossing of two curves over a cost."""

    cost: float | None
    """Cost at which the means cross; None: they do not cross."""
    count: int
    """Number of times that the means cross."""
    interval: tuple[float, float] | None
    """The 2.5 % and 97.5 % quantiles over the resamples that cross; None: no resample crosses, or there are too few seeds."""
    share: float | None
    """Share of resamples that cross; None: there are too few seeds."""


def crossing(curves: Sequence[tuple[Sequence[float], Sequence[BySeed]]], log: bool) -> Crossing:
    """The crossing of the means of two curves, by linear interpolation in log cost over the costs that both curves span.

    Args:
        curves: for each of two curves the rising costs, and the values at each. At least one seed has values at all costs.
        log: whether to interpolate the logarithms of values, which must then be above zero.
    """
    shared = sorted(set.intersection(*(set(values) for _, points in curves for values in points)))
    knots = sorted({cost for costs, _ in curves for cost in costs})
    low, high = max(costs[0] for costs, _ in curves), min(costs[-1] for costs, _ in curves)
    x_M = np.log([cost for cost in knots if low <= cost <= high])
    weights_RS = np.vstack([np.full(len(shared), 1 / len(shared)), resamples(len(shared))])
    sides = []
    for costs, points in curves:
        means_RK = weights_RS @ np.array([[values[seed] for values in points] for seed in shared])
        heights_RK = np.log(means_RK) if log else means_RK
        sides.append(heights_RK @ np.stack([np.interp(x_M, np.log(costs), unit_K) for unit_K in np.eye(len(costs))]))
    gaps_RM = sides[0] - sides[1]
    signs_RM = np.sign(gaps_RM)
    for index in range(1, len(x_M)):  # a curve that touches another and turns back does not cross it
        signs_RM[:, index] = np.where(signs_RM[:, index] == 0, signs_RM[:, index - 1], signs_RM[:, index])
    turns_RM = signs_RM[:, :-1] * signs_RM[:, 1:] < 0
    with np.errstate(invalid="ignore", divide="ignore"):
        places_RM = x_M[:-1] + np.diff(x_M) * gaps_RM[:, :-1] / (gaps_RM[:, :-1] - gaps_RM[:, 1:])
    crosses_R = turns_RM.any(axis=1)
    firsts_R = np.full(len(crosses_R), np.nan)
    if len(x_M) > 1:
        turns = turns_RM.argmax(axis=1)[crosses_R]
        firsts_R[crosses_R] = np.exp(places_RM[np.flatnonzero(crosses_R), turns])
    cost, interval, share = None, None, None
    if crosses_R[0]:
        cost = float(firsts_R[0])
    if len(shared) >= FEWEST_SEEDS:
        share = float(crosses_R[1:].mean())
        if share:
            least, most = np.quantile(firsts_R[1:][crosses_R[1:]], [0.025, 0.975])
            interval = float(least), float(most)
    return Crossing(cost, int(turns_RM[0].sum()), interval, share)


_REPEATED: dict[str, Over] = {"seed": "evaluation seeds", "checkpoint": "checkpoints"}


def _means(points: Sequence[Point], key: str, value: Callable[[Point], float]) -> tuple[float, ...]:
    """The mean for each value of `key`, an evaluation seed or a checkpoint."""
    names = dict.fromkeys(point[key] for point in points)
    return tuple(fmean(value(point) for point in points if point[key] == name) for name in names)


Priced = TypeVar("Priced")


def pareto_front(
    rows: Sequence[Priced], cost: Callable[[Priced], float | None], loss: Callable[[Priced], float]
) -> list[Priced]:
    """Rows that are better than every row of the same or lower cost, cheapest first. Intervals are not considered.

    Args:
        rows: rows of any type. Those without a cost are left out.
        cost: the cost of a row; None: unknown.
        loss: the loss of a row; lower is better.
    """
    priced = sorted(((spent, loss(row), row) for row in rows if (spent := cost(row)) is not None), key=lambda entry: entry[:2])
    front: list[Priced] = []
    for _, lost, row in priced:
        if not front or lost < loss(front[-1]):
            front.append(row)
    return front
