"""Samples for metrics and pictures: image i is a function of the weights and (seed, i) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from madformer.config import ExperimentConfig
from madformer.model import MADFormer
from madformer.model.blocks import to_image
from madformer.model.generate import generate
from madformer.parallel import find_devices
from madformer.randomness import sample_seed
from madformer.samplers import build_sampler


def inference_devices(config: ExperimentConfig, count: int | None) -> list[str]:
    """Devices that share sampling; None: all GPUs, or one process. A run that was trained on a GPU needs none here.

    Raises:
        ConfigError: fewer are there.
    """
    accelerator: Literal["cpu", "auto"] = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    return find_devices(replace(config.trainer, accelerator=accelerator, devices=count))


def sampling_precision(config: ExperimentConfig, device: torch.device) -> str:
    """What a run is sampled in: on a GPU `trainer.precision`, as it was trained; float32 on the CPU, where that is faster."""
    return config.trainer.precision if device.type == "cuda" else "32-true"


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
    on_block: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Latents [B, C, h, w] of the samples `indices`, at most `batch_size` at once, in their order.

    Args:
        config: its evaluation says by which sampler, with how much guidance and of which seed.
        text_BT: token ids, a row for each index; None: no text.
        on_block: called after each block, as by `generate`.
    """
    evaluation, device = config.evaluation, model.boi_SD.device
    sampler = build_sampler(config.diffusion, config.model.prediction_type, evaluation.sampler)
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        seeds = [sample_seed(evaluation.seed, index) for index in indices[part]]
        text = None if text_BT is None else text_BT[part]
        with torch.autocast(device.type, torch.bfloat16, enabled=sampling_precision(config, device) == "bf16-mixed"):
            latents_BLCYX = generate(
                model, sampler, steps, seeds=seeds, text=text, guidance=evaluation.guidance, on_block=on_block
            )
        yield to_image(latents_BLCYX)
