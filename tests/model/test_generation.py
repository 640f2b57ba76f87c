"""Sampling: cached = recomputed from scratch, guidance, randomness, what it refuses and what it costs."""

from typing import get_args

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

from madformer.config import DiffusionConfig
from madformer.config.evaluation import SamplerName
from madformer.diffusion.samplers import build_sampler
from madformer.model import cost
from madformer.model.embedding import to_image
from madformer.model.generation import generate
from tests.conftest import SWITCHES, TEXT, build, counted_flops, latents, prompts, switch_name, tiny

STEPS = 3


def ddim(prediction_type="sample"):
    return DDIMScheduler(clip_sample=False, prediction_type=prediction_type)


def recompute(model, scheduler, noise_BLCYX, text=None, guidance=1.0, interval=None, context_BLCYX=None):
    """Sampling without any cache: at every step the training forward over the whole image."""
    config = model.config
    clean_BLCYX, noisy_BLCYX, sampled_BLCYX = (torch.zeros_like(noise_BLCYX) for _ in range(3))
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
        clean_BLCYX[:, block] = sampled_BLCYX[:, block] = x_BCYX
        if context_BLCYX is not None:
            clean_BLCYX[:, block] = context_BLCYX[:, block]
            noisy_BLCYX[:, block] = scheduler.add_noise(context_BLCYX[:, block], noise_BLCYX[:, block], t)
    return sampled_BLCYX


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


@pytest.mark.parametrize("switches", [switches for switches in SWITCHES if switches["text"]], ids=switch_name)
@torch.no_grad()
def test_true_blocks_take_the_place_of_generated_ones_as_context(switches):
    config = tiny(**switches)
    model, noise, true, text = build(config), latents(config), latents(config, seed=5), prompts(config)
    options = {"initial_noise_BLCYX": noise, "text": text, "guidance": 2.0}
    forced = generate(model, ddim(), STEPS, context_BLCYX=true, **options)
    expected = recompute(model, ddim(), noise, text, 2.0, context_BLCYX=true)
    torch.testing.assert_close(forced, expected, rtol=0, atol=1e-7)  # add_noise has roots of noise levels in float64
    assert torch.equal(forced[:, 0], generate(model, ddim(), STEPS, **options)[:, 0])
    blind = config.local_denoising and not config.use_condition  # each block sees the text and itself alone
    for changed in range(config.ar_length):
        other = true.clone()
        other[:, changed] += 1
        again = generate(model, ddim(), STEPS, context_BLCYX=other, **options)
        assert torch.equal(again[:, : changed + 1], forced[:, : changed + 1])
        if changed < config.ar_length - 1:
            assert torch.equal(again[:, changed + 1], forced[:, changed + 1]) == blind


@pytest.mark.parametrize("switches", SWITCHES, ids=switch_name)
@torch.no_grad()
def test_generated_blocks_as_context_change_nothing(switches):
    """With clean blocks in any number of steps; without, the noise in the context is the same at full noise alone.

    After the first step a block's noise is what the model takes for noise, no longer what the block started from. One step
    from timesteps that leave no signal at all is the case where the two are equal whatever the model.
    """
    config = tiny(**switches)
    model, noise, text = build(config), latents(config), prompts(config)
    options = {"initial_noise_BLCYX": noise, "text": text, "guidance": 2.0 if text is not None else 1.0}
    full_noise = DDIMScheduler(
        clip_sample=False, prediction_type="sample", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    runs = [(full_noise, 1)]
    if config.use_clean_blocks or config.local_denoising:
        runs += [(ddim(), STEPS)]
    for scheduler, steps in runs:
        sampled = generate(model, scheduler, steps, **options)
        assert torch.equal(generate(model, scheduler, steps, context_BLCYX=sampled, **options), sampled)


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


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_named_samplers_carry_nothing_from_image_to_image_or_block_to_block(name):
    model, sampler = build(tiny()), build_sampler(DiffusionConfig(), "sample", name)
    together = generate(model, sampler, 4, seeds=[7, 8, 9])
    backwards = generate(model, sampler, 4, seeds=[9, 8, 7])
    alone = generate(model, build_sampler(DiffusionConfig(), "sample", name), 4, seeds=[9])
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-5, atol=1e-5)  # DPM-Solver steps in float32
    torch.testing.assert_close(alone, together[2:], rtol=1e-5, atol=1e-5)
    noise, true = latents(model.config), latents(model.config, seed=5)
    options = {"seeds": [7, 8], "context_BLCYX": true}
    other = noise.clone()
    other[:, 0] += 1  # other steps in the first block: with true blocks before them, the next ones must not notice
    forced = generate(model, sampler, 4, initial_noise_BLCYX=noise, **options)
    again = generate(model, sampler, 4, initial_noise_BLCYX=other, **options)
    assert torch.equal(again[:, 1:], forced[:, 1:]) and not torch.allclose(again[:, 0], forced[:, 0])


class Recorder(DDIMScheduler):
    """Keeps what the first step of each block starts from."""

    def set_timesteps(self, *arguments, **options):
        super().set_timesteps(*arguments, **options)
        self.starts = [*getattr(self, "starts", []), None]

    def scale_model_input(self, sample, timestep=None):
        self.starts[-1] = sample if self.starts[-1] is None else self.starts[-1]
        return sample


def test_a_seed_is_the_same_image_of_noise_whatever_the_number_of_blocks():
    images = {}
    for ar_length in (1, 4, 16):
        recorder = Recorder(clip_sample=False, prediction_type="sample")
        generate(build(tiny(latent_size=16, ar_length=ar_length)).float(), recorder, 2, seeds=[7, 8])
        images[ar_length] = to_image(torch.stack(recorder.starts, dim=1))
        assert images[ar_length].shape == (2, 2, 16, 16)
    assert torch.equal(images[4], images[1]) and torch.equal(images[16], images[1])
    assert torch.equal(images[1][1], torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(8)))


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
        (ddim(), {"context_BLCYX": torch.zeros(1, 4, 2, 8, 8)}, r"context_BLCYX has shape \(1, 4, 2, 8, 8\): must be \[images"),
        (ddim(), {"context_BLCYX": torch.zeros(2, 4, 2, 4, 4), "seeds": [1]}, "seeds: 1, context_BLCYX: 2"),
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
    model, noise = build(config), latents(config, batch=1)

    def count(steps):
        with counted_flops() as counter:
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
