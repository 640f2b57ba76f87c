"""Sampling: cached = recomputed from scratch, guidance, randomness, what it refuses and what it costs."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch.utils.flop_counter import FlopCounterMode

from madformer.model import cost
from madformer.model.blocks import to_image
from madformer.model.generate import generate
from tests.conftest import SWITCHES, TEXT, build, latents, prompts, switch_name, tiny

STEPS = 3


def ddim(prediction_type="sample"):
    return DDIMScheduler(clip_sample=False, prediction_type=prediction_type)


def recompute(model, scheduler, noise_BLCYX, text=None, guidance=1.0, interval=None):
    """Sampling without any cache: at every step the training forward over the whole image."""
    config = model.config
    clean_BLCYX, noisy_BLCYX = torch.zeros_like(noise_BLCYX), torch.zeros_like(noise_BLCYX)
    t_BL = torch.zeros(noise_BLCYX.shape[:2], dtype=torch.long)
    for block in range(config.ar_length):
        scheduler.set_timesteps(STEPS)
        clean_t = scheduler.timesteps[-1] if config.clean_timestep == "released" else torch.tensor(0)
        x_BCYX = noise_BLCYX[:, block]
        for t in scheduler.timesteps:
            noisy_BLCYX[:, block], t_BL[:, block] = x_BCYX, t
            inputs = (clean_BLCYX, noisy_BLCYX, t_BL, clean_t.expand(t_BL.shape))
            prediction = model(*inputs, text=text, outputs=()).denoised_BLCYX[:, block]
            if guidance != 1 and (interval is None or interval[0] <= t <= interval[1]):
                null = model(*inputs, outputs=()).denoised_BLCYX[:, block]
                prediction = null + guidance * (prediction - null)
            x_BCYX = scheduler.step(prediction, t, x_BCYX).prev_sample
        clean_BLCYX[:, block] = x_BCYX
    return clean_BLCYX


@pytest.mark.parametrize("switches", SWITCHES, ids=switch_name)
@pytest.mark.parametrize("depths", [(3, 1), (3, 3)], ids=str)
@torch.no_grad()
def test_cached_sampling_is_full_recomputation(switches, depths):
    config = tiny(depth=depths[0], diffusion_depth=depths[1], **switches)
    model, noise, text = build(config), latents(config), prompts(config)
    guidance = 2.0 if text is not None else 1.0
    cached = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, text=text, guidance=guidance)
    torch.testing.assert_close(cached, recompute(model, ddim(), noise, text, guidance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"ar_length": 1},
        {"ar_length": 16, "depth": 2},
        {"num_kv_heads": 1},
        {"rope": "released", "clean_timestep": "released", "prediction_type": "epsilon"},
        {"prediction_type": "v_prediction", "use_clean_blocks": False, "clean_timestep": "released"},
    ],
    ids=str,
)
@torch.no_grad()
def test_cached_sampling_is_full_recomputation_in_other_shapes(changes):
    config = tiny(latent_size=16, **changes)
    model, noise = build(config), latents(config)
    sampled = generate(model, ddim(config.prediction_type), STEPS, initial_noise_BLCYX=noise)
    expected = recompute(model, ddim(config.prediction_type), noise)
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clean", [True, False])
@torch.no_grad()
def test_guidance_acts_inside_its_interval_alone(clean):
    config = tiny(text=TEXT, use_clean_blocks=clean)
    model, noise, text = build(config), latents(config), prompts(config)
    interval = (300, 500)  # of timesteps 666, 333, 0
    options = {"text": text, "guidance": 3.0}
    sampled = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, guidance_interval=interval, **options)
    if clean:  # without clean blocks the null row's context also differs at the steps that it skips
        expected = recompute(model, ddim(), noise, text, 3.0, interval)
        torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)
    everywhere = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, **options)
    nowhere = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, guidance_interval=(1000, 1000), **options)
    plain = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, text=text)
    torch.testing.assert_close(nowhere, plain)
    assert not torch.allclose(sampled, everywhere)
    assert not torch.allclose(sampled, plain)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_a_sample_depends_on_its_own_seed_alone(scheduler_class):
    model = build(tiny()).float()
    scheduler = scheduler_class(prediction_type="sample") if scheduler_class is not PNDMScheduler else None
    if scheduler is None:
        model, scheduler = build(tiny(prediction_type="epsilon")).float(), PNDMScheduler()
    together = generate(model, scheduler, 4, seeds=[7, 8, 9])
    alone = generate(model, scheduler, 4, seeds=[9])
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(together).all()
    assert not torch.allclose(together[0], together[1])
    torch.testing.assert_close(generate(model, scheduler, 4, seeds=[7, 8, 9]), together, rtol=0, atol=0)


def test_previews_come_block_by_block():
    config = tiny()
    seen = []
    sampled = generate(
        build(config), ddim(), 2, batch_size=1, on_block=lambda block, latents: seen.append((block, latents.clone()))
    )
    assert [block for block, _ in seen] == [0, 1, 2, 3]
    for block, preview in seen:
        assert torch.equal(preview[:, : block + 1], sampled[:, : block + 1])
        assert not preview[:, block + 1 :].any()
    assert to_image(sampled).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("switches", [{}, {"use_clean_blocks": False}, {"text": TEXT}], ids=str)
def test_runs_under_bfloat16_autocast(switches):
    config = tiny(**switches)
    model, noise = build(config).float(), latents(config).float()
    plain = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, text=prompts(config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled = generate(model, ddim(), STEPS, initial_noise_BLCYX=noise, text=prompts(config))
    assert sampled.dtype == torch.float32
    first, exact = sampled[:, 0], plain[:, 0]  # later blocks see the rounding of the earlier ones
    assert 0 < (first - exact).norm() < 0.1 * exact.norm()


def test_bfloat16_weights_sample_in_float32_latents():
    model = build(tiny(text=TEXT)).float()
    options = {"seeds": [1, 2], "text": prompts(model.config)}
    exact = generate(model, ddim(), STEPS, **options)
    rounded = generate(model.bfloat16(), ddim(), STEPS, **options)
    assert rounded.dtype == torch.float32
    assert (rounded[:, 0] - exact[:, 0]).norm() < 0.1 * exact[:, 0].norm()


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (ddim("epsilon"), {"batch_size": 1}, "prediction_type = 'epsilon': must be the model's, 'sample'"),
        (FlowMatchEulerDiscreteScheduler(), {"batch_size": 1}, "prediction_type = None: must be the model's"),
        (ddim(), {}, "none given"),
        (ddim(), {"batch_size": 2, "seeds": [1]}, "seeds: 1, batch_size: 2"),
        (
            ddim(),
            {"initial_noise_BLCYX": torch.zeros(1, 16, 2, 4, 4)},
            r"has shape \(1, 16, 2, 4, 4\): must be \[images, 4, 2, 4, 4\]",
        ),
        (ddim(), {"batch_size": 1, "guidance_interval": (900, 100)}, r"guidance_interval = \(900, 100\): must be the lowest"),
        (ddim(), {"batch_size": 1, "guidance": 2.0}, "guidance = 2.0: needs text"),
        (ddim(), {"batch_size": 1, "text": torch.ones(1, 3, dtype=torch.long)}, "text given to a model without text"),
    ],
)
def test_what_cannot_be_sampled_is_refused(scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(tiny()), scheduler, 2, **options)


@pytest.mark.parametrize("steps", [0, 1.5, -1])
def test_steps_are_a_positive_number(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}: must be an integer of at least 1"):
        generate(build(tiny()), ddim(), steps, batch_size=1)


def test_timesteps_that_rounding_pushed_out_of_the_schedule_are_refused():
    # diffusers' trailing spacing adds a timestep of -1 for 61 steps: the sample would be ruined.
    trailing = DDIMScheduler(clip_sample=False, prediction_type="sample", timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"61 steps of this scheduler go from 999 to -1, outside 0\.\.999"):
        generate(build(tiny()), trailing, 61, batch_size=1)


def step_flops(config):
    """FLOPs of one denoising step of all blocks, counted as the difference between two numbers of steps."""
    with torch.device("meta"):
        model = build(config)
        noise = torch.empty(1, config.ar_length, config.latent_channels, config.block_size, config.block_size)

    def count(steps):
        with FlopCounterMode(display=False) as counter:
            generate(model, ddim(), steps, initial_noise_BLCYX=noise)
        return counter.get_total_flops()

    return count(3) - count(2)


def test_a_denoising_step_is_the_noisy_block_through_the_last_layers_alone():
    config = tiny(ar_length=4)
    size, width = config.block_tokens, config.width
    per_token = 2 * width * 3 * width + 2 * width**2 + 6 * width * config.ffn_width
    layers = sum(config.diffusion_depth * size * (per_token + 4 * width * (block + 1) * size) for block in range(4))
    assert step_flops(config) == layers + cost.sampling_flops(config).step_unet
    # The AR stage and the clean tower are not in it: neither their depth nor their absence changes it.
    assert step_flops(config) == step_flops(tiny(depth=6)) == step_flops(tiny(use_clean_blocks=False))
