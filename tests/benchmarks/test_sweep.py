"""The benchmark of sweeps with three cells: everything but the clock."""

import re

from benchmarks import sweep


def test_all_that_is_measured_is_shown_beside_its_goal(capsys):
    sweep.main(["--cells", "3", "--repeats", "1"])
    printed = capsys.readouterr().out
    found = re.findall(r"^(plan|status|driver), (.+?) +(\d+\.\d{3}) +below (\d+)$", printed, re.MULTILINE)
    assert [(what, of) for what, of, *_ in found] == [
        ("plan", "nothing begun"),
        ("status", "nothing begun"),
        ("status", "all done"),
        ("status", "half of it done"),
        ("driver", "each trial"),
    ]
    assert all(float(seconds) > 0 for *_, seconds, _ in found)
