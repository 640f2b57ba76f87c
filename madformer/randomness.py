"""Keyed randomness: a draw depends on its key (seed and purpose), never on earlier draws.

The order of training samples depends on seed and step alone, not on the number of devices or on restarts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from madformer.config.evaluation import MAX_SAMPLES
from madformer.errors import ConfigError


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU that depends only on the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of an evaluation. No two samples share a seed.

    Raises:
        ValueError: an index of a million or more, whose seed would belong to another evaluation seed.
    """
    if not 0 <= index < MAX_SAMPLES:
        raise ValueError(f"sample {index}: must be in 0..{MAX_SAMPLES - 1}")
    return seed * MAX_SAMPLES + index  # below 2**32: torch's generators keep 32 bits of a seed


@dataclass(frozen=True)
class BatchShard:
    """One device's share of each global batch, and its number of micro-batches."""

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @staticmethod
    def of(batch_size: int, limit: int | None, rank: int, world_size: int) -> BatchShard:
        """The share of one device, in the largest equal micro-batches.

        Args:
            batch_size: images of a global batch.
            limit: most images of a micro-batch; None: no limit.
            rank: number of the device, from 0.
            world_size: number of devices.

        Raises:
            ConfigError: the devices cannot share the batch equally.
        """
        if batch_size % world_size:
            raise ConfigError(f"data.batch_size = {batch_size}: must be a multiple of the {world_size} devices")
        share = batch_size // world_size
        accumulation = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= (limit or share))
        return BatchShard(share // accumulation, accumulation, rank, world_size)

    def indices(self, part: int) -> range:
        """Indices, in the global batch, of this device's micro-batch `part`."""
        start = (part * self.world_size + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)


@dataclass(frozen=True)
class BatchIndex:
    """The place of a micro-batch in training, and its samples."""

    step: int
    indices: range
    """Indices of its samples in the global batch."""
    samples: np.ndarray
    """Numbers of its samples in the data set; empty for a stream, which is read in order."""


class SampleOrder:
    """An endless stream of samples: a new permutation each epoch, cut into batches without a remainder.

    Sample j of step s is number s * batch_size + j of the stream, so a batch may begin in one epoch and end in the next.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __call__(self, step: int, indices: range) -> np.ndarray:
        """Numbers of the samples at `indices` of the batch of `step`."""
        epochs, positions = np.divmod(step * self.batch_size + np.asarray(indices), self.samples)
        samples = np.empty(len(indices), dtype=np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            samples[mask] = self._permutation(int(epoch))[positions[mask]]
        return samples

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            previous = {epoch - 1: self._permutations[epoch - 1]} if epoch - 1 in self._permutations else {}
            permutation = torch.randperm(self.samples, generator=keyed_generator(self.seed, "order", epoch))
            self._permutations = {**previous, epoch: permutation.numpy()}
        return self._permutations[epoch]


class BatchSampler:
    """The micro-batches of one device, as indices, from step `first_step` on without end."""

    def __init__(self, order: SampleOrder, shard: BatchShard, first_step: int) -> None:
        self.order, self.shard, self.first_step = order, shard, first_step

    def __iter__(self) -> Iterator[BatchIndex]:
        """Yield the `BatchIndex` of each micro-batch."""
        step = self.first_step
        while True:
            for part in range(self.shard.accumulation):
                indices = self.shard.indices(part)
                yield BatchIndex(step, indices, self.order(step, indices))
            step += 1
