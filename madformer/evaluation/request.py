"""What is asked of a run, checked before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from madformer.checkpoints import Weights, checkpoint_path, find_flaw, list_checkpoints, newest_intact
from madformer.config import ConfigError, ExperimentConfig, InputError
from madformer.config.evaluation import MAX_SAMPLES
from madformer.model import cost


@dataclass(frozen=True)
class Budget:
    """Denoising steps per block, and the layer evaluations that were asked for."""

    nfe: int
    """The budget, or the actual number when steps were asked for."""
    steps: int

    @staticmethod
    def of_nfe(config: ExperimentConfig, nfe: int) -> Budget:
        """The most steps that a budget allows.

        Raises:
            ConfigError: none, or more than the noise schedule has.
        """
        return Budget(nfe, _check_steps(config, cost.steps_for_nfe(config.model, nfe)))

    @staticmethod
    def of_steps(config: ExperimentConfig, steps: int) -> Budget:
        """What so many steps cost.

        Raises:
            ConfigError: none, or more than the noise schedule has.
        """
        return Budget(cost.nfe(config.model, _check_steps(config, steps)), steps)


@dataclass(frozen=True)
class EvaluationRequest:
    """Budgets x checkpoints of a run."""

    config: ExperimentConfig
    """The run's, with the number of samples that was asked for."""
    checkpoints: tuple[Path, ...]
    budgets: tuple[Budget, ...]
    weights: Weights


@dataclass(frozen=True)
class SamplingRequest:
    """Images of one checkpoint."""

    config: ExperimentConfig
    """The run's, with the seed that was asked for."""
    checkpoint: Path
    steps: int
    num: int
    weights: Weights
    classes: str | None = None
    """Numbers or names of classes, with commas."""
    prompt: str | None = None
    guidance: float = 1.0
    devices: int | None = None
    """Devices that share the work; None: all GPUs, or one process."""


def parse_request(
    config: ExperimentConfig,
    nfe: str | None = None,
    steps: str | None = None,
    num_samples: int | None = None,
    checkpoints: str = "newest",
    weights: str = "ema",
) -> EvaluationRequest:
    """Read the command line of an evaluation.

    Raises:
        InputError: budgets or checkpoints that are not there, in the user's words.
    """
    if nfe is not None and steps is not None:
        raise InputError("--nfe and --steps: give one of them")
    if config.evaluation.feature_network is None:
        raise ConfigError("evaluation.feature_network = null: nothing to measure with; the one that is there: digits")
    if config.data.source != config.evaluation.feature_network:
        raise ConfigError(f"data.source = {config.data.source!r}: no reference images for evaluation.feature_network = digits")
    if num_samples is not None:
        config = replace(config, evaluation=replace(config.evaluation, num_samples=num_samples))
    if steps is not None:
        budgets = [Budget.of_steps(config, number) for number in _integers("--steps", steps)]
    else:
        asked = config.evaluation.nfe if nfe is None else _integers("--nfe", nfe)
        budgets = [Budget.of_nfe(config, number) for number in asked]
    return EvaluationRequest(config, _checkpoints(config.run_dir, checkpoints), tuple(budgets), parse_weights(weights))


def parse_sampling(
    config: ExperimentConfig,
    num: int,
    steps: int | None,
    nfe: int | None,
    seed: int = 0,
    weights: str = "ema",
    **options: Any,
) -> SamplingRequest:
    """Read the command line of `madformer sample`; `options` are further fields of the request.

    Raises:
        InputError: a budget that the run cannot have, or no checkpoint.
    """
    if (nfe is None) == (steps is None):
        raise InputError("give one of --steps and --nfe")
    if num > MAX_SAMPLES:
        raise InputError(f"--num {num}: must be at most {MAX_SAMPLES:,}, each image has a seed of its own")
    if not math.isfinite(options.get("guidance", 1.0)):
        raise InputError(f"--guidance {options['guidance']}: must be a number")
    budget = Budget.of_nfe(config, nfe) if nfe is not None else Budget.of_steps(config, cast(int, steps))
    config = replace(config, evaluation=replace(config.evaluation, seed=seed))
    return SamplingRequest(
        config, _checkpoints(config.run_dir, "newest")[0], budget.steps, num, parse_weights(weights), **options
    )


def _integers(option: str, text: str) -> Sequence[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise InputError(f"{option} {text}: must be integers with commas between them, such as 280,700")
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def _check_steps(config: ExperimentConfig, steps: int) -> int:
    most = config.diffusion.train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"steps = {steps}: must be in 1..{most}, the noise schedule's timesteps")
    return steps


def parse_weights(name: str) -> Weights:
    """Which of a checkpoint's weights.

    Raises:
        InputError: neither `ema` nor `model`.
    """
    if name not in get_args(Weights):
        raise InputError(f"--weights {name}: must be one of {', '.join(get_args(Weights))}")
    return cast(Weights, name)


def _checkpoints(run: Path, which: str) -> tuple[Path, ...]:
    """The checkpoints that `newest`, `last5` or a step means, the oldest first."""
    if which == "newest":
        newest = newest_intact(run)
        if newest is None:
            raise InputError(f"{run}: no intact checkpoint in {run / 'checkpoints'}; madformer train --resume {run} makes some")
        return (newest,)
    if last := re.fullmatch(r"last([1-9]\d*)", which):
        found = list_checkpoints(run)[-int(last[1]) :]
        if len(found) < int(last[1]):
            raise InputError(f"--checkpoints {which}: {run} has {len(found)}")
    elif which.isdigit() and checkpoint_path(run, int(which)).is_file():
        found = [checkpoint_path(run, int(which))]
    else:
        steps = ", ".join(str(int(path.stem.removeprefix("step-"))) for path in list_checkpoints(run)) or "none"
        raise InputError(f"--checkpoints {which}: must be newest, last5 or a step; there are: {steps}")
    for path in found:
        if flaw := find_flaw(path):
            raise InputError(f"{path} is torn ({flaw}): choose another checkpoint")
    return tuple(found)
