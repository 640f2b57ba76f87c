"""Metrics of generated images from their features in any network.

Metrics over all pairs of features are in `neighbours`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import scipy.linalg  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from madformer.errors import InputError
from madformer.evaluation.measurement import MEMORISATION, METRICS, metric_name
from madformer.evaluation.neighbours import Within, compare_pairs, memorisation, nearest_distances

SPLITS = 10
"""The inception score is a mean over this many parts, as in its paper."""

_BATCH = 4096
"""Number of features that are cast to float64 at once."""


@dataclass(frozen=True)
class Moments:
    """The sums of features that the Fréchet distance needs. Moments of parts of a set add up to those of the whole.

    Features are not centred before they are summed. Even with means of thousands of deviations, distances are right to 1e-8.
    """

    count: int
    """Number of features."""
    sum_D: Tensor
    """The sum of features, float64."""
    outer_DD: Tensor
    """The sum of each feature's outer product with itself, float64."""

    @staticmethod
    def of(features_ND: Tensor) -> Moments:
        """The moments of features [N, D], computed on their device.

        Raises:
            InputError: features that are not a matrix of finite numbers.
        """
        require_features(features_ND)
        width = features_ND.shape[1]
        sum_D = features_ND.new_zeros(width, dtype=torch.float64)
        outer_DD = features_ND.new_zeros(width, width, dtype=torch.float64)
        for batch_BD in features_ND.split(_BATCH):
            batch_BD = batch_BD.double()
            sum_D += batch_BD.sum(0)
            outer_DD.addmm_(batch_BD.T, batch_BD)
        return Moments(len(features_ND), sum_D, outer_DD)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum_D + other.sum_D, self.outer_DD + other.outer_DD)

    @property
    def mean_D(self) -> Tensor:
        """The mean of the features, [D] float64."""
        return self.sum_D / self.count

    @property
    def covariance_DD(self) -> Tensor:
        """The covariance of the features, with divisor N - 1, [D, D] float64."""
        return (self.outer_DD - self.count * torch.outer(self.mean_D, self.mean_D)) / (self.count - 1)

    @cached_property
    def root_DR(self) -> Tensor:
        """R [D, min(D, N - 1)] on the CPU, where R R^T is the covariance. Its other eigenvalues are zero, up to rounding.

        LAPACK's driver `evr` is ten times as fast as the one that torch calls. R has orthogonal columns.
        """
        rank = min(len(self.sum_D), self.count - 1)
        variances_D, axes_DD = scipy.linalg.eigh(self.covariance_DD.cpu().numpy(), driver="evr")
        return torch.from_numpy(axes_DD[:, -rank:]) * torch.from_numpy(variances_D[-rank:]).clamp(min=0).sqrt()


class Reference(Protocol):
    """Statistics of the images that generated images are compared with."""

    @property
    def moments(self) -> Moments:
        """Moments over all reference images."""

    @property
    def features_MD(self) -> Tensor:
        """Features [M, D] float32 of the images that are kept for the metrics over pairs."""

    def within(self, count: int, device: torch.device) -> Within:
        """`neighbours.pairs_within` of the first `count` kept features, computed on `device`."""

    def nearest_to(self, training_MD: Tensor, device: torch.device) -> Tensor:
        """`neighbours.nearest_distances` of all kept features to training images, computed on `device`."""


@dataclass(frozen=True)
class MetricInputs:
    """The inputs of the metrics of one network."""

    features_ND: Tensor
    """Features of the generated images. Metrics are computed on their device."""
    logits_NK: Tensor | None
    """The network's logits for the same images; None: it has none."""
    reference: Reference
    held_out: Reference | None = None
    """Statistics of images that are neither generated nor in the reference; None: there are none."""

    @cached_property
    def pairs(self) -> dict[str, float]:
        """`neighbours.compare_pairs` with as many reference images as generated ones, if so many are kept.

        Coverage and similar metrics depend on both numbers.
        """
        count = min(len(self.features_ND), len(self.reference.features_MD))
        reference_MD, within = self.reference.features_MD[:count], self.reference.within(count, self.features_ND.device)
        return compare_pairs(self.features_ND, reference_MD, within)


Compute = Callable[[MetricInputs], float | None]
_COMPUTE: dict[str, Compute] = {}


def computes(metric: str) -> Callable[[Compute], Compute]:
    """Register the function that computes an entry of `METRICS`. It returns None if there are too few images.

    Metrics over pairs need no function: `neighbours.compare_pairs` computes all of them in one pass.
    """

    def register(compute: Compute) -> Compute:
        _COMPUTE[metric] = compute
        return compute

    return register


def measure(
    label: str, features_ND: Tensor, logits_NK: Tensor | None, reference: Reference, held_out: Reference | None = None
) -> dict[str, float]:
    """All metrics that can be computed, in the order of `METRICS`, then the distances to held-out images.

    Args:
        label: the network's label, for the names of metrics (`measurement.metric_name`).
        features_ND: features of the generated images. Metrics are computed on their device.
        logits_NK: the network's logits for the same images; None: there is no inception score.
        reference: statistics of the reference images.
        held_out: statistics of held-out images; None: no memorisation and no distances to them.

    Returns:
        Metrics by name, without those that need more images than there are. Distances need two.

    Raises:
        InputError: fewer than two images, or features that are not finite.
    """
    inputs = MetricInputs(features_ND, logits_NK, reference, held_out)
    values = {metric_name(name, label): _value(name, inputs) for name in METRICS}
    if held_out is not None:
        distances = [name for name, metric in METRICS.items() if metric.is_distance]
        inputs = MetricInputs(features_ND, None, held_out)
        values |= {metric_name(name, label, held_out=True): _value(name, inputs) for name in distances}
    return {name: value for name, value in values.items() if value is not None}


def _value(name: str, inputs: MetricInputs) -> float | None:
    return inputs.pairs.get(name) if METRICS[name].needs_pairs else _COMPUTE[name](inputs)


@computes("fd")
def _frechet(inputs: MetricInputs) -> float:
    return frechet_distance(Moments.of(inputs.features_ND), inputs.reference.moments)


@computes("inception_score")
def _inception_score(inputs: MetricInputs) -> float | None:
    logits_NK = inputs.logits_NK
    return inception_score(logits_NK) if logits_NK is not None and len(logits_NK) >= SPLITS else None


@computes(MEMORISATION)
def _memorisation(inputs: MetricInputs) -> float | None:
    """Over all training and held-out images that are kept, whatever the number of samples."""
    if inputs.held_out is None:
        return None
    features_ND, training_MD = inputs.features_ND, inputs.reference.features_MD
    held_out_M = inputs.held_out.nearest_to(training_MD, features_ND.device)
    return memorisation(nearest_distances(features_ND, training_MD), held_out_M)


def frechet_distance(generated: Moments, reference: Moments) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) for means m and covariances S (divisor N - 1) of two sets of features.

    The last trace is the sum of the singular values of R^T R' for S = R R^T, where R has no more columns than the set has
    degrees of freedom. Others take the roots of the eigenvalues of S S'. In each dimension that the features do not span, these
    are wrong by 1e-16, and their roots by 1e-8. With 500 images and 2,048 features, the relative error of the distance is then
    1e-5; here it is 1e-12. The distance is computed on the CPU.

    Raises:
        InputError: fewer than two features in a set, or sets of different widths.
    """
    for kind, moments in (("generated", generated), ("reference", reference)):
        if moments.count < 2:
            raise InputError(f"{moments.count} {kind} images: a covariance needs at least 2")
    if generated.sum_D.shape != reference.sum_D.shape:
        widths = f"{len(generated.sum_D)} features of generated images, {len(reference.sum_D)} of reference images"
        raise InputError(f"{widths}: both must come from the same network")
    shift_D = generated.mean_D.cpu() - reference.mean_D.cpu()
    overlap = torch.linalg.svdvals(generated.root_DR.T @ reference.root_DR).sum()
    spread = generated.root_DR.square().sum() + reference.root_DR.square().sum()
    distance = shift_D.square().sum() + spread - 2 * overlap
    return float(distance.clamp(min=0))


def frechet_bias(reference: Moments, count: int) -> float:
    """The expected Fréchet distance of `count` perfect samples, drawn from the reference's own Gaussian.

    The distance needs the trace of the root of S^(1/2) S_n S^(1/2), where S_n is a sample covariance of n = N - 1 degrees of
    freedom. That matrix is distributed as the sample covariance of a Gaussian with covariance S^2, so Marchenko and Pastur's
    equation gives its spectrum from S. This is the limit of many dimensions; tr S / 4 n is the first correction for few. The
    mean adds tr S / N.

    In simulations with 16 to 2,048 dimensions, flat to steep spectra, regular and singular, and N from D / 16 to 100 D, the
    result is within 3 % from N = 16 on, and within 7 % at N = 4. (An expansion in 1 / N is right from N = 10 D on, up to 25 %
    low at N = D / 2, and up to three times the truth at N = D / 16.) The bias of other than Gaussian features differs slightly.

    Args:
        reference: moments of the reference.
        count: N, the number of samples.

    Raises:
        InputError: fewer than two samples.
    """
    if count < 2:
        raise InputError(f"{count} generated images: a covariance needs at least 2")
    variances_D = reference.root_DR.square().sum(0)
    total, largest, n = float(variances_D.sum()), float(variances_D.max()), count - 1
    if largest == 0:
        return 0.0
    overlap = largest * _expected_root_trace((variances_D / largest).square(), n)
    return total / count + 2 * (total - overlap) + total / (4 * n)


def _expected_root_trace(variances_D: Tensor, n: int) -> float:
    """The expected trace of the root of a sample covariance with n degrees of freedom. The largest variance must be 1.

    x^(1/2) is the integral of x / (x + t) / (pi t^(1/2)) over t > 0, here over log t. The sum of x / (x + t) over the spectrum
    is n (1 - t m), where m solves 1 / m = t + sum(v / (1 + v m)) / n over the variances v (Marchenko and Pastur 1967;
    Silverstein 1995).
    """
    step = 0.5
    log_t_Q = torch.arange(-80, 80, step, dtype=torch.float64, device=variances_D.device)
    t_Q = log_t_Q.exp()

    def filled(log_m_Q: Tensor) -> Tensor:
        """sum(v m / (1 + v m)) / n, which equals 1 - t m at the solution."""
        products_QD = log_m_Q.exp()[:, None] * variances_D
        return (products_QD / (1 + products_QD)).sum(1) / n

    low_Q, high_Q = -(t_Q + variances_D.sum() / n).log(), -log_t_Q
    for _ in range(60):
        middle_Q = (low_Q + high_Q) / 2
        too_low_Q = t_Q * middle_Q.exp() + filled(middle_Q) < 1
        low_Q, high_Q = torch.where(too_low_Q, middle_Q, low_Q), torch.where(too_low_Q, high_Q, middle_Q)
    return n * step / math.pi * float((filled(low_Q) * t_Q.sqrt()).sum())


def inception_score(logits_NK: Tensor, splits: int = SPLITS) -> float:
    """The inception score (Salimans et al. 2016): exp of the mean KL(p(y | x) || p(y)), averaged over parts of the images.

    Parts are drawn at random with a fixed seed. A part's score is at most its number of images.

    Args:
        logits_NK: logits of a classifier.
        splits: number of parts, as equal as possible.

    Raises:
        InputError: fewer images than parts, or logits that are not finite.
    """
    require_features(logits_NK)
    if len(logits_NK) < splits:
        raise InputError(f"{len(logits_NK)} generated images: an inception score over {splits} parts needs at least {splits}")
    order_N = torch.randperm(len(logits_NK), generator=torch.Generator().manual_seed(0))
    scores = []
    for part_BK in logits_NK.double()[order_N.to(logits_NK.device)].tensor_split(splits):
        probabilities_BK = part_BK.softmax(1)
        entropy = torch.special.entr(probabilities_BK).sum(1).mean()
        scores.append((torch.special.entr(probabilities_BK.mean(0)).sum() - entropy).exp())
    return float(torch.stack(scores).mean())


def require_features(features_ND: Tensor) -> None:
    """Refuse features that are not a matrix of finite numbers.

    Raises:
        InputError: the features are not.
    """
    if features_ND.ndim != 2:
        raise InputError(f"features of shape {list(features_ND.shape)}: must be [images, features]")
    if not features_ND.isfinite().all():
        raise InputError("features of images hold NaN or infinity: there is nothing to measure")


class FrechetDistance:
    """`frechet_distance` to a reference, for features that come in batches, in one process or several.

    Features are summed in float64, so neither the split into batches nor the number of processes matters. Under
    torch.distributed each process updates with its own features, and `compute` returns the distance of all features to each.

    Args:
        reference: moments of the reference features, the same in all processes.
        device: where the features are summed.
    """

    def __init__(self, reference: Moments, device: torch.device | str = "cpu") -> None:
        self._metric = _SummedFeatures(reference).to(device)

    def update(self, features_BD: Tensor) -> None:
        """Add features of generated images.

        Raises:
            InputError: features that are not a matrix of finite numbers.
        """
        require_features(features_BD)
        self._metric.update(features_BD.to(self._metric.device), real=False)

    def compute(self) -> float:
        """The distance of all features added since the start or the last `reset`.

        Raises:
            InputError: fewer than two features were added, or the reference has fewer.
        """
        return float(self._metric.compute())

    def reset(self) -> None:
        """Forget the generated features and keep the reference."""
        self._metric.reset()


class _SummedFeatures(FrechetInceptionDistance):
    """torchmetrics' sums, which it adds up over processes, over features in place of images."""

    def __init__(self, reference: Moments) -> None:
        network = nn.Identity()
        network.num_features = torch.tensor(len(reference.sum_D))
        super().__init__(network)
        self.reference = reference

    def compute(self) -> Tensor:
        count = int(self.fake_features_num_samples)
        generated = Moments(count, self.fake_features_sum, self.fake_features_cov_sum)
        return torch.tensor(frechet_distance(generated, self.reference), dtype=torch.float64)
