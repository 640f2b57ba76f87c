"""How a report writes: numbers, spreads, tables, and the order of names."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from madformer.report.estimate import MARKS, Estimate

NOTHING = "–"
"""In place of what was not measured."""

_HIGHER = ("inception_score", "precision", "recall", "density", "coverage")


def higher_is_better(metric: str) -> bool:
    """Whether a metric is to be maximised, of whatever network it is (`precision`, `precision_digits`)."""
    return any(metric == name or metric.startswith(f"{name}_") for name in _HIGHER)


def arrow(metric: str) -> str:
    """A metric's name, and which way is better."""
    return f"{metric} {'↑' if higher_is_better(metric) else '↓'}"


def natural(text: str) -> list[str | float]:
    """A key that sorts d2 before d16: words and numbers by turns."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def number(value: float) -> str:
    """Three significant digits, more where there are more before the point."""
    if abs(value) < 1:
        return f"{value:#.3g}"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, 3 - whole)}f}"


def show(estimated: Estimate | None) -> str:
    """The mean, and its spread to as many digits, such as `17.8 ± 0.4`."""
    if estimated is None:
        return NOTHING
    if estimated.over is None or estimated.spread is None:
        return number(estimated.mean)
    digits = min(_decimals(estimated.mean), _decimals(estimated.spread or estimated.mean))
    spread = f"{estimated.spread:,.{digits}f}"
    if float(spread.replace(",", "")) == 0 and estimated.spread > 0:
        spread = f"{estimated.spread:.1g}"
    return f"{number(estimated.mean)} ± {spread}{MARKS[estimated.over]}"


def distinct(values: Iterable[Any]) -> str:
    """Different values with `or` between them, of many numbers the least and the greatest."""
    found = sorted(set(values), key=lambda value: natural(str(value)))
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in found]
    if len(found) > 3 and isinstance(found[0], int):
        return f"{texts[0]} – {texts[-1]}"
    return " or ".join(texts)


def counted(counts: Iterable[int], noun: str) -> str:
    """Such as `1 or 2 seeds`."""
    text = distinct(counts)
    return f"{text} {noun}" + ("" if text == "1" else "s")


def table(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown: the first line heads it, the first column to the left and the others to the right."""
    ruler = ["---", *("---:" for _ in lines[0][1:])]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ruler, *cells[1:]))


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _decimals(value: float) -> int:
    """Digits after the point that `number` shows."""
    text = f"{value:.2e}"
    return max(0, 2 - int(text[text.index("e") + 1 :]))
