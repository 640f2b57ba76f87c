"""The record of a run's evaluations: `evaluations.jsonl`, one JSON object a line, only ever appended to.

A line of kind `point` is one budget of one checkpoint, sampled with one seed: the metrics, and everything that made them. One
of kind `mean` sums up several of them, one of kind `diagnostics` says where a checkpoint's model errs. `madformer tune` adds
lines of kind `candidate`, points of samplings that it tried, and one of kind `tuning` with its choice for each budget.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from madformer.config import ExperimentConfig
from madformer.config.evaluation import MAX_EVALUATION_SEED
from madformer.errors import InputError
from madformer.evaluation.measurement import DEFAULTS, Measurement, Point, Sampling
from madformer.progress import TextTable
from madformer.runs.files import append_line, parse_json

SHARED = ("weights", "sampler", "guidance", "num_samples", "prompts", "precision", "codec", "references", "feature_networks")
"""Keys that every point has, and a mean over points has in common with them. Later fields of `Sampling` may be absent."""

_POINT = frozenset(SHARED) | {"steps", "seed", "weights_sha256", "metrics", "nfe", "nfe_actual", "checkpoint", "step", "time"}

_REQUIRED = {
    "point": _POINT,
    "candidate": _POINT,
    "tuning": frozenset(("nfe", "step", "tries", "most_tries", "seeds", "metric", "sampling", "default")),
    "mean": frozenset(SHARED) | {"steps", "metrics", "nfe", "checkpoints", "seeds"},
    "diagnostics": frozenset(
        ("step", "weights", "timesteps", "loss_by_timestep", "loss_by_block", "exposure", "condition_explains", "time")
    ),
}
"""Kind of a line -> the keys that readers rely on."""

SEARCH_SEED = MAX_EVALUATION_SEED
"""Evaluation seed of the tries of `madformer tune`."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCurve:
    """Quality against compute: a run's points of one `Measurement.curve_key`."""

    points: Mapping[int, Sequence[Point]]
    """NFE budget -> its points over checkpoints and seeds; budgets rise, none is without a point."""
    is_tuned: bool = False
    """Whether each budget has a `Sampling` of its own, as `madformer tune` chose it."""

    @property
    def sampling(self) -> Sampling:
        """How all points were sampled, but for budget and seed; of a tuned curve, those of the smallest budget."""
        return Sampling.of_point(self._any)

    @property
    def num_samples(self) -> int:
        """Images behind each point."""
        return int(self._any["num_samples"])

    @property
    def step(self) -> int:
        """The newest training step of its points."""
        return max(int(point["step"]) for points in self.points.values() for point in points)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what was measured at all points."""
        measured = [point["metrics"] for points in self.points.values() for point in points]
        return tuple(name for name in measured[0] if all(name in metrics for metrics in measured))

    @property
    def _any(self) -> Point:
        return next(iter(self.points.values()))[0]


def record_path(run: Path) -> Path:
    """Where a run's evaluations are recorded."""
    return run / "evaluations.jsonl"


def read_points(run: Path, kind: str = "point") -> list[dict[str, Any]]:
    """All points (or candidates) of a run in the order they were measured; none if it was never evaluated.

    The end of a line that a crash cut short is left out with a warning.

    Raises:
        InputError: a line is no JSON object, or a point lacks a key; the message names the file and the line.
    """
    return _read(run, kind)


def read_means(run: Path) -> list[dict[str, Any]]:
    """Means over checkpoints and seeds, in the order they were recorded; as `read_points` otherwise."""
    return _read(run, "mean")


def find_tuning(run: Path, nfe: int, depth: int | None = None) -> dict[str, Any] | None:
    """The last choice of `madformer tune` at a budget, of an elastic run at a diffusion depth; None: there is none."""
    lines = (line for line in reversed(_read(run, "tuning")) if line["nfe"] == nfe)
    return next((line for line in lines if Sampling.of_choice(line).diffusion_depth == depth), None)


def read_choices(run: Path) -> list[dict[str, Any]]:
    """The choices of `madformer tune`, in the order they were made; as `read_points` otherwise."""
    return _read(run, "tuning")


def known_choice(
    lines: Sequence[dict[str, Any]], config: ExperimentConfig, default: Sampling, tries: int, step: int
) -> dict[str, Any] | None:
    """The last choice of `madformer tune` for a budget of a run, with these samples and this default; None: there is none.

    Args:
        lines: the run's choices (`read_choices`).
        config: the run's, with `evaluation` as requested.
        default: what the choice was compared with, at the budget.
        tries: tries that it was allowed at least.
        step: training step of the checkpoint.
    """
    known: dict[str, Any] = {"step": step, "num_samples": config.evaluation.num_samples}
    known["feature_networks"] = list(config.evaluation.feature_networks)
    found = [line for line in lines if known.items() <= line.items() and line["most_tries"] >= tries]
    return next((line for line in reversed(found) if Sampling.of_choice(line, "default") == replace(default, seed=0)), None)


def confirmation_seeds(runs: int) -> tuple[int, ...]:
    """Evaluation seeds that confirm the choice of `madformer tune` for so many runs: three or more repeat each other."""
    seeds = range(SEARCH_SEED - 3, SEARCH_SEED)
    return tuple(seeds) if runs < len(seeds) else (seeds[0],)


def search_samples(num_samples: int) -> int:
    """Samples of a try of `madformer tune`, for points of so many samples: a quarter."""
    return max(num_samples // 4, min(num_samples, 2))


def read_diagnostics(run: Path) -> list[dict[str, Any]]:
    """Diagnostics of checkpoints, in the order they were recorded; as `read_points` otherwise."""
    return _read(run, "diagnostics")


def newest_diagnostics(run: Path) -> dict[str, Any] | None:
    """The last diagnostics of the newest checkpoint that has some; None: there are none."""
    return max(reversed(read_diagnostics(run)), key=lambda entry: entry["step"], default=None)


def _read(run: Path, kind: str) -> list[dict[str, Any]]:
    path = record_path(run)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = _whole_length(content)
    if whole < len(content):
        _log.warning("%s: the last line is torn, as by a crash: left out", path)
    return list(_objects(path, content[:whole], kind))


def append_point(run: Path, point: Mapping[str, Any]) -> None:
    """Add a point, a mean or diagnostics to the record; what a crash left of another line is cut off first.

    Raises:
        ValueError: a number is not finite, as of a diverged model; nothing is recorded.
    """
    try:
        line = json.dumps(point, allow_nan=False)
    except ValueError as error:
        numbers = point.get("metrics", "its losses")
        raise ValueError(f"{run}: the {point['kind']} at NFE {point['nfe']} is not finite: {numbers}") from error
    path = record_path(run)
    if path.exists():
        content = path.read_bytes()
        if (whole := _whole_length(content)) < len(content):
            with path.open("rb+") as file:
                file.truncate(whole)
    append_line(path, line)


def find_point(points: Sequence[dict[str, Any]], wanted: Measurement) -> dict[str, Any] | None:
    """The last of a run's points that is this measurement, if there is one."""
    return next((point for point in reversed(points) if Measurement.of_point(point).key == wanted.key), None)


def newest_values(run: Path) -> TextTable:
    """The last point of each sampling, with the training step that it is of and its metrics as they are recorded.

    Raises:
        InputError: as `read_points`.
    """
    points = read_points(run)
    metrics = list(dict.fromkeys(name for point in points for name in point["metrics"]))
    newest = {(Measurement.of_point(point).curve_key, point["nfe"], point["seed"]): point for point in points}
    facts = ("step", "nfe", "steps", "seed", "num_samples")
    table = TextTable(
        "newest evaluations", ("sampling", "step", "NFE", "steps", "seed", "samples", *metrics), frozenset(["sampling"])
    )
    for point in sorted(newest.values(), key=lambda point: (point["step"], point["nfe"])):
        sampling = Sampling.of_point(point)
        usual = {name: text for name, text in sampling.texts.items() if sampling.curve_fields[name] == DEFAULTS[name]}
        words = [text for name, text in sampling.texts.items() if name in ("sampler", "weights") or name not in usual]
        values = (f"{point['metrics'][name]:.4g}" if name in point["metrics"] else "" for name in metrics)
        table.rows.append([", ".join(words), *(str(point[name]) for name in facts), *values])
    return table


def run_curves(run: Path, networks: Sequence[tuple[str, str | None]] | None = None) -> list[RunCurve]:
    """A run's curves at its newest evaluated step, one for each `Measurement.curve_key`; the main one comes first.

    Points of different samplers, sample counts, weights, networks, ... make no curve together. The main curve is one of the
    moving average, the one of the most samples, the one with the most budgets, the one sampled in the way that was measured
    first (a sampler that is tried later does not take its place), the one measured last, in this order, and so on for the
    others. A curve that the newest step was not measured for is left out: it would compare stages of training. So is one that
    has points of `madformer tune` alone (`tuned_curves` has them), unless it was sampled as the default.

    Args:
        networks: names and hashes of feature networks (`Measurement.has_networks`); None: whatever was measured with.

    Raises:
        InputError: as `read_points`.
    """
    points, means = read_points(run), read_means(run)
    if networks is not None:
        points = [point for point in points if Measurement.of_point(point).has_networks(networks)]
    newest = max((point["step"] for point in points), default=None)
    defaults = {Sampling.of_choice(line, "default").curve_key for line in _read(run, "tuning")}
    groups: dict[str, list[Point]] = {}
    for point in points:
        key = Measurement.of_point(point).curve_key
        groups[key] = [*groups.pop(key, []), point]
    lasting = {
        key: group
        for key, group in groups.items()
        if any(point["step"] == newest for point in group)
        and (Sampling.of_point(group[0]).curve_key in defaults or not all(point.get("tuned") for point in group))
    }
    mean_keys = [Measurement.of_point(mean).curve_key for mean in means]
    curves = [
        _curve(group, [mean for mean, mean_key in zip(means, mean_keys, strict=True) if mean_key == key])
        for key, group in reversed(lasting.items())
    ]
    first = list(dict.fromkeys(Sampling.of_point(point).curve_key for point in points))

    def rank(curve: RunCurve) -> tuple[Any, ...]:
        sampling = curve.sampling
        return sampling.weights != "ema", -curve.num_samples, -len(curve.points), first.index(sampling.curve_key)

    return sorted(curves, key=rank)


def tuned_curves(run: Path, networks: Sequence[tuple[str, str | None]] | None = None) -> list[RunCurve]:
    """A run's points at the `Sampling` that `madformer tune` chose for each budget, at the newest evaluated step.

    One curve; of an elastic run one for each diffusion depth; none if it is not tuned.

    Args:
        networks: as in `run_curves`.

    Raises:
        InputError: as `read_points`.
    """
    points = read_points(run)
    if networks is not None:
        points = [point for point in points if Measurement.of_point(point).has_networks(networks)]
    newest = max((point["step"] for point in points), default=None)
    tuned = [point for point in points if point.get("tuned") and point["step"] == newest]
    depths = sorted({Sampling.of_point(point).diffusion_depth or 0 for point in tuned})
    by_depth = ([point for point in tuned if (Sampling.of_point(point).diffusion_depth or 0) == depth] for depth in depths)
    return [_tuned_curve(points) for points in by_depth]


def _tuned_curve(tuned: Sequence[Point]) -> RunCurve:
    budgets: dict[int, list[Point]] = {}
    for point in sorted(tuned, key=lambda point: int(point["nfe"])):
        budgets.setdefault(point["nfe"], []).append(point)
    # Of the most samples, and if it was tuned again the last.
    last = {nfe: max(reversed(measured), key=lambda point: int(point["num_samples"])) for nfe, measured in budgets.items()}
    chosen = {nfe: Measurement.of_point(point).curve_key for nfe, point in last.items()}
    kept = {
        nfe: list({point["seed"]: point for point in measured if Measurement.of_point(point).curve_key == chosen[nfe]}.values())
        for nfe, measured in budgets.items()
    }
    return RunCurve(kept, is_tuned=True)


def curves_by_sampling(curves: Sequence[RunCurve], metric: str) -> list[RunCurve]:
    """Of a run's curves those with a metric, one for each way of sampling: where several were measured, the first."""
    chosen: dict[str, RunCurve] = {}
    for curve in curves:
        if metric in curve.metrics:
            chosen.setdefault(curve.sampling.curve_key, curve)
    return list(chosen.values())


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None: not all of them were."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return fmean(known) if len(known) == len(listed) else None


def _curve(points: Sequence[Point], means: Sequence[Point]) -> RunCurve:
    """The points of the last mean's checkpoints if the newest is among them, else of the newest alone.

    Budgets that the newest checkpoint lacks are left out, and what was measured again counts once, the last.
    """
    newest = max(points, key=lambda point: point["step"])["checkpoint"]
    averaged = means[-1]["checkpoints"] if means else []
    chosen = averaged if newest in averaged else [newest]
    weights = {point["checkpoint"]: point["weights_sha256"] for point in points}
    budgets: dict[int, dict[tuple[str, int], Point]] = {}
    for point in sorted(points, key=lambda point: (point["nfe_actual"], point["nfe"])):
        checkpoint = point["checkpoint"]
        if checkpoint in chosen and point["weights_sha256"] == weights[checkpoint]:
            budgets.setdefault(point["nfe"], {})[checkpoint, point["seed"]] = point
    return RunCurve(
        {
            nfe: list(measured.values())
            for nfe, measured in budgets.items()
            if any(checkpoint == newest for checkpoint, _ in measured)
        }
    )


def _whole_length(content: bytes) -> int:
    """Bytes up to the end of the last whole line; a last one without its newline counts if it is a whole object."""
    end = content.rfind(b"\n") + 1
    return len(content) if _parse(content[end:]) is not None else end


def _objects(path: Path, content: bytes, kind: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        entry = _parse(line)
        if entry is None:
            raise InputError(f"{path}, line {number}: not a JSON object of finite numbers; delete the line or restore the file")
        if entry.get("kind") != kind:
            continue
        if missing := _REQUIRED[kind] - entry.keys():
            raise InputError(f"{path}, line {number}: a {kind} line without {', '.join(sorted(missing))}; delete the line")
        yield entry


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
