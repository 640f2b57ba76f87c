"""Images to blocks and back: a block is a square tile of the latent grid, blocks are in raster order."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from madformer.config import ModelConfig


def to_blocks(latents_BChw: Tensor, ar_length: int) -> Tensor:
    """Cut square latents [B, C, h, w] into `ar_length` blocks [B, L, C, Y, X].

    Raises:
        ValueError: `ar_length` is no square number whose root divides both sides.
    """
    rows = math.isqrt(ar_length)
    height, width = latents_BChw.shape[-2:]
    if ar_length < 1 or rows**2 != ar_length or height % rows or width % rows:
        raise ValueError(f"ar_length = {ar_length}: must be a square number whose root divides {height} x {width} latents")
    return rearrange(latents_BChw, "b c (ly y) (lx x) -> b (ly lx) c y x", ly=rows, lx=rows)


def to_image(blocks_BLCYX: Tensor) -> Tensor:
    """Put blocks [B, L, C, Y, X] together to latents [B, C, h, w]; the inverse of `to_blocks`."""
    return rearrange(blocks_BLCYX, "b (ly lx) c y x -> b c (ly y) (lx x)", ly=math.isqrt(blocks_BLCYX.shape[1]))


def token_positions(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """(row, column) of every token in the image's token grid, [L, S, 2], row-major inside a block."""
    side = config.block_rows * config.token_rows
    rows, columns = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    grid = torch.stack([rows, columns])[None]
    return rearrange(to_blocks(grid, config.ar_length), "1 l rc y x -> l (y x) rc")


def text_positions(tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Token j of T sits at (j - T, j - T), before the image's origin: [T, 2]."""
    return torch.arange(-tokens, 0, device=device)[:, None].expand(tokens, 2)
