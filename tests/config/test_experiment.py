"""Every rule of the configuration, by its message: the field, the value, what would be right."""

import hashlib
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from madformer import __version__
from madformer.config import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    TextConfig,
    UNetConfig,
    config_hash,
    load_experiment,
    load_run,
    read_config_hash,
    require_same_run,
    trained_fields,
    write_config,
)
from madformer.config.data import names_files
from madformer.config.identity import config_path, is_outdated, require_same_weights
from madformer.config.loading import build
from madformer.config.validation import setting
from madformer.errors import ConfigError, InputError
from tests.conftest import ROOT

EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))
DIGITS = ROOT / "experiments/digits.yaml"
FFHQ = ROOT / "experiments/ffhq1024.yaml"

BAD = {
    "model.latent_channels=0": "model.latent_channels = 0: must be an integer of at least 1",
    "model.latent_size=0": "model.latent_size = 0: must be an integer of at least 1",
    "model.depth=0": "model.depth = 0: must be an integer of at least 1",
    "model.diffusion_depth=0": "model.diffusion_depth = 0: must be in 1..8 (model.depth)",
    "model.diffusion_depth=9": "model.diffusion_depth = 9: must be in 1..8 (model.depth)",
    "model.ar_length=0": "model.ar_length = 0: must be an integer of at least 1",
    "model.ar_length=5": "model.ar_length = 5: must be a square number (1, 4, 16, 64, ...)",
    "model.ar_length=9": "model.ar_length = 9: its root 3 must divide model.latent_size = 8",
    "model.width=63": "model.width = 63: must be a multiple of model.num_heads = 2",
    "model.width=0": "model.width = 0: must be an integer of at least 1",
    "model.num_heads=0": "model.num_heads = 0: must be an integer of at least 1",
    "model.num_heads=16": "model.num_heads = 16: the head width, model.width / model.num_heads = 2, must divide by 4",
    "model.num_kv_heads=3": "model.num_kv_heads = 3: must divide model.num_heads = 2",
    "model.num_kv_heads=0": "model.num_kv_heads = 0: must divide model.num_heads = 2",
    "model.attention_backend=flex model.num_heads=4": (
        "model.attention_backend = 'flex': needs heads of at least 16, they are 8 wide; set it to sdpa or auto"
    ),
    "model.ffn_width=-1": "model.ffn_width = -1: must be an integer of at least 1",
    "model.rope=sinusoidal": "model.rope: Invalid value 'sinusoidal', expected one of ['axial', 'released']",
    "model.parameter_sets=one": "model.parameter_sets: Invalid value 'one', expected one of ['separate', 'shared']",
    "model.prediction_type=x0": "model.prediction_type: Invalid value 'x0', expected one of ['sample', 'epsilon', 'v_prediction']",
    "model.clean_timestep=last": "model.clean_timestep: Invalid value 'last', expected one of ['zero', 'released']",
    "model.timestep_embedding=fourier": (
        "model.timestep_embedding: Invalid value 'fourier', expected one of ['raw', 'sinusoidal']"
    ),
    "model.unet.time_embed_dim=33": "model.unet.time_embed_dim = 33: must be even with model.timestep_embedding=sinusoidal",
    "evaluation.spacing=cosine": "evaluation.spacing = 'cosine': must be uniform, power:P with P of at least 1, logsnr, karras",
    "evaluation.spacing=power:0.5": "evaluation.spacing = 'power:0.5': its number must be in 1..100",
    "evaluation.spacing=karras:x": "evaluation.spacing = 'karras:x': must be uniform, power:P",
    "evaluation.spacing=list:5/5": "evaluation.spacing = 'list:5/5': must list falling timesteps, as in list:999/500/0",
    "evaluation.spacing=list:999/500 evaluation.nfe=[16] evaluation.preview_every=null": (
        "evaluation.spacing = 'list:999/500': its timesteps are 2, evaluation.nfe = 16 makes 3 steps"
    ),
    "evaluation.spacing=list:1000/500/1 evaluation.nfe=[16] evaluation.preview_every=null": (
        "evaluation.spacing = 'list:1000/500/1': must start at full noise, 999 (diffusion.train_timesteps - 1)"
    ),
    "evaluation.spacing=list:999/5/1 evaluation.nfe=[16]": "evaluation.preview_nfe = 64 makes 15 steps",
    "evaluation.guidance_interval=900": "evaluation.guidance_interval = '900': must be all, or lowest and highest timestep",
    "evaluation.guidance_interval=900/100": "evaluation.guidance_interval = '900/100': must be all, or lowest and highest",
    "model.attention_backend=xformers": "model.attention_backend: Invalid value 'xformers', expected one of ['auto', 'flex', 'sdpa']",
    "model.compile=maybe": "model.compile: Invalid value 'maybe', expected one of ['auto', true, false]",
    "model.unet.channels=[]": "model.unet.channels = []: must name at least one level",
    "model.unet.channels=[12]": "model.unet.channels = [12]: must be positive multiples of model.unet.groups = 8",
    "model.unet.channels=[32,64]": "model.unet.layers = [1]: must have one entry for each of the 2 levels of model.unet.channels",
    "model.unet.attention=[true,false]": "model.unet.attention = [True, False]: must have one entry for each of the 1 levels",
    "model.unet.layers=[0]": "model.unet.layers = [0]: must be at least 1 on every level",
    "model.unet.groups=0": "model.unet.groups = 0: must be an integer of at least 1",
    "model.unet.num_heads=5 model.unet.attention=[true]": "levels with attention must be multiples of model.unet.num_heads = 5",
    "model.unet.channels=[8,8,8,8] model.unet.layers=[1,1,1,1] model.unet.attention=[false,false,false,false]": (
        "model.unet.channels = [8, 8, 8, 8]: their downsampling by 8 must divide a block's side, 4 latents"
    ),
    "model.text.vocab_size=1": "model.text.vocab_size = 1: must be an integer of at least 2",
    "model.text.length=0": "model.text.length = 0: must be an integer of at least 1",
    "model.text.pad_token_id=200000": "model.text.pad_token_id = 200000: must be in 0..128255 (model.text.vocab_size - 1)",
    "model.text.dropout=1": "model.text.dropout = 1.0: must be at least 0 and below 1",
    "diffusion.train_timesteps=0": "diffusion.train_timesteps = 0: must be an integer of at least 1",
    "diffusion.beta_start=0": "diffusion.beta_start = 0.0: must be between 0 and 1",
    "diffusion.beta_end=0.00001": "diffusion.beta_end = 1e-05: must be at least diffusion.beta_start = 0.0001 and below 1",
    "diffusion.draws_per_image=0": "diffusion.draws_per_image = 0: must be an integer of at least 1",
    "diffusion.draws_per_image=2 model.clean_timestep=released": "diffusion.draws_per_image = 2: several draws share the clean blocks: set",
    "loss.lambda_hidden=-0.1": "loss.lambda_hidden = -0.1: must be a finite number of at least 0",
    "loss.lambda_text=nan": "loss.lambda_text = nan: must be a finite number of at least 0",
    "loss.lambda_image=0": "loss.lambda_image = 0.0: must be above 0",
    "model.use_condition=false": "loss.lambda_hidden = 0.1: needs the condition: set loss.lambda_hidden=0 or model.use_condition=true",
    "loss.lambda_clean_tower=1 model.use_clean_blocks=false": (
        "loss.lambda_clean_tower = 1.0: needs clean blocks: set loss.lambda_clean_tower=0 or model.use_clean_blocks=true"
    ),
    "loss.lambda_clean_tower=1 model.ar_length=1": "loss.lambda_clean_tower = 1.0: a single block has no next one: set",
    "model.depth=eight": "model.depth: Value 'eight' of type 'str' could not be converted to Integer",
    "model.depth=2.5": "model.depth: Value '2.5' of type 'float' could not be converted to Integer",
    "model.unet.channels=[a]": "a list's entry: the value could not be converted to Integer",
    "model.unet=3": "model.unet = 3: must be a mapping of its fields (channels, layers,",
    "model.unet.channels=16": "model.unet.channels = 16: must be a list of integers",
    "evaluation.nfe=null": "evaluation.nfe = null: must be a list of integers",
    "evaluation.feature_networks=a": "evaluation.feature_networks = 'a': must be a list of names",
    "name=a/b": "name = 'a/b': must be the name of a folder",
    "seed=-1": "seed = -1: must be an integer of at least 0",
    "data.source=ffhq": "data.codec = 'pixels': images have 3 channels, the model 1: set model.latent_channels=3, or another codec",
    "data.codec=vae": "data.codec = 'vae': must be pixels, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class",
    "data.codec=vae:somewhere": "data.codec = 'vae:somewhere': digits need no codec: set data.codec=pixels",
    "data.latents=somewhere": "data.latents = 'somewhere': digits need none: set data.latents=null",
    "data.flip=true": "data.flip = true: digits must not be mirrored: set data.flip=false",
    "data.codec_dtype=fp8": "data.codec_dtype: Invalid value 'fp8', expected one of ['float32', 'bfloat16', 'float16']",
    "data.workers=-1": "data.workers = -1: must be an integer of at least 0",
    "data.codec_batch_size=0": "data.codec_batch_size = 0: must be an integer of at least 1",
    "model.latent_channels=3": "data.source = 'digits': its images are 1 x 8 x 8, the model's latents 3 x 8 x 8",
    "model.text.length=7 data.tokenizer=builtin": (
        "model.text = 'vocab_size 128256, pad_token_id 128004': for data.tokenizer=builtin set model.text.vocab_size=2048 and"
    ),
    "data.batch_size=0": "data.batch_size = 0: must be an integer of at least 1",
    "data.batch_size_per_device=0": "data.batch_size_per_device = 0: must be an integer of at least 1",
    "optimizer.lr=0": "optimizer.lr = 0.0: must be above 0",
    "optimizer.lr=inf": "optimizer.lr = inf: must be a finite number of at least 0",
    "optimizer.weight_decay=-1": "optimizer.weight_decay = -1.0: must be a finite number of at least 0",
    "optimizer.betas=[0.9]": "optimizer.betas = [0.9]: must be two numbers of at least 0 and below 1",
    "optimizer.betas=[0.9,1]": "optimizer.betas = [0.9, 1.0]: must be two numbers of at least 0 and below 1",
    "optimizer.grad_clip=0": "optimizer.grad_clip = 0.0: must be above 0",
    "optimizer.ema_decay=1": "optimizer.ema_decay = 1.0: must be at least 0 and below 1",
    "optimizer.warmup_fraction=2": "optimizer.warmup_fraction = 2.0: must be between 0 and 1",
    "optimizer.decay_fraction=0.99": "optimizer.decay_fraction = 0.99: together with optimizer.warmup_fraction = 0.03 it must not exceed 1",
    "optimizer.warmup_steps=-1": "optimizer.warmup_steps = -1: must be an integer of at least 0",
    "optimizer.warmup_steps=2000": "optimizer.warmup_steps = 2000: with a decay of ",
    "trainer.checkpoint_steps=[5,0]": "trainer.checkpoint_steps = [5, 0]: must be integers of at least 1",
    "trainer.max_steps=0": "trainer.max_steps = 0: must be an integer of at least 1",
    "trainer.checkpoint_every=0": "trainer.checkpoint_every = 0: must be an integer of at least 1",
    "trainer.keep_checkpoints=0": "trainer.keep_checkpoints = 0: must be an integer of at least 1",
    "trainer.threads=0": "trainer.threads = 0: must be an integer of at least 1",
    "trainer.devices=0": "trainer.devices = 0: must be an integer of at least 1",
    "trainer.strategy=horovod": "trainer.strategy: Invalid value 'horovod', expected one of ['auto', 'ddp', 'fsdp']",
    "trainer.precision=16": "trainer.precision: Invalid value '16', expected one of ['32-true', 'bf16-mixed']",
    "evaluation.nfe=[]": "evaluation.nfe = []: must name at least one budget",
    "evaluation.nfe=[7]": "evaluation.nfe = 7: with model.depth = 8 and model.diffusion_depth = 4 a budget must be in 8..4007",
    "evaluation.nfe=[4008]": "a budget must be in 8..4007",
    "evaluation.preview_nfe=4": "evaluation.preview_nfe = 4: with model.depth = 8",
    "evaluation.num_samples=1": "evaluation.num_samples = 1: must be an integer of at least 2",
    "evaluation.num_samples=2000000": "evaluation.num_samples = 2000000: must be at most 1,000,000, each has a seed of its own",
    "evaluation.seed=5000": "evaluation.seed = 5000: must be in 0..4000",
    "evaluation.feature_networks=[inceptoin]": "evaluation.feature_networks = 'inceptoin': must be digits, cifar10, inception, inception:FILE, ",
    "evaluation.feature_networks=[digits,digits]": "evaluation.feature_networks = ['digits', 'digits']: name each of them once",
    "evaluation.sampler=heun": "Invalid value 'heun', expected one of ['ddim', 'ddpm', 'dpmsolver++', 'unipc']",
    "evaluation.guidance=1.5": "evaluation.guidance = 1.5: there is nothing to guide towards: set it to 1, or train a model with text",
    "evaluation.held_out_split=''": "evaluation.held_out_split = '': must not be empty",
    "model.dept=3": "unknown key model.dept; the nearest is model.depth",
    "model.unet.chanels=[8]": "unknown key model.unet.chanels; the nearest is model.unet.channels",
    "modle.depth=3": "unknown key modle; the nearest is model",
    "model.depth": "override = 'model.depth': must have the form section.field=value",
}


@pytest.mark.parametrize("overrides", BAD)
def test_a_bad_configuration_says_what_is_wrong_and_what_would_be_right(overrides):
    with pytest.raises(ConfigError) as caught:
        load_experiment(DIGITS, overrides.split())
    assert BAD[overrides] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(rope="sinusoidal"), "model.rope = 'sinusoidal': must be one of axial, released"),
        (lambda: ModelConfig(compile="yes"), "model.compile = 'yes': must be one of auto, true, false"),
        (lambda: ModelConfig(depth=2.5), "model.depth = 2.5: must be an integer of at least 1"),
        (lambda: ModelConfig(use_condition="false"), "model.use_condition = 'false': must be of type bool"),
        (lambda: ModelConfig(text={}), "model.text = {}: must be of type"),
        (lambda: ModelConfig(unet=None), "model.unet = null: must be of type UNetConfig"),
        (lambda: UNetConfig(layers=(2.5, 2)), r"model.unet.layers = (2.5, 2): must be a list of int"),
        (lambda: LossConfig("a"), "loss.lambda_text = 'a': must be a finite number"),
        (lambda: ModelConfig(ar_length=True), "model.ar_length = true: must be an integer"),
        (lambda: TextConfig(pad_token_id=-1), "model.text.pad_token_id = -1: must be in 0..128255"),
        (lambda: LossConfig(lambda_hidden=math.inf), "loss.lambda_hidden = inf: must be a finite number"),
    ],
)
def test_construction_in_python_obeys_the_same_rules(build, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_load(path):
    assert load_experiment(path).name == path.stem


def test_the_defaults_are_the_paper_s():
    config = ExperimentConfig()
    assert (config.loss.lambda_text, config.loss.lambda_image, config.loss.lambda_hidden, config.loss.lambda_clean_tower) == (
        1,
        5,
        0.1,
        0,
    )
    assert config.model == load_experiment(ROOT / "experiments/ffhq1024.yaml").model
    assert config.model.block_tokens == 256


def test_the_paper_s_runs_in_full():
    ffhq, imagenet = (load_experiment(ROOT / f"experiments/{name}.yaml") for name in ("ffhq1024", "imagenet256"))
    assert (ffhq.trainer.max_steps, ffhq.data.batch_size) == (210_000, 64)
    assert (imagenet.trainer.max_steps, imagenet.data.batch_size) == (250_000, 256)
    for config in (ffhq, imagenet):
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.grad_clip) == (3e-4, (0.9, 0.95), 0.05, 1.0)
        assert (optimizer.warmup_fraction, optimizer.decay_fraction, optimizer.decay_halvings) == (0.01, 0.15, 6.0)
        assert (optimizer.ema_decay, config.trainer.precision, config.trainer.checkpoint_every) == (
            0.9999,
            "bf16-mixed",
            10_000,
        )
    assert (ffhq.evaluation.nfe, ffhq.evaluation.num_samples) == ((280, 700, 1400, 2800), 8000)
    assert (imagenet.evaluation.nfe, imagenet.evaluation.num_samples) == ((84, 140, 224, 280, 700), 50_000)


SAME_WEIGHTS = (
    "name=other",
    "output_dir=elsewhere",
    "evaluation.nfe=[99]",
    "evaluation.seed=3",
    "trainer.devices=2",
    "trainer.threads=3",
    "trainer.strategy=fsdp",
    "trainer.checkpoint_every=7",
    "trainer.keep_checkpoints=1",
    "trainer.checkpoint_steps=[3]",
    "optimizer.warmup_steps=null",
    "trainer.log_every=3",
    "trainer.deterministic=true",
    "data.batch_size_per_device=8",
    "model.compile=auto",
    "model.compile=true",
    "model.compile=false",
    "model.activation_checkpointing=true",
    "model.attention_backend=sdpa",
)
OTHER_WEIGHTS = (
    "seed=1",
    "model.diffusion_depth=2",
    "loss.lambda_hidden=0",
    "diffusion.beta_end=0.01",
    "data.batch_size=48",
    "data.crop=top_left",
    "data.prompts=numbers",
    "data.padding_side=left",
    "optimizer.lr=1",
    "optimizer.warmup_steps=20",
    "optimizer.ema_decay=0.9",
    "trainer.max_steps=5",
    "trainer.precision=bf16-mixed",
    "model.unet.groups=4",
)


def test_the_hash_is_over_what_changes_the_weights():
    hashes = {override: config_hash(load_experiment(DIGITS, [override])) for override in SAME_WEIGHTS + OTHER_WEIGHTS}
    unchanged = config_hash(load_experiment(DIGITS))
    assert {hashes[override] for override in SAME_WEIGHTS} == {unchanged}
    assert len({hashes[override] for override in OTHER_WEIGHTS} | {unchanged}) == len(OTHER_WEIGHTS) + 1


@pytest.mark.parametrize("spelling", ["data/photos/", "./data/photos", "data//photos/.", "~/photos/", "hf://datasets/a/b/"])
def test_the_spelling_of_a_source_does_not_change_the_hash(spelling):
    plain = {"~/photos/": "~/photos", "hf://datasets/a/b/": "hf://datasets/a/b/"}.get(spelling, "data/photos")
    one, other = (config_hash(ExperimentConfig(data=DataConfig(source=source))) for source in (spelling, plain))
    assert one == other != config_hash(ExperimentConfig(data=DataConfig(source="data/photos2")))


def test_hashes_stay_as_they_are():
    """Runs on disk are known by them: a change here makes every existing run another experiment's."""
    assert config_hash(ExperimentConfig()) == "c55d206fcc406a8f"
    assert config_hash(load_experiment(DIGITS)) == "a50f04daf6a9741b"
    # Without auxiliary outputs, or with the released code's timesteps, they are those of version 0.1.0.
    no_auxiliary = ExperimentConfig(loss=LossConfig(lambda_hidden=0))
    assert config_hash(no_auxiliary) == "0f25de509e3b970f"
    assert config_hash(replace(no_auxiliary, model=ModelConfig(text=TextConfig()))) == "ab4444780d41b767"
    assert config_hash(ExperimentConfig(model=ModelConfig(clean_timestep="released"))) == "0f1eb0500a3c914e"


@dataclass(frozen=True)
class WindowConfig:
    """A section that is added to the model later."""

    size: int = 4
    shift: int = setting(1, neutral=1)
    log: bool = setting(False, new_run=False)


@dataclass(frozen=True)
class LaterModel(ModelConfig):
    """The model with a setting and a section more than existing runs have."""

    dropout: float = setting(0.0, neutral=0.0)
    window: WindowConfig | None = setting(None, neutral=None)


@dataclass(frozen=True)
class LaterExperiment(ExperimentConfig):
    """An experiment that holds a later model."""

    model: LaterModel = field(default_factory=LaterModel)


@given(
    st.sampled_from([0.0, 0.1, 0.2]), st.none() | st.builds(WindowConfig, st.integers(1, 3), st.integers(1, 3), st.booleans())
)
def test_a_field_that_is_added_later_leaves_existing_hashes_as_they_are(dropout, window):
    later = LaterExperiment(model=LaterModel(dropout=dropout, window=window))
    added = {"model.dropout": dropout} if dropout else {}
    if window is not None:
        added |= {"model.window.size": window.size}
        added |= {"model.window.shift": window.shift} if window.shift != 1 else {}
    assert trained_fields(later) == trained_fields(ExperimentConfig()) | added
    assert (config_hash(later) == config_hash(ExperimentConfig())) == (not added)
    assert build(LaterExperiment, OmegaConf.structured(later)) == later


def test_a_neutral_value_is_compared_with_others():
    before, later = LaterExperiment(), LaterExperiment(model=LaterModel(dropout=0.1))
    require_same_weights(before, LaterExperiment(model=LaterModel(dropout=0.0)), "run")
    with pytest.raises(InputError, match=r"another experiment: model.dropout = 0.0 there, 0.1 asked for"):
        require_same_weights(before, later, "run")


@pytest.mark.parametrize(
    ("overrides", "revised"),
    [
        ("", True),
        ("loss.lambda_hidden=0", False),
        ("loss.lambda_hidden=0 loss.lambda_clean_tower=0.1", True),
        ("model.clean_timestep=released", False),
    ],
)
def test_a_run_whose_auxiliary_outputs_were_at_timestep_0_is_refused(tmp_path, overrides, revised):
    config = load_experiment("experiments/digits.yaml", [*overrides.split(), f"output_dir={tmp_path}"])
    write_config(config, config.run_dir)
    require_same_run(config)
    path, fields = config_path(config.run_dir), json.dumps(trained_fields(config), sort_keys=True)
    before = hashlib.sha256(fields.encode()).hexdigest()[:16]  # as version 0.1.0 had it
    path.write_text(path.read_text().replace(config_hash(config), before))
    assert is_outdated(config.run_dir) is revised
    if revised:
        with pytest.raises(InputError, match=r"digits: version 0.1.0 trained it with auxiliary outputs at timestep 0.*anew"):
            require_same_run(config)
    else:
        require_same_run(config)


def test_of_latents_only_their_presence_makes_a_new_run():
    none, here, moved = (load_experiment(FFHQ, [f"data.latents={folder}"]) for folder in ("null", "here", "moved"))
    assert config_hash(here) == config_hash(moved) != config_hash(none)


def test_the_configuration_of_a_run_reads_back(tmp_path):
    config = load_experiment(DIGITS, [f"output_dir={tmp_path}", "model.num_kv_heads=2", "name=mine"])
    write_config(config, config.run_dir)
    assert load_run(tmp_path / "mine") == config == load_experiment(tmp_path / "mine/config.yaml")
    assert read_config_hash(tmp_path / "mine") == config_hash(config) and read_config_hash(tmp_path) is None
    header = yaml.safe_load((tmp_path / "mine/config.yaml").read_text())["frozen"]
    assert header == {"madformer": __version__, "config_hash": config_hash(config)}
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert load_run(tmp_path / "moved").run_dir == tmp_path / "moved"
    with pytest.raises(InputError, match=r"moved is a run of another experiment: seed = 0 there, 1 asked for"):
        load_run(tmp_path / "moved", ["seed=1"])
    assert load_run(tmp_path / "moved", ["trainer.log_every=1"]).trainer.log_every == 1


def test_lists_and_tuples_are_the_same_configuration():
    assert UNetConfig(channels=[512, 1024]) == UNetConfig() and hash(UNetConfig(channels=[512, 1024])) == hash(UNetConfig())


def test_overrides_win_over_the_file():
    config = load_experiment(
        DIGITS, ["model.diffusion_depth=2", "loss.lambda_hidden=1e-2", "data.source=null", "model.text.length=7"]
    )
    assert config.model.diffusion_depth == 2 and config.loss.lambda_hidden == 0.01
    assert config.model.text.length == 7 and config.data.source is None


@pytest.mark.parametrize(
    "text",
    [
        "model: {depth: 3",
        "- a\n- b",
        "3",
        "model: [1, 2]",
        "evaluation: {nfe: {a: 1}}",
        "\x00",
        "name: ${",
        "name: ${oc.env:NOPE}",
        "3: 1",
    ],
    ids=["brace", "list", "number", "section", "no list", "binary", "interpolation", "environment", "key"],
)
def test_a_broken_file_is_one_clear_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_may_be_another_field_s(tmp_path):
    path = tmp_path / "lists.yaml"
    path.write_text(f"base: {DIGITS}\nmodel: {{unet: {{channels: [16], layers: '${{model.unet.channels}}'}}}}")
    assert load_experiment(path).model.unet.layers == (16,)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such experiment file"):
        load_experiment("nowhere.yaml")


def test_checking_a_configuration_imports_nothing_heavy():
    modules = "madformer.config, madformer.errors, madformer.model.cost, madformer.model.memory, madformer.runs.checkpoints"
    code = f"import sys, {modules}; print({{'torch', 'lightning'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


def test_an_experiment_changes_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.yaml").write_text(f"base: {DIGITS}\nname: one\nmodel: {{diffusion_depth: 2}}\n")
    (tmp_path / "sub/two.yaml").write_text("base: ../one.yaml\nmodel: {width: 64, unet: {channels: [32]}}\n")
    made, digits = load_experiment(tmp_path / "sub/two.yaml", ["seed=3"]), load_experiment(DIGITS)
    assert (made.name, made.model.diffusion_depth, made.model.width, made.seed) == ("one", 2, 64, 3)
    assert made.model.unet.channels == (32,) and made.model.unet.layers == digits.model.unet.layers
    assert made.data == digits.data
    write_config(made, made.run_dir)
    assert load_run(made.run_dir) == made
    (tmp_path / "three.yaml").write_text("base: runs/one/config.yaml\nname: three\n")
    assert load_experiment(tmp_path / "three.yaml") == replace(made, name="three")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: other.yaml", "other.yaml: no such experiment file"),
        ("base: [one.yaml]", "one.yaml: base = ['one.yaml']: must be the path of another experiment's file"),
        ("base: two.yaml", "two.yaml: base = 'one.yaml': must not be based on this file itself"),
        ("base: wrong.yaml", "wrong.yaml: unknown key model.dept; the nearest is model.depth"),
        (f"base: {DIGITS}\nmodel: {{dept: 1}}", "one.yaml: unknown key model.dept; the nearest is model.depth"),
        ("base: type.yaml", "type.yaml: model.depth: Value 'banana' of type 'str' could not be converted to Integer"),
        ("base: middle.yaml", "type.yaml: model.depth: Value 'banana' of type 'str' could not be converted to Integer"),
        (f"base: {DIGITS}\nseed: banana", "one.yaml: seed: Value 'banana' of type 'str' could not be converted to Integer"),
        ("base: number.yaml", "number.yaml: must be a mapping of sections (model, data, trainer, ...) to fields"),
        ("base: '???'", "one.yaml: base: Missing mandatory value: base; must be the path of another experiment's file"),
        ("base: ${", "one.yaml: base: no viable alternative at input '${'"),
        (
            "base: ${oc.env:NOPE}",
            "one.yaml: base: KeyError raised while resolving interpolation: \"Environment variable 'NOPE'",
        ),
    ],
)
def test_a_mistake_in_a_base_is_one_line(tmp_path, text, message):
    (tmp_path / "one.yaml").write_text(text)
    (tmp_path / "two.yaml").write_text("base: one.yaml")
    (tmp_path / "wrong.yaml").write_text("model: {dept: 1}")
    (tmp_path / "type.yaml").write_text("model: {depth: banana}")
    (tmp_path / "middle.yaml").write_text("base: type.yaml\nmodel: {depth: 3}")
    (tmp_path / "number.yaml").write_text("3")
    with pytest.raises((ConfigError, FileNotFoundError), match=re.escape(message)) as caught:
        load_experiment(tmp_path / "one.yaml")
    assert "\n" not in str(caught.value)


def test_an_integer_in_a_field_of_floats_is_the_same_run():
    config = load_experiment(DIGITS, ["loss.lambda_hidden=0", "optimizer.lr=1"])
    built = replace(config, loss=replace(config.loss, lambda_hidden=0), optimizer=replace(config.optimizer, lr=1))
    assert built == config and config_hash(built) == config_hash(config)


def test_files_are_told_by_their_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces.parquet").mkdir()
    sources = ("faces.parquet", "FACES.PARQUET", "a/b.tar", "images/*.png", "owner/name", "photos")
    assert [names_files(source) for source in sources] == [False, True, True, True, False, False]
