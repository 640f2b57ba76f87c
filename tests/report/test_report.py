"""Reports: every cell of a small one, the files, the picture."""

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from madformer.config import ExperimentConfig, InputError, freeze
from madformer.report import Curve, Report, build_report, curves_of_runs, write_report
from madformer.report.figure import draw
from madformer.report.table import natural, number
from tests.points import point, recorded

SMALL = """\
## Digits

- Metric fd_digits, lower is better; 1 seed each.
- 1,024 samples a point; ddim sampler; guidance 1.0; ema weights; training step 1,000.
- FLOPs are counted from the configuration; seconds were measured on cpu (1 thread).

| fd_digits ↓ | NFE 16 | NFE 32 | NFE 128 |
| --- | ---: | ---: | ---: |
| d2 | **72.2** | 30.1 | **4.57** |
| d16 | 1,323 | **30.0** | – |

|  | NFE | steps | seeds | fd_digits | GFLOPs / image | ms / image |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| d2 | 16 | 2 | 1 | 72.2 | 0.00800 | 4.00 |
| d2 | 32 | 4 | 1 | 30.1 | 0.0160 | 8.00 |
| d2 | 128 | 16 | 1 | 4.57 | 0.0640 | 32.0 |
| d16 | 16 | 2 | 1 | 1,323 | 0.00800 | 4.00 |
| d16 | 32 | 4 | 1 | 30.0 | 0.0160 | 8.00 |
"""


def curve(root: Path, label: str, *points: dict[str, Any], seed: int = 0) -> Curve:
    run = recorded(root / f"{label}-s{seed}", *points)
    return Curve(label, run, {"model.diffusion_depth": int(label.removeprefix("d"))}, seed)


def small(root: Path) -> Report:
    return build_report(
        [
            curve(root, "d16", point(16, 1323.4), point(32, 30.04)),
            curve(root, "d2", point(16, 72.25), point(32, 30.06), point(128, 4.567)),
        ],
        "Digits",
    )


def seeds(root: Path) -> Report:
    """Two seeds of d2, of which one lacks a budget, and one of d4."""
    first = curve(root, "d2", point(16, 70.0), point(32, 30.0, seconds_per_image=0.001))
    second = curve(root, "d2", point(16, 75.0, seconds_per_image=0.006), seed=1)
    return build_report([second, curve(root, "d4", point(16, 72.0), point(32, 31.0)), first], "Seeds")


def test_a_small_report_to_the_letter(tmp_path):
    assert small(tmp_path).markdown() == SMALL


def test_seeds_become_a_mean_and_its_extremes(tmp_path):
    report = seeds(tmp_path)
    assert report.rows[0].mean == 72.5 and report.rows[0].seconds == 0.005 and report.rows[0].values == (70.0, 75.0)
    text = report.markdown()
    assert "lower is better; 1 or 2 seeds each: the mean (least – greatest)." in text
    assert "| d2 | 72.5 (70.0 – 75.0) | **30.0** |\n| d4 | **72.0** | 31.0 |" in text
    assert "| d2 | 16 | 2 | 2 | 72.5 (70.0 – 75.0) | 0.00800 | 5.00 |\n| d2 | 32 | 4 | 1 | 30.0 |" in text


def test_csv_holds_every_row_in_full_precision(tmp_path):
    rows = list(csv.DictReader(io.StringIO(seeds(tmp_path).csv())))
    assert [(row["label"], row["model.diffusion_depth"], row["nfe"], row["steps"], row["seeds"]) for row in rows] == [
        ("d2", "2", "16", "2", "2"), ("d2", "2", "32", "4", "1"), ("d4", "4", "16", "2", "1"), ("d4", "4", "32", "4", "1"),
    ]  # fmt: skip
    names = ("fd_digits", "fd_digits_min", "fd_digits_max", "tflops_per_image", "seconds_per_image")
    assert [float(rows[0][name]) for name in names] == [72.5, 70.0, 75.0, 8e-6, 0.005]


def test_what_was_not_measured_is_a_dash_and_said(tmp_path):
    points = [point(16, 72.0, seconds_per_image=None), point(32, 30.0)]
    report = build_report([curve(tmp_path, "d2", *points)], "One")
    assert "| d2 | 16 | 2 | 1 | 72.0 | 0.00800 | – |" in report.markdown()
    assert "seconds were measured for 1 of 2 points on cpu (1 thread)." in report.markdown()
    second = curve(tmp_path, "d2", point(16, 72.0), seed=1)
    assert build_report([Curve("d2", tmp_path / "d2-s0", {}, 0), second], "Two").rows[0].seconds is None
    never = build_report([curve(tmp_path, "d4", points[0])], "None")
    assert "seconds were not measured." in never.markdown()
    assert next(csv.DictReader(io.StringIO(never.csv())))["seconds_per_image"] == ""


def test_large_models_are_shown_in_tflops_and_seconds(tmp_path):
    report = build_report([curve(tmp_path, "d2", point(280, 17.83, tflops_per_image=157.2, seconds_per_image=12.345))], "Large")
    assert "| TFLOPs / image | s / image |" in report.markdown() and "| 17.8 | 157 | 12.3 |" in report.markdown()


def test_curves_that_cannot_be_compared_say_so(tmp_path):
    one, other = point(16, 72.0), point(16, 60.0, num_samples=50_000, sampler="dpm")
    text = build_report([curve(tmp_path, "d2", one), curve(tmp_path, "d4", other)], "Mixed").markdown()
    assert "- 1,024 or 50,000 samples a point; ddim or dpm sampler;" in text
    assert "**Not all points are comparable**: they differ in num_samples, sampler." in text
    assert "comparable" not in small(tmp_path / "small").markdown()


def test_the_best_is_the_greatest_where_higher_is_better(tmp_path):
    worse, better = (point(16, 0, metrics={"fid": 9.0, "precision": value}) for value in (0.25, 0.5))
    report = build_report([curve(tmp_path, "d2", worse), curve(tmp_path, "d4", better)], "Precision", "precision")
    assert "| precision ↑ | NFE 16 |\n| --- | ---: |\n| d2 | 0.250 |\n| d4 | **0.500** |" in report.markdown()


def test_a_bar_in_a_label_does_not_end_its_cell(tmp_path):
    run = recorded(tmp_path / "run", point(16, 72.0))
    assert "| a\\|b | 72.0 |" in build_report([Curve("a|b", run, {}, 0)], "Bar").markdown()


@pytest.mark.parametrize(
    "labels", [["d2", "d4", "d8", "d16"], ["d2-l4", "d2-l16", "d4-l1"], ["lr1e-4", "lr0.0003", "lr0.001"], ["4", "16", "a"]]
)
def test_labels_sort_as_one_reads_them(labels):
    backwards = labels[::-1]
    assert sorted(backwards, key=natural) == labels


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00"), (0.001234, "0.00123"), (4.567, "4.57"), (30.06, "30.1"), (132.4, "132"), (1323.4, "1,323")]
)
def test_numbers_have_three_digits_or_all_before_the_point(value, text):
    assert number(value) == text


def test_a_run_without_evaluations_names_the_command(tmp_path):
    run = tmp_path / "d2"
    run.mkdir()
    with pytest.raises(InputError, match=re.escape(f"{run}: no evaluations; make them: madformer evaluate {run}")):
        build_report([Curve("d2", run, {}, 0)], "Empty")
    with pytest.raises(InputError, match="no runs to report on"):
        build_report([], "Empty")


def test_a_metric_that_a_run_lacks_is_named(tmp_path):
    one, other = curve(tmp_path, "d2", point(16, 72.0)), curve(tmp_path, "d4", point(16, 0, metrics={"fid": 1.0}))
    with pytest.raises(InputError, match=re.escape(f"{other.run}: not evaluated with fd_digits, but fid")):
        build_report([one, other], "Metrics")


def test_any_runs_stand_side_by_side_under_their_names(tmp_path):
    paths = [tmp_path / "a/d2", tmp_path / "b/d2", tmp_path / "b/d4"]
    for seed, path in enumerate(paths):
        freeze(replace(ExperimentConfig(), seed=seed), path)
    made = curves_of_runs(paths)
    assert [(entry.label, entry.run, entry.seed) for entry in made] == [
        ("a/d2", paths[0], 0), ("b/d2", paths[1], 1), ("d4", paths[2], 2),
    ]  # fmt: skip
    with pytest.raises(InputError, match="b/d2: 2 runs of this name"):
        curves_of_runs([paths[1], paths[1] / "../d2"])
    with pytest.raises(InputError, match="not a run"):
        curves_of_runs([tmp_path])


def test_the_files_of_a_report(tmp_path):
    report = small(tmp_path)
    paths = write_report(report, tmp_path / "out", "table1")
    assert [path.name for path in paths] == ["table1.md", "table1.csv", "table1.png", "table1.svg"]
    assert paths[0].read_text() == SMALL + "\n![Digits](table1.svg)\n" and paths[1].read_text() == report.csv()
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(small(tmp_path / "again"), tmp_path / "out", "table1")] == before
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_the_png_is_white_of_its_size_and_coloured(tmp_path):
    pixels = matplotlib.image.imread(io.BytesIO(draw(small(tmp_path))["png"]))
    assert pixels.shape == (760, 2000, 4) and np.all(pixels[:3, :3] == 1.0)
    colors = np.unique(np.round(pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
    assert len(colors) > 200
    lines = [[68, 1, 84], [122, 209, 81]]  # the two ends of the palette
    assert all(any(np.abs(colors - line).max(axis=1) <= 2) for line in lines)


def test_the_svg_names_labels_axes_and_budgets(tmp_path):
    svg = draw(small(tmp_path))["svg"].decode()
    root = ElementTree.fromstring(svg)
    texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("Digits", "d2", "d16", "16", "32", "128", "GFLOPs per image", "ms per image", "fd_digits (lower is better)"):
        assert text in texts
    assert texts.index("d2") < texts.index("d16") and "dc:date" not in svg and "fill: #ffffff" in svg


def test_long_labels_make_a_taller_legend(tmp_path):
    curves = [curve(tmp_path, f"d{depth}", point(16, 72.0)) for depth in range(1, 9)]
    long = [replace(entry, label=f"{entry.label}-with-a-rather-long-name") for entry in curves]
    heights = [matplotlib.image.imread(io.BytesIO(draw(build_report(each, ""))["png"])).shape[0] for each in (curves, long)]
    assert heights == [760, 848]


def test_a_band_appears_with_seeds_alone(tmp_path):
    assert "FillBetween" in draw(seeds(tmp_path))["svg"].decode()
    assert "FillBetween" not in draw(small(tmp_path / "small"))["svg"].decode()


def test_a_picture_without_seconds_says_so_and_zero_or_less_is_drawn(tmp_path):
    points = [point(16, 0.0, seconds_per_image=None), point(32, -0.5, seconds_per_image=None)]
    svg = draw(build_report([curve(tmp_path, "d2", *points)], "KID"))["svg"].decode()
    assert "not measured" in svg and "not measured" not in draw(small(tmp_path / "small"))["svg"].decode()
    assert "−0.5" in svg or "-0.5" in svg
