"""Formatting of a report: numbers, intervals, tables, and the costs that it can show."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean
from typing import Any

from madformer.errors import InputError, printable
from madformer.evaluation.measurement import Point, Sampling, differing, higher_is_better
from madformer.report.statistics import MARKS, Estimate

NOTHING = "–"
"""In place of what was not measured."""


def arrow(metric: str) -> str:
    """A metric's name, and which way is better, if one is."""
    higher = higher_is_better(metric)
    return metric if higher is None else f"{metric} {'↑' if higher else '↓'}"


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
    """The mean, and its spread to as many digits, such as `17.8 ± 0.4`. Of two seeds both values."""
    if estimated is None:
        return NOTHING
    mark = "" if estimated.over is None else MARKS[estimated.over]
    if estimated.is_pair:
        return " and ".join(map(number, estimated.values)) + mark
    return with_spread(estimated.mean, estimated.spread) + mark


def with_spread(mean: float, spread: float | None) -> str:
    """Both to as many digits, such as `17.8 ± 0.4`; the mean alone without a spread."""
    if spread is None:
        return number(mean)
    digits = min(_decimals(mean), _decimals(spread or mean))
    text = f"{spread:,.{digits}f}"
    if float(text.replace(",", "")) == 0 and spread > 0:
        text = f"{spread:.1g}"
    return f"{number(mean)} ± {text}"


def chance(probability: float) -> str:
    """A probability that resamples give: to two digits, and never 1."""
    return f"{probability:.2f}" if probability < 0.995 else "> 0.99"


def p_value(p: float) -> str:
    """A p-value to two digits."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def in_words(sampling: Sampling) -> str:
    """Sampler, spacing, and what else is not the default, such as `unipc, power:1.5, guidance 2`. Depths are in labels."""
    depth = sampling.diffusion_depth
    plain = Sampling(sampling.nfe, sampling.steps, sampling.sampler, sampling.spacing, diffusion_depth=depth)
    return ", ".join(filter(None, [sampling.sampler, sampling.spacing, sampling.difference(plain)]))


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


def incomparable(conditions: Sequence[Mapping[str, Any]], noun: str) -> list[str]:
    """A warning if lines of the record were made under conditions that differ."""
    names = differing(conditions)
    return [f"**Not all {noun} are comparable**: they differ in {', '.join(names)}."] if names else []


def trained_for(entries: Sequence[Mapping[str, Any]]) -> str:
    """Such as `training step 1,000`."""
    return f"training step {distinct(entry['step'] for entry in entries)}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown: the first line heads it, the first column to the left and the others to the right."""
    ruler = ["---", *("---:" for _ in lines[0][1:])]
    cells = [[_in_one_cell(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ruler, *cells[1:]))


def page(places: Mapping[str, str], scripts: Mapping[str, str]) -> str:
    """A report's page: the files in `report/page` as one, which needs no other file and asks no server for anything.

    Args:
        places: place in `page.html` -> its HTML.
        scripts: id of a script of data -> its JSON. No `<` stays in it, so it cannot end the script.
    """
    frame, style, script = (
        files(__package__).joinpath(f"page/page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script may run
    data = {name: text.replace("<", "\\u003c") for name, text in scripts.items()}
    filled = {**places, **data, "style": style, "script": script, "digest": digest}
    return re.sub(r"<!-- (\w+) -->", lambda place: filled[place[1]], frame)


def _in_one_cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "&#124;" if "\\" in text else "\\|")


def inert(markdown: str) -> str:
    """Markdown without links, pictures, HTML and control characters, which may be in names and records of other people."""
    without_links = re.sub(r"\]([(\[:])", lambda match: f"]&#{ord(match[1])};", markdown)
    return printable(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", without_links))


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def csv_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Records with the same keys as CSV; lists with semicolons between their entries."""
    lines = [["; ".join(value) if isinstance(value, list) else value for value in record.values()] for record in records]
    return csv_text([list(records[0]), *lines])


def html_table(lines: Sequence[Sequence[str]], links: Sequence[str]) -> str:
    """A table: the first line heads it, and the first cells of the others lead to addresses. All texts stay texts."""
    heading, *rows = [[html.escape(cell) for cell in line] for line in lines]
    rows = [[f'<a href="{link}">{first}</a>', *rest] for link, (first, *rest) in zip(links, rows, strict=True)]
    body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>\n" for row in rows)
    return f"<table>\n<thead><tr><th>{'</th><th>'.join(heading)}</th></tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _decimals(value: float) -> int:
    """Digits after the point that `number` shows."""
    text = f"{value:.2e}"
    return max(0, 2 - int(text[text.index("e") + 1 :]))


@dataclass(frozen=True)
class Unit:
    """How a quantity is shown: in its own unit, or in a smaller one where all of it is small."""

    title: str
    """The unit and what it is counted for, such as `ms per image`."""
    factor: float
    """What a value is multiplied with."""

    def show(self, value: float | None) -> str:
        """The value as text."""
        return NOTHING if value is None else number(value * self.factor)


@dataclass(frozen=True)
class Cost:
    """A cost of a point. A point may lack it: memory is not measured on a CPU."""

    column: str
    """Its name in CSV, with the unit."""
    of: Callable[[Point], float | None]
    """From a point, in this unit."""
    titles: tuple[str, str]
    """With the unit, and with the smaller one."""
    name: str
    """Of what is spent."""
    factor: float = 1000.0
    """Smaller units in one unit."""

    def unit(self, values: Iterable[float | None]) -> Unit:
        """The unit in which the greatest of values is no fraction, if there is one."""
        greatest = max((value for value in values if value is not None), default=0.0)
        return Unit(self.titles[0], 1.0) if greatest >= 1 else Unit(self.titles[1], self.factor)


def _mean_of_blocks(point: Point) -> float | None:
    blocks = point.get("seconds_per_block")
    return fmean(blocks) if blocks else None


COSTS = {
    "flops": Cost(
        "tflops_per_image", lambda point: point.get("tflops_per_image"), ("TFLOPs per image", "GFLOPs per image"), "compute"
    ),
    "seconds": Cost("seconds_per_image", lambda point: point.get("seconds_per_image"), ("s per image", "ms per image"), "time"),
    "seconds_per_block": Cost("seconds_per_block", _mean_of_blocks, ("s per block", "ms per block"), "time"),
    "memory": Cost(
        "peak_memory_gib", lambda point: point.get("peak_memory_gib"), ("GiB at the peak", "MiB at the peak"), "memory", 1024.0
    ),
}
"""By the names that `--against` takes; of the blocks' seconds the mean over blocks."""

NFE = "nfe"
"""The paper's measure of compute, and the budget itself: not measured, so not among `COSTS`."""

AGAINST = (NFE, "flops", "seconds")
"""The default panels of a figure: costs that quality is drawn against."""


def parse_against(text: str | None) -> tuple[str, ...]:
    """The panels of a figure, named with commas between them; None: the usual ones.

    Raises:
        InputError: no such cost.
    """
    if text is None:
        return AGAINST
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in (NFE, *COSTS):
            raise InputError(f"--against {text}: no cost is named {name!r}; there are {', '.join((NFE, *COSTS))}")
    return names
