"""Requests for an evaluation or for samples: the command line, checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from madformer.config import ExperimentConfig
from madformer.config.evaluation import MAX_SAMPLES
from madformer.errors import ConfigError, InputError
from madformer.evaluation.measurement import AXES, CURVE_FIELDS, DEPTH, Sampling, all_samplings, parse_integers
from madformer.evaluation.record import find_tuning
from madformer.runs.checkpoints import (
    checkpoint_path,
    find_flaw,
    list_checkpoints,
    newest_intact,
    parse_weights,
    regular_checkpoints,
)


@dataclass(frozen=True)
class EvaluationRequest:
    """Checkpoints of a run and the samplings of each."""

    config: ExperimentConfig
    """The run's configuration, with overrides."""
    checkpoints: tuple[Path, ...]
    samplings: tuple[Sampling, ...]
    references: tuple[Path, ...] = ()
    """Files of statistics of reference images; empty: those that are kept, or are computed."""
    devices: int | None = None
    """Devices that share the work; None: all GPUs, or one process."""
    diagnostics: bool = False
    """Whether diagnostics of the newest checkpoint are computed too."""
    tuned: bool = False
    """Whether the samplings are the choices of `madformer tune`: their points then say so."""
    kind: Literal["point", "candidate"] = "point"
    """Of the lines in the record. Curves and reports leave candidates out."""


@dataclass(frozen=True)
class SamplingRequest:
    """Images of one checkpoint."""

    config: ExperimentConfig
    """The run's."""
    checkpoint: Path
    sampling: Sampling
    num: int
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
    axes: Mapping[str, str | None] | None = None,
    tuned: bool = False,
    **options: Any,
) -> EvaluationRequest:
    """Read the command line of an evaluation; what is not given is as the experiment says.

    Args:
        nfe, steps: one or several, with commas.
        axes: field of `Sampling` -> one or several values, with commas.
        tuned: sample each budget as `madformer tune` chose.
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
    chosen = parse_weights(weights)
    values = {name: AXES[name].parse(AXES[name].option, text) for name, text in (axes or {}).items() if text is not None}
    depths = values.get(DEPTH, (None,))
    if steps is not None:
        counts = parse_integers("--steps", steps)
        budgets = [Sampling.of_steps(config, count, chosen, depth) for depth in depths for count in counts]
    else:
        numbers = config.evaluation.nfe if nfe is None else parse_integers("--nfe", nfe)
        budgets = [Sampling.of_nfe(config, number, chosen, depth) for depth in depths for number in numbers]
    if tuned and chosen != "ema":
        raise InputError("--weights and --tuned: give one of them; choices are for the moving average")
    if tuned:
        budgets = [tuned_sampling(config, budget, values) for budget in budgets]
    samplings = all_samplings(budgets, values)
    for sampling in samplings:
        sampling.apply(config)  # what the run cannot do shows now
    return EvaluationRequest(config, _checkpoints(config, checkpoints), samplings, tuned=tuned, **options)


def parse_sampling(
    config: ExperimentConfig,
    num: int,
    steps: int | None,
    nfe: int | None,
    weights: str = "ema",
    axes: Mapping[str, Any] | None = None,
    tuned: bool = False,
    **options: Any,
) -> SamplingRequest:
    """Read the command line of `madformer sample`.

    Args:
        axes: field of `Sampling` -> its value.
        tuned: sample as `madformer tune` chose for this budget.
        options: further fields of the request.

    Raises:
        InputError: a budget that the run cannot have, or no checkpoint.
    """
    if (nfe is None) == (steps is None):
        raise InputError("give one of --steps and --nfe")
    if num > MAX_SAMPLES:
        raise InputError(f"--num {num}: must be at most {MAX_SAMPLES:,}, each image has a seed of its own")
    chosen = parse_weights(weights)
    values: dict[str, Sequence[Any]] = {"seed": (0,)}
    for name, value in (axes or {}).items():
        if value is not None:
            values[name] = AXES[name].parse(AXES[name].option, str(value))
            if len(values[name]) > 1:
                raise InputError(f"{AXES[name].option} {value}: give one value")
    [depth] = values.get(DEPTH, (None,))
    if nfe is not None:
        budget = Sampling.of_nfe(config, nfe, chosen, depth)
    else:
        budget = Sampling.of_steps(config, cast(int, steps), chosen, depth)
    if tuned and chosen != "ema":
        raise InputError("--weights and --tuned: give one of them; choices are for the moving average")
    if tuned:
        budget = tuned_sampling(config, budget, values)
    [sampling] = all_samplings([budget], values)
    sampling.apply(config)  # what the run cannot do shows now
    return SamplingRequest(config, _checkpoints(config, "newest")[0], sampling, num, **options)


def tuned_sampling(config: ExperimentConfig, budget: Sampling, values: Mapping[str, Any]) -> Sampling:
    """The sampling that `madformer tune` chose for a budget.

    Args:
        values: fields of `Sampling` that are given.

    Raises:
        InputError: there is no choice for this budget, or a field is given that the choice sets.
    """
    for name in values:
        if name in CURVE_FIELDS and name != DEPTH:
            raise InputError(f"{AXES[name].option} and --tuned: give one of them")
    line = find_tuning(config.run_dir, budget.nfe, budget.diffusion_depth)
    if line is None:
        depth = "" if budget.diffusion_depth is None else f" --diffusion-depth {budget.diffusion_depth}"
        remedy = f"madformer tune {config.run_dir} --nfe {budget.nfe}{depth}"
        raise InputError(f"--tuned: {config.run_dir} is not tuned at NFE {budget.nfe}; {remedy}")
    return replace(budget, **line["sampling"])


def _checkpoints(config: ExperimentConfig, which: str) -> tuple[Path, ...]:
    """The checkpoints that `newest`, `last5` or a step means, the oldest first."""
    run = config.run_dir
    if which == "newest":
        newest = newest_intact(run)
        if newest is None:
            raise InputError(f"{run}: no intact checkpoint in {run / 'checkpoints'}; madformer train --resume {run} makes some")
        return (newest,)
    if last := re.fullmatch(r"last([1-9]\d*)", which):
        found = regular_checkpoints(config)[-int(last[1]) :]
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
