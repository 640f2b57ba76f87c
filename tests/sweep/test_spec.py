"""A sweep file: every mistake by its message, and the cells that it stands for."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from madformer.config import ConfigError, config_hash, load_experiment
from madformer.sweep.spec import load_sweep, require_one_run_each
from tests.conftest import ROOT

DIGITS = ROOT / "experiments/digits.yaml"

BAD = {
    "worker=2": "override: unknown key worker; the nearest is workers",
    "trainer.max_step=2": "override: unknown key trainer.max_step; the nearest is trainer.max_steps",
    "grid.model.dept=[2]": "grid: unknown key model.dept; the nearest is model.depth",
    "overrides.model.dept=2": "overrides: unknown key model.dept; the nearest is model.depth",
    "evaluate.nfes=[16]": "unknown key evaluate.nfes; the nearest is evaluate.nfe",
    "workers": "override = 'workers': must have the form key=value",
    "workers.cpu=1": "override = 'workers.cpu=1': workers has no fields",
    "workers=two": "workers: Value 'two' of type 'str' could not be converted to Integer",
    "workers=0": "workers = 0: must be at least 1",
    "threads=0": "threads = 0: must be at least 1",
    "name=a/b": "name = 'a/b': must be the name of a folder",
    "experiment=": "experiment: Incompatible value 'None' for field of type 'str'",
    "seeds=3": "seeds = 3: must be a list of integers",
    "seeds=[]": "seeds = []: must be a list of integers of at least 0",
    "seeds=[-1]": "seeds = [-1]: must be a list of integers of at least 0",
    "seeds=[1,1]": "seeds = [1, 1]: a value occurs twice",
    "seeds=[a]": "a list entry: the value could not be converted to Integer",
    "seed=3": "overrides.seed = 3: set seeds",
    "overrides.name=a": "overrides.name = 'a': cells are named by their axes",
    "overrides.output_dir=a": "overrides.output_dir = 'a': set output_dir of the sweep",
    "evaluation.nfe=[16]": "overrides.evaluation.nfe = [16]: set evaluate.nfe",
    "grid.evaluation.seed=[1]": "grid.evaluation.seed = [1]: inference never makes a new cell: set it in overrides, or set evaluate.nfe",
    "grid.seed=[1]": "grid.seed = [1]: set seeds",
    "grid.model.depth=8": "grid.model.depth = 8: must be a list of values, as in model.diffusion_depth: [2, 4, 8]",
    "grid.model.depth=[]": "grid.model.depth = []: must be a list of values, as in model.diffusion_depth: [2, 4, 8]",
    "grid.model.depth=[8,8]": "grid.model.depth = [8, 8]: a value occurs twice",
    "grid=3": "grid = 3: must be a mapping of fields to values",
    "evaluate.nfe=16": "evaluate.nfe = 16: must be a list of integers",
    "evaluate.nfe=[]": "evaluate.nfe = []: must name at least one budget",
    "evaluate.nfe=[16,16]": "evaluate.nfe = [16, 16]: a value occurs twice",
    "model.diffusion_depth=2": "overrides.model.diffusion_depth = 2: the grid varies it; set grid.model.diffusion_depth",
    "model.depth=3": "cell d4-s0: model.diffusion_depth = 4: must be in 1..3 (model.depth)",
    "evaluate.nfe=[4]": (
        "cell d2-s0: evaluation.nfe = 4: with model.depth = 8 and model.diffusion_depth = 2 a budget must be in 8..2007"
    ),
    "grid.trainer.devices=[1,2]": "cells d2-devices1-s0 and d2-devices2-s0 train the same weights: vary a field that is trained with",
}


@pytest.mark.parametrize("override", BAD)
def test_a_mistake_is_one_line_that_says_what_would_be_right(sweep_file, override):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file, [override])
    assert str(caught.value) == f"{sweep_file}: {BAD[override]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grids: {model.depth: [8]}", "unknown key grids; the nearest is grid"),
        ("trainer.max_steps: 5", "trainer.max_steps = 5: belongs under overrides"),
        ("grid: {model.depth: [8]}", "experiment = '': must be the path of an experiment's YAML file"),
        ("- a", "must be a mapping of name, experiment, overrides, grid, seeds, evaluate, workers, threads, output_dir"),
    ],
)
def test_a_mistake_in_the_file(sweep_file, text, message):
    sweep_file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file)
    assert str(caught.value) == f"{sweep_file}: {message}"


def test_broken_yaml_is_one_line(sweep_file):
    sweep_file.write_text("grid: {a: 1")
    with pytest.raises(ConfigError, match="small.yaml: not valid YAML") as caught:
        load_sweep(sweep_file)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(sweep_file):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such sweep file"):
        load_sweep("nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such experiment file"):
        load_sweep(sweep_file, ["experiment=nowhere.yaml"])


def test_cells_are_the_product_of_axes_and_seeds(sweep_file):
    cells = load_sweep(sweep_file, ["grid.model.ar_length=[4,16]", "seeds=[0,7]", "model.unet.channels=[16]",
                                    "model.unet.layers=[1]", "model.unet.attention=[false]"]).cells()  # fmt: skip
    assert [cell.name for cell in cells] == [f"d{d}-l{length}-s{s}" for d in (2, 4) for length in (4, 16) for s in (0, 7)]
    last = cells[-1]
    assert last.axes == {"model.diffusion_depth": 4, "model.ar_length": 16} and last.seed == 7
    assert (last.config.model.diffusion_depth, last.config.model.ar_length, last.config.seed) == (4, 16, 7)
    assert last.config.model.unet.channels == (16,) and last.config.trainer.max_steps == 10
    assert last.run == Path("runs/small/d4-l16-s7") and last.budgets == (16, 24)


def test_a_cell_is_what_its_command_line_says(sweep_file):
    axes = ["grid.optimizer.lr=[1e-05,0.5]", "grid.model.prediction_type=[sample]", "grid.optimizer.betas=[[0.9,0.95]]"]
    for cell in load_sweep(sweep_file, axes).cells():
        assert load_experiment(cell.experiment, cell.overrides) == cell.config
        assert config_hash(cell.config) == cell.config_hash
    assert cell.name == "d4-lr0.5-prediction_typesample-betas0.9x0.95-s0"
    assert cell.overrides == (
        "trainer.max_steps=10", "evaluation.num_samples=8", "model.diffusion_depth=4", "optimizer.lr=0.5", "model.prediction_type=sample",
        "optimizer.betas=[0.9,0.95]", "seed=0", "name=d4-lr0.5-prediction_typesample-betas0.9x0.95-s0", "output_dir=runs/small", "evaluation.nfe=[16,24]",
    )  # fmt: skip


def test_names_of_other_axes_are_legal_folders(sweep_file):
    grid = "grid={model.text: [null, {length: 3}], loss.lambda_hidden: [0.1], model.use_clean_blocks: [true]}"
    cells = load_sweep(sweep_file, [grid, "data.source=null"]).cells()
    assert [cell.name for cell in cells] == [
        "textnull-h0.1-use_clean_blockstrue-s0",
        "text_length_3_-h0.1-use_clean_blockstrue-s0",
    ]
    assert [cell.config.model.text is None for cell in cells] == [True, False]


def test_two_cells_of_one_name_are_refused(sweep_file):
    one, other = load_sweep(sweep_file).cells()
    message = "cells {'model.diffusion_depth': 2} and {'model.diffusion_depth': 4} would both be named d2-s0"
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_one_run_each([one, replace(other, name=one.name)])


def test_what_the_file_leaves_out_is_the_experiment_s(tmp_path):
    path = tmp_path / "bare.yaml"
    path.write_text(f"experiment: {DIGITS}\n")
    sweep, digits = load_sweep(path), load_experiment(DIGITS)
    [cell] = sweep.cells()
    assert (cell.name, cell.budgets) == ("s0", digits.evaluation.nfe) and cell.run == Path(digits.output_dir) / "bare/s0"
    assert sweep.threads == 1 and sweep.worker_count >= 1
    assert cell.config_hash == config_hash(digits)


def test_keys_of_the_sweep_on_the_command_line(sweep_file):
    sweep = load_sweep(sweep_file, ["workers=5", "output_dir=elsewhere", "evaluate.nfe=[32]", "grid.model.diffusion_depth=[8]"])
    [cell] = sweep.cells()
    assert sweep.worker_count == 5 and cell.run == Path("elsewhere/small/d8-s0") and cell.budgets == (32,)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_project_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_sweep(path).name == path.stem


def test_checking_a_sweep_imports_nothing_heavy(sweep_file):
    code = "import sys; from madformer.sweep.spec import load_sweep; load_sweep(sys.argv[1]); print({'torch', 'optuna', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code, str(sweep_file)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
