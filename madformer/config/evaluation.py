"""The configuration of evaluation: inference alone, it never changes what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from madformer.config.rules import is_integer, require, require_at_least, require_types


@dataclass(frozen=True)
class EvaluationConfig:
    """What `madformer evaluate` computes unless it is told otherwise, and the previews during training."""

    nfe: tuple[int, ...] = (280, 700, 1400, 2800)
    """Budgets in layer evaluations per block."""
    num_samples: int = 8000
    """Images sampled for each budget."""
    batch_size: int = 64
    """Images sampled at once; no result depends on it."""
    seed: int = 0
    """Sample i is a function of (seed, i) and the weights."""
    feature_network: Literal["digits"] | None = None
    """Network whose features are compared; null: none chosen, the experiment cannot be evaluated."""
    preview_every: int | None = None
    """Training steps from one preview (a sample grid and a quick metric) to the next; null: none."""
    preview_nfe: int = 280
    """Budget of a preview."""
    preview_samples: int = 64
    """Images of a preview."""

    def __post_init__(self) -> None:
        require_types("evaluation", self)
        require(len(self.nfe) > 0, "evaluation.nfe", list(self.nfe), "must name at least one budget")
        legal = all(is_integer(budget) and budget > 0 for budget in self.nfe)
        require(legal, "evaluation.nfe", list(self.nfe), "budgets must be positive integers")
        require_at_least(1, "evaluation", self, "batch_size", "preview_nfe")
        require_at_least(2, "evaluation", self, "num_samples", "preview_samples")
        for name in ("num_samples", "preview_samples"):
            value = getattr(self, name)
            require(
                value <= MAX_SAMPLES,
                f"evaluation.{name}",
                value,
                f"must be at most {MAX_SAMPLES:,}, each has a seed of its own",
            )
        legal = is_integer(self.seed) and 0 <= self.seed <= MAX_EVALUATION_SEED
        require(legal, "evaluation.seed", self.seed, f"must be in 0..{MAX_EVALUATION_SEED}")
        if self.preview_every is not None:
            require_at_least(1, "evaluation", self, "preview_every")


MAX_SAMPLES = 1_000_000
"""Samples of one evaluation seed."""

MAX_EVALUATION_SEED = 4000
"""torch's generators keep 32 bits of a seed: `MAX_SAMPLES` for each of so many evaluation seeds fit without a clash."""
