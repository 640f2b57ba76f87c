"""Metrics against scipy, torchmetrics, closed forms and simulation, and that they order images as an eye would."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm, svdvals
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from madformer.data.sources import load_digits
from madformer.errors import InputError
from madformer.evaluation.feature_networks import DigitsFeatures
from madformer.evaluation.metrics import FrechetDistance, Moments, frechet_bias, frechet_distance, inception_score, measure
from madformer.evaluation.neighbours import compare_pairs, memorisation, nearest_distances, pairs_within


def features(count, width=64, seed=0, scale=1.0):
    """As of a network: correlated, lopsided, of means beside deviations, some directions far wider than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    spectrum = torch.arange(1, width + 1) ** -0.6
    return (0.4 + scale * (spectrum * torch.randn(count, width, generator=generator)) @ mixing).relu()


def distance(generated, reference):
    return frechet_distance(Moments.of(generated), Moments.of(reference))


def as_metric(generated, reference, batch_size=1000):
    metric = FrechetDistance(Moments.of(reference))
    for batch in generated.split(batch_size):
        metric.update(batch)
    return metric.compute()


def scipy_distance(generated, reference):
    """The definition."""
    generated, reference = generated.double().numpy(), reference.double().numpy()
    shift = generated.mean(0) - reference.mean(0)
    covariance, other = np.cov(generated, rowvar=False), np.cov(reference, rowvar=False)
    return shift @ shift + np.trace(covariance + other - 2 * sqrtm(covariance @ other).real)


def exact_distance(generated, reference):
    """The same by way of the features' inner products, which singular covariances do not make inexact."""
    one, other = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (generated.double().numpy(), reference.double().numpy()))
    shift = generated.double().mean(0) - reference.double().mean(0)
    return float(shift @ shift) + (one**2).sum() + (other**2).sum() - 2 * svdvals(one @ other.T).sum()


def exactly(mean, covariance, count=1000):
    """Moments of features that have exactly this mean and covariance."""
    return Moments(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))


def test_moments_are_mean_and_covariance_of_all_parts():
    parts = features(5000, 8), features(3, 8, seed=1), features(1, 8, seed=2)
    moments = Moments.of(parts[0]) + Moments.of(parts[1]) + Moments.of(parts[2])
    whole = torch.cat(parts).double()
    assert moments.count == 5004 and moments.outer_DD.dtype == torch.float64
    torch.testing.assert_close(moments.mean_D, whole.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance_DD, whole.T.cov(), rtol=1e-11, atol=1e-13)


def test_distance_of_gaussians_is_the_closed_form():
    """|m - m'|^2 + sum (a^(1/2) - b^(1/2))^2 for covariances with the same axes and variances a, b."""
    generator = torch.Generator().manual_seed(0)
    mean, other_mean, a, b = torch.rand(4, 30, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    expected = (mean - other_mean).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(exactly(mean, axes * a @ axes.T), exactly(other_mean, axes * b @ axes.T))
    assert found == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize(("distance", "count"), [(distance, 2000), (distance, 200), (distance, 40), (as_metric, 200)])
def test_distance_is_scipy_s(distance, count):
    generated, reference = features(count, seed=1, scale=1.2), features(2000)
    found = distance(generated, reference)
    assert found == pytest.approx(scipy_distance(generated, reference), rel=1e-6)
    assert found == pytest.approx(exact_distance(generated, reference), rel=1e-10)
    assert distance(reference, generated) == pytest.approx(found, rel=1e-10)


def test_two_images_have_a_distance():
    assert distance(features(2), features(2000)) == pytest.approx(exact_distance(features(2), features(2000)), rel=1e-10)


def test_distance_is_torchmetrics():
    network = nn.Identity()
    network.num_features = torch.tensor(64)
    metric = FrechetInceptionDistance(network)
    generated, reference = features(300, seed=1).double(), features(400).double()
    metric.update(generated, real=False)
    metric.update(reference, real=True)
    assert distance(generated, reference) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_far_means_do_not_matter():
    generated, reference = features(300, seed=1).double(), features(400).double()
    assert distance(generated + 1000, reference + 1000) == pytest.approx(distance(generated, reference), rel=1e-6)


@pytest.mark.parametrize("count", [2000, 40])
def test_features_are_at_no_distance_from_themselves(count):
    assert 0 <= distance(features(count), features(count)) < 1e-10


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_do_not_matter(batch_size):
    generated, reference = features(300, seed=1), features(400)
    assert as_metric(generated, reference, batch_size) == pytest.approx(distance(generated, reference), rel=1e-10)


def test_reset_keeps_the_reference():
    generated, reference = features(300, seed=1), features(400)
    metric = FrechetDistance(Moments.of(reference))
    for batch in (generated, 2 * generated):
        metric.update(batch)
        metric.compute()
        metric.reset()
    metric.update(generated)
    assert metric.compute() == as_metric(generated, reference) and isinstance(metric.compute(), float)


def _part(rank, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = FrechetDistance(Moments.of(features(400)))
    metric.update(features(300, seed=1)[[slice(1), slice(1, None)][rank]])
    results[rank] = metric.compute()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_do_not_matter(tmp_path):
    """Not even where one of them has a single image."""
    results = torch.zeros(2, dtype=torch.float64).share_memory_()
    torch.multiprocessing.start_processes(_part, (tmp_path / "store", results), nprocs=2, start_method="fork")
    assert results.tolist() == pytest.approx([distance(features(300, seed=1), features(400))] * 2, rel=1e-10)


def test_mistakes_are_named():
    reference = Moments.of(features(100))
    metric = FrechetDistance(reference)
    for spoilt in (torch.full((4, 64), torch.nan), torch.full((4, 64), torch.inf)):
        for take in (metric.update, Moments.of):
            with pytest.raises(InputError, match="NaN or infinity"):
                take(spoilt)
    with pytest.raises(InputError, match=r"shape \[4, 64, 2\]"):
        metric.update(torch.zeros(4, 64, 2))
    metric.update(features(1))
    with pytest.raises(InputError, match="1 generated images: .* at least 2"):
        metric.compute()
    with pytest.raises(InputError, match="1 reference images: .* at least 2"):
        frechet_distance(reference, Moments.of(features(1)))
    with pytest.raises(InputError, match="32 features of generated images, 64 of reference images"):
        frechet_distance(Moments.of(features(10, 32)), reference)
    with pytest.raises(InputError, match="1 generated images: .* at least 2"):
        frechet_bias(reference, 1)


def drawn_distance(variances, count, generator):
    """Of samples of the Gaussian with these variances and mean 0, to it."""
    drawn = variances.sqrt() * torch.randn(count, len(variances), generator=generator, dtype=torch.float64)
    centred = (drawn - drawn.mean(0)) / np.sqrt(count - 1)
    overlap = torch.linalg.svdvals(centred * variances.sqrt()).sum()
    return float(drawn.mean(0).square().sum() + centred.square().sum() + variances.sum() - 2 * overlap)


def of_covariance(covariance):
    """Moments of a set with that covariance."""
    return Moments(10**6, torch.zeros(len(covariance), dtype=torch.float64), covariance.double() * (10**6 - 1))


SPECTRA = {
    "few": torch.ones(8, dtype=torch.float64),
    "flat": torch.ones(64, dtype=torch.float64),
    "falling": torch.arange(1, 65, dtype=torch.float64) ** -1,
    "singular": torch.cat((torch.arange(1, 33, dtype=torch.float64) ** -1, torch.zeros(32))),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("count", [8, 32, 64, 128, 1000])
def test_bias_is_what_perfect_samples_have(spectrum, count):
    variances, generator = SPECTRA[spectrum], torch.Generator().manual_seed(0)
    width = len(variances)
    drawn = np.array([drawn_distance(variances, count, generator) for _ in range(2560 // width)])
    error = 4 * drawn.std() / np.sqrt(len(drawn)) / drawn.mean()
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    assert error < 0.08
    assert frechet_bias(of_covariance(axes * variances @ axes.T), count) == pytest.approx(drawn.mean(), rel=0.03 + error)


def test_bias_falls_with_the_samples_and_scales_with_the_features():
    covariance = Moments.of(features(2000)).covariance_DD
    biases = [frechet_bias(of_covariance(covariance), count) for count in (2, 10, 64, 1000, 10**6, 10**9)]
    assert biases == sorted(biases, reverse=True)
    assert biases[-1] == pytest.approx(biases[-2] / 1000, rel=1e-3)
    assert frechet_bias(of_covariance(1e-8 * covariance), 64) == pytest.approx(1e-8 * biases[2], rel=1e-9)
    assert frechet_bias(of_covariance(torch.zeros(64, 64)), 64) == 0


def logits(count, classes=12, seed=0):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def torchmetrics_score(logits_NK, splits):
    with pytest.warns(UserWarning, match="memory"):
        metric = InceptionScore(nn.Identity(), splits=splits)
    metric.update(logits_NK.double())
    return float(metric.compute()[0])


@pytest.mark.filterwarnings("ignore:std")
def test_inception_score_is_torchmetrics():
    assert inception_score(logits(200), splits=1) == pytest.approx(torchmetrics_score(logits(200), 1), rel=1e-12)


def test_inception_score_is_the_mean_over_random_parts():
    state, found = torch.get_rng_state(), inception_score(logits(205))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = [torchmetrics_score(logits(205), 10) for _ in range(20)]
    assert min(draws) < found < max(draws) < 0.98 * inception_score(logits(205), splits=1)


def test_rounding_does_not_move_images_between_the_parts_of_an_inception_score():
    given = logits(1000)
    for noise in (1e-7, 1e-6):
        moved = given * (1 + noise * torch.randn(given.shape, generator=torch.Generator().manual_seed(0)))
        assert inception_score(moved) == pytest.approx(inception_score(given), rel=3 * noise)


def test_inception_score_of_extremes():
    sure = torch.eye(5).repeat(20, 1) * 1e4
    assert inception_score(sure, splits=1) == pytest.approx(5, rel=1e-12)
    assert inception_score(torch.zeros(100, 5)) == pytest.approx(1, rel=1e-12)
    with pytest.raises(InputError, match="9 generated images: .* at least 10"):
        inception_score(logits(9))


@dataclass
class Set:
    """A reference."""

    features_MD: Tensor

    @property
    def moments(self):
        return Moments.of(self.features_MD)

    def within(self, count, device):
        return pairs_within(self.features_MD[:count].to(device))

    def nearest_to(self, training_MD, device):
        return nearest_distances(self.features_MD.to(device), training_MD)


def test_all_metrics_are_named_after_their_network():
    generated, reference = features(50, seed=1), Set(features(60))
    first = reference.features_MD[:50]
    pairs = compare_pairs(generated, first, pairs_within(first))
    found = measure("inception", generated, logits(50), reference)
    assert list(found) == ["fid", "kid", "inception_score", "precision", "recall", "density", "coverage"]
    assert found["fid"] == distance(generated, reference.features_MD)
    assert found["inception_score"] == inception_score(logits(50))
    assert {name: found[name] for name in pairs} == pairs
    other = measure("dinov2", generated, None, reference)
    assert list(other) == [f"{name}_dinov2" for name in ("fd", "kid", "precision", "recall", "density", "coverage")]
    assert list(other.values()) == [value for name, value in found.items() if name != "inception_score"]


def test_held_out_images_add_distances_to_them_and_memorisation():
    generated, reference, held_out = features(50, seed=1), Set(features(60)), Set(features(30, seed=2))
    plain, found = (measure("digits", generated, None, reference, *others) for others in ((), (held_out,)))
    assert list(found) == [*plain, "memorisation_digits", "fd_digits_held_out", "kid_digits_held_out"]
    assert {name: found[name] for name in plain} == plain
    other = measure("digits", generated, None, held_out)
    assert [found["fd_digits_held_out"], found["kid_digits_held_out"]] == [other["fd_digits"], other["kid_digits"]]
    nearest = [torch.cdist(x.double(), reference.features_MD.double()).amin(1) for x in (generated, held_out.features_MD)]
    assert found["memorisation_digits"] == pytest.approx(memorisation(*nearest)) and 0 < memorisation(*nearest) < 1


def test_a_few_images_have_their_distances():
    found = measure("digits", features(3, seed=1), logits(3), Set(features(60)))
    assert list(found) == ["fd_digits", "kid_digits"]
    assert len(measure("digits", features(6, seed=1), logits(6), Set(features(60)))) == 6
    with pytest.raises(InputError, match="1 generated images: .* at least 2"):
        measure("digits", features(1, seed=1), None, Set(features(60)))


def digits(images):
    """The small classifier's features."""
    return DigitsFeatures()(images)


def noised(strength):
    images = load_digits()[0]
    return images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blurred(strength):
    kernel = torch.tensor([strength, 1 - 2 * strength, strength])
    images = F.pad(load_digits()[0], (1, 1, 1, 1), value=-1.0)
    return F.conv2d(images, torch.outer(kernel, kernel)[None, None])


@pytest.mark.parametrize("spoil", [noised, blurred])
def test_worse_images_are_farther(spoil):
    reference = digits(load_digits()[0])
    distances = [distance(digits(spoil(strength)), reference) for strength in (0.02, 0.05, 0.1, 0.2, 0.3)]
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0]


def test_missing_digits_and_mixed_quarters_are_seen():
    images, labels = load_digits()
    reference = digits(images)
    assert distance(digits(images[labels < 5]), reference) > 4 * distance(digits(images[labels != 9]), reference) > 0
    quarters = images.clone()  # four blocks, each right, that do not belong together
    for y, x in ((0, 0), (0, 4), (4, 0)):
        quarters[:, :, y : y + 4, x : x + 4] = images.roll(17 * y + 31 * x + 7, 0)[:, :, y : y + 4, x : x + 4]
    assert distance(digits(quarters), reference) > 10


def test_half_of_the_digits_is_as_near_the_whole_as_perfect_samples():
    """Drawn with replacement, which is what perfect samples of the reference are."""
    reference = Moments.of(digits(load_digits()[0]))
    whole, generator = digits(load_digits()[0]), torch.Generator().manual_seed(0)
    drawn = [whole[torch.randint(1797, (900,), generator=generator)] for _ in range(10)]
    mean = np.mean([frechet_distance(Moments.of(features), reference) for features in drawn])
    assert frechet_bias(reference, 900) == pytest.approx(mean, rel=0.2)
