"""Images as files: grids, grey or colour PNGs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange, repeat
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from madformer.files import replacing

MIN_SIDE = 64
"""In a grid, smaller images are magnified to at least this many pixels, or nobody sees them."""

MAX_GRID = 2048
"""Grids of more pixels along a side are made of reduced images: 64 of 1024 x 1024 would be 200 MB, and in TensorBoard, too."""

SETTINGS = "madformer"
"""Text chunk of a PNG file that holds how it was made, as JSON."""


def to_pixels(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] (the rest is clipped) to [B, Y, X, 3] bytes; one channel is grey, of more the first three are shown."""
    bytes_BCYX = ((images_BCYX.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    shown_BCYX = bytes_BCYX[:, :3] if bytes_BCYX.shape[1] >= 3 else bytes_BCYX[:, :1].expand(-1, 3, -1, -1)
    return rearrange(shown_BCYX, "b c y x -> b y x c").numpy()


def to_grid(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] side by side: [Y, X, 3] bytes."""
    return to_tiles(to_pixels(images_BCYX))


def to_tiles(pixels_BYX3: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images side by side, row by row, with a thin frame: [Y, X, 3] bytes.

    Small ones are magnified, and large ones reduced where there are many of them, both by an integer.

    Args:
        pixels_BYX3: the images, bytes.
        columns: images in a row; None: a nearly square grid.
    """
    columns = columns or math.ceil(math.sqrt(len(pixels_BYX3)))
    reduction = math.ceil(columns * max(pixels_BYX3.shape[1:3]) / MAX_GRID)
    if reduction > 1:
        pixels_BYX3 = np.stack([np.asarray(Image.fromarray(pixels_YX3).reduce(reduction)) for pixels_YX3 in pixels_BYX3])
    factor = math.ceil(MIN_SIDE / pixels_BYX3.shape[2])
    large_BYX3 = repeat(pixels_BYX3, "b y x c -> b (y fy) (x fx) c", fy=factor, fx=factor)
    framed_BYX3 = np.pad(large_BYX3, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
    missing = -len(framed_BYX3) % columns
    filled_BYX3 = np.pad(framed_BYX3, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=96)
    return rearrange(filled_BYX3, "(rows columns) y x c -> (rows y) (columns x) c", columns=columns)


def save_png(pixels_YX3: np.ndarray, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a whole PNG file, with how it was made in its metadata."""
    chunks = PngInfo()
    if settings is not None:
        chunks.add_text(SETTINGS, json.dumps(settings))
    with replacing(path) as temporary:
        Image.fromarray(pixels_YX3).save(temporary, format="PNG", pnginfo=chunks)


def read_settings(path: Path) -> dict[str, Any] | None:
    """How a PNG file was made, as `save_png` wrote it; empty if it does not say. None: there is no such file, or it is torn."""
    try:
        with Image.open(path) as image:
            text = image.info.get(SETTINGS, "")
            image.verify()
    except (OSError, SyntaxError, ValueError):  # SyntaxError is Pillow's for a wrong checksum
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
