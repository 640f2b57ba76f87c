"""A sweep file: every mistake by its message, and the cells that it stands for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from madformer.config import config_hash, load_experiment, write_config
from madformer.config.loading import as_text, read_value
from madformer.errors import ConfigError
from madformer.runs.checkpoints import checkpoint_path
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
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
    "seeds=[a]": "a list's entry: the value could not be converted to Integer",
    "seed=3": "overrides.seed = 3: set seeds",
    "overrides.name=a": "overrides.name = 'a': cells are named by their axes",
    "overrides.output_dir=a": "overrides.output_dir = 'a': set output_dir of the sweep",
    "evaluation.nfe=[16]": "overrides.evaluation.nfe = [16]: set evaluate.nfe",
    "grid.evaluation.seed=[1]": "grid.evaluation.seed = [1]: inference never makes a new cell: set it in overrides, or under evaluate",
    "grid.seed=[1]": "grid.seed = [1]: set seeds",
    "grid.model.depth=8": "grid.model.depth = 8: must be a list of values, as in model.diffusion_depth: [2, 4, 8]",
    "grid.model.depth=[]": "grid.model.depth = []: must be a list of values, as in model.diffusion_depth: [2, 4, 8]",
    "grid.model.depth=[8,8]": "grid.model.depth = [8, 8]: a value occurs twice",
    "grid=3": "grid = 3: must be a mapping of fields to values",
    "evaluate.nfe=16": "evaluate.nfe = 16: must be a list of integers",
    "evaluate.nfe=[16,16]": "evaluate.nfe = [16, 16]: a value occurs twice",
    "model.diffusion_depth=2": "overrides.model.diffusion_depth = 2: the grid varies it; set grid.model.diffusion_depth",
    "model.depth=3": "cell d4-s0: model.diffusion_depth = 4: must be in 1..3 (model.depth)",
    "evaluate.nfe=[4]": (
        "cell d2-s0: evaluation.nfe = 4: with model.depth = 8 and model.diffusion_depth = 2 a budget must be in 8..2007"
    ),
    "grid.trainer.log_every=[1,2]": "cells d2-log_every1-s0 and d2-log_every2-s0 train the same weights: vary a field that is trained with",
    "grid.trainer.devices=[1,2]": "grid.trainer.devices = [1, 2]: set devices_per_trial",
    "trainer.threads=2": "overrides.trainer.threads = 2: set threads",
    "trainer.devices=2": "overrides.trainer.devices = 2: set devices_per_trial",
    "trainer.num_nodes=2": "overrides.trainer.num_nodes = 2: set slurm.nodes_per_trial",
    "devices_per_trial=0": "devices_per_trial = 0: must be at least 1",
    "trials_per_device=0": "trials_per_device = 0: must be at least 1",
    "trials_per_device=2": "trials_per_device = 2: trials on the CPU share its cores: set workers instead",
    "retries=-1": "retries = -1: must be at least 0",
    "zip={data.batch_size: [16, 32], optimizer.lr: [0.1]}": "zip = {'data.batch_size': 2, 'optimizer.lr': 1}: tied axes must be of one length",
    "zip.model.diffusion_depth=[2,4]": "zip.model.diffusion_depth: the grid varies it too; name it once",
    "zip.optimizer.lr=0.1": "zip.optimizer.lr = 0.1: must be a list of values, as in model.diffusion_depth: [2, 4, 8]",
    "variants=3": "variants = 3: must be a mapping of fields to values",
    "variants.a=3": "variants.a = 3: must be a mapping of fields to values",
    "variants={a b: {}}": "variants = 'a b': a variant's name must be of letters, digits, '.', '_', '+' and '-'",
    "variants.a.model.dept=3": "variants.a: unknown key model.dept; the nearest is model.depth",
    "variants.a.model.diffusion_depth=3": "variants.a.model.diffusion_depth: the grid varies it too; name it once",
    "variants={a: {}, b: {}}": "cells a-d2-s0 and b-d2-s0 train the same weights: vary a field that is trained with",
    "exclude=[{model.depth: 8}]": "exclude = 'model.depth': must be an axis of the sweep: model.diffusion_depth",
    "exclude=[{model.diffusion_depth: 3}]": "exclude = {'model.diffusion_depth': 3}: there is no such combination",
    "exclude=[{model.diffusion_depth: [2, 4]}]": "exclude = [{'model.diffusion_depth': [2, 4]}]: leaves nothing of the sweep",
    "exclude=[2]": "exclude = 2: must be a mapping of axes to values",
    "evaluate.samplers=[ddim,dim]": "evaluate.samplers = 'dim': must be of ddim, ddpm, dpmsolver++, unipc",
    "evaluate.spacings=[cosine]": "cell d2-s0: evaluation.spacing = 'cosine': must be "
    "uniform, power:P with P of at least 1, logsnr, karras:RHO, or list:999/500/0",
    "evaluate.spacings=[list:9/5]": "cell d2-s0: evaluation.spacing = 'list:9/5': its timesteps are 2, "
    "evaluation.nfe = 16 makes 5 steps",
    "evaluate.guidance_intervals=['100']": "cell d2-s0: evaluation.guidance_interval = '100': "
    "must be all, or lowest and highest timestep, as in 100/900",
    "evaluate.guidance_intervals=[100]": "evaluate.guidance_intervals = 100: must be a text, and YAML reads another value: "
    "put it in quotes",
    "evaluate.tries=0": "evaluate.tries = 0: must be at least 1",
    "evaluate.samplers=ddim": "evaluate.samplers = 'ddim': must be a list of names",
    "evaluate.guidance=[1,2]": "cell d2-s0: evaluation.guidance = 2.0: there is nothing to guide towards: set it to 1, or train a model with text (model.text)",
    "evaluate.checkpoints=first": "evaluate.checkpoints = 'first': must be newest, or last5 and the like",
    "evaluate.checkpoints=last2": "cell d2-s0: evaluate.checkpoints = 'last2': there will be 1 (trainer.keep_checkpoints, trainer.checkpoint_every)",
    "launcher=cloud": "launcher: Invalid value 'cloud', expected one of ['local', 'slurm']",
    "slurm.minute=5": "unknown key slurm.minute; the nearest is slurm.minutes",
    "slurm=3": "slurm = 3: must be a mapping of its fields (partition, account, qos, minutes, signal_seconds, nodes_per_trial, cpus_per_task, mem_gb, parallel, setup, options)",
    "slurm.options=3": "slurm.options = 3: must be a mapping of fields to values",
    "slurm.setup=module": "slurm.setup = 'module': must be a list of shell lines",
    "slurm.minutes=0": "slurm.minutes = 0: must be at least 1",
    "slurm.minutes=2": "slurm.signal_seconds = 180: must be in 1..119 (slurm.minutes)",
    "storage=postgres": "storage = 'postgres': must be a database's URL, such as postgresql://user@host/name",
    "search.space.optimizer.lr=[0.1]": "search.nfe = []: must name the budget that trials are judged at",
    "search={nfe: [16]}": "search.space = {}: must name at least one field, as in loss.lambda_hidden: [0, 0.1, 1]",
    "search={nfe: [16], space: {model.dept: [3]}}": "search.space: unknown key model.dept; the nearest is model.depth",
    "search={nfe: [16], space: {optimizer.lr: [0.1]}}": "grid = {'model.diffusion_depth': [2, 4]}: a sweep is a grid or a search: leave one of them out",
    "search={nfe: [16], space: {optimizer.lr: {low: 1}}}": (
        "search.space.optimizer.lr = {'low': 1}: must be a list of values, or a range such as {low: 0.01, high: 1, log: true}"
    ),
    "search={nfe: [16], space: {optimizer.lr: {low: 1, high: 1}}}": "search.space.optimizer.lr = {'low': 1, 'high': 1}: low must be below high",
    "search={nfe: [16], space: {optimizer.lr: {low: 0, high: 1, log: true}}}": (
        "search.space.optimizer.lr = {'low': 0, 'high': 1, 'log': True}: a logarithmic range must begin above 0"
    ),
    "search={nfe: [16], space: {optimizer.lr: [0.1]}, objectives: [nfe]}": (
        "search.objectives = ['nfe']: one must be distance: costs alone need no training"
    ),
    "search={nfe: [16], space: {optimizer.lr: [0.1]}, objectives: [recall]}": (
        "search.objectives = 'recall': must be distance, nfe, tflops, or a distance such as fid or fd_digits"
    ),
    "search={nfe: [16], space: {optimizer.lr: [0.1]}, objectives: [distance, nfe]}": (
        "search.nfe = [16]: an objective is the NFE: name several budgets"
    ),
    "search={nfe: [16], space: {optimizer.lr: [0.1]}, objectives: [distance, tflops], pruner: median}": (
        "search.pruner = 'median': trials of two objectives cannot be ended early: set it to none"
    ),
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
        (
            "- a",
            "must be a mapping of name, experiment, overrides, grid, zip, variants, exclude, seeds, decide, search, "
            "evaluate, devices_per_trial, trials_per_device, launcher, slurm, storage, retries, workers, threads, output_dir",
        ),
    ],
)
def test_a_mistake_in_the_file(sweep_file, text, message):
    sweep_file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file)
    assert str(caught.value) == f"{sweep_file}: {message}"


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("devices_per_trial=4", "devices_per_trial = 4: set one of them to 1"),
        ("launcher=slurm", "a job of Slurm has its devices to itself: set it to 1"),
    ],
)
def test_trials_that_cannot_share_a_device(sweep_file, override, remedy):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{sweep_file}: trials_per_device = 2: {remedy}')}$"):
        load_sweep(sweep_file, ["trainer.accelerator=auto", "trials_per_device=2", override])


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
    cells = sweep_cells(load_sweep(sweep_file, ["grid.model.ar_length=[4,16]", "seeds=[0,7]", "model.unet.channels=[16]",
                                    "model.unet.layers=[1]", "model.unet.attention=[false]"]))  # fmt: skip
    assert [cell.name for cell in cells] == [f"d{d}-l{length}-s{s}" for d in (2, 4) for length in (4, 16) for s in (0, 7)]
    last = cells[-1]
    assert last.axes == {"model.diffusion_depth": 4, "model.ar_length": 16} and last.seed == 7
    assert (last.config.model.diffusion_depth, last.config.model.ar_length, last.config.seed) == (4, 16, 7)
    assert last.config.model.unet.channels == (16,) and last.config.trainer.max_steps == 10
    assert last.run == Path("runs/small/d4-l16-s7") and last.budgets == (16, 24)


def test_cells_are_made_once_for_each_sweep(sweep_file):
    sweep = load_sweep(sweep_file)
    assert all(first is second for first, second in zip(sweep_cells(sweep), sweep_cells(sweep), strict=True))
    sweep_cells(sweep).clear()
    assert len(sweep_cells(sweep)) == 2, "each caller has a list of its own"


def test_a_cell_is_what_its_command_line_says(sweep_file):
    axes = ["grid.optimizer.lr=[1e-05,0.5]", "grid.model.prediction_type=[sample]", "grid.optimizer.betas=[[0.9,0.95]]"]
    for cell in sweep_cells(load_sweep(sweep_file, axes)):
        assert load_experiment(cell.experiment, cell.overrides) == cell.config
        assert config_hash(cell.config) == cell.config_hash
    assert cell.name == "d4-lr0.5-prediction_typesample-betas0.9x0.95-s0"
    assert cell.overrides == (
        "trainer.max_steps=10", "evaluation.num_samples=8", "evaluation.held_out_split=null", "model.diffusion_depth=4", "optimizer.lr=0.5",
        "model.prediction_type=sample",
        "optimizer.betas=[0.9,0.95]", "seed=0", "name=d4-lr0.5-prediction_typesample-betas0.9x0.95-s0", "output_dir=runs/small",
        "trainer.devices=1", "trainer.threads=1", "evaluation.nfe=[16,24]",
    )  # fmt: skip


def test_names_of_other_axes_are_legal_folders(sweep_file):
    grid = "grid={model.text: [null, {length: 3}], loss.lambda_hidden: [0.1], model.use_clean_blocks: [true]}"
    cells = sweep_cells(load_sweep(sweep_file, [grid, "data.source=null"]))
    assert [cell.name for cell in cells] == [
        "textnull-h0.1-use_clean_blockstrue-s0",
        "text_length_3_-h0.1-use_clean_blockstrue-s0",
    ]
    assert [cell.config.model.text is None for cell in cells] == [True, False]


def test_two_cells_of_one_name_are_refused(sweep_file):
    with pytest.raises(ConfigError, match="would both be named splita_b-s0"):
        load_sweep(sweep_file, ["grid={data.split: ['a b', 'a?b']}"])


def test_tied_axes_go_together(sweep_file):
    cells = sweep_cells(load_sweep(sweep_file, ["zip={data.batch_size: [16, 64], optimizer.lr: [0.1, 0.2]}"]))
    assert [cell.name for cell in cells] == [
        f"d{d}-batch_size{size}-lr{lr}-s0" for d in (2, 4) for size, lr in ((16, 0.1), (64, 0.2))
    ]
    assert (cells[1].config.data.batch_size, cells[1].config.optimizer.lr) == (64, 0.2)
    assert list(cells[1].axes) == ["model.diffusion_depth", "data.batch_size", "optimizer.lr"]


def test_named_variants_set_what_is_no_number(sweep_file):
    variants = "variants={plain: {}, alone: {model.local_denoising: true, loss.lambda_hidden: 0}}"
    cells = sweep_cells(load_sweep(sweep_file, [variants]))
    assert [cell.name for cell in cells] == ["plain-d2-s0", "plain-d4-s0", "alone-d2-s0", "alone-d4-s0"]
    assert [cell.config.model.local_denoising for cell in cells] == [False, False, True, True]
    assert cells[3].axes == {"variant": "alone", "model.diffusion_depth": 4} and cells[3].config.loss.lambda_hidden == 0


def test_what_matches_all_of_an_entry_is_excluded(sweep_file):
    axes = ["grid.model.diffusion_depth=[1,2,4]", "grid.optimizer.lr=[0.1,0.2]"]
    excluded = "exclude=[{model.diffusion_depth: 4, optimizer.lr: 0.2}, {model.diffusion_depth: [1, 2], optimizer.lr: 0.1}]"
    cells = sweep_cells(load_sweep(sweep_file, [*axes, excluded]))
    assert [cell.name for cell in cells] == ["d1-lr0.2-s0", "d2-lr0.2-s0", "d4-lr0.1-s0"]
    switches = [
        "variants={plain: {}, alone: {model.local_denoising: true}}",
        "exclude=[{variant: alone, model.diffusion_depth: 2}]",
    ]
    assert [cell.name for cell in sweep_cells(load_sweep(sweep_file, switches))] == [
        "plain-d2-s0",
        "plain-d4-s0",
        "alone-d4-s0",
    ]


def test_a_budget_that_a_model_cannot_have_is_skipped_with_the_reason(sweep_file):
    cells = sweep_cells(
        load_sweep(sweep_file, ["evaluate.nfe=[4,16,24]", "grid={model.depth: [4, 8]}", "model.diffusion_depth=2"])
    )
    assert [cell.budgets for cell in cells] == [(4, 16, 24), (16, 24)] and cells[0].skipped == {}
    assert cells[1].skipped == {4: "with model.depth = 8 and model.diffusion_depth = 2 a budget must be in 8..2007"}
    assert "evaluation.nfe=[16,24]" in cells[1].overrides


def test_steps_are_budgets_of_each_cell_s_own(sweep_file):
    cells = sweep_cells(load_sweep(sweep_file, ["evaluate={steps: [5, 3]}"]))
    assert [cell.budgets for cell in cells] == [(16, 12), (24, 16)], "(N - D) + D * steps"
    assert [cell.budgets for cell in sweep_cells(load_sweep(sweep_file, ["evaluate={steps: [5], nfe: [16]}"]))] == [
        (16,),
        (16, 24),
    ]


def test_a_run_of_the_same_weights_is_a_cell_s_run(sweep_file):
    cell = sweep_cells(load_sweep(sweep_file))[0]
    by_hand = load_experiment(DIGITS, ["name=mine", "trainer.max_steps=10", "model.diffusion_depth=2", "trainer.log_every=3"])
    write_config(by_hand, by_hand.run_dir)
    found, other = sweep_cells(load_sweep(sweep_file))
    assert (found.name, found.run, found.config_hash) == ("d2-s0", Path("runs/mine"), cell.config_hash)
    assert found.overrides[-4:-2] == ("output_dir=runs", "trainer.devices=1") and "name=mine" in found.overrides
    assert other.run == Path("runs/small/d4-s0")
    write_config(cell.config, cell.run)
    assert sweep_cells(load_sweep(sweep_file))[0].run == cell.run, "its own folder comes first"


def test_of_several_runs_the_one_that_got_furthest_is_it(sweep_file):
    for name, step in (("aborted", 5), ("mine", 10), ("other", 7)):
        by_hand = load_experiment(DIGITS, [f"name={name}", "trainer.max_steps=10", "model.diffusion_depth=2"])
        write_config(by_hand, by_hand.run_dir)
        checkpoint_path(by_hand.run_dir, step).parent.mkdir()
        checkpoint_path(by_hand.run_dir, step).touch()
    assert sweep_cells(load_sweep(sweep_file))[0].run == Path("runs/mine")


def test_cells_of_another_sweep_are_not_trained_again(sweep_file):
    theirs = sweep_cells(load_sweep(sweep_file, ["name=first", "grid.optimizer.lr=[0.003]"]))[1]
    write_config(theirs.config, theirs.run)
    assert [cell.run for cell in sweep_cells(load_sweep(sweep_file))] == [
        Path("runs/small/d2-s0"),
        Path("runs/first/d4-lr0.003-s0"),
    ]


def test_a_variable_of_the_environment_in_the_file(sweep_file, monkeypatch):
    sweep_file.write_text(f"experiment: {DIGITS}\nstorage: ${{oc.env:SWEEP_STORAGE}}\n")
    with pytest.raises(ConfigError, match="Environment variable 'SWEEP_STORAGE' not found"):
        load_sweep(sweep_file)
    monkeypatch.setenv("SWEEP_STORAGE", "postgresql://me@there/studies")
    assert load_sweep(sweep_file).storage == "postgresql://me@there/studies"


def test_a_part_of_a_section_that_is_not_there(sweep_file):
    text = ["grid.model.text.length=[3,4]", "model.text.vocab_size=2048", "model.text.pad_token_id=0", "data.tokenizer=builtin"]
    for cell in sweep_cells(load_sweep(sweep_file, text)):
        assert load_experiment(cell.experiment, cell.overrides) == cell.config and cell.config.model.text is not None


@given(st.text(min_size=1, max_size=12))
def test_texts_are_read_back_as_they_were(text):
    try:
        back = read_value(as_text(text))
    except (yaml.YAMLError, OmegaConfBaseException):
        return  # no text of a command line, as with control characters
    assert back == text or "${" in text


def test_what_the_file_leaves_out_is_the_experiment_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bare.yaml"
    path.write_text(f"experiment: {DIGITS}\n")
    sweep, digits = load_sweep(path), load_experiment(DIGITS)
    [cell] = sweep_cells(sweep)
    assert (cell.name, cell.budgets) == ("s0", digits.evaluation.nfe) and cell.run == Path(digits.output_dir) / "bare/s0"
    assert sweep.threads == 1 and sweep.cpu_workers >= 1
    assert cell.config_hash == config_hash(digits)


def test_keys_of_the_sweep_on_the_command_line(sweep_file):
    sweep = load_sweep(sweep_file, ["workers=5", "output_dir=elsewhere", "evaluate.nfe=[32]", "grid.model.diffusion_depth=[8]"])
    [cell] = sweep_cells(sweep)
    assert sweep.cpu_workers == 5 and cell.run == Path("elsewhere/small/d8-s0") and cell.budgets == (32,)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_project_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_sweep(path).name == path.stem


def test_checking_a_sweep_imports_nothing_heavy(sweep_file):
    code = "import sys; from madformer.sweep.load_sweep import load_sweep; load_sweep(sys.argv[1]); print({'torch', 'optuna', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code, str(sweep_file)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
