"""The code in the documents runs, and prints what they say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from tests.conftest import ROOT
from tests.documents import BLOCKS, DOCUMENTS, blocks

FILE = re.compile(r"# (\w+\.py)\n")
"""The first line of an example that is a file of its own."""

EXAMPLES = [document for document in DOCUMENTS if blocks(document, "python")]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with what examples read; what they write does not matter."""
    for name in ("experiments", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", EXAMPLES)
def test_examples_run_and_print_what_is_written(document, folder, capsys):
    torch.manual_seed(0)
    pairs = BLOCKS.findall((ROOT / document).read_text())
    namespace: dict[str, Any] = {"__name__": "example"}
    for (language, code), (next_language, expected) in zip(
        pairs, [*pairs[1:], ("python", "")], strict=True
    ):  # what a block prints stands behind it
        if language == "python":
            if file := FILE.match(code):  # what stands behind it are commands
                (folder / file[1]).write_text(code)
            exec(code, namespace)
            assert capsys.readouterr().out == ("" if next_language or file else expected)


def test_the_grid_of_your_own_is_twelve_runs(folder):
    [grid] = blocks("README.md", "yaml")
    (folder / "grid.yaml").write_text(grid)
    cells = sweep_cells(load_sweep("grid.yaml"))
    assert len(cells) == 12 and cells[0].name == "d2-l1-s0" and len(grid.splitlines()) <= 10


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())
    assert len(pictures) > 1
    for picture in pictures:
        if picture.endswith(".svg"):
            assert "<svg" in (ROOT / picture).read_text()
        else:
            Image.open(ROOT / picture).verify()
