"""The Fréchet distance (torchmetrics') between generated and reference images, over the features of any network."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torchmetrics.image.fid import FrechetInceptionDistance

__all__ = ["FrechetDistance"]


class FrechetDistance:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) for means m and covariances S (of N - 1) of two sets of features.

    Features are summed in float64 as they come, so neither the split into batches nor the number of processes matters: where
    torch.distributed runs, each process updates with its own images and `compute` gives all of them the distance of the whole.

    Args:
        network: maps images [B, C, Y, X] to features [B, d] and has d as its attribute `num_features`. It is put on the
            reference images' device, where the statistics are, and should be frozen.
        reference_images: [N, C, Y, X]; their statistics are computed here, once.
        batch_size: reference images that go through the network at once.

    Raises:
        ValueError: fewer than two reference images, or images that are not finite or not what the network takes.
    """

    def __init__(self, network: nn.Module, reference_images: Tensor, batch_size: int = 256) -> None:
        if len(reference_images) < 2:
            raise ValueError(f"{len(reference_images)} reference images: a covariance needs at least 2")
        self._metric = FrechetInceptionDistance(_InFloat64(network), reset_real_features=False).to(reference_images.device)
        # torchmetrics adds the processes' statistics up, the reference's too: one process alone brings them.
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            for images in reference_images.split(batch_size):
                self._update(images, real=True)

    def update(self, images: Tensor) -> None:
        """Add generated images [B, C, Y, X].

        Raises:
            ValueError: images that are not finite or not what the network takes.
        """
        self._update(images, real=False)

    def compute(self) -> float:
        """The distance of all images added since the start or the last `reset`.

        Raises:
            ValueError: fewer than two images were added (by this process).
        """
        if (count := int(self._metric.fake_features_num_samples)) < 2:
            raise ValueError(f"{count} generated images: a covariance needs at least 2")
        return float(self._metric.compute())

    def reset(self) -> None:
        """Forget the generated images and keep the reference."""
        self._metric.reset()

    def _update(self, images: Tensor, *, real: bool) -> None:
        if not images.isfinite().all():
            raise ValueError(f"{'reference' if real else 'generated'} images hold NaN or infinity: they have no distance")
        self._metric.update(images.to(self._metric.device), real=real)


class _InFloat64(nn.Module):
    """A feature network whose features are float64: torchmetrics rounds its result to the features' type."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_features = network.num_features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features.double()
