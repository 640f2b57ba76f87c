"""The code in the documents runs, and prints what they say."""

import re
from typing import Any

import pytest
import torch
from PIL import Image

from madformer.sweep.loading import load_sweep
from tests.conftest import ROOT

GRID = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/data.md"])
def test_examples_run_and_print_what_is_written(document, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    blocks = BLOCKS.findall((ROOT / document).read_text())
    assert any(language == "python" for language, _ in blocks)
    namespace: dict[str, Any] = {}
    for (language, code), (next_language, expected) in zip(
        blocks, [*blocks[1:], ("python", "")], strict=True
    ):  # what a block prints stands behind it
        if language == "python":
            exec(code, namespace)
            assert capsys.readouterr().out == ("" if next_language else expected)


def test_the_grid_of_your_own_is_twelve_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    [grid] = GRID.findall((ROOT / "README.md").read_text())
    (tmp_path / "grid.yaml").write_text(grid)
    cells = load_sweep(tmp_path / "grid.yaml").cells()
    assert len(cells) == 12 and cells[0].name == "d2-l1-s0" and len(grid.splitlines()) <= 10


def test_the_sweeps_of_the_documentation_are_legal(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    blocks = GRID.findall((ROOT / "docs/sweeps.md").read_text())
    whole = [block for block in blocks if "experiment:" in block]
    assert len(whole) == 2 and len(blocks) == 4
    for block in blocks:
        path = tmp_path / "sweep.yaml"
        path.write_text(block if block in whole else block + whole[0])
        sweep = load_sweep(path)
        assert sweep.search is not None or len(sweep.cells()) == 54


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())
    assert "docs/images/quickstart.svg" in pictures
    for picture in pictures:
        if picture.endswith(".svg"):
            assert "<svg" in (ROOT / picture).read_text()
        else:
            Image.open(ROOT / picture).verify()
