"""The documents are correct: links lead somewhere, YAML is legal, the reference is current, messages are those of the code."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from madformer import __version__
from madformer.config import ModelConfig, load_experiment
from madformer.config.experiment import ExperimentConfig
from madformer.config.loading import all_keys
from madformer.model import cost
from madformer.runs.checkpoints import checkpoint_path
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from scripts import draw_concepts, write_configuration
from tests.conftest import ROOT
from tests.documents import BLOCKS, DOCUMENTS, blocks
from tests.tiny_runs import TINY, command, perform, scalars

YAML = [(document, block) for document in DOCUMENTS for block in blocks(document, "yaml")]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"^::: (\S+)$", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them, and of the names in the Python reference."""
    headings = HEADING.findall(BLOCKS.sub("", text))
    return {*NAME.findall(text)} | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    source = ROOT / document
    links = LINK.findall(re.sub(r"`[^`\n]*`", "", BLOCKS.sub("", source.read_text())))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (source.parent / path) if path else source
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize(("document", "block"), YAML, ids=[f"{document}-{i}" for i, (document, _) in enumerate(YAML)])
def test_yaml_is_legal(document, block, tmp_path, monkeypatch):
    """An experiment, a sweep, or some keys of a sweep."""
    monkeypatch.chdir(ROOT)
    path, keys = tmp_path / "document.yaml", yaml.safe_load(block).keys()
    if "experiment" not in keys and keys <= set(all_keys(ExperimentConfig)):
        path.write_text(block)
        assert load_experiment(path)
    else:
        path.write_text(block if "experiment" in keys else f"{block}\nexperiment: experiments/digits.yaml\n")
        sweep = load_sweep(path)
        assert sweep.search is not None or sweep_cells(sweep)


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    [paper] = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text()
    assert re.search(
        rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_files_that_contributing_names_exist():
    words = re.findall(r"[\w./-]+", (ROOT / "CONTRIBUTING.md").read_text())
    paths = {word.rstrip(".") for word in words if word.startswith((".ci/", ".github/", "docs/", "madformer/", "tests/"))}
    assert len(paths) > 8 and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_reference_of_the_configuration_is_current():
    assert write_configuration.PAGE.read_text() == write_configuration.page(), "make docs"


def test_the_figures_of_the_concepts_are_current():
    """Word by word: where their lines lie depends on matplotlib's version."""
    words = re.compile(r"<text[^>]*>(.*?)</text>")
    for name, svg in draw_concepts.figures().items():
        committed = words.findall((draw_concepts.FOLDER / name).read_text())
        assert committed and committed == words.findall(svg), "make docs"


def test_steps_for_budgets():
    text = (ROOT / "docs/explanation/concepts.md").read_text()
    budgets = [int(budget) for budget in re.findall(r"NFE (\d+) \|", text)]
    rows = {int(depth): cells for depth, cells in re.findall(r"^\| D = (\d+) \|(.*)\|$", text, re.MULTILINE)}
    assert budgets == [280, 700, 1400, 2800] and list(rows) == [7, 14, 21, 28]
    for depth, cells in rows.items():
        model = ModelConfig(diffusion_depth=depth)
        assert [int(cell) for cell in cells.split("|")] == [cost.steps_for_nfe(model, budget) for budget in budgets]


def test_messages_that_are_explained_are_those_of_the_code():
    """In the first column of a table: `...` is what differs from case to case."""
    messages = set()
    for path in (ROOT / "madformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                messages.add("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.add(re.sub(r"%(\.\d)?[a-z]", "...", node.value))
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/how_to/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`(.+?)`", row)]
    assert len(quoted) > 50
    unknown = [quote for quote in quoted if not any(quote.strip(" .:;,") in message for message in messages)]
    assert unknown == []


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    """The documentation's: it is logged, and its run is gone on with by the same class alone."""
    [script] = [code for code in blocks("docs/how_to/extending.md", "python") if code.startswith("# seams.py")]
    (tmp_path / "seams.py").write_text(script)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "trainer.max_steps=6", "trainer.checkpoint_every=3", "evaluation.preview_every=null"]
    monkeypatch.setattr(sys, "argv", ["seams.py", *arguments])
    run = Path("own_runs/seams")

    runpy.run_path("seams.py", run_name="__main__")
    assert [step for step, _ in scalars(run)["loss/seams"]] == [2, 4, 6]
    curves, last = scalars(run), checkpoint_path(run, 6)
    last.unlink()
    plain = command("train", "experiments/digits.yaml", *arguments, "name=seams", "output_dir=own_runs")
    assert "seams: trained by Seams, not LitMADFormer; go on with that" in perform(plain, status=2, cwd=tmp_path)
    assert not last.exists()
    runpy.run_path("seams.py", run_name="__main__")
    assert last.exists() and scalars(run) == curves
