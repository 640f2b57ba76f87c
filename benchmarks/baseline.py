"""The released formulation, written anew over the weights of a MADFormer: the baseline of the benchmarks.

Clean and noisy blocks are one sequence, the clean ones first, and a type mask tells the tower of every token. Each norm,
projection and SwiGLU gathers its tower's tokens with the mask and concatenates the results. Training runs all clean
blocks through all of every layer, and the upsampler three times. Sampling runs the previous clean block together with the
noisy one at every denoising step. The results equal ours, the work does not. Tensor names are as in `madformer.model`; here P
counts the tokens of both towers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention, silu

from madformer.config import ModelConfig
from madformer.model.embedding import Skips, token_positions
from madformer.model.layer import DecoderLayer, Tower
from madformer.model.madformer import AUXILIARY_TIMESTEP, MADFormer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, H, tokens, K] -> attended [B, H, P, K]."""

KeysValues = tuple[Tensor, Tensor]
CLEAN, NOISE = 0, 1


class Rotation(NamedTuple):
    """Cosines and sines by token, axis and frequency, [P, 1, 2, K / 4]: the 1 is for the heads."""

    cos_P1af: Tensor
    sin_P1af: Tensor

    def __call__(self, x_BPHK: Tensor) -> Tensor:
        """Rotate each axis within its half of the head."""
        first, second = x_BPHK.unflatten(-1, (2, 2, -1)).unbind(-2)
        cos, sin = self
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-3)


class BaselineLayer(nn.Module):
    """A layer with our weights: every operation of a tower gathers, computes and concatenates."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.towers = nn.ModuleList([layer.tower("clean"), layer.tower("noise")])

    def forward(
        self, x_BPD: Tensor, types_P: Tensor, rotation: Rotation, attend: Attend, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """The residual stream, and the keys and values of `past` and of all tokens."""

        def each(function: Callable[[Tower, Tensor], Tensor], x_BP: Tensor) -> Tensor:
            towers = (cast(Tower, tower) for tower in self.towers)
            return torch.cat([function(tower, x_BP[:, types_P == kind]) for kind, tower in enumerate(towers)], dim=1)

        y_BPD = each(lambda tower, x: tower.attention_norm(x), x_BPD)
        qkv = each(lambda tower, x: tower.qkv(x), y_BPD)
        head_width = cast(Tower, self.towers[0]).head_width
        q, k, v = rearrange(qkv, "b p (qkv h k) -> qkv b p h k", qkv=3, k=head_width)
        # Norms and rotations are in the weights' precision also under autocast, as in ours.
        q = rotation(each(lambda tower, x: tower.q_norm(x.to(x_BPD.dtype)), q)).to(v.dtype)
        k = rotation(each(lambda tower, x: tower.k_norm(x.to(x_BPD.dtype)), k)).to(v.dtype)
        q, k, v = (rearrange(x, "b p h k -> b h p k") for x in (q, k, v))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended_BPD = rearrange(attend(q, k, v), "b h p k -> b p (h k)")
        x_BPD = x_BPD + each(lambda tower, x: tower.out(x), attended_BPD)
        y_BPD = each(lambda tower, x: tower.ffn_norm(x), x_BPD)
        return x_BPD + each(lambda tower, x: tower.down(silu(tower.gate(x)) * tower.up(x)), y_BPD), (k, v)


class Baseline:
    """Training forward and sampling over the weights of `model`."""

    def __init__(self, model: MADFormer) -> None:
        config = self.config = model.config
        _check(config)
        self.model, self.device = model, model.boi_SD.device
        self.layers = [BaselineLayer(cast(DecoderLayer, layer)) for layer in model.layers]
        if config.compile is True:
            for layer in self.layers:
                layer.compile()
        self.rotation = _rotation(config, self.device)

    def forward(
        self, clean_BLCYX: Tensor, noisy_BLCYX: Tensor, t_BL: Tensor, attention: Literal["dense", "sparse"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The training forward. It always computes all three: denoised blocks, condition and clean tower.

        The condition takes its own block's skips, ours the previous block's. The work is the same, the results are not.
        """
        config, tokens = self.config, self.config.ar_length * self.config.block_tokens
        types_P = self._types(tokens, tokens)
        rotation = Rotation(*(torch.cat([angles, angles]) for angles in self.rotation))
        attend = _sparse(config, self.device) if attention == "sparse" else _dense(config, self.device)

        clean_t_BL = torch.zeros_like(t_BL)
        clean_BPD, clean_skips = self.model.embed(clean_BLCYX, clean_t_BL)
        noisy_BPD, noisy_skips = self.model.embed(noisy_BLCYX, t_BL)
        boi_BSD = self.model.boi_SD.expand(len(clean_BPD), -1, -1)
        x_BPD = torch.cat([clean_BPD, boi_BSD, clean_BPD[:, : -config.block_tokens]], dim=1)
        for layer in self.layers[: config.ar_depth]:
            x_BPD, _ = layer(x_BPD, types_P, rotation, attend)
        condition_BPD = x_BPD[:, types_P == NOISE]
        noise_BPD = noisy_BPD + condition_BPD
        x_BPD = torch.cat([x_BPD[:, types_P == CLEAN], noise_BPD], dim=1)
        for layer in self.layers[config.ar_depth :]:
            x_BPD, _ = layer(x_BPD, types_P, rotation, attend)

        denoised_BLCYX = self.model.unembed(x_BPD[:, types_P == NOISE], t_BL, noisy_skips)
        auxiliary_t_BL = torch.full_like(clean_t_BL, AUXILIARY_TIMESTEP)
        condition_BLCYX = self.model.unembed(condition_BPD, auxiliary_t_BL, clean_skips)
        clean_tower_BLCYX = self.model.unembed(x_BPD[:, types_P == CLEAN], auxiliary_t_BL, clean_skips)
        return denoised_BLCYX, condition_BLCYX, clean_tower_BLCYX

    @torch.no_grad()
    def generate(self, scheduler: Any, steps: int, initial_noise_BLCYX: Tensor) -> Tensor:
        """Sample block by block. The previous clean block runs again at every denoising step."""
        config, latents = self.config, list[Tensor]()
        ar_stage, diffusion_stage = slice(0, config.ar_depth), slice(config.ar_depth, config.depth)
        past: list[KeysValues | None] = [None] * config.depth
        for block in range(config.ar_length):
            scheduler.set_timesteps(steps)
            boi_BSD = self.model.boi_SD.expand(len(initial_noise_BLCYX), -1, -1)
            clean_BSD = self._embed(latents[-1], 0)[0] if latents else boi_BSD[:, :0]
            context = types_P, *_ = self._sampling_context(block)
            x_BPD = torch.cat([clean_BSD, clean_BSD if latents else boi_BSD], dim=1)
            x_BPD, seen = self._run(ar_stage, x_BPD, context, past)
            clean_BSD, condition_BSD = x_BPD[:, types_P == CLEAN], x_BPD[:, types_P == NOISE]
            noisy_BCYX = initial_noise_BLCYX[:, block] * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                noise_BSD, skips = self._embed(scheduler.scale_model_input(noisy_BCYX, t), t)
                x_BPD = torch.cat([clean_BSD, noise_BSD + condition_BSD], dim=1)
                x_BPD, seen_again = self._run(diffusion_stage, x_BPD, context, past)
                prediction_BCYX = self._unembed(x_BPD[:, types_P == NOISE], t, skips)
                noisy_BCYX = scheduler.step(prediction_BCYX, t, noisy_BCYX).prev_sample
            latents.append(noisy_BCYX)
            # Of the clean blocks alone, without the noisy one.
            end = block * config.block_tokens
            past = [(keys[:, :, :end], values[:, :, :end]) for keys, values in seen + seen_again]
        return torch.stack(latents, dim=1)

    def _sampling_context(self, block: int) -> tuple[Tensor, Rotation, Attend]:
        """Types, positions and attention of [previous clean block, noisy block]; the first block has no previous one."""
        size = self.config.block_tokens
        clean, start = (size if block else 0), block * size
        mask_PM = torch.ones(clean + size, start + size, dtype=torch.bool, device=self.device)
        mask_PM[:clean, start:] = False
        rotation = Rotation(*(angles[start - clean : start + size] for angles in self.rotation))
        return self._types(clean, size), rotation, functools.partial(scaled_dot_product_attention, attn_mask=mask_PM)

    def _run(
        self,
        layers: slice,
        x_BPD: Tensor,
        context: tuple[Tensor, Rotation, Attend],
        past: list[KeysValues | None],
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run tokens through some layers when sampling; also returns all keys and values that each layer saw."""
        seen = []
        for layer, layer_past in zip(self.layers[layers], past[layers], strict=True):
            x_BPD, keys_values = layer(x_BPD, *context, layer_past)
            seen.append(keys_values)
        return x_BPD, seen

    def _types(self, clean: int, noisy: int) -> Tensor:
        # On the meta device the mask needs values, since the number of gathered tokens depends on them.
        device = "cpu" if self.device.type == "meta" else self.device
        return torch.tensor([CLEAN] * clean + [NOISE] * noisy, device=device)

    def _timesteps(self, batch: int, t: Tensor | int) -> Tensor:
        return torch.full((batch, 1), float(t), device=self.device)

    def _embed(self, latents_BCYX: Tensor, t: Tensor | int) -> tuple[Tensor, Skips]:
        return self.model.embed(latents_BCYX[:, None], self._timesteps(len(latents_BCYX), t))

    def _unembed(self, tokens_BSD: Tensor, t: Tensor, skips: Skips) -> Tensor:
        return self.model.unembed(tokens_BSD, self._timesteps(len(tokens_BSD), t), skips)[:, 0]


def _check(config: ModelConfig) -> None:
    """Refuse models other than the released FFHQ one, with our RoPE and our timesteps of clean blocks and auxiliary outputs."""
    known = {
        "text": None,
        "use_clean_blocks": True,
        "use_condition": True,
        "local_denoising": False,
        "parameter_sets": "separate",
        "rope": "axial",
        "clean_timestep": "zero",
        "kv_heads": config.num_heads,
    }
    for name, value in known.items():
        if getattr(config, name) != value:
            raise ValueError(f"model.{name} = {getattr(config, name)!r}: the baseline knows {value!r} alone")


def _rotation(config: ModelConfig, device: torch.device) -> Rotation:
    positions_P2 = token_positions(config, device).flatten(0, 1).to(torch.float64)
    pairs = config.head_width // 4
    frequencies = torch.tensor([10_000.0 ** (-pair / pairs) for pair in range(pairs)], dtype=torch.float64, device=device)
    angles_P1af = (positions_P2[..., None] * frequencies)[:, None]
    return Rotation(angles_P1af.cos().float(), angles_P1af.sin().float())


# ---- attention in training


def _sees(config: ModelConfig) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """Whether token q of [clean, noisy] sees token k, as FlexAttention asks it (batch and head do not matter)."""
    tokens, size = config.ar_length * config.block_tokens, config.block_tokens

    def sees(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        query, key = (q % tokens) // size, (k % tokens) // size
        earlier_clean = (k < tokens) & (key < query)
        same_block = ((q < tokens) == (k < tokens)) & (key == query)
        return earlier_clean | same_block

    return sees


@functools.cache
def _dense(config: ModelConfig, device: torch.device) -> Attend:
    """One call with a boolean mask over all [2 L S, 2 L S] pairs. Masked work is computed and discarded."""
    tokens_P = torch.arange(2 * config.ar_length * config.block_tokens, device=device)
    mask_PP = _sees(config)(None, None, tokens_P[:, None], tokens_P[None])
    return functools.partial(scaled_dot_product_attention, attn_mask=mask_PP)


@functools.cache
def _sparse(config: ModelConfig, device: torch.device) -> Attend:
    """Attention without masked work: FlexAttention on CUDA, elsewhere a call for each block over the keys that it sees."""
    if device.type != "cuda":
        return functools.partial(_attend_by_block, size=config.block_tokens)
    tokens = 2 * config.ar_length * config.block_tokens
    block_mask = create_block_mask(_sees(config), None, None, tokens, tokens, device=device.type)
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)


def _attend_by_block(q_BHPK: Tensor, k_BHPK: Tensor, v_BHPK: Tensor, size: int) -> Tensor:
    tokens = q_BHPK.shape[2] // 2

    def seen(x_BHPK: Tensor, tower: int, start: int) -> Tensor:
        if tower == CLEAN:
            return x_BHPK[:, :, : start + size]
        noisy_block = x_BHPK[:, :, tokens + start : tokens + start + size]
        return torch.cat([x_BHPK[:, :, :start], noisy_block], dim=2)

    attended = []
    for tower, start in itertools.product((CLEAN, NOISE), range(0, tokens, size)):
        first = tower * tokens + start
        queries, keys, values = q_BHPK[:, :, first : first + size], seen(k_BHPK, tower, start), seen(v_BHPK, tower, start)
        attended.append(scaled_dot_product_attention(queries, keys, values))
    return torch.cat(attended, dim=2)
