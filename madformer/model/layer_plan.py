"""Which towers each layer runs: the one place that decides what work is needed.

A layer's *keys* are the towers that some query attends to, its *queries* the towers whose output somebody reads later.
Walking back from the outputs that are wanted leaves out all the rest: the clean tower's queries in the last layer, the
noise tower's AR stage when nothing reads the condition, the clean tower in local denoising, ...
The training forward, sampling and the cost formulas follow the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from madformer.config import ModelConfig

TOWERS = ("text", "clean", "noise")
"""Parameter sets, in the order of their tokens in the sequence."""

AUXILIARY_OUTPUTS = ("condition", "clean_tower", "text_logits")
"""Outputs beside the denoised blocks."""


@dataclass(frozen=True)
class LayerPlan:
    """Towers that a layer runs, in the order of `TOWERS`; queries are a subset of keys."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]


def existing_outputs(config: ModelConfig, wanted: Iterable[str] | None = None) -> frozenset[str]:
    """Auxiliary outputs that are both wanted (None: all) and there in this configuration.

    Raises:
        ValueError: a name that is no auxiliary output.
    """
    wanted = AUXILIARY_OUTPUTS if wanted is None else tuple(wanted)
    if unknown := [name for name in wanted if name not in AUXILIARY_OUTPUTS]:
        raise ValueError(f"outputs = {unknown}: the auxiliary outputs are {', '.join(AUXILIARY_OUTPUTS)}")
    there = {"condition": config.use_condition, "clean_tower": config.use_clean_blocks, "text_logits": config.text is not None}
    return frozenset(name for name in wanted if there[name])


def layer_plans(config: ModelConfig, outputs: frozenset[str]) -> tuple[LayerPlan, ...]:
    """The plan of every layer, first layer first, for the denoised blocks and the auxiliary `outputs`."""
    # No query sees the last clean block: it is there for its own output alone.
    clean = {"clean"} if config.use_clean_blocks and (config.ar_length > 1 or "clean_tower" in outputs) else set()
    text = {"text"} if config.text is not None else set()
    needed = {"noise"} | (clean if "clean_tower" in outputs else set()) | (text if "text_logits" in outputs else set())
    plans = []
    for layer in reversed(range(config.depth)):
        diffusion_stage = layer >= config.ar_depth
        if layer == config.ar_depth - 1 and not config.use_condition:
            needed = needed - {"noise"}
        sees = {
            "text": text,
            "clean": clean | text,
            "noise": {"noise"} | text | (set() if diffusion_stage and config.local_denoising else clean),
        }
        keys = needed.union(*(sees[tower] for tower in needed))
        plans.append(LayerPlan(queries=_in_order(needed), keys=_in_order(keys)))
        needed = keys
    return tuple(reversed(plans))


def clean_block_count(config: ModelConfig, outputs: frozenset[str]) -> int:
    """Clean blocks in the sequence (J): without the last if only the clean tower's output needs it; 0 if unread."""
    if "clean" not in layer_plans(config, outputs)[0].keys:
        return 0
    return config.ar_length if "clean_tower" in outputs else config.ar_length - 1


def embedded_block_count(config: ModelConfig, outputs: frozenset[str]) -> int:
    """Clean blocks that anything reads the embedding of: those in the sequence, and all but the last for the condition."""
    return max(clean_block_count(config, outputs), config.ar_length - 1 if config.use_condition else 0)


def _in_order(towers: set[str]) -> tuple[str, ...]:
    return tuple(tower for tower in TOWERS if tower in towers)
