"""`madformer sample`: every image depends on its own index, says how it was made, and is made once."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from madformer.config import config_hash, load_run
from madformer.data.codec import read_settings
from madformer.data.datamodule import LatentDataModule
from madformer.data.encode import encode
from madformer.data.prompts import DIGIT_NAMES
from madformer.errors import ConfigError, InputError, NonFiniteError
from madformer.evaluation import write_samples as module
from madformer.evaluation.request import parse_sampling
from madformer.evaluation.sampling import choose_prompts
from madformer.evaluation.tensorboard import drop_orphans, write_curves
from madformer.evaluation.write_samples import write_samples
from madformer.runs.checkpoints import DATA, list_checkpoints, load_model, weights_sha256
from tests.conftest import ROOT
from tests.data.test_datamodule import TEXT
from tests.evaluation.test_evaluate import make_run
from tests.pictures import overrides, write_parquet
from tests.tiny_runs import command, environment, perform


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without text."""
    return make_run(tmp_path_factory.mktemp("plain"))[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A run on digits and their names."""
    return make_run(tmp_path_factory.mktemp("text"), *TEXT)[0]


def sample(config, folder, num=3, steps=2, nfe=None, seed=0, **options):
    axes = {"seed": seed, **{name: options.pop(name) for name in ("sampler", "guidance") if name in options}}
    write_samples(parse_sampling(config, num, steps, nfe, axes=axes, **options), folder)


def pixels(folder):
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*.png"))]


def close(one, other):
    return all(np.abs(a - b).max() <= 1 for a, b in zip(one, other, strict=True))


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def events(run):
    """Images and texts of a run in TensorBoard: tag -> steps."""
    found = EventAccumulator(str(run), {"images": 0, "tensors": 0}).Reload()
    images = {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}
    return images | {tag: [event.step for event in found.Tensors(tag)] for tag in found.Tags()["tensors"]}


@pytest.fixture
def copied_run(plain, tmp_path):
    """A copy of the run, whose event files a test may count."""
    shutil.copytree(plain.run_dir, tmp_path / "own", ignore=shutil.ignore_patterns("events*"))
    return load_run(tmp_path / "own")


def test_files_say_how_they_were_made(text, tmp_path):
    sample(text, tmp_path / "out", nfe=6, steps=None, seed=7, guidance=1.5, weights="model")
    assert stamps(tmp_path / "out").keys() == {"000000.png", "000001.png", "000002.png", "grid.png"}
    image = Image.open(tmp_path / "out/000002.png")
    assert image.size == (8, 8)
    request = parse_sampling(text, 1, 2, None)
    expected = {
        "run": "digits",
        "checkpoint": "step-00000006.ckpt",
        "weights": "model",
        "weights_sha256": weights_sha256(load_model(request.checkpoint, text, "model")),
        "config_hash": config_hash(text),
        "sampler": "ddim",
        "steps": 2,
        "nfe": 5,
        "guidance": 1.5,
        "seed": 7,
        "codec": "pixels",
        "index": 2,
        "prompt": "two",
        "class": 2,
    }
    settings = json.loads(image.text["madformer"])
    assert {name: settings[name] for name in expected} == expected
    assert len(settings["codec_sha256"]) == 64 and settings["madformer"]
    grid = read_settings(tmp_path / "out/grid.png")
    assert grid["prompts"] == ["zero", "one", "two"] and grid["weights_sha256"] == expected["weights_sha256"]


def test_an_image_depends_on_its_seed_and_index_alone(plain, tmp_path):
    sample(plain, tmp_path / "five", num=5)
    sample(plain, tmp_path / "two", num=2)
    sample(plain, tmp_path / "other", num=2, seed=1)
    small, *_ = make_run(tmp_path, "evaluation.batch_size=2")
    sample(small, tmp_path / "batches", num=5)
    five = pixels(tmp_path / "five")
    assert close(pixels(tmp_path / "two"), five[:2]) and close(pixels(tmp_path / "batches"), five)
    assert not any(close([one], [other]) for one, other in zip(pixels(tmp_path / "other"), five[:2], strict=True))
    assert not any(close([five[0]], [other]) for other in five[1:])


@pytest.mark.slow  # how work is shared is `evaluate`'s too, and tested there
def test_processes_share_the_work(plain, tmp_path):
    sample(plain, tmp_path / "alone", num=5)
    printed = perform(command("sample", plain.run_dir, "--num", 5, "--steps", 2, "--devices", 2, "--out", tmp_path / "shared"))
    assert "sampled 5/5" in printed
    assert close(pixels(tmp_path / "shared"), pixels(tmp_path / "alone"))
    made_by = [[read_settings(path) for path in sorted((tmp_path / name).glob("0*.png"))] for name in ("alone", "shared")]
    assert made_by[0] == made_by[1]


def test_under_torchrun_the_last_process_makes_the_grid(plain, tmp_path, monkeypatch, capsys):
    sample(plain, tmp_path / "alone", num=5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in (("1", ["000001.png", "000003.png"]), ("0", [f"{i:06d}.png" for i in range(5)] + ["grid.png"])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        sample(plain, tmp_path / "shared", num=5)
        assert sorted(stamps(tmp_path / "shared")) == made
    assert "this process has done its share" in capsys.readouterr().out
    assert close(pixels(tmp_path / "shared"), pixels(tmp_path / "alone"))


def test_only_what_is_missing_is_made(plain, tmp_path, monkeypatch, capsys):
    sample(plain, tmp_path, num=4)
    before, whole = stamps(tmp_path), pixels(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sample_share", None)
        sample(plain, tmp_path, num=4)
        sample(plain, tmp_path, num=2)
    assert stamps(tmp_path) == before and capsys.readouterr().out.count("(there already)") == 2
    (tmp_path / "000001.png").unlink()
    torn = (tmp_path / "000002.png").read_bytes()
    (tmp_path / "000002.png").write_bytes(torn[:-30])
    (tmp_path / ".000003.png.1.tmp").write_bytes(torn[:50])
    sample(plain, tmp_path, num=6)
    after = stamps(tmp_path)
    assert {name for name in before if before[name] == after[name]} == {"000000.png", "000003.png"}
    assert close(pixels(tmp_path)[:4], whole) and len(after) == 7 and not list(tmp_path.glob(".*.tmp"))
    assert Image.open(tmp_path / "grid.png").size == (3 * 66, 2 * 66)


def test_a_grid_that_is_missing_is_made_of_the_images(plain, tmp_path, monkeypatch):
    sample(plain, tmp_path)
    grid = (tmp_path / "grid.png").read_bytes()
    (tmp_path / "grid.png").unlink()
    monkeypatch.setattr(module, "sample_share", None)
    sample(plain, tmp_path)
    assert (tmp_path / "grid.png").read_bytes() == grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps = 2 there, 3 asked for"),
        ({"seed": 1}, "seed = 0 there, 1 asked for"),
        ({"guidance": 2.0}, "guidance = 1.0 there, 2.0 asked for"),
        ({"weights": "model"}, "weights = 'ema' there, 'model' asked for"),
        ({"prompt": "a nine"}, "prompt = 'zero' there, 'a nine' asked for"),
        ({"classes": "0,1,3"}, "000002.png: made in another way: prompt = 'two' there, 'three' asked for"),
    ],
)
def test_other_settings_are_refused(change, message, text, tmp_path):
    sample(text, tmp_path)
    before = stamps(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        sample(text, tmp_path, num=5, **change)
    assert "\n" not in str(caught.value) and stamps(tmp_path) == before


def test_another_program_s_file_is_not_touched(plain, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "000001.png")
    with pytest.raises(InputError, match="made in another way: checkpoint = None there"):
        sample(plain, tmp_path)
    assert Image.open(tmp_path / "000001.png").size == (4, 4) and not (tmp_path / "000000.png").exists()


def labels(config, num=5, **options):
    choice = {"classes": None, "prompt": None, "checkpoint": list_checkpoints(config.run_dir)[0], **options}
    return [prompt.label for prompt in choose_prompts(config, indices=range(num), **choice)]


def test_classes_come_in_turn(text):
    assert labels(text, 12) == [*range(10), 0, 1]
    assert labels(text, classes="7,three") == [7, 3, 7, 3, 7]
    assert [prompt.text for prompt in choose_prompts(text, list_checkpoints(text.run_dir)[0], "7,3", None, range(2))] == [
        "seven",
        "three",
    ]
    assert labels(text, prompt="a nine") == [None] * 5


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("text", {"classes": "3", "prompt": "three"}, "--classes and --prompt: give one of them"),
        ("text", {"classes": "3,10"}, r"--classes 10: must be in 0\.\.9"),
        ("text", {"classes": "thre"}, r"--classes thre: no class of that name; the nearest is three \(3\)"),
        ("plain", {"classes": "3"}, r"--classes: .* has a model without text \(model.text = null\); leave it out"),
        ("plain", {"prompt": ""}, "--prompt: .* has a model without text"),
        ("plain", {"guidance": 2.0}, r"evaluation\.guidance = 2\.0: there is nothing to guide towards"),
    ],
)
def test_prompts_that_a_run_cannot_have(which, options, message, request, tmp_path):
    with pytest.raises(InputError, match=message):
        sample(request.getfixturevalue(which), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_prompts_and_guidance_change_images(text, tmp_path):
    kinds = {
        "default": {},
        "one": {"guidance": 1.0, "classes": "zero"},
        "guided": {"guidance": 3.0, "classes": "0"},
        "prompt": {"prompt": "zero"},
        "other": {"prompt": "nine"},
    }
    for name, options in kinds.items():
        sample(text, tmp_path / name, num=1, steps=4, **options)
    first = {name: pixels(tmp_path / name) for name in kinds}
    assert close(first["default"], first["one"]) and close(first["default"], first["prompt"])
    assert not close(first["default"], first["guided"]) and not close(first["default"], first["other"])


@pytest.fixture(scope="module")
def latents_run(tmp_path_factory):
    """A run with text on latents of labelled pictures."""
    folder = tmp_path_factory.mktemp("latents")
    write_parquet(folder / "pictures.parquet", 6)
    fields = [*overrides(folder, latents=folder / "latents"), *TEXT]
    config, *_ = make_run(folder, *fields, f"output_dir={folder / 'runs'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        encode(config)
        remembered = {DATA: LatentDataModule(config).state_dict()}
    [path] = list_checkpoints(config.run_dir)
    torch.save({**torch.load(path, weights_only=True), **remembered}, path)
    return config


def test_a_checkpoint_remembers_the_classes_of_latents_that_have_gone(latents_run, tmp_path):
    gone = replace(latents_run, data=replace(latents_run.data, latents=str(tmp_path / "nowhere"), tokenizer="no/where"))
    [path] = list_checkpoints(gone.run_dir)
    assert [prompt.text for prompt in choose_prompts(gone, path, None, None, range(4))] == ["cat", "dog", "eel", "cat"]
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'no/where': cannot be had"):
        sample(gone, tmp_path / "out", classes="dog")
    assert not (tmp_path / "out").exists()


def test_classes_that_nobody_named(latents_run, tmp_path):
    shutil.copytree(latents_run.run_dir, tmp_path / "run")
    [path] = list_checkpoints(tmp_path / "run")
    checkpoint = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in checkpoint.items() if name != DATA}, path)
    config = load_run(tmp_path / "run")
    for options in ({"classes": "cat"}, {"guidance": 2.0}):
        with pytest.raises(InputError, match=r"it was trained without names of classes: sample takes a --prompt"):
            sample(config, tmp_path / "out", **options)
    sample(config, tmp_path / "out", num=2)
    shown = [Image.open(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [image.size for image in shown] == [(16, 16)] * 2, "the codec doubles 8 x 8"
    assert read_settings(tmp_path / "out/000000.png")["prompt"] == ""


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("vae:{folder}/nowhere", "cannot be had|no such folder"),
        ("pixels", "its latents have 3 channels, the model's 4: set model.latent_channels=3, or another codec"),
    ],
)
def test_a_codec_that_cannot_decode_is_told_before_anything_is_sampled(codec, message, tmp_path):
    name = codec.format(folder=tmp_path)
    fields = ("model.latent_channels=4", "data.source=null", f"data.codec={name}", "evaluation.feature_networks=[]")
    config, *_ = make_run(tmp_path, *fields)
    with pytest.raises(ConfigError, match=message):
        sample(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverged_run_is_told(tmp_path):
    config, *_ = make_run(tmp_path, scale=1e12)
    with pytest.raises(NonFiniteError, match=r"step-00000006\.ckpt: its samples are NaN or infinite"):
        sample(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_gpu_is_sampled_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config, *_ = make_run(tmp_path, "trainer.accelerator=cuda", "trainer.devices=8", "trainer.precision=bf16-mixed")
    sample(config, tmp_path / "out", num=1)
    assert len(pixels(tmp_path / "out")) == 1


def test_tensorboard_shows_a_grid_once(copied_run, tmp_path):
    for folder, num in (("out", 2), ("out", 2), ("out", 4), ("elsewhere", 4)):
        sample(copied_run, tmp_path / folder, num=num)
    assert events(copied_run.run_dir) == {"samples/ema, 2 steps, seed 0": [6]}
    sample(copied_run, tmp_path / "more", num=1, steps=3, seed=2, weights="model")
    assert events(copied_run.run_dir).keys() == {"samples/ema, 2 steps, seed 0", "samples/model, 3 steps, seed 2"}
    before = {path: path.read_bytes() for path in copied_run.run_dir.glob("events*")}
    write_curves(copied_run.run_dir, {})
    drop_orphans(copied_run.run_dir, 6)
    assert {path: path.read_bytes() for path in copied_run.run_dir.glob("events*")} == before
    drop_orphans(copied_run.run_dir, 5)
    assert not list(copied_run.run_dir.glob("events*")), "samples of a checkpoint that is made anew"


def test_tensorboard_shows_prompts(text, tmp_path):
    sample(text, tmp_path, num=2, steps=3, guidance=1.5, classes="4,two")
    tag = "samples/ema, 3 steps, guidance 1.5, seed 0, 4,two"
    found = events(text.run_dir)
    assert found[tag] == [6] and found[f"{tag} prompts/text_summary"] == [6]
    assert set(DIGIT_NAMES) >= set(read_settings(tmp_path / "grid.png")["prompts"]) == {"four", "two"}


def test_interrupted_it_leaves_whole_files(plain, tmp_path):
    argv = command("sample", plain.run_dir, "--num", 3000, "--steps", 20, "--out", tmp_path / "out")
    program = subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "out/000003.png").exists():
        assert time.monotonic() < end and program.poll() is None
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGINT)
    _, printed = program.communicate(timeout=60)
    assert program.returncode == 130 and "Traceback" not in printed, printed
    made = sorted((tmp_path / "out").glob("*.png"))
    assert 4 <= len(made) < 3000 and all(read_settings(path) for path in made)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".sample.lock", *(path.name for path in made)}
