"""The notebooks run, with fewer steps than they are shown with, and lie in the repository with their outputs."""

import re

import nbformat
import pytest

from scripts.execute_notebooks import NOTEBOOKS, clean, execute

SMALL = {
    "01_first_run": {"STEPS": 4, "SAMPLES": 16},
    "02_fid_vs_nfe": {"DEPTHS": [2], "BUDGETS": [16], "STEPS": 4, "SAMPLES": 16},
    "03_inside_the_model": {"STEPS": 4, "IMAGES": 16, "REPEATS": 1},
    "04_your_own_grid": {
        "DEPTHS": [2],
        "LENGTHS": [4],
        "LEFT_OUT": "{variant: local}",
        "BUDGETS": [16],
        "LATER": [16],  # a budget more takes another process; tests/sweep proves that it trains nothing
        "STEPS": 4,
        "SAMPLES": 16,
    },
}
WRITTEN = {
    "01_first_run": "first-4/evaluations.jsonl",
    "02_fid_vs_nfe": "fid_vs_nfe-4/d2-s0/evaluations.jsonl",
    "04_your_own_grid": "my_grid-4/report.csv",
}
PATH = re.compile(r"(?<![\w.:/])/\w[\w.-]*/")
EVENTS = re.compile(r"tfevents\.\d")
"""Names of TensorBoard's files have the machine's in them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all notebooks: the last one asks for a model that the second one has trained, and that is not trained again."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, folder):
    notebook = execute(path, folder, SMALL[path.stem])  # its last cell looks at what came out
    assert "assert " in notebook.cells[-1].source and notebook.cells[-1].execution_count
    if path.stem in WRITTEN:
        assert (folder / "runs/notebooks" / WRITTEN[path.stem]).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [text for text in texts if PATH.search(text) or EVENTS.search(text)]
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_nothing_of_how_it_was_executed(path):
    notebook, cleaned = (nbformat.read(path, as_version=4) for _ in range(2))
    clean(cleaned)
    assert notebook == cleaned


def test_what_tells_a_machine_is_found():
    assert PATH.search("see /home/me/runs") and PATH.search('File "/opt/venv/lib/x.py"')
    assert not PATH.search("runs/notebooks/first, 1/1 cells, http://localhost:6006/#scalars, GFLOPs / image")
