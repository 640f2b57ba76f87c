"""Tuning: the choice is the best of what was tried, is confirmed on fresh seeds, is shared by seeds, and survives a kill."""

import json
from dataclasses import replace

import pytest

from madformer.config import load_run
from madformer.errors import InputError
from madformer.evaluation.measurement import Measurement, Sampling
from madformer.evaluation.record import (
    SEARCH_SEED,
    confirmation_seeds,
    find_tuning,
    read_points,
    record_path,
    run_curves,
    search_samples,
    tuned_curves,
)
from madformer.evaluation.request import parse_request, parse_sampling
from madformer.evaluation.tune import TuningRequest, tune
from tests.evaluation.test_evaluate import make_run, pleased, save_random_checkpoint
from tests.tiny_runs import command, perform

TRIES = 5


def make_design(folder, *overrides, seeds=(0,)):
    """Runs of one design with random weights."""
    folder.mkdir(exist_ok=True)
    network = pleased(folder)
    made = (make_run(folder, network, f"name=s{seed}", f"seed={seed}", *overrides, seed=seed)[0] for seed in seeds)
    return tuple(load_run(config.run_dir) for config in made)


def candidates(config):
    return read_points(config.run_dir, "candidate")


def distance(point):
    return next(iter(point["metrics"].values()))


def lines(config):
    return [json.loads(line) for line in record_path(config.run_dir).read_text().splitlines()]


def without_time(line):
    return {key: value for key, value in line.items() if key != "time"}


def test_the_best_of_the_search_is_confirmed_on_fresh_seeds_and_recorded(tmp_path):
    [config] = make_design(tmp_path)
    perform(command("tune", config.run_dir, "--nfe", "5,7", "--tries", TRIES))
    for nfe in (5, 7):
        choice, default = find_tuning(config.run_dir, nfe), Sampling.of_nfe(config, nfe)
        tried = {}
        for point in candidates(config):
            if (point["nfe"], point["seed"]) == (nfe, SEARCH_SEED):
                assert point["num_samples"] == search_samples(config.evaluation.num_samples) == 4
                tried[Sampling.of_point(point).curve_key] = distance(point)
        assert default.curve_key in tried and len(tried) == choice["tries"] <= choice["most_tries"] == TRIES
        best = Sampling(nfe, default.steps, **choice["best_of_search"])
        assert tried[best.curve_key] == min(tried.values())
        confirmed = {
            key: [point for point in candidates(config) if point["nfe"] == nfe and Sampling.of_point(point).curve_key == key]
            for key in (best.curve_key, default.curve_key)
        }
        for key, measured in confirmed.items():
            confirmed[key] = [point for point in measured if point["seed"] != SEARCH_SEED]
            assert tuple(point["seed"] for point in confirmed[key]) == confirmation_seeds(1)
            assert {point["num_samples"] for point in confirmed[key]} == {config.evaluation.num_samples}
        if best != default:
            pairs = zip(confirmed[best.curve_key], confirmed[default.curve_key], strict=True)
            assert choice["differences"] == [distance(one) - distance(other) for one, other in pairs]
            assert choice["sampling"] == (best if choice["difference"] < 0 else default).curve_fields
        points = [point for point in read_points(config.run_dir) if point["nfe"] == nfe]
        chosen = Sampling(nfe, default.steps, **choice["sampling"])
        for sampling in (chosen, default):
            found = [point["seed"] for point in points if Sampling.of_point(point).curve_key == sampling.curve_key]
            assert tuple(found) == confirmation_seeds(1)
        tuned = [point for point in points if point.get("tuned")]
        assert {Sampling.of_point(point).curve_key for point in tuned} == {Sampling(nfe, 1, **choice["sampling"]).curve_key}
        assert {point["tries"] for point in tuned} == {choice["tries"]}
    curve = tuned_curves(config.run_dir)[0]
    assert curve.is_tuned and list(curve.points) == [5, 7]
    [fixed] = run_curves(config.run_dir)
    assert fixed.sampling.curve_key == default.curve_key, "samplings of one budget alone are no curves of their own"


def test_a_killed_search_goes_on_and_a_finished_one_does_nothing(tmp_path):
    [config] = make_design(tmp_path)
    request = TuningRequest((config,), (5,), TRIES)
    tune(request)
    whole, choice = lines(config), find_tuning(config.run_dir, 5)
    tune(request)
    assert lines(config) == whole
    survivors = {2, 0}  # as if it had died after so many tries
    order = [number for number, line in enumerate(whole) if line["kind"] == "candidate"]
    kept = [whole[number] for number in order if order.index(number) in survivors]
    record_path(config.run_dir).write_text("".join(json.dumps(line) + "\n" for line in kept))
    tune(request)
    assert without_time(find_tuning(config.run_dir, 5)) == without_time(choice)
    again = candidates(config)
    assert [Measurement.of_point(point).key for point in again[:2]] == [Measurement.of_point(point).key for point in kept]
    assert len(again) == len(order) and lines(config)[:2] == kept, "what was measured is not measured again"


def test_seeds_share_one_choice_and_a_later_one_takes_it_over(tmp_path):
    design = make_design(tmp_path, seeds=(0, 1, 2))
    tune(TuningRequest(design[:2], (5,), TRIES))
    choices = [find_tuning(config.run_dir, 5) for config in design[:2]]
    assert choices[0] == choices[1] and choices[0]["runs"] == ["s0", "s1"]
    if choices[0]["differences"]:
        assert len(choices[0]["differences"]) == 2 * len(confirmation_seeds(2))
    before = [lines(config) for config in design[:2]]
    tune(TuningRequest(design, (5,), TRIES))
    late = find_tuning(design[2].run_dir, 5)
    assert (late["sampling"], late["tries"]) == (choices[0]["sampling"], choices[0]["tries"])
    assert [lines(config) for config in design[:2]] == before
    assert {point["seed"] for point in candidates(design[2])} == set(confirmation_seeds(2)), "it searches nothing"
    assert [point["seed"] for point in tuned_curves(design[2].run_dir)[0].points[5]] == list(confirmation_seeds(2))
    tune(TuningRequest(design, (5,), TRIES + 1))  # more tries are another search, over all of them
    assert find_tuning(design[0].run_dir, 5)["runs"] == ["s0", "s1", "s2"]


def test_a_winner_that_does_not_hold_makes_way_for_the_default(tmp_path):
    [config] = make_design(tmp_path)
    request, default = TuningRequest((config,), (5,), TRIES), Sampling.of_nfe(config, 5)

    def tune_with(of_default, is_of_search):
        """As if the default had this distance and all others 10."""
        tune(request)
        found = [line for line in lines(config) if line["kind"] == "candidate"]
        for line in found:
            if (line["seed"] == SEARCH_SEED) == is_of_search:
                is_default = Sampling.of_point(line).curve_key == default.curve_key
                line["metrics"] = dict.fromkeys(line["metrics"], of_default if is_default else 10.0 + line["seed"] / 1e4)
        record_path(config.run_dir).write_text("".join(json.dumps(line) + "\n" for line in found))
        tune(request)

    tune_with(20.0, is_of_search=True)  # the search was lucky with another sampling
    tune_with(5.0, is_of_search=False)
    choice = find_tuning(config.run_dir, 5)
    assert choice["best_of_search"] != default.curve_fields == choice["sampling"]
    assert choice["difference"] > choice["half_width"]
    assert all(Sampling.of_point(point).curve_key == default.curve_key for point in tuned_curves(config.run_dir)[0].points[5])


def test_guidance_is_tuned_where_there_is_something_to_guide_towards(tmp_path):
    text = ["model.text.vocab_size=2048", "model.text.pad_token_id=0", "model.text.length=4", "data.tokenizer=builtin"]
    [config] = make_design(tmp_path, *text)
    tune(TuningRequest((config,), (5,), 12))
    tried = [Sampling.of_point(point) for point in candidates(config)]
    assert len({sampling.guidance for sampling in tried}) > 2
    assert any(sampling.guidance_interval != "all" for sampling in tried)


def test_runs_tuned_apart_take_the_first_ones_choice_when_tuned_together(tmp_path):
    design = make_design(tmp_path, seeds=(0, 1))
    for config, tries in zip(design, (TRIES, 1), strict=True):  # the second one knows only the default
        tune(TuningRequest((config,), (5,), tries))
    tune(TuningRequest(design, (5,), 1))
    first, second = (find_tuning(config.run_dir, 5) for config in design)
    assert first["sampling"] == second["sampling"]
    curves = [tuned_curves(config.run_dir)[0].sampling.curve_key for config in design]
    assert curves[0] == curves[1]


def test_minutes_end_the_search_but_not_the_confirmation(tmp_path):
    [config] = make_design(tmp_path)
    tune(TuningRequest((config,), (5, 7), 20, minutes=0.0))
    for nfe in (5, 7):
        choice = find_tuning(config.run_dir, nfe)
        assert choice["tries"] == 1 and choice["sampling"] == choice["default"]
    assert [len(points) for points in tuned_curves(config.run_dir)[0].points.values()] == [3, 3]
    tune(TuningRequest((config,), (5,), TRIES))
    assert find_tuning(config.run_dir, 5)["tries"] > 1, "a search that time has ended is no search of so many tries"


def test_tuned_is_the_choice_of_its_budget(tmp_path):
    [config] = make_design(tmp_path)
    with pytest.raises(InputError, match=r"--tuned: .*s0 is not tuned at NFE 5; madformer tune .*s0 --nfe 5"):
        parse_request(config, nfe="5", tuned=True)
    tune(TuningRequest((config,), (5,), TRIES))
    chosen = Sampling(5, 2, **find_tuning(config.run_dir, 5)["sampling"])
    assert parse_request(config, nfe="5", tuned=True, axes={"seed": "7"}).samplings == (replace(chosen, seed=7),)
    assert parse_sampling(config, 2, None, 5, tuned=True).sampling == chosen
    with pytest.raises(InputError, match=r"--weights and --tuned: give one of them"):
        parse_request(config, nfe="5", tuned=True, weights="model")
    with pytest.raises(InputError, match=r"--spacing and --tuned: give one of them"):
        parse_request(config, nfe="5", tuned=True, axes={"spacing": "logsnr"})
    perform(command("evaluate", config.run_dir, "--nfe", "5", "--tuned", "--seeds", "7"))
    assert [point["seed"] for point in tuned_curves(config.run_dir)[0].points[5]] == [*confirmation_seeds(1), 7]
    printed = perform(command("sample", config.run_dir, "--nfe", "5", "--tuned", "--num", "2", "--out", tmp_path / "out"))
    assert "2 samples" in printed
    perform(command("sample", config.run_dir, "--nfe", "7", "--tuned", "--out", tmp_path / "out"), status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.num_samples=4"], "evaluation.num_samples=4: name a run or a SWEEP.yaml before overrides"),
        (["{run}", "--nfe", "2"], "nfe = 2: too small for one denoising step"),
        (["{run}", "optimizer.lr=1"], "is a run of another experiment: optimizer.lr"),
        (["nowhere"], "nowhere: not a run"),
        (["{run}", "{run}"], "named 2 times"),
        (["{run}", "{other}"], "differ in model.width"),
        (["{run}", "{ahead}"], "has its newest checkpoint at step 6"),
        (["{run}", "evaluation.feature_networks=[]"], "evaluation.feature_networks = []: nothing to measure with"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, arguments, message):
    [config] = make_design(tmp_path)
    other, _, _ = make_run(tmp_path, "name=other", "model.width=32")
    ahead, _, _ = make_run(tmp_path, pleased(tmp_path), "name=ahead", "seed=1", steps=(6, 12))
    before = record_path(config.run_dir).exists()
    words = [word.format(run=config.run_dir, other=other.run_dir, ahead=ahead.run_dir) for word in arguments]
    printed = perform(command("tune", *words), status=2)
    assert message in printed and len(printed.strip().splitlines()) == 1
    assert record_path(config.run_dir).exists() == before


def test_a_new_checkpoint_is_tuned_anew(tmp_path):
    [config] = make_design(tmp_path)
    tune(TuningRequest((config,), (5,), TRIES))
    save_random_checkpoint(config, 12)
    tune(TuningRequest((config,), (5,), TRIES))
    assert find_tuning(config.run_dir, 5)["step"] == 12
    assert {point["step"] for points in tuned_curves(config.run_dir)[0].points.values() for point in points} == {12}
