"""What nothing cheaper beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from madformer.report.rows import Row


def pareto_front(rows: Sequence[Row], cost: Callable[[Row], float | None], loss: Callable[[Row], float]) -> list[Row]:
    """Rows that are better than every row that costs no more, the cheapest first; means alone count, not their intervals.

    Args:
        rows: any; those without a cost are left out.
        cost: what a row costs.
        loss: how bad it is, lower is better.
    """
    priced = sorted(((spent, loss(row), row) for row in rows if (spent := cost(row)) is not None), key=lambda entry: entry[:2])
    front: list[Row] = []
    for _, lost, row in priced:
        if not front or lost < loss(front[-1]):
            front.append(row)
    return front
