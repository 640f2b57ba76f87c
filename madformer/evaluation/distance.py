"""The Fréchet distance of features that come in batches, summed over processes by torchmetrics.

Apart from the other metrics, as torchmetrics takes seconds to import: an evaluation has all features before it measures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from madformer.evaluation.metrics import Moments, frechet_distance, require_features


class FrechetDistance:
    """`frechet_distance` to a reference of features that come in batches, in one process or several.

    Features are summed in float64 as they come, so neither the split into batches nor the number of processes matters: under
    torch.distributed each process updates with its own features, and `compute` gives all of them the distance of the whole.

    Args:
        reference: moments of the reference features, the same in all processes.
        device: where the features are summed.
    """

    def __init__(self, reference: Moments, device: torch.device | str = "cpu") -> None:
        self._metric = _SummedFeatures(reference).to(device)

    def update(self, features_BD: Tensor) -> None:
        """Add features of generated images.

        Raises:
            InputError: NaN or infinity among them, or no matrix [B, D].
        """
        require_features(features_BD)
        self._metric.update(features_BD.to(self._metric.device), real=False)

    def compute(self) -> float:
        """The distance of all features added since the start or the last `reset`.

        Raises:
            InputError: fewer than two features in all, or fewer in the reference.
        """
        return float(self._metric.compute())

    def reset(self) -> None:
        """Forget the generated features and keep the reference."""
        self._metric.reset()


class _SummedFeatures(FrechetInceptionDistance):
    """torchmetrics' sums, which it adds up over the processes, of features in place of images."""

    def __init__(self, reference: Moments) -> None:
        network = nn.Identity()
        network.num_features = torch.tensor(len(reference.sum_D))
        super().__init__(network)
        self.reference = reference

    def compute(self) -> Tensor:
        count = int(self.fake_features_num_samples)
        generated = Moments(count, self.fake_features_sum, self.fake_features_cov_sum)
        return torch.tensor(frechet_distance(generated, self.reference), dtype=torch.float64)
