"""The feature network for digits: a small classifier, in place of Inception, whose weights ship with the package."""

from __future__ import annotations

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from madformer.evaluation.feature_networks.network import FeatureNetwork
from madformer.runs.checkpoints import weights_sha256


def digits_classifier() -> nn.Sequential:
    """An untrained classifier of digits: [B, 1, 8, 8] in [-1, 1] to 10 logits, the last layer's input being 64 features.

    GELU, not ReLU: no feature is dead, so that their covariance is regular.
    """
    return nn.Sequential(
        nn.Conv2d(1, 24, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(24, 32, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )


class DigitsFeatures(nn.Module):
    """Penultimate features of a classifier of 8 x 8 digits, in place of Inception; the metric is `fd_digits`, never "FID".

    The weights come with the package (`scripts/train_digits_features.py` made them) and are frozen; there is nothing that
    differs between training and evaluation mode. The layers run in float64, so that neither the batch size nor reduced
    precision of matrix products (TF32, autocast) shows in the features.
    """

    num_features = 64
    """Width of the features, under the name by which torchmetrics asks for it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):  # nothing is drawn: building a metric must not move the global random state
            self.classifier = digits_classifier()
        file = resources.files("madformer.evaluation.feature_networks") / "digits_features.safetensors"
        self.classifier.load_state_dict(load(file.read_bytes()), assign=True)
        self.double().eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Features of images.

        Args:
            images_BCYX: [B, 1, 8, 8] in [-1, 1]; what lies outside is clipped, as it is when an image is saved.

        Returns:
            [B, 64] float32.

        Raises:
            ValueError: another shape, or a type that is not floating point.
        """
        if images_BCYX.ndim != 4 or images_BCYX.shape[1:] != (1, 8, 8):
            raise ValueError(f"images of shape {list(images_BCYX.shape)}: the digits' features need [B, 1, 8, 8]")
        if not images_BCYX.is_floating_point():
            raise ValueError(f"images of type {images_BCYX.dtype}: the digits' features need floating point in [-1, 1]")
        dtype = next(self.parameters()).dtype
        features_BD: Tensor = self.classifier[:-1](images_BCYX.clamp(-1, 1).to(dtype))
        return features_BD.float()


def build_digits() -> FeatureNetwork:
    """The network of the digits' features."""
    module = DigitsFeatures()
    return FeatureNetwork("digits", "digits", module, weights_sha256(module), module.num_features)
