"""What stands above each other in a table: budgets, or denoising steps where those are what the labels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from madformer.report.rows import Row


@dataclass(frozen=True, order=True)
class Column:
    """Rows of one budget, or of one number of steps."""

    kind: Literal["nfe", "steps"]
    value: int

    def __str__(self) -> str:
        return f"NFE {self.value}" if self.kind == "nfe" else f"{self.value} step{'' if self.value == 1 else 's'}"

    def holds(self, row: Row) -> bool:
        """Whether a row stands in it."""
        return self.value == (row.nfe if self.kind == "nfe" else row.steps)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """All columns, rising. Labels that were all given the same steps, which are other budgets for each depth, meet in steps."""
    budgets, steps = (_by_label(rows, kind) for kind in ("nfe", "steps"))
    meet = len(set(map(frozenset, budgets))) > 1 and len(set(map(frozenset, steps))) == 1
    unique = all(len(each) == len(set(each)) for each in steps)
    kind: Literal["nfe", "steps"] = "steps" if meet and unique else "nfe"
    return [Column(kind, value) for value in sorted(set().union(*(steps if kind == "steps" else budgets)))]


def common_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that all labels have, rising: budgets, if there are such, else steps."""
    for kind in ("nfe", "steps"):
        values = [set(each) for each in _by_label(rows, kind)]
        if values and (shared := set.intersection(*values)):
            return [Column(kind, value) for value in sorted(shared)]
    return []


def _by_label(rows: Sequence[Row], kind: Literal["nfe", "steps"]) -> list[list[int]]:
    """The budgets, or the steps, of each label."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row.nfe if kind == "nfe" else row.steps)
    return list(found.values())
