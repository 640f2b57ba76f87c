"""Feature networks by the names that `evaluation.feature_networks` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from madformer.config.features import check_feature_network_name
from madformer.config.rules import InputError
from madformer.evaluation.features.digits import build_digits
from madformer.evaluation.features.inception import build_inception, build_torchscript
from madformer.evaluation.features.network import FeatureNetwork, network_error
from madformer.evaluation.features.own import build_own_network
from madformer.evaluation.features.pretrained import build_pretrained


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
    return build_own_network(name)
