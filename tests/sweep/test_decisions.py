"""Decisions: exact bounds, error rates and power in simulated sweeps, and what never changes a decision."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from benchmarks.decisions import MARGIN, simulate
from madformer.errors import ConfigError
from madformer.sweep.decisions import Decision, Rule, critical_values, decide, expected_seeds

RULE = Rule(alpha=0.05, margin=None, first=3, most=12)
WITH_MARGIN = Rule(alpha=0.05, margin=1.0, first=3, most=12)
SWEEPS = 1000
MOST_WRONG = 50 + 3 * math.sqrt(SWEEPS * 0.05 * 0.95)
"""Three standard deviations above what alpha allows."""

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
sweeps = st.dictionaries(st.integers(0, 9), st.lists(numbers, max_size=14), min_size=1, max_size=4)
rules = st.sampled_from([RULE, WITH_MARGIN, Rule(0.2, 40.0, 2, 5), Rule(0.9, 3.0, 4, 4)])


@pytest.mark.parametrize("level", [0.05, 0.05 / 6, 0.001])
def test_paths_of_noise_cross_the_bounds_as_often_as_the_level_says(level):
    """At every look, by simulation: the share (n / most)^2 of the level is spent."""
    draw, paths, crossed = np.random.default_rng(0), 400_000, 0
    sums, squares, alive = np.zeros(paths), np.zeros(paths), np.ones(paths, bool)
    bounds = dict(enumerate(critical_values(level, 3, 12), 3))
    for seeds in range(1, 13):
        values = draw.standard_normal(paths)
        sums, squares = sums + values, squares + values**2
        if seeds in bounds:
            error = np.sqrt((squares - sums**2 / seeds) / (seeds - 1) * seeds)
            alive &= abs(sums) <= bounds[seeds] * error
            expected, crossed = paths * level * (seeds / 12) ** 2, paths - alive.sum()
            assert abs(crossed - expected) < 4 * math.sqrt(expected)


def test_a_single_look_is_a_t_test_and_a_higher_level_is_easier():
    assert critical_values(0.05, 8, 8) == pytest.approx([-stdtrit(7, 0.025)])
    low, high = critical_values(0.001, 2, 12), critical_values(0.0011, 2, 12)
    assert all(one > other > 0 for one, other in zip(low, high, strict=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noise", ["normal", "t, 3 d.f."])
@pytest.mark.parametrize("margin", [None, MARGIN])
def test_sweeps_without_differences_are_decided_wrongly_as_often_as_alpha_allows(noise, shared, margin):
    assert simulate(noise, shared, 0, margin, SWEEPS).wrong <= MOST_WRONG


def test_a_difference_as_large_as_the_margin_is_seldom_called_equal():
    assert 0 < simulate("normal", False, MARGIN, MARGIN, SWEEPS).wrong <= MOST_WRONG


def test_large_differences_are_found_with_fewer_seeds_than_tests_of_one_look_take():
    outcome = simulate("normal", True, 2, MARGIN, 300)
    assert outcome.found > 0.97 and outcome.seeds_found < 8.2
    assert outcome.fixed - outcome.seeds_found > 2
    assert outcome.equal > 0.7 and outcome.seeds_zero < 10.7


@given(sweeps, rules, st.data())
def test_later_seeds_change_no_decision(differences, rule, data):
    """Nor does the order of the contrasts, and a call leaves its input alone."""
    before = {contrast: list(values) for contrast, values in differences.items()}
    decisions = decide(differences, rule)
    assert differences == before and decide(dict(reversed(before.items())), rule) == decisions
    earlier = {contrast: values[: data.draw(st.integers(0, len(values)))] for contrast, values in before.items()}
    for contrast, decision in decide(earlier, rule).items():
        if decision.state != "undecided":
            assert decisions[contrast] == decision and decision.seeds <= len(earlier[contrast])


@given(sweeps, rules, st.sampled_from([-4.0, -1.0, 0.5, 1024.0]))
def test_units_and_signs_do_not_matter(differences, rule, scale):
    scaled_rule = Rule(rule.alpha, rule.margin and rule.margin * abs(scale), rule.first, rule.most)
    scaled = decide({contrast: [scale * value for value in values] for contrast, values in differences.items()}, scaled_rule)
    for contrast, decision in decide(differences, rule).items():
        low, high = sorted(scale * end for end in decision.interval)
        assert scaled[contrast].interval == (low, high)
        assert scaled[contrast].difference == pytest.approx(scale * decision.difference, nan_ok=True)
        assert (scaled[contrast].state, scaled[contrast].seeds) == (decision.state, decision.seeds)


@given(sweeps, rules)
def test_states_are_what_intervals_say(differences, rule):
    for contrast, decision in decide(differences, rule).items():
        low, high = decision.interval
        is_equal = rule.margin is not None and -rule.margin < low and high < rule.margin
        assert decision.state == ("different" if low > 0 or high < 0 else "equal" if is_equal else "undecided")
        if decision.state == "undecided":
            assert decision.seeds == len(differences[contrast][: rule.most])


def test_more_contrasts_need_clearer_differences():
    values = [1.0, 1.2, 0.9, 1.1, 1.0]
    [alone] = decide({0: values}, RULE).values()
    among = decide({0: values, **{number: [] for number in range(1, 100)}}, RULE)
    assert (alone.state, alone.seeds) == ("different", 4)
    assert (among[0].state, among[0].seeds) == ("undecided", 5)
    assert str(among[1]) == str(Decision("undecided", math.nan, (-math.inf, math.inf), 0))


def test_differences_without_scatter():
    same, zero = [0.1] * 3, [0.0] * 3
    assert [decision.state for decision in decide({0: same, 1: zero, 2: same[:2]}, RULE).values()] == [
        "different",
        "undecided",
        "undecided",
    ]
    assert decide({0: zero}, WITH_MARGIN)[0] == Decision("equal", 0, (0, 0), 3)
    assert decide({}, RULE) == expected_seeds({}, RULE) == {}


def test_seeds_that_are_still_needed():
    """If the next seeds are like those so far, a decision comes when it is expected, or before."""
    values = [1.0, 0.2, 1.9, 0.5, 1.4]
    expected = expected_seeds({0: values, 1: [3.0, 3.1, 2.9, 3.0], 2: [], 3: [1.0], 4: [0.1, -0.1] * 6, 5: [1.0, -1.0]}, RULE)
    assert {contrast: expected[contrast] for contrast in (1, 2, 3, 4, 5)} == {1: 0, 2: 3, 3: 2, 4: 0, 5: 10}
    assert expected_seeds({0: values}, RULE)[0] < expected[0]  # among fewer contrasts
    [more] = expected_seeds({0: values}, RULE).values()
    [decision] = decide({0: values * 3}, RULE).values()
    assert decision.state == "different" and abs(decision.seeds - len(values) - more) <= 1
    near, far = ({0: [scatter, -scatter, 2 * scatter, -2 * scatter]} for scatter in (0.3, 0.5))
    assert 0 < expected_seeds(near, WITH_MARGIN)[0] < expected_seeds(far, WITH_MARGIN)[0] < 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((5, None, 3, 12), "alpha = 5: must be between 0 and 1"),
        ((0.05, -1.0, 3, 12), "margin = -1.0: must be above 0, or null"),
        ((0.05, None, 1, 12), "first = 1: must be an integer of at least 2"),
        ((0.05, None, 3, 2), r"most = 2: must be at least first \(3\)"),
    ],
)
def test_rules_that_make_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rule(*fields)


def test_importing_takes_no_time():
    code = "import sys, madformer.sweep.decisions as _; print({'numpy', 'scipy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
