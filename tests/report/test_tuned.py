"""Reports on tuned runs: both protocols side by side, what was chosen, and what is left of a gap."""

import csv
import io

from madformer.report import build_report
from madformer.report.figures import draw, looks
from tests.points import at, point, recorded, tuned
from tests.report.curves import curve
from tests.report.test_figures import texts


def test_both_protocols_have_a_line_and_the_choices_a_table(tmp_path):
    d2 = [point(16, 70.0), point(32, 30.0), *tuned(16, 40.5, 74.0), *tuned(32, 30.0, 30.0)]
    report = build_report([curve(tmp_path, "d2", *d2), curve(tmp_path, "d16", point(16, 90.0))], "Digits")
    text = report.markdown()
    assert "| fd_digits ↓ | NFE 16 | NFE 32 |\n" in text and "\n| d16 | 90.0 | – |\n" in text
    assert "\n| d2 | 70.0 | 30.0 and 30.0 † |\n| d2 · tuned | 40.5 | 30.0 |\n" in text, "d16 has no 74 to compare with"
    assert "guidance 1, EMA weights unless a label says otherwise (tuned: see *Sampling chosen*); training" in text
    assert text.endswith(
        "### Sampling chosen\n\nChosen by `madformer tune`. "
        "± is the 95 % interval of the difference, paired by run and evaluation seed.\n\n"
        "|  | NFE | sampling | tries | fd_digits against the default |\n| --- | ---: | ---: | ---: | ---: |\n"
        "| d2 | 16 | unipc, power:2 | 24 | -33.5 |\n| d2 | 32 | ddim, uniform (the default) | 24 | – |\n"
    )
    rows = [(row["label"], row["sampler"], row["spacing"]) for row in csv.DictReader(io.StringIO(report.csv()))]
    assert rows == [
        ("d2", "ddim", "uniform"), ("d2", "ddim", "uniform"), ("d2 · tuned", "unipc", "power:2"),
        ("d2 · tuned", "ddim", "uniform"), ("d16", "ddim", "uniform"),
    ]  # fmt: skip


def test_seeds_that_were_tuned_together_share_a_choice_and_others_have_their_own(tmp_path):
    [*points, line] = tuned(16, 40.0, 72.0)
    line |= {"difference": -32.25, "half_width": 1.5}
    together = [curve(tmp_path / "together", "d2", *points, line, seed=seed) for seed in (0, 1)]
    assert build_report(together, "").markdown().count("| d2 | 16 | unipc, power:2 | 24 | -32.2 ± 1.5 |") == 1
    second = curve(tmp_path / "apart", "d2", *tuned(16, 41.0, 72.0, "karras:7"), seed=1)
    report = build_report([together[0], second], "")
    assert "| unipc, power:2 | 24 | -32.2 ± 1.5 |\n| d2 | 16 | unipc, karras:7 | 24 | -31.0 |" in report.markdown()
    assert "d2 · tuned,2,unipc,karras:7 or power:2,1.0," in report.csv()


def test_a_run_that_is_best_at_the_default_has_both_lines_too(tmp_path):
    [fixed, chosen] = build_report([curve(tmp_path, "d2", *tuned(16, 72.0, 72.0))], "").rows
    assert (fixed.label, chosen.label, fixed.quality) == ("d2", "d2 · tuned", chosen.quality)


def test_what_was_tuned_before_more_training_is_left_out(tmp_path):
    d2 = curve(tmp_path, "d2", *tuned(16, 40.0, 72.0), point(16, 60.0, **at(2000)))
    assert [row.label for row in build_report([d2], "").rows] == ["d2"]
    recorded(d2.run, *tuned(16, 30.0, 60.0, **at(2000)))
    assert [row.quality["fd_digits"].mean for row in build_report([d2], "").rows] == [60.0, 30.0]


def test_a_figure_names_each_design_once_and_how_its_lines_are_sampled(tmp_path):
    d2, d8 = (curve(tmp_path, label, *tuned(16, 40.0, 70.0), *tuned(32, 30.0, 36.0)) for label in ("d2", "d8"))
    written = texts(draw(build_report([d2, d8, curve(tmp_path, "d4", point(16, 72.0))], "Tuned"))["svg"])
    for text in ("d2", "d8", "d4", "Pareto front", "tuned", "fixed: ddim, uniform"):
        assert written.count(text) == 1
    assert not [text for text in written if "·" in text]
    fixed = texts(draw(build_report([curve(tmp_path, "d16", point(16, 72.0))], "Fixed"))["svg"])
    assert "tuned" not in fixed and "fixed: ddim, uniform" not in fixed


def test_fixed_lines_are_thin_and_dashed_in_the_colour_of_the_tuned_ones():
    keys = [("d2", ""), ("d2", "tuned"), ("d4", ""), ("d4", "tuned"), ("d4", "unipc")]
    made = looks({" ".join(key): key for key in keys})
    fixed, chosen, other = made["d4 "], made["d4 tuned"], made["d4 unipc"]
    assert fixed.color == chosen.color == other.color != made["d2 "].color == made["d2 tuned"].color
    assert [(look.line, look.size) for look in (fixed, chosen, other)] == [("--", 0.6), ("-", 1.0), (":", 1.0)]
    alone = looks({" ".join(key): key for key in keys[:2]})
    assert alone["d2 "].color == alone["d2 tuned"].color
