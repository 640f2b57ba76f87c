"""Keyed randomness: a draw is a function of what it is for, never of what was drawn before it."""

from __future__ import annotations

import hashlib

import torch

from madformer.config.evaluation import MAX_SAMPLES


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU that depends on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of an evaluation; no two samples of one evaluation share one.

    Raises:
        ValueError: an index beyond a million, which would be another seed's.
    """
    if not 0 <= index < MAX_SAMPLES:
        raise ValueError(f"sample {index}: must be in 0..{MAX_SAMPLES - 1}")
    return seed * MAX_SAMPLES + index  # below 2**32, what torch's generators keep of a seed
