"""Samplers: integer timesteps for every number of steps, and exact on data of which the best prediction is known."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from madformer.config import DiffusionConfig
from madformer.config.evaluation import SamplerName
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.diffusion.samplers import SpacedUniPC, build_sampler, spaced_timesteps
from madformer.errors import InputError

NAMES = get_args(SamplerName)
PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")
STEPS = (1, 2, 3, 7, 15, 61, 103, 122, 201, 397, 999, 1000)  # diffusers' trailing spacing fails at 61, 103, 122, 201, 397
SHORT = DiffusionConfig(train_timesteps=10, beta_end=0.7)
EVERY_STEP = [(DiffusionConfig(), steps) for steps in STEPS] + [(SHORT, steps) for steps in range(1, 11)]


def denoise(sampler, steps, noise, best_clean, seed=0):
    """Every x from noise to latents, and how often the network was asked; `best_clean(x, alpha)` is its clean image."""
    sampler.set_timesteps(steps)
    options = {"generator": torch.Generator().manual_seed(seed)} if "DDPM" in type(sampler).__name__ else {}
    path = [noise]
    for t in sampler.timesteps:
        alpha, x = sampler.alphas_cumprod[t].double(), path[-1]
        clean = best_clean(x, alpha)
        epsilon = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * clean
        prediction = {"sample": clean, "epsilon": epsilon, "v_prediction": velocity}[sampler.config.prediction_type]
        path.append(sampler.step(prediction, t, x, **options).prev_sample)
    return path


def alphas(sampler):
    """Noise levels of the path: those of the timesteps, and 1 of clean latents."""
    return torch.cat([sampler.alphas_cumprod[sampler.timesteps], torch.ones(1)]).double()


def draw(*shape, seed=0):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", [1000, 10, 1])
def test_every_number_of_steps_starts_at_full_noise_and_descends_to_the_end(name, end):
    sampler = build_sampler(DiffusionConfig(train_timesteps=end), "sample", name)
    for steps in range(1, end + 1):
        sampler.set_timesteps(steps)
        timesteps = sampler.timesteps
        spacing = timesteps[:-1] - timesteps[1:]
        assert timesteps.dtype == torch.long and timesteps.device.type == "cpu"
        assert len(timesteps) == steps and timesteps[0] == end - 1 and timesteps[-1] >= 0
        assert bool((spacing >= end // steps).all() and (spacing <= -(-end // steps)).all()), steps
        assert timesteps[-1] + 1 in (end // steps, -(-end // steps))
        assert timesteps.tolist() == [end * (steps - index) // steps - 1 for index in range(steps)]


SPACINGS = ("power:1.5", "power:2", "power:100", "logsnr", "karras:0.1", "karras:7", "karras:100")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spaced_timesteps_start_at_full_noise_and_strictly_fall(spacing):
    for config in (DiffusionConfig(), SHORT, DiffusionConfig(train_timesteps=1)):
        end = config.train_timesteps
        for steps in [*range(1, min(end, 30) + 1), *range(31, end + 1, 97), end]:
            timesteps = spaced_timesteps(spacing, steps, NoiseSchedule(config).alphas_cumprod)
            assert len(timesteps) == steps and timesteps[0] == end - 1 and timesteps[-1] >= 0
            assert all(later < earlier for earlier, later in pairwise(timesteps)), (spacing, steps)


def test_power_spacing_is_its_formula():
    alphas_cumprod = NoiseSchedule(DiffusionConfig()).alphas_cumprod
    for steps in range(1, 200):
        exact = [1000 * (steps - i) ** 2 // steps**2 - 1 for i in range(steps)]  # in integers
        expected = [max(t, steps - 1 - i) for i, t in enumerate(exact)]
        assert spaced_timesteps("power:2", steps, alphas_cumprod) == expected
        assert spaced_timesteps("power:1.0000000001", steps, alphas_cumprod)[0] == 999


def test_logsnr_and_karras_spacing_are_even_on_their_scales():
    schedule = NoiseSchedule(DiffusionConfig()).alphas_cumprod.double()
    ratio = ((1 - schedule) / schedule).sqrt()
    for spacing, scale in (("logsnr", ratio.log()), ("karras:7", ratio ** (1 / 7)), ("karras:3", ratio ** (1 / 3))):
        timesteps = spaced_timesteps(spacing, 6, schedule)
        assert (timesteps[0], timesteps[-1]) == (999, 0)
        gaps = -scale[timesteps].diff()
        assert gaps.max() < 1.2 * gaps.min(), spacing  # even, but for rounding to whole timesteps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["power:2", "logsnr", "karras:7", "list:999/700/30/0"])
def test_every_sampler_is_exact_on_one_image_at_any_spacing(name, spacing):
    sampler, clean = build_sampler(DiffusionConfig(), "sample", name, spacing), draw(2, 3, 3, seed=1)
    path = denoise(sampler, 4, draw(2, 3, 3), lambda x, alpha: clean)
    assert sampler.timesteps.tolist() == spaced_timesteps(spacing, 4, sampler.alphas_cumprod)
    torch.testing.assert_close(path[-1].double(), clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("spacing", "steps"), [("list:999/500", 3), ("list:1000/500", 2), ("power:2", 1001), ("logsnr", 0)])
def test_spacings_that_do_not_fit_are_refused(spacing, steps):
    with pytest.raises(InputError, match=r"spacing = 'list.*': must list|steps = \d+: must be in 1..1000"):
        build_sampler(DiffusionConfig(), "sample", "ddim", spacing).set_timesteps(steps)


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
def test_noise_levels_of_every_number_of_steps_are_those_of_its_timesteps(name):
    sampler = build_sampler(DiffusionConfig(), "sample", name)
    for steps in range(1, 1001):
        sampler.set_timesteps(steps)
        torch.testing.assert_close(1 / (1 + sampler.sigmas.double() ** 2), alphas(sampler), rtol=1e-6, atol=0)
        assert sampler.sigmas.device.type == "cpu"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, 1001])
def test_other_numbers_are_refused(name, steps):
    with pytest.raises(InputError, match=rf"steps = {steps}: must be in 1\.\.1000"):
        build_sampler(DiffusionConfig(), "sample", name).set_timesteps(steps)


def test_other_names_are_refused():
    with pytest.raises(InputError, match=r"sampler = 'heun': must be one of ddim, ddpm, dpmsolver\+\+, unipc"):
        build_sampler(DiffusionConfig(), "sample", "heun")


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize(("config", "steps"), EVERY_STEP, ids=lambda value: str(getattr(value, "train_timesteps", value)))
def test_perfect_predictions_of_a_single_image_keep_its_noise_on_the_whole_path(name, config, steps):
    image, noise = 3 * draw(2, 3, 3), draw(2, 3, 3, seed=1)
    for prediction_type in PREDICTION_TYPES:
        sampler = build_sampler(config, prediction_type, name)
        start = sampler.alphas_cumprod[-1].double()
        path = denoise(sampler, steps, start.sqrt() * image + (1 - start).sqrt() * noise, lambda x, alpha: image)
        for x, alpha in zip(path, alphas(sampler), strict=True):
            torch.testing.assert_close(x, alpha.sqrt() * image + (1 - alpha).sqrt() * noise, rtol=0, atol=2e-4)
        exact = prediction_type == "sample"  # the others divide by the signal, 0.006 at full noise
        torch.testing.assert_close(path[-1], image, rtol=0, atol=1e-9 if exact else 1e-4)


@pytest.mark.parametrize(("config", "steps"), EVERY_STEP, ids=lambda value: str(getattr(value, "train_timesteps", value)))
def test_ddpm_has_the_noise_of_each_timestep_on_its_path_to_a_single_image(config, steps):
    image, noise = 3 * draw(2, 30, 30), draw(2, 30, 30, seed=1)
    for prediction_type in PREDICTION_TYPES:
        sampler = build_sampler(config, prediction_type, "ddpm")
        start = sampler.alphas_cumprod[-1].double()
        path = denoise(sampler, steps, start.sqrt() * image + (1 - start).sqrt() * noise, lambda x, alpha: image)
        for x, alpha in list(zip(path, alphas(sampler), strict=True))[:-1]:
            rest = (x - alpha.sqrt() * image) / (1 - alpha).sqrt()
            assert abs(rest.mean()) < 0.12 and abs(rest.std() - 1) < 0.09  # 5 deviations of 1,800 draws
        torch.testing.assert_close(path[-1], image, rtol=0, atol=1e-8 if prediction_type == "sample" else 1e-4)


class UniPC(SpacedUniPC):
    """With diffusers' own update."""

    multistep_uni_p_bh_update = UniPCMultistepScheduler.multistep_uni_p_bh_update
    multistep_uni_c_bh_update = UniPCMultistepScheduler.multistep_uni_c_bh_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 15])
def test_unipc_is_that_of_diffusers_bit_for_bit(steps, dtype):
    for prediction_type in PREDICTION_TYPES:
        ours = build_sampler(DiffusionConfig(), prediction_type, "unipc")
        theirs = UniPC.from_config(ours.config)
        predictions = torch.randn(steps, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
        x = expected = draw(2, 3, 3).to(dtype)
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        for t, prediction in zip(ours.timesteps, predictions[:, None], strict=True):
            x, expected = (sampler.step(prediction, t, y).prev_sample for sampler, y in ((ours, x), (theirs, expected)))
            assert torch.equal(x, expected)


class Gaussian:
    """Latents of one mean and deviation, of which the best prediction is linear in x."""

    mean, deviation = 3.0, 2.0

    def best_clean(self, x, alpha):
        return self.mean + alpha.sqrt() * self.deviation**2 / self.variance(alpha) * (x - alpha.sqrt() * self.mean)

    def variance(self, alpha):
        return alpha * self.deviation**2 + 1 - alpha

    def noisy(self, z, alpha):
        """Where the probability flow is at a noise level: at z deviations from the mean of all x there."""
        return alpha.sqrt() * self.mean + self.variance(alpha).sqrt() * z


def flow_error(name, steps, prediction_type="sample"):
    """How far a deterministic sampler ends from the exact solution of the probability flow, in deviations of the data."""
    sampler, data = build_sampler(DiffusionConfig(), prediction_type, name), Gaussian()
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).expand(1, 2, 5, 5)
    path = denoise(sampler, steps, data.noisy(z, sampler.alphas_cumprod[-1].double()), data.best_clean)
    return float((path[-1] - data.noisy(z, torch.ones(()))).abs().max()) / data.deviation


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_deterministic_samplers_converge_to_the_probability_flow(prediction_type):
    errors = {name: [flow_error(name, n, prediction_type) for n in (10, 50, 250, 1000)] for name in NAMES if name != "ddpm"}
    for coarse, fine in pairwise(errors["ddim"]):
        assert 0.15 * coarse < fine < 0.35 * coarse  # first order: 5, 5 and 4 times the steps
    for name in ("dpmsolver++", "unipc"):
        assert all(error < first / 10 for error, first in zip(errors[name], errors["ddim"], strict=True))
        assert errors[name][2] < errors[name][0] / 50 and errors[name][3] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_best_prediction_from_full_noise(name):
    sampler, data, noise = build_sampler(DiffusionConfig(), "sample", name), Gaussian(), draw(2, 3, 3)
    _, sampled = denoise(sampler, 1, noise, data.best_clean)
    best = data.best_clean(noise, sampler.alphas_cumprod[-1].double())
    torch.testing.assert_close(sampled, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_ddpm_samples_have_the_mean_and_the_variance_of_the_data(steps):
    sampler, data = build_sampler(DiffusionConfig(), "sample", "ddpm"), Gaussian()
    samples = denoise(sampler, steps, draw(1, 100, 100), data.best_clean)[-1]
    # Eq. 7 with a best prediction: both remain linear and Gaussian, so mean and variance follow from step to step.
    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    for alpha, following in pairwise(alphas(sampler)):
        ratio = alpha / following
        to_clean, to_x = following.sqrt() * (1 - ratio) / (1 - alpha), ratio.sqrt() * (1 - following) / (1 - alpha)
        slope = to_clean * alpha.sqrt() * data.deviation**2 / data.variance(alpha) + to_x
        mean = to_clean * data.best_clean(mean, alpha) + to_x * mean
        variance = slope**2 * variance + (1 - following) / (1 - alpha) * (1 - ratio)
    assert abs(samples.mean() - mean) < 5 * variance.sqrt() / 100
    assert abs(samples.var() / variance - 1) < 5 * (2 / 10_000) ** 0.5
    if steps == 1000:
        assert abs(mean - data.mean) < 0.02 and abs(variance.sqrt() / data.deviation - 1) < 0.02


def test_ddpm_draws_from_the_generator_of_each_image():
    sampler, data, noise = build_sampler(DiffusionConfig(), "sample", "ddpm"), Gaussian(), draw(3, 4, 4).movedim(1, 0)

    def sample(x, seeds):
        sampler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for t in sampler.timesteps:
            x = sampler.step(data.best_clean(x, sampler.alphas_cumprod[t].double()), t, x, generator=generators).prev_sample
        return x

    together = sample(noise, [5, 6, 7])
    assert torch.equal(sample(noise[2:], [7]), together[2:])
    assert torch.equal(sample(noise.flip(0), [7, 6, 5]), together.flip(0))
    assert not torch.allclose(sample(noise, [5, 6, 8])[2], together[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_used_again_is_as_a_new_one(name):
    used, data = build_sampler(DiffusionConfig(), "epsilon", name), Gaussian()
    denoise(used, 7, draw(2, 3, 3, seed=1), data.best_clean)
    for steps in (5, 1, 7):
        fresh = build_sampler(DiffusionConfig(), "epsilon", name)
        expected = denoise(fresh, steps, draw(2, 3, 3), data.best_clean, seed=2)[-1]
        assert torch.equal(denoise(used, steps, draw(2, 3, 3), data.best_clean, seed=2)[-1], expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_clipped(name):
    """Latents far beyond [-1, 1] come out as they are."""
    sampler = build_sampler(DiffusionConfig(), "sample", name)
    far = torch.full((1, 2, 3, 3), 40.0, dtype=torch.float64)
    torch.testing.assert_close(denoise(sampler, 3, draw(2, 3, 3), lambda x, alpha: far)[-1], far, rtol=1e-7, atol=0)
