"""Which prompt each sample has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from madformer.checkpoints import CLASS_PROMPTS, DATA, load_checkpoint
from madformer.config import ExperimentConfig, InputError
from madformer.config.data import DIGITS
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer, class_prompts, parse_classes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What one sample is asked to show."""

    text: str
    label: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """For the image's metadata."""
        return {"prompt": self.text, "class": self.label}


def choose_prompts(
    config: ExperimentConfig,
    checkpoint: Path,
    classes: str | None,
    prompt: str | None,
    indices: Sequence[int],
) -> list[Prompt]:
    """The prompts of samples: the classes in turn, the one prompt for all, or, without either, all classes in turn.

    Raises:
        InputError: prompts for a model without text, both kinds of them, classes that nobody has named, or guidance without
            prompts.
    """
    asked = [option for option, value in (("--classes", classes), ("--prompt", prompt)) if value is not None]
    if config.model.text is None:
        if asked:
            raise InputError(f"{asked[0]}: {config.run_dir} has a model without text (model.text = null); leave it out")
        return [Prompt("")] * len(indices)
    if len(asked) > 1:
        raise InputError("--classes and --prompt: give one of them")
    if prompt is not None:
        return [Prompt(prompt)] * len(indices)
    names = known_classes(config, checkpoint)
    if names is None:
        if classes is not None or config.evaluation.guidance != 1:
            remedy = "sample takes a --prompt; without one leave --guidance out"
            raise InputError(f"{config.run_dir}: it was trained without names of classes: {remedy}")
        _log.warning("%s: it was trained without names of classes: sampled without prompts", config.run_dir)
        return [Prompt("")] * len(indices)
    chosen = range(len(names)) if classes is None else parse_classes(classes, names)
    labels = [chosen[index % len(chosen)] for index in indices]
    return [Prompt(names[label], label) for label in labels]


def tokenize(config: ExperimentConfig, prompts: Sequence[str]) -> Tensor | None:
    """Token ids [B, T] of prompts; None: a model without text, or nothing but the null text, which needs no tokenizer.

    Raises:
        ConfigError: the tokenizer cannot be had, or is not the model's.
    """
    if config.model.text is None or not (any(prompts) or config.evaluation.guidance != 1):
        return None
    return PromptTokenizer(config.data.tokenizer, config.model.text)(prompts)


def known_classes(config: ExperimentConfig, checkpoint: Path) -> tuple[str, ...] | None:
    """The class names that a run was trained with: the checkpoint remembers them; None: nobody named them."""
    remembered = load_checkpoint(checkpoint).get(DATA, {}).get(CLASS_PROMPTS)
    if remembered is not None:
        return tuple(remembered)
    return DIGIT_NAMES if config.data.source == DIGITS else class_prompts(config.data.class_names, None)
