"""Diagnostics of a model on held-out images: loss, denoising error, exposure gap, variance explained by the condition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madformer.config import ExperimentConfig, LossConfig
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.diffusion.samplers import build_sampler
from madformer.errors import NonFiniteError
from madformer.evaluation.held_out import read_held_out
from madformer.evaluation.sampling import keeping_sampler, tokenize
from madformer.model import MADFormer
from madformer.model.embedding import to_blocks
from madformer.model.generation import BlockSampler, generate
from madformer.randomness import keyed_generator, sample_seed

__all__ = [
    "denoising_errors",
    "denoising_timesteps",
    "denoising_warnings",
    "diagnose",
    "energy_shares",
    "explained_share",
    "image_losses",
    "is_worse",
    "probed_timesteps",
    "worse_than_larger",
]

IMAGE_LOSS = LossConfig(lambda_text=0.0, lambda_image=1.0, lambda_hidden=0.0, lambda_clean_tower=0.0)
"""Only the image loss, which is the denoiser's."""


@torch.no_grad()
def diagnose(
    model: MADFormer,
    config: ExperimentConfig,
    checkpoint: Path,
    steps: int,
    device: torch.device,
    images: int = 256,
    show: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Diagnose a model on held-out images. No result depends on `evaluation.batch_size`.

    - `loss`: the image term of the training loss, for the model's prediction type, at each of `timesteps` and each block, after
      true blocks. The noise is keyed by (`evaluation.seed`, image, timestep) and drawn for the whole image, so it does not
      depend on the AR length. `loss_by_timestep` and `loss_by_block` are means of it.
    - `denoising_error`: the squared error of the clean latents that the prediction stands for, for any prediction type, at each
      of `denoising_timesteps` (`denoising_errors`), and for each block in `denoising_error_by_block`. `noisy_error` and
      `mean_error` are the errors of two trivial denoisers, which return the noisy block or the mean image.
      `denoising_worse_than` lists the timesteps at which the model is worse (`is_worse`) than these (`noisy`, `mean`), or
      than itself at a larger timestep (`larger`).
    - `exposure`: for each block the energy distance (`energy_shares`) between samples of `steps` steps and real blocks of the
      same place, after true blocks (`teacher_forced`) and after the model's own (`self_generated`), from the same noise and
      prompts, without guidance. Their difference `gap` is the cost of errors in earlier blocks. It is 0 at block 0, where both
      are the same samples; if it rises over the blocks, errors accumulate. `gap_error` is its standard error (jackknife over
      images). The distance compares distributions over all images, so it does not detect a realistic block that does not fit
      the blocks before it.
    - `condition_explains`: the share of the variance in each block that the condition predicts (`explained_share`), through the
      upsampler, before any denoising. None: the model has no condition, or was trained with `loss.lambda_hidden = 0`, so that
      the upsampler has not learnt to decode it.

    Args:
        model: the model with the checkpoint's weights, on `device`. All is computed in its precision.
        checkpoint: has the names of the classes.
        steps: denoising steps for each block, by `evaluation.sampler`.
        device: where the model and the codec compute.
        images: number of held-out images; all, if there are fewer.
        show: called with the number of images that are done.

    Returns:
        `images`, `held_out`, `source`, `seed`, `steps`, `sampler` and the above, as finite numbers and lists of them by block.

    Raises:
        ConfigError, InputError: as `held_out.read_held_out`, or more steps than there are timesteps.
        NonFiniteError: the run has diverged.
    """
    held_out = read_held_out(config, checkpoint, images, device)
    clean_NLCYX = to_blocks(held_out.latents_NChw, config.model.ar_length)
    text_NT = tokenize(config, held_out.captions)
    seen, make_sampler = list[dict[str, Tensor]](), keeping_sampler()
    for start in range(0, len(clean_NLCYX), config.evaluation.batch_size):
        indices = range(len(clean_NLCYX))[start : start + config.evaluation.batch_size]
        text_BT = None if text_NT is None else text_NT[indices]
        seen.append(_observe(model, config, steps, clean_NLCYX[indices].to(device), indices, text_BT, make_sampler))
        _require_finite(checkpoint, seen[-1])
        if show:
            show(indices.stop)
    gathered = {name: torch.cat([part[name] for part in seen]) for name in seen[0]}
    loss_TL, timesteps = gathered["loss"].double().mean(dim=0), denoising_timesteps(config.diffusion.train_timesteps)
    return {
        "images": len(clean_NLCYX),
        "held_out": held_out.is_held_out,
        "source": held_out.source,
        "seed": config.evaluation.seed,
        "steps": steps,
        "sampler": config.evaluation.sampler,
        "timesteps": probed_timesteps(config.diffusion.train_timesteps),
        "loss": loss_TL.tolist(),
        "loss_by_timestep": loss_TL.mean(dim=1).tolist(),
        "loss_by_block": loss_TL.mean(dim=0).tolist(),
        **_denoising(timesteps, clean_NLCYX, gathered["denoising_error"], gathered["noisy_error"]),
        "exposure": _exposure(clean_NLCYX, gathered["teacher_forced"], gathered["self_generated"]),
        "condition_explains": (
            [explained_share(*pair) for pair in _by_block(gathered["condition"], clean_NLCYX)]
            if "condition" in gathered
            else None
        ),
    }


def probed_timesteps(train_timesteps: int) -> list[int]:
    """The centres of ten equal parts of 0 .. `train_timesteps` - 1; all timesteps, if there are fewer than ten."""
    parts = min(10, train_timesteps)
    edges = [part * train_timesteps // parts for part in range(parts + 1)]
    return [(first + end - 1) // 2 for first, end in itertools.pairwise(edges)]


def image_losses(
    model: MADFormer, config: ExperimentConfig, clean_BLCYX: Tensor, indices: Sequence[int], text_BT: Tensor | None = None
) -> Tensor:
    """The image term of the loss for each image, probed timestep and block.

    Args:
        clean_BLCYX: clean latents, on the model's device.
        indices: numbers of the images. Their noise depends on these.
        text_BT: token ids; None: the null text.

    Returns:
        [B, T, L]; T as `probed_timesteps`.
    """
    schedule, losses_BL = NoiseSchedule(config.diffusion), []
    for place, timestep in enumerate(probed_timesteps(config.diffusion.train_timesteps)):
        noise_BLCYX = _noise(config, clean_BLCYX, [("diagnostics", index, place) for index in indices])
        t_BL = torch.full(clean_BLCYX.shape[:2], timestep, device=clean_BLCYX.device)
        losses_BL.append(compute_losses(model, schedule, IMAGE_LOSS, clean_BLCYX, noise_BLCYX, t_BL, text_BT).image_BL)
    return torch.stack(losses_BL, dim=1)


def denoising_timesteps(train_timesteps: int) -> list[int]:
    """0, 1, 2, 5, 10, ... up to a tenth of the schedule, then every tenth, the last fiftieth, and the last one."""
    tenths = [part * train_timesteps // 10 for part in range(10)]
    small = [digit * 10**power for power in range(len(str(train_timesteps))) for digit in (1, 2, 5)]
    chosen = {*tenths, *(timestep for timestep in small if timestep < tenths[1]), train_timesteps - train_timesteps // 50}
    return sorted(chosen - {train_timesteps} | {train_timesteps - 1})


def denoising_errors(
    model: MADFormer, config: ExperimentConfig, clean_BLCYX: Tensor, indices: Sequence[int], text_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared errors of the clean latents that the predictions stand for (`NoiseSchedule.to_sample`), and of noisy blocks.

    The noise of an image is the same at every timestep, keyed by (`evaluation.seed`, image). Only its strength differs, so no
    timestep is harder than a larger one.

    Args:
        clean_BLCYX: as for `image_losses`, like `indices` and `text_BT`.

    Returns:
        Two of [B, T, L], means over a block's latents; T as `denoising_timesteps`.
    """
    schedule, denoised_BL, noisy_BL = NoiseSchedule(config.diffusion), list[Tensor](), list[Tensor]()
    noise_BLCYX = _noise(config, clean_BLCYX, [("denoising error", index) for index in indices])
    for timestep in denoising_timesteps(config.diffusion.train_timesteps):
        t_BL = torch.full(clean_BLCYX.shape[:2], timestep, device=clean_BLCYX.device)
        noisy_BLCYX = schedule.add_noise(clean_BLCYX, noise_BLCYX, t_BL)
        predicted_BLCYX = model(clean_BLCYX, noisy_BLCYX, t_BL, text=text_BT, outputs=()).denoised_BLCYX
        denoised_BLCYX = schedule.to_sample(config.model.prediction_type, predicted_BLCYX, noisy_BLCYX, t_BL)
        denoised_BL.append((denoised_BLCYX - clean_BLCYX).square().mean(dim=(2, 3, 4)))
        noisy_BL.append((noisy_BLCYX - clean_BLCYX).square().mean(dim=(2, 3, 4)))
    return torch.stack(denoised_BL, dim=1), torch.stack(noisy_BL, dim=1)


def is_worse(errors_NT: Tensor, than_NT: Tensor, margin: float = 0.05) -> Tensor:
    """Whether mean errors over N images are clearly larger than others, [T]: by a margin and by three standard errors.

    Args:
        errors_NT: errors by image and timestep.
        than_NT: errors to compare with, paired by image.
        margin: share of the mean of `than_NT`.
    """
    difference_NT = errors_NT - than_NT
    noise_T = difference_NT.std(dim=0) / len(difference_NT) ** 0.5
    return difference_NT.mean(dim=0) > torch.maximum(margin * than_NT.mean(dim=0), 3 * noise_T)


def worse_than_larger(errors_NT: Tensor, margin: float = 0.25) -> Tensor:
    """Whether errors at a timestep are worse than at any larger one, [T]. The margin allows for models trained little."""
    return torch.stack([is_worse(errors_NT[:, [t]], errors_NT[:, t:], margin).any() for t in range(errors_NT.shape[1])])


def denoising_warnings(diagnosed: Mapping[str, Any], prediction_type: str) -> list[str]:
    """Lines on the timesteps at which a diagnosed model is worse than a reference (`denoising_worse_than`), with the reason."""
    timesteps, errors = diagnosed["denoising_timesteps"], diagnosed["denoising_error"]
    known = "model.prediction_type={} is known for this at {} t; v_prediction or {} avoids it".format
    reasons = {
        ("noisy", "sample"): known("sample", "small", "epsilon"),
        ("mean", "epsilon"): known("epsilon", "large", "sample"),
        ("larger", prediction_type): "less noise is never harder: look for a fault at these timesteps",
    }
    references = (
        ("noisy", "returning the noisy block", diagnosed["noisy_error"]),
        ("mean", "returning the mean image", [diagnosed["mean_error"]] * len(errors)),
        ("larger", "at a larger t", [min(errors[place:]) for place in range(len(errors))]),
    )
    lines = []
    for name, text, than in references:
        if worse := diagnosed["denoising_worse_than"][name]:
            ratio, place = max((errors[place] / max(than[place], 1e-12), place) for place in map(timesteps.index, worse))
            reason = reasons.get((name, prediction_type), "train longer, or look for a fault at these timesteps")
            times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2f}"
            how_much = f"its squared error is {times} times as large at t = {timesteps[place]}"
            lines.append(f"at t = {_ranges(worse, timesteps)} the denoiser is worse than {text}, {how_much}; {reason}")
    return lines


def energy_shares(samples_NP: Tensor, real_NP: Tensor) -> tuple[float, Tensor]:
    """The energy distance of two sets of points, relative to the distances between them (Székely and Rizzo, 2013).

    (2 E|x - y| - E|x - x'| - E|y - y'|) / (2 E|x - y|), in float64: 0 for equal distributions, 1 for two different points.
    Each mean is over pairs of different rows, because row i of the samples may depend on row i of the real ones (its prompt,
    its context). So the numerator is unbiased, and may be slightly below 0.

    Args:
        samples_NP: N points of P coordinates.
        real_NP: N points to compare with.

    Returns:
        The share, and the shares [N] without row i of both sets, for a jackknife. They are 0 if all points are equal.
    """
    samples_NP, real_NP = samples_NP.double(), real_NP.double()
    between_NN = _distances(samples_NP, real_NP).fill_diagonal_(0)
    within_NN = _distances(samples_NP, samples_NP) + _distances(real_NP, real_NP)
    sums = []
    for pairs_NN in (within_NN, between_NN):
        left_out_N = pairs_NN.sum() - pairs_NN.sum(dim=0) - pairs_NN.sum(dim=1)
        sums.append(torch.cat([pairs_NN.sum()[None], left_out_N]))
    within, between = sums
    shares = torch.where(between > 0, 1 - within / (2 * between), 0)
    return float(shares[0]), shares[1:]


def explained_share(predicted_NP: Tensor, real_NP: Tensor) -> float:
    """R^2 against the mean of these images: one minus the mean squared error over the variance.

    1 is a perfect prediction. 0 is as good as the mean image, or the images have no variance. Below 0 is worse.

    Args:
        predicted_NP: N predictions of P coordinates.
        real_NP: the true points. Their variance is the mean of the coordinates' variances over the N images.
    """
    predicted_NP, real_NP = predicted_NP.double(), real_NP.double()
    variance = float(real_NP.var(dim=0, correction=0).mean())
    return 1 - float((predicted_NP - real_NP).square().mean()) / variance if variance else 0.0


def _observe(
    model: MADFormer,
    config: ExperimentConfig,
    steps: int,
    clean_BLCYX: Tensor,
    indices: Sequence[int],
    text_BT: Tensor | None,
    make_sampler: Callable[..., BlockSampler],
) -> dict[str, Tensor]:
    """Losses, samples and the condition's prediction for some images, on the CPU."""
    evaluation = config.evaluation
    sampler = build_sampler(config.diffusion, config.model.prediction_type, evaluation.sampler, evaluation.spacing)
    seeds = [sample_seed(config.evaluation.seed, index) for index in indices]
    inputs: dict[str, Any] = {"seeds": seeds, "text": text_BT, "make_sampler": make_sampler}
    # Latents are float32 even if the weights are not, as in sampling.
    clean_BLCYX = clean_BLCYX.to(torch.promote_types(model.boi_SD.dtype, torch.float32))
    denoising_error_BTL, noisy_error_BTL = denoising_errors(model, config, clean_BLCYX, indices, text_BT)
    seen = {
        "loss": image_losses(model, config, clean_BLCYX, indices, text_BT),
        "denoising_error": denoising_error_BTL,
        "noisy_error": noisy_error_BTL,
        "teacher_forced": generate(model, sampler, steps, **inputs, context_BLCYX=clean_BLCYX),
        "self_generated": generate(model, sampler, steps, **inputs),
    }
    if config.loss.lambda_hidden:
        t_BL = torch.zeros(clean_BLCYX.shape[:2], dtype=torch.long, device=clean_BLCYX.device)
        outputs = model(clean_BLCYX, clean_BLCYX, t_BL, text=text_BT, outputs=["condition"])
        seen["condition"] = outputs.condition_BLCYX
    return {name: tensor.cpu() for name, tensor in seen.items()}


def _noise(config: ExperimentConfig, clean_BLCYX: Tensor, keys: Sequence[tuple[int | str, ...]]) -> Tensor:
    """Noise keyed by (`evaluation.seed`, key), drawn for whole images, [B, L, C, Y, X]."""
    shape = (config.model.latent_channels, config.model.latent_size, config.model.latent_size)
    generators = [keyed_generator(config.evaluation.seed, *key) for key in keys]
    noise_BChw = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return to_blocks(noise_BChw, config.model.ar_length).to(clean_BLCYX)


def _denoising(timesteps: list[int], clean_NLCYX: Tensor, error_NTL: Tensor, noisy_NTL: Tensor) -> dict[str, Any]:
    error_NTL, clean_NLCYX = error_NTL.double(), clean_NLCYX.double()
    error_NT, noisy_NT = error_NTL.mean(dim=2), noisy_NTL.double().mean(dim=2)
    mean_N = (clean_NLCYX - clean_NLCYX.mean(dim=0)).square().mean(dim=(1, 2, 3, 4))
    worse = {
        "noisy": is_worse(error_NT, noisy_NT),
        "mean": is_worse(error_NT, mean_N[:, None]),
        "larger": worse_than_larger(error_NT),
    }
    return {
        "denoising_timesteps": timesteps,
        "denoising_error": error_NT.mean(dim=0).tolist(),
        "denoising_error_by_block": error_NTL.mean(dim=0).tolist(),
        "noisy_error": noisy_NT.mean(dim=0).tolist(),
        "mean_error": float(mean_N.mean()),
        "denoising_worse_than": {name: list(itertools.compress(timesteps, worse_T)) for name, worse_T in worse.items()},
    }


def _ranges(some: Sequence[int], timesteps: Sequence[int]) -> str:
    """Some of the timesteps as text, with neighbours as `first..last`."""
    groups = [list(group) for _, group in itertools.groupby(enumerate(some), lambda pair: timesteps.index(pair[1]) - pair[0])]
    return ", ".join("..".join(str(timestep) for _, timestep in dict.fromkeys((group[0], group[-1]))) for group in groups)


def _require_finite(checkpoint: Path, seen: dict[str, Tensor]) -> None:
    for name, tensor in seen.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{checkpoint}: diagnostics ({name}) are NaN or infinite, the run has diverged")


def _exposure(real_NLCYX: Tensor, forced_NLCYX: Tensor, generated_NLCYX: Tensor) -> dict[str, list[float]]:
    exposure: dict[str, list[float]] = {"teacher_forced": [], "self_generated": [], "gap": [], "gap_error": []}
    for real_NP, forced_NP, generated_NP in _by_block(real_NLCYX, forced_NLCYX, generated_NLCYX):
        forced, forced_N = energy_shares(forced_NP, real_NP)
        generated, generated_N = energy_shares(generated_NP, real_NP)
        spread = float((generated_N - forced_N).var(correction=0))
        values = (forced, generated, generated - forced, ((len(generated_N) - 1) * spread) ** 0.5)
        for series, value in zip(exposure.values(), values, strict=True):
            series.append(value)
    return exposure


def _by_block(*sets_NLCYX: Tensor) -> list[tuple[Tensor, ...]]:
    """For each block the sets' points [N, P]."""
    return list(zip(*(tensor.flatten(2).unbind(dim=1) for tensor in sets_NLCYX), strict=True))


def _distances(first_NP: Tensor, second_NP: Tensor) -> Tensor:
    """Euclidean distances, [N, N]. A matrix product would lose the digits of small distances."""
    return torch.cdist(first_NP, second_NP, compute_mode="donot_use_mm_for_euclid_dist")
