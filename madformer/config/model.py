"""The configuration of the model: Transformer, U-Net and text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from madformer.config.validation import is_integer, require, require_at_least, require_types, setting
from madformer.errors import ConfigError

MIN_FLEX_HEAD_WIDTH = 16
"""The smallest head width that FlexAttention's kernels support."""


@dataclass(frozen=True)
class UNetConfig:
    """The convolutional embedding of a block (downsampler) and its inverse (upsampler). Lists have one entry per level.

    Every level but the last halves the block's sides. A single level keeps them.
    """

    channels: tuple[int, ...] = (512, 1024)
    """Feature channels of each level."""
    layers: tuple[int, ...] = (2, 2)
    """Number of ResNet layers of each level. The upsampler has one more, as in diffusers."""
    attention: tuple[bool, ...] = (False, True)
    """Whether a self-attention follows each ResNet layer of the level."""
    groups: int = 8
    """Number of groups of the group norms."""
    num_heads: int = 8
    """Number of attention heads. The head width is channels / num_heads."""
    time_embed_dim: int = 128
    """Width of the timestep embedding."""

    def __post_init__(self) -> None:
        require_types("model.unet", self)
        require(len(self.channels) > 0, "model.unet.channels", list(self.channels), "must name at least one level")
        for name in ("layers", "attention"):
            value = getattr(self, name)
            require(
                len(value) == len(self.channels),
                f"model.unet.{name}",
                list(value),
                f"must have one entry for each of the {len(self.channels)} levels of model.unet.channels",
            )
        require_at_least(1, "model.unet", self, "groups", "num_heads", "time_embed_dim")
        for channels, attention in zip(self.channels, self.attention, strict=True):
            legal = channels > 0 and channels % self.groups == 0
            require(
                legal,
                "model.unet.channels",
                list(self.channels),
                f"must be positive multiples of model.unet.groups = {self.groups}",
            )
            legal = not attention or channels % self.num_heads == 0
            remedy = f"levels with attention must be multiples of model.unet.num_heads = {self.num_heads}"
            require(legal, "model.unet.channels", list(self.channels), remedy)
        require(min(self.layers) >= 1, "model.unet.layers", list(self.layers), "must be at least 1 on every level")

    @property
    def downsampling(self) -> int:
        """Number of latent rows (columns) in one row (column) of tokens."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """The text before the image: vocabulary, prompt length, padding and prompt dropout."""

    vocab_size: int = 128_256
    """Size of the vocabulary: token ids are 0 .. vocab_size - 1. The default is Llama 3's vocabulary (Table 7)."""
    length: int = 32
    """Number of tokens of a padded prompt (T)."""
    pad_token_id: int = 128_004
    """Token that pads short prompts. A prompt of only padding is the null text of classifier-free guidance."""
    dropout: float = 0.1
    """Probability that training replaces a prompt by the null text."""
    final_norm: bool = setting(True, neutral=True)
    """Whether to normalise the text tower's output before the head. The released code does not."""

    def __post_init__(self) -> None:
        require_types("model.text", self)
        require_at_least(2, "model.text", self, "vocab_size")
        require_at_least(1, "model.text", self, "length")
        legal = is_integer(self.pad_token_id) and 0 <= self.pad_token_id < self.vocab_size
        require(
            legal,
            "model.text.pad_token_id",
            self.pad_token_id,
            f"must be in 0..{self.vocab_size - 1} (model.text.vocab_size - 1)",
        )
        require(0 <= self.dropout < 1, "model.text.dropout", self.dropout, "must be at least 0 and below 1")


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer. Defaults: FFHQ-1024 as in the authors' code, except prediction type, RoPE and clean timestep."""

    latent_channels: int = 4
    """Channels of the latents (C)."""
    latent_size: int = 128
    """Rows and columns of an image's latents."""
    ar_length: int = 16
    """Number of blocks per image (l, Table 2), a square number. Blocks are square tiles in raster order."""
    depth: int = 28
    """Number of Transformer layers in all (N)."""
    diffusion_depth: int = 14
    """Number of layers that iterate in the denoising loop (D), the last ones. The first N - D run once per block (Table 1). For
    an elastic run, it is the default depth for sampling."""
    elastic_depths: tuple[int, ...] = setting((), neutral=())
    """Diffusion depths of an elastic run. Each training step draws one, and sampling can use any. Empty: a fixed depth."""
    width: int = 1152
    """Width of the Transformer."""
    num_heads: int = 18
    """Number of query heads. The head width is width / num_heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads. Each serves num_heads / num_kv_heads query heads. null: as many as query heads."""
    ffn_width: int = 4096
    """Hidden width of the SwiGLU."""
    use_clean_blocks: bool = True
    """Whether to prepend the clean blocks to the sequence (Table 3)."""
    use_condition: bool = True
    """Whether to add the AR stage's output to the embedded noisy block (Eq. 4, Table 3)."""
    local_denoising: bool = False
    """Whether blocks attend only to themselves and the text in the diffusion stage (Table 5)."""
    parameter_sets: Literal["separate", "shared"] = "separate"
    """separate: a parameter set each for text, clean and noisy tokens; shared: one for all of them (Table 4)."""
    rope: Literal["axial", "released"] = "axial"
    """Rotary positions. axial: each axis rotates its half of the head; released: as in the released code, also for text."""
    prediction_type: Literal["sample", "epsilon", "v_prediction"] = "sample"
    """The network's prediction for the noisy block: clean latents, noise or velocity."""
    clean_timestep: Literal["zero", "released"] = "zero"
    """Timestep of clean blocks and auxiliary outputs. zero: clean blocks are embedded at 0, and auxiliary outputs go through
    the upsampler at -1000, far from every noisy block's timestep; released: as in the released code, both are at the noisy
    block's timestep in training, and clean blocks are at the scheduler's last one when sampling."""
    timestep_embedding: Literal["raw", "sinusoidal"] = setting("raw", neutral="raw")
    """Input of the two layers that embed a timestep. raw: the integer, as in the released code; sinusoidal: its sines and
    cosines, `unet.time_embed_dim` in all, with periods from 2 pi to 20,000 pi."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """The U-Net that turns blocks into tokens and back."""
    text: TextConfig | None = None
    """The text before the image; null: a model without text."""
    attention_backend: Literal["auto", "flex", "sdpa"] = setting("auto", new_run=False)
    """flex: FlexAttention; sdpa: scaled_dot_product_attention; auto: flex on CUDA, else sdpa."""
    activation_checkpointing: bool = setting(False, new_run=False)
    """Whether to recompute each layer and each U-Net block in the backward pass instead of keeping its activations."""
    compile: Literal["auto", True, False] = setting("auto", new_run=False)
    """Whether to torch.compile each layer and the U-Net; auto: on CUDA."""

    def __post_init__(self) -> None:
        require_at_least(
            1, "model", self, "latent_channels", "latent_size", "ar_length", "depth", "width", "num_heads", "ffn_width"
        )
        require_types("model", self)
        legal = is_integer(self.diffusion_depth) and 1 <= self.diffusion_depth <= self.depth
        require(legal, "model.diffusion_depth", self.diffusion_depth, f"must be in 1..{self.depth} (model.depth)")
        self._check_elastic()
        legal = self.timestep_embedding == "raw" or self.unet.time_embed_dim % 2 == 0
        remedy = "must be even with model.timestep_embedding=sinusoidal"
        require(legal, "model.unet.time_embed_dim", self.unet.time_embed_dim, remedy)
        self._check_blocks()
        self._check_heads()

    def _check_elastic(self) -> None:
        depths = self.elastic_depths
        object.__setattr__(self, "elastic_depths", tuple(sorted(depths)))
        legal = not depths or (len(set(depths)) == len(depths) > 1 and all(1 <= depth <= self.depth for depth in depths))
        remedy = f"must be empty, or several different depths in 1..{self.depth} (model.depth)"
        require(legal, "model.elastic_depths", list(depths), remedy)
        legal = not depths or self.diffusion_depth in depths
        require(legal, "model.diffusion_depth", self.diffusion_depth, f"must be one of model.elastic_depths = {list(depths)}")

    def _check_blocks(self) -> None:
        rows = math.isqrt(self.ar_length)
        require(rows**2 == self.ar_length, "model.ar_length", self.ar_length, "must be a square number (1, 4, 16, 64, ...)")
        legal = self.latent_size % rows == 0
        remedy = f"its root {rows} must divide model.latent_size = {self.latent_size}"
        require(legal, "model.ar_length", self.ar_length, remedy)
        factor = self.unet.downsampling
        remedy = f"their downsampling by {factor} must divide a block's side, {self.block_size} latents"
        require(self.block_size % factor == 0, "model.unet.channels", list(self.unet.channels), remedy)

    def _check_heads(self) -> None:
        remedy = f"must be a multiple of model.num_heads = {self.num_heads}"
        require(self.width % self.num_heads == 0, "model.width", self.width, remedy)
        remedy = (
            f"the head width, model.width / model.num_heads = {self.head_width}, must divide by 4 (two axes of rotated pairs)"
        )
        require(self.head_width % 4 == 0, "model.num_heads", self.num_heads, remedy)
        legal = self.attention_backend != "flex" or self.head_width >= MIN_FLEX_HEAD_WIDTH
        remedy = f"needs heads of at least {MIN_FLEX_HEAD_WIDTH}, they are {self.head_width} wide; set it to sdpa or auto"
        require(legal, "model.attention_backend", self.attention_backend, remedy)
        legal = is_integer(self.kv_heads) and self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0
        require(legal, "model.num_kv_heads", self.num_kv_heads, f"must divide model.num_heads = {self.num_heads}")

    def sampled_depth(self, depth: int | None = None) -> int | None:
        """The depth at which an elastic run is sampled, by default `diffusion_depth`; None: the run is not elastic.

        Raises:
            ConfigError: the run was not trained with this depth.
        """
        trained = self.elastic_depths or (self.diffusion_depth,)
        if depth not in (None, *trained):
            raise ConfigError(f"diffusion depth {depth}: not trained; the run has {', '.join(map(str, trained))}")
        return (depth or self.diffusion_depth) if self.elastic_depths else None

    def at_depth(self, depth: int | None) -> ModelConfig:
        """The model with this fixed diffusion depth; None: unchanged."""
        return self if depth is None else _at_depth(self, depth)

    @property
    def head_width(self) -> int:
        """Width of one attention head (K)."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: `num_kv_heads`, or `num_heads` if that is null."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ar_depth(self) -> int:
        """Number of layers of the AR stage, N - D."""
        return self.depth - self.diffusion_depth

    @property
    def block_rows(self) -> int:
        """Number of blocks along each side of the image."""
        return math.isqrt(self.ar_length)

    @property
    def block_size(self) -> int:
        """Rows and columns of a block's latents."""
        return self.latent_size // self.block_rows

    @property
    def token_rows(self) -> int:
        """Rows and columns of a block's tokens."""
        return self.block_size // self.unet.downsampling

    @property
    def block_tokens(self) -> int:
        """Number of tokens of a block (S)."""
        return self.token_rows**2


@lru_cache(maxsize=256)
def _at_depth(config: ModelConfig, depth: int) -> ModelConfig:
    return replace(config, diffusion_depth=depth, elastic_depths=())
