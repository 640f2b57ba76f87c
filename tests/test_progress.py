"""Progress: lines in a log, a bar on a terminal."""

import contextlib
import os
import pty
import re
import sys

import pytest

from madformer import progress
from madformer.progress import ProgressDisplay, TextTable, print_markdown, print_table


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_lines_are_seldom_but_the_last_one_is_there(clock, capsys):
    with ProgressDisplay("sampled", "images", 40) as display:
        for done in range(1, 41):
            clock.now += 1
            display.show(done)
    assert capsys.readouterr().out.splitlines() == [
        "sampled 10/40  1.00 images/s  0:00:30 left",
        "sampled 20/40  1.00 images/s  0:00:20 left",
        "sampled 30/40  1.00 images/s  0:00:10 left",
        "sampled 40/40  1.00 images/s  0:00:00 left",
    ]


def test_what_was_there_before_does_not_count_in_the_rate(clock, capsys):
    with ProgressDisplay("sampled", "images", 100, done=60) as display:
        clock.now += 20
        display.show(60)
        display.show(70)
    assert capsys.readouterr().out == "sampled 70/100  0.50 images/s  0:01:00 left\n"


def test_without_a_total_no_time_is_left_and_the_last_number_is_said(clock, capsys):
    with ProgressDisplay("encoded", "images", None) as display:
        for done in (4, 8, 11):
            clock.now += 8
            display.show(done)
    assert capsys.readouterr().out.splitlines() == ["encoded 8  0.50 images/s", "encoded 11  0.46 images/s"]


def test_a_note_is_asked_for_only_when_it_is_shown(clock, capsys):
    calls = []
    with ProgressDisplay("step", "steps", 100) as display:
        for done in (1, 2, 3):
            clock.now += 6
            display.show(done, lambda done=done: calls.append(done) or "loss 1.0")
    assert calls == [2] and "step 2/100  loss 1.0  0.17 steps/s" in capsys.readouterr().out


def test_silence(clock, capsys):
    with ProgressDisplay("sampled", "images", None, silent=True) as display:
        clock.now += 60
        display.show(5)
    assert capsys.readouterr().out == ""


def everything(reader):
    """What was written to the other end of a terminal."""
    pieces = []
    with contextlib.suppress(OSError):  # its end
        while piece := os.read(reader, 1 << 16):
            pieces.append(piece)
    os.close(reader)
    return b"".join(pieces).decode()


@pytest.mark.parametrize(("total", "counted"), [(30, "30/30"), (None, r"30/\?")])
def test_a_terminal_gets_a_bar(total, counted, monkeypatch):
    reader, writer = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with ProgressDisplay("sampled", "images", total, done=10) as display:
            display.show(30)
    output = everything(reader)
    assert "━" in output and re.search(counted, output) and re.search(r"\d images/s", output)
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is back"


TABLE = TextTable("cells", ("cell", "state", "fd_digits"), frozenset(("cell", "state")))
TABLE.rows += [["done", "failed", "12345.678"], ["d2", "done", "1"], ["d4", "waiting", "-"]]


def shown(monkeypatch, show, width=100, **variables):
    """What is printed on a terminal."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(width), **variables}.items():
        monkeypatch.setenv(name, value)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        show()
    return everything(reader)


def test_a_terminal_shows_states_in_colour_unless_it_should_not(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(monkeypatch, lambda: print_table(TABLE, ["a line"]))
    for state, code in (("failed", 31), ("done", 32), ("waiting", 2)):
        assert coloured.count(f"\x1b[{code}m{state}") == 1, "the state, not a cell that is called so"
    plain = shown(monkeypatch, lambda: print_table(TABLE, ["a line"]), NO_COLOR="1")
    assert "\x1b[3" not in plain and "failed" in plain
    print_table(TABLE, ["a line"])
    assert capsys.readouterr().out.splitlines() == [
        "cells",
        "│ cell │ state   │ fd_digits │",
        "├──────┼─────────┼───────────┤",
        "│ done │ failed  │ 12345.678 │",
        "│ d2   │ done    │         1 │",
        "│ d4   │ waiting │         - │",
        "a line",
    ]


MARKDOWN = "## Title\n\n- **bold** text\n\n| a design's name | NFE 16 |\n| --- | ---: |\n| local_denoising_off | 62.0125 |\n"


def test_a_terminal_shows_markdown_typeset_and_whole(monkeypatch, capsys):
    typeset = shown(monkeypatch, lambda: print_markdown(MARKDOWN), NO_COLOR="1")
    assert "**" not in typeset and "| ---" not in typeset and re.search("local_denoising_off +62.0125", typeset)
    narrow = shown(monkeypatch, lambda: print_markdown(MARKDOWN), 20, NO_COLOR="1")
    assert "…" not in narrow
    print_markdown(MARKDOWN)
    assert capsys.readouterr().out == MARKDOWN + "\n", "as it is, where it is not a terminal"
