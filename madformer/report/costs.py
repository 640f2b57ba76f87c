"""What quality is bought with: FLOPs, seconds, memory; their units, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from madformer.config import InputError
from madformer.evaluation.record import Point
from madformer.report.text import NOTHING, number


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
    """A quantity that every point has, or lacks: on a CPU nobody measures memory."""

    column: str
    """Its name in CSV, with the unit."""
    of: Callable[[Point], float | None]
    """From a point, in this unit."""
    titles: tuple[str, str]
    """With the unit, and with the smaller one."""
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
    "flops": Cost("tflops_per_image", lambda point: point.get("tflops_per_image"), ("TFLOPs per image", "GFLOPs per image")),
    "seconds": Cost("seconds_per_image", lambda point: point.get("seconds_per_image"), ("s per image", "ms per image")),
    "seconds_per_block": Cost("seconds_per_block", _mean_of_blocks, ("s per block", "ms per block")),
    "memory": Cost(
        "peak_memory_gib", lambda point: point.get("peak_memory_gib"), ("GiB at the peak", "MiB at the peak"), 1024.0
    ),
}
"""By the names that `--against` takes; of the blocks' seconds the mean over blocks."""

NFE = "nfe"
"""The paper's measure of compute, and the budget itself: not measured, so not among `COSTS`."""

AGAINST = (NFE, "flops", "seconds")
"""What a figure shows quality against unless it is told otherwise."""


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
