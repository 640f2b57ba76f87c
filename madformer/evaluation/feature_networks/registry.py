"""Feature networks by name, and classes of one's own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madformer.config.evaluation import check_feature_network_name
from madformer.config.validation import is_integer
from madformer.errors import InputError
from madformer.evaluation.feature_networks.digits_network import build_digits
from madformer.evaluation.feature_networks.network import FeatureNetwork, make_label, network_error
from madformer.evaluation.feature_networks.pretrained import build_inception, build_pretrained, build_torchscript
from madformer.importing import build_custom, modules_of
from madformer.runs.checkpoints import weights_sha256


class _Custom(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        self.weights = modules_of(own)

    def forward(self, images_BCYX: Tensor) -> Any:
        return self.own(images_BCYX.float().clamp(-1, 1))


def build_custom_network(name: str) -> FeatureNetwork:
    """The class that `module.path:Class` or `file.py:Class` names, built without arguments; an nn.Module or not.

    It is called with images [B, C, Y, X] float32 in [-1, 1] and gives features [B, d]. Where it has an attribute
    `num_features`, that is d; else it must take RGB images of 256 x 256, which are tried. Its SHA-256 is of the weights and
    of the file that the class is in.

    Raises:
        InputError: it cannot be imported or built, or is no feature network.
    """
    place, _, kind = name.rpartition(":")
    own = build_custom(place, kind)
    if not callable(own):
        raise InputError(f"{kind} cannot be called: it needs forward or __call__")
    width = getattr(own, "num_features", None)
    if width is not None and not (is_integer(width) and width >= 1):
        raise InputError(f"{kind}.num_features must be an integer of at least 1, not {width!r}")
    module = _Custom(own)
    parts = (kind, _source_sha256(type(own)), weights_sha256(module.weights))
    sha256 = hashlib.sha256(repr(parts).encode()).hexdigest()
    return FeatureNetwork(name, make_label("own", kind), module, sha256, width)


def _source_sha256(kind: type) -> str:
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()


def build_feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Build the network of that name; the global random state stays as it is.

    Args:
        name: an entry of `evaluation.feature_networks`.
        device: where it computes.

    Raises:
        ConfigError: there is none, it cannot be had, or it is no feature network.
    """
    check_feature_network_name(name)
    try:
        with torch.random.fork_rng(devices=[]):
            network = _build(name)
    except InputError as error:
        raise network_error(name, error) from error
    return network.to(device)


def build_feature_networks(names: Sequence[str], device: torch.device | str = "cpu") -> tuple[FeatureNetwork, ...]:
    """Build all of these networks.

    Raises:
        ConfigError: as `build_feature_network`; or metrics of two of them would have the same name.
    """
    networks: dict[str, FeatureNetwork] = {}
    for name in names:
        network = build_feature_network(name, device)
        if other := networks.get(network.label):
            reason = f"its metrics would be named as those of {other.name!r}, {network.label}: take one of them at a time"
            raise network_error(name, InputError(reason))
        networks[network.label] = network
    return tuple(networks.values())


def _build(name: str) -> FeatureNetwork:
    if name == "digits":
        return build_digits()
    kind, _, location = name.partition(":")
    if kind == "inception":
        return build_inception(name, Path(location).expanduser() if location else None)
    if kind == "torchscript":
        return build_torchscript(name, Path(location).expanduser())
    if kind == "hf":
        return build_pretrained(name, location)
    return build_custom_network(name)
