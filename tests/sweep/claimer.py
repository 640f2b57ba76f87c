"""A worker that claims cells and does nothing for them. Imports no torch: tests start many."""

import os
import sys

from madformer.config import write_config
from madformer.evaluation.record import append_point
from madformer.runs.checkpoints import checkpoint_path
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.queue import Queue
from madformer.sweep.study import Storage
from tests.sweep.trial import INTACT, point


def open_queue(sweep):
    return Queue(sweep, Storage(sweep), sweep_cells(sweep))


def train(cell):
    write_config(cell.config, cell.run)
    checkpoint_path(cell.run, cell.max_steps).parent.mkdir(exist_ok=True)
    checkpoint_path(cell.run, cell.max_steps).write_bytes(INTACT)


def finish(cell):
    train(cell)
    for nfe in cell.budgets:
        append_point(cell.run, point(cell.config, nfe))


def work(overrides, repetitions, barrier, results):
    """In each repetition, claim until nothing is left of a new sweep."""
    for repetition in range(repetitions):
        sweep, claimed = load_sweep("small.yaml", [*overrides, f"name=r{repetition}", f"output_dir=runs{repetition}"]), []
        barrier.wait()
        with open_queue(sweep) as queue:
            while (claim := queue.claim()).trials or claim.may_have_more:
                for trial in claim.trials:
                    claimed.append(trial.cell.name)
                    finish(trial.cell)
                    queue.complete(trial)
        results.put((repetition, claimed))


if __name__ == "__main__":
    open_queue(load_sweep(sys.argv[1])).__enter__().claim()
    os._exit(1)  # as if it were killed
