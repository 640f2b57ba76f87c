"""Training from images that are read in order: the explicit choice for sources that are neither copied nor encoded first.

The stream of an epoch goes through the source's units in an order drawn from (seed, epoch) and shuffles windows of `WINDOW`
rows, each by a draw of its own. So it is a pure function of seed and position, and a resumed run sees exactly what an
uninterrupted one sees. The price: every device reads the whole stream, and a resumed run reads its epoch's stream up to where
it was, decoding nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import IterableDataset

from madformer.config import DataConfig, InputError
from madformer.data.order import Places, Portion
from madformer.data.samples import Batch, Captions, Finishing, ReadImage, collate, first_good
from madformer.data.sources import ImageSource, Row
from madformer.randomness import keyed_generator

WINDOW = 512
"""Rows, not yet decoded, that lie in memory and are shuffled together."""


class ImageStream(IterableDataset[Batch]):
    """Endless micro-batches of one device, from step `first_step` on.

    A micro-batch has `epoch_size` as soon as an epoch has ended: with it a resumed run knows where it stands without reading
    all epochs again.
    """

    def __init__(
        self,
        source: ImageSource,
        captions: Captions,
        finishing: Finishing,
        image_size: int,
        data: DataConfig,
        portion: Portion,
        first_step: int,
        epoch_size: int | None,
    ) -> None:
        self.source, self.captions, self.finishing, self.image_size = source, captions, finishing, image_size
        self.data, self.portion, self.first_step, self.epoch_size = data, portion, first_step, epoch_size

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches, each decoded by threads."""
        start = self.first_step * self.data.batch_size
        epoch, offset = divmod(start, self.epoch_size) if self.epoch_size else (0, start)
        stream = self._stream(epoch, offset)
        with ThreadPoolExecutor(max(1, self.data.workers)) as pool:
            for step in itertools.count(self.first_step):
                rows = list(itertools.islice(stream, self.data.batch_size))
                for part in range(self.portion.accumulation):
                    indices = self.portion.indices(part)
                    images = list(pool.map(self._read, [rows[index] for index in indices]))
                    places = Places(step, indices, np.arange(0))
                    batch, captions = collate(images, self.finishing.flipped(places), self.captions)
                    if self.epoch_size:
                        batch["epoch_size"] = self.epoch_size
                    yield self.finishing.finish(batch, captions, places)

    def _read(self, place: tuple[list[Row], int]) -> ReadImage:
        """The image at a place of its window; if it is broken, the next good one of the window."""
        window, first = place
        return first_good((window[(first + offset) % len(window)] for offset in range(len(window))), self.image_size)

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
