"""The noise schedule against diffusers', and the prediction types against each other."""

import pytest
import torch
from diffusers import DDPMScheduler

from madformer.config import DiffusionConfig
from madformer.diffusion.noise_schedule import NoiseSchedule
from tests.conftest import latents, timesteps, tiny

SCHEDULE = NoiseSchedule(DiffusionConfig())
CLEAN, NOISE, T = latents(tiny()), latents(tiny(), seed=4), timesteps(tiny())


def test_noisy_blocks_and_velocities_are_diffusers():
    scheduler = DDPMScheduler()
    flat = CLEAN.flatten(0, 1), NOISE.flatten(0, 1), T.flatten()
    torch.testing.assert_close(
        SCHEDULE.add_noise(CLEAN, NOISE, T).flatten(0, 1), scheduler.add_noise(*flat), rtol=1e-5, atol=1e-6
    )
    velocity = SCHEDULE.target("v_prediction", CLEAN, NOISE, T).flatten(0, 1)
    torch.testing.assert_close(velocity, scheduler.get_velocity(*flat), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_every_target_stands_for_the_clean_latents(prediction_type):
    noisy = SCHEDULE.add_noise(CLEAN, NOISE, T)
    target = SCHEDULE.target(prediction_type, CLEAN, NOISE, T)
    torch.testing.assert_close(SCHEDULE.to_sample(prediction_type, target, noisy, T), CLEAN, rtol=1e-3, atol=1e-3)


def test_every_block_of_every_draw_has_its_own_timestep_and_noise():
    generator = torch.Generator().manual_seed(0)
    noise, t = SCHEDULE.draw(CLEAN.expand(2, -1, -1, -1, -1), draws=500, generator=generator)
    assert noise.shape == (1000, 4, 2, 4, 4) and t.shape == (1000, 4)
    assert t.min() >= 0 and t.max() <= 999 and t.float().mean() == pytest.approx(499.5, abs=15)
    assert (t[:, 0] != t[:, 1]).float().mean() > 0.9
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)
    assert torch.corrcoef(noise.flatten(1)[:, :2].T)[0, 1].abs() < 0.1


def test_noise_levels_are_exact_whatever_the_latents_are_and_wherever_they_were_made():
    with torch.device("meta"), torch.inference_mode():
        schedule = NoiseSchedule(DiffusionConfig())
    assert torch.equal(schedule.alphas_cumprod, SCHEDULE.alphas_cumprod)
    first = torch.zeros(1, 1, dtype=torch.long)
    noisy = schedule.add_noise(torch.zeros(1, 1, 1, 1, 1).bfloat16(), torch.ones(1, 1, 1, 1, 1).bfloat16(), first)
    assert noisy.item() == pytest.approx(0.01, rel=1e-2)
