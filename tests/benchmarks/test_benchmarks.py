from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks import sampling, training_step
from benchmarks.baseline import Baseline
from benchmarks.harness import SIZES, options, parse, report, sized
from benchmarks.measure import PeakBytes, Setup, Side
from benchmarks.sampling import generations, sampling_flops
from benchmarks.training_step import Losses, training_flops
from madformer.config import LossConfig, ModelConfig, UNetConfig, wanted_outputs
from madformer.model import cost
from madformer.model.madformer import MADFormer

TINY = ModelConfig(
    latent_channels=2,
    latent_size=8,
    ar_length=4,
    depth=3,
    diffusion_depth=2,
    width=32,
    num_heads=2,
    ffn_width=48,
    unet=UNetConfig(channels=(8, 16), layers=(1, 1), attention=(False, True), groups=4, num_heads=2, time_embed_dim=8),
)


def tiny_model(diffusion_depth: int) -> MADFormer:
    torch.manual_seed(0)
    model = MADFormer(replace(TINY, diffusion_depth=diffusion_depth))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, or mixed-up towers would go unseen
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("diffusion_depth", [1, 2, 3])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_baseline_computes_our_training_forward(attention, diffusion_depth):
    model = tiny_model(diffusion_depth)
    clean_BLCYX, noisy_BLCYX = torch.randn(2, 2, 4, 2, 4, 4)
    t_BL = torch.randint(1000, (2, 4))
    ours = model(clean_BLCYX, noisy_BLCYX, t_BL)
    denoised_BLCYX, condition_BLCYX, clean_tower_BLCYX = Baseline(model).forward(clean_BLCYX, noisy_BLCYX, t_BL, attention)
    torch.testing.assert_close(denoised_BLCYX, ours.denoised_BLCYX, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clean_tower_BLCYX, ours.clean_tower_BLCYX, atol=1e-5, rtol=1e-5)
    assert condition_BLCYX.shape == ours.condition_BLCYX.shape


def test_the_baseline_trains_our_weights_alike():
    model = tiny_model(2)
    losses = Losses(model, LossConfig(lambda_hidden=0), batch=2)
    gradients = {}
    for name, loss in losses.by_side().items():
        model.zero_grad()
        loss().backward()
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for name in ("dense", "sparse"):
        assert gradients["ours"].keys() <= gradients[name].keys()
        for key, gradient in gradients[name].items():
            expected = gradients["ours"].get(key, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, expected, atol=1e-4 * float(expected.abs().max() + 1), rtol=1e-3, msg=key)


@pytest.mark.parametrize("diffusion_depth", [1, 2, 3])
def test_the_baseline_samples_our_images(diffusion_depth):
    model = tiny_model(diffusion_depth)
    sides = generations(model, batch=2, steps=3)
    ours, theirs = (sides[name](DDIMScheduler(prediction_type="sample", clip_sample=False)) for name in ("ours", "recomputed"))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_the_baseline_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"model\.use_condition = False: the baseline knows True alone"):
        Baseline(MADFormer(replace(TINY, use_condition=False)))


def training(config: ModelConfig) -> dict[str, int]:
    return training_flops(config, LossConfig())


def denoising(config: ModelConfig) -> dict[str, int]:
    return {side: steps for side, (_, steps) in sampling_flops(config).items()}


def of_all_layers(count: Callable[[ModelConfig], dict[str, int]], model: ModelConfig) -> dict[str, int]:
    """FLOPs of a model half of whose layers iterate, from those of its first pairs of layers: each pair adds as much."""
    one, two = (count(replace(model, depth=2 * pairs, diffusion_depth=pairs)) for pairs in (1, 2))
    return {side: one[side] + (model.depth // 2 - 1) * (two[side] - one[side]) for side in one}


@pytest.mark.slow
def test_flops_of_a_denoising_step_of_the_full_model():
    """In nine of its sixteen blocks; each one more has more before it that is computed anew."""
    model = replace(sized("ffhq1024"), latent_size=96, ar_length=9)
    flops, formula = of_all_layers(denoising, model), cost.sampling_flops(model)
    assert flops["ours"] == formula.step_unet + formula.step_layers
    assert flops["recomputed"] >= 1.4 * flops["ours"]


@pytest.mark.slow
def test_flops_of_a_training_step_of_the_full_model():
    model, losses = sized("ffhq1024"), LossConfig()
    flops = of_all_layers(training, model)
    assert flops["ours"] == pytest.approx(cost.training_flops(model, wanted_outputs(losses)).total, rel=2e-3)
    assert flops["dense"] >= 1.45 * flops["ours"]
    assert flops["sparse"] >= 1.1 * flops["ours"]


def test_peak_bytes_counts_what_lives_at_once():
    tensor = torch.ones(10)
    with PeakBytes() as watch:
        tensor.view(2, 5).add_(1)  # neither a view nor an update in place takes memory
        for _ in range(3):
            a = torch.zeros(1000)
            b = a + 1
            del a, b
    assert (watch.peak, watch.live) == (8000, 0)


def test_the_report_judges_seconds_by_flops():
    setup = Setup(TINY, torch.device("cpu"), torch.float32)
    sides = {"ours": Side(100, [1.0, 1.0, 9.0], 0), "theirs": Side(200, [1.7, 1.7, 0.1], 2**20)}
    assert "theirs / ours: 2.000 in FLOPs, 1.700 in seconds = 85% of it (90% NOT reached)" in report(setup, sides, 64, "step")


@pytest.fixture
def tiny_size(monkeypatch):
    """The smallest model that there is: counting FLOPs takes a second for each layer and level."""
    unet = replace(TINY.unet, channels=(8,), layers=(1,), attention=(False,))
    monkeypatch.setitem(SIZES, "tiny", replace(TINY, depth=2, diffusion_depth=1, unet=unet))


@pytest.mark.parametrize("benchmark", [sampling, training_step])
def test_the_command_line(benchmark, tiny_size, capsys):
    benchmark.main(["--size", "tiny", "--repeats", "1", "--batch", "1"])
    printed = capsys.readouterr().out
    assert "torch" in printed and "MFU" in printed and "in FLOPs" in printed


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--diffusion-depth", "99"], "model.diffusion_depth = 99: must be in 1..12"),
        (["--batch", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(mistake, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        sampling.main(mistake)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_the_cpu_is_counted(capsys):
    _, setup = parse(options("", batch=1), ["--size", "ffhq1024", "--diffusion-depth", "7", "--compile"])
    assert (setup.runs, setup.config) == (False, ModelConfig(diffusion_depth=7, compile=False))
    assert "counted, not run" in capsys.readouterr().out


def test_counting_alone(tiny_size, capsys):
    sampling.main(["--size", "tiny", "--device", "meta"])
    printed = capsys.readouterr().out
    assert "recomputed / ours" in printed and "in FLOPs" in printed and "seconds" not in printed
