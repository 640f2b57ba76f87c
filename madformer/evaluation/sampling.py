"""Samples for metrics and pictures: image i is a function of the weights and (seed, i) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from madformer.config import ExperimentConfig
from madformer.model import MADFormer
from madformer.model.blocks import to_image
from madformer.model.generate import generate
from madformer.randomness import sample_seed
from madformer.samplers import build_sampler


def sampling_device(config: ExperimentConfig) -> torch.device:
    """Where a run is sampled: on the first GPU, if there is one and the experiment does not want the CPU."""
    cuda = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    return torch.device("cuda" if cuda else "cpu")


def default_prompts(class_prompts: Sequence[str] | None, indices: Sequence[int]) -> list[str]:
    """Prompts for samples where none are asked for: the classes in turn, or no text."""
    return [class_prompts[index % len(class_prompts)] if class_prompts else "" for index in indices]


def sample_batches(
    model: MADFormer,
    config: ExperimentConfig,
    steps: int,
    indices: Sequence[int],
    batch_size: int,
    text_BT: Tensor | None = None,
    guidance: float = 1.0,
) -> Iterator[Tensor]:
    """Latents [B, C, h, w] of the samples `indices`, at most `batch_size` at once, in their order.

    Args:
        text_BT: token ids, a row for each index; None: no text.
        guidance: scale of classifier-free guidance.
    """
    sampler = build_sampler(config.diffusion, config.model.prediction_type)
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        seeds = [sample_seed(config.evaluation.seed, index) for index in indices[part]]
        text = None if text_BT is None else text_BT[part]
        yield to_image(generate(model, sampler, steps, seeds=seeds, text=text, guidance=guidance))
