"""The record of evaluations: what is written is read, whatever a crash leaves."""

import json
import logging
import math
import re
import subprocess
import sys

import pytest

from madformer.config import InputError
from madformer.evaluation.record import IDENTITY, append_point, find_point, latest_points, read_points, record_path
from tests.conftest import ROOT
from tests.points import point, recorded


def test_what_is_appended_is_read_in_order(tmp_path):
    points = [point(32, 30.1), point(16, 72.0), point(32, 29.9)]
    for entry in points:
        append_point(tmp_path, entry)
    assert read_points(tmp_path) == points


def test_a_run_without_evaluations_has_no_points(tmp_path):
    assert read_points(tmp_path) == [] and latest_points([]) == []


def test_lines_of_other_kinds_are_no_points(tmp_path):
    recorded(tmp_path, point(16, 72.0), {"kind": "mean", "nfe": 16}, {"note": "by hand"})
    assert read_points(tmp_path) == [point(16, 72.0)]


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
    with pytest.raises(InputError, match=r"line 1: a point without sampler, time"):
        read_points(recorded(tmp_path, entry))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_recorded(tmp_path, value):
    append_point(tmp_path, point(16, 72.0))
    before = record_path(tmp_path).read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"NFE 32 is not finite: {{'fd_digits': {value}}}")):
        append_point(tmp_path, point(32, value))
    assert record_path(tmp_path).read_bytes() == before


@pytest.mark.parametrize("key", IDENTITY)
def test_every_key_of_the_identity_tells_two_points_apart(key):
    other = {"fid": 3.0} if key == "metrics" else "another"
    assert find_point([point(32, 30.1)], {**point(32, 30.1), key: other}) is None


def test_the_last_of_equal_points_is_found_whatever_else_differs():
    points = [point(32, 30.1), point(32, 29.0, batch_size=8, threads=2, device="cuda"), point(16, 72.0)]
    wanted = {**{key: points[0][key] for key in IDENTITY}, "guidance": 1, "metrics": ["fd_digits"]}
    assert find_point(points, wanted) is points[1]


def test_the_latest_points_are_the_newest_checkpoint_s_by_nfe():
    points = [point(64, 9.0, step=2000), point(16, 7.0, step=2000), point(32, 1.0), point(16, 8.0, step=2000)]
    assert [(entry["nfe"], entry["metrics"]["fd_digits"]) for entry in latest_points(points)] == [(16, 8.0), (64, 9.0)]


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([point(16, 1.0), point(32, 2.0), point(32, 3.0, num_samples=50_000)], [1.0, 2.0]),
        ([point(16, 1.0), point(32, 2.0), point(16, 3.0, seed=1), point(32, 4.0, seed=1)], [3.0, 4.0]),
        ([point(16, 1.0, seed=1), point(16, 2.0), point(16, 3.0, seed=1)], [3.0]),
        ([point(16, 1.0), point(16, 2.0, weights="model"), point(32, 3.0, weights="model")], [1.0]),
    ],
    ids=["most budgets", "last", "measured again", "moving average"],
)
def test_points_measured_differently_are_never_one_curve(points, chosen):
    assert [entry["metrics"]["fd_digits"] for entry in latest_points(points)] == chosen


def test_reading_records_imports_nothing_heavy():
    code = (
        "import sys, madformer.evaluation.record, madformer.report, madformer.evaluation.curves\n"
        "print([name for name in ('torch', 'matplotlib', 'diffusers', 'lightning') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout == "[]\n"
