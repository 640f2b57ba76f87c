"""Names and values of records are text: in Markdown, in the page, in the terminal."""

import io
import logging
import re
import subprocess

import pytest
from markdown_it import MarkdownIt

from madformer.config import DataConfig, ExperimentConfig, write_config
from madformer.config.validation import is_folder_name
from madformer.errors import PlainLines, printable
from madformer.evaluation.record import append_point
from madformer.progress import TextTable, print_table
from madformer.report import build_report, curves_of_runs, write_report
from madformer.report.formatting import inert, table
from tests.points import point
from tests.tiny_runs import command

NAMES = [
    "![t](https://evil/x.png)",
    "[t](javascript:alert(1))",
    "![t][r]",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\\<img src=https://evil/x.png>",
    "\\![t](https://evil/x.png)",
    "<!-- ",
    "a|b",
    "a\\|b|<b>c</b>",
    "a\n\n![t](https://evil)",
    "a\n[r]: https://evil/x.png",
    "a\n| b |",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "a\u202egnp.exe",
    "`<b>`<i>x</i>",
    "https://me:hush@host",
]
ACTIVE = re.compile(
    r"<(?!/?(h\d|p|ul|ol|li|strong|em|code|pre|hr|table|thead|tbody|tr|th|td|blockquote)\b)|<[^>]*\b(src|href|on\w+)="
)


def is_plain(text):
    return all(char.isprintable() or char == "\n" for char in text)


def rendered(markdown):
    """As GitHub and the page render it, here with HTML let through."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_becomes_markup(name):
    markdown = inert("\n\n".join([f"## {name}", f"- {name} is better", table([["", name], [name, f"**{name}**"]])]))
    assert not ACTIVE.search(rendered(markdown)), rendered(markdown)
    assert is_plain(markdown) and "hush" not in markdown
    rows = rendered(inert(table([["", "a"], [name, "b"]])))
    assert rows.count("<tr>") == 2 and rows.count("<td") == 2, rows


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name])
def test_a_report_of_strange_runs_is_inert(name, tmp_path):
    """Labels, metrics and values, through the files that are written."""
    folder = name if is_folder_name(name) else "run"  # a run in another folder is refused
    runs = [tmp_path / "runs" / f"{folder}{number}" for number in (1, 2)]
    for number, run in enumerate(runs, 1):
        write_config(ExperimentConfig(data=DataConfig(batch_size=number)), run)
        for nfe in (16, 32):
            strange = {"checkpoint": name, "device": name, "precision": name, "sampler": name}
            append_point(run, point(nfe, 10.0 * number, metrics={"fd_digits": number, name: 1.0}, **strange))
    report = build_report(curves_of_runs(runs), "Runs side by side")
    assert not ACTIVE.search(rendered(report.markdown())) and is_plain(report.markdown())
    paths = write_report(report, tmp_path / "out", "report")
    page = next(path for path in paths if path.suffix == ".html").read_text()
    page, count = re.subn(r'(<script type="application/json" id="\w+">)[^<]*(?=</script>)', r"\1", page)  # text: it has no <
    assert count == 2 and "<script>alert" not in page and "onerror=alert(1)>" not in page.replace("&gt;", "")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//evil", page)


def test_our_own_pictures_and_tables_stay():
    assert inert("a < 0.05, [95 %], **b**, `c`, d_e, x -> y") == "a < 0.05, [95 %], **b**, `c`, d_e, x -> y"
    assert table([["a|b"], ["c"]]) == "| a\\|b |\n| --- |\n| c |"


@pytest.mark.parametrize("name", NAMES)
def test_no_name_steers_a_terminal(name, capsys):
    shown = TextTable(name, ("cell", "reason"), frozenset(["cell"]), [[name, name], ["b", "c"]])
    print_table(shown, [f"{name} failed"])
    out = capsys.readouterr().out
    assert is_plain(out) and "hush" not in out
    assert len(out.splitlines()) == 6 + 2 * name.count("\n"), "a cell is one line"
    record = logging.LogRecord("a", logging.WARNING, "", 0, "%s: skipped", (name,), None)
    assert is_plain(PlainLines("%(message)s").format(record))
    live = io.StringIO()
    from rich.console import Console

    Console(file=live, force_terminal=False, width=200).print(shown.rich())
    assert is_plain(live.getvalue())


def test_text_without_strange_characters_is_not_touched():
    text = "│ d4 │ 17.8 ± 0.4 † · 你好 é 😀\n\ttab"
    assert printable(text) == text
    assert printable("\x1b[2J") == "\\u001b[2J" and printable("\udc80") == "\\udc80"


@pytest.mark.parametrize("name", ["\x1b[2Jno", "no\x9b2J", "\u202eno", "no\nmadformer: all is well", "https://me:hush@no"])
def test_error_messages_of_commands(name, tmp_path):
    done = subprocess.run(command("report", tmp_path / name), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and is_plain(done.stderr) and "hush" not in done.stderr
