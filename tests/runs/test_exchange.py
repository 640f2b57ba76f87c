"""Weights from the released code become runs; runs become files; files become runs again."""

import argparse

import diffusers
import pytest
import torch
from PIL import Image

from madformer.config import load_run
from madformer.errors import InputError
from madformer.model.official import from_released
from madformer.runs.checkpoints import checkpoint_path, load_model
from madformer.runs.exchange import export_run, import_run
from tests.data.vaes import KL
from tests.model.test_official import WEIGHTS
from tests.tiny_runs import command, differences, perform

SWITCHES = {"clear_clean": False, "clear_cond": False, "denoising_mlp": False, "diff_depth": 2, "ar_len": 4}


def released(path, **changes):
    """A file as the released code saves it."""
    args = {**SWITCHES, "lr": 3e-4, **changes}
    ema = {name: tensor + 0.01 for name, tensor in WEIGHTS.items()}
    torch.save({"model": dict(WEIGHTS), "ema": ema, "opt": {}, "lrs": {}, "args": argparse.Namespace(**args)}, path)
    return path


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_released_checkpoint_becomes_a_run(weights, tmp_path):
    import_run(released(tmp_path / "released.pt"), tmp_path / "run", weights, [])
    config = load_run(tmp_path / "run")
    assert (config.model.diffusion_depth, config.model.ar_length, config.model.prediction_type) == (2, 4, "epsilon")
    shift = 0.01 if weights == "ema" else 0.0
    source = {name: tensor + shift for name, tensor in WEIGHTS.items()}
    expected = from_released(source, diffusion_depth=2, ar_length=4).state_dict()
    loaded = load_model(checkpoint_path(tmp_path / "run", 0), config).state_dict()
    assert differences(dict(expected), dict(loaded)) == []


def test_switches_come_from_the_args(tmp_path):
    path = released(tmp_path / "released.pt", clear_cond=True, denoising_mlp=True, diff_depth=1)
    import_run(path, tmp_path / "run", "ema", ["seed=4"])
    config = load_run(tmp_path / "run")
    assert (config.model.use_condition, config.model.local_denoising, config.model.diffusion_depth) == (False, True, 1)
    assert config.seed == 4 and config.loss.lambda_hidden == 0


def test_the_way_there_and_back(tmp_path):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**KL).save_pretrained(tmp_path / "vae")
    codec = f"data.codec=vae:{tmp_path / 'vae'}"
    perform(command("import", released(tmp_path / "released.pt"), "--out", tmp_path / "run", codec))
    perform(command("export", tmp_path / "run", "--out", tmp_path / "weights.safetensors"))
    import_run(tmp_path / "weights.safetensors", tmp_path / "again", "ema", [])
    one, other = (torch.load(checkpoint_path(tmp_path / name, 0), weights_only=True) for name in ("run", "again"))
    assert differences(one["ema"], other["ema"]) == []
    assert load_run(tmp_path / "run").model == load_run(tmp_path / "again").model
    printed = perform(command("sample", tmp_path / "run", "--num", 2, "--steps", 2, "--out", tmp_path / "samples"))
    side = 8 * load_run(tmp_path / "run").model.latent_size
    images = [Image.open(tmp_path / f"samples/{index:06d}.png") for index in (0, 1)]
    assert "samples of" in printed and [image.size for image in images] == [(side, side)] * 2
    assert images[0].tobytes() != images[1].tobytes()


def test_a_codec_that_cannot_be_had_is_one_line_before_anything_is_sampled(tmp_path):
    import_run(released(tmp_path / "released.pt"), tmp_path / "run", "ema", [])
    printed = perform(command("sample", tmp_path / "run", "--steps", 2, "--out", tmp_path / "samples"), status=2)
    assert printed.startswith("madformer: data.codec = 'vae:stabilityai/sd-vae-ft-mse': cannot be had: ")
    assert len(printed.splitlines()) == 1 and not (tmp_path / "samples").exists()


def test_nothing_but_a_namespace_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"ema": dict(WEIGHTS), "args": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: no checkpoint that torch reads"):
        import_run(tmp_path / "evil.pt", tmp_path / "run", "ema", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "no released checkpoint: it must hold ema and args"),
        ({"ema": {}, "args": argparse.Namespace(diff_depth=2)}, "its args lack clear_clean, clear_cond, denoising_mlp, ar_len"),
        ({"ema": {}, "args": argparse.Namespace(**SWITCHES)}, "not a released MADFormer state dict"),
        ({"ema": dict(WEIGHTS), "args": argparse.Namespace(**{**SWITCHES, "diff_depth": 99})}, "model.diffusion_depth = 99"),
    ],
)
def test_what_is_no_released_checkpoint(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(InputError, match=message):
        import_run(tmp_path / "file.pt", tmp_path / "run", "ema", [])
    assert not (tmp_path / "run").exists()


def test_a_torn_export_is_refused(tmp_path):
    import_run(released(tmp_path / "released.pt"), tmp_path / "run", "ema", [])
    export_run(tmp_path / "run", tmp_path / "weights.safetensors", "ema")
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"weights\.safetensors: not the weights of"):
        import_run(tmp_path / "weights.safetensors", tmp_path / "new", "ema", [])
