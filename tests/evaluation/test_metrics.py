"""The Fréchet distance against scipy, and that it orders images as an eye would."""

import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.nn import functional as F

from madformer.data.digits import load_digits
from madformer.evaluation.features import DigitsFeatures
from madformer.evaluation.metrics import FrechetDistance


@pytest.fixture(scope="module")
def network():
    return DigitsFeatures()


@pytest.fixture(scope="module")
def to_digits(network):
    """The distance of images to all digits."""
    metric = FrechetDistance(network, load_digits()[0])

    def distance(images, batch_size=512):
        metric.reset()
        for batch in images.split(batch_size):
            metric.update(batch)
        return metric.compute()

    return distance


def noised(strength):
    images = load_digits()[0]
    return images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blurred(strength):
    kernel = torch.tensor([strength, 1 - 2 * strength, strength])
    images = F.pad(load_digits()[0], (1, 1, 1, 1), value=-1.0)
    return F.conv2d(images, torch.outer(kernel, kernel)[None, None])


def reference_distance(features, others):
    """The definition, in numpy and scipy."""
    features, others = features.double().numpy(), others.double().numpy()
    shift = features.mean(0) - others.mean(0)
    covariance, other = np.cov(features, rowvar=False), np.cov(others, rowvar=False)
    return shift @ shift + np.trace(covariance + other - 2 * sqrtm(covariance @ other).real)


@pytest.mark.parametrize("images", [noised(0.3), blurred(0.2), noised(0.3)[:200]], ids=["noised", "blurred", "few"])
def test_distance_is_scipy_s(network, to_digits, images):
    expected = reference_distance(network(images), network(load_digits()[0]))
    assert to_digits(images) == pytest.approx(expected, rel=1e-6)


def test_half_of_the_digits_is_near_the_other(network):
    images = load_digits()[0][torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    metric = FrechetDistance(network, images[:898])
    metric.update(images[898:])
    expected = reference_distance(network(images[:898]), network(images[898:]))
    assert metric.compute() == pytest.approx(expected, rel=1e-6)
    assert 0 < metric.compute() < 10


def test_digits_are_at_no_distance_and_noise_is_far(to_digits):
    assert abs(to_digits(load_digits()[0])) < 1e-6
    assert to_digits(torch.randn(1797, 1, 8, 8, generator=torch.Generator().manual_seed(0))) > 300


@pytest.mark.parametrize("spoil", [noised, blurred])
def test_worse_images_are_farther(to_digits, spoil):
    distances = [to_digits(spoil(strength)) for strength in (0.02, 0.05, 0.1, 0.2, 0.3)]
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0]


def test_missing_digits_and_mixed_quarters_are_seen(to_digits):
    images, labels = load_digits()
    assert to_digits(images[labels < 5]) > 4 * to_digits(images[labels != 9]) > 0
    quarters = images.clone()  # four blocks, each right, that do not belong together
    for y, x in ((0, 0), (0, 4), (4, 0)):
        quarters[:, :, y : y + 4, x : x + 4] = images.roll(17 * y + 31 * x + 7, 0)[:, :, y : y + 4, x : x + 4]
    assert to_digits(quarters) > 10


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_do_not_matter(network, to_digits, batch_size):
    images = noised(0.1)[:300]
    expected = to_digits(images)
    assert to_digits(images, batch_size) == pytest.approx(expected, rel=1e-6)
    metric = FrechetDistance(network, load_digits()[0], batch_size=batch_size)
    metric.update(images)
    assert metric.compute() == pytest.approx(expected, rel=1e-6)


def test_reset_keeps_the_reference(to_digits):
    first = to_digits(noised(0.1))
    to_digits(noised(0.3))
    assert to_digits(noised(0.1)) == first and isinstance(first, float)


def _part(rank, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = FrechetDistance(DigitsFeatures(), load_digits()[0])
    metric.update(noised(0.1)[:300][rank::2])
    results[rank] = metric.compute()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_do_not_matter(to_digits, tmp_path):
    results = torch.zeros(2, dtype=torch.float64).share_memory_()
    torch.multiprocessing.start_processes(_part, (tmp_path / "store", results), nprocs=2, start_method="fork")
    assert results.tolist() == pytest.approx([to_digits(noised(0.1)[:300])] * 2, rel=1e-6)


def test_mistakes_are_named(network):
    images = load_digits()[0]
    with pytest.raises(ValueError, match="1 reference images: .* at least 2"):
        FrechetDistance(network, images[:1])
    with pytest.raises(ValueError, match="reference images hold NaN"):
        FrechetDistance(network, images / 0)
    metric = FrechetDistance(network, images)
    with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\]"):
        metric.update(torch.zeros(4, 1, 16, 16))
    with pytest.raises(ValueError, match="generated images hold NaN"):
        metric.update(torch.full((4, 1, 8, 8), torch.nan))
    metric.update(images[:1])
    with pytest.raises(ValueError, match="1 generated images: .* at least 2"):
        metric.compute()
