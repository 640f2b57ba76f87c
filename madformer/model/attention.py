"""Attention across towers: who sees whom, and two backends that compute it without the masked work.

    text token       earlier text tokens and itself
    clean block i    all text, clean blocks <= i
    noisy block i    all text, clean blocks < i, itself        (without clean blocks: noisy blocks <= i)

Attention inside a block is full. `local`: an image block sees all text and itself. The noise tower comes as `draws`
sequences per image, which do not see each other. A tower is a tensor [B, heads, N, K]; with k draws the noise tower's
batch is B * k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from madformer.config import MIN_FLEX_HEAD_WIDTH, ModelConfig

Towers = dict[str, Tensor]
"""Tensors by tower name, in the order of `plan.TOWERS`."""


@dataclass(frozen=True)
class AttentionPattern:
    """The attention pattern of a layer in training: shapes alone, so masks are cached by it."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    text_tokens: int
    clean_blocks: int
    noisy_blocks: int
    block_tokens: int
    draws: int = 1
    local: bool = False

    def tokens(self, tower: str) -> int:
        """Tokens of a tower per image, all draws together."""
        blocks = {"clean": self.clean_blocks, "noise": self.noisy_blocks * self.draws}
        return self.text_tokens if tower == "text" else blocks[tower] * self.block_tokens


@dataclass
class TrainingContext:
    """Context of a layer in training: all blocks of the image at once."""

    pattern: AttentionPattern
    block_mask: BlockMask | None = None
    """FlexAttention's mask; None selects scaled_dot_product_attention."""

    @property
    def queries(self) -> tuple[str, ...]:
        """Towers whose output is needed."""
        return self.pattern.queries

    def attend(self, queries: Towers, keys: Towers, values: Towers) -> Towers:
        """Attention of every query tower, [B, H, N, K] each; keys and values have G heads."""
        if self.block_mask is None:
            return _sdpa_attention(queries, keys, values, self.pattern)
        return _flex_attention(queries, keys, values, self.pattern, self.block_mask)


def training_context(pattern: AttentionPattern, backend: str, device: torch.device) -> TrainingContext:
    """The context of a layer with a backend, `flex` or `sdpa`."""
    return TrainingContext(pattern, _block_mask(pattern, device) if backend == "flex" else None)


def choose_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that the configuration names; `auto`: FlexAttention on CUDA, where its kernels take head and dtype.

    Raises:
        ValueError: FlexAttention on the CPU in training, or inside compiled layers: torch can do neither.
    """
    if config.attention_backend != "auto":
        cannot = "train" if torch.is_grad_enabled() else "be part of compiled layers" if config.compile else ""
        if config.attention_backend == "flex" and device.type == "cpu" and cannot:
            raise ValueError(f"model.attention_backend = 'flex': cannot {cannot} on the CPU; set it to sdpa or auto")
        return config.attention_backend
    fits = config.head_width >= MIN_FLEX_HEAD_WIDTH and dtype != torch.float64
    return "flex" if device.type == "cuda" and fits else "sdpa"


def allow_many_shapes() -> None:
    """Lift the number of shapes that torch.compile takes per function: past it, it silently runs uncompiled.

    Every combination of layer pattern, batch size and training or sampling is a shape.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)


def sdpa(q_BHNK: Tensor, k_BGMK: Tensor, v_BGMK: Tensor, causal: bool = False) -> Tensor:
    """Attention without a mask tensor; key/value heads are shared by groups of query heads."""
    grouped = q_BHNK.shape[1] != k_BGMK.shape[1]
    return scaled_dot_product_attention(q_BHNK, k_BGMK, v_BGMK, is_causal=causal, enable_gqa=grouped)


# ---- scaled_dot_product_attention: one unmasked call for each block of queries


def _sdpa_attention(q: Towers, k: Towers, v: Towers, pattern: AttentionPattern) -> Towers:
    attended = {}
    if "text" in q:
        attended["text"] = sdpa(q["text"], k["text"], v["text"], causal=True)
    for tower in ("clean", "noise"):
        if tower in q:
            attend = _attend_itself if pattern.local else _attend_before
            attended[tower] = attend(tower, q[tower], k, v, pattern)
    return attended


def _attend_itself(tower: str, q_BHNK: Tensor, k: Towers, v: Towers, pattern: AttentionPattern) -> Tensor:
    """Text and the block itself: blocks are a batch axis."""
    blocks = q_BHNK.shape[2] // pattern.block_tokens

    def fold(x_BHNK: Tensor) -> Tensor:
        return rearrange(x_BHNK, "b h (l s) k -> (b l) h s k", l=blocks)

    def with_text(x: Towers) -> Tensor:
        own = fold(x[tower])
        return own if "text" not in x else torch.cat([_repeat_batch(x["text"], len(own) // len(x["text"])), own], dim=2)

    attended = sdpa(fold(q_BHNK), with_text(k), with_text(v))
    return rearrange(attended, "(b l) h s k -> b h (l s) k", l=blocks)


def _attend_before(tower: str, q_BHNK: Tensor, k: Towers, v: Towers, pattern: AttentionPattern) -> Tensor:
    """Text, earlier blocks, the block itself: one call for each block, over exactly the keys that it sees."""
    size, text = pattern.block_tokens, k["text"].shape[2] if "text" in k else 0
    earlier = "clean" if "clean" in k else "noise"
    k_context, v_context = (_after_text(x, earlier) for x in (k, v))

    def visible(context: Tensor, own: Tensor, start: int) -> Tensor:
        if tower == earlier:
            return context[:, :, : text + start + size]
        own = own[:, :, start : start + size]
        seen = _repeat_batch(context[:, :, : text + start], len(own) // len(context))
        return torch.cat([seen, own], dim=2) if seen.shape[2] else own

    attended = []
    for start in range(0, q_BHNK.shape[2], size):
        keys, values = visible(k_context, k[tower], start), visible(v_context, v[tower], start)
        attended.append(sdpa(q_BHNK[:, :, start : start + size], keys, values))
    return torch.cat(attended, dim=2)


def _after_text(x: Towers, tower: str) -> Tensor:
    """A tower's keys (values) behind those of the text, so that what a block sees is a slice."""
    if "text" not in x:
        return x[tower]
    return torch.cat([_repeat_batch(x["text"], len(x[tower]) // len(x["text"])), x[tower]], dim=2)


def _repeat_batch(x_BHNK: Tensor, times: int) -> Tensor:
    return x_BHNK if times == 1 else repeat(x_BHNK, "b h n k -> (b times) h n k", times=times)


# ---- FlexAttention: one call, all-masked tiles are skipped


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    allow_many_shapes()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex_attention(q: Towers, k: Towers, v: Towers, pattern: AttentionPattern, block_mask: BlockMask) -> Towers:
    queries, keys, values = (_join(x, pattern.draws) for x in (q, k, v))
    grouped = queries.shape[1] != keys.shape[1]
    attended = _compiled_flex_attention()(queries, keys, values, block_mask=block_mask, enable_gqa=grouped)
    parts = dict(zip(q, attended.split([pattern.tokens(tower) for tower in q], dim=2), strict=True))
    if "noise" in parts:
        parts["noise"] = rearrange(parts["noise"], "b h (draws n) k -> (b draws) h n k", draws=pattern.draws)
    return parts


def _join(x: Towers, draws: int) -> Tensor:
    """All towers as one sequence, text first; the draws of an image one after the other."""
    parts = [rearrange(y, "(b d) h n k -> b h (d n) k", d=draws) if tower == "noise" else y for tower, y in x.items()]
    return torch.cat(parts, dim=2)


@functools.lru_cache(maxsize=256)
def _block_mask(pattern: AttentionPattern, device: torch.device) -> BlockMask:
    # The cached mask must serve training, also if validation under inference mode comes first.
    with torch.inference_mode(False), torch.no_grad():
        queries, keys = (_token_table(pattern, towers, device) for towers in (pattern.queries, pattern.keys))

        def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            return _sees(pattern, tuple(column[q_index] for column in queries), tuple(column[k_index] for column in keys))

        return create_block_mask(mask_mod, None, None, len(queries[0]), len(keys[0]), device=str(device))


def dense_mask(pattern: AttentionPattern, device: torch.device | str = "cpu") -> Tensor:
    """The pattern as a boolean matrix [queries, keys], for pictures and for checks; True: sees."""
    queries, keys = _token_table(pattern, pattern.queries, device), _token_table(pattern, pattern.keys, device)
    return _sees(pattern, tuple(column[:, None] for column in queries), keys)


_TEXT, _CLEAN, _NOISE = range(3)


def _token_table(pattern: AttentionPattern, towers: tuple[str, ...], device: torch.device | str) -> tuple[Tensor, ...]:
    """Kind, place (index of text tokens, block of image tokens) and noise draw of every token, a column [tokens] each."""
    size = pattern.block_tokens
    rows = {
        "text": [(_TEXT, token, 0) for token in range(pattern.text_tokens)],
        "clean": [(_CLEAN, block, 0) for block in range(pattern.clean_blocks) for _ in range(size)],
        "noise": [
            (_NOISE, block, draw) for draw in range(pattern.draws) for block in range(pattern.noisy_blocks) for _ in range(size)
        ],
    }
    columns = zip(*(row for tower in towers for row in rows[tower]), strict=True)
    return tuple(torch.tensor(column, dtype=torch.int32, device=device) for column in columns)


def _sees(pattern: AttentionPattern, query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """Whether tokens see tokens; entries of `_token_table`, broadcast against each other."""
    (q_kind, q_place, q_draw), (k_kind, k_place, k_draw) = query, key
    earlier = _CLEAN if "clean" in pattern.keys else _NOISE
    sees_text = (k_kind == _TEXT) & ((q_kind != _TEXT) | (k_place <= q_place))
    sees_itself = (k_kind == q_kind) & (k_place == q_place) & (k_draw == q_draw)
    same_draw = (k_kind == _CLEAN) | (k_draw == q_draw)
    sees_earlier = (q_kind != _TEXT) & (k_kind == earlier) & (k_place < q_place) & same_draw
    return sees_text | sees_itself if pattern.local else sees_text | sees_itself | sees_earlier
