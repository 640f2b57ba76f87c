"""One Transformer layer: Llama's (RMSNorm, attention, SwiGLU), with a parameter set for each tower and shared attention."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from madformer.config import ModelConfig
from madformer.model.attention import Towers
from madformer.model.rope import Rope


class Context(Protocol):
    """What a layer attends over: `attention.TrainingContext` in training, `cache.Slot` when sampling."""

    @property
    def queries(self) -> tuple[str, ...]:
        """Towers whose output is needed; the other ones only give keys and values."""
        ...

    def attend(self, queries: Towers, keys: Towers, values: Towers) -> Towers:
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

    def project(self, x_BND: Tensor, rope: Rope, with_queries: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (if wanted), keys and values, [B, heads, N, K] each."""
        x_BND = self.attention_norm(x_BND)
        skipped = 0 if with_queries else self.query_heads
        rows = skipped * self.head_width
        heads_BHNK = rearrange(
            F.linear(x_BND, self.qkv.weight[rows:], self.qkv.bias[rows:]), "b n (h k) -> b h n k", k=self.head_width
        )
        q, k, v = heads_BHNK.split([self.query_heads - skipped, self.kv_heads, self.kv_heads], dim=1)
        return self._place(q, self.q_norm, rope) if with_queries else None, self._place(k, self.k_norm, rope), v

    @staticmethod
    def _place(x_BHNK: Tensor, norm: nn.RMSNorm, rope: Rope) -> Tensor:
        """Normalise and rotate in the weights' precision also under autocast, then go back to the values' dtype."""
        return rope.rotate(norm(x_BHNK.to(norm.weight.dtype))).to(x_BHNK.dtype)

    def update(self, x_BND: Tensor, attended_BHNK: Tensor) -> Tensor:
        """The residual stream after attention and SwiGLU."""
        x_BND = x_BND + self.out(rearrange(attended_BHNK, "b h n k -> b n (h k)"))
        y_BND = self.ffn_norm(x_BND)
        return x_BND + self.down(F.silu(self.gate(y_BND)) * self.up(y_BND))


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
        """Residual streams [B, N, D] of the key towers -> those of the query towers."""
        queries, keys, values = {}, {}, {}
        for name, x_BND in x.items():
            q, keys[name], values[name] = self.tower(name).project(x_BND, ropes[name], name in context.queries)
            if q is not None:
                queries[name] = q
        attended = context.attend(queries, keys, values)
        return {name: self.tower(name).update(x[name], attended[name]) for name in context.queries}


def autocast_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype that linear layers compute in here: autocast's, or the weights'."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else default
