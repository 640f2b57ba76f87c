"""`madformer tune`: for each budget, find the best `Sampling` of a design with few samples, and confirm it on fresh seeds.

Optuna proposes samplers, spacings and, with text, guidance. A proposal is judged by the mean distance over the design's runs,
all sampled from the same noise. The best one and the default are then measured with all samples, on seeds that the search has
not used. All measurements go into the runs' records as candidates, and proposals depend only on measurements. So a command that
was killed continues where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import optuna

from madformer.config import ExperimentConfig, trained_fields
from madformer.config.evaluation import ALL_TIMESTEPS, SamplerName
from madformer.errors import ConfigError, InputError, NonFiniteError, printable
from madformer.evaluation.evaluate import evaluate, write_run_curves
from madformer.evaluation.measurement import DEPTH, Measurement, Point, Sampling, half_width
from madformer.evaluation.record import (
    SEARCH_SEED,
    append_point,
    confirmation_seeds,
    known_choice,
    read_choices,
    read_points,
    search_samples,
)
from madformer.evaluation.request import EvaluationRequest
from madformer.evaluation.sampling import known_classes
from madformer.model import cost
from madformer.parallel import cluster_rank
from madformer.runs.checkpoints import checkpoint_step, newest_intact
from madformer.runs.files import claim_folder, hold_lock

_STARTS: tuple[dict[str, Any], ...] = (
    {"sampler": "unipc", "spacing": "power", "power": 1.5},
    {"sampler": "unipc", "spacing": "power", "power": 2.0},
    {"sampler": "unipc", "spacing": "power", "power": 1.0},
    {"sampler": "ddim", "spacing": "power", "power": 2.0},
    {"sampler": "dpmsolver++", "spacing": "power", "power": 1.5},
    {"sampler": "dpmsolver++", "spacing": "logsnr"},
    {"sampler": "unipc", "spacing": "karras", "rho": 7},
)
"""The first proposals: recommendations of the literature, and samplings that did well on digits."""


@dataclass(frozen=True)
class TuningRequest:
    """Runs of one design, which share one choice for each budget."""

    configs: tuple[ExperimentConfig, ...]
    """The configurations of the runs, which differ in their seeds."""
    nfe: tuple[int, ...]
    """Budgets to tune at."""
    tries: int
    """Most samplings to try at each budget, the default included."""
    minutes: float | None = None
    """Time after which no sampling is tried, and the best so far is confirmed. None: no limit."""
    devices: int | None = None
    """Number of devices that share the work; None: all GPUs, or one process."""
    depth: int | None = None
    """Diffusion depth of elastic runs; each depth has its own choices. None: the default depth."""

    @property
    def num_samples(self) -> int:
        """Number of images for a point."""
        return self.configs[0].evaluation.num_samples

    @property
    def seeds(self) -> tuple[int, ...]:
        """Evaluation seeds of the confirmation."""
        return confirmation_seeds(len(self.configs))


def tune(request: TuningRequest) -> None:
    """Choose a `Sampling` for each budget, confirm it, and record it in every run, as points and as a line of kind `tuning`.

    A choice that one of the runs has already is kept, so later seeds do not change it, and it is measured on the other runs. If
    runs have different choices because they were tuned separately, the first run's counts for all.

    Raises:
        ConfigError: as `evaluate`, or a budget that the runs cannot have.
        InputError: as `evaluate`, the runs have different designs, or another process tunes them.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.logging.disable_propagation()
    deadline = None if request.minutes is None else time.monotonic() + 60 * request.minutes
    request = replace(request, configs=_of_one_design(request.configs))
    if deadline is not None and cluster_rank() is not None:
        raise InputError("--minutes: processes on several machines would stop at different tries; give --tries")
    with ExitStack() as claims:
        for run in sorted(config.run_dir.resolve() for config in request.configs):
            claims.enter_context(claim_folder(run, "tune", cluster_rank() or 0))
        for nfe in request.nfe:
            _tune_at(request, Sampling.of_nfe(request.configs[0], nfe, depth=request.depth), deadline)


def _of_one_design(configs: Sequence[ExperimentConfig]) -> tuple[ExperimentConfig, ...]:
    """The runs' configurations, with the evaluation of the first one.

    Raises:
        ConfigError: no feature network is named.
        InputError: a run is named twice, or the runs differ in more than their seeds, or in their newest step.
    """
    first, *others = configs
    fields, step = trained_fields(first), checkpoint_step(_checkpoint(first))
    if not first.evaluation.feature_networks:
        raise ConfigError("evaluation.feature_networks = []: nothing to measure with; name some, such as [inception]")
    for number, config in enumerate(configs):
        if times := [other.run_dir.resolve() for other in configs[:number]].count(config.run_dir.resolve()):
            raise InputError(f"{config.run_dir}: named {times + 1} times; give each run once")
    for config in others:
        other = trained_fields(config)
        name = next((name for name in fields if name != "seed" and fields[name] != other.get(name)), None)
        if name is not None:
            differ = f"{first.run_dir} and {config.run_dir} differ in {name}"
            raise InputError(f"{differ}: tune them separately; only runs that differ in their seeds share a choice")
        if (other_step := checkpoint_step(_checkpoint(config))) != step:
            steps = f"{first.run_dir} has its newest checkpoint at step {step}, {config.run_dir} at {other_step}"
            raise InputError(f"{steps}: tune them when all are trained as far")
    return tuple(replace(config, evaluation=first.evaluation) for config in configs)


def _tune_at(request: TuningRequest, default: Sampling, deadline: float | None) -> None:
    step = checkpoint_step(_checkpoint(request.configs[0]))
    choices = (known_choice(read_choices(config.run_dir), config, default, request.tries, step) for config in request.configs)
    line = next((line for line in choices if line is not None), None)
    title = ", ".join([*(config.name for config in request.configs), *filter(None, [default.texts[DEPTH]])])
    title += f" at NFE {default.nfe}"
    if line is None:
        print(f"{title}: {_costs(request, default)}", flush=True)
        line = _choose(request, default, deadline)
    chosen = Sampling.of_choice(line)
    for config in request.configs:
        points = _measure(request, config, [chosen, default], line["seeds"])
        if not cluster_rank():
            _record(config, points, line, chosen)
    print(printable(f"{title}: {_text(line)}"), flush=True)


def _choose(request: TuningRequest, default: Sampling, deadline: float | None) -> dict[str, Any]:
    """Search and confirm, and return the line to record."""
    tried, most_tries = _search(request, default, deadline)
    best = min(tried, key=lambda sampling: tried[sampling])
    differences = list[float]()
    if best != default:
        found = [_measure(request, config, [best, default], request.seeds) for config in request.configs]
        pairs = [[_distance(point) for point in points] for points in found]
        seeds = len(request.seeds)
        for distance_of_best, distance_of_default in ((pair[:seeds], pair[seeds:]) for pair in pairs):
            differences += [one - other for one, other in zip(distance_of_best, distance_of_default, strict=True)]
    spread = half_width(differences) if len(differences) > 1 else None
    chosen = best if differences and fmean(differences) < 0 else default
    first = request.configs[0]
    return {
        "kind": "tuning",
        "nfe": default.nfe,
        "steps": default.steps,
        "step": checkpoint_step(_checkpoint(first)),
        "sampling": chosen.curve_fields,
        "default": default.curve_fields,
        "best_of_search": best.curve_fields,
        "tries": len(tried),
        "most_tries": most_tries,
        "search_samples": search_samples(request.num_samples),
        "search_seed": SEARCH_SEED,
        "num_samples": request.num_samples,
        "seeds": list(request.seeds),
        "runs": [config.name for config in request.configs],
        "feature_networks": list(first.evaluation.feature_networks),
        "differences": differences,
        "difference": fmean(differences) if differences else 0.0,
        "half_width": spread,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _search(request: TuningRequest, default: Sampling, deadline: float | None) -> tuple[dict[Sampling, float], int]:
    """Sampling -> mean distance over the runs, the default first; and the number of tries, repeated ones included."""
    first = request.configs[0]
    guided = first.model.text is not None and known_classes(first, _checkpoint(first)) is not None
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=10))
    for start in _STARTS:
        study.enqueue_trial(start)
    tried = {default: _mean_distance(request, default)}
    print(f"  try 1 of {request.tries}: the default, {tried[default]:.4g}", flush=True)
    for number in range(2, request.tries + 1):
        if deadline is not None and time.monotonic() > deadline:
            return tried, number - 1
        trial = study.ask()
        sampling = _propose(trial, default, first.diffusion.train_timesteps, guided)
        if sampling not in tried:
            tried[sampling] = _mean_distance(request, sampling)
            words = f"{sampling.difference(default) or 'the default'}, {tried[sampling]:.4g}"
            print(f"  try {number} of {request.tries}: {words}", flush=True)
        study.tell(trial, tried[sampling])
    return tried, request.tries


def _propose(trial: optuna.Trial, default: Sampling, end: int, guided: bool) -> Sampling:
    kind = trial.suggest_categorical("spacing", ["power", "logsnr", "karras"])
    spacing = kind
    if kind == "power":
        spacing = f"power:{trial.suggest_float('power', 1, 4, step=0.25)}"
    elif kind == "karras":
        spacing = f"karras:{trial.suggest_int('rho', 1, 10)}"
    changes: dict[str, Any] = {"sampler": trial.suggest_categorical("sampler", get_args(SamplerName)), "spacing": spacing}
    if guided:
        tenths = trial.suggest_int("first_tenth", 0, 5), trial.suggest_int("last_tenth", 5, 9)
        interval = f"{tenths[0] * end // 10}/{(tenths[1] + 1) * end // 10 - 1}"
        changes["guidance"] = trial.suggest_float("guidance", 1, 8, step=0.25)
        changes["guidance_interval"] = ALL_TIMESTEPS if tenths == (0, 9) else interval
    return replace(default, **changes)


def _mean_distance(request: TuningRequest, sampling: Sampling) -> float:
    few = search_samples(request.num_samples)
    try:
        found = [_measure(request, config, [sampling], (SEARCH_SEED,), few) for config in request.configs]
    except NonFiniteError:
        return math.inf
    return fmean(_distance(point) for points in found for point in points)


def _measure(
    request: TuningRequest,
    config: ExperimentConfig,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    num_samples: int | None = None,
) -> list[Point]:
    """Measure a run's candidates for all samplings and seeds. With `num_samples`, use only the first feature network."""
    evaluation = config.evaluation
    if num_samples is not None:
        networks = evaluation.feature_networks[:1]
        evaluation = replace(evaluation, num_samples=num_samples, feature_networks=networks)
    requested = tuple(replace(sampling, seed=seed) for sampling in samplings for seed in seeds)
    wanted = EvaluationRequest(
        replace(config, evaluation=evaluation),
        (_checkpoint(config),),
        tuple(dict.fromkeys(requested)),
        devices=request.devices,
        kind="candidate",
    )
    while len(points := evaluate(wanted)) < len(wanted.samplings):
        time.sleep(1)  # other processes are still at work
    by_sampling = dict(zip(wanted.samplings, points, strict=True))
    return [by_sampling[sampling] for sampling in requested]


def _record(config: ExperimentConfig, points: Sequence[Point], line: dict[str, Any], chosen: Sampling) -> None:
    """Add the confirmed points and, last, the choice to a run's record, unless they are there already."""
    run = config.run_dir
    with hold_lock(run / ".record.lock"):
        recorded = {(Measurement.of_point(point).key, bool(point.get("tuned"))) for point in read_points(run)}
        for point in points:
            tuned = Sampling.of_point(point).curve_key == chosen.curve_key
            key = Measurement.of_point(point).key, tuned
            if key not in recorded:
                append_point(run, {**point, "kind": "point", **({"tuned": True, "tries": line["tries"]} if tuned else {})})
                recorded.add(key)
        named = {**line, "metric": next(iter(points[0]["metrics"]))}
        if named not in read_choices(run):
            append_point(run, named)
        write_run_curves(config)


def _costs(request: TuningRequest, default: Sampling) -> str:
    """The planned work in words, with its FLOPs."""
    few, runs, seeds = search_samples(request.num_samples), len(request.configs), len(request.seeds)
    images = runs * (request.tries * few + 2 * seeds * request.num_samples)
    model = request.configs[0].model.at_depth(default.diffusion_depth)
    flops = images * cost.sampling_flops(model, guidance=default.guidance != 1).total(default.steps)
    work = f"up to {request.tries} tries of {few:,} samples, then 2 x {seeds} x {request.num_samples:,} to confirm"
    return f"{work}, for each of {runs} runs: {flops / 1e12:.3g} TFLOPs in all"


def _text(line: dict[str, Any]) -> str:
    """The choice in words, for the terminal."""
    sampling, default = Sampling.of_choice(line), Sampling.of_choice(line, "default")
    if sampling == default:
        return f"the default is the best of {line['tries']} samplings"
    spread = "" if line["half_width"] is None else f" ± {line['half_width']:.2g}"
    change = f"{line['difference']:+.3g}{spread} against the default"
    return f"{sampling.difference(default)} is the best of {line['tries']} samplings, {change}"


def _checkpoint(config: ExperimentConfig) -> Path:
    newest = newest_intact(config.run_dir)
    if newest is None:
        raise InputError(f"{config.run_dir}: no intact checkpoint; madformer train --resume {config.run_dir} makes some")
    return newest


def _distance(point: Point) -> float:
    """The distance of the first network, which is the first metric."""
    return float(next(iter(point["metrics"].values())))
