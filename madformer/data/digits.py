"""The embedded data set: the 1,797 handwritten digits that ship with scikit-learn, 8 x 8 grey pixels each.

There is one split, `train`, and slices of it, as datasets writes them: `train[:90%]` to learn, `train[90%:]` to hold out. As
in the paper, the full training set is also the reference of the metric; 1,797 images are too few to estimate feature
statistics from a part of them.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from madformer.errors import ConfigError

__all__ = ["digits_sha256", "load_digits"]


@cache
def load_digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Digits, in scikit-learn's order.

    Args:
        split: `train`, all of them, or a slice of it in datasets' notation, in rows or per cent.

    Returns:
        images: [1797, 1, 8, 8] float32 in [-1, 1]; -1 is paper, 1 is ink, in steps of 1/8 (the scans have 17 grey levels).
        labels: [1797] int64, the digits 0 .. 9. Fewer of both for a slice.

    Every call returns the same two tensors: do not write into them.

    Raises:
        ConfigError: another split, or an empty slice.
    """
    if split != "train":
        images_NCYX, labels_N = load_digits()
        rows_M = _rows(split, len(labels_N))
        return images_NCYX[rows_M], labels_N[rows_M]
    from sklearn import datasets  # type: ignore[import-untyped]  # here, because it takes a second that few commands need

    pixels_NP, labels_N = datasets.load_digits(return_X_y=True)
    images_NCYX = torch.from_numpy(pixels_NP).float().reshape(-1, 1, 8, 8) / 8 - 1
    return images_NCYX, torch.from_numpy(labels_N).long()


def digits_sha256(split: str = "train") -> str:
    """Fingerprint of the images, as other sources have one."""
    return hashlib.sha256(load_digits(split)[0].contiguous().numpy().tobytes()).hexdigest()


def _rows(split: str, total: int) -> Tensor:
    """Numbers of a slice's rows."""
    from datasets import ReadInstruction

    legal = "must be train or a slice of it, such as train[:90%], for data.source = 'digits'"
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": total})
    except ValueError as error:
        raise ConfigError(f"data.split = {split!r}: {legal}") from error
    rows_M = torch.cat([torch.arange(total)[part.from_ : part.to] for part in parts])
    if not len(rows_M):
        raise ConfigError(f"data.split = {split!r}: empty, there are {total:,} digits; {legal}")
    return rows_M
