"""The interface of a feature network (images in, features out, a hash), and custom networks."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madformer.config.evaluation import SHIPPED_NETWORKS
from madformer.config.validation import is_integer
from madformer.errors import ConfigError, InputError
from madformer.evaluation.measurement import INCEPTION
from madformer.lookup import build_custom, describe, modules_of
from madformer.runs.checkpoints import weights_sha256

_RESERVED = (INCEPTION, *SHIPPED_NETWORKS, "dinov2")
"""Labels that belong to certain networks."""

_PROBE_SIZE = 256
"""Pixels along a side of the images for the check."""


@dataclass(frozen=True)
class Features:
    """A network's outputs for a batch of images."""

    features_BD: Tensor
    """float32, on the network's device."""
    logits_BK: Tensor | None = None
    """Logits of classes without the last layer's bias, for the Inception score. Only `inception` has them."""


class FeatureNetwork:
    """A frozen network that maps each image to a vector. It always computes in float32, without TF32 and autocast.

    Attributes:
        name: as in `evaluation.feature_networks`.
        label: the part of metrics' names that stands for the network, such as `dinov2`.
        width: d, the features' length.
        sha256: hexadecimal SHA-256 of the weights and of all else that determines features, independent of the device.
        device: where it computes, and where its features are.
    """

    def __init__(self, name: str, label: str, module: nn.Module, sha256: str, width: int | None = None) -> None:
        """Take a network on the CPU.

        Args:
            name, label, sha256: see above.
            module: maps images as in `__call__` to features [B, d], or to `Features`.
            width: the features' length; None: it is found by trying RGB images.

        Raises:
            InputError: the try shows that this is not a feature network.
        """
        self.name, self.label, self.sha256 = name, label, sha256
        self.device = torch.device("cpu")
        self._module = module.eval().requires_grad_(False)
        self.width = self._try_images() if width is None else width

    def to(self, device: torch.device | str) -> FeatureNetwork:
        """Move the network to a device, and return it."""
        self.device = torch.device(device)
        self._module.to(self.device)
        return self

    def __call__(self, images_BCYX: Tensor) -> Features:
        """Features of images. The network itself clips images to [-1, 1].

        Args:
            images_BCYX: [B, C, Y, X] floating point in [-1, 1], on any device.

        Raises:
            ValueError: images that are not finite, of another type, or of a shape that the network does not accept.
            ConfigError: a custom network returns something other than [B, d].
        """
        if images_BCYX.ndim != 4:
            raise ValueError(f"images of shape {list(images_BCYX.shape)}: {self.name} needs [B, C, Y, X]")
        if not images_BCYX.is_floating_point():
            raise ValueError(f"images of type {images_BCYX.dtype}: {self.name} needs floating point in [-1, 1]")
        if not images_BCYX.isfinite().all():
            raise ValueError("images hold NaN or infinity: they have no features")
        found = self._apply(images_BCYX.to(self.device))
        try:
            return _require_features(found, len(images_BCYX), self.width)
        except InputError as error:
            raise network_error(self.name, error) from error

    @torch.no_grad()
    def _apply(self, images_BCYX: Tensor) -> object:
        with _full_precision(self.device):
            return self._module(images_BCYX)

    def try_images(self, channels: int, size: int) -> None:
        """Check that the network accepts square images of this many channels and pixels along a side.

        Raises:
            ConfigError: it does not.
        """
        try:
            self(torch.zeros(2, channels, size, size))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # other people's code
            reason = f"does not take images of {channels} x {size} x {size}: {describe(error)}"
            raise network_error(self.name, InputError(f"{reason}; name another network")) from error

    def _try_images(self) -> int:
        images_BCYX = torch.linspace(-1, 1, 2 * 3 * _PROBE_SIZE**2).reshape(2, 3, _PROBE_SIZE, _PROBE_SIZE)
        try:
            found = [self._apply(images_BCYX) for _ in range(2)]
        except Exception as error:  # other people's code
            raise InputError(f"fails on images of shape {list(images_BCYX.shape)}: {describe(error)}") from error
        once_BD, again_BD = (_require_features(each, len(images_BCYX)).features_BD for each in found)
        if not torch.allclose(once_BD, again_BD, rtol=1e-3, atol=1e-3 * float(once_BD.abs().max())):
            raise InputError("gives different features for the same images")
        return once_BD.shape[1]


def make_label(kind: str, text: str) -> str:
    """A label of lower-case letters, digits and underscores, made from `text`. Reserved labels get the prefix `kind`."""
    label = re.sub(r"[^a-z0-9]", "_", text.lower())
    return f"{kind}_{label}" if label in _RESERVED else label


def network_error(name: str, reason: InputError) -> ConfigError:
    """An error on a network, with the field that names it."""
    return ConfigError(f"evaluation.feature_networks: {name!r}: {reason}")


def as_files(images_BCYX: Tensor) -> Tensor:
    """Images as bytes, as files hold them. Published distances are computed on files.

    Args:
        images_BCYX: [B, 1 or 3, Y, X] floating point. Values are clipped to [-1, 1], and grey becomes RGB.

    Returns:
        [B, 3, Y, X] uint8.

    Raises:
        ValueError: another number of channels.
    """
    if images_BCYX.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {list(images_BCYX.shape)}: [B, 1 or 3, Y, X] is needed")
    bytes_BCYX = ((images_BCYX.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return bytes_BCYX.expand(-1, 3, -1, -1).contiguous()


def _require_features(found: object, batch: int, width: int | None = None) -> Features:
    features = found if isinstance(found, Features) else Features(found) if isinstance(found, Tensor) else None
    expected = f"features of shape [{batch}, {width or 'd'}]"
    if features is None:
        raise InputError(f"must give {expected}, not {type(found).__name__}")
    shape = list(features.features_BD.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] != (width or shape[1]) or not features.features_BD.is_floating_point():
        raise InputError(f"must give {expected}, floating point; not {shape}, {features.features_BD.dtype}")
    return Features(features.features_BD.float(), features.logits_BK)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Compute in full float32, whatever the trainer's precision."""
    backends: Any = torch.backends  # whose types lack these switches
    switches = (
        *(backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        *(backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul),
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


class _Custom(nn.Module):
    def __init__(self, custom: Any) -> None:
        super().__init__()
        self.custom = custom
        self.weights = modules_of(custom)

    def forward(self, images_BCYX: Tensor) -> Any:
        return self.custom(images_BCYX.float().clamp(-1, 1))


def build_custom_network(name: str) -> FeatureNetwork:
    """The network of a class that `module.path:Class` or `file.py:Class` names. The class is built without arguments.

    It may be an nn.Module, but need not. It is called with images [B, C, Y, X] float32 in [-1, 1] and returns features [B, d].
    If it has an attribute `num_features`, that is d. Else it must accept RGB images of 256 x 256, with which it is tried. Its
    SHA-256 covers the weights and the file of the class.

    Raises:
        InputError: the class cannot be imported or built, or is not a feature network.
    """
    place, _, kind = name.rpartition(":")
    custom = build_custom(place, kind)
    if not callable(custom):
        raise InputError(f"{kind} cannot be called: it needs forward or __call__")
    width = getattr(custom, "num_features", None)
    if width is not None and not (is_integer(width) and width >= 1):
        raise InputError(f"{kind}.num_features must be an integer of at least 1, not {width!r}")
    module = _Custom(custom)
    parts = (kind, _source_sha256(type(custom)), weights_sha256(module.weights))
    sha256 = hashlib.sha256(repr(parts).encode()).hexdigest()
    return FeatureNetwork(name, make_label("own", kind), module, sha256, width)


def _source_sha256(kind: type) -> str:
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
