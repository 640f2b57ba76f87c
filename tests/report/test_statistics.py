"""Means and their intervals, against scipy."""

import math
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from madformer.report.formatting import show
from madformer.report.statistics import Estimate, estimate, over_training
from tests.points import at, point


def value(entry):
    return entry["metrics"]["fd_digits"]


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.5, 1.25, 2.0], [10.0, 11.0, 12.5, 9.0, 10.5]])
def test_the_interval_is_student_s(values):
    low, high = stats.t.interval(0.95, len(values) - 1, loc=fmean(values), scale=stats.sem(values))
    assert over_training(values).interval == (pytest.approx(low), pytest.approx(high))
    assert estimate([[point(16, each)] for each in values], value).interval == (pytest.approx(low), pytest.approx(high))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(2000, 3))
    covered = [low <= 5.0 <= high for low, high in (over_training(list(row)).interval for row in draws)]
    assert fmean(covered) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_spread():
    assert estimate([[point(16, 3.0)]], value) == Estimate(3.0, (3.0,)) == over_training([3.0])
    assert over_training([3.0]).spread is None and over_training([3.0]).interval is None


def test_training_seeds_come_before_evaluation_seeds_and_these_before_checkpoints():
    checkpoints = [point(16, 1.0), point(16, 3.0, **at(2000))]
    both = [*checkpoints, point(16, 5.0, seed=1), point(16, 7.0, seed=1, **at(2000))]
    assert estimate([checkpoints], value) == Estimate(2.0, (1.0, 3.0), "checkpoints", math.sqrt(2))
    assert estimate([both], value) == Estimate(4.0, (2.0, 6.0), "evaluation seeds", math.sqrt(2))
    assert estimate([both, checkpoints], value) == Estimate(3.0, (4.0, 2.0), "training seeds", math.sqrt(2))


def test_checkpoints_of_one_run_have_no_interval():
    spread = estimate([[point(16, 1.0), point(16, 3.0, **at(2000))]], value)
    assert spread.interval is None and spread.spread == pytest.approx(stdev([1.0, 3.0]))


def test_deviations_over_checkpoints_are_pooled_over_runs():
    runs = [[point(16, start), point(16, start + step, **at(2000))] for start, step in ((1.0, 3.0), (5.0, 4.0))]
    assert estimate(runs, value).checkpoint_deviation == pytest.approx(2.5)  # sqrt((9 / 2 + 16 / 2) / 2)


@pytest.mark.parametrize(
    ("values", "over", "text"),
    [
        ([17.8], None, "17.8"),
        ([17.5, 18.0, 17.8], "training seeds", "17.8 ± 0.6"),
        ([17.5, 18.0, 17.8], "evaluation seeds", "17.8 ± 0.6 †"),
        ([17.5, 18.0, 17.8], "checkpoints", "17.8 ± 0.3 ‡"),
        ([10.0, 30.0], "training seeds", "10.0 and 30.0"),
        ([10.0, 30.0], "evaluation seeds", "10.0 and 30.0 †"),
        ([10.0, 30.0], "checkpoints", "20.0 ± 14.1 ‡"),
        ([0.0123, 0.0125, 0.0127], "training seeds", "0.0125 ± 0.0005"),
        ([1000.0, 1000.5, 1000.2], "checkpoints", "1,000 ± 0.3 ‡"),
        ([5.0, 5.0, 5.0], "training seeds", "5.00 ± 0.00"),
    ],
)
def test_a_cell_has_as_many_digits_as_it_means(values, over, text):
    assert show(Estimate(fmean(values), tuple(values), over)) == text


def test_what_is_not_there_is_a_dash():
    assert show(None) == "–"
