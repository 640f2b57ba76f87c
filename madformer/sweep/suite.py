"""`madformer sweep plan` of several sweeps: what they cost together, whatever they share counted once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from madformer.config import InputError
from madformer.sweep.cells import Cell
from madformer.sweep.estimate import Device, Estimates, parameter_count, sampling, training_flops
from madformer.sweep.plan import assumed_device, basis, hours_unit
from madformer.sweep.spec import Sweep
from madformer.sweep.tables import Grid, show, with_unit


def print_suite(sweeps: Sequence[Sweep], tflops: float | None = None, mfu: float | None = None) -> None:
    """Print a line for each sweep with what it adds to those above it, and the sum.

    Args:
        sweeps: grids; a model is the same if its configuration's hash is.
        tflops: as `print_plan`.
        mfu: as `print_plan`.

    Raises:
        InputError: one is a search, whose trials nobody knows before, or they are for different kinds of devices.
    """
    for sweep in sweeps:
        if sweep.search is not None:
            raise InputError(f"{sweep.name} is a search, whose models are not known before: plan it alone")
    if len({hours_unit(sweep) for sweep in sweeps}) > 1:
        raise InputError("some of the sweeps are for CPUs and some for GPUs: plan them apart")
    device = assumed_device(sweeps[0], tflops, mfu)
    suite = _Suite(device)
    headings = ["sweep", "cells", "new models", "parameters", "training FLOPs", "evaluation FLOPs", hours_unit(sweeps[0])]
    grid = Grid(f"{len(sweeps)} sweeps", headings, frozenset(["sweep"]))
    for sweep in sweeps:
        grid.rows.append([sweep.name, *suite.add(sweep.cells())])
    grid.rows.append(["together", *suite.total()])
    show(grid, [f"What a sweep shares with one above it is counted there. {basis(suite.measured, device)}"])


class _Suite:
    """Models and points that were counted already."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._models: dict[str, Cell] = {}
        self._points: set[tuple[object, ...]] = set()
        self._cells, self._training, self._evaluation, self._hours = 0, 0.0, 0.0, 0.0
        self.measured = True
        """Whether all times rest on measured rates."""

    def add(self, cells: Sequence[Cell]) -> list[str]:
        """A sweep's columns."""
        estimates, new = Estimates(cells, self._device), []
        training = evaluation = seconds = 0.0
        for cell in cells:
            time, costs = estimates.whole(cell), _points(cell)
            self.measured &= time.measured
            added = sum(flops for point, flops in costs.items() if point not in self._points)
            self._points |= costs.keys()
            evaluation += added
            seconds += time.evaluation * added / (sum(costs.values()) or 1.0)
            if cell.config_hash not in self._models:
                self._models[cell.config_hash] = cell
                new.append(cell)
                training += training_flops(cell.config)
                seconds += time.training
        self._cells, self._hours = self._cells + len(cells), self._hours + seconds / 3600
        self._training, self._evaluation = self._training + training, self._evaluation + evaluation
        return _columns(len(cells), new, training, evaluation, seconds / 3600)

    def total(self) -> list[str]:
        """The columns of all."""
        return _columns(self._cells, list(self._models.values()), self._training, self._evaluation, self._hours)


def _points(cell: Cell) -> dict[tuple[object, ...], float]:
    """Every point of a cell, by what it is known by in the run's record (`needs.cell_points`) -> its FLOPs."""
    evaluation = cell.config.evaluation
    measured = (cell.config_hash, evaluation.num_samples, evaluation.feature_networks)
    # Checkpoints count from the newest: which steps they are of is not known before there is a run.
    ways = list(itertools.product(cell.samplers, cell.sampling_seeds, range(cell.inference.last)))
    return {
        (*measured, budget, guidance, *way): flops * evaluation.num_samples
        for guidance in cell.guidances
        for budget, (flops, _) in sampling(cell, guidance).items()
        for way in ways
    }


def _columns(cells: int, new: Sequence[Cell], training: float, evaluation: float, hours: float) -> list[str]:
    sizes = sorted({parameter_count(cell.config.model) for cell in new})
    shown = " – ".join(dict.fromkeys(with_unit(size) for size in (sizes[0], sizes[-1]))) if sizes else ""
    time = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    return [str(cells), str(len(new)), shown, with_unit(training), with_unit(evaluation), time]
