"""The documentation: it builds without warnings, its commands exist, its sentences and lines are short."""

import os
import re
import shlex
import subprocess
import sys
from statistics import fmean

import pytest
import typer

from madformer.cli import app
from madformer.config.experiment import ExperimentConfig
from madformer.config.loading import all_keys
from madformer.sweep.spec import Sweep
from scripts import write_command_line
from tests.conftest import ROOT
from tests.documents import BLOCKS, DOCUMENTS, blocks

PROSE = [document for document in DOCUMENTS if not document.startswith("docs/results/")]
PROGRAM = typer.main.get_command(app)
COMMANDS = {**dict(write_command_line.commands(PROGRAM)), "madformer": PROGRAM}
KEYS = {*all_keys(ExperimentConfig), *all_keys(Sweep)}
LONGEST_LINE, LONGEST_MEAN = 100, 20
ITEM = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )")
MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|[*>]|^\s*\d+\. ")
END = re.compile(r"[.!?](?=\s|$)")


def sentences(text: str) -> list[str]:
    """Of the prose: no code, tables, headings or directives; an item of a list ends a sentence."""
    lines = [line for line in BLOCKS.sub("", text).splitlines() if not line.startswith(("|", "#", ":::", "    options", "<"))]
    items = (MARKUP.sub(r"\1", re.sub(r"`[^`]*`", "code", item)) for item in ITEM.split("\n".join(lines)))
    return [sentence for item in items for sentence in END.split(item) if re.search(r"\w", sentence)]


@pytest.mark.parametrize("document", PROSE)
def test_sentences_and_lines_are_short(document):
    text = (ROOT / document).read_text()
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "![")))
    code = BLOCKS.sub(lambda block: block[0] if block[1] not in ("python", "py") else "", prose)
    assert [line for line in code.splitlines() if len(line) > LONGEST_LINE] == []
    assert fmean(len(sentence.split()) for sentence in sentences(text)) <= LONGEST_MEAN


def test_sentences_are_told_apart():
    text = "# Title\n\nOne two [three](x.md). Four `a. b`:\n\n- five\n- six seven\n\n| cell. cell |\n\n```\nno. code\n```\n"
    assert [len(sentence.split()) for sentence in sentences(text)] == [3, 2, 2, 3]  # an item's mark is a word


def commands(text: str) -> list[list[str]]:
    """Words of every `madformer` command in blocks of the shell."""
    lines = [line for code in text for line in code.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [shlex.split(part) for part in parts if part.startswith("madformer ")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist_with_their_options_and_fields(document):
    for words in commands([*blocks(document, ""), *blocks(document, "text"), *blocks(document, "bash")]):
        if "[OPTIONS]" in words:
            continue
        name = next(name for name in sorted(COMMANDS, key=len, reverse=True) if words[: len(name.split())] == name.split())
        assert name != "madformer" or words[1].startswith("--"), words
        command, rest = COMMANDS[name], words[len(name.split()) :]
        command.make_parser(typer.Context(command)).parse_args(list(rest))  # raises where there is no such option
        fields = [word.partition("=")[0].removeprefix("grid.") for word in rest if re.match(r"[a-z_.]+=", word)]
        assert [field for field in fields if field not in KEYS] == [], words


def test_the_reference_of_the_command_line_is_current():
    assert write_command_line.PAGE.read_text() == write_command_line.page(), "make docs"


def test_the_site_builds_without_warnings(tmp_path):
    """Internal links, anchors, the navigation and the names of the Python reference are checked by MkDocs."""
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference/api.html").read_text()
    assert 'id="madformer.report.load"' in page and "pandas.DataFrame" in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', page), "something is loaded from elsewhere"
