"""What stands above each other in a table: budgets, or denoising steps where those are what the labels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from madformer.report.rows import Row

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
