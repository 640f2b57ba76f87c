"""`madformer sweep plan`: what a sweep costs, or several together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean

from madformer.errors import ConfigError, InputError
from madformer.runs.checkpoints import checkpoint_step, list_checkpoints
from madformer.sweep.cells import Cell, sweep_cells
from madformer.sweep.needs import (
    A100,
    CPU_CORE,
    Device,
    Estimates,
    Needs,
    cell_needs,
    device_count,
    evaluation_flops,
    parameter_count,
    sampling,
    training_flops,
)
from madformer.sweep.spec import Search, Sweep
from madformer.sweep.status import TextTable, duration, show, with_unit

_DRAWN = 64
"""Trials of a search that are drawn to see what one costs."""


def print_plan(sweep: Sweep, tflops: float | None = None, mfu: float | None = None) -> None:
    """Print every cell with its cost and its state, and what all of them cost.

    Args:
        tflops: peak of a device, in TFLOP/s; None: an A100's, or a CPU core's.
        mfu: part of it that is reached; None: what is usual.

    Raises:
        InputError: a cell's folder holds a run of another experiment.
    """
    device = assumed_device(sweep, tflops, mfu)
    if sweep.search is None:
        cells = sweep_cells(sweep)
        needs, estimates = [cell_needs(cell) for cell in cells], Estimates(cells, device)
        totals = _totals(sweep, cells, needs, estimates, device)
        show(plan_grid(sweep, cells, needs, estimates), [*totals, *skipped_budgets(cells)])
    else:
        print("\n".join(search_lines(sweep, sweep.search, device)))


def assumed_device(sweep: Sweep, tflops: float | None, mfu: float | None) -> Device:
    """What is assumed of a sweep's devices where nothing was measured, with what the user says of it."""
    device = CPU_CORE if sweep.accelerator == "cpu" else A100
    if tflops is None and mfu is None:
        return device
    return Device(tflops or device.peak_tflops, mfu or device.mfu, device.name if tflops is None else "the device named")


def plan_grid(sweep: Sweep, cells: Sequence[Cell], needs: Sequence[Needs], estimates: Estimates) -> TextTable:
    """Every cell with its size, its FLOPs in training and per sampled image, its time, and what is left of it to do."""
    budgets = sorted({nfe for cell in cells for nfe in cell.budgets})
    headings = ["cell", "parameters", "training FLOPs", *(f"NFE {nfe}" for nfe in budgets), hours_unit(sweep), "state"]
    grid = TextTable(f"{sweep.name}: {sweep.experiment}", headings, frozenset(("cell", "state")))
    for cell, left in zip(cells, needs, strict=True):
        costs = {nfe: f"{with_unit(flops)} ({steps} steps)" for nfe, (flops, steps) in sampling(cell).items()}
        row = [cell.name, with_unit(parameter_count(cell.config.model)), with_unit(training_flops(cell.config))]
        row += [costs.get(nfe, "skipped" if nfe in cell.skipped else "") for nfe in budgets]
        row += [f"{estimates.whole(cell).total / 3600:.3g}"]
        grid.rows.append([*row, "to train" if left.training else "to evaluate" if left.budgets else "done"])
    return grid


def skipped_budgets(cells: Sequence[Cell]) -> list[str]:
    """What is not evaluated, and why: a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        for budget, why in cell.skipped.items():
            reasons.setdefault(f"NFE {budget}: {why}", []).append(cell.name)
    return [f"skipped, {reason}: {_few(names)}" for reason, names in reasons.items()]


def search_lines(sweep: Sweep, search: Search, device: Device) -> list[str]:
    """What a search chooses from, and what its trials cost, of some drawn at random."""
    from madformer.sweep.search import sample_cells, tried_cells

    cells = sample_cells(sweep, _DRAWN)
    if not cells:
        raise ConfigError(f"search.space: of {_DRAWN} trials drawn at random none is legal")
    estimates = Estimates([*tried_cells(sweep), *cells], device)
    times = [estimates.whole(cell) for cell in cells]
    hours = [time.total / 3600 for time in times]
    longest = max(time.total / device_count(cell) for time, cell in zip(times, cells, strict=True))
    lines = [f"{sweep.name}: {sweep.experiment}, a search of {search.trials} trials by {search.sampler}"]
    lines += [f"  {key}: {choices}" for key, choices in search.space.items()]
    lines.append(
        f"  objectives {', '.join(search.objectives)} at NFE {', '.join(map(str, search.nfe))}, pruner {search.pruner}"
    )
    lines.append(
        f"  of {_DRAWN} trials drawn at random {len(cells)} are legal; one takes {fmean(hours):.3g} {hours_unit(sweep)}"
    )
    lines.append(
        f"  all {search.trials}: {fmean(hours) * search.trials:.3g} {hours_unit(sweep)}, the longest trial {duration(longest)}"
    )
    return [*lines, f"  {basis(times[0].measured, device)}"]


def _totals(sweep: Sweep, cells: Sequence[Cell], needs: Sequence[Needs], estimates: Estimates, device: Device) -> list[str]:
    """All FLOPs and hours, those that are left, and the cells by state."""
    training = sum(training_flops(cell.config) for cell in cells)
    evaluation = sum(sum(evaluation_flops(cell).values()) for cell in cells)
    whole = [estimates.whole(cell) for cell in cells]
    left = sum(estimates.left(cell, need, _newest_step(cell)).total for cell, need in zip(cells, needs, strict=True))
    longest = max(time.total / device_count(cell) for time, cell in zip(whole, cells, strict=True))
    counts = {"to train": 0, "to evaluate": 0, "done": 0}
    for need in needs:
        counts["to train" if need.training else "to evaluate" if need.budgets else "done"] += 1
    hours, unit = sum(time.total for time in whole) / 3600, hours_unit(sweep)
    return [
        f"{len(cells)} cells: {', '.join(f'{count} {state}' for state, count in counts.items())}. "
        f"Training {with_unit(training)}FLOPs, evaluation {with_unit(evaluation)}FLOPs. Under NFE: FLOPs per image.",
        f"{hours:.3g} {unit}, of which {left / 3600:.3g} are left; the longest trial takes {duration(longest)} "
        f"on {device_count(cells[0])} {'process' if sweep.accelerator == 'cpu' else 'GPU'}(s).",
        basis(all(time.measured for time in whole), device),
    ]


def _newest_step(cell: Cell) -> int:
    return max(map(checkpoint_step, list_checkpoints(cell.run)), default=0)


def basis(measured: bool, device: Device) -> str:
    """A sentence on what times rest on."""
    if measured:
        return "Times by measured rates: each run's own, or those of the others."
    return f"Times assume {device.peak_tflops:g} TFLOP/s ({device.name}) at an MFU of {device.mfu:.0%}: --tflops, --mfu."


def hours_unit(sweep: Sweep) -> str:
    """What its times are counted in."""
    return "CPU-hours" if sweep.accelerator == "cpu" else "GPU-hours"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    grid = TextTable(f"{len(sweeps)} sweeps", headings, frozenset(["sweep"]))
    for sweep in sweeps:
        grid.rows.append([sweep.name, *suite.add(sweep_cells(sweep))])
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
