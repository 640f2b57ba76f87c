"""The command line as a user meets it: each command once in a process of its own, here or in its module's tests."""

import json
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from madformer.cli import app, sweep_app
from madformer.config import load_experiment, load_run, read_config_hash
from madformer.config.identity import flat_fields
from madformer.evaluation.evaluate import evaluate
from madformer.evaluation.record import read_points
from madformer.evaluation.request import parse_request
from madformer.runs.checkpoints import checkpoint_path
from madformer.runs.files import claim_folder, progress_path
from tests.conftest import ROOT
from tests.tiny_runs import DIGITS, command, environment, execute, perform, scalars, train_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run, trained."""
    folder = tmp_path_factory.mktemp("cli")
    perform(train_command(folder, "trainer.max_steps=6", "trainer.checkpoint_every=3", "evaluation.preview_every=3"))
    return folder / "digits"


MISTAKES = {
    "train": "nothing to train: give an EXPERIMENT.yaml, or --resume RUN",
    "train nowhere.yaml": "nowhere.yaml: no such experiment file",
    "train {tmp}/broken.yaml": "broken.yaml: not valid YAML",
    "train {tmp}/list.yaml": "list.yaml: must be a mapping of sections",
    "train {digits} model.difusion_depth=3": "unknown key model.difusion_depth; the nearest is model.diffusion_depth",
    "train {digits} model.diffusion_depth=9": "model.diffusion_depth = 9: must be in 1..8 (model.depth)",
    "train {digits} loss.lambda_hidden=-1": "loss.lambda_hidden = -1.0: must be a finite number of at least 0",
    "train {digits} trainer.max_steps=many": "trainer.max_steps: Value 'many' of type 'str' could not be converted to Integer",
    "train {digits} evaluation.nfe=[4]": "evaluation.nfe = 4: with model.depth = 8 and model.diffusion_depth = 4 a budget must be in 8..",
    "train {digits} data.batch_size=9 trainer.devices=2": "data.batch_size = 9: must be a multiple of the 2 devices",
    "train {digits} trainer.loggers=[tensorbord]": "trainer.loggers = ['tensorbord']: must be some of tensorboard, csv, wandb, each once",
    "train {digits} trainer.loggers=[csv,csv]": "must be some of tensorboard, csv, wandb, each once",
    "train {digits} data.source=null": "data.source = null: nothing to train on",
    "train {digits} output_dir={tmp}/broken.yaml": "Not a directory",
    "train {digits} output_dir=/proc/1": "/proc/1/digits: ",
    "train --resume {tmp}": "not a run: it has no config.yaml",
    "evaluate {tmp}": "not a run: it has no config.yaml",
    "evaluate {run} --nfe 2": "nfe = 2: too small for one denoising step; with model.depth = 3 and model.diffusion_depth = 2 the smallest is 3",
    "evaluate {run} --nfe 4,x": "--nfe 4,x: must be integers with commas between them",
    "evaluate {run} --steps 0": "steps = 0: must be in 1..1000",
    "evaluate {run} --nfe 4 --steps 4": "--nfe and --steps: give one of them",
    "evaluate {run} --weights raw": "--weights raw: must be one of ema, model",
    "evaluate {run} --checkpoints 5": "--checkpoints 5: must be newest, last5 or a step; there are: 3, 6",
    "evaluate {run} --num-samples 1": "evaluation.num_samples = 1: must be an integer of at least 2",
    "sample {run} --out {tmp}/samples": "give one of --steps and --nfe",
    "import {tmp}/nowhere.pt --out {tmp}/new": "nowhere.pt: no such file",
    "import {tmp}/broken.yaml --out {tmp}/new": "broken.yaml: torn, or no zip archive, as torch.save writes them",
    "import {tmp}/broken.yaml --out {run}": "exists already; name a new folder",
    "export {run} --out {tmp}/weights.bin": "must end in .safetensors",
    "config {run}": "a run; madformer train --resume",
    "config {digits} model.difusion_depth=3": "unknown key model.difusion_depth; the nearest is model.diffusion_depth",
    "diff {run} {tmp}": "not a run: it has no config.yaml",
    "diff {run} nowhere.yaml": "nowhere.yaml: no such experiment file",
    "show {tmp}": "not a run: it has no config.yaml",
    "report {run}": "no evaluations; make them: madformer evaluate",
    "sweep run nowhere.yaml": "nowhere.yaml: no such sweep file",
}


LIKE_OTHERS = {
    "train {digits} data.batch_size=9 trainer.devices=2",
    "train {digits} output_dir={tmp}/broken.yaml",
    "train {digits} output_dir=/proc/1",
    "import {tmp}/nowhere.pt --out {tmp}/new",
    "import {tmp}/broken.yaml --out {tmp}/new",
    "import {tmp}/broken.yaml --out {run}",
    "export {run} --out {tmp}/weights.bin",
}
"""Mistakes that show after torch's slow import, as `data.source=null` does; that one has a process of its own."""


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_clear_line_and_leave_nothing_behind(arguments, run, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    before = sorted(tmp_path.rglob("*")), sorted(run.rglob("*"))
    words = arguments.format(digits=DIGITS, run=run, tmp=tmp_path).split()
    printed = (perform if arguments in LIKE_OTHERS else execute)(command(*words), status=2, cwd=tmp_path)
    assert MISTAKES[arguments] in printed and "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1 and printed.startswith("madformer: "), printed
    assert (sorted(tmp_path.rglob("*")), sorted(run.rglob("*"))) == before


def test_every_command_has_a_sentence_and_examples_of_its_own():
    for prefix, group in (("", app), ("sweep ", sweep_app)):
        for each in group.registered_commands:
            name = prefix + (each.name or each.callback.__name__)
            usage, sentence, *rest = perform(command(*name.split(), "--help")).split("\n\n")
            assert usage.startswith("Usage: ") and re.match(r"  [A-Z][^.]+\.", sentence), sentence
            examples = rest[-1].removeprefix("  Examples:\n").splitlines()
            assert examples and all(example.startswith(f"    madformer {name} ") for example in examples), rest[-1]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("madformer di", ["diff"]), ("madformer sweep sta", ["status"]), ("madformer evaluate --num", ["--num-samples"])],
)
def test_the_shell_completes_commands_and_options(typed, offered):
    variables = {"_MADFORMER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    script = str((ROOT / command()[0]).parent / "madformer")
    printed = subprocess.run([script], capture_output=True, text=True, env={**environment(), **variables}, check=False).stdout
    assert printed.split() == offered


def test_config_prints_an_experiment_that_is_the_same(tmp_path):
    """Each field once with where it comes from, through the files that an experiment is based on."""
    (tmp_path / "base.yaml").write_text(f"base: {DIGITS}\noptimizer: {{lr: 0.002, betas: [0.8, 0.9]}}\nname: '007'\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\noptimizer: {lr: 1e-05}\nmodel: {text: {length: 8, pad_token_id: 3}}\n")
    overrides = ["model.text.vocab_size=40", "evaluation.nfe=[16,32]", "trainer.devices=null", "data.class_names=a b: #c"]
    overrides.append("evaluation.held_out_source=a\u2028b")
    printed = perform(command("config", "top.yaml", *overrides), cwd=tmp_path)
    (tmp_path / "saved.yaml").write_text(printed)
    assert load_experiment(tmp_path / "saved.yaml") == load_experiment(tmp_path / "top.yaml", overrides)
    lines = [re.split(r"\s+# ", line.strip()) for line in printed.splitlines()]
    origins = {line[0]: line[-1] for line in lines if len(line) > 1}
    assert (
        origins["lr: 1e-05"] == "top.yaml"
        and origins["betas: [0.8,0.9]"] == "base.yaml"
        and origins['name: "007"'] == "base.yaml"
    )
    assert (
        origins["width: 32"] == str(DIGITS)
        and origins["length: 8"] == "top.yaml"
        and origins["rope: axial"] == "default"
        and origins["ar_length: 4"] == str(DIGITS)
    )
    assert [origins[line] for line in ("vocab_size: 40", "nfe: [16,32]", "devices: null")] == ["command line"] * 3
    assert printed.count("# ") == len(flat_fields(load_experiment(tmp_path / "saved.yaml")))


def test_diff_names_the_fields_and_says_whether_the_weights_differ(run, tmp_path):
    before = sorted(tmp_path.rglob("*")), {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    same = perform(command("diff", run, run))
    assert same.splitlines() == [
        "nothing differs",
        f"both have the configuration hash {read_config_hash(run)}: the same weights",
    ]
    (tmp_path / "other.yaml").write_text(perform(command("config", run / "config.yaml", "trainer.log_every=7")))
    table = perform(command("diff", run, tmp_path / "other.yaml"))
    assert "│ trainer.log_every │ 2 " in table and table.count("\n│") == 2 and "the same weights" in table
    (tmp_path / "text.yaml").write_text(
        perform(command("config", DIGITS, "model.text={vocab_size: 9, length: 2, pad_token_id: 0}"))
    )
    table = perform(command("diff", DIGITS, tmp_path / "text.yaml"))
    assert re.search(r"│ model.text +│ null +│ - ", table) and re.search(r"│ model.text.vocab_size +│ - +│ 9 ", table)
    assert "other weights" in table and "│ name" not in table
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before[1]


def test_show_says_how_far_a_run_is_and_writes_nothing(run, tmp_path):
    """Trained, being trained, killed, evaluated, and with imported weights."""
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    printed = perform(command("show", copy))
    assert f"{copy}, configuration hash {read_config_hash(run)}\n" in printed and "model.depth=3" in printed.split()
    assert "model.rope=" not in printed, "that is the default"
    assert "done, 6 steps; newest checkpoint: step 6" in printed and "no evaluations; make them: madformer evaluate" in printed
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    checkpoint_path(copy, 6).unlink()
    with claim_folder(copy, "train"):
        assert "training, step 6 of 6" in perform(command("show", copy))
    entry = {"done": 5, "total": 6, "per_second": 2.0, "time": time.time() - 1000}
    progress_path(copy).write_text(json.dumps({"step": entry}))
    with claim_folder(copy, "train"):
        assert "training, step 5 of 6, 2 steps/s, about 0:00:00 left; newest checkpoint: step 3" in perform(
            command("show", copy)
        )
    printed = perform(command("show", copy))
    assert f"stopped at step 5 of 6; newest checkpoint: step 3; to go on: madformer train --resume {copy}" in printed
    perform(command("evaluate", copy, "--nfe", "3"))
    [point] = read_points(copy)
    cells = [cell.strip() for cell in perform(command("show", copy)).splitlines()[-2].strip("│").split("│")]
    assert cells[:7] == ["ddim, EMA weights", "3", "3", "1", "0", "16", f"{point['metrics']['fd_digits']:.4g}"]
    perform(command("export", run, "--out", tmp_path / "weights.safetensors"))
    perform(command("import", tmp_path / "weights.safetensors", "--out", tmp_path / "imported"))
    assert "its weights are imported" in perform(command("show", tmp_path / "imported"))
    printed = perform(command("diff", run, tmp_path / "imported"))
    assert f"but the weights of {tmp_path / 'imported'} are imported" in printed and "the same weights" not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "sweep --help",
        "train {digits} model.depth=0",
        "sweep plan sweeps/quickstart.yaml",
        "config {digits}",
        "show {run}",
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments, run):
    words = arguments.format(digits=DIGITS, run=run).split()
    code = f"import sys\nsys.argv = ['madformer', *{words!r}]\nfrom madformer.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    argv = [command()[0], "-c", code]
    printed = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False).stdout
    assert printed.strip().splitlines()[-1] == "False"


def test_another_experiment_does_not_touch_a_run(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    settings = ("trainer.max_steps=6", "trainer.checkpoint_every=3", "evaluation.preview_every=3", "optimizer.lr=0.5")
    printed = execute(train_command(run.parent, *settings), status=2)
    assert f"{run} is a run of another experiment: optimizer.lr = 0.003 there, 0.5 asked for" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_evaluate_records_and_draws_each_point_once(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    first = execute(command("evaluate", copy))
    assert first.count("  fd_digits ") == 2 and "recorded before" not in first
    again = perform(command("evaluate", copy, "--steps", "1,2"))
    assert again.count("recorded before") == 2, "NFE 3 and 5 are 1 and 2 steps of D = 2 of 3 layers"
    perform(command("evaluate", copy, "--checkpoints", "last2", "--nfe", "5"))
    lines = [json.loads(line) for line in (copy / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["kind"], line.get("step"), line["nfe"]) for line in lines] == [
        ("point", 6, 3),
        ("point", 6, 5),
        ("point", 3, 5),
        ("mean", None, 5),
    ]
    values = [lines[1]["metrics"]["fd_digits"], lines[2]["metrics"]["fd_digits"]]
    assert lines[3]["metrics"]["fd_digits"] == pytest.approx(sum(values) / 2)
    curve = scalars(copy)["fd_digits_vs_nfe"]
    assert curve == [(line["nfe"], pytest.approx(line["metrics"]["fd_digits"])) for line in (lines[0], lines[3])]


def test_an_exported_run_comes_back_as_one_that_is_measured_the_same(run, tmp_path):
    copy, imported = tmp_path / "run", tmp_path / "imported"
    shutil.copytree(run, copy)
    perform(command("export", copy, "--out", tmp_path / "weights.safetensors"))
    perform(command("import", tmp_path / "weights.safetensors", "--out", imported))
    points = [evaluate(parse_request(load_run(folder), steps="2"))[0] for folder in (copy, imported)]
    assert points[0]["metrics"] == points[1]["metrics"] and points[0]["weights_sha256"] == points[1]["weights_sha256"]
    assert "its weights are imported" in perform(command("train", "--resume", imported), status=2)


def test_sample_writes_images_that_do_not_depend_on_their_number(run, tmp_path):
    perform(command("sample", run, "--num", 5, "--steps", 2, "--out", tmp_path / "five"))
    perform(command("sample", run, "--num", 2, "--nfe", 5, "--out", tmp_path / "two"))
    names = {path.name for path in (tmp_path / "five").iterdir()}
    assert names == {".sample.lock", "grid.png", *(f"{i:06d}.png" for i in range(5))}
    for name in ("000000.png", "000001.png"):
        one, other = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("five", "two"))
        assert one.shape == (8, 8, 3) and np.abs(one.astype(int) - other).max() <= 1


def test_corrupt_checkpoints(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    checkpoint_path(copy, 6).write_bytes(b"torn")
    printed = perform(command("evaluate", copy, "--nfe", "5"))
    assert f"{checkpoint_path(copy, 6)} is torn" in printed and "step-00000003  NFE 5" in printed
    assert "is torn" in perform(command("evaluate", copy, "--nfe", "5", "--checkpoints", "6"), status=2)
    checkpoint_path(copy, 3).write_bytes(b"torn")
    assert "no intact checkpoint" in execute(command("evaluate", copy, "--nfe", "5"), status=2)


def test_checkpoints_load_without_unpickling_code(run):
    checkpoint = torch.load(checkpoint_path(run, 6), weights_only=True)
    assert checkpoint["global_step"] == 6
    assert {f"model.{name}" for name in checkpoint["ema"]} == set(checkpoint["state_dict"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount the small file system that fills up")
def test_full_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        printed = perform(train_command(folder), status=1)
        assert "No space left on device" in printed and "Traceback" not in printed, printed
        assert not list(folder.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in execute(train_command(tmp_path), status=2)


def test_module_and_script_are_the_same_program():
    assert execute([str((ROOT / command()[0]).parent / "madformer"), "--help"]).replace("madformer", "") == execute(
        command("--help")
    ).replace("python -m madformer", "")
