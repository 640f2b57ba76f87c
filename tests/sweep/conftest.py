import os

import pytest

from tests.conftest import ROOT
from tests.sweep.driver import STARTED

SWEEP = f"""
name: small
experiment: {ROOT}/experiments/digits.yaml
overrides: {{trainer.max_steps: 10, evaluation.num_samples: 8, evaluation.held_out_split: null}}
grid: {{model.diffusion_depth: [2, 4]}}
evaluate: {{nfe: [16, 24]}}
workers: 2
"""


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """A sweep of two cells in a folder of its own, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SWEEP)
    return path


@pytest.fixture(autouse=True)
def lock_place(tmp_path, monkeypatch):
    """Pretended GPUs are locked for this test alone."""
    monkeypatch.setattr("madformer.sweep.launch_local.LOCK_PLACES", (tmp_path,))


@pytest.fixture(autouse=True)
def package_path(monkeypatch):
    """Processes that tests start find this package, whatever their working directory."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@pytest.fixture(autouse=True)
def processes():
    """No driver outlives its test."""
    yield
    while STARTED:
        STARTED.pop().kill()
