"""Embedding: latents to blocks and positions, blocks to tokens and back by a U-Net, text to tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import cast

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
from einops import rearrange
from torch import Tensor, nn

from madformer.config import ModelConfig, TextConfig, UNetConfig


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


Skips = tuple[Tensor, ...]
"""Features that the downsampler hands to the upsampler of the same block, each [U, channels, rows, columns]."""


class GroupNorm(nn.GroupNorm):
    """Group norm that takes torch's contiguous kernel on the CPU.

    The one for channels-last input loses up to 1e-2 of relative accuracy there, and diffusers' attention hands on such
    input. Three axes have no channels-last form.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[U, channels, ...] -> the same shape."""
        return super().forward(x.flatten(2)).view(x.shape) if x.device.type == "cpu" else super().forward(x)


def _replace_group_norms(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.GroupNorm):
                setattr(module, name, GroupNorm(norm.num_groups, norm.num_channels, norm.eps))


class TimestepEmbedding(nn.Module):
    """A timestep through two linear layers: the raw number, as released, or sinusoids (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.unet.time_embed_dim
        self.sinusoids = dim if config.timestep_embedding == "sinusoidal" else 0
        self.linear_1 = nn.Linear(self.sinusoids or 1, dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim, bias=False)

    def forward(self, t_U: Tensor) -> Tensor:
        """[U] -> [U, time_embed_dim]."""
        # In float32 at least: to bfloat16 the neighbours of 999 are 999.
        device = t_U.device.type
        full_precision = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with full_precision:
            first, second = self.linear_1.weight, self.linear_2.weight
            dtype = torch.promote_types(first.dtype, torch.float32)
            features = get_timestep_embedding(t_U, self.sinusoids).to(dtype) if self.sinusoids else t_U[:, None].to(dtype)
            hidden = nn.functional.silu(nn.functional.linear(features, first.to(dtype)))
            return nn.functional.linear(hidden, second.to(dtype)).to(second.dtype)


class Downsampler(nn.Module):
    """Latents of a block at a timestep to token features (the `Embed` of Eq. 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        unet = config.unet
        self.conv_in = nn.Conv2d(config.latent_channels, unet.channels[0], kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(config)
        self.down_blocks = nn.ModuleList(_down_block(unet, level) for level in range(len(unet.channels)))
        self.conv_out = nn.Conv2d(unet.channels[-1], config.width, kernel_size=3, padding=1)
        _replace_group_norms(self)

    def forward(self, latents_UCYX: Tensor, t_U: Tensor) -> tuple[Tensor, Skips]:
        """[U, C, Y, X] and [U] -> features [U, D, rows, columns], skips."""
        time_embedding = self.time_embedding(t_U)
        x = self.conv_in(latents_UCYX)
        skips: Skips = (x,)
        for block in self.down_blocks:
            x, block_skips = block(x, time_embedding)
            skips += block_skips
        return self.conv_out(x), skips


class Upsampler(nn.Module):
    """Token features and skips of a block at a timestep to latents (`Proj`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        unet = config.unet
        self.conv_in = nn.Conv2d(config.width, unet.channels[-1], kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(config)
        self.up_blocks = nn.ModuleList(_up_block(unet, level) for level in reversed(range(len(unet.channels))))
        self.conv_out = nn.Conv2d(unet.channels[0], config.latent_channels, kernel_size=3, padding=1)
        _replace_group_norms(self)

    def forward(self, features_UDyx: Tensor, t_U: Tensor, skips: Skips) -> Tensor:
        """[U, D, rows, columns] and [U] -> latents [U, C, Y, X]."""
        time_embedding = self.time_embedding(t_U)
        x = self.conv_in(features_UDyx)
        for block in self.up_blocks:
            used = len(cast(UpBlock2D, block).resnets)
            x = block(x, skips[-used:], time_embedding)
            skips = skips[:-used]
        return self.conv_out(x)


def skip_shapes(unet: UNetConfig, block_size: int) -> list[tuple[int, int]]:
    """(channels, rows) of each skip of a block of `block_size` rows, in the downsampler's order."""
    shapes = [(unet.channels[0], block_size)]
    for level, (channels, layers) in enumerate(zip(unet.channels, unet.layers, strict=True)):
        rows = block_size // 2**level
        shapes += [(channels, rows)] * layers
        if level < len(unet.channels) - 1:
            shapes.append((channels, rows // 2))
    return shapes


def _down_block(unet: UNetConfig, level: int) -> nn.Module:
    last = level == len(unet.channels) - 1
    channels = unet.channels[level]
    shared = {
        "in_channels": unet.channels[max(level - 1, 0)],
        "out_channels": channels,
        "temb_channels": unet.time_embed_dim,
        "num_layers": unet.layers[level],
        "resnet_groups": unet.groups,
    }
    if unet.attention[level]:
        down = None if last else "conv"
        return AttnDownBlock2D(**shared, attention_head_dim=channels // unet.num_heads, downsample_type=down)
    return DownBlock2D(**shared, add_downsample=not last)


def _up_block(unet: UNetConfig, level: int) -> nn.Module:
    first = level == 0
    channels = unet.channels[level]
    shared = {
        "in_channels": unet.channels[max(level - 1, 0)],
        "out_channels": channels,
        "prev_output_channel": unet.channels[min(level + 1, len(unet.channels) - 1)],
        "temb_channels": unet.time_embed_dim,
        "num_layers": unet.layers[level] + 1,
        "resnet_groups": unet.groups,
    }
    if unet.attention[level]:
        up = None if first else "conv"
        return AttnUpBlock2D(**shared, attention_head_dim=channels // unet.num_heads, upsample_type=up)
    return UpBlock2D(**shared, add_upsample=not first)


class TextInterface(nn.Module):
    """Token ids to the text tower's input and its output to logits; the head is not tied to the embeddings."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of the next token, [B, T, V]."""
        return self.head(self.norm(x_BTD))


def null_text(config: TextConfig, batch: int, device: torch.device | str | None = None, length: int | None = None) -> Tensor:
    """Prompts of padding alone, [B, T]: what the model sees for a dropped prompt."""
    return torch.full(
        (batch, config.length if length is None else length), config.pad_token_id, dtype=torch.long, device=device
    )


def drop_text(text_BT: Tensor, config: TextConfig, generator: torch.Generator | None = None) -> Tensor:
    """Replace whole prompts by the null text with probability `config.dropout`, so that guidance works when sampling.

    The draw is made on the generator's device, so that it is the same wherever the text lies.
    """
    device = generator.device if generator else text_BT.device
    dropped_B = torch.rand(len(text_BT), generator=generator, device=device) < config.dropout
    return torch.where(dropped_B.to(text_BT.device)[:, None], config.pad_token_id, text_BT)
