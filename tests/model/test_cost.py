"""Formulas against what torch counts."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from madformer.config import DiffusionConfig, LossConfig, ModelConfig, UNetConfig, load_experiment
from madformer.diffusion.losses import compute_losses, wanted_outputs
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.errors import ConfigError
from madformer.model import MADFormer, cost, memory
from madformer.model.generation import KeyValueCache, generate
from tests.conftest import ROOT, TEXT, counted_flops

unets = st.sampled_from(
    [
        UNetConfig(channels=(16,), layers=(1,), attention=(False,), num_heads=2),
        UNetConfig(channels=(16, 32), layers=(1, 2), attention=(False, True), num_heads=2),
        UNetConfig(channels=(16, 32, 16), layers=(2, 1, 1), attention=(True, False, True), num_heads=2),
    ]
)
configs = st.builds(
    ModelConfig,
    latent_channels=st.sampled_from([1, 4]),
    latent_size=st.just(16),
    ar_length=st.sampled_from([1, 4]),
    depth=st.just(3),
    diffusion_depth=st.integers(1, 3),
    width=st.just(32),
    num_heads=st.just(4),
    num_kv_heads=st.sampled_from([None, 2]),
    ffn_width=st.just(48),
    use_clean_blocks=st.booleans(),
    use_condition=st.booleans(),
    local_denoising=st.booleans(),
    parameter_sets=st.sampled_from(["separate", "shared"]),
    unet=unets,
    text=st.sampled_from([None, TEXT]),
    attention_backend=st.just("sdpa"),
)


def loss_config(config, hidden, clean_tower):
    clean_tower = clean_tower and config.use_clean_blocks and config.ar_length > 1
    return LossConfig(lambda_hidden=0.1 * (hidden and config.use_condition), lambda_clean_tower=0.1 * clean_tower)


def step(model, weights, draws, device):
    """Forward and losses of a batch of two."""
    config = model.config
    shape = (config.ar_length, config.latent_channels, config.block_size, config.block_size)
    clean, noise = torch.randn(2, *shape, device=device), torch.randn(2 * draws, *shape, device=device)
    t = torch.zeros(2 * draws, config.ar_length, dtype=torch.long, device=device)
    text = torch.ones(2, config.text.length, dtype=torch.long, device=device) if config.text else None
    schedule = NoiseSchedule(DiffusionConfig())
    return compute_losses(model, schedule, weights, clean, noise, t, text)


def on_meta(config):
    with torch.device("meta"):
        return MADFormer(config)


@given(configs)
def test_parameters_by_part_add_up(config):
    model = on_meta(config)
    parts = cost.parameters(config)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert parts["downsampler"] == sum(parameter.numel() for parameter in model.downsampler.parameters())
    assert parts["upsampler"] == sum(parameter.numel() for parameter in model.upsampler.parameters())


@pytest.mark.parametrize(
    ("experiment", "least", "most"), [("ffhq1024", 1_300_243_844, 1_300_243_844), ("imagenet256", 2.05e9, 2.2e9)]
)
def test_presets_have_the_paper_s_size(experiment, least, most):
    config = load_experiment(ROOT / f"experiments/{experiment}.yaml").model
    assert least <= sum(cost.parameters(config).values()) <= most
    assert sum(parameter.numel() for parameter in on_meta(config).parameters()) == sum(cost.parameters(config).values())


@settings(max_examples=12)
@given(configs, st.booleans(), st.booleans(), st.integers(1, 2), st.booleans())
def test_training_flops_are_those_counted(config, hidden, clean_tower, draws, checkpointing):
    config = dataclasses.replace(config, activation_checkpointing=checkpointing)
    model, weights = MADFormer(config), loss_config(config, hidden, clean_tower)
    with counted_flops() as counter:
        losses = step(model, weights, draws, "cpu")
        forward = counter.get_total_flops()
        losses.total.backward()
    flops = cost.training_flops(config, wanted_outputs(weights), draws)
    assert 2 * flops.forward == pytest.approx(forward, rel=1e-3)
    assert 2 * flops.total == pytest.approx(counter.get_total_flops(), rel=2e-3)
    assert (flops.recomputation > 0) == checkpointing and flops.model_flops == flops.total - flops.recomputation


@settings(max_examples=12)
@given(configs, st.integers(1, 3), st.booleans())
def test_sampling_flops_are_those_counted(config, steps, guided):
    guided = guided and config.text is not None
    noise = torch.randn(2, config.ar_length, config.latent_channels, config.block_size, config.block_size)
    text = torch.zeros(2, 3, dtype=torch.long) if config.text else None
    with counted_flops() as counter:
        scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
        generate(MADFormer(config), scheduler, steps, initial_noise_BLCYX=noise, text=text, guidance=2.0 if guided else 1.0)
    assert 2 * cost.sampling_flops(config, guidance=guided).total(steps) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(("diffusion_depth", "gigaflops"), [(7, 264), (14, 352), (21, 439), (28, 527)])
def test_a_denoising_step_at_the_released_size(diffusion_depth, gigaflops):
    config = dataclasses.replace(load_experiment(ROOT / "experiments/ffhq1024.yaml").model, diffusion_depth=diffusion_depth)
    flops = cost.sampling_flops(config)
    assert flops.step_unet / config.ar_length / 1e9 == pytest.approx(176, abs=0.5)
    assert (flops.step_unet + flops.step_layers) / config.ar_length / 1e9 == pytest.approx(gigaflops, abs=0.5)


@pytest.mark.parametrize(("budget", "steps"), [(280, 19), (700, 49), (1400, 99), (2800, 199), (28, 1)])
def test_nfe_and_steps(budget, steps):
    config = load_experiment(ROOT / "experiments/ffhq1024.yaml").model
    assert cost.steps_for_nfe(config, budget) == steps
    assert cost.nfe(config, steps) == budget


def test_a_budget_below_one_step_names_the_smallest():
    with pytest.raises(ConfigError, match="nfe = 27: too small for one denoising step; .* the smallest is 28"):
        cost.steps_for_nfe(load_experiment(ROOT / "experiments/ffhq1024.yaml").model, 27)


@given(configs, st.booleans())
def test_cache_memory_is_the_cache_s(config, guided):
    rows = 4 if guided else 2
    cache = KeyValueCache(config, rows, config.text.length if config.text else 0, torch.device("meta"), torch.bfloat16)
    assert memory.cache_memory(config, 2, guidance=guided) == cache.bytes
