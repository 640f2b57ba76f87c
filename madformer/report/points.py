"""The points of a report: select the runs' points, group them over seeds, arrange them in rows and columns."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from madformer.config import ExperimentConfig, load_run, trained_fields
from madformer.config.identity import named_folder
from madformer.errors import InputError
from madformer.evaluation.measurement import DEPTH, Measurement, Point, Sampling
from madformer.evaluation.record import (
    RunCurve,
    confirmation_seeds,
    find_tuning,
    mean_known,
    read_points,
    run_curves,
    tuned_curves,
)
from madformer.report.formatting import COSTS, natural
from madformer.report.statistics import Estimate, estimate
from madformer.sweep.adaptive import wanted_cells
from madformer.sweep.cells import Cell
from madformer.sweep.needs import cell_measurement
from madformer.sweep.spec import Sweep

_log = logging.getLogger(__name__)


FIXED, TUNED = "fixed", "tuned"
"""At the same sampling for all budgets; as `madformer tune` chose for each budget."""


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
    num_samples: int | None = None
    """Images behind the points that are reported on; None: as many as most runs of the label have."""
    networks: tuple[tuple[str, str | None], ...] | None = None
    """Names and hashes of the feature networks that are reported on; None: whatever the run was evaluated with."""


def curves_of_runs(runs: Sequence[Path]) -> list[Curve]:
    """Any runs side by side, each under its folder's name, or as much of its path as sets it apart.

    Runs whose names differ in `-s0`, `-s1`, ... and whose configurations differ in the seed alone share a label.

    Raises:
        InputError: a folder is no run, or is named twice.
    """
    for run, times in Counter(run.resolve() for run in runs).items():
        if times > 1:
            raise InputError(f"{run}: named {times} times; give each run once")
    members: dict[tuple[Path, str], list[tuple[Path, int]]] = {}
    for run in runs:
        config = load_run(run)
        members.setdefault(_design(_named(run), config), []).append((run, config.seed))
    designs = Counter(path for path, _ in members)
    named: list[tuple[Path, list[tuple[Path, int]]]] = []
    for (path, _), seeds in members.items():
        members_of = {_named(run) for run, _ in seeds}
        taken = designs[path] > 1 or path in {_named(run) for run in runs} - members_of
        together = len({seed for _, seed in seeds}) == len(seeds) > 1 and not taken
        named += [(path, seeds)] if together else [(_named(run), [(run, seed)]) for run, seed in seeds]
    labels = _shortest([path for path, _ in named])
    return [Curve(label, run, {}, seed) for label, (_, seeds) in zip(labels, named, strict=True) for run, seed in seeds]


def curves_of_sweep(sweep: Sweep) -> list[Curve]:
    """All cells that were evaluated as the sweep says, at its budgets. A warning names how many others there are.

    Raises:
        InputError: none is evaluated; the message says how to do that.
    """
    if sweep.search is None:
        cells: Sequence[Cell] = wanted_cells(sweep)
        budgets = {cell.run: frozenset(cell.budgets) for cell in cells}
    else:
        from madformer.sweep.search import study_cells

        cells = list({cell.run: cell for cell in study_cells(sweep)}.values())  # of several budgets, one for each
        budgets = {cell.run: frozenset(sweep.search.nfe) for cell in cells}
    measured = [cell for cell in cells if _is_measured(cell, budgets[cell.run])]
    remedy = "madformer sweep run does that, and goes on where it stopped"
    if not measured:
        raise InputError(f"{sweep.name}: none of {len(cells)} cells is evaluated: {remedy}")
    if missing := [cell.name for cell in cells if cell not in measured]:
        why = remedy if sweep.search is None else "they were ended early, have failed, or are not done yet"
        _log.warning("%d of %d cells are not evaluated (%s, ...): %s", len(missing), len(cells), missing[0], why)
    return [
        Curve(
            cell.design or sweep.name,
            cell.run,
            cell.axes,
            cell.seed,
            budgets[cell.run],
            cell.config.evaluation.num_samples,
            cell_measurement(cell, cell.samplings[0]).feature_networks,
        )
        for cell in measured
    ]


def _is_measured(cell: Cell, budgets: frozenset[int]) -> bool:
    """Whether there is a point of the sweep's budgets, samples and feature networks, however it was sampled."""
    expected, points = cell_measurement(cell, cell.samplings[0]), map(Measurement.of_point, read_points(cell.run))
    return any(point.sampling.nfe in budgets and replace(expected, sampling=point.sampling).matches(point) for point in points)


def _named(run: Path) -> Path:
    return named_folder(run).absolute()


def _design(run: Path, config: ExperimentConfig) -> tuple[Path, str]:
    """The run's folder without a seed at its end, and all that decides its weights but the seed."""
    fields = {key: value for key, value in trained_fields(config).items() if key != "seed"}
    return run.parent / (_without_seed(run.name, config.seed) or run.name), repr(sorted(fields.items()))


def _without_seed(name: str, seed: int) -> str:
    """What stands before the seed in a name, such as d2 of d2-s0; empty: nothing."""
    return "" if name == f"s{seed}" else name.removesuffix(f"-s{seed}")


def _shortest(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that no other one shares."""
    labels = [""] * len(paths)
    for length in itertools.count(1):
        ends = ["/".join(path.parts[-length:]) for path in paths]
        times = Counter(ends)
        labels = [label or (end if times[end] == 1 else "") for label, end in zip(labels, ends, strict=True)]
        if all(labels):
            return labels
    raise AssertionError


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, sampled in one way (`Sampling.curve_key`), or as tuned for each budget."""

    base: str
    """The label of the runs."""
    difference: str
    """What sets it apart from how most runs of the report were sampled, such as `unipc` or `tuned`; empty: nothing."""
    axes: Mapping[str, Any]
    sampling: Sampling
    """How all its points were sampled, but for budget and seed; of a tuned group, those of the smallest budget."""
    curves: tuple[RunCurve, ...]
    """One for each training seed."""
    runs: tuple[Path, ...]
    """Their folders."""
    seeds: tuple[int, ...]
    """Their training seeds."""

    @property
    def label(self) -> str:
        """Its name in tables and legends."""
        return f"{self.base} · {self.difference}" if self.difference else self.base

    @property
    def design(self) -> str:
        """The label, the same at the fixed sampler and as tuned."""
        return self.label.removesuffix(f" · {TUNED}")

    @property
    def is_tuned(self) -> bool:
        """Whether each budget has a `Sampling` of its own, as `madformer tune` chose it."""
        return self.curves[0].is_tuned

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
    choices: tuple[Mapping[str, Any], ...] = ()
    """Of a tuned group the lines of `madformer tune`: one, unless its runs were tuned apart."""

    @property
    def label(self) -> str:
        """The group's name in tables and legends."""
        return self.group.label

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of each training seed."""
        quality = self.quality[metric]
        values = quality.values if quality.over == "training seeds" else (quality.mean,)
        return dict(zip(self.seeds, values, strict=True))

    @property
    def samplings(self) -> list[Sampling]:
        """How it was sampled, but for the seed: one, unless its runs were tuned apart; the first run's comes first."""
        points = (point for curve in self.group.curves for point in curve.points.get(self.nfe, ()))
        return list(dict.fromkeys(replace(Sampling.of_point(point), seed=0) for point in points))


def gather(curves: Sequence[Curve], metric: str | None = None) -> tuple[str, list[Group]]:
    """The newest evaluations of runs, in every way of sampling that any of them was evaluated with, and as tuned.

    Returns:
        The metric, by default the first one that all runs have, and the groups in the order of a table.

    Raises:
        InputError: no runs, a run that was not evaluated or not with this metric, no run with its budgets, or a broken record.
    """
    if not curves:
        raise InputError("no runs to report on; name at least one")
    recorded: list[tuple[Curve, list[RunCurve]]] = []
    for curve in sorted(curves, key=lambda curve: (natural(curve.label), curve.seed)):
        if not (measured := run_curves(curve.run, curve.networks)):
            raise InputError(f"{curve.run}: no evaluations; make them: madformer evaluate {curve.run}")
        recorded.append((curve, [*measured, *tuned_curves(curve.run, curve.networks)]))
    metric = metric or _shared_metric(recorded)
    for curve, measured in recorded:
        if metric not in (names := _metrics(measured)):
            raise InputError(f"{curve.run}: not evaluated with {metric}, but {', '.join(names)}; choose with --metric")
    chosen = [
        (curve, [kept for entry in measured if metric in entry.metrics and (kept := _asked_for(entry, curve)) is not None])
        for curve, measured in recorded
    ]
    chosen = _without_lone_confirmations(chosen)
    if all(entry.is_tuned for _, measured in chosen for entry in measured):
        raise InputError(f"{recorded[0][0].run}: not evaluated at the budgets that are asked for, nor are the others")
    return metric, _groups(chosen)


def _without_lone_confirmations(chosen: Sequence[tuple[Curve, list[RunCurve]]]) -> list[tuple[Curve, list[RunCurve]]]:
    """Fixed curves without the points that tuning has left, at budgets where not all runs have them: seeds scatter together."""
    confirming = set(confirmation_seeds(1))
    have: dict[int, list[bool]] = {}
    for _, curves in chosen:
        for nfe, points in (item for curve in curves if not curve.is_tuned for item in curve.points.items()):
            have.setdefault(nfe, []).append(any(point["seed"] in confirming for point in points))
    lone = {nfe for nfe, found in have.items() if len(set(found)) > 1}

    def restricted(curve: RunCurve) -> RunCurve:
        asked = {nfe: [point for point in points if point["seed"] not in confirming] for nfe, points in curve.points.items()}
        return replace(curve, points={nfe: (nfe in lone and asked[nfe]) or points for nfe, points in curve.points.items()})

    return [(curve, [each if each.is_tuned else restricted(each) for each in curves]) for curve, curves in chosen]


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
        row = Row(group, nfe, points[0]["steps"], seeds, quality, bias, costs)
        rows.append(replace(row, choices=_choices(row)) if group.is_tuned else row)
    return rows


def _choices(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The lines of kind `tuning` behind a row, each once: runs that were tuned together have the same."""
    lines = (find_tuning(run, row.nfe, row.group.sampling.diffusion_depth) for run in row.group.runs)
    known = (line for line in lines if line is not None and Sampling.of_choice(line) in row.samplings)
    return tuple({repr(line): line for line in known}.values())


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
    return replace(measured, points=points) if points else None


def _value(metric: str, point: Point) -> float:
    return float(point["metrics"][metric])


def _groups(chosen: Sequence[tuple[Curve, Sequence[RunCurve]]]) -> list[Group]:
    """Runs of one label and one way of sampling together; the one that most runs have needs no name."""
    fixed = [[measured.sampling for measured in curves if not measured.is_tuned] for _, curves in chosen]
    samplings = {sampling.curve_key: sampling for run in fixed for sampling in run}
    by_run = (dict.fromkeys(sampling.curve_key for sampling in run) for run in fixed)
    main = samplings[Counter(itertools.chain.from_iterable(by_run)).most_common(1)[0][0]]
    members: dict[tuple[str, str], list[tuple[Curve, RunCurve]]] = {}
    for curve, curves in chosen:
        for measured in curves:
            sampling = measured.sampling
            main_at_depth = replace(main, diffusion_depth=sampling.diffusion_depth)  # the depth is part of the design
            difference = TUNED if measured.is_tuned else sampling.difference(main_at_depth)
            label = " · ".join(filter(None, [curve.label, sampling.texts[DEPTH]]))
            members.setdefault((label, difference), []).append((curve, measured))
    groups = []
    for (label, difference), entries in members.items():
        runs = _alike(entries)
        depth = runs[0][1].sampling.diffusion_depth
        groups.append(
            Group(
                label,
                difference,
                {**runs[0][0].axes, **({} if depth is None else {f"model.{DEPTH}": depth})},
                runs[0][1].sampling,
                tuple(measured for _, measured in runs),
                tuple(curve.run for curve, _ in runs),
                tuple(curve.seed for curve, _ in runs),
            )
        )
    return sorted(groups, key=lambda group: (natural(group.base), natural(group.difference)))


def _alike(entries: Sequence[tuple[Curve, RunCurve]]) -> list[tuple[Curve, RunCurve]]:
    """One curve for each run, all of the same step and number of samples. Other runs are left out with a warning.

    Of several steps it is the newest, then the number of samples that most runs have, then the greatest.
    """
    by_conditions: dict[tuple[int, int], dict[Path, tuple[Curve, RunCurve]]] = {}
    for curve, measured in entries:
        by_conditions.setdefault((measured.step, measured.num_samples), {}).setdefault(curve.run, (curve, measured))
    (step, samples), kept = max(by_conditions.items(), key=lambda item: (item[0][0], len(item[1]), item[0][1]))
    for run in dict.fromkeys(curve.run for curve, _ in entries if curve.run not in kept):
        _log.warning("%s: left out: not evaluated at step %d with %d samples, as others of its label", run, step, samples)
    return list(kept.values())


Kind = Literal["nfe", "steps"]


@dataclass(frozen=True, order=True)
class Column:
    """Rows of one budget, or of one number of steps."""

    kind: Kind
    value: int

    def __str__(self) -> str:
        return f"NFE {self.value}" if self.kind == "nfe" else f"{self.value} step{'' if self.value == 1 else 's'}"

    def holds(self, row: Row) -> bool:
        """Whether a row stands in it."""
        return self.value == (row.nfe if self.kind == "nfe" else row.steps)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """All columns, rising."""
    kind = _kind(rows)
    return [Column(kind, value) for value in sorted(set().union(*_by_label(rows, kind)))]


def common_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that all labels have, rising."""
    kind = _kind(rows)
    return [Column(kind, value) for value in sorted(_shared(_by_label(rows, kind)))]


def _kind(rows: Sequence[Row]) -> Kind:
    """Where labels meet: in steps if they share more of them than budgets, as those given equal steps do at any depth."""
    budgets, steps = _by_label(rows, "nfe"), _by_label(rows, "steps")
    unique = all(len(each) == len(set(each)) for each in steps)
    return "steps" if unique and len(_shared(steps)) > len(_shared(budgets)) else "nfe"


def _shared(values: Sequence[Sequence[int]]) -> set[int]:
    """What all labels have."""
    return set.intersection(*map(set, values)) if values else set()


def _by_label(rows: Sequence[Row], kind: Kind) -> list[list[int]]:
    """The budgets, or the steps, of each label."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row.nfe if kind == "nfe" else row.steps)
    return list(found.values())
