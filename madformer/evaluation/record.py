"""The record of a run's evaluations: `evaluations.jsonl`, one JSON object a line, only ever appended to.

A line of kind `point` is one budget of one checkpoint, sampled with one seed: the metrics, and everything that made them. One
of kind `mean` sums up several of them, one of kind `diagnostics` says where a checkpoint's model errs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from madformer.errors import InputError
from madformer.runs.files import append_line

Point = Mapping[str, Any]
"""A line of the record."""

IDENTITY = (
    "steps",
    "weights_sha256",
    "weights",
    "sampler",
    "guidance",
    "num_samples",
    "seed",
    "prompts",
    "precision",
    "codec",
    "references",
    "feature_networks",
)
"""What makes two points the same measurement; of codec, networks and references not where they lay."""

MANNER = tuple(key for key in IDENTITY if key not in ("steps", "weights_sha256", "seed"))
"""What the points of one curve have in common, over its budgets, checkpoints and seeds."""

_REQUIRED = {
    "point": frozenset(IDENTITY) | {"metrics", "nfe", "nfe_actual", "checkpoint", "step", "time"},
    "mean": frozenset(MANNER) | {"metrics", "nfe", "checkpoints", "seeds"},
    "diagnostics": frozenset(
        ("step", "weights", "timesteps", "loss_by_timestep", "loss_by_block", "exposure", "condition_explains", "time")
    ),
}
"""Kind of a line -> the keys that readers rely on."""

_log = logging.getLogger(__name__)


class Variant(NamedTuple):
    """How images were sampled from a model: what one compares within a run."""

    sampler: str
    guidance: float
    weights: str

    def beside(self, main: Variant) -> str:
        """What sets it apart from another variant, such as `unipc, guidance 1.5`; empty: nothing."""
        names = (self.sampler, f"guidance {self.guidance:g}", "EMA weights" if self.weights == "ema" else "raw weights")
        return ", ".join(name for name, own, other in zip(names, self, main, strict=True) if own != other)


@dataclass(frozen=True)
class RunCurve:
    """Quality against compute: a run's points that were measured in one manner."""

    points: Mapping[int, Sequence[Point]]
    """NFE budget -> its points over checkpoints and seeds; budgets rise, none is without a point."""

    @property
    def variant(self) -> Variant:
        """How all points were sampled."""
        return _variant(self._any)

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


def read_points(run: Path) -> list[dict[str, Any]]:
    """All points of a run in the order they were measured; none if it was never evaluated.

    The end of a line that a crash cut short is left out with a warning.

    Raises:
        InputError: a line is no JSON object, or a point lacks a key; the message names the file and the line.
    """
    return _read(run, "point")


def read_means(run: Path) -> list[dict[str, Any]]:
    """Means over checkpoints and seeds, in the order they were recorded; as `read_points` otherwise."""
    return _read(run, "mean")


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


def find_point(points: Sequence[dict[str, Any]], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last point that is the measurement `wanted`, if there is one.

    Args:
        points: of one run.
        wanted: the keys of `IDENTITY`.
    """
    sought = identity(wanted)
    return next((point for point in reversed(points) if identity(point) == sought), None)


def run_curves(run: Path) -> list[RunCurve]:
    """A run's curves at its newest evaluated step, one for each manner of measuring; the main one comes first.

    Points of different samplers, sample counts, weights, networks, ... make no curve together. The main curve is one of the
    moving average, the one of the most samples, the one with the most budgets, the one sampled in the way that was measured
    first (a sampler that is tried later does not take its place), the one measured last, in this order, and so on for the
    others. A manner that the newest step was not measured in is left out: it would compare stages of training.

    Raises:
        InputError: as `read_points`.
    """
    points, means = read_points(run), read_means(run)
    newest = max((point["step"] for point in points), default=None)
    groups: dict[str, list[Point]] = {}
    for point in points:
        key = manner(point)
        groups[key] = [*groups.pop(key, []), point]
    lasting = {key: group for key, group in groups.items() if any(point["step"] == newest for point in group)}
    curves = [_curve(group, [mean for mean in means if manner(mean) == key]) for key, group in reversed(lasting.items())]
    first = list(dict.fromkeys(map(_variant, points)))

    def rank(curve: RunCurve) -> tuple[Any, ...]:
        return curve.variant.weights != "ema", -curve.num_samples, -len(curve.points), first.index(curve.variant)

    return sorted(curves, key=rank)


def variants(curves: Sequence[RunCurve], metric: str) -> list[RunCurve]:
    """Of a run's curves those with a metric, one for each variant: where several were measured otherwise, the first."""
    chosen: dict[Variant, RunCurve] = {}
    for curve in curves:
        if metric in curve.metrics:
            chosen.setdefault(curve.variant, curve)
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


def _variant(point: Point) -> Variant:
    return Variant(point["sampler"], point["guidance"], point["weights"])


def identity(point: Point) -> dict[str, Any]:
    """What tells a point from others, by `IDENTITY`."""
    return {key: content(point[key]) for key in IDENTITY}


def manner(entry: Point) -> str:
    """The same text for points and means that were measured in the same manner."""
    return json.dumps([content(entry[key]) for key in MANNER], sort_keys=True)


def content(value: Any) -> Any:
    """A value of a point; of what has a hash, that and the type that it computes in."""
    if isinstance(value, list):
        return [content(entry) for entry in value]
    return [value["sha256"], value.get("dtype")] if isinstance(value, dict) else value


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
            raise InputError(f"{path}, line {number}: not a JSON object; delete the line or restore the file")
        if entry.get("kind") != kind:
            continue
        if missing := _REQUIRED[kind] - entry.keys():
            raise InputError(f"{path}, line {number}: a {kind} line without {', '.join(sorted(missing))}; delete the line")
        yield entry


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
