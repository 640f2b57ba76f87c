"""The benchmark of decisions with few sweeps: every kind has a line, and one without differences finds none."""

import re

from benchmarks import decisions


def test_all_kinds_of_sweeps_are_shown(capsys):
    decisions.main(["--sweeps", "4"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^(.+?), (independent|shared), (\d) sd(, margin 1.5 sd)?  +\d+\.\d +(.+)$", printed, re.MULTILINE)
    assert len(rows) == len({row[:4] for row in rows}) == len(decisions.NOISES) * 2 * 4 * 2
    assert all((" - " in cells) == (effect == "0") for *_, effect, _, cells in rows)
    assert all(float(cells.split()[-2]) == 0 for *_, margin, cells in rows if not margin)


def test_the_interval_of_an_error_rate():
    outcome = decisions.simulate("normal", False, 0, None, 50)
    low, high = outcome.error_interval()
    assert 0 <= low <= outcome.wrong / 50 <= high < 0.25
