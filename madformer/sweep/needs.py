"""What a cell still needs: the training, and the points that its run's record lacks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from madformer.config import frozen_hash, load_experiment, require_same_weights
from madformer.config.identity import config_path
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from madformer.sweep.cells import Cell


@dataclass(frozen=True)
class Needs:
    """The work that is left."""

    training: bool
    """Whether the last checkpoint is missing."""
    budgets: tuple[int, ...]
    """Budgets that were not evaluated in all the ways asked for."""
    points: int
    """Points of the record that are missing."""

    def __bool__(self) -> bool:
        return self.training or bool(self.budgets)

    def __str__(self) -> str:
        if self.training:
            return "to train"
        return f"to evaluate at {', '.join(map(str, self.budgets))}" if self.budgets else "done"


@dataclass(frozen=True)
class Way:
    """One way of sampling a checkpoint."""

    step: int
    sampler: str
    guidance: float
    seed: int


def cell_needs(cell: Cell) -> Needs:
    """What is left to do of a cell.

    Raises:
        InputError: its folder holds a run of another experiment; the message names the first field that differs.
    """
    if not is_trained(cell):
        return Needs(True, cell.budgets, len(cell.budgets) * cell.inference.last * _ways_each(cell))
    ways, there = _ways(cell), cell_points(cell)
    missing = {budget: sum((way, budget) not in there for way in ways) for budget in cell.budgets}
    budgets = tuple(budget for budget, count in missing.items() if count)
    return Needs(False, budgets, sum(missing.values()))


def is_trained(cell: Cell) -> bool:
    """Whether its last checkpoint is there.

    Raises:
        InputError: its folder holds a run of another experiment.
    """
    before = frozen_hash(cell.run)
    if before is None:
        return False
    if before != cell.config_hash:  # also where a version of old lacked a field, with the same weights
        require_same_weights(load_experiment(config_path(cell.run)), cell.config, str(cell.run))
    return checkpoint_path(cell.run, cell.max_steps).is_file()


def cell_points(cell: Cell) -> dict[tuple[Way, int], dict[str, Any]]:
    """The evaluations of a trained cell that were asked for: way and budget -> the newest point."""
    from madformer.evaluation.record import read_points

    evaluation = cell.config.evaluation
    wanted = {"weights": "ema", "num_samples": evaluation.num_samples, "config_hash": cell.config_hash}
    networks, ways = list(evaluation.feature_networks), set(_ways(cell))
    found = {}
    for point in read_points(cell.run):
        way = Way(point["step"], point["sampler"], point["guidance"], point["seed"])
        judged_by = [network["name"] for network in point["feature_networks"]]
        asked_for = way in ways and point["nfe"] in cell.budgets and judged_by == networks
        if asked_for and all(point.get(key) == value for key, value in wanted.items()):
            found[way, point["nfe"]] = point
    return found


def main_metrics(cell: Cell) -> dict[int, Mapping[str, float]]:
    """Budget -> metrics, of the first sampler and guidance, means over checkpoints and seeds; complete budgets alone."""
    there, ways = cell_points(cell), _ways(cell)
    first = [way for way in ways if (way.sampler, way.guidance) == (ways[0].sampler, ways[0].guidance)]
    found: dict[int, Mapping[str, float]] = {}
    for budget in cell.budgets:
        points = [there[way, budget]["metrics"] for way in first if (way, budget) in there]
        if len(points) == len(first):
            found[budget] = {name: fmean(point[name] for point in points) for name in points[0]}
    return found


def main_points(cell: Cell, budget: int) -> list[dict[str, Any]]:
    """The points of the first sampler and guidance at one budget."""
    ways = _ways(cell)
    return [
        point
        for (way, nfe), point in cell_points(cell).items()
        if nfe == budget and (way.sampler, way.guidance) == (ways[0].sampler, ways[0].guidance)
    ]


def cell_progress(cell: Cell) -> list[int]:
    """How far a cell is: newest checkpoint, recorded points, parts of an evaluation. It rises with all work that is kept."""
    checkpoints = list_checkpoints(cell.run)
    parts = sum(1 for _ in (cell.run / "features").glob("*/*"))
    points = len(cell_points(cell)) if checkpoints and is_trained(cell) else 0
    return [checkpoint_step(checkpoints[-1]) if checkpoints else 0, points, parts]


def _ways(cell: Cell) -> list[Way]:
    """All ways that a trained cell is to be sampled in."""
    if cell.inference.checkpoints == "newest":
        steps = [cell.max_steps]
    else:
        steps = [checkpoint_step(path) for path in list_checkpoints(cell.run)[-cell.inference.last :]]
    combinations = itertools.product(cell.samplers, cell.guidances, cell.sampling_seeds, steps)
    return [Way(step, sampler, float(guidance), seed) for sampler, guidance, seed, step in combinations]


def _ways_each(cell: Cell) -> int:
    return len(cell.samplers) * len(cell.guidances) * len(cell.sampling_seeds)
