"""Images as files: grids, grey or colour PNGs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from madformer.files import replacing

MIN_SIDE = 64
"""Smaller images are magnified to at least this many pixels, or nobody sees them."""


def to_pixels(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] (the rest is clipped) to [B, Y, X, 3] bytes; one channel is grey, of more the first three are shown."""
    bytes_BCYX = ((images_BCYX.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    shown_BCYX = bytes_BCYX[:, :3] if bytes_BCYX.shape[1] >= 3 else bytes_BCYX[:, :1].expand(-1, 3, -1, -1)
    factor = math.ceil(MIN_SIDE / images_BCYX.shape[-1])
    return repeat(shown_BCYX, "b c y x -> b (y fy) (x fx) c", fy=factor, fx=factor).numpy()


def to_grid(images_BCYX: Tensor) -> np.ndarray:
    """Images side by side in a nearly square grid, row by row, with a thin frame: [Y, X, 3] bytes."""
    pixels_BYX3 = np.pad(to_pixels(images_BCYX), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
    columns = math.ceil(math.sqrt(len(pixels_BYX3)))
    missing = -len(pixels_BYX3) % columns
    filled_BYX3 = np.pad(pixels_BYX3, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=96)
    return rearrange(filled_BYX3, "(rows columns) y x c -> (rows y) (columns x) c", columns=columns)


def save_png(pixels_YX3: np.ndarray, path: Path) -> None:
    """Write a whole PNG file."""
    with replacing(path) as temporary:
        Image.fromarray(pixels_YX3).save(temporary, format="PNG")
