"""Tables and numbers for the terminal, and for logs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass
class Grid:
    """A table: for a terminal, or as lines of a log, which are not cut and take no time however many there are."""

    title: str
    headings: Sequence[str]
    left: frozenset[str]
    """Headings of columns that are not numbers."""
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=Text(self.title), title_justify="left")
        for heading in self.headings:
            table.add_column(heading, justify="left" if heading in self.left else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def plain(self) -> str:
        """For a log."""
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            columns = zip(self.headings, cells, widths, strict=True)
            aligned = (cell.ljust(width) if name in self.left else cell.rjust(width) for name, cell, width in columns)
            return f"│ {' │ '.join(aligned)} │"

        rule = "├─" + "─┼─".join("─" * width for width in widths) + "─┤"
        return "\n".join([self.title, line(self.headings), rule, *map(line, self.rows)])


def show(grid: Grid, lines: Sequence[str]) -> None:
    """Print a table, and lines below it."""
    if sys.stdout.isatty():
        Console().print(grid.rich())
    else:
        print(grid.plain())
    print("\n".join(lines))


def with_unit(number: float) -> str:
    """Three digits and a unit: 1.23 T."""
    for unit in ("", " k", " M", " G", " T", " P", " E", " Z"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} Y"


def duration(seconds: float) -> str:
    """Days, hours, minutes, seconds."""
    return str(timedelta(seconds=round(seconds)))
