"""The configuration of evaluation. It never changes what is trained."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from madformer.config.validation import is_integer, require, require_at_least, require_types

SamplerName = Literal["ddim", "ddpm", "dpmsolver++", "unipc"]
"""Samplers by name. All but `ddpm` are deterministic; each evaluates the network once per step."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Defaults of `madformer evaluate`, and the previews during training."""

    nfe: tuple[int, ...] = (280, 700, 1400, 2800)
    """NFE budgets: layer evaluations per block."""
    num_samples: int = 8000
    """Images sampled for each point."""
    batch_size: int = 64
    """Images sampled at once. Results do not depend on it."""
    seed: int = 0
    """Sampling seed. Sample i depends only on (seed, i) and the weights."""
    sampler: SamplerName = "ddim"
    """Sampler that denoises the blocks."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: no guidance."""
    feature_networks: tuple[str, ...] = ()
    """Networks whose features are compared, all on the same samples: `inception` or `inception:FILE` (FID's),
    `torchscript:FILE`, `hf:MODEL` (of transformers), `digits`, or a class of your own as `module.path:Class` or
    `file.py:Class`."""
    references: str = "references"
    """Folder for statistics of reference images; all runs share it."""
    held_out_source: str | None = None
    """Source of held-out images, as in `data.source`; null: `data.source` itself."""
    held_out_split: str | None = None
    """Split of the held-out images, as in `data.split`; null: `data.split` itself. Where these are other images than those of
    training, distances to them are measured too, and diagnostics look at them."""
    preview_every: int | None = None
    """Training steps between previews (a sample grid and quick metrics); null: no previews."""
    preview_nfe: int = 280
    """NFE budget of a preview."""
    preview_samples: int = 64
    """Images sampled for a preview."""

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
        require(math.isfinite(self.guidance), "evaluation.guidance", self.guidance, "must be a number")
        for name in self.feature_networks:
            check_feature_network_name(name)
        twice = len(set(self.feature_networks)) < len(self.feature_networks)
        require(not twice, "evaluation.feature_networks", list(self.feature_networks), "each of them once")
        require(self.references != "", "evaluation.references", "", "must be the name of a folder")
        for name in ("held_out_source", "held_out_split"):
            require(getattr(self, name) != "", f"evaluation.{name}", "", "must not be empty")
        legal = is_integer(self.seed) and 0 <= self.seed <= MAX_EVALUATION_SEED
        require(legal, "evaluation.seed", self.seed, f"must be in 0..{MAX_EVALUATION_SEED}")
        if self.preview_every is not None:
            require_at_least(1, "evaluation", self, "preview_every")


MAX_SAMPLES = 1_000_000
"""Samples of one evaluation seed."""

MAX_EVALUATION_SEED = 4000
"""torch's generators keep 32 bits of a seed: `MAX_SAMPLES` for each of so many evaluation seeds fit without a clash."""


_LEGAL = re.compile(r"digits|inception|(inception|torchscript|hf):.+|.+:[A-Za-z_]\w*")


def check_feature_network_name(name: str) -> None:
    """Refuse a name that no feature network has.

    Raises:
        ConfigError: with the legal forms.
    """
    legal = "digits, inception, inception:FILE, torchscript:FILE, hf:MODEL, module.path:Class or file.py:Class"
    require(_LEGAL.fullmatch(name) is not None, "evaluation.feature_networks", name, f"must be {legal}")
