"""The order of training samples: a pure function of seed and step, whatever the number of devices or restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from madformer.errors import ConfigError
from madformer.randomness import keyed_generator


@dataclass(frozen=True)
class BatchShard:
    """What one device takes of each global batch, and in how many micro-batches."""

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @staticmethod
    def of(batch_size: int, limit: int | None, rank: int, world_size: int) -> BatchShard:
        """The largest equal micro-batches of at most `limit` images.

        Raises:
            ConfigError: the devices cannot share the batch equally.
        """
        if batch_size % world_size:
            raise ConfigError(f"data.batch_size = {batch_size}: must be a multiple of the {world_size} devices")
        share = batch_size // world_size
        accumulation = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= (limit or share))
        return BatchShard(share // accumulation, accumulation, rank, world_size)

    def indices(self, part: int) -> range:
        """Places in the global batch of this device's micro-batch `part`."""
        start = (part * self.world_size + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)


@dataclass(frozen=True)
class BatchIndex:
    """A micro-batch before it is read: where in training it stands, and which samples it is made of."""

    step: int
    indices: range
    """Places in the global batch."""
    samples: np.ndarray
    """Numbers of the samples in the data set, one for each place."""


class SampleOrder:
    """An endless stream of samples: a new permutation each epoch, cut into batches without a rest.

    Sample j of step s is number s * batch_size + j of the stream, so a batch may begin in one epoch and end in the next.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __call__(self, step: int, indices: range) -> np.ndarray:
        """Which samples of the data set stand at `indices` of the batch of `step`."""
        epochs, places = np.divmod(step * self.batch_size + np.asarray(indices), self.samples)
        found = np.empty(len(indices), dtype=np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            found[now] = self._permutation(int(epoch))[places[now]]
        return found

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            kept = {epoch - 1: self._permutations[epoch - 1]} if epoch - 1 in self._permutations else {}
            permutation = torch.randperm(self.samples, generator=keyed_generator(self.seed, "order", epoch))
            self._permutations = {**kept, epoch: permutation.numpy()}
        return self._permutations[epoch]


class EndlessPlaces:
    """The endless micro-batches of one device before they are read, from step `first_step` on."""

    def __init__(self, order: SampleOrder, portion: BatchShard, first_step: int) -> None:
        self.order, self.portion, self.first_step = order, portion, first_step

    def __iter__(self) -> Iterator[BatchIndex]:
        """Where they stand, and their samples."""
        step = self.first_step
        while True:
            for part in range(self.portion.accumulation):
                indices = self.portion.indices(part)
                yield BatchIndex(step, indices, self.order(step, indices))
            step += 1
