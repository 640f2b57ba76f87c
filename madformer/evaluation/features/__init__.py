"""Networks whose features are compared, by name. A metric is named after its network: `fd_digits`."""

from __future__ import annotations

from madformer.evaluation.features.build import build_feature_network, build_feature_networks
from madformer.evaluation.features.digits import DigitsFeatures, digits_classifier
from madformer.evaluation.features.network import FeatureNetwork, Features, metric_name

__all__ = [
    "DigitsFeatures",
    "FeatureNetwork",
    "Features",
    "build_feature_network",
    "build_feature_networks",
    "digits_classifier",
    "metric_name",
]
