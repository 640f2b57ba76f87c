"""Differences between designs, and which is the best for which budget."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from madformer.cli import app
from madformer.config import load_experiment, write_config
from madformer.errors import InputError
from madformer.report import Curve, build_report, document, load, write_report
from madformer.report.figures import draw_contrasts, draw_training
from madformer.report.statistics import RESAMPLES, crossing, difference, holm, resamples, winners
from tests.conftest import ROOT
from tests.points import point, recorded, tuned
from tests.report.curves import curve
from tests.report.test_figures import texts


def by_seed(*values):
    return dict(enumerate(values))


def over_seeds(root, values):
    """Runs of each label: budget -> a value for each seed."""
    return [
        curve(root, label, *(point(nfe, each[seed]) for nfe, each in budgets.items() if seed < len(each)), seed=seed)
        for label, budgets in values.items()
        for seed in range(max(map(len, budgets.values())))
    ]


CLEAR = {16: (10.0, 10.1, 10.2, 10.05), 32: (9.0, 9.1, 9.2, 9.05), 64: (8.0, 8.3, 8.1, 8.2)}
WORSE = {16: (20.1, 20.2, 20.2, 20.1), 32: (15.0, 15.2, 15.1, 15.1), 64: (8.3, 8.0, 8.2, 8.1)}
"""At 64 the same values in another order: no seed-by-seed test tells them apart."""


def two(root):
    return build_report(over_seeds(root, {"d2": CLEAR, "d4": WORSE}), "Two")


def test_holm_s_correction_by_hand():
    """Ranked 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and none below one before it."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.4, 0.5]) == [0.8, 0.8] and holm([0.9, 0.8]) == [1.0, 1.0] and holm([None]) == [None] and holm([]) == []


def test_a_paired_difference_by_hand():
    found = difference(by_seed(3.0, 5.0, 7.0), by_seed(2.0, 3.0, 4.0))
    assert (found.mean, found.seeds, found.is_paired, found.deviation, found.effect) == (2.0, 3, True, 1.0, 2.0)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) and found.p == pytest.approx(0.07418, abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3, 0.5])
def test_both_tests_are_scipy_s(shift):
    one, other = (1.0, 1.2, 1.1, 1.3), (1.0 + shift, 1.4 + shift, 1.1 + shift, 1.0 + shift)
    assert difference(by_seed(*one), by_seed(*other)).p == pytest.approx(stats.ttest_rel(one, other).pvalue)
    welch = difference(by_seed(*one), {seed + 10: value for seed, value in enumerate(other)})
    expected = stats.ttest_ind(one, other, equal_var=False)
    assert welch.p == pytest.approx(expected.pvalue) and not welch.is_paired
    low, high = expected.confidence_interval(0.95)
    assert welch.half_width == pytest.approx((high - low) / 2)


def test_only_seeds_that_both_have_are_paired_and_few_are_not_tested():
    found = difference(by_seed(3.0, 5.0, 7.0, 900.0), by_seed(2.0, 3.0, 4.0))
    assert (found.mean, found.seeds, found.is_paired) == (2.0, 3, True)
    few = difference(by_seed(3.0, 5.0), by_seed(2.0, 3.0, 4.0))
    assert (few.mean, few.seeds, few.p, few.half_width, few.effect) == (1.0, 2, None, None, None)
    alike = difference(by_seed(1.0, 1.0, 1.0), by_seed(1.0, 1.0, 1.0))
    assert (alike.p, alike.half_width, alike.effect) == (1.0, 0.0, None)
    assert difference(by_seed(2.0, 2.0, 2.0), by_seed(1.0, 1.0, 1.0)).p == 0.0


def test_a_tie_has_no_winner():
    [found] = winners([{"a": by_seed(1.0, 2.0, 3.0), "b": by_seed(1.0, 2.0, 3.0)}], 1)
    assert (found.name, found.level, found.probability, found.is_decided) == ("a", ("b",), 0.5, False)
    assert found.p == {frozenset("ab"): 1.0}


def test_the_probability_is_the_share_of_resamples():
    """a is better by 1 for two seeds and worse by 2.5 for the third: best where that is not drawn, (2/3)^3 of the resamples."""
    [found] = winners([{"a": by_seed(1.0, 1.0, 4.5), "b": by_seed(2.0, 2.0, 2.0)}], 1)
    assert found.name == "b" and found.probability == pytest.approx(1 - 8 / 27, abs=0.015)
    [upward] = winners([{"a": by_seed(1.0, 1.0, 4.5), "b": by_seed(2.0, 2.0, 2.0)}], -1)
    assert upward.name == "a" and upward.probability == pytest.approx(1 - 8 / 27, abs=0.015)


def test_p_values_are_corrected_over_all_panels_and_the_same_one_by_one():
    generator = np.random.default_rng(3)
    panels = [{name: by_seed(*generator.normal(size=4)) for name in "abc"} for _ in range(2)]
    pairs = [(panel, *pair) for panel in panels for pair in ("ab", "ac", "bc")]
    expected = holm(
        [stats.ttest_rel(*(list(panel[name].values()) for name in (one, other))).pvalue for panel, one, other in pairs]
    )
    assert [p for found in winners(panels, 1) for p in found.p.values()] == pytest.approx(expected)
    apart = [{"a": by_seed(1.0, 2.0, 3.0), "b": {7: 1.0, 8: 2.0, 9: 3.5}}]
    [found] = winners(apart, 1)
    assert found.probability is None and list(found.p.values()) == [pytest.approx(difference(*apart[0].values()).p)]


def test_resamples_are_shares_and_always_the_same():
    shares_RS = resamples(4)
    assert shares_RS.shape == (RESAMPLES, 4) and np.allclose(shares_RS.sum(axis=1), 1)
    assert set(np.unique(shares_RS)) == {0, 0.25, 0.5, 0.75, 1.0} and abs(shares_RS.mean(axis=0) - 0.25).max() < 0.01
    resamples.cache_clear()
    assert np.array_equal(resamples(4), shares_RS)


def flat(*values):
    """The same value of three seeds at each cost."""
    return [by_seed(value, value, value) for value in values]


def test_a_known_crossing():
    """10 to 40 against 40 to 10 over 16 to 64: in logarithms they meet in the middle, at 32."""
    found = crossing([((16, 64), flat(10, 40)), ((16, 64), flat(40, 10))], log=True)
    assert (found.cost, found.count, found.share) == (pytest.approx(32), 1, 1.0)
    assert found.interval == (pytest.approx(32), pytest.approx(32))
    linear = crossing([((16, 64), flat(-1, 2)), ((16, 64), flat(0, 0))], log=False)
    assert linear.cost == pytest.approx(16 * 4 ** (1 / 3))
    uneven = crossing([((8, 16, 64), flat(99, 10, 40)), ((16, 64, 128), flat(40, 10, 1))], log=True)
    assert uneven.cost == pytest.approx(32), "only where both have points on either side"


def test_curves_that_do_not_cross_touch_or_cross_twice():
    assert crossing([((1, 2, 4), flat(1, 1, 1)), ((1, 2, 4), flat(2, 1, 2))], log=True).cost is None
    assert crossing([((1, 2), flat(1, 1)), ((4, 8), flat(2, 2))], log=True).cost is None
    through = crossing([((1, 2, 4), flat(1, 1, 1)), ((1, 2, 4), flat(2, 1, 0.5))], log=True)
    assert (through.cost, through.count) == (pytest.approx(2), 1)
    twice = crossing([((1, 2, 4), flat(1, 1, 1)), ((1, 2, 4), flat(2, 0.5, 2))], log=True)
    assert (twice.cost, twice.count) == (pytest.approx(math.sqrt(2)), 2)


def test_the_interval_of_a_crossing_is_that_of_the_resamples_that_cross():
    """Each mean falls as 1 / cost, so it meets 1 at its own start; the third seed drawn twice or more does not get there."""
    steady, falling = flat(1, 1), [by_seed(2.0, 4.0, 32.0), by_seed(2 / 16, 4 / 16, 32 / 16)]
    found = crossing([((1, 16), steady), ((1, 16), falling)], log=True)
    assert found.cost == pytest.approx(38 / 3) and found.share == pytest.approx(20 / 27, abs=0.015)
    assert found.interval == (pytest.approx(2), pytest.approx(40 / 3))
    alone = crossing([((1, 16), [by_seed(1.0)] * 2), ((1, 16), [by_seed(2.0), by_seed(2 / 16)])], log=True)
    assert alone.cost == pytest.approx(2) and alone.interval is None and alone.share is None


def test_the_answer_comes_first(tmp_path):
    report = two(tmp_path)
    assert report.verdict.answer == "**Fixed sampler**: up to NFE 32, d2 (p > 0.99); from 64 on, undecided."
    assert report.markdown().startswith(f"## Two\n\n{report.verdict.answer}\n\n- Metric")


@pytest.mark.parametrize(
    ("winners_at", "answer"),
    [
        ("aaa", "at every budget, d2 (p > 0.99)"),
        ("---", "at every budget, undecided"),
        ("a", "at NFE 16, d2 (p > 0.99)"),
        ("-bb", "up to NFE 16, undecided; from 32 on, d4 (p > 0.99)"),
        ("a-bb", "up to NFE 16, d2 (p > 0.99); at 32, undecided; from 64 on, d4 (p > 0.99)"),
        ("a--b", "up to NFE 16, d2 (p > 0.99); from 32 to 64, undecided; from 128 on, d4 (p > 0.99)"),
    ],
)
def test_the_answer_in_words(tmp_path, winners_at, answer):
    low, high = (1.0, 1.1, 1.2, 1.05), (9.1, 9.0, 9.2, 9.12)
    kinds = {"a": (low, high), "b": (high, low), "-": (low, low[::-1])}
    budgets = {16 * 2**index: kinds[kind] for index, kind in enumerate(winners_at)}
    values = {name: {nfe: pair[side] for nfe, pair in budgets.items()} for side, name in enumerate(("d2", "d4"))}
    assert build_report(over_seeds(tmp_path, values), "").verdict.answer == f"**Fixed sampler**: {answer}."


def test_the_answer_names_designs_that_were_not_compared(tmp_path):
    values = {"d2": {16: (1.0, 1.1, 1.2), 64: (1.0, 1.1, 1.2)}, "d4": {16: (9.0, 9.1, 9.2), 64: (9.0, 9.1, 9.2)}}
    report = build_report(over_seeds(tmp_path, {**values, "d8": {16: (19.0, 19.1, 19.2)}}), "")
    assert report.verdict.answer == "**Fixed sampler**: at every budget, d2 (p > 0.99) (not measured: d8 at NFE 64)."


def test_fewer_than_three_seeds_are_not_tested(tmp_path):
    report = build_report(over_seeds(tmp_path, {"d2": {16: (1.0, 2.0)}, "d4": {16: (8.0, 9.0)}}), "")
    assert report.verdict.answer == "**Fixed sampler**: fewer than 3 training seeds in common, nothing is tested."
    text = report.markdown()
    assert "| d4 | fixed | NFE 16 | 7.00 | – | – | 2 |" in text and "**1.50" not in text and "p < 0.05" not in text


def test_fixed_and_tuned_have_an_answer_each(tmp_path):
    values = {"d2": ((10.0, 10.1, 10.2, 10.05), (9.0, 9.2, 9.1, 9.15)), "d4": ((20.1, 20.2, 20.2, 20.1), (9.1, 9.0, 9.15, 9.2))}
    curves = [
        curve(tmp_path, name, point(16, fixed), *tuned(16, chosen, fixed), seed=seed)
        for name, pair in values.items()
        for seed, (fixed, chosen) in enumerate(zip(*pair, strict=True))
    ]
    report = build_report(curves, "")
    assert report.verdict.answer == "**Fixed sampler**: at NFE 16, d2 (p > 0.99). **Tuned**: at NFE 16, undecided."
    assert [(entry.design, entry.sampling, entry.is_clear) for entry in report.verdict.contrasts] == [
        ("d4", "fixed", True), ("d4", "tuned", False),
    ]  # fmt: skip
    written = texts(draw_contrasts(report)["svg"])
    assert {"NFE 16, fixed", "NFE 16, tuned", "d4"} <= set(written) and "d2" not in written


def test_bold_is_what_every_other_differs_from(tmp_path):
    text = two(tmp_path).markdown()
    assert "| d2 | **10.1 ± 0.1** | **9.09 ± 0.14** | 8.15 ± 0.21 |\n| d4 | 20.1 ± 0.1 | 15.1 ± 0.1 | 8.15 ± 0.21 |" in text
    assert "| fixed | NFE 32 | **d2** | 9.09 | > 0.99 | none | all |\n| fixed | NFE 64 | d2 | 8.15 | 0.5" in text
    three = {"d2": CLEAR, "d4": WORSE, "d8": {nfe: tuple(reversed(values)) for nfe, values in CLEAR.items()}}
    assert "| d2 | 10.1 ± 0.1 | 9.09 ± 0.14 | 8.15 ± 0.21 |" in build_report(over_seeds(tmp_path / "3", three), "").markdown()


def test_differences_are_those_of_the_seeds(tmp_path):
    verdict = two(tmp_path).verdict
    gaps = [worse - clear for worse, clear in zip(WORSE[32], CLEAR[32], strict=True)]
    [found] = [entry for entry in verdict.contrasts if str(entry.column) == "NFE 32"]
    assert found.difference.mean == pytest.approx(fmean(gaps))
    one_by_one = [stats.ttest_rel(WORSE[nfe], CLEAR[nfe]).pvalue for nfe in (16, 32, 64)]
    assert [entry.p for entry in verdict.contrasts] == pytest.approx(holm(one_by_one))


def test_another_reference_turns_the_signs_and_keeps_the_tests(tmp_path):
    curves = over_seeds(tmp_path, {"d2": CLEAR, "d4": WORSE})
    first, second = build_report(curves, "").verdict, build_report(curves, "", reference="d4").verdict
    assert second.reference == "d4" and {entry.design for entry in second.contrasts} == {"d2"}
    for one, other in zip(first.contrasts, second.contrasts, strict=True):
        assert (one.p, one.difference.mean) == (other.p, -other.difference.mean)
    with pytest.raises(InputError, match=re.escape("--reference d16: no design has this label; there are d2, d4")):
        build_report(curves, "", reference="d16")


def test_designs_meet_at_equal_flops_on_lines_between_their_points(tmp_path):
    """d2 costs 8 and 32 MFLOPs, d4 16 and 64: they share 16 to 32, and d2 falls from 40 to 10 over its two octaves."""
    curves = []
    for name, factor, values in (("d2", 1, (40.0, 10.0)), ("d4", 2, (30.0, 15.0))):
        points = [point(nfe, value, tflops_per_image=nfe * factor * 5e-7) for nfe, value in zip((16, 64), values, strict=True)]
        curves += [curve(tmp_path, name, *points, seed=seed) for seed in range(3)]
    choices = [choice for choice in build_report(curves, "").verdict.choices if choice.axis == "flops"]
    assert [choice.cost for choice in choices] == pytest.approx([16e-6, 32e-6])
    assert [choice.values["d2"][0] for choice in choices] == pytest.approx([20.0, 10.0])
    assert [choice.values["d4"][0] for choice in choices] == pytest.approx([30.0, 30 / math.sqrt(2)])
    assert [choice.winner.name for choice in choices] == ["d2", "d2"]
    apart = [replace(entry, budgets=frozenset([16 if entry.label == "d2" else 64])) for entry in curves]
    assert build_report(apart, "").verdict.choices == ()


def test_json_and_csv_say_the_same(tmp_path):
    report = two(tmp_path)
    paths = {path.name: path for path in write_report(report, tmp_path / "out", "report", ("nfe",))}
    found = json.loads(paths["report.json"].read_text())
    assert found == json.loads(json.dumps(document(report)))
    assert found["answer"] == "Fixed sampler: up to NFE 32, d2 (p > 0.99); from 64 on, undecided."
    assert [(entry["label"], entry["axes"], entry["seeds"]) for entry in found["designs"]] == [
        ("d2", {"model.diffusion_depth": 2}, [0, 1, 2, 3]), ("d4", {"model.diffusion_depth": 4}, [0, 1, 2, 3]),
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    for row, entry in zip(rows, found["points"], strict=True):
        metric = entry["metrics"]["fd_digits"]
        assert (row["label"], int(row["nfe"]), float(row["fd_digits"])) == (entry["label"], entry["nfe"], metric["mean"])
        assert [float(row["fd_digits_ci_low"]), float(row["fd_digits_ci_high"])] == metric["interval"]
        assert (
            float(row["tflops_per_image"]) == entry["costs"]["tflops_per_image"] and fmean(metric["values"]) == metric["mean"]
        )
    for name in ("contrasts", "best"):
        for row, entry in zip(csv.DictReader(paths[f"report-{name}.csv"].open()), found[name], strict=True):
            assert row == {key: "; ".join(value) if isinstance(value, list) else str(value) for key, value in entry.items()}
    assert {entry["cost"] for entry in found["best"] if entry["axis"] == "nfe"} == {16.0, 32.0, 64.0}
    before = {name: path.read_bytes() for name, path in paths.items()}
    again = write_report(two(tmp_path / "again"), tmp_path / "again/out", "report", ("nfe",))
    assert {path.name: path.read_bytes().replace(b"again/", b"") for path in again} == before


def configured(root, values):
    """The same with configurations, as `madformer report` needs them."""
    made = over_seeds(root, values)
    base = load_experiment(ROOT / "experiments/digits.yaml")
    for entry in made:
        depth = entry.axes["model.diffusion_depth"]
        write_config(replace(base, seed=entry.seed, model=replace(base.model, diffusion_depth=depth)), entry.run)
    return [str(entry.run) for entry in made]


def test_the_command_prints_the_json_alone_and_writes_the_files(tmp_path):
    runs = configured(tmp_path, {"d2": CLEAR, "d4": WORSE})
    arguments = ["report", *runs, "--out", str(tmp_path / "out"), "--json", "--reference", "d4"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout == (tmp_path / "out/report.json").read_text()
    assert json.loads(result.stdout)["reference"] == "d4" and (tmp_path / "out/report-contrasts.svg").is_file()


def test_points_as_a_table(tmp_path):
    runs = configured(tmp_path, {"d2": {16: (1.0, 2.0)}, "d4": {16: (3.0, 4.0)}})
    recorded(tmp_path / "d2-s1", point(16, 2.5, seed=1), *tuned(32, 0.5, 0.75, metrics={"fd_digits": 0.5, "kid": 7.0}))
    rows = load(*runs)
    assert len({tuple(row) for row in rows}) == 1, "every row has every column"
    assert [(row["design"], row["seed"], row["evaluation_seed"], row["fd_digits"]) for row in rows if row["nfe"] == 16] == [
        ("d2", 0, 0, 1.0), ("d2", 1, 0, 2.0), ("d2", 1, 1, 2.5), ("d4", 0, 0, 3.0), ("d4", 1, 0, 4.0),
    ]  # fmt: skip
    [chosen] = [row for row in rows if row["tuned"]]
    names = ("run", "label", "sampler", "spacing", "kid", "tflops_per_image", "peak_memory_gib", "steps")
    assert [chosen[name] for name in names] == [
        str(tmp_path / "d2-s1"), "d2 · tuned", "unipc", "power:2", 7.0, 1.6e-5, None, 4,
    ]  # fmt: skip
    assert rows[0]["kid"] is None


def trainings(root):
    """Two depths at two training budgets: d2 is best after 100 steps, level with d4 after 200."""
    base = load_experiment(ROOT / "experiments/digits.yaml")
    curves = []
    for depth, steps, values in ((2, 100, CLEAR), (4, 100, WORSE), (2, 200, {64: CLEAR[64]}), (4, 200, {64: WORSE[64]})):
        for seed in range(4):
            label = f"d{depth}-max_steps{steps}"
            run = recorded(root / f"{label}-s{seed}", *(point(nfe, each[seed]) for nfe, each in values.items()))
            config = replace(base, seed=seed, model=replace(base.model, diffusion_depth=depth))
            write_config(replace(config, trainer=replace(config.trainer, max_steps=steps)), run)
            curves.append(Curve(label, run, {"model.diffusion_depth": depth, "trainer.max_steps": steps}, seed))
    return build_report(curves, "Trainings")


def test_each_training_budget_has_its_best_design(tmp_path):
    report = trainings(tmp_path)
    assert (report.verdict.designs, len(report.verdict.contrasts)) == (("d2", "d4"), 1)
    assert report.verdict.answer == "Trained for 200 steps. **Fixed sampler**: at NFE 64, undecided."
    text = report.markdown()
    assert "### Differences from d2, after 200 training steps" in text
    assert "| training steps | training FLOPs | sampling | NFE 16 | NFE 32 | NFE 64 |" in text
    [first, second] = re.findall(r"^\| (?:100|200) \| (.*) \| fixed \| (.*) \| (.*) \| (.*) \|$", text, re.M)
    assert first[1:3] == ("**d2** (P > 0.99)", "**d2** (P > 0.99)") and second[1:3] == ("–", "–")
    assert re.fullmatch(r"d2 \(P 0\.\d\d; level: d4\)", second[3])
    flops = [entry["flops"] for entry in document(report)["training"]]
    assert flops[1] == [2 * value for value in flops[0]] and first[0] == f"{flops[0][0] / 1e9:.3g} G"
    assert [entry["steps"] for entry in document(report)["training"]] == [100, 200]


def test_the_figure_of_training_budgets_has_a_panel_for_each(tmp_path):
    report = trainings(tmp_path)
    written = texts(draw_training(report)["svg"])
    assert {"100 training steps", "200 training steps", "d2", "d4"} <= set(written)
    assert written.count("d2") == 1 and not [text for text in written if "max_steps" in text]
    names = [path.name for path in write_report(report, tmp_path / "out", "report", ("nfe",))]
    assert "report-training.svg" in names and "report-training.svg" in (tmp_path / "out/report.md").read_text()
