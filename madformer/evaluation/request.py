"""What is asked of a run, checked before anything heavy is imported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from madformer.config import ExperimentConfig
from madformer.config.evaluation import MAX_SAMPLES, SamplerName
from madformer.errors import ConfigError, InputError
from madformer.model import cost
from madformer.runs.checkpoints import Weights, checkpoint_path, find_flaw, list_checkpoints, newest_intact, parse_weights


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
    """Checkpoints x samplers x guidance x seeds x budgets of a run."""

    config: ExperimentConfig
    """The run's, with what was asked for instead."""
    checkpoints: tuple[Path, ...]
    budgets: tuple[Budget, ...]
    weights: Weights
    samplers: tuple[SamplerName, ...]
    guidances: tuple[float, ...]
    seeds: tuple[int, ...]
    references: tuple[Path, ...] = ()
    """Files of statistics of reference images; empty: those that are kept, or are computed."""
    devices: int | None = None
    """Devices that share the work; None: all GPUs, or one process."""
    diagnostics: bool = False
    """Whether the newest of the checkpoints is looked into as well."""

    def manners(self) -> Iterator[ExperimentConfig]:
        """The configuration of each way of sampling: `evaluation` has its sampler, guidance and seed."""
        for sampler, guidance, seed in itertools.product(self.samplers, self.guidances, self.seeds):
            evaluation = replace(self.config.evaluation, sampler=sampler, guidance=guidance, seed=seed)
            yield replace(self.config, evaluation=evaluation)


@dataclass(frozen=True)
class SamplingRequest:
    """Images of one checkpoint."""

    config: ExperimentConfig
    """The run's, with the sampler, guidance and seed that were asked for."""
    checkpoint: Path
    steps: int
    num: int
    weights: Weights
    classes: str | None = None
    """Numbers or names of classes, with commas."""
    prompt: str | None = None
    devices: int | None = None
    """Devices that share the work; None: all GPUs, or one process."""


def parse_request(
    config: ExperimentConfig,
    nfe: str | None = None,
    steps: str | None = None,
    num_samples: int | None = None,
    checkpoints: str = "newest",
    weights: str = "ema",
    sampler: str | None = None,
    guidance: str | None = None,
    seeds: str | None = None,
    **options: Any,
) -> EvaluationRequest:
    """Read the command line of an evaluation; what is not given is as the experiment says.

    Args:
        nfe, steps, sampler, guidance, seeds: one or several, with commas.
        options: further fields of the request.

    Raises:
        InputError: something that is not there, in the user's words.
    """
    if nfe is not None and steps is not None:
        raise InputError("--nfe and --steps: give one of them")
    if not config.evaluation.feature_networks:
        legal = "such as evaluation.feature_networks=[inception] or [digits]"
        raise ConfigError(f"evaluation.feature_networks = []: nothing to measure with; name some, {legal}")
    if num_samples is not None:
        config = replace(config, evaluation=replace(config.evaluation, num_samples=num_samples))
    if steps is not None:
        budgets = [Budget.of_steps(config, number) for number in _integers("--steps", steps)]
    else:
        asked = config.evaluation.nfe if nfe is None else _integers("--nfe", nfe)
        budgets = [Budget.of_nfe(config, number) for number in asked]
    evaluation = config.evaluation
    request = EvaluationRequest(
        config,
        _checkpoints(config.run_dir, checkpoints),
        tuple(budgets),
        parse_weights(weights),
        tuple(map(_sampler, _list(sampler))) if sampler is not None else (evaluation.sampler,),
        tuple(dict.fromkeys(map(_guidance, _list(guidance)))) if guidance is not None else (evaluation.guidance,),
        tuple(_integers("--seeds", seeds)) if seeds is not None else (evaluation.seed,),
        **options,
    )
    list(request.manners())  # what cannot be had shows now
    return request


def parse_sampling(
    config: ExperimentConfig,
    num: int,
    steps: int | None,
    nfe: int | None,
    seed: int = 0,
    weights: str = "ema",
    sampler: str | None = None,
    guidance: float | None = None,
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
    budget = Budget.of_nfe(config, nfe) if nfe is not None else Budget.of_steps(config, cast(int, steps))
    evaluation = replace(config.evaluation, seed=seed)
    if sampler is not None:
        evaluation = replace(evaluation, sampler=_sampler(sampler))
    if guidance is not None:
        evaluation = replace(evaluation, guidance=guidance)
    config = replace(config, evaluation=evaluation)
    return SamplingRequest(
        config, _checkpoints(config.run_dir, "newest")[0], budget.steps, num, parse_weights(weights), **options
    )


def _list(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _sampler(name: str) -> SamplerName:
    if name not in get_args(SamplerName):
        raise InputError(f"--sampler {name}: must be one of {', '.join(get_args(SamplerName))}")
    return cast(SamplerName, name)


def _guidance(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--guidance {text}: must be numbers with commas between them, such as 1,1.5") from None


def _integers(option: str, text: str) -> Sequence[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise InputError(f"{option} {text}: must be integers with commas between them")
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def _check_steps(config: ExperimentConfig, steps: int) -> int:
    most = config.diffusion.train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"steps = {steps}: must be in 1..{most}, the noise schedule's timesteps")
    return steps


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
