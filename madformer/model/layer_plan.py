"""The plan of each layer: which towers it runs for the requested outputs, and its attention pattern. Needs no torch.

A layer's *keys* are the towers that a query attends to. Its *queries* are the towers whose output is read later.
The plan is made from the last layer to the first and leaves out everything that no requested output needs: the clean tower's
queries in the last layer, the noise tower's AR stage if nothing reads the condition, the clean tower in local denoising.
The training forward, sampling and the cost formulas follow the same plan.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from madformer.config import ModelConfig

TOWERS = ("text", "clean", "noise")
"""Parameter sets, in the order of their tokens in the sequence."""

AUXILIARY_OUTPUTS = ("condition", "clean_tower", "text_logits")
"""Outputs in addition to the denoised blocks."""


@dataclass(frozen=True)
class LayerPlan:
    """The towers that a layer runs and its attention pattern in training; hashable, so masks are cached by it.

    The towers are in the order of `TOWERS`, and the queries are a subset of the keys.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    text_tokens: int
    clean_blocks: int
    """Clean blocks in the sequence (J)."""
    noisy_blocks: int
    block_tokens: int
    draws: int = 1
    """Noise draws per image (k); they do not see each other."""
    local: bool = False
    """An image block sees only the text and itself."""

    @property
    def context_tower(self) -> str:
        """The image tower whose earlier blocks an image block sees."""
        return "clean" if "clean" in self.keys else "noise"

    def tokens(self, tower: str) -> int:
        """Number of a tower's tokens per image, all draws together."""
        blocks = {"clean": self.clean_blocks, "noise": self.noisy_blocks * self.draws}
        return self.text_tokens if tower == "text" else blocks[tower] * self.block_tokens


def existing_outputs(config: ModelConfig, requested: Iterable[str] | None = None) -> frozenset[str]:
    """The requested auxiliary outputs (None: all) that this configuration has.

    Raises:
        ValueError: an unknown name.
    """
    requested = AUXILIARY_OUTPUTS if requested is None else tuple(requested)
    if unknown := [name for name in requested if name not in AUXILIARY_OUTPUTS]:
        raise ValueError(f"outputs = {unknown}: the auxiliary outputs are {', '.join(AUXILIARY_OUTPUTS)}")
    exists = {"condition": config.use_condition, "clean_tower": config.use_clean_blocks, "text_logits": config.text is not None}
    return frozenset(name for name in requested if exists[name])


def text_tokens(config: ModelConfig) -> int:
    """Number of the prompt's tokens (T); 0 without text."""
    return config.text.length if config.text is not None else 0


@functools.lru_cache(maxsize=1024)
def layer_plans(
    config: ModelConfig, outputs: frozenset[str], prompt_tokens: int | None = None, draws: int = 1
) -> tuple[LayerPlan, ...]:
    """The plan of every layer, first layer first, for the denoised blocks and the auxiliary `outputs`.

    Args:
        prompt_tokens: the prompts' length; None: the configured one.
        draws: noise draws per image.
    """
    towers = _towers_by_layer(config, outputs)
    prompt_tokens = text_tokens(config) if prompt_tokens is None else prompt_tokens
    # Only the output `clean_tower` reads the last clean block.
    clean_blocks = config.ar_length if "clean_tower" in outputs else config.ar_length - 1
    return tuple(
        LayerPlan(
            queries,
            keys,
            text_tokens=prompt_tokens,
            clean_blocks=clean_blocks if "clean" in towers[0][1] else 0,
            noisy_blocks=config.ar_length,
            block_tokens=config.block_tokens,
            draws=draws if layer >= config.ar_depth else 1,
            local=config.local_denoising and layer >= config.ar_depth,
        )
        for layer, (queries, keys) in enumerate(towers)
    )


def embedded_block_count(config: ModelConfig, outputs: frozenset[str]) -> int:
    """Number of clean blocks to embed: those in the sequence, and all but the last for the condition."""
    return max(layer_plans(config, outputs)[0].clean_blocks, config.ar_length - 1 if config.use_condition else 0)


def _towers_by_layer(config: ModelConfig, outputs: frozenset[str]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(queries, keys) of every layer."""
    # No query sees the last clean block. So a single block is in the sequence only if its own output is requested.
    clean = {"clean"} if config.use_clean_blocks and (config.ar_length > 1 or "clean_tower" in outputs) else set()
    text = {"text"} if config.text is not None else set()
    queries = {"noise"} | (clean if "clean_tower" in outputs else set()) | (text if "text_logits" in outputs else set())
    layers = []
    for layer in reversed(range(config.depth)):
        if layer == config.ar_depth - 1 and not config.use_condition:
            queries = queries - {"noise"}
        cut_off = config.local_denoising and layer >= config.ar_depth
        context = {"text": text, "clean": clean | text, "noise": {"noise"} | text | (set() if cut_off else clean)}
        keys = queries.union(*(context[tower] for tower in queries))
        layers.append((_in_order(queries), _in_order(keys)))
        queries = keys
    return layers[::-1]


def _in_order(towers: set[str]) -> tuple[str, ...]:
    return tuple(tower for tower in TOWERS if tower in towers)
