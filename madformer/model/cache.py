"""Keys and values while sampling, in buffers allocated once.

A layer's buffer has room for the text and every block, in the order of the sequence. While block i is denoised its own
keys and values lie in its slot and are overwritten at every step; what is seen is always the slice up to the slot's
end, so there is no mask and nothing is concatenated. Afterwards the clean tower overwrites the slot (without clean
blocks, those of the last denoising step stay). In a layer of local denoising one slot behind the text serves all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from madformer.config import ModelConfig
from madformer.model.attention import Towers, sdpa


@dataclass
class Slot:
    """Context of a layer when sampling: one tower's tokens go to [start, end) of the buffers and see [0, end)."""

    keys_BGMK: Tensor
    values_BGMK: Tensor
    start: int
    end: int
    queries: tuple[str, ...]

    def attend(self, queries: Towers, keys: Towers, values: Towers) -> Towers:
        """Store the keys and values; attention of the queries, if any, over all that is seen."""
        ((tower, k),), ((_, v),) = keys.items(), values.items()
        self.keys_BGMK[:, :, self.start : self.end] = k
        self.values_BGMK[:, :, self.start : self.end] = v
        seen = self.keys_BGMK[:, :, : self.end], self.values_BGMK[:, :, : self.end]
        return {name: sdpa(q, *seen, causal=tower == "text") for name, q in queries.items()}


class KeyValueCache:
    """The buffers of all layers, for a batch of `batch` rows."""

    def __init__(self, config: ModelConfig, batch: int, text_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.text_tokens = config, text_tokens
        self.layers = [
            torch.empty(
                2,
                batch,
                config.kv_heads,
                text_tokens + self._blocks(layer) * config.block_tokens,
                config.head_width,
                device=device,
                dtype=dtype,
            )
            for layer in range(config.depth)
        ]

    def _blocks(self, layer: int) -> int:
        local = self.config.local_denoising and layer >= self.config.ar_depth
        return 1 if local else self.config.ar_length

    def slot(self, layer: int, tower: str, block: int = 0, rows: int | None = None, with_queries: bool = True) -> Slot:
        """Where a tower's tokens of `block` go in `layer`; `rows`: the first rows of the batch alone."""
        keys, values = self.layers[layer][:, :rows]
        if tower == "text":
            start, end = 0, self.text_tokens
        else:
            start = self.text_tokens + min(block, self._blocks(layer) - 1) * self.config.block_tokens
            end = start + self.config.block_tokens
        return Slot(keys, values, start, end, (tower,) if with_queries else ())

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)
