"""Attention across towers: which tokens see which, and two backends that skip the masked work.

    text token       earlier text tokens and itself
    clean block i    all text, clean blocks <= i
    noisy block i    all text, clean blocks < i, itself        (without clean blocks: noisy blocks <= i)

Attention inside a block is full. In a `local` layer an image block sees all text and itself. The noise tower has `draws`
sequences per image; they do not see each other. A tower is a tensor [B, heads, P, K]; with k draws the noise tower's batch
is B * k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from madformer.config import MIN_FLEX_HEAD_WIDTH, ModelConfig
from madformer.model.layer_plan import LayerPlan

Towers = dict[str, Tensor]
"""Tensors by tower name, in the order of `layer_plan.TOWERS`."""


@dataclass
class TrainingContext:
    """Context of a layer in training: all blocks of the image at once."""

    plan: LayerPlan
    block_mask: BlockMask | None = None
    """FlexAttention's mask; None selects scaled_dot_product_attention."""

    @property
    def queries(self) -> tuple[str, ...]:
        """Towers whose output is read."""
        return self.plan.queries

    def attend(self, q: Towers, k: Towers, v: Towers) -> Towers:
        """Attention of every query tower, [B, H, P, K] each.

        Args:
            q: queries of the query towers, H heads each.
            k: keys of all towers of the plan, G heads each.
            v: values, as the keys.
        """
        plan = self.plan
        if self.block_mask is not None:
            queries, keys, values = (_join_towers(x, plan) for x in (q, k, v))
            grouped = queries.shape[1] != keys.shape[1]
            # A compiled layer compiles FlexAttention as a part of it.
            flex = cast("Callable[..., Tensor]", flex_attention) if is_compiling() else _compiled_flex_attention()
            return _split_towers(flex(queries, keys, values, block_mask=self.block_mask, enable_gqa=grouped), plan)
        attended: Towers = {}
        for tower, q_BHPK in q.items():
            if tower == "text":
                attended[tower] = sdpa(q_BHPK, k[tower], v[tower], causal=True)
            elif plan.local:  # one call; blocks are a batch axis
                keys, values = (_text_and_itself(x, tower, plan) for x in (k, v))
                attended[tower] = _unfold_blocks(sdpa(_fold_blocks(q_BHPK, plan), keys, values), len(q_BHPK))
            else:  # one call for each block, over exactly the keys that it sees
                k_past, v_past = (_text_and_past(x, plan) for x in (k, v))
                calls = [
                    sdpa(
                        _block(q_BHPK, block, plan),
                        _visible(k_past, k[tower], tower, block, plan),
                        _visible(v_past, v[tower], tower, block, plan),
                    )
                    for block in range(q_BHPK.shape[2] // plan.block_tokens)
                ]
                attended[tower] = torch.cat(calls, dim=2)
        return attended


@functools.lru_cache(maxsize=256)
def training_context(plan: LayerPlan, backend: str, device: torch.device) -> TrainingContext:
    """The context in which a layer with this plan runs; made once for each plan.

    Args:
        backend: `flex` or `sdpa`, as `choose_backend` returns it.
    """
    return TrainingContext(plan, _block_mask(plan, device) if backend == "flex" else None)


def choose_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of the configuration. `auto` takes FlexAttention on CUDA if its kernels support the head width and dtype.

    Args:
        dtype: the dtype of queries, keys and values.

    Raises:
        ValueError: FlexAttention on the CPU, in training or inside compiled layers. Torch supports neither.
    """
    if config.attention_backend != "auto":
        cannot = "train" if torch.is_grad_enabled() else "be part of compiled layers" if config.compile is True else ""
        if config.attention_backend == "flex" and device.type == "cpu" and cannot:
            raise ValueError(f"model.attention_backend = 'flex': cannot {cannot} on the CPU; set it to sdpa or auto")
        return config.attention_backend
    fits = config.head_width >= MIN_FLEX_HEAD_WIDTH and dtype != torch.float64
    return "flex" if device.type == "cuda" and fits else "sdpa"


def configure_dynamo() -> None:
    """Set torch.compile's limits for this model, whose layers are compiled one by one.

    A layer is compiled for each combination of attention pattern, batch size, and training or sampling. Past its limit torch
    silently runs the layer uncompiled. DDP's own optimiser is off, as it would split each layer into several graphs.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    torch._dynamo.config.optimize_ddp = False


def sdpa(q_BHPK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, causal: bool = False) -> Tensor:
    """Attention without a mask tensor. Groups of query heads share a key/value head.

    Args:
        q_BHPK: queries; H is a multiple of G.
        causal: query i sees keys 0 .. i; for text.
    """
    groups = q_BHPK.shape[1] // k_BGMK.shape[1]
    grouped = groups > 1
    if grouped and q_BHPK.device.type == "cuda" and q_BHPK.dtype == torch.float32:
        # In float32, CUDA's only kernel that keeps no scores needs as many key heads as query heads.
        k_BGMK, v_BGMK = (x.repeat_interleave(groups, dim=1) for x in (k_BGMK, v_BGMK))
        grouped = False
    return scaled_dot_product_attention(q_BHPK, k_BGMK, v_BGMK, is_causal=causal, enable_gqa=grouped)


# ---- keys and values for scaled_dot_product_attention: exactly the visible ones


def _block(x_BHPK: Tensor, block: int, plan: LayerPlan) -> Tensor:
    return x_BHPK[:, :, block * plan.block_tokens : (block + 1) * plan.block_tokens]


def _text_and_past(x: Towers, plan: LayerPlan) -> Tensor:
    """Keys (or values) of the text, followed by those of the context tower. A block sees a slice of them."""
    past = x[plan.context_tower]
    return torch.cat([_repeat_batch(x["text"], len(past) // len(x["text"])), past], dim=2) if "text" in x else past


def _visible(past_BGMK: Tensor, tower_BGPK: Tensor, tower: str, block: int, plan: LayerPlan) -> Tensor:
    """The keys (or values) that a block of a tower sees: a slice of `_text_and_past`, and the block's own."""
    end = plan.text_tokens + block * plan.block_tokens
    if tower == plan.context_tower:
        return past_BGMK[:, :, : end + plan.block_tokens]
    block_BGSK = _block(tower_BGPK, block, plan)
    if not end:
        return block_BGSK
    return torch.cat([_repeat_batch(past_BGMK[:, :, :end], len(block_BGSK) // len(past_BGMK)), block_BGSK], dim=2)


def _text_and_itself(x: Towers, tower: str, plan: LayerPlan) -> Tensor:
    """Keys (or values) of the text and one block, [B * L, G, T + S, K]."""
    blocks = _fold_blocks(x[tower], plan)
    return torch.cat([_repeat_batch(x["text"], len(blocks) // len(x["text"])), blocks], dim=2) if "text" in x else blocks


def _fold_blocks(x_BHPK: Tensor, plan: LayerPlan) -> Tensor:
    return rearrange(x_BHPK, "b h (l s) k -> (b l) h s k", s=plan.block_tokens)


def _unfold_blocks(x: Tensor, batch: int) -> Tensor:
    return rearrange(x, "(b l) h s k -> b h (l s) k", b=batch)


def _repeat_batch(x_BHPK: Tensor, times: int) -> Tensor:
    return x_BHPK if times == 1 else repeat(x_BHPK, "b h p k -> (b times) h p k", times=times)


# ---- FlexAttention: one call, which skips fully masked tiles


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    configure_dynamo()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _join_towers(x: Towers, plan: LayerPlan) -> Tensor:
    """All towers as one sequence, text first; the draws of an image one after the other."""
    draws = plan.draws
    parts = [rearrange(y, "(b d) h p k -> b h (d p) k", d=draws) if tower == "noise" else y for tower, y in x.items()]
    return torch.cat(parts, dim=2)


def _split_towers(attended_BHPK: Tensor, plan: LayerPlan) -> Towers:
    """The inverse of `_join_towers`, for the query towers."""
    tokens = [plan.tokens(tower) for tower in plan.queries]
    parts = dict(zip(plan.queries, attended_BHPK.split(tokens, dim=2), strict=True))
    if "noise" in parts:
        parts["noise"] = rearrange(parts["noise"], "b h (d p) k -> (b d) h p k", d=plan.draws)
    return parts


def _block_mask(plan: LayerPlan, device: torch.device) -> BlockMask:
    # The mask is cached. Training must be able to use it even if validation, under inference mode, makes it.
    with torch.inference_mode(False), torch.no_grad():
        queries, keys = (_token_table(plan, towers, device) for towers in (plan.queries, plan.keys))

        def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            return _sees(plan, tuple(column[q_index] for column in queries), tuple(column[k_index] for column in keys))

        return create_block_mask(mask_mod, None, None, len(queries[0]), len(keys[0]), device=str(device))


def dense_mask(plan: LayerPlan, device: torch.device | str = "cpu") -> Tensor:
    """Which query tokens see which keys, a boolean matrix [queries, keys]. For pictures and tests."""
    queries, keys = _token_table(plan, plan.queries, device), _token_table(plan, plan.keys, device)
    return _sees(plan, tuple(column[:, None] for column in queries), keys)


_TEXT, _CLEAN, _NOISE = range(3)


def _token_table(plan: LayerPlan, towers: tuple[str, ...], device: torch.device | str) -> tuple[Tensor, ...]:
    """Kind, place (text: index, image: block) and noise draw of every token: three columns [tokens]."""
    size = plan.block_tokens
    rows = {
        "text": [(_TEXT, token, 0) for token in range(plan.text_tokens)],
        "clean": [(_CLEAN, block, 0) for block in range(plan.clean_blocks) for _ in range(size)],
        "noise": [
            (_NOISE, block, draw) for draw in range(plan.draws) for block in range(plan.noisy_blocks) for _ in range(size)
        ],
    }
    columns = zip(*(row for tower in towers for row in rows[tower]), strict=True)
    return tuple(torch.tensor(column, dtype=torch.int32, device=device) for column in columns)


def _sees(plan: LayerPlan, query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """Whether query tokens see key tokens. Both are entries of `_token_table` that broadcast against each other."""
    (q_kind, q_place, q_draw), (k_kind, k_place, k_draw) = query, key
    earlier = _CLEAN if plan.context_tower == "clean" else _NOISE
    sees_text = (k_kind == _TEXT) & ((q_kind != _TEXT) | (k_place <= q_place))
    sees_itself = (k_kind == q_kind) & (k_place == q_place) & (k_draw == q_draw)
    same_draw = (k_kind == _CLEAN) | (k_draw == q_draw)
    sees_earlier = (q_kind != _TEXT) & (k_kind == earlier) & (k_place < q_place) & same_draw
    return sees_text | sees_itself if plan.local else sees_text | sees_itself | sees_earlier
