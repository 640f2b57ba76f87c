"""The embedded data set: scikit-learn's 1,797 handwritten digits, real scans of 8 x 8 grey pixels, part of its package.

There is no split. As in the paper, the full training set is also the reference of the metric; 1,797 images are too few to
estimate feature statistics from a part of them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["load_digits"]


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """All digits, in scikit-learn's order.

    Returns:
        images: [1797, 1, 8, 8] float32 in [-1, 1]; -1 is paper, 1 is ink, in steps of 1/8 (the scans have 17 grey levels).
        labels: [1797] int64, the digits 0 .. 9.

    Every call returns the same two tensors: do not write into them.
    """
    from sklearn import datasets  # type: ignore[import-untyped]  # here, because it takes a second that few commands need

    pixels_NP, labels_N = datasets.load_digits(return_X_y=True)
    images_NCYX = torch.from_numpy(pixels_NP).float().reshape(-1, 1, 8, 8) / 8 - 1
    return images_NCYX, torch.from_numpy(labels_N).long()
