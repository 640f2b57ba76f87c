"""Weights from the released code become runs; runs become files; files become runs again."""

import argparse
import hashlib
import itertools
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from madformer.config import ModelConfig, TextConfig, UNetConfig, load_run
from madformer.config.data import BUILTIN_VOCABULARY
from madformer.data import prompts
from madformer.data.codec import read_settings
from madformer.errors import ConfigError, InputError
from madformer.model import MADFormer
from madformer.model.official import from_released, to_released
from madformer.runs.checkpoints import checkpoint_path, load_model
from madformer.runs.exchange import export_run, import_run
from tests.conftest import HUB
from tests.data.vaes import KL
from tests.hub import fill_cache
from tests.model.test_official import TEXT_WEIGHTS, WEIGHTS
from tests.tiny_runs import command, differences, environment, perform

SWITCHES = {"clear_clean": False, "clear_cond": False, "denoising_mlp": False, "diff_depth": 2, "ar_len": 4}


def released(path, weights=WEIGHTS, **changes):
    """A file as the released code saves it."""
    args = {**SWITCHES, "lr": 3e-4, **changes}
    ema = {name: tensor + 0.01 for name, tensor in weights.items()}
    torch.save({"model": dict(weights), "ema": ema, "opt": {}, "lrs": {}, "args": argparse.Namespace(**args)}, path)
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


BRANCHES = pytest.mark.parametrize("weights", [WEIGHTS, TEXT_WEIGHTS], ids=["main", "imagenet"])


@BRANCHES
def test_a_released_checkpoint_comes_out_as_it_went_in(weights, tmp_path):
    switches = {"clear_clean": True, "denoising_mlp": True, "diff_depth": 1}
    import_run(released(tmp_path / "released.pt", weights, **switches), tmp_path / "run", "model", [])
    export_run(tmp_path / "run", tmp_path / "out.pt", "ema")
    content = torch.load(tmp_path / "out.pt", weights_only=False)
    assert vars(content["args"]).items() >= {**SWITCHES, **switches}.items()
    kept = [name for name in weights if "list." not in name]  # of towers, the clean one is not there
    assert content["ema"].keys() == weights.keys()
    assert differences({name: content["ema"][name] for name in kept}, {name: weights[name] for name in kept}) == []
    import_run(tmp_path / "out.pt", tmp_path / "again", "ema", [])
    one, other = (torch.load(checkpoint_path(tmp_path / name, 0), weights_only=True) for name in ("run", "again"))
    assert differences(one, other) == []


@BRANCHES
def test_the_released_sampling_script_finds_what_it_reads(weights, tmp_path):
    """It builds the model from `args`, and loads the entry `model` strictly: the buffers of the text RoPE belong to it."""
    import_run(released(tmp_path / "released.pt", weights), tmp_path / "run", "ema", [])
    export_run(tmp_path / "run", tmp_path / "out.pt", "ema")
    content = torch.load(tmp_path / "out.pt", weights_only=False)
    args, model = content["args"], content["model"]
    assert (args.vae_latent_size, args.patch_size, args.block_size, args.spatial_len) == (4, 1, 16, 64)
    assert (args.pre_downsample_block_size, args.image_size) == (64, 128)
    assert {name: model[name].data_ptr() for name in weights} == {name: content["ema"][name].data_ptr() for name in weights}
    names = ["text_rope.inv_freq", *(f"blocks.{layer}.self_attn.text_rope.inv_freq" for layer in range(3))]
    assert model.keys() - weights.keys() == (set(names) if weights is TEXT_WEIGHTS else set())
    angles = 3 * model[names[0]] if weights is TEXT_WEIGHTS else None
    assert angles is None or torch.allclose(angles, 3 * 10_000 ** -(torch.arange(32) / 32))
    for entry in ("ema", "model"):
        import_run(tmp_path / "out.pt", tmp_path / entry, entry, [])
        one, other = (torch.load(checkpoint_path(tmp_path / name, 0), weights_only=True) for name in ("run", entry))
        assert differences(one, other) == []


@BRANCHES
def test_bare_weights_take_their_switches_from_overrides(weights, tmp_path):
    save_file(dict(weights), tmp_path / "bare.safetensors")
    names = {"ar_length": 4, "diffusion_depth": 1, "use_clean_blocks": True, "use_condition": False, "local_denoising": False}
    switches = [f"model.{name}={str(value).lower()}" for name, value in names.items()]
    with pytest.raises(InputError, match=r"bare\.safetensors: its args lack diff_depth: say model\.diffusion_depth=\.\.\.$"):
        import_run(tmp_path / "bare.safetensors", tmp_path / "run", "ema", [switches[0], *switches[2:]])
    import_run(tmp_path / "bare.safetensors", tmp_path / "run", "ema", switches)
    config = load_run(tmp_path / "run")
    assert {name: getattr(config.model, name) for name in names} == names
    expected = from_released(weights, **names).state_dict()
    assert differences(dict(expected), dict(load_model(checkpoint_path(tmp_path / "run", 0), config).state_dict())) == []


def test_an_override_without_a_value_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"override = 'model\.diffusion_depth': must have the form"):
        import_run(released(tmp_path / "released.pt"), tmp_path / "run", "ema", ["model.diffusion_depth"])


@BRANCHES
def test_released_habits_are_frozen(weights, tmp_path):
    file = released(tmp_path / "released.pt", weights)
    import_run(file, tmp_path / "run", "ema", [])
    config = load_run(tmp_path / "run")
    model, loss, data = config.model, config.loss, config.data
    assert (model.prediction_type, model.timestep_embedding, model.clean_timestep) == ("epsilon", "raw", "released")
    assert (model.rope, loss.lambda_image, loss.lambda_hidden) == ("released", 1, 0.1)
    if weights is TEXT_WEIGHTS:
        assert (data.prompts, data.bos, data.padding_side, data.crop) == ("numbers", True, "left", "top_left")
        assert (model.text.vocab_size, model.text.length, model.text.final_norm, loss.lambda_text) == (64, 2, False, 0)
    else:
        assert model.text is None and data.crop == "centre"
    header = OmegaConf.load(tmp_path / "run/config.yaml").frozen
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert header.imported == {"source": str(file), "sha256": sha256, "weights": "ema"}


@pytest.mark.parametrize("override", ["model.depth=2", "model.ffn_width=64", "model.text={}"])
def test_overrides_that_do_not_fit_the_weights_are_refused(override, tmp_path):
    with pytest.raises(InputError, match=r"has shape .*, the configuration's model "):
        import_run(released(tmp_path / "released.pt"), tmp_path / "run", "ema", [override, "model.diffusion_depth=2"])
    assert not (tmp_path / "run").exists()


def test_the_hub_is_asked_by_name(tmp_path, cache):
    (tmp_path / "files").mkdir()
    file = released(tmp_path / "files/ckpts.pt")
    printed = perform(command("import", "JunhaoC/MADFormer-FFHQ", "--out", tmp_path / "run"), status=2)
    assert printed.startswith("madformer: JunhaoC/MADFormer-FFHQ: cannot be had: no such folder, and it is not in the cache")
    assert len(printed.splitlines()) == 1 and printed.endswith("; download its ckpts.pt elsewhere, and import that file\n")
    fill_cache(cache, tmp_path / "files", name="MADFormer")
    import_run(Path("owner/MADFormer"), tmp_path / "run", "ema", [])
    imported = OmegaConf.load(tmp_path / "run/config.yaml").frozen.imported
    assert imported.source == "owner/MADFormer" and imported.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["nowhere.pt", "a/nowhere.pt", "a/b/c", "nowhere"])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(InputError, match=f"^{name}: no such file$"):
        import_run(Path(name), tmp_path / "run", "ema", [])


def bos_tokenizer(folder):
    """The builtin tokenizer with a BOS token and one that ends a text."""
    tokenizer = Tokenizer.from_file(str(Path(prompts.__file__).with_name(prompts.BUILTIN_FILE)))
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("branch", ["main", "imagenet"])
def test_an_imported_run_is_evaluated_sampled_tuned_and_reported(branch, tmp_path):
    """Random weights of a released model of the digits' size, in files as the released code saves them."""
    text = TextConfig(BUILTIN_VOCABULARY + 2, length=2, pad_token_id=BUILTIN_VOCABULARY + 1, dropout=0, final_norm=False)
    habits = {"rope": "released", "prediction_type": "epsilon", "clean_timestep": "released"}
    unet = UNetConfig(channels=(8, 16), layers=(1, 1), attention=(False, True))
    sizes = {"latent_channels": 1, "latent_size": 8, "ar_length": 4, "depth": 3, "diffusion_depth": 2}
    sizes |= {"width": 64, "num_heads": 1, "ffn_width": 24, "unet": unet, "text": text if branch == "imagenet" else None}
    torch.manual_seed(0)
    weights = to_released(MADFormer(ModelConfig(**sizes, **habits)))
    file, run = released(tmp_path / "ckpts.pt", weights), tmp_path / "runs/imported"
    tokenizer = [f"data.tokenizer={bos_tokenizer(tmp_path / 'tokenizer')}"] if branch == "imagenet" else []
    settings = [f"evaluation.references={HUB.name}/references", "evaluation.num_samples=16", "evaluation.nfe=[5,7]"]
    perform(command("import", file, "--out", run, *settings, *tokenizer))
    perform(command("evaluate", run))
    perform(command("tune", run, "--nfe", "5", "--tries", "2", "evaluation.num_samples=8"))
    perform(command("sample", run, "--num", 2, "--steps", 1, "--out", tmp_path / "samples", *["--classes=7"] * len(tokenizer)))
    assert read_settings(tmp_path / "samples/000000.png")["prompt"] == ("7" if tokenizer else "")
    printed = perform(command("report", run, "--out", tmp_path / "report"))
    assert "imported" in printed and (tmp_path / "report/report.md").is_file()
    points = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert {point["nfe"] for point in points} >= {5, 7}


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
    with pytest.raises(InputError, match=r"evil\.pt: holds more than tensors, numbers and a Namespace, .*$"):
        import_run(tmp_path / "evil.pt", tmp_path / "run", "ema", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}, "args": argparse.Namespace(**SWITCHES)}, "must hold ema, it holds model, args: say --weights model$"),
        ({"state_dict": {}, "args": {}}, "must hold ema, it holds state_dict, args: torch.save the weights as its ema$"),
        ({"module.boi_block": torch.zeros(1)}, "lack clear_clean"),
        (
            {"ema": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}, "args": SWITCHES},
            "names begin with 'module.', which a wrapper added: remove it from each name$",
        ),
        ([WEIGHTS], "no released checkpoint: it holds a list, not ema$"),
        ({"ema": dict(WEIGHTS)}, r"its args lack .*: say model\.use_clean_blocks=\.\.\. "),
        ({"ema": dict(WEIGHTS), "args": argparse.Namespace(**{**SWITCHES, "clear_clean": "no"})}, "must be of type bool"),
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


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world\n", pickle.dumps({"ema": 1, "args": 2}), zipfile.ZipFile], ids=str)
def test_a_file_of_another_kind_is_one_line(content, name, tmp_path):
    if content is zipfile.ZipFile:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a", "b")
    else:
        (tmp_path / name).write_bytes(content)
    printed = perform(command("import", tmp_path / name, "--out", tmp_path / "run"), status=2)
    assert printed.startswith(f"madformer: {tmp_path / name}: ") and len(printed.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    whole = bytearray(released(tmp_path / "released.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "released.pt").write_bytes(whole)
    with pytest.raises(InputError, match="does not match its checksum"):
        import_run(tmp_path / "released.pt", tmp_path / "run", "ema", [])


@pytest.mark.parametrize("dtypes", [[torch.float16], [torch.float32, torch.float16], [torch.float64], [torch.float8_e4m3fn]])
def test_a_run_has_float32_weights(dtypes, tmp_path):
    kinds = itertools.cycle(dtypes)
    weights = {name: tensor.to(next(kinds)) for name, tensor in WEIGHTS.items()}
    torch.save({"model": weights, "args": argparse.Namespace(**SWITCHES)}, tmp_path / "file.pt")
    import_run(tmp_path / "file.pt", tmp_path / "run", "model", [])
    loaded = load_model(checkpoint_path(tmp_path / "run", 0), load_run(tmp_path / "run")).state_dict()
    expected = from_released({name: tensor.float() for name, tensor in weights.items()}, diffusion_depth=2, ar_length=4)
    assert differences(dict(expected.state_dict()), dict(loaded)) == []


def test_safetensors_of_another_model_are_told_what_is_missing(tmp_path):
    save_file({"embed.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors: no released state dict, which has boi_block, and no export"):
        import_run(tmp_path / "other.safetensors", tmp_path / "run", "ema", [])


@pytest.mark.parametrize("stop", ["os.fsync", "madformer.runs.exchange.write_config"], ids=["checkpoint", "configuration"])
def test_an_import_that_was_killed_is_repeated(stop, tmp_path):
    file, run = released(tmp_path / "released.pt"), tmp_path / "run"
    kill = f"import sys, madformer.cli as c, madformer.runs.exchange, os; {stop} = lambda *a, **k: os._exit(9); c.main()"
    arguments = command("import", file, "--out", run)
    killed = subprocess.run([sys.executable, "-c", kill, *arguments[3:]], env=environment(), check=False)
    assert killed.returncode == 9 and (run / "checkpoints").is_dir() and not (run / "config.yaml").exists()
    done = perform(arguments)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000000.ckpt"]
    assert perform(arguments) == done, "as if it had been killed after the last file"
    printed = perform([*arguments, "--weights", "model"], status=2)
    assert printed == f"madformer: {run}: exists already; name a new folder\n"


def test_an_export_of_integers_is_refused(tmp_path):
    import_run(released(tmp_path / "released.pt"), tmp_path / "run", "ema", [])
    export_run(tmp_path / "run", tmp_path / "weights.safetensors", "ema")
    state = load_file(tmp_path / "weights.safetensors")
    save_file({**state, "boi_SD": state["boi_SD"].int()}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights\.safetensors: boi_SD holds no floating-point numbers"):
        import_run(tmp_path / "weights.safetensors", tmp_path / "new", "ema", [])


def test_a_torn_export_is_refused(tmp_path):
    import_run(released(tmp_path / "released.pt"), tmp_path / "run", "ema", [])
    export_run(tmp_path / "run", tmp_path / "weights.safetensors", "ema")
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"weights\.safetensors: not the weights of"):
        import_run(tmp_path / "weights.safetensors", tmp_path / "new", "ema", [])
