"""Sample latents by (seed, index), and choose their prompts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from madformer.config import ExperimentConfig
from madformer.config.data import DIGITS
from madformer.config.evaluation import parse_interval
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer, class_prompts, parse_classes
from madformer.diffusion.samplers import build_sampler
from madformer.errors import InputError
from madformer.evaluation.measurement import Sampling
from madformer.model import MADFormer
from madformer.model.embedding import to_image
from madformer.model.generation import BlockSampler, generate
from madformer.parallel import cluster_rank, find_devices, limit_threads
from madformer.randomness import sample_seed
from madformer.runs.checkpoints import CLASS_PROMPTS, DATA, Weights, load_checkpoint, load_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """The prompt of one sample, and its class if it has one."""

    text: str
    label: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The prompt's entries in the image's metadata."""
        return {"prompt": self.text, "class": self.label}


def choose_prompts(
    config: ExperimentConfig,
    checkpoint: Path,
    classes: str | None,
    prompt: str | None,
    indices: Sequence[int],
    guidance: float = 1.0,
) -> list[Prompt]:
    """The prompts of samples.

    Args:
        checkpoint: has the names of the classes.
        classes: `--classes`, which samples take in turn; None: all classes, if there is no prompt either.
        prompt: `--prompt`, for all samples.
        indices: numbers of the samples.
        guidance: scale of guidance; 1 is none.

    Raises:
        InputError: prompts for a model without text, both options, classes of a run without class names, or guidance without
            prompts.
    """
    given = [option for option, value in (("--classes", classes), ("--prompt", prompt)) if value is not None]
    if config.model.text is None:
        if given:
            raise InputError(f"{given[0]}: {config.run_dir} has a model without text (model.text = null); leave it out")
        return [Prompt("")] * len(indices)
    if len(given) > 1:
        raise InputError("--classes and --prompt: give one of them")
    if prompt is not None:
        return [Prompt(prompt)] * len(indices)
    names = known_classes(config, checkpoint)
    if names is None:
        if classes is not None or guidance != 1:
            remedy = "sample takes a --prompt; without one leave --guidance out"
            raise InputError(f"{config.run_dir}: it was trained without names of classes: {remedy}")
        _log.warning("%s: it was trained without names of classes: sampled without prompts", config.run_dir)
        return [Prompt("")] * len(indices)
    chosen = range(len(names)) if classes is None else parse_classes(classes, names)
    labels = [chosen[index % len(chosen)] for index in indices]
    return [Prompt(names[label], label) for label in labels]


def tokenize(config: ExperimentConfig, prompts: Sequence[str], guidance: float = 1.0) -> Tensor | None:
    """Token ids [B, T] of prompts; None: the model has no text, or all prompts are empty and there is no guidance.

    Args:
        prompts: one for each image; an empty one is the null text.
        guidance: scale of guidance; 1 is none.

    Raises:
        ConfigError: the tokenizer is not available, or does not fit the model.
    """
    if config.model.text is None or not (any(prompts) or guidance != 1):
        return None
    return PromptTokenizer.of(config.data, config.model.text)(prompts)


def known_classes(config: ExperimentConfig, checkpoint: Path) -> tuple[str, ...] | None:
    """The class names that a run was trained with, from its checkpoint; None: it had none."""
    recorded = load_checkpoint(checkpoint).get(DATA, {}).get(CLASS_PROMPTS)
    if recorded is not None:
        return tuple(recorded)
    data = config.data
    if data.source == DIGITS:
        return class_prompts(None, DIGIT_NAMES, data.prompts)
    return class_prompts(data.class_names, None, data.prompts)


def inference_devices(config: ExperimentConfig, count: int | None) -> list[str]:
    """Devices that share sampling. A run that was trained on a GPU can be sampled without one.

    On the CPU, this also sets the number of threads of the process.

    Args:
        count: number of devices; None: all GPUs, or one process on the CPU.

    Raises:
        ConfigError: there are fewer devices.
    """
    accelerator: Literal["cpu", "auto"] = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    devices = find_devices(replace(config.trainer, accelerator=accelerator, devices=count))
    limit_threads(config.trainer, devices if cluster_rank() is None else devices[:1])
    return devices


def sampling_precision(config: ExperimentConfig, device: torch.device) -> str:
    """The precision of sampling: `trainer.precision` on a GPU, as in training; float32 on the CPU, where that is faster."""
    return config.trainer.precision if device.type == "cuda" else "32-true"


def load_for_sampling(checkpoint: Path, config: ExperimentConfig, weights: Weights, device: str) -> MADFormer:
    """The model of a checkpoint on a device, for sampling only: its weights are cast once, not at every step.

    Args:
        checkpoint: the checkpoint's file.
        weights: EMA or raw weights.
        device: the device's name.

    Raises:
        InputError: as `load_model`.
    """
    model = load_model(checkpoint, config, weights).to(device)
    is_rounded = sampling_precision(config, model.boi_SD.device) == "bf16-mixed"
    model.prepare_for_sampling(torch.bfloat16 if is_rounded else None)
    return model


def default_prompts(class_prompts: Sequence[str] | None, indices: Sequence[int]) -> list[str]:
    """Default prompts of samples: the classes in turn, or no text."""
    return [class_prompts[index % len(class_prompts)] if class_prompts else "" for index in indices]


def sample_batches(
    model: MADFormer,
    config: ExperimentConfig,
    sampling: Sampling,
    indices: Sequence[int],
    text_BT: Tensor | None = None,
    on_block: Callable[[int, Tensor], None] | None = None,
    make_sampler: Callable[..., BlockSampler] | None = None,
) -> Iterator[Tensor]:
    """Yield latents [B, C, h, w] of samples in order, at most `evaluation.batch_size` at once.

    All batches share buffers and CUDA graphs. For these, a GPU's last batch is filled up with copies of its last sample.

    Args:
        config: the run's configuration.
        sampling: how to sample. Its `weights` are not used here: the model has its weights.
        indices: numbers of the samples.
        text_BT: token ids, a row for each index; None: no text.
        on_block: called after each block, as by `generate`, with the copies that fill up a batch.
        make_sampler: that of earlier calls with the same model (`keeping_sampler`), to share buffers and graphs with them.
    """
    batch_size, device = config.evaluation.batch_size, model.boi_SD.device
    sampler = build_sampler(config.diffusion, config.model.prediction_type, sampling.sampler, sampling.spacing)
    options: dict[str, Any] = {"guidance": sampling.guidance, "on_block": on_block}
    options["guidance_interval"] = parse_interval(sampling.guidance_interval)
    options["diffusion_depth"] = sampling.diffusion_depth
    options["make_sampler"] = make_sampler or keeping_sampler()
    for start in range(0, len(indices), batch_size):
        rows = list(range(start, min(start + batch_size, len(indices))))
        filling = rows[-1:] * (batch_size - len(rows)) if start and _fills_batches(device) else []
        seeds = [sample_seed(sampling.seed, indices[row]) for row in rows + filling]
        text = None if text_BT is None else text_BT[rows + filling]
        with torch.autocast(device.type, torch.bfloat16, enabled=sampling_precision(config, device) == "bf16-mixed"):
            latents_BLCYX = generate(model, sampler, sampling.steps, seeds=seeds, text=text, **options)
        yield to_image(latents_BLCYX[: len(rows)])


def keeping_sampler() -> Callable[..., BlockSampler]:
    """A `make_sampler` for `generate`, which returns the same `BlockSampler` as long as model and sizes stay the same."""
    return functools.lru_cache(maxsize=1)(BlockSampler)


def _fills_batches(device: torch.device) -> bool:
    """Whether a smaller batch costs more than a full one. GPUs compile and capture each batch size anew."""
    return device.type != "cpu"
