"""DDIM with integer timesteps: every number of steps, and exact on a Gaussian."""

import pytest
import torch

from madformer.config import DiffusionConfig
from madformer.diffusion import NoiseSchedule
from madformer.samplers import build_sampler


def test_every_number_of_steps_starts_at_full_noise_and_descends_to_the_end():
    sampler = build_sampler(DiffusionConfig(), "sample")
    for steps in range(1, 1001):
        sampler.set_timesteps(steps)
        spacing = sampler.timesteps[:-1] - sampler.timesteps[1:]
        assert len(sampler.timesteps) == steps and sampler.timesteps[0] == 999 and sampler.timesteps[-1] >= 0
        assert bool((spacing >= 1000 // steps).all() and (spacing <= -(-1000 // steps)).all()), steps
        assert sampler.timesteps[-1] + 1 in (1000 // steps, -(-1000 // steps))


@pytest.mark.parametrize("steps", [0, 1001])
def test_other_numbers_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps}: DDIM takes 1\.\.1000"):
        build_sampler(DiffusionConfig(), "sample").set_timesteps(steps)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 61, 397])
def test_perfect_predictions_lead_to_the_clean_latents(prediction_type, steps):
    """Of a single image the best prediction is known: the image, or the noise that leads back to it."""
    config = DiffusionConfig()
    schedule, sampler = NoiseSchedule(config), build_sampler(config, prediction_type)
    generator = torch.Generator().manual_seed(0)
    clean, x = (torch.randn(1, 1, 2, 3, 3, generator=generator, dtype=torch.float64) * scale for scale in (3, 1))
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        alpha = schedule.alphas_cumprod[t].double()
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        target = {"sample": clean, "epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}
        x = sampler.step(target[prediction_type], t, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4 if prediction_type == "epsilon" else 1e-6)
