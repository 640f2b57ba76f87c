"""One Transformer layer: Llama's (RMSNorm, rotary attention, SwiGLU), with a parameter set for each tower."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from madformer.config import ModelConfig
from madformer.model.attention import Towers


class Rope(NamedTuple):
    """Cosines and sines for a tower's tokens, each [P, K], and which dimensions are paired."""

    cos_PK: Tensor
    sin_PK: Tensor
    form: Literal["axial", "released"]

    def part(self, start: int, end: int) -> Rope:
        """The angles of tokens start .. end - 1."""
        return Rope(self.cos_PK[start:end], self.sin_PK[start:end], self.form)

    def rotate(self, x_BHPK: Tensor) -> Tensor:
        """Rotate queries or keys, in their own dtype or float32, whichever is wider."""
        axes = 2 if self.form == "axial" else 1
        first, second = x_BHPK.unflatten(-1, (axes, 2, -1)).unbind(-2)
        turned_BHPK = torch.stack([-second, first], dim=-2).flatten(-3)
        return x_BHPK * self.cos_PK + turned_BHPK * self.sin_PK


def rope(positions_P2: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """Angles for tokens at (row, column) positions.

    `axial`: each axis rotates within its half of the head, frequencies 10000 ** (-2k / axis_dim), so that scores depend
    on relative position alone. `released`: the released code's angles, whose pairs straddle the two axes; for its
    checkpoints only.
    """
    axis_dim = config.head_width // 2
    exact = torch.float32 if positions_P2.device.type == "mps" else torch.float64
    steps = torch.arange(axis_dim // 2, dtype=exact, device=positions_P2.device)
    if config.rope == "axial":
        frequencies = 10_000.0 ** (-2 * steps / axis_dim)
    else:
        side = config.block_rows * config.token_rows
        base = (int(8 * side / math.pi) // 100 + 1) * 100.0
        frequencies = base ** (-steps / max(axis_dim // 2 - 1, 1))
    angles_P2f = positions_P2[..., None].to(exact) * frequencies
    angles_PK = torch.cat([angles_P2f, angles_P2f], dim=-1).flatten(-2)
    return Rope(angles_PK.cos().to(dtype), angles_PK.sin().to(dtype), config.rope)


class Context(Protocol):
    """What a layer attends over: `attention.TrainingContext` in training, `generation.CacheSlot` when sampling."""

    @property
    def queries(self) -> tuple[str, ...]:
        """Towers whose output is read; the others give keys and values alone."""
        ...

    def attend(self, q: Towers, k: Towers, v: Towers) -> Towers:
        """Attention of every query tower."""
        ...


class Tower(nn.Module):
    """One parameter set of a layer: norms, query/key/value/output projections, SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.qkv = nn.Linear(config.width, (config.num_heads + 2 * config.kv_heads) * config.head_width)
        self.q_norm = nn.RMSNorm(config.head_width, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_width, eps=1e-6)
        self.out = nn.Linear(config.width, config.width)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def project(self, x_BPD: Tensor, rope: Rope, with_queries: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (None without), keys and values, [B, heads, P, K] each."""
        x_BPD = self.attention_norm(x_BPD)
        skipped = 0 if with_queries else self.query_heads
        rows = skipped * self.head_width
        heads_BHPK = rearrange(
            F.linear(x_BPD, self.qkv.weight[rows:], self.qkv.bias[rows:]), "b p (h k) -> b h p k", k=self.head_width
        )
        q, k, v = heads_BHPK.split([self.query_heads - skipped, self.kv_heads, self.kv_heads], dim=1)
        return self._place(q, self.q_norm, rope) if with_queries else None, self._place(k, self.k_norm, rope), v

    @staticmethod
    def _place(x_BHPK: Tensor, norm: nn.RMSNorm, rope: Rope) -> Tensor:
        """Normalise and rotate in the weights' precision also under autocast, then go back to the values' dtype."""
        return rope.rotate(norm(x_BHPK.to(norm.weight.dtype))).to(x_BHPK.dtype)

    def update(self, x_BPD: Tensor, attended_BHPK: Tensor) -> Tensor:
        """The residual stream after attention and SwiGLU."""
        x_BPD = x_BPD + self.out(rearrange(attended_BHPK, "b h p k -> b p (h k)"))
        y_BPD = self.ffn_norm(x_BPD)
        return x_BPD + self.down(F.silu(self.gate(y_BPD)) * self.up(y_BPD))


class DecoderLayer(nn.Module):
    """DecoderBlock of Eq. 2 and 5."""

    def __init__(self, config: ModelConfig, towers: tuple[str, ...]) -> None:
        super().__init__()
        self.shared = config.parameter_sets == "shared"
        self.towers = nn.ModuleDict({name: Tower(config) for name in (("shared",) if self.shared else towers)})

    def tower(self, name: str) -> Tower:
        """The parameter set of a tower's tokens."""
        return cast(Tower, self.towers["shared" if self.shared else name])

    def forward(self, x: Towers, ropes: dict[str, Rope], context: Context) -> Towers:
        """Residual streams [B, P, D] of the key towers -> those of the query towers."""
        q, k, v = {}, {}, {}
        for name, x_BPD in x.items():
            q_BHPK, k[name], v[name] = self.tower(name).project(x_BPD, ropes[name], name in context.queries)
            if q_BHPK is not None:
                q[name] = q_BHPK
        attended = context.attend(q, k, v)
        return {name: self.tower(name).update(x[name], attended[name]) for name in context.queries}


def autocast_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype that linear layers compute in here: autocast's, or the weights'."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else default
