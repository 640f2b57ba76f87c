"""The record of a run's evaluations: `evaluations.jsonl`, one JSON object a line, only ever appended to.

A line of kind `point` is one budget of one checkpoint: the metrics, and everything that made them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from madformer.config import InputError
from madformer.files import append_line

IDENTITY = (
    "nfe",
    "steps",
    "weights_sha256",
    "weights",
    "sampler",
    "guidance",
    "num_samples",
    "seed",
    "reference",
    "feature_network",
    "metrics",
)
"""What makes two points the same measurement; of the metrics their names, not their values."""

_REQUIRED = frozenset(IDENTITY) | {"nfe_actual", "step", "time"}

_log = logging.getLogger(__name__)


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
    """Means over checkpoints, in the order they were recorded; as `read_points` otherwise."""
    return _read(run, "mean")


def _read(run: Path, kind: str) -> list[dict[str, Any]]:
    path = record_path(run)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = _whole_length(content)
    if whole < len(content):
        _log.warning("%s: the last line is torn, as by a crash: left out", path)
    return [entry for entry in _objects(path, content[:whole]) if entry.get("kind") == kind]


def append_point(run: Path, point: Mapping[str, Any]) -> None:
    """Add a point to the record; what a crash left of another is cut off first.

    Raises:
        ValueError: a number is not finite, as of a diverged model; nothing is recorded.
    """
    try:
        line = json.dumps(point, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{run}: the evaluation at NFE {point['nfe']} is not finite: {dict(point['metrics'])}") from error
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
        wanted: the keys of `IDENTITY`; `metrics` may be their names alone.
    """
    identity = _identity(wanted)
    return next((point for point in reversed(points) if _identity(point) == identity), None)


def latest_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curve of the newest checkpoint: its points by NFE, all measured in the same way.

    Points of different samplers, sample counts, weights, ... make no curve together. Of several curves it is one of the moving
    average, the one with the most budgets, the one measured last, in this order. A budget measured twice counts once, the last.
    """
    newest = max((point["step"] for point in points), default=None)
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    for point in points:
        if point["step"] == newest:
            manner = {key: value for key, value in _identity(point).items() if key not in ("nfe", "steps")}
            key = json.dumps(manner, sort_keys=True)
            curves[key] = {**curves.pop(key, {}), point["nfe"]: point}
    candidates = [list(curve.values()) for curve in curves.values()]
    if not candidates:
        return []
    best = max(reversed(candidates), key=lambda curve: (curve[0]["weights"] == "ema", len(curve)))
    return sorted(best, key=lambda point: (point["nfe_actual"], point["nfe"]))


def _identity(point: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: point[key] for key in IDENTITY}, "metrics": sorted(point["metrics"])}


def _whole_length(content: bytes) -> int:
    """Bytes up to the end of the last whole line; a last one without its newline counts if it is a whole object."""
    end = content.rfind(b"\n") + 1
    return len(content) if _parse(content[end:]) is not None else end


def _objects(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        entry = _parse(line)
        if entry is None:
            raise InputError(f"{path}, line {number}: not a JSON object; delete the line or restore the file")
        missing = _REQUIRED - entry.keys() if entry.get("kind") == "point" else set()
        if missing:
            raise InputError(f"{path}, line {number}: a point without {', '.join(sorted(missing))}; delete the line")
        yield entry


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
