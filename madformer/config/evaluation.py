"""The configuration of evaluation. It never changes what is trained."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Literal, cast

from madformer.config.validation import is_integer, require, require_at_least, require_types, setting

SamplerName = Literal["ddim", "ddpm", "dpmsolver++", "unipc"]
"""Samplers by name. All but `ddpm` are deterministic. Each evaluates the network once per step."""

SPACINGS = "uniform, power:P with P of at least 1, logsnr, karras:RHO, or list:999/500/0"
"""Legal spacings of a sampler's timesteps (`diffusion.samplers.spaced_timesteps`), for messages."""

TRIES = 24
"""Default number of samplings that `madformer tune` tries at each budget."""

SHIPPED_NETWORKS = {
    "digits": "fe8de8929b8f8c1d5fdde1a39ba44f83b8557c62b49066cd7583d0009697a32f",
    "cifar10": "ac1b2e41d2e2d70704e7e7755caccdd2cf9204107ebfcc3a3a86c35e6a02b3a2",
}
"""Feature networks that ship with the package -> SHA-256 of their weights, which needs no torch here."""

ALL_TIMESTEPS = "all"
"""The guidance interval of all timesteps."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Defaults of `madformer evaluate`, and the previews during training."""

    nfe: tuple[int, ...] = (280, 700, 1400, 2800)
    """NFE budgets: layer evaluations per block."""
    num_samples: int = 8000
    """Number of images sampled for each point."""
    batch_size: int = 64
    """Number of images sampled at once. Results do not depend on it."""
    seed: int = 0
    """Sampling seed. Sample i depends only on (seed, i) and the weights."""
    sampler: SamplerName = "ddim"
    """Sampler that denoises the blocks."""
    spacing: str = "uniform"
    """Spacing of the sampler's timesteps: `uniform`; `power:P`, denser at small timesteps for P > 1; `logsnr`, uniform in the
    logarithm of the signal-to-noise ratio; `karras:RHO`, as in EDM; `list:999/500/0`, exactly these timesteps."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: no guidance."""
    guidance_interval: str = ALL_TIMESTEPS
    """Timesteps at which guidance acts: `all`, or the lowest and the highest one, such as `100/900`."""
    feature_networks: tuple[str, ...] = ()
    """Networks whose features metrics compare, all on the same samples: `inception` or `inception:FILE` (FID's network),
    `torchscript:FILE`, `hf:MODEL` (a model of transformers), `digits`, `cifar10`, or your own class as `module.path:Class` or
    `file.py:Class`."""
    references: str = setting("references", path=True)
    """Folder for statistics of reference images. All runs share it."""
    held_out_source: str | None = setting(None, path="as typed")
    """Source of held-out images, as in `data.source`; null: `data.source` itself."""
    held_out_split: str | None = None
    """Split of the held-out images, as in `data.split`; null: `data.split` itself. If these images differ from those of
    training, evaluation also measures distances to them and memorisation, and diagnostics use them."""
    preview_every: int | None = None
    """Number of training steps between previews (a sample grid and quick metrics); null: no previews."""
    preview_nfe: int = 280
    """NFE budget of a preview."""
    preview_samples: int = 64
    """Number of images sampled for a preview."""

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
        object.__setattr__(self, "spacing", canonical_spacing(self.spacing))
        parse_interval(self.guidance_interval)
        for name in self.feature_networks:
            check_feature_network_name(name)
        twice = len(set(self.feature_networks)) < len(self.feature_networks)
        require(not twice, "evaluation.feature_networks", list(self.feature_networks), "name each of them once")
        require(self.references != "", "evaluation.references", "", "must be the name of a folder")
        for name in ("held_out_source", "held_out_split"):
            require(getattr(self, name) != "", f"evaluation.{name}", "", "must not be empty")
        legal = is_integer(self.seed) and 0 <= self.seed <= MAX_EVALUATION_SEED
        require(legal, "evaluation.seed", self.seed, f"must be in 0..{MAX_EVALUATION_SEED}")
        if self.preview_every is not None:
            require_at_least(1, "evaluation", self, "preview_every")


MAX_SAMPLES = 1_000_000
"""Most samples for one evaluation seed."""

MAX_EVALUATION_SEED = 4000
"""Largest evaluation seed. torch's generators keep 32 bits of a seed, so `MAX_SAMPLES` fit for each without a clash."""


_LEGAL = re.compile("|".join(SHIPPED_NETWORKS) + r"|inception|(inception|torchscript|hf):.+|.+:[A-Za-z_]\w*")


def check_feature_network_name(name: str) -> None:
    """Refuse a name that no feature network can have.

    Raises:
        ConfigError: the name is not legal. The message lists the legal forms.
    """
    shipped = ", ".join(SHIPPED_NETWORKS)
    legal = f"{shipped}, inception, inception:FILE, torchscript:FILE, hf:MODEL, module.path:Class or file.py:Class"
    require(_LEGAL.fullmatch(name) is not None, "evaluation.feature_networks", name, f"must be {legal}")


def canonical_spacing(text: str) -> str:
    """A spacing in the form that records use: `power:2` for `power:2.0`, and `uniform` for `power:1`.

    Raises:
        ConfigError: the text is not a spacing.
    """
    kind, colon, argument = text.partition(":")
    if text in ("uniform", "logsnr"):
        return text
    if kind == "list":
        legal = re.fullmatch(r"\d+(/\d+)*", argument) is not None
        timesteps = listed_timesteps(text) if legal else ()
        legal = legal and all(later < earlier for earlier, later in itertools.pairwise(timesteps))
        require(legal, "evaluation.spacing", text, "must list falling timesteps, as in list:999/500/0")
        return f"list:{'/'.join(map(str, timesteps))}"
    legal = kind in ("power", "karras") and re.fullmatch(r"\d+(\.\d+)?", argument) is not None
    require(legal, "evaluation.spacing", text, f"must be {SPACINGS}")
    number = float(argument)
    least = 1 if kind == "power" else 0.1
    require(least <= number <= 100, "evaluation.spacing", text, f"its number must be in {least:g}..100")
    return "uniform" if kind == "power" and number == 1 else f"{kind}{colon}{number:g}"


def listed_timesteps(spacing: str) -> tuple[int, ...]:
    """The timesteps of a `list:` spacing; empty for other spacings."""
    kind, _, argument = spacing.partition(":")
    return tuple(map(int, argument.split("/"))) if kind == "list" else ()


def parse_interval(text: str) -> tuple[int, int] | None:
    """The lowest and the highest timestep of a guidance interval; None: all timesteps.

    Raises:
        ConfigError: the text is not an interval.
    """
    if text == ALL_TIMESTEPS:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    legal = match is not None and int(match[1]) <= int(match[2])
    require(legal, "evaluation.guidance_interval", text, "must be all, or lowest and highest timestep, as in 100/900")
    return int(cast("re.Match[str]", match)[1]), int(cast("re.Match[str]", match)[2])
