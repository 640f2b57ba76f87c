"""What only a GPU can show."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler

from madformer.config import DiffusionConfig, LossConfig
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.model import MADFormer
from madformer.model.generation import generate
from tests.conftest import TEXT, build, latents, prompts, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = {"width": 64, "num_heads": 4, "latent_size": 16}


def train(model, autocast):
    """Loss and gradients of one step with two noise draws."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    schedule, clean = NoiseSchedule(DiffusionConfig()), latents(config).float()
    noise, t = schedule.draw(clean, 2, generator)
    text = None if config.text is None else prompts(config).cuda()
    weights = LossConfig(lambda_hidden=0.1 * config.use_condition)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        total = compute_losses(model, schedule, weights, clean.cuda(), noise.cuda(), t.cuda(), text).total
    return total, torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "switches", [{}, {"text": TEXT, "num_kv_heads": 2}, {"use_clean_blocks": False}, {"local_denoising": True}], ids=str
)
def test_flex_trains_as_sdpa_does(switches, autocast):
    flex = build(tiny(**WIDE, **switches)).float().cuda()
    sdpa = MADFormer(dataclasses.replace(flex.config, attention_backend="sdpa")).cuda()
    sdpa.load_state_dict(flex.state_dict())
    (loss, gradients), (expected_loss, expected) = train(flex, autocast), train(sdpa, autocast)
    tolerance = 5e-2 if autocast else 1e-3
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    norm = torch.stack([x.norm() for x in expected]).norm()
    assert torch.stack([(a - b).norm() for a, b in zip(gradients, expected, strict=True)]).norm() < tolerance * norm


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_are_those_of_the_cpu(compiled):
    model = build(tiny(**WIDE, text=TEXT, compile=compiled)).float()
    scheduler, text = DDIMScheduler(clip_sample=False, prediction_type="sample"), prompts(model.config)
    expected = generate(model, scheduler, 3, seeds=[1, 2], text=text, guidance=2.0)
    sampled = generate(model.cuda(), scheduler, 3, seeds=[1, 2], text=text, guidance=2.0)
    torch.testing.assert_close(sampled.cpu(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.isfinite(generate(model, scheduler, 3, seeds=[1, 2], text=text, guidance=2.0)).all()
