"""What an experiment is: dataclasses, loading and rules.

Every other module reads these and this one imports none of them, nor torch: a mistake in a YAML file is reported at once.
A rule that is broken raises `ConfigError` with the field, its value and the legal values; construction in Python and
loading from YAML go through the same rules, because they live in `__post_init__`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = [
    "ConfigError",
    "DiffusionConfig",
    "ExperimentConfig",
    "LossConfig",
    "ModelConfig",
    "TextConfig",
    "UNetConfig",
    "check_losses",
    "load_experiment",
]


MIN_FLEX_HEAD_WIDTH = 16
"""FlexAttention's kernels take no narrower heads."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, its value and the legal ones."""


def _require(legal: bool, name: str, value: object, remedy: str) -> None:
    if not legal:
        raise ConfigError(f"{name} = {value!r}: {remedy}")


def _require_at_least(least: int, section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(_is_integer(value) and value >= least, f"{section}.{name}", value, f"must be an integer of at least {least}")


def _require_types(section: str, config: Any) -> None:
    """Check what OmegaConf checks for YAML and nothing does for plain construction: choices, truths, sections, lists."""
    for name, hint in get_type_hints(type(config)).items():
        value, arguments = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal:
            _require(value in arguments, f"{section}.{name}", value, f"must be one of {', '.join(arguments)}")
        elif get_origin(hint) is tuple:
            legal = isinstance(value, Sequence) and all(type(entry) is arguments[0] for entry in value)
            _require(legal, f"{section}.{name}", value, f"must be a list of {arguments[0].__name__}")
            object.__setattr__(config, name, tuple(value))
        elif hint in (bool, UNetConfig, TextConfig | None):
            _require(isinstance(value, hint), f"{section}.{name}", value, f"must be of type {getattr(hint, '__name__', hint)}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class UNetConfig:
    """The convolutional embedding of a block (downsampler) and its inverse (upsampler); one entry per level.

    Every level but the last halves the block's sides; a single level keeps them.
    """

    channels: tuple[int, ...] = (512, 1024)
    """Feature channels of each level."""
    layers: tuple[int, ...] = (2, 2)
    """ResNet layers of each level (the upsampler has one more, as in diffusers)."""
    attention: tuple[bool, ...] = (False, True)
    """Whether a self-attention follows each ResNet layer of the level."""
    groups: int = 8
    """Groups of the group norms."""
    num_heads: int = 8
    """Attention heads; the head width is channels / num_heads."""
    time_embed_dim: int = 128
    """Width of the timestep embedding."""

    def __post_init__(self) -> None:
        _require_types("model.unet", self)
        _require(len(self.channels) > 0, "model.unet.channels", list(self.channels), "must name at least one level")
        for name in ("layers", "attention"):
            value = getattr(self, name)
            _require(
                len(value) == len(self.channels),
                f"model.unet.{name}",
                list(value),
                f"must have one entry for each of the {len(self.channels)} levels of model.unet.channels",
            )
        _require_at_least(1, "model.unet", self, "groups", "num_heads", "time_embed_dim")
        for channels, attention in zip(self.channels, self.attention, strict=True):
            legal = channels > 0 and channels % self.groups == 0
            _require(
                legal,
                "model.unet.channels",
                list(self.channels),
                f"must be positive multiples of model.unet.groups = {self.groups}",
            )
            legal = not attention or channels % self.num_heads == 0
            remedy = f"levels with attention must be multiples of model.unet.num_heads = {self.num_heads}"
            _require(legal, "model.unet.channels", list(self.channels), remedy)
        _require(min(self.layers) >= 1, "model.unet.layers", list(self.layers), "must be at least 1 on every level")

    @property
    def downsampling(self) -> int:
        """Rows (columns) of latents that become one row (column) of tokens."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Text before the image: tower, embeddings and language-model head."""

    vocab_size: int = 128_256
    """Token ids are 0 .. vocab_size - 1. The default is Llama 3's vocabulary (Table 7)."""
    length: int = 32
    """Tokens of a prompt after padding."""
    pad_token_id: int = 128_004
    """Pads short prompts; a prompt of nothing else is the null text of classifier-free guidance. Default: Llama 3's."""
    dropout: float = 0.1
    """Probability that training replaces a prompt by the null text."""

    def __post_init__(self) -> None:
        _require_at_least(2, "model.text", self, "vocab_size")
        _require_at_least(1, "model.text", self, "length")
        legal = _is_integer(self.pad_token_id) and 0 <= self.pad_token_id < self.vocab_size
        _require(
            legal,
            "model.text.pad_token_id",
            self.pad_token_id,
            f"must be in 0..{self.vocab_size - 1} (model.text.vocab_size - 1)",
        )
        _require(0 <= self.dropout < 1, "model.text.dropout", self.dropout, "must be at least 0 and below 1")


@dataclass(frozen=True)
class ModelConfig:
    """The hybrid Transformer. Defaults: the released FFHQ-1024 model, but for prediction type, RoPE and clean timestep."""

    latent_channels: int = 4
    """Channels of the latents (C)."""
    latent_size: int = 128
    """Rows and columns of an image's latents."""
    ar_length: int = 16
    """Blocks per image (l, Table 2), a square number: blocks are square tiles in raster order."""
    depth: int = 28
    """Transformer layers in all (N)."""
    diffusion_depth: int = 14
    """The last D layers iterate in the denoising loop, the first N - D run once per block (Table 1)."""
    width: int = 1152
    """Model width."""
    num_heads: int = 18
    """Query heads; the head width is width / num_heads."""
    num_kv_heads: int | None = None
    """Key/value heads, each shared by num_heads / num_kv_heads query heads; null: as many as query heads."""
    ffn_width: int = 4096
    """Hidden width of the SwiGLU."""
    use_clean_blocks: bool = True
    """Prepend the clean blocks to the sequence (Table 3)."""
    use_condition: bool = True
    """Add the AR stage's output to the embedded noisy block (Eq. 4, Table 3)."""
    local_denoising: bool = False
    """In the diffusion stage a block attends to itself (and the text) alone (Table 5)."""
    parameter_sets: Literal["separate", "shared"] = "separate"
    """A parameter set for each of text, clean and noisy tokens, or one for all (Table 4)."""
    rope: Literal["axial", "released"] = "axial"
    """Rotary positions: each axis in its half of the head, or the released code's form."""
    prediction_type: Literal["sample", "epsilon", "v_prediction"] = "sample"
    """What the network predicts for the noisy block."""
    clean_timestep: Literal["zero", "released"] = "zero"
    """Timestep that clean blocks are embedded with: 0, or the released habit (the noisy block's in training, the
    scheduler's last when sampling)."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Embedding of blocks."""
    text: TextConfig | None = None
    """Text before the image; null: none."""
    attention_backend: Literal["auto", "flex", "sdpa"] = "auto"
    """FlexAttention or scaled_dot_product_attention; auto: flex on CUDA."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: bool = False
    """torch.compile each layer."""

    def __post_init__(self) -> None:
        _require_at_least(
            1, "model", self, "latent_channels", "latent_size", "ar_length", "depth", "width", "num_heads", "ffn_width"
        )
        _require_types("model", self)
        legal = _is_integer(self.diffusion_depth) and 1 <= self.diffusion_depth <= self.depth
        _require(legal, "model.diffusion_depth", self.diffusion_depth, f"must be in 1..{self.depth} (model.depth)")
        self._check_blocks()
        self._check_heads()

    def _check_blocks(self) -> None:
        rows = math.isqrt(self.ar_length)
        _require(rows**2 == self.ar_length, "model.ar_length", self.ar_length, "must be a square number (1, 4, 16, 64, ...)")
        legal = self.latent_size % rows == 0
        remedy = f"its root {rows} must divide model.latent_size = {self.latent_size}"
        _require(legal, "model.ar_length", self.ar_length, remedy)
        factor = self.unet.downsampling
        remedy = f"their downsampling by {factor} must divide a block's side, {self.block_size} latents"
        _require(self.block_size % factor == 0, "model.unet.channels", list(self.unet.channels), remedy)

    def _check_heads(self) -> None:
        remedy = f"must be a multiple of model.num_heads = {self.num_heads}"
        _require(self.width % self.num_heads == 0, "model.width", self.width, remedy)
        remedy = (
            f"the head width, model.width / model.num_heads = {self.head_width}, must divide by 4 (two axes of rotated pairs)"
        )
        _require(self.head_width % 4 == 0, "model.num_heads", self.num_heads, remedy)
        legal = self.attention_backend != "flex" or self.head_width >= MIN_FLEX_HEAD_WIDTH
        remedy = f"needs heads of at least {MIN_FLEX_HEAD_WIDTH}, they are {self.head_width} wide; set it to sdpa or auto"
        _require(legal, "model.attention_backend", self.attention_backend, remedy)
        legal = _is_integer(self.kv_heads) and self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0
        _require(legal, "model.num_kv_heads", self.num_kv_heads, f"must divide model.num_heads = {self.num_heads}")

    @property
    def head_width(self) -> int:
        """Width of one attention head (K)."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, `num_kv_heads` resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ar_depth(self) -> int:
        """Layers of the AR stage, N - D."""
        return self.depth - self.diffusion_depth

    @property
    def block_rows(self) -> int:
        """Blocks along each side of the image."""
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
        """Tokens of a block (S)."""
        return self.token_rows**2


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (DDPM, linear betas) and the noise draws of training."""

    train_timesteps: int = 1000
    """Timesteps t = 0 .. train_timesteps - 1."""
    beta_start: float = 1e-4
    """Noise variance of the first timestep."""
    beta_end: float = 2e-2
    """Noise variance of the last timestep."""
    draws_per_image: int = 1
    """Independent (t, noise) draws that go through the diffusion stage for one pass of clean tower and AR stage."""

    def __post_init__(self) -> None:
        _require_at_least(1, "diffusion", self, "train_timesteps", "draws_per_image")
        _require(0 < self.beta_start < 1, "diffusion.beta_start", self.beta_start, "must be between 0 and 1")
        legal = self.beta_start <= self.beta_end < 1
        _require(
            legal, "diffusion.beta_end", self.beta_end, f"must be at least diffusion.beta_start = {self.beta_start} and below 1"
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the total loss (Eq. 6). A loss of weight zero is not computed."""

    lambda_text: float = 1.0
    """Next-token loss; has no effect without text."""
    lambda_image: float = 5.0
    """Denoised block against its target."""
    lambda_hidden: float = 0.1
    """Upsampled condition against the block's clean latents."""
    lambda_clean_tower: float = 0.0
    """Clean tower's output at a block against the next block's clean latents."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            legal = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            _require(legal, f"loss.{item.name}", value, "must be a finite number of at least 0")


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: everything that a run needs to know."""

    name: str = "madformer"
    """Name of the experiment."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        check_losses(self.model, self.loss)
        legal = self.diffusion.draws_per_image == 1 or self.model.clean_timestep == "zero"
        remedy = "several draws share the clean blocks: set diffusion.draws_per_image=1 or model.clean_timestep=zero"
        _require(legal, "diffusion.draws_per_image", self.diffusion.draws_per_image, remedy)


def check_losses(model: ModelConfig, loss: LossConfig) -> None:
    """Refuse losses on what the model does not have.

    Raises:
        ConfigError: the hidden loss without the condition, the clean-tower loss without clean blocks or a second block,
            or no image loss.
    """
    _require(loss.lambda_image > 0, "loss.lambda_image", loss.lambda_image, "must be above 0: nothing else trains the denoiser")
    legal = loss.lambda_hidden == 0 or model.use_condition
    remedy = "needs the condition: set loss.lambda_hidden=0 or model.use_condition=true"
    _require(legal, "loss.lambda_hidden", loss.lambda_hidden, remedy)
    legal = loss.lambda_clean_tower == 0 or model.use_clean_blocks
    remedy = "needs clean blocks: set loss.lambda_clean_tower=0 or model.use_clean_blocks=true"
    _require(legal, "loss.lambda_clean_tower", loss.lambda_clean_tower, remedy)
    legal = loss.lambda_clean_tower == 0 or model.ar_length > 1
    remedy = "a single block has no next one: set loss.lambda_clean_tower=0 or model.ar_length to 4, 16, ..."
    _require(legal, "loss.lambda_clean_tower", loss.lambda_clean_tower, remedy)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML.

    Args:
        path: the YAML file; it holds only what differs from the defaults.
        overrides: `section.field=value` strings, applied on top.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: broken YAML, an unknown key (the message names the nearest real one), a value of the wrong type or
            out of its legal range, or fields that contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such experiment file")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    _check_is_mapping(loaded, str(path))
    _check_keys(OmegaConf.to_container(loaded), ExperimentConfig, str(path))
    for override in overrides:
        _require("=" in override, "override", override, "must have the form section.field=value")
    try:
        typed = OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {list(overrides)}: {' '.join(str(error).split())}") from error
    _check_keys(OmegaConf.to_container(typed), ExperimentConfig, "override")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), loaded, typed)
        return cast(ExperimentConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "a list's entry"  # the only place that OmegaConf does not name
        what = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value")
        raise ConfigError(f"{path}: {where}: {what}") from error


def _check_is_mapping(loaded: object, where: str) -> None:
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{where}: must be a mapping of sections (model, diffusion, loss) to fields")


def _check_keys(given: Any, schema: type, where: str, prefix: str = "") -> None:
    """Refuse unknown keys, naming the nearest real one, and plain values where a section belongs."""
    hints = get_type_hints(schema)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} = {given!r}: must be a mapping of its fields ({', '.join(hints)})")
    for key, value in given.items():
        if key not in hints:
            near = difflib.get_close_matches(f"{prefix}{key}", list(_all_keys(ExperimentConfig)), n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {prefix}{key}; the nearest is {near[0]}")
        choices = (hints[key], *get_args(hints[key]))
        for section in choices:
            if is_dataclass(section) and not (value is None and type(None) in choices):
                _check_keys(value, cast(type, section), where, f"{prefix}{key}.")


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        for section in (hint, *get_args(hint)):
            if is_dataclass(section):
                yield from _all_keys(cast(type, section), f"{prefix}{name}.")
