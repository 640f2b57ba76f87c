"""Memory of weights, training state, activations and cache, from the configuration alone. Bytes throughout; needs no torch.

Weights, gradients, optimiser and EMA are float32, whatever dtype autocast computes in. Activations are what autograd
keeps for the backward pass with torch's own kernels for scaled_dot_product_attention and RMSNorm; fused CUDA kernels and
FlexAttention keep less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from madformer.config import ModelConfig
from madformer.model.cost import DTYPE_BYTES, downsampler, parameters, unet_passes, upsampler
from madformer.model.layer_plan import LayerPlan, existing_outputs, layer_plans, text_tokens

_FULL = 4
"""Bytes of an element in the weights' precision."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device that holds the whole model."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    ema: int
    activations: int
    """Kept from the forward for the backward pass, the whole batch; with activation checkpointing, and while the
    largest layer is recomputed."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def training_memory(
    config: ModelConfig, batch: int, dtype: str = "bfloat16", outputs: Iterable[str] | None = None, draws: int = 1
) -> TrainingMemory:
    """Memory of a training step.

    Args:
        config: activation checkpointing is taken into account.
        batch: images on the device.
        dtype: what autocast computes in, a key of `cost.DTYPE_BYTES`.
        outputs: auxiliary outputs in the loss (`config.wanted_outputs`); None: all that exist.
        draws: noise draws per image.
    """
    weights = weight_memory(config)
    # Autocast keeps a copy of the weights in its dtype until the backward pass is done.
    copies = weights * DTYPE_BYTES[dtype] // _FULL if DTYPE_BYTES[dtype] != _FULL else 0
    activations = batch * _activations(config, DTYPE_BYTES[dtype], existing_outputs(config, outputs), draws) + copies
    return TrainingMemory(weights, weights, 2 * weights, weights, activations)


def weight_memory(config: ModelConfig, dtype: str = "float32") -> int:
    """The weights alone, as for sampling."""
    return DTYPE_BYTES[dtype] * sum(parameters(config).values())


def cache_memory(config: ModelConfig, batch: int, dtype: str = "bfloat16", guidance: bool = False) -> int:
    """The key/value cache of `generate`, for `batch` images."""
    local = config.diffusion_depth if config.local_denoising else 0
    blocks = (config.depth - local) * config.ar_length + local
    tokens = config.depth * text_tokens(config) + blocks * config.block_tokens
    rows = 2 * batch if guidance else batch
    return 2 * rows * tokens * config.kv_heads * config.head_width * DTYPE_BYTES[dtype]


def _activations(config: ModelConfig, size: int, outputs: frozenset[str], draws: int) -> int:
    """Bytes for one image; `size`: of an element that autocast computes with."""
    plans = layer_plans(config, outputs, draws=draws)
    layers = [_layer(config, size, plan) for plan in plans]
    if config.activation_checkpointing:
        inputs = sum(plan.tokens(tower) for plan in plans for tower in plan.keys) * config.width * _FULL
        kept = inputs + max(layers)
    else:
        kept = sum(layers)
    down, up = unet_passes(config, outputs, draws)
    kept += (down * downsampler(config).kept + up * upsampler(config).kept) * size
    if config.text and "text_logits" in outputs:
        kept += text_tokens(config) * config.text.vocab_size * 2 * _FULL  # logits and their log-softmax
    return kept


def _layer(config: ModelConfig, size: int, plan: LayerPlan) -> int:
    keys_values = 2 * config.kv_heads * config.head_width
    with_queries = _token_with_queries(config, size)
    without_queries = 2 * config.width * _FULL + config.width * size + keys_values * (size + _normalised(size) // 2)
    kept = sum(plan.tokens(tower) * (with_queries if tower in plan.queries else without_queries) for tower in plan.keys)
    if "noise" in plan.queries and "clean" in plan.keys and not plan.local:
        # Every noisy block but the first has a copy of the keys and values that it sees, in addition to its own.
        text = plan.text_tokens if "text" in plan.keys else 0
        copied = sum(text + (block + 1) * plan.block_tokens for block in range(1, plan.noisy_blocks))
        kept += plan.draws * copied * keys_values * size
    return kept


def _token_with_queries(config: ModelConfig, size: int) -> int:
    """Bytes that a token of a tower with queries keeps in one layer."""
    rotated = (config.num_heads + config.kv_heads) * config.head_width
    projected = rotated + config.kv_heads * config.head_width
    norms = 4 * config.width * _FULL + rotated * _normalised(size)
    return norms + (4 * config.width + 4 * config.ffn_width + projected + rotated) * size


def _normalised(size: int) -> int:
    """Bytes that a norm over heads keeps of an element: its result, and its input if that was cast up for it."""
    return _FULL if size == _FULL else 2 * _FULL
