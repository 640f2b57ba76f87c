"""Diagnostics: each number against its definition, on models whose answer is known, and independent of the batch size."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from madformer.config import DataConfig, EvaluationConfig, ExperimentConfig, LossConfig, TextConfig
from madformer.data.prompts import PromptTokenizer
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.diffusion.samplers import build_sampler
from madformer.errors import InputError, NonFiniteError
from madformer.evaluation.diagnostics import (
    denoising_errors,
    denoising_timesteps,
    denoising_warnings,
    diagnose,
    energy_shares,
    explained_share,
    image_losses,
    is_worse,
    probed_timesteps,
    worse_than_larger,
)
from madformer.evaluation.held_out import read_held_out
from madformer.model import MADFormer
from madformer.model.embedding import to_blocks
from madformer.model.generation import generate
from madformer.randomness import keyed_generator, sample_seed
from madformer.runs.checkpoints import EMA
from tests.conftest import build, latents, tiny
from tests.points import DENOISING

CPU = torch.device("cpu")
TEXT = TextConfig(vocab_size=2048, length=4, pad_token_id=0)
IMAGES = 12
STEPS = 2


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    torch.save({"state_dict": {}, EMA: {}}, path)
    return path


def experiment(loss=None, **model):
    data = DataConfig(source="digits", codec="pixels", split="train[:90%]", tokenizer="builtin")
    evaluation = EvaluationConfig(nfe=(5,), batch_size=5, held_out_split="train[90%:]")
    loss = loss or LossConfig()
    return ExperimentConfig(model=tiny(latent_channels=1, **model), loss=loss, data=data, evaluation=evaluation)


def random_model(config):
    torch.manual_seed(0)
    return build(config.model).eval()


def zero_model(config):
    """A network that gives zero, whatever it sees."""
    model = MADFormer(config.model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def numbers(value):
    """All floats of a nested structure."""
    if isinstance(value, dict):
        value = list(value.values())
    return [number for part in value for number in numbers(part)] if isinstance(value, list) else [value]


# ---- losses


def test_timesteps_are_the_centres_of_equal_parts():
    assert probed_timesteps(1000) == [49, 149, 249, 349, 449, 549, 649, 749, 849, 949]
    assert probed_timesteps(10) == list(range(10))
    assert probed_timesteps(3) == [0, 1, 2]


@pytest.mark.parametrize("text", [None, TEXT])
def test_losses_are_those_of_training(text):
    config = experiment(text=text, prediction_type="v_prediction")
    model, clean = random_model(config), latents(config.model, 3)
    prompts = None if text is None else PromptTokenizer("builtin", text)(["one", "two", "three"])
    found = image_losses(model, config, clean, [7, 2, 5], prompts)
    assert found.shape == (3, 10, 4)
    for place, timestep in enumerate(probed_timesteps(1000)):
        generators = [keyed_generator(0, "diagnostics", index, place) for index in (7, 2, 5)]
        noise = to_blocks(torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators]), 4).double()
        t = torch.full((3, 4), timestep)
        expected = compute_losses(model, NoiseSchedule(config.diffusion), config.loss, clean, noise, t, prompts).image_BL
        torch.testing.assert_close(found[:, place], expected)


def test_runs_of_other_ar_lengths_see_the_same_noise():
    losses = {}
    for length in (1, 4, 16):
        config = experiment(
            ar_length=length,
            prediction_type="epsilon",
            unet=replace(tiny().unet, channels=(8,), layers=(1,), attention=(False,)),
        )
        losses[length] = image_losses(zero_model(config), config, torch.zeros_like(latents(config.model, 3)), range(3))
    assert losses[16].std() > 0.1
    for length in (4, 16):
        torch.testing.assert_close(losses[length].mean(dim=2), losses[1][:, :, 0])


# ---- denoising error


def test_timesteps_of_the_denoising_error_are_dense_at_small_ones():
    tenths = [100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert denoising_timesteps(1000) == [0, 1, 2, 5, 10, 20, 50, *tenths, 980, 999]
    for count in range(1, 11):
        assert denoising_timesteps(count) == list(range(count))
    for count in (11, 37, 50, 4000):
        timesteps = denoising_timesteps(count)
        assert timesteps == sorted(set(timesteps)) and timesteps[0] == 0 and timesteps[-1] == count - 1


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_denoising_errors_are_those_of_the_clean_latents_with_the_same_noise(prediction_type):
    config = experiment(text=TEXT, prediction_type=prediction_type)
    model, clean, schedule = random_model(config), latents(config.model, 2), NoiseSchedule(config.diffusion)
    prompts = PromptTokenizer("builtin", TEXT)(["one", "two"])
    found, trivial = denoising_errors(model, config, clean, [7, 2], prompts)
    generators = [keyed_generator(0, "denoising error", index) for index in (7, 2)]
    noise = to_blocks(torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators]), 4).double()
    for place, timestep in enumerate(denoising_timesteps(1000)):
        a, t = schedule.alphas_cumprod[timestep].double(), torch.full((2, 4), timestep)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        out = model(clean, noisy, t, text=prompts).denoised_BLCYX
        sample = {
            "sample": out,
            "epsilon": (noisy - (1 - a).sqrt() * out) / a.sqrt(),
            "v_prediction": a.sqrt() * noisy - (1 - a).sqrt() * out,
        }[prediction_type]
        torch.testing.assert_close(found[:, place], (sample - clean).square().mean((2, 3, 4)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(trivial[:, place], (noisy - clean).square().mean((2, 3, 4)), rtol=1e-4, atol=1e-6)


def test_worse_is_beyond_the_margin_and_beyond_noise():
    generator = torch.Generator().manual_seed(0)
    than, noise = torch.rand(100, 1, generator=generator), torch.randn(100, 1, generator=generator)
    assert is_worse(1.06 * than, than).item() and not is_worse(1.04 * than, than).item()
    assert not is_worse(1.06 * than + noise - noise.mean(), than).item(), "no more than noise"
    rising, steps = torch.tensor([1.0, 1.0, 2.0, 4.0]) * than, torch.tensor([2.0, 1.2, 1.0, 1.0])
    assert worse_than_larger(rising).tolist() == [False] * 4
    assert worse_than_larger(rising * steps).tolist() == [True, False, False, False]


def test_warnings_name_timesteps_reference_and_remedy():
    [noisy, larger] = denoising_warnings(DENOISING, "sample")
    assert noisy == (
        "at t = 0 the denoiser is worse than returning the noisy block, its squared error is 2.00 times as large at t = 0; "
        "model.prediction_type=sample is known for this at small t; v_prediction or epsilon avoids it"
    )
    assert larger == (
        "at t = 0 the denoiser is worse than at a larger t, its squared error is 4.00 times as large at t = 0; "
        "less noise is never harder: look for a fault at these timesteps"
    )
    bad = {"noisy": [], "mean": [0, 10, 999], "larger": []}
    [mean] = denoising_warnings({**DENOISING, "denoising_worse_than": bad, "mean_error": 0.025}, "epsilon")
    assert mean.startswith("at t = 0..999 the denoiser is worse than returning the mean image, its squared error is 20 times")
    assert mean.endswith("model.prediction_type=epsilon is known for this at large t; v_prediction or sample avoids it")
    apart = {"noisy": [0, 999], "mean": [], "larger": []}
    [noisy] = denoising_warnings({**DENOISING, "denoising_worse_than": apart}, "v_prediction")
    assert noisy.startswith("at t = 0, 999 the ") and noisy.endswith("train longer, or look for a fault at these timesteps")
    assert denoising_warnings({**DENOISING, "denoising_worse_than": {name: [] for name in bad}}, "sample") == []


# ---- energy distance and explained variance


def brute_force(x, y):
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    between, within_x, within_y = (
        np.mean([np.linalg.norm(a[i] - b[j]) for i, j in pairs]) for a, b in ((x, y), (x, x), (y, y))
    )
    return (2 * between - within_x - within_y) / (2 * between)


def test_energy_distance_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    y = 2 * y + 0.3
    share, left_out = energy_shares(x, y)
    assert share == pytest.approx(brute_force(x.numpy(), y.numpy()), rel=1e-12)
    for row in range(7):
        rest = [other for other in range(7) if other != row]
        assert float(left_out[row]) == pytest.approx(energy_shares(x[rest], y[rest])[0], rel=1e-10)


def test_energy_distance_of_shifted_normal_distributions():
    x = torch.special.ndtri((torch.arange(2000).double()[:, None] + 0.5) / 2000)
    shift, within = 1.5, 2 / math.sqrt(math.pi)
    between = within * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    assert energy_shares(x + shift, x.flip(0))[0] == pytest.approx(1 - within / between, abs=1e-3)


def test_energy_distance_of_equal_distributions_is_zero_on_average():
    generator = torch.Generator().manual_seed(0)
    shares = [energy_shares(*torch.randn(2, 10, 3, generator=generator))[0] for _ in range(400)]
    assert abs(np.mean(shares)) < 3 * np.std(shares) / 20 < 0.02
    x = torch.randn(9, 3, generator=generator)
    assert energy_shares(x, x)[0] == 0
    assert energy_shares(torch.ones(4, 2), torch.ones(4, 2))[0] == 0
    assert energy_shares(torch.zeros(4, 2), torch.ones(4, 2))[0] == 1


def test_explained_share():
    real = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    assert explained_share(real, real) == 1
    assert explained_share(real.mean(dim=0).expand_as(real), real) == pytest.approx(0)
    assert explained_share(torch.full_like(real, 0.5), real) < 0
    residual = 0.5 * (real - real.mean(dim=0))
    assert explained_share(real - residual, real) == pytest.approx(0.75)
    assert explained_share(torch.ones(4, 2), torch.zeros(4, 2)) == 0


# ---- the whole


def test_diagnostics_of_a_network_that_gives_zero(checkpoint):
    config = experiment()
    found = diagnose(zero_model(config), config, checkpoint, STEPS, CPU, IMAGES)
    real = to_blocks(read_held_out(config, checkpoint, IMAGES, CPU).latents_NChw, 4).double()
    squares = real.square().mean(dim=(0, 2, 3, 4))
    assert found["timesteps"] == probed_timesteps(1000)
    for by_block in (*found["loss"], found["loss_by_block"]):
        assert by_block == pytest.approx(squares.tolist())
    assert found["loss_by_timestep"] == pytest.approx([float(squares.mean())] * 10)
    timesteps = denoising_timesteps(1000)
    assert found["denoising_timesteps"] == timesteps
    assert found["denoising_error"] == pytest.approx([float(squares.mean())] * len(timesteps))
    assert found["denoising_error_by_block"][-1] == pytest.approx(squares.tolist())
    assert found["mean_error"] == pytest.approx(float(real.var(dim=0, correction=0).mean()))
    assert found["noisy_error"][0] == pytest.approx(1e-4, rel=0.2) and found["noisy_error"] == sorted(found["noisy_error"])
    worse = found["denoising_worse_than"]
    assert worse == {"noisy": [t for t in timesteps if t < 250], "mean": timesteps, "larger": []}
    variances = real.var(dim=0, correction=0).mean(dim=(1, 2, 3))
    assert found["condition_explains"] == pytest.approx((1 - squares / variances).tolist())
    assert max(found["condition_explains"]) <= 0
    shares = [brute_force(np.zeros((IMAGES, 16)), real[:, block].flatten(1).numpy()) for block in range(4)]
    assert found["exposure"]["teacher_forced"] == pytest.approx(shares)
    assert found["exposure"]["gap"] == found["exposure"]["gap_error"] == [0, 0, 0, 0]


def test_exposure_compares_samples_after_true_blocks_and_after_own_ones(checkpoint):
    config = experiment(text=TEXT)
    config = replace(config, evaluation=replace(config.evaluation, sampler="ddpm", seed=3))
    model = random_model(config)
    exposure = diagnose(model, config, checkpoint, STEPS, CPU, IMAGES)["exposure"]
    held_out = read_held_out(config, checkpoint, IMAGES, CPU)
    real = to_blocks(held_out.latents_NChw, 4)
    sampler = build_sampler(config.diffusion, config.model.prediction_type, "ddpm")
    options = {
        "seeds": [sample_seed(3, index) for index in range(IMAGES)],
        "text": PromptTokenizer("builtin", TEXT)(held_out.captions),
    }
    sets = {
        "teacher_forced": generate(model, sampler, STEPS, context_BLCYX=real, **options),
        "self_generated": generate(model, sampler, STEPS, **options),
    }
    for name, samples in sets.items():
        shares = [brute_force(*(each[:, block].flatten(1).double().numpy() for each in (samples, real))) for block in range(4)]
        assert exposure[name] == pytest.approx(shares, rel=1e-5)
    assert exposure["gap"][0] == exposure["gap_error"][0] == 0
    assert all(gap != 0 and error > 0 for gap, error in zip(exposure["gap"][1:], exposure["gap_error"][1:], strict=True))


def test_the_error_of_the_gap_is_its_spread_over_sets_of_images(checkpoint):
    config = experiment()
    model, gaps, errors = random_model(config), [], []
    for seed in range(12):
        seeded = replace(config, evaluation=replace(config.evaluation, seed=seed, batch_size=30))
        exposure = diagnose(model, seeded, checkpoint, 1, CPU, 30)["exposure"]
        gaps.append(exposure["gap"][1:])
        errors.append(exposure["gap_error"][1:])
    ratio = np.std(gaps, axis=0, ddof=1) / np.mean(errors, axis=0)
    assert ratio.min() > 0.5 and ratio.max() < 2


@pytest.mark.parametrize("batch_size", [1, IMAGES])
def test_nothing_depends_on_the_batch_size(batch_size, checkpoint):
    config = experiment(text=TEXT)
    model, done = random_model(config).float(), []
    other = replace(config, evaluation=replace(config.evaluation, batch_size=batch_size))
    first = diagnose(model, config, checkpoint, STEPS, CPU, IMAGES, done.append)
    second = diagnose(model, other, checkpoint, STEPS, CPU, IMAGES)
    assert done == [5, 10, 12]
    for name in (
        "loss",
        "loss_by_block",
        "loss_by_timestep",
        "denoising_error",
        "noisy_error",
        "exposure",
        "condition_explains",
    ):
        assert numbers(first[name]) == pytest.approx(numbers(second[name]), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "switches",
    [{"ar_length": 1}, {"use_clean_blocks": False}, {"clean_timestep": "released"}, {"local_denoising": True}],
    ids=str,
)
def test_all_kinds_of_models_give_finite_numbers(switches, checkpoint):
    config = experiment(**switches)
    found = diagnose(random_model(config), config, checkpoint, STEPS, CPU, 4)
    assert json.loads(json.dumps(found)) == found
    assert {name: found[name] for name in ("images", "held_out", "source", "seed", "steps", "sampler")} == {
        "images": 4,
        "held_out": True,
        "source": "digits, train[90%:]",
        "seed": 0,
        "steps": STEPS,
        "sampler": "ddim",
    }
    values = [found[name] for name in ("loss", "loss_by_timestep", "loss_by_block", "exposure", "condition_explains")]
    assert all(math.isfinite(number) for number in numbers(values))
    assert len(numbers(values)) == (10 + 1 + 4 + 1) * config.model.ar_length + 10


def test_a_condition_that_was_never_trained_explains_nothing(checkpoint):
    for switches in ({}, {"use_condition": False}):
        config = experiment(loss=LossConfig(lambda_hidden=0.0), **switches)
        assert diagnose(random_model(config), config, checkpoint, 1, CPU, 3)["condition_explains"] is None


def test_a_run_that_has_diverged(checkpoint):
    config = experiment()
    model = random_model(config)
    with torch.no_grad():
        model.boi_SD.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"step-00000001\.ckpt: diagnostics \(loss\) are NaN or infinite"):
        diagnose(model, config, checkpoint, STEPS, CPU, 3)


def test_more_steps_than_timesteps(checkpoint):
    config = experiment()
    with pytest.raises(InputError, match="steps = 1001"):
        diagnose(random_model(config), config, checkpoint, 1001, CPU, 3)
