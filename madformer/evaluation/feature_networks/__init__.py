"""Feature networks by name (`evaluation.feature_networks`). A metric is named after its network: `fd_digits`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from madformer.config import ExperimentConfig
from madformer.config.data import PIXELS
from madformer.config.evaluation import SHIPPED_NETWORKS, check_feature_network_name
from madformer.config.validation import expand_path
from madformer.data.codec import Codec
from madformer.errors import ConfigError, InputError
from madformer.evaluation.feature_networks.network import FeatureNetwork, Features, build_custom_network, network_error
from madformer.evaluation.feature_networks.pretrained import build_inception, build_pretrained, build_torchscript
from madformer.evaluation.feature_networks.shipped import CIFAR10Features, DigitsFeatures, build_shipped
from madformer.evaluation.measurement import INCEPTION

__all__ = [
    "CIFAR10Features",
    "DigitsFeatures",
    "FeatureNetwork",
    "Features",
    "build_feature_network",
    "build_feature_networks",
    "build_fitting_networks",
    "require_fitting_networks",
]

_log = logging.getLogger(__name__)


def build_feature_network(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Build the network of that name. The global random state stays as it is.

    Args:
        name: an entry of `evaluation.feature_networks`.
        device: where it computes.

    Raises:
        ConfigError: the network does not exist, is not available, or is not a feature network.
    """
    check_feature_network_name(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # random weights of a custom network are the same in every process
            network = _build(name)
    except InputError as error:
        raise network_error(name, error) from error
    return network.to(device)


def build_feature_networks(names: Sequence[str], device: torch.device | str = "cpu") -> tuple[FeatureNetwork, ...]:
    """Build all of these networks.

    Raises:
        ConfigError: as `build_feature_network`, or metrics of two networks would have the same name.
    """
    networks: dict[str, FeatureNetwork] = {}
    for name in names:
        network = build_feature_network(name, device)
        if other := networks.get(network.label):
            reason = f"its metrics would be named as those of {other.name!r}, {network.label}: take one of them at a time"
            raise network_error(name, InputError(reason))
        networks[network.label] = network
    return tuple(networks.values())


def build_fitting_networks(config: ExperimentConfig, codec: Codec, device: torch.device | str) -> tuple[FeatureNetwork, ...]:
    """Build the networks of an experiment, and check that they accept its images.

    Args:
        codec: the experiment's codec, which determines the size of its images.

    Raises:
        ConfigError: as `build_feature_networks`, or a network does not accept the images.
    """
    networks = build_feature_networks(config.evaluation.feature_networks, device)
    for network in networks:
        network.try_images(*_image_shape(config, codec))
    return networks


def require_fitting_networks(config: ExperimentConfig, codec: Codec | None) -> None:
    """Refuse networks that do not accept an experiment's images. Networks of the hub or not on the disk are not checked.

    Raises:
        ConfigError: a network does not. The message names the first one.
    """
    if codec is None and config.data.codec != PIXELS:
        return  # training on latents opens no codec
    for name in config.evaluation.feature_networks:
        if name.partition(":")[0] not in (INCEPTION, "hf"):
            try:
                network = build_feature_network(name)
            except ConfigError as error:
                _log.warning("%s; an evaluation needs it", error)
            else:
                network.try_images(*_image_shape(config, codec))


def _image_shape(config: ExperimentConfig, codec: Codec | None) -> tuple[int, int]:
    """Channels of an experiment's images, and pixels along one side."""
    channels = config.model.latent_channels if config.data.codec == PIXELS else 3
    return channels, config.model.latent_size * (codec.downsampling if codec else 1)


def _build(name: str) -> FeatureNetwork:
    if name in SHIPPED_NETWORKS:
        return build_shipped(name)
    kind, _, location = name.partition(":")
    if kind == "inception":
        return build_inception(name, Path(expand_path("file", location)) if location else None)
    if kind == "torchscript":
        return build_torchscript(name, Path(expand_path("file", location)))
    if kind == "hf":
        return build_pretrained(name, location)
    return build_custom_network(name)
