"""Networks whose features are compared, by name. A metric is named after its network: `fd_digits`."""

from __future__ import annotations

from madformer.evaluation.feature_networks.digits_network import DigitsFeatures, digits_classifier
from madformer.evaluation.feature_networks.network import FeatureNetwork, Features
from madformer.evaluation.feature_networks.registry import build_feature_network, build_feature_networks

__all__ = [
    "DigitsFeatures",
    "FeatureNetwork",
    "Features",
    "build_feature_network",
    "build_feature_networks",
    "digits_classifier",
]
