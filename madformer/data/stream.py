"""Training on streamed images (`data.streaming`): read in order, neither copied nor encoded first.

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

from madformer.data.loader import Batch, Collator, ImageReader, batched
from madformer.data.order import BatchIndex, BatchShard
from madformer.data.sources import ImageSource, Row
from madformer.errors import InputError
from madformer.randomness import keyed_generator

WINDOW = 512
"""Rows, not yet decoded, that lie in memory and are shuffled together."""


@dataclass(frozen=True)
class RawBatch:
    """A micro-batch before it is decoded."""

    batch_index: BatchIndex
    rows: list[tuple[list[Row], int]]
    """For each image its window of rows, and which one of them it is."""
    epoch_size: int | None
    """Rows of an epoch, as soon as one has ended: with it a resumed run finds its place without reading all epochs again."""


class ImageStream:
    """Endless micro-batches of one device, from step `first_step` on: iterate, and `read` each of them."""

    def __init__(
        self,
        source: ImageSource,
        reader: ImageReader,
        collator: Collator,
        shard: BatchShard,
        first_step: int,
        epoch_size: int | None,
    ) -> None:
        self.source, self.reader, self.collator = source, reader, collator
        self.shard, self.first_step, self.epoch_size = shard, first_step, epoch_size

    def __iter__(self) -> Iterator[RawBatch]:
        """Micro-batches before they are decoded."""
        batch_size = self.reader.data.batch_size
        start = self.first_step * batch_size
        epoch, offset = divmod(start, self.epoch_size) if self.epoch_size else (0, start)
        stream = self._stream(epoch, offset)
        for step in itertools.count(self.first_step):
            rows = list(itertools.islice(stream, batch_size))
            for part in range(self.shard.accumulation):
                batch_index = BatchIndex(step, self.shard.indices(part), np.arange(0))
                yield RawBatch(batch_index, [rows[index] for index in batch_index.indices], self.epoch_size)

    def read(self, raw: RawBatch) -> Batch:
        """Decode a micro-batch; a broken image is replaced by the next good one of its window."""
        candidates = (itertools.chain(window[number:], window[:number]) for window, number in raw.rows)
        batch, captions = self.reader.read(candidates, self.collator.draw_flips(raw.batch_index))
        if raw.epoch_size:
            batch["epoch_size"] = raw.epoch_size
        return self.collator.finish(batch, captions, raw.batch_index)

    def _stream(self, epoch: int, offset: int) -> Iterator[tuple[list[Row], int]]:
        """Endless pairs (window, number of a row in it), from row `offset` of `epoch` on."""
        while True:
            rows = self._rows(epoch)
            count = sum(1 for _ in itertools.islice(rows, offset // WINDOW * WINDOW))
            for window in batched(rows, WINDOW):
                generator = keyed_generator(self.collator.seed, "window", epoch, count // WINDOW)
                permutation = torch.randperm(len(window), generator=generator).tolist()
                shuffled = [window[number] for number in permutation]
                yield from ((shuffled, number) for number in range(max(0, offset - count), len(window)))
                count += len(window)
            if not count:
                raise InputError("data.source: the stream has no rows")
            self.epoch_size = count
            # Nobody knew the epoch's size when the run resumed behind its end.
            epoch, offset = (epoch + offset // count, offset % count) if offset > count else (epoch + 1, 0)

    def _rows(self, epoch: int) -> Iterator[Row]:
        generator = keyed_generator(self.collator.seed, "units", epoch)
        units = torch.randperm(self.source.num_units, generator=generator).tolist()
        return itertools.chain.from_iterable(self.source.rows(unit) for unit in units)
