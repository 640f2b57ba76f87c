"""Folders, paths, names and values are those that the user gave, or are refused in one line."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from madformer.config import config_hash, load_experiment, load_run, write_config
from madformer.config.identity import to_yaml
from madformer.errors import ConfigError, InputError
from madformer.evaluation.feature_networks import require_fitting_networks
from madformer.evaluation.record import record_path
from madformer.progress import training_state
from madformer.report.points import curves_of_runs
from madformer.runs.checkpoints import EMA, checkpoint_path, load_checkpoint, require_own
from madformer.runs.exchange import export_run
from madformer.runs.files import read_previews, to_json
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.training.logging import RunLogger
from tests.tiny_runs import DIGITS, command, execute, perform, tiny_run


@pytest.mark.parametrize("named", ["best", "best/", "./other/../best", "other/inside/..", "other/."])
def test_a_run_is_the_folder_that_was_named(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("elsewhere/a", "a", "other"):
        write_config(tiny_run(tmp_path), Path(name))
    Path("best").symlink_to("elsewhere/a")
    Path("other/inside").mkdir()
    assert load_run(named).run_dir.samefile(named)
    [curve] = curves_of_runs([Path(named)])
    assert curve.label == ("best" if "best" in named else "other")
    for override in ("name=x", "output_dir=y"):
        with pytest.raises(InputError, match=f"override '{override}': a run is the folder that you name"):
            load_run(named, [override])


def test_a_run_is_the_folder_that_the_user_is_in(tmp_path, monkeypatch):
    write_config(tiny_run(tmp_path), tmp_path / "mine")
    (tmp_path / "mine/samples").mkdir()
    for folder, named in (("mine", "."), ("mine/samples", ".."), ("mine/samples", "../../mine")):
        monkeypatch.chdir(tmp_path / folder)
        assert load_run(named).run_dir.samefile(tmp_path / "mine")


def test_every_path_is_expanded_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    typed = {"output_dir": "~/runs", "evaluation.references": "$HOME/r", "data.class_names": "~/$PLACE.txt"}
    config = load_experiment(DIGITS, [f"{name}={path}" for name, path in typed.items()])
    assert config.output_dir == f"{tmp_path}/runs" and config.evaluation.references == f"{tmp_path}/r"
    assert config.data.class_names == f"{tmp_path}/here.txt"
    shutil.copy(DIGITS, tmp_path / "digits.yaml")
    (tmp_path / "sweep.yaml").write_text("{experiment: ~/digits.yaml, output_dir: $PLACE, grid: {optimizer.lr: [0.1]}}")
    assert load_sweep(tmp_path / "sweep.yaml").folder == Path("here/sweep")
    images = ["model.latent_channels=3", "data.source=~/images"]
    overrides = (["data.tokenizer=~/t"], [f"data.tokenizer={tmp_path}/t"], images)
    hashes = [config_hash(load_experiment(DIGITS, each)) for each in overrides]
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    assert hashes[0] == hashes[1] and hashes[2] == config_hash(load_experiment(DIGITS, images))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("$NOWHERE/x", "runs/$NOWHERE", "~/$NOWHERE$PLACE"):
        with pytest.raises(InputError, match=r"output_dir = .*: \$NOWHERE is not set in the environment"):
            load_experiment(DIGITS, [f"output_dir={path}"])
    for name in ("output_dir", "evaluation.references", "evaluation.held_out_source"):
        with pytest.raises(InputError, match=f"{name} = '~nobody-of-this-name/x': there is no such home folder"):
            load_experiment(DIGITS, [f"{name}=~nobody-of-this-name/x"])


def test_events_lie_where_the_run_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "elsewhere")
    for name in ("$PLACE", "~", "ä b"):
        logger = RunLogger(save_dir=tmp_path / name, name="", version="")
        logger.log_metrics({"loss": 1.0, "other": math.nan, "more": math.inf}, 1)
        assert logger.log_dir == str(tmp_path / name) and list((tmp_path / name).glob("events*"))


@pytest.mark.parametrize(
    "name", ["0x10", "1_000", "12:30:45", "off", "Yes", "1.", ".5", "-0", "a #b", "#1", "[a]", "é", "😀", "a: b"]
)
def test_a_text_arrives_as_it_was_typed(name, tmp_path):
    assert load_experiment(DIGITS, [f"name={name}"]).name == name
    (tmp_path / "own.yaml").write_text(f"name: {name}\n")
    try:
        assert load_experiment(tmp_path / "own.yaml").name == name
    except InputError as error:
        assert "\n" not in str(error) and "own.yaml" in str(error)
    except AssertionError:
        assert "#" in name, "YAML's comments are no text"


@pytest.mark.parametrize("name", ["a/b", "..", "tab\there", "a\nb", "x" * 256, "\udcff", "null", ""])
def test_a_name_that_no_folder_can_have_is_refused_in_one_line(name):
    with pytest.raises(InputError) as raised:
        load_experiment(DIGITS, [f"name={name}"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=010",
        "trainer.max_steps=1:30",
        "data.batch_size=-0_7",
        "evaluation.nfe=[16,007]",
        "optimizer={lr: 012}",
        "optimizer.lr=1:30.5",
    ],
)
def test_a_number_that_yaml_would_change_is_refused(override, tmp_path):
    with pytest.raises(ConfigError, match=rf"override '{re.escape(override)}': .*: YAML would read another number"):
        load_experiment(DIGITS, [override])
    key, _, value = override.partition("=")
    section, _, field = key.rpartition(".")
    (tmp_path / "own.yaml").write_text(f"base: {DIGITS}\n{section or key}: {f'{{{field}: {value}}}' if section else value}\n")
    with pytest.raises(ConfigError, match=r"own.yaml: line 2: .*: YAML would read another number"):
        load_experiment(tmp_path / "own.yaml")
    sweep = {"experiment": str(DIGITS), "grid": {"model.depth": [2]}}
    for where, words in (("seeds: [0, 010]", ()), ("", ["grid.optimizer.lr=[0.1,012]"]), ("", ["evaluation.seed=010"])):
        (tmp_path / "sweep.yaml").write_text("".join(f"{key}: {value}\n" for key, value in sweep.items()) + where)
        with pytest.raises(ConfigError, match="YAML would read another number"):
            load_sweep(tmp_path / "sweep.yaml", words)


def test_texts_and_decimal_numbers_are_no_other_numbers(tmp_path):
    text = (
        f"base: {DIGITS}  # at 12:30, from 010\nname: '010'\ndata: {{split: \"1:30\"}}\noptimizer: {{lr: 0.05, ema_decay: 0}}\n"
    )
    (tmp_path / "own.yaml").write_text(text)
    config = load_experiment(tmp_path / "own.yaml", ["data.subset=007"])
    assert (config.name, config.data.split, config.data.subset) == ("010", "1:30", "007")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_experiment(tmp_path / "config.yaml") == config


def test_texts_of_sweeps_are_no_numbers(tmp_path):
    content = {"experiment": str(DIGITS), "grid": {"optimizer.lr": [0.1]}}
    for change in (
        {"name": 7},
        {"overrides": {"data.subset": True}},
        {"grid": {"data.split": ["train", 10]}},
        {"overrides": {"data": {"split": 7}}},
    ):
        (tmp_path / "sweep.yaml").write_text(json.dumps({**content, **change}))
        with pytest.raises(InputError, match="must be a text, and YAML reads another value: put it in quotes"):
            load_sweep(tmp_path / "sweep.yaml")
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    assert load_sweep(tmp_path / "sweep.yaml", ["name=007"]).name == "007"


def test_cells_have_their_paths_expanded_and_the_other_fields_of_a_section(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    overrides = {"data.class_names": "~/names.txt", "evaluation": {"references": "$HOME/references"}}
    content = {"experiment": str(DIGITS), "overrides": overrides, "grid": {"data.tokenizer": ["~/a", "~/b"]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    cells, base = sweep_cells(load_sweep(tmp_path / "sweep.yaml")), load_experiment(DIGITS)
    assert [cell.config.data.tokenizer for cell in cells] == ["/home/me/a", "/home/me/b"]
    for cell in cells:
        data, evaluation = cell.config.data, cell.config.evaluation
        assert (data.class_names, evaluation.references) == ("/home/me/names.txt", "/home/me/references")
        assert (data.source, evaluation.feature_networks) == (base.data.source, base.evaluation.feature_networks)
        (tmp_path / "cell.yaml").write_text(to_yaml(cell.config))  # a trial trains it
        assert config_hash(load_experiment(tmp_path / "cell.yaml")) == cell.config_hash


def test_a_path_of_the_command_line_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_run(tmp_path)
    write_config(config, config.run_dir)
    hints = {
        ("evaluate", "~/digits"): f"{config.run_dir}: no intact checkpoint",
        ("export", "~/digits", "--out=~/e.pt"): f"{config.run_dir}: no intact checkpoint",
        ("train", DIGITS, f"output_dir={tmp_path}", "name=branch", "--branch=~/digits"): f"{config.run_dir} ",
        ("train", "--resume=~/none"): f"{tmp_path}/none: not a run",
        ("evaluate", "~nobody-of-this-name/a"): "there is no such home folder",
        ("export", "~/digits", "--out=$NOWHERE/e.pt"): "$NOWHERE is not set in the environment",
        ("report", "~/none"): f"{tmp_path}/none: not a run",
        ("show", ""): "path = '': must not be empty",
        ("tune", ""): "path = '': must not be empty",
        ("report", ""): "path = '': must not be empty",
        ("sample", "~/digits", "--out="): "path = '': must not be empty",
    }
    for words, hint in hints.items():
        printed = perform(command(*words), status=2)
        assert hint in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("location", ["~nobody-of-this-name/vae", "$NOWHERE/vae", "$PLACE/vae", "~/vae"])
def test_the_folder_of_a_model_is_expanded(location, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "vae").mkdir()
    words = ["train", DIGITS, f"output_dir={tmp_path}", "data.source=null", f"data.codec=vae:{location}"]
    printed = perform(command(*words, "evaluation.preview_every=1", "evaluation.held_out_source=null"), status=2)
    assert len(printed.splitlines()) == 1


def test_a_link_that_leads_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "own.yaml").write_text("base: loop")
    for words in (["report", "loop"], ["config", "own.yaml"], ["evaluate", "loop"]):
        printed = perform(command(*words), status=2, cwd=tmp_path)
        assert "loop" in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}, {"COLUMNS": "20", "TERM": "dumb"}]
)
def test_no_terminal_ends_a_command(variables, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = json.dumps({"experiment": str(DIGITS), "grid": {"optimizer.lr": [0.1]}, "name": "größe"})
    (tmp_path / "sweep.yaml").write_text(text)
    assert "lr0.1-s0" in execute(command("sweep", "plan", tmp_path / "sweep.yaml", f"output_dir={tmp_path}"))


def test_a_name_that_the_locale_cannot_write_is_refused_in_one_line(tmp_path, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mine.yaml").write_text(json.dumps({"base": str(DIGITS), "name": "größe"}))
    printed = execute(command("train", tmp_path / "mine.yaml", f"output_dir={tmp_path}"), status=2)
    assert "set LC_ALL=C.UTF-8" in printed and len(printed.splitlines()) == 1


def test_what_is_not_finite_is_never_written_as_a_number():
    content = {"a": [1.5, math.nan, {"b": (math.inf, -math.inf)}], "c": None}
    assert json.loads(to_json(content)) == {"a": [1.5, None, {"b": [None, None]}], "c": None}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", pytest.param(f"1{'0' * 400}e99", id="huge")])
def test_what_is_not_finite_is_never_read_as_a_number(number, tmp_path):
    """By hand, or by another program."""
    config = tiny_run(tmp_path)
    write_config(config, config.run_dir)
    (config.run_dir / "previews.jsonl").write_text(f'{{"step": 2, "metrics": {{"fd": {number}}}}}\n')
    assert read_previews(config.run_dir) == []
    entry = f'{{"step": {{"done": {number}, "total": 9, "per_second": {number}, "time": {number}}}}}'
    (config.run_dir / "progress.json").write_text(entry)
    assert training_state(config).startswith("stopped at step 0 of")
    if "e" in number:  # is JSON
        return
    record_path(config.run_dir).write_text(f'{{"kind": "point", "metrics": {{"fd": {number}}}}}\n')
    for words in (["report", config.run_dir], ["show", config.run_dir]):
        printed = perform(command(*words), status=2)
        assert "evaluations.jsonl, line 1: " in printed.splitlines()[-1] and "Traceback" not in printed


@pytest.mark.parametrize(
    "change", ["seed=1", "optimizer.lr=0.1", "trainer.max_steps=30", "model.width=32", "loss.lambda_hidden=0"]
)
def test_a_checkpoint_is_of_the_configuration_that_made_it(change, tmp_path):
    config, other = tiny_run(tmp_path), tiny_run(tmp_path, change)
    path = checkpoint_path(config.run_dir, 6)
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, EMA: {}, "config_hash": config_hash(config), "optimizer_states": []}, path)
    require_own(load_checkpoint(path), path, config)
    with pytest.raises(InputError, match=r"step-00000006.ckpt: made by another configuration \(config hash"):
        require_own(load_checkpoint(path), path, other)
    write_config(other, other.run_dir, {"step": 6, "run": "trunk"})
    require_own(load_checkpoint(path), path, other)


@pytest.mark.parametrize("edit", [("\nseed: 0", "\nseed: 1"), (" width: 16", " width: 32"), ("max_steps: 24", "max_steps: 30")])
def test_a_run_whose_configuration_was_edited_is_refused(edit, tmp_path):
    config = tiny_run(tmp_path)
    write_config(config, config.run_dir)
    path = config.run_dir / "config.yaml"
    path.write_text(path.read_text().replace("log_every: 2", "log_every: 1"))  # trains no other weights
    load_run(config.run_dir)
    path.write_text(path.read_text().replace(*edit))
    with pytest.raises(InputError, match=r"config.yaml: edited: its config_hash is"):
        load_run(config.run_dir)


def test_weights_of_another_configuration_are_not_exported(tmp_path):
    config, other = tiny_run(tmp_path), tiny_run(tmp_path, "model.width=32")
    write_config(config, config.run_dir)
    path = checkpoint_path(config.run_dir, 6)
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, EMA: {}, "config_hash": config_hash(other), "optimizer_states": []}, path)
    with pytest.raises(InputError, match="made by another configuration"):
        export_run(config.run_dir, tmp_path / "a.safetensors", "ema")


def test_a_file_of_the_wrong_kind_gets_a_hint(tmp_path):
    sweep, run = tmp_path / "sweep.yaml", tmp_path / "mine"
    sweep.write_text(json.dumps({"experiment": str(DIGITS), "grid": {"optimizer.lr": [0.1]}}))
    write_config(tiny_run(tmp_path), run)
    hints = {
        ("train", sweep): f"madformer sweep run {sweep}",
        ("train", run): f"madformer train --resume {run}",
        ("sweep", "plan", DIGITS): f"madformer train {DIGITS}",
        ("sweep", "status", run): "a folder, no sweep file",
        ("report", DIGITS): f"madformer train {DIGITS}",
        ("report", run): f"madformer evaluate {run}",
        ("evaluate", sweep): "not a run, but a file; name the run's folder",
        ("import", sweep, "--out", tmp_path / "new"): "no zip archive, as torch.save writes them",
        ("import", run, "--out", tmp_path / "new"): "a run, which needs no import",
        ("import", tmp_path, "--out", tmp_path / "new"): "a folder; name the file in it",
        ("evaluate", tmp_path): f"1 runs are in it, such as {run}",
    }
    for words, hint in hints.items():
        printed = perform(command(*words), status=2)
        assert hint in printed and len(printed.splitlines()) == 1
    printed = perform(command("report", run, sweep, tmp_path), status=2)
    assert f"{sweep}, {tmp_path}: no runs, left out" in printed and f"{run}: no evaluations" in printed


@pytest.mark.parametrize("image", [("pixels", 3, 8), ("pixels", 3, 16), ("pixels", 1, 16)])
def test_a_network_that_does_not_take_the_images_is_refused(image, tmp_path):
    codec, channels, size = image
    changes = ["data.source=null", f"data.codec={codec}", f"model.latent_channels={channels}", f"model.latent_size={size}"]
    with pytest.raises(InputError, match=f"'digits': does not take images of {channels} x {size} x {size}"):
        require_fitting_networks(tiny_run(tmp_path, *changes, "evaluation.held_out_source=null"), None)
    require_fitting_networks(tiny_run(tmp_path), None)
