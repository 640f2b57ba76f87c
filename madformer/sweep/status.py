"""What a sweep would cost, and how far it is: tables for the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from madformer.checkpoints import checkpoint_step, list_checkpoints
from madformer.config import wanted_outputs
from madformer.model.cost import parameters, sampling_flops, steps_for_nfe, training_flops
from madformer.sweep.needs import Needs, cell_needs, cell_points, largest_budget_metric
from madformer.sweep.spec import Cell, Sweep

_REFRESH_SECONDS = 2.0
_LOG_WIDTH = 1000
"""Columns where there is no terminal: a log is not to be cut."""


def print_plan(sweep: Sweep) -> None:
    """Print every cell with its cost and its state.

    Raises:
        InputError: a cell's folder holds a run of another experiment.
    """
    _console().print(plan_table(sweep))


def print_status(sweep: Sweep) -> None:
    """Print how far every cell is: live on a terminal, until all is done or Ctrl-C; once elsewhere.

    Raises:
        InputError: a cell's folder holds a run of another experiment.
    """
    if sys.stdout.isatty():
        watch(sweep)
    else:
        _console().print(status_table(sweep))


def watch(sweep: Sweep) -> None:
    """Show `status_table` live until all cells are done, or Ctrl-C."""
    try:
        with Live(status_table(sweep), console=_console(), auto_refresh=False) as live:
            while any(cell_needs(cell) for cell in sweep.cells()):
                time.sleep(_REFRESH_SECONDS)
                live.update(status_table(sweep), refresh=True)
    except KeyboardInterrupt:
        return


def plan_table(sweep: Sweep) -> Table:
    """Every cell with its size, its FLOPs in training and per sampled image, and what is left of it to do."""
    cells = sweep.cells()
    needs = [cell_needs(cell) for cell in cells]
    table = _table(f"{sweep.name}: {sweep.experiment}")
    for heading in ("cell", "parameters", "training FLOPs", *(f"NFE {nfe}" for nfe in cells[0].budgets), "state"):
        table.add_column(heading, justify="left" if heading in ("cell", "state") else "right")
    for cell, left in zip(cells, needs, strict=True):
        count = with_unit(sum(parameters(cell.config.model).values()))
        sampling = (f"{with_unit(flops)} ({steps} steps)" for flops, steps in _sampling(cell).values())
        table.add_row(cell.name, count, with_unit(_training(cell)), *sampling, _plan_state(left))
    table.caption = _totals(cells, needs)
    return table


def status_table(sweep: Sweep) -> Table:
    """Every cell with its state, how far its training and its evaluations are, and why it failed."""
    from madformer.sweep.study import LastTrial, last_trials

    table, last = _table(sweep.name), last_trials(sweep.folder)
    for heading in ("cell", "state", "step", "budgets", "metric", "reason"):
        table.add_column(heading, justify="right" if heading in ("step", "budgets") else "left")
    for cell in sweep.cells():
        trial = last.get(cell.config_hash, LastTrial("waiting", ""))
        state = "done" if not cell_needs(cell) else "waiting" if trial.state == "complete" else trial.state
        reason = trial.reason.splitlines()[-1] if state == "failed" and trial.reason else ""
        table.add_row(
            cell.name, state, _step(cell), f"{len(cell_points(cell))}/{len(cell.budgets)}", _metric(cell), Text(reason)
        )
    return table


def with_unit(number: float) -> str:
    """Three digits and a unit: 1.23 T."""
    for unit in ("", " k", " M", " G", " T", " P", " E", " Z"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} Y"


def _training(cell: Cell) -> int:
    """FLOPs of the whole training."""
    config = cell.config
    per_image = training_flops(config.model, wanted_outputs(config.loss), config.diffusion.draws_per_image).total
    return per_image * config.data.batch_size * cell.max_steps


def _sampling(cell: Cell) -> dict[int, tuple[int, int]]:
    """Budget -> FLOPs per image, denoising steps."""
    flops, model = sampling_flops(cell.config.model), cell.config.model
    steps = {budget: steps_for_nfe(model, budget) for budget in cell.budgets}
    return {budget: (flops.total(count), count) for budget, count in steps.items()}


def _totals(cells: Sequence[Cell], needs: Sequence[Needs]) -> str:
    """All FLOPs, those that are left, and the cells by state."""
    training = evaluating = left = 0
    for cell, need in zip(cells, needs, strict=True):
        samples = cell.config.evaluation.num_samples
        sampling = {budget: samples * flops for budget, (flops, _) in _sampling(cell).items()}
        training += _training(cell)
        evaluating += sum(sampling.values())
        left += need.training * _training(cell) + sum(sampling[budget] for budget in need.budgets)
    states = [_plan_state(need) for need in needs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("to train", "to evaluate", "done"))
    samples = cells[0].config.evaluation.num_samples
    flops = f"training {with_unit(training)}FLOPs, evaluation {with_unit(evaluating)}FLOPs ({samples} images at each budget)"
    return f"{len(cells)} cells: {counts}. {flops}, left {with_unit(left)}FLOPs. Under NFE: FLOPs per image."


def _plan_state(needs: Needs) -> str:
    return "to train" if needs.training else "to evaluate" if needs.budgets else "done"


def _step(cell: Cell) -> str:
    checkpoints = list_checkpoints(cell.run)
    return f"{checkpoint_step(checkpoints[-1]) if checkpoints else 0}/{cell.max_steps}"


def _metric(cell: Cell) -> str:
    metric = largest_budget_metric(cell)
    return f"{metric[0]} {metric[1]:.4g} at NFE {max(cell.budgets)}" if metric is not None else ""


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left")


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)
