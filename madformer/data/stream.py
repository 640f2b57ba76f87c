"""Training from images that are read in order: the explicit choice for sources that are neither copied nor encoded first.

The stream of an epoch goes through the source's units in an order drawn from (seed, epoch) and shuffles windows of `WINDOW`
rows, each by a draw of its own. So it is a pure function of seed and position, and a resumed run sees exactly what an
uninterrupted one sees. The price: every device reads the whole stream, and a resumed run reads its epoch's stream up to where
it was, decoding nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from madformer.data.loader import Batch, Captions, Collator, collate, first_good
from madformer.data.order import BatchIndex, BatchShard
from madformer.data.sources import ImageSource, Row
from madformer.errors import InputError
from madformer.randomness import keyed_generator

WINDOW = 512
"""Rows, not yet decoded, that lie in memory and are shuffled together."""


@dataclass(frozen=True)
class RawBatch:
    """A micro-batch before it is decoded."""

    places: BatchIndex
    rows: list[tuple[list[Row], int]]
    """For each image its window of rows, and which one of them it is."""
    epoch_size: int | None
    """Rows of an epoch, as soon as one has ended: with it a resumed run finds its place without reading all epochs again."""


class ImageStream:
    """Endless micro-batches of one device, from step `first_step` on: iterate, and `read` each of them."""

    def __init__(
        self,
        source: ImageSource,
        captions: Captions,
        finishing: Collator,
        image_size: int,
        batch_size: int,
        portion: BatchShard,
        first_step: int,
        epoch_size: int | None,
        max_skipped: int,
    ) -> None:
        self.max_skipped = max_skipped
        self.source, self.captions, self.finishing, self.image_size = source, captions, finishing, image_size
        self.batch_size, self.portion, self.first_step, self.epoch_size = batch_size, portion, first_step, epoch_size

    def __iter__(self) -> Iterator[RawBatch]:
        """Micro-batches before they are decoded."""
        start = self.first_step * self.batch_size
        epoch, offset = divmod(start, self.epoch_size) if self.epoch_size else (0, start)
        stream = self._stream(epoch, offset)
        for step in itertools.count(self.first_step):
            rows = list(itertools.islice(stream, self.batch_size))
            for part in range(self.portion.accumulation):
                places = BatchIndex(step, self.portion.indices(part), np.arange(0))
                yield RawBatch(places, [rows[index] for index in places.indices], self.epoch_size)

    def read(self, undecoded: RawBatch) -> Batch:
        """Decode a micro-batch; a broken image is replaced by the next good one of its window."""
        images = [first_good(_from(window, place), self.image_size, self.max_skipped) for window, place in undecoded.rows]
        batch, captions = collate(images, self.finishing.flipped(undecoded.places), self.captions)
        if undecoded.epoch_size:
            batch["epoch_size"] = undecoded.epoch_size
        return self.finishing.finish(batch, captions, undecoded.places)

    def _stream(self, epoch: int, offset: int) -> Iterator[tuple[list[Row], int]]:
        """Endless places (window, number in it), from `offset` of `epoch` on."""
        while True:
            rows, read = self._rows(epoch), 0
            skipped = offset // WINDOW * WINDOW
            read += sum(1 for _ in itertools.islice(rows, skipped))
            while window := list(itertools.islice(rows, WINDOW)):
                generator = keyed_generator(self.finishing.seed, "window", epoch, read // WINDOW)
                order = torch.randperm(len(window), generator=generator).tolist()
                shuffled = [window[number] for number in order]
                yield from ((shuffled, number) for number in range(max(0, offset - read), len(window)))
                read += len(window)
            if not read:
                raise InputError("data.source: the stream has no rows")
            self.epoch_size = read
            # Nobody knew the epoch's size when the run resumed behind its end.
            epoch, offset = (epoch + offset // read, offset % read) if offset > read else (epoch + 1, 0)

    def _rows(self, epoch: int) -> Iterator[Row]:
        generator = keyed_generator(self.finishing.seed, "units", epoch)
        units = torch.randperm(self.source.num_units, generator=generator).tolist()
        return itertools.chain.from_iterable(self.source.rows(unit) for unit in units)


def _from(window: list[Row], place: int) -> Iterator[Row]:
    """All rows of a window, beginning with one of them."""
    return itertools.chain(window[place:], window[:place])
