"""From the records of runs to rows: one label at one budget, over its seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from madformer.config import InputError, load_run
from madformer.evaluation.record import Point, RunCurve, Variant, mean_known, run_curves, variants
from madformer.report.costs import COSTS
from madformer.report.estimate import Estimate, estimate
from madformer.report.text import natural


@dataclass(frozen=True)
class Curve:
    """One trained run in a report."""

    label: str
    """Its name in tables and legends; runs that differ in the seed alone share it."""
    run: Path
    """The run's folder."""
    axes: Mapping[str, Any]
    """What sets it apart from the other runs, as `section.field` -> value."""
    seed: int
    """Seed of training."""
    budgets: frozenset[int] | None = None
    """NFE budgets that are reported on; None: all that were evaluated."""


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


def curves_of_runs(runs: Sequence[Path]) -> list[Curve]:
    """Any runs side by side, each under its name; those that share a name under parent/name.

    Raises:
        InputError: a folder is no run, or is named twice.
    """
    folders = [run.resolve() for run in runs]
    names = Counter(folder.name for folder in folders)
    labels = [folder.name if names[folder.name] == 1 else f"{folder.parent.name}/{folder.name}" for folder in folders]
    for label, times in Counter(labels).items():
        if times > 1:
            raise InputError(f"{label}: {times} runs of this name; give each run once, in a folder of its own name")
    return [Curve(label, run, {}, load_run(run).seed) for label, run in zip(labels, runs, strict=True)]


def gather(curves: Sequence[Curve], metric: str | None = None) -> tuple[str, list[Group]]:
    """The newest evaluations of runs, every sampler, guidance and kind of weights that any of them was evaluated with.

    Returns:
        The metric, by default the first one recorded, and the groups in the order of a table.

    Raises:
        InputError: no runs, a run that was not evaluated or not with this metric, no run with its budgets, or a broken record.
    """
    if not curves:
        raise InputError("no runs to report on; name at least one")
    chosen: list[tuple[Curve, list[RunCurve]]] = []
    for curve in sorted(curves, key=lambda curve: (natural(curve.label), curve.seed)):
        recorded = run_curves(curve.run)
        if not recorded:
            raise InputError(f"{curve.run}: no evaluations; make them: madformer evaluate {curve.run}")
        metric = metric or recorded[0].metrics[0]
        if not (measured := variants(recorded, metric)):
            others = dict.fromkeys(name for entry in recorded for name in entry.metrics)
            raise InputError(f"{curve.run}: not evaluated with {metric}, but {', '.join(others)}")
        chosen.append((curve, [kept for entry in measured if (kept := _asked_for(entry, curve.budgets)) is not None]))
    assert metric is not None
    if not any(curves for _, curves in chosen):
        raise InputError(f"{chosen[0][0].run}: not evaluated at the budgets that are asked for, nor are the others")
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


def _asked_for(measured: RunCurve, budgets: frozenset[int] | None) -> RunCurve | None:
    """The points at these budgets; None: there is none."""
    points = {nfe: points for nfe, points in measured.points.items() if budgets is None or nfe in budgets}
    return RunCurve(points) if points else None


def _value(metric: str, point: Point) -> float:
    return float(point["metrics"][metric])


def _groups(chosen: Sequence[tuple[Curve, Sequence[RunCurve]]]) -> list[Group]:
    """Runs of one label and variant together; the variant that most runs have needs no name."""
    main = Counter(measured.variant for _, curves in chosen for measured in curves).most_common(1)[0][0]
    members: dict[tuple[str, Variant], list[tuple[Curve, RunCurve]]] = {}
    for curve, curves in chosen:
        for measured in curves:
            members.setdefault((curve.label, measured.variant), []).append((curve, measured))
    groups = [
        Group(
            label,
            variant.beside(main),
            runs[0][0].axes,
            variant,
            tuple(measured for _, measured in runs),
            tuple(curve.run for curve, _ in runs),
            tuple(curve.seed for curve, _ in runs),
        )
        for (label, variant), runs in members.items()
    ]
    return sorted(groups, key=lambda group: (natural(group.base), natural(group.aside)))
