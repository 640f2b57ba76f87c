"""Codecs by name (`data.codec`): they map images to latents and back. Write what they decode as grids and PNG files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from madformer.config.data import PIXELS
from madformer.config.model import ModelConfig
from madformer.config.validation import is_integer
from madformer.data.autoencoders import DiffusersAutoencoder, load_autoencoder
from madformer.errors import ConfigError, InputError
from madformer.lookup import build_custom, modules_of
from madformer.runs.checkpoints import weights_sha256
from madformer.runs.files import atomic_write, require_readable

__all__ = [
    "Autoencoder",
    "Codec",
    "build_codec",
    "read_settings",
    "require_fit",
    "save_png",
    "to_grid",
    "to_pixels",
    "to_tiles",
]

MIN_SIDE = 64
"""In a grid, smaller images are magnified to at least this many pixels, or nobody sees them."""

MAX_GRID = 2048
"""Grids of more pixels along a side are made of reduced images: 64 of 1024 x 1024 would be 200 MB, and in TensorBoard, too."""

SETTINGS = "madformer"
"""Text chunk of a PNG file that holds how it was made, as JSON."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger(__name__)


class Autoencoder(Protocol):
    """A custom codec: a class, built without arguments, with these attributes and methods. It need not be an nn.Module.

    It may also have `scaling_factor` (default 1) and `shift_factor` (default 0), each a number or one for each channel. The
    model sees `(latents - shift_factor) * scaling_factor`. The codec's weights are frozen, cast to `data.codec_dtype` and moved
    to the device. If it has an attribute `use_tiling`, this is set while a single image does not fit into memory.
    """

    latent_channels: int
    downsampling: int

    def encode(self, images_BCYX: Tensor, /) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, Y, X] in [-1, 1] to the posterior's mean and deviation, both [B, C, Y / f, X / f], unscaled."""
        ...

    def decode(self, latents_BChw: Tensor, /) -> Tensor:
        """Map unscaled latents [B, C, Y / f, X / f] to images [B, 3, Y, X] in [-1, 1]."""
        ...


class _Pixels:
    latent_channels = 3
    downsampling = 1

    def encode(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        return images_BCYX, torch.zeros_like(images_BCYX)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        return latents_BChw


class _Chunking(NamedTuple):
    """The number of images in one call of an autoencoder, and whether it works in tiles."""

    images: int
    tiled: bool = False


class Codec:
    """A frozen autoencoder and its normalisation: the model sees latents `(mean - shift) * scale`.

    If memory does not suffice, it takes fewer images at once, and then a single image in tiles. It does so from then on for
    images of the same size.

    Attributes:
        name: the value of `data.codec`.
        latent_channels: channels of the latents.
        downsampling: pixels along one side of a latent pixel.
        device: the device of its weights and results.
    """

    def __init__(self, name: str, autoencoder: Autoencoder, kind: str, dtype: torch.dtype) -> None:
        """Take an autoencoder on the CPU; `kind` is the name of its class."""
        self.name = name
        self.latent_channels = autoencoder.latent_channels
        self.downsampling = autoencoder.downsampling
        self.device = torch.device("cpu")
        self._autoencoder = autoencoder
        self._kind = kind
        self._dtype = dtype
        self._shift = _per_channel(autoencoder, "shift_factor", 0.0)
        self._scale = _per_channel(autoencoder, "scaling_factor", 1.0)
        self._chunkings: dict[tuple[object, ...], _Chunking] = {}
        self._weights = modules_of(autoencoder)
        self._weights.eval().requires_grad_(False)
        if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in self._weights.state_dict().values()):
            _ = self.sha256  # computed before the cast, so that it does not depend on the dtype
            self._weights.to(dtype)

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the class, the weights and the normalisation, independent of dtype and device."""
        parts = (self._kind, self._shift.flatten().tolist(), self._scale.flatten().tolist(), weights_sha256(self._weights))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def to(self, device: torch.device | str) -> Codec:
        """Move the codec to a device, and return it."""
        self.device = torch.device(device)
        self._weights.to(self.device)
        self._shift, self._scale = self._shift.to(self.device), self._scale.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and standard deviation of scaled latents.

        Args:
            images_BCYX: [B, 3, Y, X] floating point in [-1, 1], on any device. `pixels` also accepts one channel. Y and X are
                multiples of the downsampling.

        Returns:
            Both [B, C, Y / downsampling, X / downsampling] float32, on the codec's device. The deviation is 0 if the
            autoencoder is deterministic.

        Raises:
            ValueError: another shape, or a type that is not floating point.
            ConfigError: a custom codec returns a wrong shape.
            torch.OutOfMemoryError: a single image does not fit.
        """
        self._check("images", images_BCYX, 3)
        batch, channels, height, width = images_BCYX.shape
        if height % self.downsampling or width % self.downsampling:
            remedy = f"codec {self.name} needs multiples of {self.downsampling}, its downsampling"
            raise ValueError(f"images of {height} x {width} pixels: {remedy}")
        channels = channels if self._takes_grey else self.latent_channels
        shape = (batch, channels, height // self.downsampling, width // self.downsampling)
        moments = self._in_chunks("encode", self._autoencoder.encode, images_BCYX)
        if len(moments) != 2 or any(moment.shape != shape for moment in moments):
            raise self._misfit("encode", f"a mean and a standard deviation of shape {list(shape)}", moments)
        mean_BChw, deviation_BChw = moments
        return (mean_BChw - self._shift) * self._scale, deviation_BChw * self._scale.abs()

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """The images of scaled latents.

        Args:
            latents_BChw: [B, C, h, w] floating point, on any device. `pixels` also accepts one channel.

        Returns:
            [B, 3, h * downsampling, w * downsampling] float32 in [-1, 1], on the codec's device. `pixels` returns as many
            channels as it gets.

        Raises:
            ValueError: another shape, or a type that is not floating point.
            ConfigError: a custom codec returns a wrong shape.
            torch.OutOfMemoryError: a single image does not fit.
        """
        self._check("latents", latents_BChw, self.latent_channels)
        batch, channels, height, width = latents_BChw.shape
        shape = (batch, channels if self._takes_grey else 3, height * self.downsampling, width * self.downsampling)
        unscaled_BChw = latents_BChw.to(self.device, torch.float32) / self._scale + self._shift
        images = self._in_chunks("decode", lambda latents: (self._autoencoder.decode(latents),), unscaled_BChw)
        if images[0].shape != shape:
            raise self._misfit("decode", f"images of shape {list(shape)}", images)
        return images[0].clamp(-1, 1)

    @property
    def _takes_grey(self) -> bool:
        return self.name == PIXELS

    def _check(self, what: str, tensor_BCYX: Tensor, channels: int) -> None:
        legal = (1, channels) if self._takes_grey else (channels,)
        if tensor_BCYX.ndim != 4 or tensor_BCYX.shape[1] not in legal:
            expected = f"[B, {' or '.join(map(str, legal))}, Y, X]"
            raise ValueError(f"{what} of shape {list(tensor_BCYX.shape)}: codec {self.name} needs {expected}")
        if not tensor_BCYX.is_floating_point():
            raise ValueError(f"{what} of type {tensor_BCYX.dtype}: codec {self.name} needs floating point")

    def _misfit(self, method: str, expected: str, found: tuple[Tensor, ...]) -> ConfigError:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in found)
        return ConfigError(f"data.codec = {self.name!r}: {self._kind}.{method} must give {expected}, not {shapes}")

    def _in_chunks(
        self, method: str, function: Callable[[Tensor], tuple[Tensor, ...]], inputs_BCYX: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply a method of the autoencoder to as many images at once as fit into memory. Results are float32."""
        size = (method, *inputs_BCYX.shape[2:])
        before = chunking = self._chunkings.get(size, _Chunking(len(inputs_BCYX)))
        while True:
            try:
                results = [self._apply(function, chunk, chunking.tiled) for chunk in inputs_BCYX.split(chunking.images)]
                break
            except torch.OutOfMemoryError:
                if chunking.images > 1:
                    chunking = chunking._replace(images=min(chunking.images, len(inputs_BCYX)) // 2 or 1)
                elif not chunking.tiled and self._tileable_modules():
                    chunking = chunking._replace(tiled=True)
                else:
                    raise
        if chunking != before:
            self._chunkings[size] = chunking
            tiles = ", in overlapping tiles whose seams may show" if chunking.tiled else ""
            _log.warning(
                "codec %s: memory does not suffice to %s %d images at once: from now on %d at once%s",
                *(self.name, method, min(before.images, len(inputs_BCYX)), chunking.images, tiles),
            )
        return results[0] if len(results) == 1 else tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def _apply(self, function: Callable[[Tensor], tuple[Tensor, ...]], chunk_BCYX: Tensor, tiled: bool) -> tuple[Tensor, ...]:
        modules = self._tileable_modules() if tiled else []
        try:
            for module in modules:
                module.use_tiling = True
            with torch.autocast(self.device.type, enabled=False):  # the trainer's precision must not affect the codec
                results = function(chunk_BCYX.to(self.device, self._dtype))
        finally:
            for module in modules:
                module.use_tiling = False
        return tuple(result.to(self.device, torch.float32) for result in results)

    def _tileable_modules(self) -> list[Any]:
        modules = (self._autoencoder, *self._weights.modules())
        return [module for module in modules if getattr(module, "use_tiling", None) is False]


def build_codec(
    name: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32", device: torch.device | str = "cpu"
) -> Codec:
    """Build the codec of that name. The global random state stays as it is.

    Args:
        name: as in `data.codec`.
        dtype: dtype in which an autoencoder computes. If the configuration of an autoencoder of diffusers says `force_upcast`,
            float32 takes the place of float16, as in diffusers' pipelines. `pixels` is always float32.
        device: where it computes.

    Raises:
        ConfigError: the codec does not exist, is not available, or is not a codec.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            autoencoder, kind = _build_autoencoder(name)
            return Codec(name, autoencoder, kind, _choose_dtype(name, autoencoder, _DTYPES[dtype])).to(device)
    except InputError as error:
        raise ConfigError(f"data.codec = {name!r}: {error}") from error


def require_fit(codec: Codec, model: ModelConfig) -> None:
    """Refuse a codec whose latents do not have the model's channels. For `pixels`, one channel (grey) is legal too.

    Raises:
        ConfigError: the channels differ. The message has both numbers.
    """
    theirs, ours = codec.latent_channels, model.latent_channels
    if theirs != ours and (codec.name, ours) != (PIXELS, 1):
        remedy = f"set model.latent_channels={theirs}, or another codec"
        raise ConfigError(f"data.codec = {codec.name!r}: its latents have {theirs} channels, the model's {ours}: {remedy}")


def _build_autoencoder(name: str) -> tuple[Autoencoder, str]:
    """An autoencoder and the name of its class."""
    if name == PIXELS:
        return _Pixels(), PIXELS
    if name.startswith("vae:"):
        autoencoder = load_autoencoder(name.removeprefix("vae:"))
        return autoencoder, type(autoencoder.module).__name__
    return _build_custom_autoencoder(name)


def _choose_dtype(name: str, autoencoder: Autoencoder, requested: torch.dtype) -> torch.dtype:
    if isinstance(autoencoder, _Pixels):
        return torch.float32
    if requested is torch.float16 and isinstance(autoencoder, DiffusersAutoencoder) and autoencoder.overflows_in_float16:
        _log.warning("codec %s overflows in %s: it computes in %s", name, requested, torch.float32)
        return torch.float32
    return requested


def _build_custom_autoencoder(name: str) -> tuple[Autoencoder, str]:
    location, _, kind = name.rpartition(":")
    if not location or not kind.isidentifier():
        raise InputError(f"must be {PIXELS}, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class")
    autoencoder = build_custom(location, kind)
    for attribute in ("latent_channels", "downsampling"):
        value: Any = getattr(autoencoder, attribute, None)
        if not is_integer(value) or value < 1:
            raise InputError(f"{kind}.{attribute} must be an integer of at least 1, not {value!r}")
    for method in ("encode", "decode"):
        if not callable(getattr(autoencoder, method, None)):
            raise InputError(f"{kind} has no method {method}")
    return autoencoder, kind


def _per_channel(autoencoder: Autoencoder, attribute: str, default: float) -> Tensor:
    """A factor of the normalisation, float32, [1, 1, 1] or [C, 1, 1]."""
    value = getattr(autoencoder, attribute, default)
    try:
        factor = torch.as_tensor(value, dtype=torch.float32).detach().cpu().reshape(-1, 1, 1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{attribute} must be a number, or one for each channel, not {value!r}") from error
    if len(factor) not in (1, autoencoder.latent_channels):
        raise InputError(f"{attribute} must be a number, or one for each of {autoencoder.latent_channels} channels")
    if not math.isfinite(factor.abs().sum()) or (attribute == "scaling_factor" and not factor.all()):
        raise InputError(f"{attribute} must be finite, and no scale 0; it is {factor.flatten().tolist()}")
    return factor


# ---- Pictures


def to_pixels(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] (the rest is clipped) to [B, Y, X, 3] bytes; one channel is grey, of more the first three are shown."""
    bytes_BCYX = ((images_BCYX.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    shown_BCYX = bytes_BCYX[:, :3] if bytes_BCYX.shape[1] >= 3 else bytes_BCYX[:, :1].expand(-1, 3, -1, -1)
    return rearrange(shown_BCYX, "b c y x -> b y x c").numpy()


def to_grid(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] side by side: [Y, X, 3] bytes."""
    return to_tiles(to_pixels(images_BCYX))


def to_tiles(pixels_BYX3: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images side by side, row by row, with a thin frame: [Y, X, 3] bytes.

    Small ones are magnified, and large ones reduced where there are many of them, both by an integer.

    Args:
        pixels_BYX3: the images, bytes.
        columns: images in a row; None: a nearly square grid.
    """
    columns = columns or math.ceil(math.sqrt(len(pixels_BYX3)))
    reduction = math.ceil(columns * max(pixels_BYX3.shape[1:3]) / MAX_GRID)
    if reduction > 1:
        pixels_BYX3 = np.stack([np.asarray(Image.fromarray(pixels_YX3).reduce(reduction)) for pixels_YX3 in pixels_BYX3])
    factor = math.ceil(MIN_SIDE / pixels_BYX3.shape[2])
    large_BYX3 = repeat(pixels_BYX3, "b y x c -> b (y fy) (x fx) c", fy=factor, fx=factor)
    framed_BYX3 = np.pad(large_BYX3, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
    missing = -len(framed_BYX3) % columns
    filled_BYX3 = np.pad(framed_BYX3, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=96)
    return rearrange(filled_BYX3, "(rows columns) y x c -> (rows y) (columns x) c", columns=columns)


def save_png(pixels_YX3: np.ndarray, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a whole PNG file, with how it was made in its metadata."""
    chunks = PngInfo()
    if settings is not None:
        chunks.add_text(SETTINGS, json.dumps(settings))
    with atomic_write(path) as temporary:
        Image.fromarray(pixels_YX3).save(temporary, format="PNG", pnginfo=chunks)


def read_settings(path: Path) -> dict[str, Any] | None:
    """How a PNG file was made, as `save_png` wrote it; empty if it does not say. None: there is no such file, or it is torn."""
    require_readable(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(SETTINGS, "")
            image.verify()
    except (OSError, SyntaxError, ValueError):  # SyntaxError is Pillow's for a wrong checksum
        return None
    try:
        settings = json.loads(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}
