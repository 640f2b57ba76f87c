"""Embedding: latents to blocks and positions, blocks to tokens and back by a U-Net, text to tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from madformer.config import ModelConfig, TextConfig, UNetConfig
from madformer.model.layer import autocast_dtype


def to_blocks(latents_BChw: Tensor, ar_length: int) -> Tensor:
    """Cut square latents [B, C, h, w] into `ar_length` blocks [B, L, C, Y, X].

    Raises:
        ValueError: `ar_length` is not a square number whose root divides both sides.
    """
    rows = math.isqrt(ar_length)
    height, width = latents_BChw.shape[-2:]
    if ar_length < 1 or rows**2 != ar_length or height % rows or width % rows:
        raise ValueError(f"ar_length = {ar_length}: must be a square number whose root divides {height} x {width} latents")
    return rearrange(latents_BChw, "b c (ly y) (lx x) -> b (ly lx) c y x", ly=rows, lx=rows)


def to_image(blocks_BLCYX: Tensor) -> Tensor:
    """Assemble blocks [B, L, C, Y, X] into latents [B, C, h, w]; the inverse of `to_blocks`."""
    return rearrange(blocks_BLCYX, "b (ly lx) c y x -> b c (ly y) (lx x)", ly=math.isqrt(blocks_BLCYX.shape[1]))


def token_positions(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """(row, column) of every token in the image's token grid, [L, S, 2], row-major inside a block."""
    side = config.block_rows * config.token_rows
    rows, columns = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    grid = torch.stack([rows, columns])[None]
    return rearrange(to_blocks(grid, config.ar_length), "1 l rc y x -> l (y x) rc")


def text_positions(tokens: int, device: torch.device | str | None = None, form: str = "axial") -> Tensor:
    """Positions of text tokens, [T, 2]: token j is at (j - T, j - T), before the image's origin.

    Args:
        form: `config.rope`. With `released`, text has an axis of its own, and token j is at j: [T, 1].
    """
    if form == "released":
        return torch.arange(tokens, device=device)[:, None]
    return torch.arange(-tokens, 0, device=device)[:, None].expand(tokens, 2)


Skips = tuple[Tensor, ...]
"""Features that the downsampler hands to the upsampler of the same block, each [U, channels, rows, columns]."""


class TimestepEmbedding(nn.Module):
    """A timestep through two linear layers: the raw number, as released, or sinusoids (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.unet.time_embed_dim
        self.sinusoids = dim if config.timestep_embedding == "sinusoidal" else 0
        self.linear_1 = nn.Linear(self.sinusoids or 1, dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim, bias=False)

    def forward(self, t_U: Tensor) -> Tensor:
        """Embed timesteps, [U] -> [U, time_embed_dim]."""
        # In float32 at least: bfloat16 rounds 998 and 999 to the same number.
        device = t_U.device.type
        full_precision = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with full_precision:
            first, second = self.linear_1.weight, self.linear_2.weight
            dtype = torch.promote_types(first.dtype, torch.float32)
            features = get_timestep_embedding(t_U, self.sinusoids).to(dtype) if self.sinusoids else t_U[:, None].to(dtype)
            hidden = F.silu(F.linear(features, first.to(dtype)))
            return F.linear(hidden, second.to(dtype)).to(second.dtype)


class Downsampler(nn.Module):
    """Maps a block's latents at a timestep to token features (`Embed` of Eq. 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        unet, self.checkpointing = config.unet, config.activation_checkpointing
        self.conv_in = nn.Conv2d(config.latent_channels, unet.channels[0], kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(config)
        self.down_blocks = nn.ModuleList(DownBlock(unet, level) for level in range(len(unet.channels)))
        self.conv_out = nn.Conv2d(unet.channels[-1], config.width, kernel_size=3, padding=1)

    def forward(self, latents_UCYX: Tensor, t_U: Tensor) -> tuple[Tensor, Skips]:
        """[U, C, Y, X] and [U] -> features [U, D, rows, columns], skips."""
        time_embedding_Ue = self.time_embedding(t_U)
        x = self.conv_in(_conv_input(latents_UCYX, self.conv_in))
        skips: Skips = (x,)
        for block in self.down_blocks:
            x, block_skips = _run(block, self.checkpointing, x, time_embedding_Ue)
            skips += block_skips
        return self.conv_out(x), skips


class Upsampler(nn.Module):
    """Maps a block's token features and skips at a timestep to latents (`Proj`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        unet, self.checkpointing = config.unet, config.activation_checkpointing
        self.used_skips = [layers + 1 for layers in reversed(unet.layers)]
        self.conv_in = nn.Conv2d(config.width, unet.channels[-1], kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(config)
        self.up_blocks = nn.ModuleList(UpBlock(unet, level) for level in reversed(range(len(unet.channels))))
        self.conv_out = nn.Conv2d(unet.channels[0], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, features_UDyx: Tensor, t_U: Tensor, skips: Skips) -> Tensor:
        """[U, D, rows, columns] and [U] -> latents [U, C, Y, X].

        Args:
            skips: all skips of the downsampler, in its order.
        """
        time_embedding_Ue = self.time_embedding(t_U)
        x = self.conv_in(_conv_input(features_UDyx, self.conv_in))
        for block, used in zip(self.up_blocks, self.used_skips, strict=True):
            x = _run(block, self.checkpointing, x, skips[-used:], time_embedding_Ue)
            skips = skips[:-used]
        return self.conv_out(x)


def _run(block: nn.Module, checkpointing: bool, *inputs: Any) -> Any:
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def _conv_input(x_UcYX: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The input of a convolution or an attention, in its dtype; on CUDA also channels-last, in the same copy."""
    dtype = autocast_dtype(x_UcYX.device, layer.weight.dtype)
    return x_UcYX.to(dtype, memory_format=torch.channels_last) if x_UcYX.device.type == "cuda" else x_UcYX.to(dtype)


def conv_layout(x: Tensor) -> Tensor:
    """Features or a kernel in the layout for convolutions: channels-last on CUDA, unchanged elsewhere."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cuda" else x


# ---- the U-Net's blocks, named as those of diffusers (DownBlock2D, UpBlock2D, and the same with attention)


class DownBlock(nn.Module):
    """One level of the downsampler: ResNet layers, each with self-attention if the level has it, then a `Downsample`."""

    def __init__(self, unet: UNetConfig, level: int) -> None:
        super().__init__()
        channels, layers = unet.channels[level], unet.layers[level]
        inputs = [unet.channels[max(level - 1, 0)]] + [channels] * (layers - 1)
        self.attentions = nn.ModuleList(SelfAttention(channels, unet) for _ in range(layers * unet.attention[level]))
        self.resnets = nn.ModuleList(ResNetLayer(width, channels, unet) for width in inputs)
        is_last = level == len(unet.channels) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(channels)])

    def forward(self, x: Tensor, time_embedding_Ue: Tensor) -> tuple[Tensor, Skips]:
        """Features [U, channels, rows, columns] -> those of the next level, skips."""
        skips: Skips = ()
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time_embedding_Ue)
            if self.attentions:
                x = self.attentions[index](x)
            skips += (x,)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips += (x,)
        return x, skips


class UpBlock(nn.Module):
    """One level of the upsampler: ResNet layers, each of which takes a skip (the last skip first), then an `Upsample`."""

    def __init__(self, unet: UNetConfig, level: int) -> None:
        super().__init__()
        channels, layers = unet.channels[level], unet.layers[level] + 1
        inputs = [unet.channels[min(level + 1, len(unet.channels) - 1)]] + [channels] * (layers - 1)
        skips = [channels] * (layers - 1) + [unet.channels[max(level - 1, 0)]]
        self.attentions = nn.ModuleList(SelfAttention(channels, unet) for _ in range(layers * unet.attention[level]))
        self.resnets = nn.ModuleList(ResNetLayer(x + skip, channels, unet) for x, skip in zip(inputs, skips, strict=True))
        self.upsamplers = nn.ModuleList([Upsample(channels)] if level else [])

    def forward(self, x: Tensor, skips: Skips, time_embedding_Ue: Tensor) -> Tensor:
        """Features [U, channels, rows, columns] -> those of the level above.

        Args:
            skips: the downsampler's skips of this level, in its order.
            time_embedding_Ue: [U, time_embed_dim].
        """
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[-1 - index]], dim=1), time_embedding_Ue)
            if self.attentions:
                x = self.attentions[index](x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class ResNetLayer(nn.Module):
    """Two convolutions and a residual connection; the timestep embedding is added between them."""

    def __init__(self, in_channels: int, channels: int, unet: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(unet.groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(unet.time_embed_dim, channels)
        self.norm2 = GroupNorm(unet.groups, channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, kernel_size=1) if in_channels != channels else None

    def forward(self, x: Tensor, time_embedding_Ue: Tensor) -> Tensor:
        """[U, in_channels, rows, columns] -> [U, channels, rows, columns]."""
        hidden = self.conv1(_conv_input(F.silu(self.norm1(x)), self.conv1))
        hidden = hidden + self.time_emb_proj(F.silu(time_embedding_Ue))[:, :, None, None]
        hidden = self.conv2(_conv_input(F.silu(self.norm2(hidden)), self.conv2))
        if self.conv_shortcut is not None:
            # In training on the CPU diffusers makes this copy; with it the numbers are equal bit for bit.
            x = self.conv_shortcut(x.contiguous() if self.training and x.device.type == "cpu" else x)
        return x + hidden


class SelfAttention(nn.Module):
    """Self-attention over the rows and columns of a block, with a residual connection."""

    def __init__(self, channels: int, unet: UNetConfig) -> None:
        super().__init__()
        self.heads = unet.num_heads
        self.group_norm = GroupNorm(unet.groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[U, channels, rows, columns] -> the same shape."""
        tokens_UPc = _conv_input(self.group_norm(x), self.to_q).flatten(2).transpose(1, 2)
        q, k, v = (rearrange(to(tokens_UPc), "u p (h k) -> u h p k", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        attended_UPc = rearrange(F.scaled_dot_product_attention(q, k, v), "u h p k -> u p (h k)")
        return self.to_out[0](attended_UPc).transpose(1, 2).unflatten(2, x.shape[2:]) + x


class Downsample(nn.Module):
    """Halves the rows and columns with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[U, channels, rows, columns] -> [U, channels, rows / 2, columns / 2]."""
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the rows and columns by nearest neighbours, followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[U, channels, rows, columns] -> [U, channels, 2 * rows, 2 * columns]."""
        if x.device.type == "cpu" and len(x) >= 64:
            x = x.contiguous()  # diffusers makes this copy; with it the numbers are equal bit for bit
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class GroupNorm(nn.GroupNorm):
    """Group norm that computes and returns float32 or wider. The input may be channels-last; the kernel never sees it so.

    The CPU's kernel for channels-last input has relative errors of up to 1e-2. So the input is flattened to three axes, which
    have no channels-last layout. CUDA has no kernel for channels-last input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[U, channels, rows, columns] -> the same shape."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        wide = x.to(dtype, memory_format=torch.contiguous_format) if x.device.type == "cuda" else x.to(dtype).flatten(2)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).view(x.shape)


def skip_shapes(unet: UNetConfig, block_size: int) -> list[tuple[int, int]]:
    """(channels, rows) of each skip of a block of `block_size` rows, in the downsampler's order."""
    shapes = [(unet.channels[0], block_size)]
    for level, (channels, layers) in enumerate(zip(unet.channels, unet.layers, strict=True)):
        rows = block_size // 2**level
        shapes += [(channels, rows)] * layers
        if level < len(unet.channels) - 1:
            shapes.append((channels, rows // 2))
    return shapes


class TextInterface(nn.Module):
    """The text tower's token embeddings, and its head for the next token. They do not share weights."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.norm = nn.RMSNorm(width, eps=1e-5) if config.final_norm else nn.Identity()
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of the next token, [B, T, V]."""
        return self.head(self.norm(x_BTD))


def null_text(config: TextConfig, batch: int, device: torch.device | str | None = None, length: int | None = None) -> Tensor:
    """Null texts [B, T]: prompts of padding only. The model sees them in place of dropped prompts.

    Args:
        batch: number of prompts (B).
        length: tokens of a prompt (T); None: `config.length`.
    """
    return torch.full(
        (batch, config.length if length is None else length), config.pad_token_id, dtype=torch.long, device=device
    )


def drop_text(text_BT: Tensor, config: TextConfig, generator: torch.Generator | None = None) -> Tensor:
    """Replace whole prompts by the null text with probability `config.dropout`, so that guidance works when sampling.

    Args:
        generator: draws on its own device, so that the draw is the same wherever the text is; None: torch's default.
    """
    device = generator.device if generator else text_BT.device
    dropped_B = torch.rand(len(text_BT), generator=generator, device=device) < config.dropout
    return torch.where(dropped_B.to(text_BT.device)[:, None], config.pad_token_id, text_BT)
