"""Rows of a source as squares of pixels, decoded ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from madformer.config import DataError
from madformer.data.images import BadImage, load_square
from madformer.data.prefetch import prefetch
from madformer.data.sources import Row


@dataclass(frozen=True)
class Picture:
    """A row of a source after decoding."""

    row: Row
    pixels_CYX: Tensor | None
    """Bytes [3, size, size]; None: the image is broken."""
    flaw: str = ""
    """What is wrong with it."""


def read_pictures(rows: Iterable[Row], size: int, workers: int, ahead: int) -> Iterator[Picture]:
    """Decode rows in their order, with `workers` threads and at most `ahead` pictures waiting.

    Raises:
        InputError: an image is there, but cannot be read now.
    """
    return prefetch(partial(_decode, size=size), rows, workers, ahead)


def require_few(source: str | None, skipped: list[tuple[str, str]], most: int) -> None:
    """Refuse more than `data.max_skipped` broken images, given as (key, flaw).

    Raises:
        DataError: with the first three.
    """
    if len(skipped) > most:
        first = "; ".join(f"{key}: {flaw}" for key, flaw in skipped[:3])
        limit = f"more than data.max_skipped = {most} broken images"
        raise DataError(f"{source}: {limit}: {first}; ... Mend them or raise the limit; what is done is kept")


def _decode(row: Row, size: int) -> Picture:
    try:
        return Picture(row, load_square(row.read(), size))
    except BadImage as error:
        return Picture(row, None, str(error))
