"""Rotary positions in two dimensions (PosEnc of Eq. 1: it acts on queries and keys, not on the embedding)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from madformer.config import ModelConfig


class Rope(NamedTuple):
    """Cosines and sines for a tower's tokens, each [N, K], and which dimensions are paired."""

    cos_NK: Tensor
    sin_NK: Tensor
    form: Literal["axial", "released"]

    def part(self, start: int, end: int) -> Rope:
        """The angles of tokens start .. end - 1."""
        return Rope(self.cos_NK[start:end], self.sin_NK[start:end], self.form)

    def rotate(self, x_BHNK: Tensor) -> Tensor:
        """Rotate queries or keys, in their own dtype or float32, whichever is wider."""
        axes = 2 if self.form == "axial" else 1
        first, second = x_BHNK.unflatten(-1, (axes, 2, -1)).unbind(-2)
        turned_BHNK = torch.stack([-second, first], dim=-2).flatten(-3)
        return x_BHNK * self.cos_NK + turned_BHNK * self.sin_NK


def rope(positions_N2: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """Angles for tokens at (row, column) positions.

    `axial`: each axis rotates within its half of the head, frequencies 10000 ** (-2k / axis_dim), so that scores depend
    on relative position alone. `released`: the released code's angles, whose pairs straddle the two axes; for its
    checkpoints only.
    """
    axis_dim = config.head_width // 2
    exact = torch.float32 if positions_N2.device.type == "mps" else torch.float64
    steps = torch.arange(axis_dim // 2, dtype=exact, device=positions_N2.device)
    if config.rope == "axial":
        frequencies = 10_000.0 ** (-2 * steps / axis_dim)
    else:
        side = config.block_rows * config.token_rows
        base = (int(8 * side / math.pi) // 100 + 1) * 100.0
        frequencies = base ** (-steps / max(axis_dim // 2 - 1, 1))
    angles_N2f = positions_N2[..., None].to(exact) * frequencies
    angles_NK = torch.cat([angles_N2f, angles_N2f], dim=-1).flatten(-2)
    return Rope(angles_NK.cos().to(dtype), angles_NK.sin().to(dtype), config.rope)
