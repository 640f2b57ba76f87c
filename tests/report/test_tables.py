"""Reports: every cell of a small one, what is compared with what, the files."""

import csv
import io
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from madformer.cli import app
from madformer.config import ExperimentConfig, ModelConfig, write_config
from madformer.errors import InputError
from madformer.report import Curve, build_report, curves_of_runs, write_report
from madformer.report.formatting import higher_is_better, natural, number
from tests.points import at, diagnostics, mean, point, recorded
from tests.report.curves import curve, seeds, small

SMALL = """\
## Digits

**Fixed sampler**: fewer than 3 training seeds in common, nothing is tested.

- Metric fd_digits, lower is better; 1 training seed each.
- 1,024 samples a point; ddim sampler, guidance 1, EMA weights; training step 1,000.
- FLOPs are counted from the configuration; seconds were measured on cpu (1 thread).

| fd_digits ↓ | NFE 16 | NFE 32 | NFE 128 |
| --- | ---: | ---: | ---: |
| d2 | 72.2 | 30.1 | 4.57 |
| d16 | 1,323 | 30.0 | – |

### Which design for which budget

With fewer than 3 training seeds in common nothing is tested: another training may order designs otherwise.

| sampling | at | lowest fd_digits | mean | P(best) | level with it | compared |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| fixed | NFE 16 | d2 | 72.2 | – | – | all |
| fixed | NFE 32 | d16 | 30.0 | – | – | all |
| fixed | 0.00800 GFLOPs | d2 | 72.2 | – | – | all |
| fixed | 0.0113 GFLOPs | d2 | 46.6 | – | – | all |
| fixed | 0.0160 GFLOPs | d16 | 30.0 | – | – | all |
| fixed | 4.00 ms | d2 | 72.2 | – | – | all |
| fixed | 5.66 ms | d2 | 46.6 | – | – | all |
| fixed | 8.00 ms | d16 | 30.0 | – | – | all |

| designs | sampling | against | cross at | 95 % interval | resamples that cross |
| --- | ---: | ---: | ---: | ---: | ---: |
| d2 and d16 | fixed | NFE | NFE 32.0 | – | – |
| d2 and d16 | fixed | FLOPs | 0.0160 GFLOPs | – | – |
| d2 and d16 | fixed | seconds | 8.00 ms | – | – |

### Differences from d2

The design minus d2. With fewer than 3 training seeds in common nothing is tested: another training may order designs otherwise.

| design | sampling | at | difference in fd_digits | in SD | p (Holm) | seeds |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| d16 | fixed | NFE 16 | 1,251 | – | – | 1 |
| d16 | fixed | NFE 32 | -0.0200 | – | – | 1 |

### What it cost

|  | NFE | steps | seeds | fd_digits | GFLOPs / image | ms / image | ms / block | Pareto front of |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| d2 | 16 | 2 | 1 | 72.2 | 0.00800 | 4.00 | 1.00 | NFE, FLOPs, seconds |
| d2 | 32 | 4 | 1 | 30.1 | 0.0160 | 8.00 | 2.00 |  |
| d2 | 128 | 16 | 1 | 4.57 | 0.0640 | 32.0 | 8.00 | NFE, FLOPs, seconds |
| d16 | 16 | 2 | 1 | 1,323 | 0.00800 | 4.00 | 1.00 |  |
| d16 | 32 | 4 | 1 | 30.0 | 0.0160 | 8.00 | 2.00 | NFE, FLOPs, seconds |
"""


def test_a_small_report_to_the_letter(tmp_path):
    assert small(tmp_path).markdown() == SMALL


def test_two_training_seeds_are_shown_as_two_values(tmp_path):
    report = seeds(tmp_path)
    row = report.rows[0]
    assert (row.quality["fd_digits"].mean, row.quality["fd_digits"].values, row.seeds) == (72.5, (70.0, 75.0), (0, 1))
    assert row.costs["seconds"] == 0.005
    text = report.markdown()
    assert "lower is better; 1 or 2 training seeds each." in text
    assert (
        "±" not in text
        and "- Of two seeds both values are shown, in the order of the seeds: too few for an interval.\n" in text
    )
    assert "| d2 | 70.0 and 75.0 | 30.0 |\n| d4 | 72.0 | 31.0 |" in text
    assert "| d2 | 16 | 2 | 2 | 70.0 and 75.0 | 0.00800 | 5.00 | 1.00 |  |\n| d2 | 32 | 4 | 1 | 30.0 |" in text


def test_a_run_counts_once_whatever_it_was_evaluated_with(tmp_path):
    often = curve(tmp_path, "d2", point(16, 10.0), point(16, 20.0, seed=1), point(16, 30.0, seed=2))
    report = build_report([often, curve(tmp_path, "d2", point(16, 40.0), seed=1)], "Runs")
    assert report.rows[0].quality["fd_digits"].values == (20.0, 40.0)
    assert "2 training seeds, 1 or 3 evaluation seeds each" in report.markdown()


def test_evaluation_seeds_are_marked_as_saying_nothing_of_training(tmp_path):
    text = build_report([curve(tmp_path, "d2", point(16, 70.0), point(16, 75.0, seed=1))], "Evaluations").markdown()
    assert "| d2 | 70.0 and 75.0 † |" in text and "says nothing about training again" in text
    assert "1 training seed, 2 evaluation seeds each." in text and "over training seeds" not in text


def test_checkpoints_have_a_standard_deviation_and_no_interval(tmp_path):
    points = [point(16, 70.0), point(16, 74.0, **at(2000))]
    run = curve(tmp_path, "d2", *points, mean(points))
    report = build_report([run], "Checkpoints")
    assert "| d2 | 72.0 ± 2.8 ‡ |" in report.markdown()
    assert "± … ‡ is the standard deviation over checkpoints of one run, no confidence interval." in report.markdown()
    assert "1 training seed, 2 checkpoints each." in report.markdown() and "training step 1,000 or 2,000" in report.markdown()
    row = next(csv.DictReader(io.StringIO(report.csv())))
    assert (row["fd_digits_ci_low"], row["interval_over"], row["n"]) == ("", "checkpoints", "2")
    assert float(row["fd_digits_sd_over_checkpoints"]) == pytest.approx(8**0.5)


def test_csv_holds_every_row_in_full_precision(tmp_path):
    rows = list(csv.DictReader(io.StringIO(seeds(tmp_path).csv())))
    assert [(row["label"], row["model.diffusion_depth"], row["nfe"], row["steps"], row["seeds"]) for row in rows] == [
        ("d2", "2", "16", "2", "2"), ("d2", "2", "32", "4", "1"), ("d4", "4", "16", "2", "1"), ("d4", "4", "32", "4", "1"),
    ]  # fmt: skip
    names = ("fd_digits", "fd_digits_min", "fd_digits_max", "tflops_per_image", "seconds_per_image", "seconds_per_block")
    assert [float(rows[0][name]) for name in names] == [72.5, 70.0, 75.0, 8e-6, 0.005, 0.001]
    assert float(rows[0]["fd_digits_ci_low"]) == pytest.approx(40.734, abs=1e-3)
    assert float(rows[0]["fd_digits_ci_high"]) == pytest.approx(104.266, abs=1e-3)
    assert [rows[0][name] for name in ("interval_over", "n", "sampler", "guidance", "weights", "fd_digits_bias")] == [
        "training seeds", "2", "ddim", "1.0", "ema", "0.02",
    ]  # fmt: skip
    empty = ("interval_over", "fd_digits_ci_low", "fd_digits_sd_over_checkpoints", "peak_memory_gib")
    assert [rows[1][name] for name in empty] == [""] * 4 and rows[1]["n"] == "1"
    assert [[row[f"pareto_{cost}"] for row in rows] for cost in ("nfe", "flops", "seconds")] == [
        ["0", "1", "1", "0"], ["0", "1", "1", "0"], ["0", "1", "0", "0"],
    ]  # fmt: skip


def test_what_was_not_measured_is_a_dash_and_said(tmp_path):
    points = [point(16, 72.0, seconds_per_image=None, seconds_per_block=None), point(32, 30.0)]
    report = build_report([curve(tmp_path, "d2", *points)], "One")
    assert "| d2 | 16 | 2 | 1 | 72.0 | 0.00800 | – | – |" in report.markdown()
    assert "seconds were measured for 1 of 2 points on cpu (1 thread)." in report.markdown()
    second = curve(tmp_path, "d2", point(16, 72.0), seed=1)
    assert build_report([Curve("d2", tmp_path / "d2-s0", {}, 0), second], "Two").rows[0].costs["seconds"] is None
    never = build_report([curve(tmp_path, "d4", points[0])], "None")
    assert "seconds were not measured." in never.markdown() and "block" not in never.markdown()
    assert next(csv.DictReader(io.StringIO(never.csv())))["seconds_per_image"] == ""


def test_memory_is_shown_where_it_was_measured(tmp_path):
    made = {"peak_memory_gib": 12.34, "device": "NVIDIA H200", "threads": None, "processes": 8}
    text = build_report([curve(tmp_path, "d2", point(16, 72.0, **made), point(32, 72.0))], "Memory").markdown()
    assert "| ms / block | GiB at the peak |" in text and "| 1.00 | 12.3 |" in text and "| 2.00 | – |" in text
    assert "measured on NVIDIA H200 (8 processes), cpu (1 thread) and cannot be compared." in text


def test_samplers_of_one_run_stand_below_each_other(tmp_path):
    first = curve(tmp_path, "d4", point(16, 72.0), point(16, 60.0, sampler="unipc"), point(16, 50.0, guidance=1.5))
    second = curve(tmp_path, "d16", point(16, 42.0, sampler="unipc"), point(16, 41.0), point(16, 40.0, weights="model"))
    report = build_report([first, second], "Samplers")
    assert (
        "| d4 | 72.0 |\n| d4 · guidance 1.5 | 50.0 |\n| d4 · unipc | 60.0 |\n"
        "| d16 | 41.0 |\n| d16 · raw weights | 40.0 |\n| d16 · unipc | 42.0 |" in report.markdown()
    )
    assert "ddim sampler, guidance 1, EMA weights unless a label says otherwise" in report.markdown()
    assert "comparable" not in report.markdown()
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert [(row["sampler"], row["guidance"], row["weights"]) for row in rows[:2]] == [
        ("ddim", "1.0", "ema"), ("ddim", "1.5", "ema"),
    ]  # fmt: skip


def test_other_metrics_have_a_table_of_their_own(tmp_path):
    metrics = [{"fid": 9.0, "kid": 0.5, "precision": 0.75}, {"fid": 8.0, "kid": 0.25}]
    curves = [curve(tmp_path, f"d{index}", point(16, 0, metrics=entry)) for index, entry in enumerate(metrics)]
    report = build_report(curves, "Many")
    expected = (
        "### Other metrics\n\n|  | NFE | kid ↓ | precision ↑ |\n| --- | ---: | ---: | ---: |\n"
        "| d0 | 16 | 0.500 | 0.750 |\n| d1 | 16 | 0.250 | – |\n"
    )
    assert expected in report.markdown() and "Other metrics" not in small(tmp_path / "small").markdown()
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert [(row["fid"], row["kid"], row["precision"]) for row in rows] == [("9.0", "0.5", "0.75"), ("8.0", "0.25", "")]
    assert "| kid ↓ | NFE 16 |" in build_report(curves, "Chosen", "kid").markdown()


def test_a_bias_that_matters_is_mentioned(tmp_path):
    points = [
        point(16, 0, metrics={"fid": 40.0, "kid": 1.0}, bias={"fid": 1.93}),
        point(32, 0, metrics={"fid": 16.0, "kid": 1.0}, bias={"fid": 1.95}),
    ]
    text = build_report([curve(tmp_path, "d2", *points)], "Bias").markdown()
    assert (
        "Of fid, about 1.9 are the bias of 1,024 samples, which perfect ones would have too: "
        "more than 5 % of 1 of 2 values, up to 12 % (d2 at NFE 32)." in text
    ) and "Of kid" not in text
    assert "bias" not in small(tmp_path / "small").markdown()


def test_large_models_are_shown_in_tflops_and_seconds(tmp_path):
    report = build_report([curve(tmp_path, "d2", point(280, 17.83, tflops_per_image=157.2, seconds_per_image=12.345))], "Large")
    assert "| TFLOPs / image | s / image |" in report.markdown() and "| 17.8 | 157 | 12.3 |" in report.markdown()
    assert report.unit("seconds_per_block").title == "ms per block"


def test_curves_that_cannot_be_compared_say_so(tmp_path):
    one = point(16, 72.0)
    other = point(16, 60.0, num_samples=50_000, codec={**one["codec"], "dtype": "float16"})
    text = build_report([curve(tmp_path, "d2", one), curve(tmp_path, "d4", other)], "Mixed").markdown()
    assert "- 1,024 or 50,000 samples a point; ddim sampler" in text
    assert "**Not all points are comparable**: they differ in num_samples, codec." in text
    assert "comparable" not in small(tmp_path / "small").markdown()


def test_distances_to_held_out_images_are_a_metric_of_their_own(tmp_path):
    metrics, bias = ({"fd_digits": value, "fd_digits_held_out": value + 4} for value in (70.0, 0.5))
    text = build_report([curve(tmp_path, "d2", point(16, 70.0, metrics=metrics, bias=bias))], "Held out").markdown()
    assert "|  | NFE | fd_digits_held_out ↓ |" in text and "| d2 | 16 | 74.0 |" in text
    assert "Of fd_digits_held_out, about 4.5 are the bias of 1,024 samples and of the held-out images, which" in text
    assert "Of fd_digits, about" not in text, "less than 5 %"


def test_nothing_is_ranked_by_memorisation(tmp_path):
    metrics = {"fd_digits": 70.0, "memorisation_digits": 0.625}
    curves = [curve(tmp_path, "d2", point(16, 70.0, metrics=metrics)), curve(tmp_path, "d4", point(16, 71.0))]
    report = build_report(curves, "Copies")
    text = report.markdown()
    assert "|  | NFE | memorisation_digits |\n| --- | ---: | ---: |\n| d2 | 16 | 0.625 |\n| d4 | 16 | – |" in text
    assert any(note.startswith("Memorisation: the probability that a sample is nearer") for note in report.notes)
    assert "emorisation" not in build_report(curves[1:], "Before").markdown(), "a point of an earlier version lacks it"
    with pytest.raises(InputError, match="--metric memorisation_digits: neither a high nor a low value is the best"):
        build_report(curves, "Copies", "memorisation_digits")


def test_the_best_is_the_greatest_where_higher_is_better(tmp_path):
    curves = [
        curve(tmp_path, label, point(16, 0, metrics={"fid": 9.0, "precision": value + seed / 64}), seed=seed)
        for label, value in (("d2", 0.25), ("d4", 0.5))
        for seed in range(3)
    ]
    text = build_report(curves, "Precision", "precision").markdown()
    assert "| precision ↑ | NFE 16 |\n| --- | ---: |\n| d2 | 0.266 ± 0.039 |\n| d4 | **0.516 ± 0.039** |" in text
    assert "**Fixed sampler**: at NFE 16, d4 (p > 0.99)." in text and "| highest precision |" in text


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
    ("metric", "higher"),
    [
        *(
            (name, True)
            for name in ("precision", "precision_digits", "inception_score", "coverage_dinov2", "density", "recall")
        ),
        *((name, False) for name in ("fid", "fd_digits", "kid_digits", "precisionless")),
    ],
)
def test_which_metrics_are_to_be_high(metric, higher):
    assert higher_is_better(metric) == higher


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
        write_config(replace(ExperimentConfig(), seed=seed), path)
    made = curves_of_runs(paths)
    assert [(entry.label, entry.run, entry.seed) for entry in made] == [
        ("a/d2", paths[0], 0), ("b/d2", paths[1], 1), ("d4", paths[2], 2),
    ]  # fmt: skip
    with pytest.raises(InputError, match="b/d2: named 2 times; give each run once"):
        curves_of_runs([paths[1], paths[1] / "../d2"])
    with pytest.raises(InputError, match="not a run"):
        curves_of_runs([tmp_path])


def test_runs_that_differ_in_the_seed_alone_share_a_line(tmp_path):
    names = {"x/d2-s0": 0, "x/d2-s1": 1, "x/d2": 2, "x/s3": 3, "y/d2-s0": 0, "x/d4-s0": 0, "x/d4-s1": 1}
    for name, seed in names.items():
        depth = 4 if name == "x/d4-s1" else 2
        write_config(replace(ExperimentConfig(), seed=seed, model=ModelConfig(diffusion_depth=7 * depth)), tmp_path / name)
    labels = [curve.label for curve in curves_of_runs([tmp_path / name for name in names])]
    assert labels == ["d2", "d2", "d2", "s3", "d2-s0", "d4-s0", "d4-s1"]


def test_what_is_measured_otherwise_is_in_no_mean(tmp_path, caplog):
    often = point(16, 20.0, num_samples=50_000)
    seeds = [curve(tmp_path, "d2", point(16, 40.0), often), curve(tmp_path, "d2", point(16, 42.0), seed=1)]
    for chosen in (seeds, [replace(entry, num_samples=1024) for entry in seeds]):
        [row] = build_report(chosen, "Samples").rows
        assert row.quality["fd_digits"].values == (40.0, 42.0)
    assert build_report([replace(seeds[0], num_samples=50_000)], "Many").rows[0].quality["fd_digits"].mean == 20.0
    later = curve(tmp_path, "d2", point(16, 5.0, **at(2000)), seed=2)
    [row] = build_report([*seeds, later], "Steps").rows
    assert row.seeds == (2,)
    assert f"{seeds[1].run}: left out: not evaluated at step 2000 with 1024 samples, as others of its label" in caplog.text


def test_the_first_metric_is_one_that_all_runs_have(tmp_path):
    both = {"fid": 9.0, "fd_digits": 1.0}
    one, other = curve(tmp_path, "d2", point(16, 0, metrics=both)), curve(tmp_path, "d4", point(16, 72.0))
    assert build_report([one, other], "Shared").metric == "fd_digits"
    with pytest.raises(InputError, match="not evaluated with fid, but fd_digits; choose with --metric"):
        build_report([one, other], "Chosen", "fid")


def test_the_files_of_a_report(tmp_path):
    report = small(tmp_path)
    paths = write_report(report, tmp_path / "out", "table1")
    assert [path.name for path in paths] == [
        "table1.md", "table1.html", "table1.csv", "table1.json", "table1-contrasts.csv", "table1-best.csv",
        "table1.png", "table1.svg", "table1-contrasts.png", "table1-contrasts.svg",
    ]  # fmt: skip
    quality, rest = SMALL.split("\n\n### Which")
    shown = "![Digits](table1.svg)\n\n![Digits](table1-contrasts.svg)"
    assert paths[0].read_text() == f"{quality}\n\n{shown}\n\n### Which{rest}" and paths[2].read_text() == report.csv()
    before = [path.read_bytes() for path in paths if path.suffix not in (".json", ".html")]  # which name the runs
    again = write_report(small(tmp_path / "again"), tmp_path / "out", "table1")
    assert [path.read_bytes() for path in again if path.suffix not in (".json", ".html")] == before
    (tmp_path / "out/table1-samples.png").touch()
    write_report(small(tmp_path / "third"), tmp_path / "out", "table1")
    assert len(list((tmp_path / "out").iterdir())) == 10, "what a former report had beside it is gone"


def test_diagnosed_runs_have_a_second_picture(tmp_path):
    report = build_report([curve(tmp_path, "d2", point(16, 72.0), diagnostics())], "Errors")
    paths = write_report(report, tmp_path / "out", "report", ("nfe",))
    assert [path.name for path in paths[3:]] == [
        "report.json", "report.png", "report.svg", "report-diagnostics.png", "report-diagnostics.svg",
    ]  # fmt: skip
    assert "\n\n![Errors](report.svg)\n\n![Errors](report-diagnostics.svg)\n\n" in paths[0].read_text()


def test_the_command_takes_a_metric_and_panels(tmp_path):
    run = recorded(tmp_path / "d2", point(16, 0, metrics={"fid": 9.0, "recall": 0.5}, seconds_per_block=None))
    write_config(ExperimentConfig(), run)
    arguments = ["report", str(run), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--metric", "recall", "--against", "nfe, memory"], catch_exceptions=False)
    assert result.exit_code == 0 and "| recall ↑ | NFE 16 |" in result.output
    svg = (tmp_path / "out/report.svg").read_text()
    assert "MiB at the peak" in svg and "per image" not in svg
    with pytest.raises(
        InputError, match=re.escape("--against nfe,hours: no cost is named 'hours'; there are nfe, flops, seconds,")
    ):
        CliRunner().invoke(app, [*arguments, "--against", "nfe,hours"], catch_exceptions=False)
