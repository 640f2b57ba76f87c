"""Which runs a report is on, and what they are called in it."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madformer.config import ExperimentConfig, InputError, load_run, trained_fields
from madformer.evaluation.record import read_points
from madformer.sweep.cells import Cell
from madformer.sweep.spec import Sweep

_log = logging.getLogger(__name__)


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
        members.setdefault(_design(run.resolve(), config), []).append((run, config.seed))
    designs = Counter(path for path, _ in members)
    named: list[tuple[Path, list[tuple[Path, int]]]] = []
    for (path, _), seeds in members.items():
        own = {run.resolve() for run, _ in seeds}
        taken = designs[path] > 1 or path in {run.resolve() for run in runs} - own
        together = len({seed for _, seed in seeds}) == len(seeds) > 1 and not taken
        named += [(path, seeds)] if together else [(run.resolve(), [(run, seed)]) for run, seed in seeds]
    labels = _shortest([path for path, _ in named])
    return [Curve(label, run, {}, seed) for label, (_, seeds) in zip(labels, named, strict=True) for run, seed in seeds]


def curves_of_sweep(sweep: Sweep) -> list[Curve]:
    """All cells that were evaluated as the sweep has it, at its own budgets, with a word on the others.

    Raises:
        InputError: none is evaluated; the message says how to do that.
    """
    if sweep.search is None:
        cells = sweep.cells()
        budgets = {cell.run: frozenset(cell.budgets) for cell in cells}
    else:
        from madformer.sweep.search import tried_cells

        cells = list({cell.run: cell for cell in tried_cells(sweep)}.values())  # of several budgets, one for each
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
            _without_seed(cell.name, cell.seed) or sweep.name,
            cell.run,
            cell.axes,
            cell.seed,
            budgets[cell.run],
            cell.config.evaluation.num_samples,
        )
        for cell in measured
    ]


def _is_measured(cell: Cell, budgets: frozenset[int]) -> bool:
    samples = cell.config.evaluation.num_samples
    return any(point["nfe"] in budgets and point["num_samples"] == samples for point in read_points(cell.run))


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
