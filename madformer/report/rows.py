"""From the records of runs to rows: one label at one budget, over its seeds."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from madformer.config import InputError
from madformer.evaluation.record import Point, RunCurve, Variant, mean_known, run_curves
from madformer.report.costs import COSTS
from madformer.report.curves import Curve
from madformer.report.estimate import Estimate, estimate
from madformer.report.text import natural

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, sampled in one way."""

    base: str
    """The label of the runs."""
    aside: str
    """What sets it apart from how most runs of the report were sampled, such as `unipc`; empty: nothing."""
    axes: Mapping[str, Any]
    variant: Variant
    curves: tuple[RunCurve, ...]
    """One for each training seed."""
    runs: tuple[Path, ...]
    """Their folders."""
    seeds: tuple[int, ...]
    """Their training seeds."""

    @property
    def label(self) -> str:
        """Its name in tables and legends."""
        return f"{self.base} · {self.aside}" if self.aside else self.base

    @property
    def points(self) -> list[Point]:
        """All points of all runs."""
        return [point for curve in self.curves for points in curve.points.values() for point in points]


@dataclass(frozen=True)
class Row:
    """One group at one budget."""

    group: Group
    nfe: int
    """The budget, in layer evaluations per block."""
    steps: int
    """Denoising steps per block."""
    seeds: tuple[int, ...]
    """Of the training runs that were measured at this budget."""
    quality: Mapping[str, Estimate]
    """Every metric that all these runs have."""
    bias: Mapping[str, float]
    """How far from zero a metric is for so many perfect samples."""
    costs: Mapping[str, float | None]
    """By the names in `COSTS`, means over seeds; None: not measured for each of them."""

    @property
    def label(self) -> str:
        """The group's name in tables and legends."""
        return self.group.label


def gather(curves: Sequence[Curve], metric: str | None = None) -> tuple[str, list[Group]]:
    """The newest evaluations of runs, every sampler, guidance and kind of weights that any of them was evaluated with.

    Returns:
        The metric, by default the first one that all runs have, and the groups in the order of a table.

    Raises:
        InputError: no runs, a run that was not evaluated or not with this metric, no run with its budgets, or a broken record.
    """
    if not curves:
        raise InputError("no runs to report on; name at least one")
    recorded: list[tuple[Curve, list[RunCurve]]] = []
    for curve in sorted(curves, key=lambda curve: (natural(curve.label), curve.seed)):
        if not (measured := run_curves(curve.run)):
            raise InputError(f"{curve.run}: no evaluations; make them: madformer evaluate {curve.run}")
        recorded.append((curve, measured))
    metric = metric or _shared_metric(recorded)
    for curve, measured in recorded:
        if metric not in (names := _metrics(measured)):
            raise InputError(f"{curve.run}: not evaluated with {metric}, but {', '.join(names)}; choose with --metric")
    chosen = [
        (curve, [kept for entry in measured if metric in entry.metrics and (kept := _asked_for(entry, curve)) is not None])
        for curve, measured in recorded
    ]
    if not any(measured for _, measured in chosen):
        raise InputError(f"{recorded[0][0].run}: not evaluated at the budgets that are asked for, nor are the others")
    return metric, _groups(chosen)


def make_rows(group: Group) -> list[Row]:
    """A group's rows, by rising budgets."""
    rows = []
    for nfe in sorted({nfe for curve in group.curves for nfe in curve.points}):
        runs = [curve.points[nfe] for curve in group.curves if nfe in curve.points]
        seeds = tuple(seed for seed, curve in zip(group.seeds, group.curves, strict=True) if nfe in curve.points)
        points = [point for run in runs for point in run]
        shared = [name for name in points[0]["metrics"] if all(name in point["metrics"] for point in points)]
        quality = {name: estimate(runs, partial(_value, name)) for name in shared}
        biases = {name: mean_known(point.get("bias", {}).get(name) for point in points) for name in shared}
        bias = {name: value for name, value in biases.items() if value is not None}
        costs = {name: mean_known(mean_known(map(cost.of, run)) for run in runs) for name, cost in COSTS.items()}
        rows.append(Row(group, nfe, points[0]["steps"], seeds, quality, bias, costs))
    return rows


def _metrics(measured: Sequence[RunCurve]) -> list[str]:
    """All metrics of a run, the main curve's first."""
    return list(dict.fromkeys(name for entry in measured for name in entry.metrics))


def _shared_metric(recorded: Sequence[tuple[Curve, Sequence[RunCurve]]]) -> str:
    """The first metric that all runs have; if there is none, the first of the first run."""
    first, *others = (_metrics(measured) for _, measured in recorded)
    return next((name for name in first if all(name in other for other in others)), first[0])


def _asked_for(measured: RunCurve, curve: Curve) -> RunCurve | None:
    """The points that a report is on; None: there is none."""
    if curve.num_samples not in (None, measured.num_samples):
        return None
    points = {nfe: points for nfe, points in measured.points.items() if curve.budgets is None or nfe in curve.budgets}
    return RunCurve(points) if points else None


def _value(metric: str, point: Point) -> float:
    return float(point["metrics"][metric])


def _groups(chosen: Sequence[tuple[Curve, Sequence[RunCurve]]]) -> list[Group]:
    """Runs of one label and variant together; the variant that most runs have needs no name."""
    each = (dict.fromkeys(measured.variant for measured in curves) for _, curves in chosen)
    main = Counter(itertools.chain.from_iterable(each)).most_common(1)[0][0]
    members: dict[tuple[str, Variant], list[tuple[Curve, RunCurve]]] = {}
    for curve, curves in chosen:
        for measured in curves:
            members.setdefault((curve.label, measured.variant), []).append((curve, measured))
    groups = []
    for (label, variant), entries in members.items():
        runs = _alike(entries)
        groups.append(
            Group(
                label,
                variant.beside(main),
                runs[0][0].axes,
                variant,
                tuple(measured for _, measured in runs),
                tuple(curve.run for curve, _ in runs),
                tuple(curve.seed for curve, _ in runs),
            )
        )
    return sorted(groups, key=lambda group: (natural(group.base), natural(group.aside)))


def _alike(entries: Sequence[tuple[Curve, RunCurve]]) -> list[tuple[Curve, RunCurve]]:
    """One curve for each run, all of the same step and number of samples; runs without such a one are left out, with a word.

    Of several steps it is the newest, then the number of samples that most runs have, then the greatest.
    """
    manners: dict[tuple[int, int], dict[Path, tuple[Curve, RunCurve]]] = {}
    for curve, measured in entries:
        manners.setdefault((measured.step, measured.num_samples), {}).setdefault(curve.run, (curve, measured))
    (step, samples), kept = max(manners.items(), key=lambda item: (item[0][0], len(item[1]), item[0][1]))
    for run in dict.fromkeys(curve.run for curve, _ in entries if curve.run not in kept):
        _log.warning("%s: left out: not evaluated at step %d with %d samples, as others of its label", run, step, samples)
    return list(kept.values())
