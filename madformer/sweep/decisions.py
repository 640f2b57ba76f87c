"""When the difference between two designs is decided: sequential tests, which keep their error rate as seeds are added.

A *contrast* is a pair of designs at a budget. Runs of one seed share data order and noise, so its data are differences seed by
seed. A *look* tests all seeds so far; looks are at `first`, `first + 1`, .. `most` seeds. Each look gives a repeated confidence
interval (Jennison & Turnbull 1989). The intervals are wide enough for all looks and contrasts together: with a probability of
at least 1 - alpha, all of them contain their true differences. A contrast is decided at the first look whose interval excludes
zero or lies inside ± margin. So with that probability no decision is wrong, neither in kind nor in sign.

The level of a contrast is alpha over the number of contrasts (Bonferroni), which holds however they depend on each other. It
is spent over the looks by a power function (Lan & DeMets 1983; Kim & DeMets 1987). The bounds are exact for Student's t
(Jennison & Turnbull 1991), so they assume normal differences. Decided contrasts do not pass on their level, unlike in Holm's
method (1979). Its proof covers neither "equal" nor signs, and a decision would depend on the order in which other contrasts'
seeds end.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from madformer.config.loading import require_distinct
from madformer.config.validation import is_integer, require
from madformer.errors import ConfigError
from madformer.evaluation.measurement import DISTANCE, higher_is_better, metric_key

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

DEPTH_AXIS = "evaluate.diffusion_depth"
"""The name that the axis of an elastic run's depths has in contrasts."""

State = Literal["different", "equal", "undecided"]
Contrast = TypeVar("Contrast", bound=Hashable)

SPENDING_POWER = 2
"""At n seeds the share (n / most)^2 of a contrast's level is spent. Little is spent early, as t-tests of few seeds are weak."""

_CELLS = 200
"""Cells of the grid that `critical_values` integrates over. Its error rates are then within 1 % of the nominal ones."""


@dataclass(frozen=True)
class Rule:
    """The rule by which contrasts are decided.

    Raises:
        ConfigError: a field is out of range.
    """

    alpha: float
    """Probability of one wrong decision or more, over all contrasts and looks."""
    margin: float | None
    """Smaller differences do not matter: a contrast is equal if its interval is inside ± margin. None: nothing is equal."""
    first: int
    """Number of seeds at the first look."""
    most: int
    """Number of seeds at the last look."""

    def __post_init__(self) -> None:
        require(0 < self.alpha < 1, "alpha", self.alpha, "must be between 0 and 1")
        require(self.margin is None or 0 < self.margin < math.inf, "margin", self.margin, "must be above 0, or null")
        require(is_integer(self.first) and self.first >= 2, "first", self.first, "must be an integer of at least 2")
        require(is_integer(self.most) and self.most >= self.first, "most", self.most, f"must be at least first ({self.first})")


@dataclass(frozen=True)
class SeedRange:
    """The number of seeds of each design in a sweep that decides."""

    first: int = 3
    """Number of seeds of every design at the first look."""
    most: int = 12
    """Most seeds of a design."""


@dataclass(frozen=True)
class Decide:
    """Contrasts between designs. The sweep trains seeds until they are decided."""

    contrasts: Any = "all"
    """all: every pair of designs; or axis -> value: each other value of the axis against this one, all else equal. The depths
    of an elastic run are the axis evaluate.diffusion_depth."""
    metric: str = DISTANCE
    """Metric to compare designs by; `distance`: the first feature network's distance."""
    sampling: Literal["fixed", "tuned"] = "fixed"
    """`fixed`: compare at the default sampling; `tuned`: compare at the tuned one (`evaluate.tune`)."""
    nfe: tuple[int, ...] = ()
    """NFE budgets to compare designs at; empty: all that are evaluated."""
    alpha: float = 0.05
    """Probability of one wrong decision or more, over all contrasts, budgets and looks."""
    margin: float | None = None
    """Smaller differences do not matter: designs are equal if the interval is inside ± margin. null: they are never equal."""
    seeds: SeedRange = field(default_factory=SeedRange)
    """The number of seeds of each design. The seeds are 0 to most - 1."""
    hours: float | None = None
    """Limit of the sweep's estimated device hours (trial-hours if trials share a device). No seed is added beyond it. null: no
    limit."""

    def __post_init__(self) -> None:
        legal = self.contrasts == "all" or (isinstance(self.contrasts, Mapping) and len(self.contrasts) > 0)
        require(legal, "decide.contrasts", self.contrasts, "must be all, or name a value, as in {model.diffusion_depth: 4}")
        is_ranked = metric_key(self.metric) is not None and higher_is_better(self.metric) is not None
        legal = self.metric == DISTANCE or is_ranked
        require(legal, "decide.metric", self.metric, f"must be {DISTANCE}, or a metric such as fid or fd_digits")
        require_distinct("decide.nfe", self.nfe)
        require(self.hours is None or self.hours > 0, "decide.hours", self.hours, "must be above 0, or null")
        try:
            _ = self.rule
        except ConfigError as error:
            section = "decide.seeds" if str(error).startswith(("first", "most")) else "decide"
            raise ConfigError(f"{section}.{error}") from error

    @property
    def rule(self) -> Rule:
        """The rule by which contrasts are decided."""
        return Rule(self.alpha, self.margin, self.seeds.first, self.seeds.most)


@dataclass(frozen=True)
class Decision:
    """The result of a contrast at the look that decided it, else at its newest look."""

    state: State
    difference: float
    """The mean difference; NaN: there are no seeds."""
    interval: tuple[float, float]
    """The repeated confidence interval; infinite before the first look."""
    seeds: int
    """Number of seeds that the decision took; of an undecided contrast, those so far."""


def decide(differences: Mapping[Contrast, Sequence[float]], rule: Rule) -> dict[Contrast, Decision]:
    """The decision on every contrast, which depends only on its own differences and the number of contrasts.

    Looks are replayed from the first one on, and the first that decides a contrast counts. So later seeds never change a
    decision.

    Args:
        differences: for each contrast its finite differences, in the order of seeds. Contrasts without differences must be
            there too, as the number of contrasts sets the level.
    """
    return {contrast: _decide(values, _bounds(len(differences), rule), rule) for contrast, values in differences.items()}


def expected_seeds(differences: Mapping[Contrast, Sequence[float]], rule: Rule) -> dict[Contrast, int]:
    """The number of seeds that each contrast still needs, if mean and scatter stay the same; 0 for decided ones.

    With fewer than two differences there is no scatter. Then the number is that of the seeds missing at the first look.

    Args:
        differences: as for `decide`.
    """
    expected, bounds = {}, _bounds(len(differences), rule)
    for contrast, decision in decide(differences, rule).items():
        values, needed = differences[contrast][: rule.most], rule.most
        if decision.state != "undecided":
            needed = len(values)
        elif len(values) < 2:
            needed = rule.first
        else:
            mean, deviation = fmean(values), _deviation(values)
            for seeds, bound in enumerate(bounds, rule.first):
                if seeds > len(values) and _state(mean, bound * deviation / math.sqrt(seeds), rule) != "undecided":
                    needed = seeds
                    break
        expected[contrast] = needed - len(values)
    return expected


def _deviation(values: Sequence[float]) -> float:
    return math.dist(values, [fmean(values)] * len(values)) / math.sqrt(len(values) - 1)  # 20 times faster than `stdev`


def _bounds(contrasts: int, rule: Rule) -> tuple[float, ...]:
    return critical_values(rule.alpha / max(contrasts, 1), rule.first, rule.most)


def _decide(values: Sequence[float], bounds: Sequence[float], rule: Rule) -> Decision:
    decision = Decision("undecided", fmean(values) if values else math.nan, (-math.inf, math.inf), len(values))
    for seeds, bound in enumerate(bounds[: max(len(values) - rule.first + 1, 0)], rule.first):
        seen = values[:seeds]
        mean, half_width = fmean(seen), bound * _deviation(seen) / math.sqrt(seeds)
        decision = Decision(_state(mean, half_width, rule), mean, (mean - half_width, mean + half_width), seeds)
        if decision.state != "undecided":
            break
    return decision


def _state(mean: float, half_width: float, rule: Rule) -> State:
    if abs(mean) > half_width:
        return "different"
    return "equal" if rule.margin is not None and abs(mean) + half_width < rule.margin else "undecided"


@cache
def critical_values(level: float, first: int, most: int) -> tuple[float, ...]:
    """Bounds of |t| at `first` .. `most` seeds. If the true difference is zero, |t| crosses one with probability `level`.

    Let u be the sum of n differences over the root of the sum of their squares, a function of t. Let r be one more difference
    over that root. sqrt(n) r follows Student's t with n degrees of freedom, independently of u. The next u is
    (u + r) / sqrt(1 + r^2), so |u| is a Markov chain without parameters. The distribution of the paths that have not crossed
    is carried from look to look on a grid, as Armitage, McPherson & Rowe (1969) did for known scatter.

    Args:
        level: two-sided level of one contrast.
        first: number of seeds at the first look, at least 2.
        most: number of seeds at the last look.
    """
    import numpy as np

    bounds: list[float] = []
    u_K = mass_K = np.empty(0)  # midpoints of the grid's cells at the last look, and the probability in each
    for seeds in range(first, most + 1):
        before = 0 if seeds == first else seeds - 1
        spent = level * (seeds**SPENDING_POWER - before**SPENDING_POWER) / most**SPENDING_POWER
        low, high = 0.0, 8.0  # bisect normal scores: t-values of few seeds have no common scale
        while high - low > 1e-9:
            middle = (low + high) / 2
            crosses = _crossing(seeds, _t_of(seeds, np.array([middle])), u_K, mass_K)[0] > spent
            low, high = (middle, high) if crosses else (low, middle)
        edges = np.linspace(0, high, _CELLS + 1)
        mass_K = -np.diff(_crossing(seeds, _t_of(seeds, edges), u_K, mass_K))
        u_K = _u_of(seeds, _t_of(seeds, (edges[1:] + edges[:-1]) / 2))
        bounds.append(float(_t_of(seeds, edges)[-1]))
    return tuple(bounds)


def _t_of(seeds: int, score: NDArray[float64]) -> NDArray[float64]:
    """Values of |t| with the tail probabilities of these normal scores."""
    from scipy.special import ndtr, stdtrit  # type: ignore[import-untyped]  # scipy.stats takes a second to import

    return -stdtrit(seeds - 1, ndtr(-score))


def _u_of(seeds: int, t: NDArray[float64]) -> NDArray[float64]:
    """The sum over the root of the sum of squares (u), from Student's t."""
    return t * (seeds / (seeds - 1 + t**2)) ** 0.5


def _crossing(seeds: int, t_J: NDArray[float64], u_K: NDArray[float64], mass_K: NDArray[float64]) -> NDArray[float64]:
    """Probability of |t| > t_J now, for the paths in the grid's cells. At the first look there is no grid."""
    from scipy.special import stdtr

    return mass_K @ _beyond_KJ(seeds, u_K, t_J) if len(u_K) else 2 * stdtr(seeds - 1, -t_J)


def _beyond_KJ(seeds: int, u_K: NDArray[float64], t_J: NDArray[float64]) -> NDArray[float64]:
    """Probability of |t| > t_J at `seeds` seeds, given |u| = u_K at one seed less."""
    import numpy as np
    from scipy.special import stdtr

    freedom, right = seeds - 1, np.pi / 2

    def above(angle_KJ: NDArray[float64]) -> NDArray[float64]:
        """Probability of arctan r above an angle."""
        return stdtr(freedom, -np.sqrt(freedom) * np.tan(np.clip(angle_KJ, -right, right)))

    # (u + r) / sqrt(1 + r^2) = sqrt(1 + u^2) sin(arctan r + arctan u)
    least_KJ = np.arcsin(np.minimum(_u_of(seeds, t_J) / np.sqrt(1 + u_K**2)[:, None], 1))
    turns = [np.arctan(sign * u_K)[:, None] for sign in (1, -1)]
    return np.sum([above(least_KJ - turn_K1) - above(np.pi - least_KJ - turn_K1) for turn_K1 in turns], axis=0)
