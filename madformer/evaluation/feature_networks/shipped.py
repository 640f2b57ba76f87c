"""Feature networks whose weights ship with the package: small classifiers of digits and of CIFAR-10, in place of Inception.

`scripts/train_digits_features.py` and `scripts/train_cifar10_features.py` make the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from madformer.data.image_files import to_unit
from madformer.errors import InputError
from madformer.evaluation.feature_networks.network import FeatureNetwork, as_files
from madformer.runs.checkpoints import weights_sha256


def digits_classifier() -> nn.Sequential:
    """An untrained classifier of digits: images [B, 1, 8, 8] in [-1, 1] to 10 logits. Its last layer reads 64 features.

    With GELU no feature is dead, as it may be with ReLU. So the features' covariance is regular.
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
    """Penultimate features of a classifier of 8 x 8 digits, in place of Inception. The metric is `fd_digits`, never "FID".

    Training and evaluation mode are the same. The layers run in float64, so that features depend neither on the batch size nor
    on reduced precision of matrix products (TF32, autocast).
    """

    num_features = 64
    """Width of the features, under the name by which torchmetrics asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = _trained("digits", digits_classifier).double()
        self.eval()

    @torch.no_grad()
    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Features of images.

        Args:
            images_BCYX: [B, 1, 8, 8]. Values are clipped to [-1, 1], as when an image is saved.

        Returns:
            [B, 64] float32.

        Raises:
            ValueError: another shape (an InputError), or a type that is not floating point.
        """
        if images_BCYX.ndim != 4 or images_BCYX.shape[1:] != (1, 8, 8):
            remedy = "take another of evaluation.feature_networks"
            raise InputError(f"images of shape {list(images_BCYX.shape)}: the digits' features need [B, 1, 8, 8]; {remedy}")
        if not images_BCYX.is_floating_point():
            raise ValueError(f"images of type {images_BCYX.dtype}: the digits' features need floating point in [-1, 1]")
        dtype = next(self.parameters()).dtype
        features_BD: Tensor = self.classifier[:-1](images_BCYX.clamp(-1, 1).to(dtype))
        return features_BD.float()


class Residual(nn.Sequential):
    """Layers with a residual connection around them."""

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] to the same shape."""
        return images_BCYX + super().forward(images_BCYX)


def cifar10_classifier() -> nn.Sequential:
    """An untrained classifier of CIFAR-10: images [B, 3, 32, 32] in [-1, 1] to 10 logits. Its last layer reads 128 features.

    It is a residual network (He et al. 2016) of 360 thousand parameters and 16 million multiplications per image.
    """

    def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        kernel = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [kernel, nn.BatchNorm2d(outputs), nn.GELU()]

    layers: list[nn.Module] = [nn.PixelUnshuffle(2), *convolution(12, 48), Residual(*convolution(48, 48))]
    for inputs, outputs in ((48, 80), (80, 128)):
        layers += [*convolution(inputs, outputs, stride=2), Residual(*convolution(outputs, outputs))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class CIFAR10Features(nn.Module):
    """Penultimate features of a classifier of CIFAR-10, in place of Inception. The metric is `fd_cifar10`, never "FID".

    Images of another size than 32 x 32 are resized by a fixed bilinear filter, with antialiasing when they shrink.
    """

    num_features = 128
    """Width of the features, under the name by which torchmetrics asks for it."""

    size = 32
    """Pixels along a side of the images that the classifier was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = _trained("cifar10", cifar10_classifier)
        self.eval()

    @torch.no_grad()
    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Features of images.

        Args:
            images_BCYX: [B, 1 or 3, Y, X] floating point in [-1, 1], rounded to bytes as in files.

        Returns:
            [B, 128] float32.

        Raises:
            ValueError: another number of channels.
        """
        features_BD: Tensor = self.classifier[:-1](resize(to_unit(as_files(images_BCYX)), self.size))
        return features_BD


def resize(images_BCYX: Tensor, size: int) -> Tensor:
    """Square images resized to `size` pixels with the filter of `CIFAR10Features`; unchanged if they have that size."""
    if images_BCYX.shape[2:] == (size, size):
        return images_BCYX
    return F.interpolate(images_BCYX, (size, size), mode="bilinear", antialias=True)


def build_shipped(name: str) -> FeatureNetwork:
    """The network of that name in `SHIPPED_NETWORKS`."""
    module: DigitsFeatures | CIFAR10Features = DigitsFeatures() if name == "digits" else CIFAR10Features()
    return FeatureNetwork(name, name, module, weights_sha256(module), module.num_features)


def _trained(name: str, build: Callable[[], nn.Sequential]) -> nn.Sequential:
    """A classifier with the weights that ship with the package, frozen."""
    weights = resources.files("madformer.evaluation.feature_networks") / f"{name}_features.safetensors"
    with torch.device("meta"):  # draws no random numbers: building a metric must not change the global random state
        classifier = build()
    classifier.load_state_dict(load(weights.read_bytes()), assign=True)
    return classifier.eval().requires_grad_(False)
