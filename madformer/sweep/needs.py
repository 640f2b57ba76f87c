"""What a cell still needs, read from its run's folder alone: a run made by hand counts, a run that was deleted does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from madformer.checkpoints import checkpoint_path
from madformer.config import load_experiment, require_same_weights
from madformer.config.frozen import config_path
from madformer.sweep.spec import Cell


@dataclass(frozen=True)
class Needs:
    """The work that is left."""

    training: bool
    """Whether the last checkpoint is missing."""
    budgets: tuple[int, ...]
    """Budgets that were not evaluated."""

    def __bool__(self) -> bool:
        return self.training or bool(self.budgets)

    def __str__(self) -> str:
        if self.training:
            return "to train"
        return f"to evaluate at {', '.join(map(str, self.budgets))}" if self.budgets else "done"


def cell_needs(cell: Cell) -> Needs:
    """What is left to do of a cell.

    Raises:
        InputError: its folder holds a run of another experiment; the message names the first field that differs.
    """
    path = config_path(cell.run)
    if not path.is_file():
        return Needs(training=True, budgets=cell.budgets)
    require_same_weights(load_experiment(path), cell.config, str(cell.run))
    if not checkpoint_path(cell.run, cell.max_steps).is_file():
        return Needs(training=True, budgets=cell.budgets)
    there = cell_points(cell)
    return Needs(training=False, budgets=tuple(budget for budget in cell.budgets if budget not in there))


def cell_points(cell: Cell) -> dict[int, dict[str, Any]]:
    """The evaluations of a trained cell: budget -> the newest point of it."""
    from madformer.evaluation.record import read_points

    evaluation = cell.config.evaluation
    wanted = {
        "step": cell.max_steps,
        "weights": "ema",
        "sampler": evaluation.sampler,
        "guidance": evaluation.guidance,
        "num_samples": evaluation.num_samples,
        "seed": evaluation.seed,
        "config_hash": cell.config_hash,
    }
    networks = list(evaluation.feature_networks)
    points = (
        point
        for point in read_points(cell.run)
        if all(point.get(key) == value for key, value in wanted.items())
        and [network["name"] for network in point["feature_networks"]] == networks
    )
    return {point["nfe"]: point for point in points if point["nfe"] in cell.budgets}


def largest_budget_metric(cell: Cell) -> tuple[str, float] | None:
    """The first metric, name and value, at the largest budget; None: not evaluated there yet."""
    point = cell_points(cell).get(max(cell.budgets))
    return next(iter(point["metrics"].items()), None) if point is not None else None
