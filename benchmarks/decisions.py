"""Decisions: error rate, power and number of seeds of simulated sweeps.

    python -m benchmarks.decisions

A sweep has six contrasts, at alpha 0.05, with 3 to 12 seeds. Half of them have the true difference in the row's name, in
standard deviations of the paired difference. For the others it is zero. Contrasts are independent or share a reference design.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import stdtrit  # type: ignore[import-untyped]

from benchmarks.harness import positive, table
from madformer.sweep.decisions import Rule, decide

CONTRASTS = 6
MARGIN = 1.5
RULE = Rule(alpha=0.05, margin=None, first=3, most=12)
LOOKS = range(RULE.first, RULE.most + 1)

Array = NDArray[np.floating[Any]]

NOISES: dict[str, Callable[[Generator, tuple[int, ...]], Array]] = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "t, 3 d.f.": lambda draw, shape: draw.standard_t(3, shape) / math.sqrt(3),
    "skewness 1": lambda draw, shape: draw.gamma(4, size=shape) / 2 - 2,
    "skewness 2": lambda draw, shape: draw.exponential(size=shape) - 1,
}
"""Of variance 1: the differences', or where contrasts share a reference each design's."""


@dataclass(frozen=True)
class Outcome:
    """The results of sweeps of one kind."""

    sweeps: int
    wrong: int
    """Sweeps with a wrong decision: zero called different, the wrong sign, or the margin or more called equal."""
    wrong_once: int
    """Sweeps with zero called different by one t-test at the last look, with as many contrasts."""
    found: float
    """Share of true differences that were called different; NaN: there are none."""
    equal: float
    """Share of zeros that were called equal."""
    seeds_found: float
    """Mean seeds of contrasts with a true difference, as `seeds_zero` of those without."""
    seeds_zero: float
    fixed: float
    """Seeds after which such a test finds as many of the true differences."""

    def error_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the probability of a wrong decision (Wilson 1927)."""
        n, z = self.sweeps, 1.96
        rate = self.wrong / n
        middle, width = rate + z**2 / 2 / n, z * math.sqrt(rate * (1 - rate) / n + z**2 / 4 / n**2)
        return (middle - width) / (1 + z**2 / n), (middle + width) / (1 + z**2 / n)


def true_differences(effect: float) -> Array:
    """Of every contrast: half of them have the effect."""
    return effect * (np.arange(CONTRASTS) < CONTRASTS // 2)


def differences(noise: str, shared: bool, effect: float, sweeps: int) -> Array:
    """Paired differences, [sweeps, contrasts, seeds]."""
    values = NOISES[noise](np.random.default_rng(0), (sweeps, CONTRASTS + shared, RULE.most))
    if shared:
        values = (values[:, 1:] - values[:, :1]) / math.sqrt(2)
    return values + true_differences(effect)[:, None]


def simulate(noise: str, shared: bool, effect: float, margin: float | None, sweeps: int) -> Outcome:
    """Simulate and decide sweeps of one kind."""
    rule = Rule(RULE.alpha, margin, RULE.first, RULE.most)
    values, truth = differences(noise, shared, effect, sweeps), true_differences(effect)
    decisions = [list(decide(dict(enumerate(sweep.tolist())), rule).values()) for sweep in values]
    states = np.array([[decision.state for decision in row] for row in decisions])
    signs = np.sign([[decision.difference for decision in row] for row in decisions])
    seeds = np.array([[decision.seeds for decision in row] for row in decisions])
    wrong = (states == "different") & (signs != np.sign(truth))
    wrong |= (states == "equal") & (truth >= (margin or math.inf))
    real, zero, fixed = truth > 0, truth == 0, fixed_tests(values)
    found = float(np.mean(states[:, real] == "different")) if effect else math.nan
    return Outcome(
        sweeps,
        wrong=int(wrong.any(axis=1).sum()),
        wrong_once=int(fixed[-1][:, zero].any(axis=1).sum()),
        found=found,
        equal=float(np.mean(states[:, zero] == "equal")),
        seeds_found=float(np.mean(seeds[:, real])) if effect else math.nan,
        seeds_zero=float(np.mean(seeds[:, zero])),
        fixed=seeds_of_share(found, fixed[..., real].mean(axis=(1, 2))) if effect else math.nan,
    )


def fixed_tests(values: Array) -> NDArray[np.bool_]:
    """Whether a t-test with a single look finds each difference, by number of seeds: [looks, sweeps, contrasts]."""
    shown = []
    for seeds in LOOKS:
        seen, bound = values[..., :seeds], -stdtrit(seeds - 1, RULE.alpha / CONTRASTS / 2)
        shown.append(abs(seen.mean(-1)) > bound * seen.std(-1, ddof=1) / math.sqrt(seeds))
    return np.array(shown)


def seeds_of_share(found: float, shares: Array) -> float:
    """The number of seeds after which tests with a single look find a share of differences, interpolated between looks."""
    growing, looks = np.unique(np.maximum.accumulate(shares), return_index=True)  # each share where it is first reached
    return float(np.interp(found, growing, RULE.first + looks))


HEADS = [
    "wrong %",
    "95 % interval",
    "one test %",
    "found %",
    "seeds",
    "of 12 saved",
    "of fixed saved",
    "zeros equal %",
    "seeds",
]


def cells(outcome: Outcome) -> list[str]:
    """Of a row."""
    o, (low, high) = outcome, outcome.error_interval()
    found = [100 * o.found, o.seeds_found, RULE.most - o.seeds_found, o.fixed - o.seeds_found]
    return [
        f"{100 * o.wrong / o.sweeps:.1f}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{100 * o.wrong_once / o.sweeps:.1f}",
        *("-" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in zip(found, (0, 1, 1, 1), strict=True)),
        f"{100 * o.equal:.0f}",
        f"{o.seeds_zero:.1f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=positive, default=5000, help="of each kind")
    given, start, rows = parser.parse_args(arguments), time.perf_counter(), []
    for margin, noise, shared, effect in itertools.product((None, MARGIN), NOISES, (False, True), (0, 1, 2, 3)):
        name = f"{noise}, {'shared' if shared else 'independent'}, {effect} sd{f', margin {margin} sd' if margin else ''}"
        rows.append((name, cells(simulate(noise, shared, effect, margin, given.sweeps))))
    print(*table(HEADS, rows), sep="\n")
    print(f"{given.sweeps} sweeps of each kind in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
