"""Metrics by name, ways of sampling, and what makes two numbers the same measurement."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from madformer.config import load_experiment
from madformer.config.evaluation import SHIPPED_NETWORKS
from madformer.evaluation.measurement import (
    METRICS,
    Measurement,
    Sampling,
    all_samplings,
    higher_is_better,
    metric_key,
    metric_name,
)
from madformer.evaluation.metrics import _COMPUTE
from madformer.evaluation.tasks import Task
from tests.conftest import ROOT
from tests.points import point

MAIN = Sampling(nfe=32, steps=4)


@pytest.mark.parametrize("label", ["inception", "digits", "fd_kid"])
def test_names_of_metrics_are_read_back(label):
    assert [metric_key(metric_name(key, label)) for key in METRICS] == list(METRICS)
    assert [higher_is_better(metric_name(key, label)) for key in METRICS] == [m.higher_is_better for m in METRICS.values()]


@pytest.mark.parametrize(("label", "names"), [("inception", ["fid", "kid"]), ("digits", ["fd_digits", "kid_digits"])])
def test_names_of_held_out_distances_are_read_back(label, names):
    held_out = [metric_name(key, label, held_out=True) for key, metric in METRICS.items() if metric.is_distance]
    assert held_out == [f"{name}_held_out" for name in names]
    assert [metric_key(name) for name in held_out] == ["fd", "kid"] and not any(map(higher_is_better, held_out))


def test_what_is_no_metric_has_no_key():
    assert [metric_key(name) for name in ("loss", "fd", "fidelity", "nfe")] == [None] * 4


def test_every_metric_is_computed():
    assert set(_COMPUTE) == {key for key, metric in METRICS.items() if not metric.needs_pairs}


def test_a_key_names_the_samples_and_a_curve_key_the_curve():
    assert replace(MAIN, nfe=35).key == MAIN.key, "budgets of as many steps have the same samples"
    main = replace(MAIN, guidance=2.0)  # without guidance its interval means nothing
    changes = {"steps": 5, "sampler": "unipc", "spacing": "power:2", "guidance": 1.5, "guidance_interval": "100/900"}
    changes |= {"weights": "model", "seed": 1, "diffusion_depth": 4}
    assert set(changes) == {field.name for field in fields(Sampling)} - {"nfe"}
    for name, value in changes.items():
        other = replace(main, **{name: value})
        assert other.key != main.key, name
        assert (other.curve_key == main.curve_key) == (name in ("steps", "seed")), name
    assert Sampling(32, 4, guidance=1, spacing="power:1.0", guidance_interval="100/900").key == MAIN.key


def test_all_combinations_of_axes_come_with_budgets_fastest():
    budgets = [MAIN, replace(MAIN, nfe=64, steps=8)]
    found = all_samplings(budgets, {"sampler": ("ddim", "unipc"), "guidance": (), "seed": (0, 1)})
    assert [(each.sampler, each.seed, each.nfe) for each in found] == [
        (sampler, seed, nfe) for sampler in ("ddim", "unipc") for seed in (0, 1) for nfe in (32, 64)
    ]
    assert all_samplings(budgets, {}) == tuple(budgets)


def test_an_interrupted_evaluation_finds_its_features_in_later_versions():
    recorded = point(32, 1.0, feature_networks=[{"name": "digits", "label": "digits", "width": 64, "sha256": "0c"}])
    guided = {**recorded, "prompts": "ab", "guidance": 1.5}
    config = load_experiment(ROOT / "experiments/digits.yaml")
    folders = [Task(config, Path(), Sampling.of_point(each), (), each).folder.name for each in (recorded, guided)]
    assert folders == ["6befc7401b5f466f", "01117e2f2b72d6be"], "as in version 0.1.0"


def test_a_measurement_matches_as_far_as_it_is_known():
    recorded = Measurement.of_point(point(32, 1.0))
    expected = Measurement(MAIN, 1024, (("digits", SHIPPED_NETWORKS["digits"]),))
    assert expected.matches(recorded) and replace(expected, feature_networks=(("digits", None),)).matches(recorded)
    assert replace(expected, feature_networks=(("moved", SHIPPED_NETWORKS["digits"]),)).matches(recorded)
    assert replace(expected, held_out=False).matches(recorded)
    references = [*point(32, 1.0)["references"], {"source": "digits", "images": 360, "sha256": "0f", "held_out": True}]
    both = Measurement.of_point(point(32, 1.0, references=references))
    assert replace(expected, held_out=True).matches(both) and expected.matches(both)
    assert not replace(expected, held_out=False).matches(both) and both.key != recorded.key
    others = [
        {"held_out": True},
        {"feature_networks": (("digits", "ff"),)},
        {"feature_networks": (("other", None),)},
        {"feature_networks": ()},
        {"num_samples": 9},
        {"sampling": replace(MAIN, nfe=33)},
        {"weights_sha256": "ff"},
        {"prompts": "ff"},
    ]
    assert not any(replace(expected, **other).matches(recorded) for other in others)
