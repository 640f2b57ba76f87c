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
    """Cosines and signed sines for a tower's tokens, each [P, 1, K], and the form that says which dimensions are paired."""

    cos_P1K: Tensor
    sin_P1K: Tensor
    """The sine of a pair's first entry is negated: the rotation subtracts the second entry there."""
    form: Literal["axial", "released"]

    def part(self, start: int, end: int) -> Rope:
        """The angles of tokens start .. end - 1."""
        return Rope(self.cos_P1K[start:end], self.sin_P1K[start:end], self.form)

    def rotate(self, x_BPHK: Tensor) -> Tensor:
        """Rotate queries or keys, in their own dtype or float32, whichever is wider."""
        first, second = _pairs(x_BPHK, self.form)
        swapped_BPHK = torch.stack([second, first], dim=-2).flatten(-3)
        return x_BPHK * self.cos_P1K + swapped_BPHK * self.sin_P1K


def _pairs(x_K: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """First and second entries of the pairs that are rotated, [..., axes, K / axes / 2] each."""
    first, second = x_K.unflatten(-1, (2 if form == "axial" else 1, 2, -1)).unbind(-2)
    return first, second


def rope(positions_PA: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """Rotary angles of tokens.

    With `config.rope` = `axial` each axis rotates its half of the head, with frequencies 10000 ** (-2k / axis_dim), so that
    scores depend only on relative positions. `released` gives the released code's angles, whose pairs straddle the two axes;
    it is for released checkpoints only. A single axis has the whole head and the frequencies of `axial`.

    Args:
        positions_PA: positions on two axes (row, column), or on one: the released code's text.
        dtype: dtype of the sines and cosines; they are computed in float64 (float32 on MPS).
    """
    axes = positions_PA.shape[-1]
    axis_dim = config.head_width // axes
    exact = torch.float32 if positions_PA.device.type == "mps" else torch.float64
    steps = torch.arange(axis_dim // 2, dtype=exact, device=positions_PA.device)
    if config.rope == "axial" or axes == 1:
        frequencies = 10_000.0 ** (-2 * steps / axis_dim)
    else:
        side = config.block_rows * config.token_rows
        base = (int(8 * side / math.pi) // 100 + 1) * 100.0
        frequencies = base ** (-steps / max(axis_dim // 2 - 1, 1))
    angles_PAf = positions_PA[..., None].to(exact) * frequencies
    angles_PK = torch.cat([angles_PAf, angles_PAf], dim=-1).flatten(-2)
    first, second = _pairs(angles_PK.sin(), config.rope)
    sin_PK = torch.stack([-first, second], dim=-2).flatten(-3)
    return Rope(angles_PK.cos().to(dtype)[:, None], sin_PK.to(dtype)[:, None], config.rope)


class Context(Protocol):
    """Computes a layer's attention: `attention.TrainingContext` in training, `generation.CacheSlot` when sampling."""

    @property
    def queries(self) -> tuple[str, ...]:
        """Towers whose output is read; the others only give keys and values."""
        ...

    def attend(self, q: Towers, k: Towers, v: Towers) -> Towers:
        """Attention of every query tower, [B, H, P, K] each.

        Args:
            q: queries of the query towers, H heads each.
            k: keys of all towers that run, G heads each.
            v: values, as the keys.
        """
        ...


class RMSNorm(nn.RMSNorm):
    """RMS norm that computes and returns float32 or wider, also with bfloat16 weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


class Tower(nn.Module):
    """One parameter set of a layer: norms, query/key/value/output projections, SwiGLU."""

    gate_up: Tensor | None
    qk_scale: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        self.attention_norm = RMSNorm(config.width, eps=1e-5)
        self.qkv = nn.Linear(config.width, (config.num_heads + 2 * config.kv_heads) * config.head_width)
        self.q_norm = RMSNorm(config.head_width, eps=1e-6)
        self.k_norm = RMSNorm(config.head_width, eps=1e-6)
        self.out = nn.Linear(config.width, config.width)
        self.ffn_norm = RMSNorm(config.width, eps=1e-5)
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)
        self.register_buffer("gate_up", None, persistent=False)
        self.register_buffer("qk_scale", None, persistent=False)

    def join_weights(self, gate_and_up: bool) -> None:
        """Join weights for sampling: those of the query and key norms, and those of the gate and up projections if asked to."""
        if gate_and_up:
            self.gate_up = torch.cat([self.gate.weight, self.up.weight]).detach()
            gate, up = self.gate_up.chunk(2)  # the same memory
            self.gate.weight, self.up.weight = nn.Parameter(gate, requires_grad=False), nn.Parameter(up, requires_grad=False)
        scales = [self.q_norm.weight.expand(self.query_heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)]
        scale_HK = torch.cat(scales).detach()
        self.qk_scale = scale_HK.to(torch.promote_types(scale_HK.dtype, torch.float32))

    def project(self, x_BPD: Tensor, rope: Rope, with_queries: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries, keys and values, [B, heads, P, K] each.

        Args:
            rope: the angles of these tokens.
            with_queries: False: no query of the tower is needed, and None is returned in their place.
        """
        y_BPD = self._to_weights(self.attention_norm(x_BPD))
        query_heads = self.query_heads if with_queries else 0
        if with_queries:
            projected = self.qkv(y_BPD)
        else:
            rows = self.query_heads * self.head_width
            projected = F.linear(y_BPD, self.qkv.weight[rows:], self.qkv.bias[rows:])
        heads_BPHK = projected.unflatten(-1, (-1, self.head_width))
        # Norms and rotations are in float32 at least, also under autocast. Then the values' dtype again.
        if self.qk_scale is not None and with_queries:
            qk_BPHK, v_BPGK = heads_BPHK.split([query_heads + self.kv_heads, self.kv_heads], dim=2)
            wide_BPHK = qk_BPHK.to(self.qk_scale.dtype)
            normed_BPHK = F.rms_norm(wide_BPHK, (self.head_width,), eps=self.q_norm.eps) * self.qk_scale
            rotated_BHPK = rope.rotate(normed_BPHK).to(v_BPGK.dtype).transpose(1, 2)
            q_BHPK, k_BGPK = rotated_BHPK.split([query_heads, self.kv_heads], dim=1)
            return q_BHPK, k_BGPK, v_BPGK.transpose(1, 2)
        q_BPHK, k_BPGK, v_BPGK = heads_BPHK.split([query_heads, self.kv_heads, self.kv_heads], dim=2)
        k_BGPK = rope.rotate(self.k_norm(k_BPGK)).to(v_BPGK.dtype).transpose(1, 2)
        q_BHPK = rope.rotate(self.q_norm(q_BPHK)).to(v_BPGK.dtype).transpose(1, 2) if with_queries else None
        return q_BHPK, k_BGPK, v_BPGK.transpose(1, 2)

    def update(self, x_BPD: Tensor, attended_BHPK: Tensor) -> Tensor:
        """The residual stream after attention and SwiGLU."""
        x_BPD = x_BPD + self.out(rearrange(attended_BHPK, "b h p k -> b p (h k)"))
        y_BPD = self._to_weights(self.ffn_norm(x_BPD))
        if self.gate_up is not None:
            gate_BPF, up_BPF = F.linear(y_BPD, self.gate_up).chunk(2, dim=-1)
        else:
            gate_BPF, up_BPF = self.gate(y_BPD), self.up(y_BPD)
        return x_BPD + self.down(F.silu(gate_BPF) * up_BPF)

    def _to_weights(self, x_BPD: Tensor) -> Tensor:
        """A norm's output in the dtype of the projections that read it, cast once for all of them."""
        return x_BPD.to(autocast_dtype(x_BPD.device, self.out.weight.dtype))


class DecoderLayer(nn.Module):
    """One Transformer layer with a parameter set for each tower, or one that all share: DecoderBlock of Eq. 2 and 5."""

    def __init__(self, config: ModelConfig, towers: tuple[str, ...]) -> None:
        super().__init__()
        self.shared = config.parameter_sets == "shared"
        self.towers = nn.ModuleDict({name: Tower(config) for name in (("shared",) if self.shared else towers)})

    def tower(self, name: str) -> Tower:
        """The parameter set of a tower's tokens."""
        return cast(Tower, self.towers["shared" if self.shared else name])

    def forward(self, x: Towers, ropes: dict[str, Rope], context: Context) -> Towers:
        """Residual streams [B, P, D] of the key towers -> those of the query towers.

        Args:
            x: residual streams by tower.
            ropes: rotary angles by tower, for the same tokens.
            context: the keys and values to attend to.
        """
        q, k, v = {}, {}, {}
        for name, x_BPD in x.items():
            q_BHPK, k[name], v[name] = self.tower(name).project(x_BPD, ropes[name], name in context.queries)
            if q_BHPK is not None:
                q[name] = q_BHPK
        attended = context.attend(q, k, v)
        return {name: self.tower(name).update(x[name], attended[name]) for name in context.queries}


def autocast_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype in which linear layers compute now: autocast's, or `default`, the weights', without autocast."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else default
