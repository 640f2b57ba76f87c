"""The record of evaluations: what is written is read, whatever a crash leaves."""

import json
import logging
import math
import re
import subprocess
import sys

import pytest

from madformer.errors import InputError
from madformer.evaluation.measurement import Measurement, Sampling
from madformer.evaluation.record import (
    append_point,
    curves_by_sampling,
    find_point,
    mean_known,
    newest_diagnostics,
    read_diagnostics,
    read_means,
    read_points,
    record_path,
    run_curves,
)
from tests.conftest import ROOT
from tests.points import at, diagnostics, mean, point, recorded


def values(curve):
    """Budget -> what was measured there."""
    return {nfe: [entry["metrics"]["fd_digits"] for entry in points] for nfe, points in curve.points.items()}


def test_what_is_appended_is_read_in_order(tmp_path):
    points = [point(32, 30.1), point(16, 72.0), point(32, 29.9)]
    for entry in points:
        append_point(tmp_path, entry)
    assert read_points(tmp_path) == points


def test_a_run_without_evaluations_has_no_points(tmp_path):
    assert read_points(tmp_path) == [] and run_curves(tmp_path) == [] and newest_diagnostics(tmp_path) is None


def test_every_kind_of_line_is_read_alone(tmp_path):
    summary = mean([point(16, 72.0), point(16, 74.0, seed=1)])
    recorded(tmp_path, point(16, 72.0), summary, {"note": "by hand"}, diagnostics())
    assert read_points(tmp_path) == [point(16, 72.0)]
    assert read_means(tmp_path) == [summary] and summary["metrics"] == {"fd_digits": 73.0}
    assert read_diagnostics(tmp_path) == [diagnostics()]


def test_a_torn_last_line_is_left_out_and_the_next_point_takes_its_place(tmp_path, caplog):
    first, torn, third = point(16, 72.0), point(32, 30.1), point(64, 20.0)
    path = record_path(tmp_path)
    whole = json.dumps(first) + "\n"
    text = json.dumps(torn)
    for length in range(1, len(text), 7):
        path.write_text(whole + text[:length])
        with caplog.at_level(logging.WARNING):
            assert read_points(tmp_path) == [first]
        assert f"{path}: the last line is torn" in caplog.text
        append_point(tmp_path, third)
        assert path.read_text() == whole + json.dumps(third) + "\n"
        caplog.clear()


def test_a_last_line_that_lacks_its_newline_alone_is_kept(tmp_path, caplog):
    record_path(tmp_path).write_text(json.dumps(point(16, 72.0)))
    assert read_points(tmp_path) == [point(16, 72.0)] and not caplog.text
    append_point(tmp_path, point(32, 30.1))
    assert read_points(tmp_path) == [point(16, 72.0), point(32, 30.1)]


@pytest.mark.parametrize("broken", [b'{"kind": "po', b"[1, 2]", b"3", b"\xff\x00"], ids=["torn", "list", "number", "binary"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = record_path(recorded(tmp_path, point(16, 72.0)))
    with path.open("ab") as file:
        file.write(broken + b"\n")
    recorded(tmp_path, point(32, 30.1))
    with pytest.raises(InputError, match=re.escape(f"{path}, line 2: not a JSON object")):
        read_points(tmp_path)


def test_a_point_without_a_key_is_named(tmp_path):
    entry = point(16, 72.0)
    del entry["sampler"], entry["time"]
    recorded(tmp_path, entry, {"kind": "mean", "nfe": 16}, {"kind": "diagnostics", "step": 10})
    with pytest.raises(InputError, match=r"line 1: a point line without sampler, time; delete the line"):
        read_points(tmp_path)
    with pytest.raises(InputError, match=r"line 2: a mean line without checkpoints, codec, "):
        read_means(tmp_path)
    with pytest.raises(InputError, match=r"line 3: a diagnostics line without condition_explains, exposure, "):
        read_diagnostics(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_recorded(tmp_path, value):
    append_point(tmp_path, point(16, 72.0))
    before = record_path(tmp_path).read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"NFE 32 is not finite: {{'fd_digits': {value}}}")):
        append_point(tmp_path, point(32, value))
    assert record_path(tmp_path).read_bytes() == before


OTHERS = {
    "steps": 5,
    "weights_sha256": "ff",
    "weights": "model",
    "sampler": "unipc",
    "guidance": 1.5,
    "num_samples": 9,
    "seed": 1,
    "prompts": "ab",
    "precision": "bf16-mixed",
    "codec": {"name": "pixels", "sha256": "0e", "dtype": "bfloat16"},
    "references": [{"source": "digits", "images": 1797, "sha256": "ff"}],
    "feature_networks": [{"name": "digits", "label": "digits", "width": 64, "sha256": "ff"}],
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_decides_a_number_tells_two_points_apart(key):
    other = Measurement.of_point(point(32, 30.1, **{key: OTHERS[key]}))
    assert find_point([point(32, 30.1)], other) is None
    assert find_point([point(32, 30.1, **{key: OTHERS[key]})], other) is not None


def test_places_and_names_do_not_tell_points_apart():
    moved = {**point(33, 30.1), "steps": 4, "codec": {"name": "vae:elsewhere", "sha256": "0e", "dtype": "float32"}}
    assert find_point([point(32, 30.1)], Measurement.of_point(moved)) is not None


def test_the_last_of_equal_points_is_found_whatever_else_differs():
    points = [point(32, 30.1), point(32, 29.0, batch_size=8, threads=2, device="cuda"), point(16, 72.0)]
    wanted = Measurement.of_point({**points[0], "guidance": 1})
    assert find_point(points, wanted) is points[1]


def test_the_curve_is_the_newest_checkpoint_s_by_nfe(tmp_path):
    recorded(tmp_path, point(64, 9.0, **at(2000)), point(16, 7.0, **at(2000)), point(32, 1.0), point(16, 8.0, **at(2000)))
    [curve] = run_curves(tmp_path)
    assert list(values(curve).items()) == [(16, [8.0]), (64, [9.0])]
    assert curve.metrics == ("fd_digits",) and curve.sampling.curve_key == Sampling(1, 1).curve_key


@pytest.mark.parametrize(
    ("points", "main"),
    [
        ([point(16, 1.0), point(32, 2.0), point(32, 3.0, prompts="ab")], {16: [1.0], 32: [2.0]}),
        (
            [point(16, 1.0), point(16, 2.0, num_samples=9), point(32, 3.0, num_samples=9), point(32, 4.0)],
            {16: [1.0], 32: [4.0]},
        ),
        ([point(16, 1.0), point(16, 2.0, sampler="unipc")], {16: [1.0]}),
        ([point(16, 1.0), point(16, 2.0, num_samples=9), point(16, 3.0)], {16: [3.0]}),
        ([point(16, 1.0), point(16, 2.0, num_samples=9), point(32, 2.0, num_samples=9)], {16: [1.0]}),
        ([point(16, 1.0), point(16, 2.0, weights="model"), point(32, 3.0, weights="model")], {16: [1.0]}),
        ([point(16, 1.0), point(16, 2.0, weights_sha256="ff")], {16: [2.0]}),
    ],
    ids=["most budgets", "last", "first sampler", "measured again", "most samples", "moving average", "trained again"],
)
def test_points_measured_differently_are_never_one_curve(tmp_path, points, main):
    assert values(run_curves(recorded(tmp_path, *points))[0]) == main


def test_seeds_stand_side_by_side(tmp_path):
    recorded(tmp_path, point(16, 1.0), point(16, 2.0, seed=1), point(32, 3.0), point(16, 4.0, seed=1))
    assert [values(curve) for curve in run_curves(tmp_path)] == [{16: [1.0, 4.0], 32: [3.0]}]


def test_checkpoints_of_the_last_mean_stand_side_by_side_while_it_has_the_newest(tmp_path):
    old, new, newer = ([point(nfe, step / 1000, **at(step)) for nfe in (16, 32)] for step in (1000, 2000, 3000))
    recorded(tmp_path, *old, new[0])
    assert values(run_curves(tmp_path)[0]) == {16: [2.0]}, "without a mean, stages of training do not mix"
    recorded(tmp_path, mean([old[0], new[0]]))
    assert values(run_curves(tmp_path)[0]) == {16: [1.0, 2.0]}, "a budget that the newest lacks is left out"
    recorded(tmp_path, newer[0])
    assert values(run_curves(tmp_path)[0]) == {16: [3.0]}, "the mean is of an older stage"
    recorded(tmp_path, mean([new[0], newer[0]]), mean([point(16, 1.0, sampler="unipc"), point(16, 2.0, sampler="unipc")]))
    assert values(run_curves(tmp_path)[0]) == {16: [2.0, 3.0]}, "another curve's mean says nothing of this one"
    recorded(tmp_path, point(16, 3.5, seed=1, **at(3000)), mean([newer[0], point(16, 3.5, seed=1, **at(3000))]))
    assert values(run_curves(tmp_path)[0]) == {16: [3.0, 3.5]}, "the last mean is of the newest alone"


def test_a_curve_of_an_older_step_is_left_out(tmp_path):
    recorded(tmp_path, point(16, 1.0, sampler="unipc"), point(32, 1.0, sampler="unipc"), point(16, 2.0, **at(2000)))
    assert [values(curve) for curve in run_curves(tmp_path)] == [{16: [2.0]}]


def test_curves_are_one_for_each_way_to_sample_and_named_by_what_differs(tmp_path):
    recorded(tmp_path, point(16, 1.0), point(32, 1.0), point(16, 2.0, num_samples=9, metrics={"fid": 2.0, "fd_digits": 2.0}))
    recorded(tmp_path, point(16, 3.0, sampler="unipc"), point(16, 4.0, guidance=1.5, weights="model"))
    curves = run_curves(tmp_path)
    main = curves[0].sampling
    assert [values(curve)[16] for curve in curves_by_sampling(curves, "fd_digits")] == [[1.0], [3.0], [4.0]]
    assert [values(curve)[16] for curve in curves_by_sampling(curves, "fid")] == [[2.0]]
    assert [curve.sampling.difference(main) for curve in curves] == ["", "unipc", "", "guidance 1.5, raw weights"]
    assert main.difference(curves[-1].sampling) == "guidance 1, EMA weights"


def test_a_curve_has_the_metrics_of_all_its_points(tmp_path):
    recorded(tmp_path, point(16, 0, metrics={"fid": 1.0, "precision": 0.5}), point(32, 0, metrics={"fid": 2.0, "kid": 1.0}))
    [curve] = run_curves(tmp_path)
    assert curve.metrics == ("fid",)


def test_the_newest_diagnostics_are_the_last_of_the_newest_checkpoint(tmp_path):
    recorded(tmp_path, *(diagnostics(scale, **at(step)) for scale, step in ((1, 2000), (2, 2000), (3, 1000))))
    newest = newest_diagnostics(tmp_path)
    assert newest is not None and newest["loss_by_block"] == [0.75, 0.5]


def test_diagnostics_that_are_not_finite_are_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="the diagnostics at NFE 32 is not finite"):
        append_point(tmp_path, diagnostics(math.nan))
    assert not record_path(tmp_path).exists()


def test_the_mean_of_what_is_not_known_throughout_is_not_known():
    assert mean_known([1.0, 3.0]) == 2.0 and mean_known([1.0, None]) is None


def test_reading_records_imports_nothing_heavy():
    code = (
        "import sys, madformer.evaluation.record, madformer.report, madformer.evaluation.tensorboard\n"
        "print([name for name in ('torch', 'matplotlib', 'diffusers', 'lightning') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout == "[]\n"
