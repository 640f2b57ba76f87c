"""Text before the image: embeddings, language-model head, the null text of classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from madformer.config import TextConfig


class TextInterface(nn.Module):
    """Token ids to the text tower's input and its output to logits; the head is not tied to the embeddings."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of the next token, [B, T, V]."""
        return self.head(self.norm(x_BTD))


def null_text(config: TextConfig, batch: int, device: torch.device | str | None = None, length: int | None = None) -> Tensor:
    """Prompts of padding alone, [B, T]: what the model sees for a dropped prompt."""
    return torch.full(
        (batch, config.length if length is None else length), config.pad_token_id, dtype=torch.long, device=device
    )


def drop_text(text_BT: Tensor, config: TextConfig, generator: torch.Generator | None = None) -> Tensor:
    """Replace whole prompts by the null text with probability `config.dropout`, so that guidance works when sampling.

    The draw is made on the generator's device, so that it is the same wherever the text lies.
    """
    device = generator.device if generator else text_BT.device
    dropped_B = torch.rand(len(text_BT), generator=generator, device=device) < config.dropout
    return torch.where(dropped_B.to(text_BT.device)[:, None], config.pad_token_id, text_BT)
