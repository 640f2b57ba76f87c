"""Metrics over pairs against their definitions, written out in numpy, and against torchmetrics."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torchmetrics.image.kid import KernelInceptionDistance

from madformer.errors import InputError
from madformer.evaluation.neighbours import compare_pairs, memorisation, nearest_distances, pairs_within

NAMES = ["kid", "precision", "recall", "density", "coverage"]
BLOCKS = [1, 7, 16, 1000]


def points(count, seed, width=5, shift=0.0):
    """Correlated, lopsided features whose mean is far from zero, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return 2 + shift + (torch.randn(count, width, generator=generator) @ mixing).relu()


def compare(generated, reference, **block):
    return compare_pairs(generated, reference, pairs_within(reference, **block), **block)


def distances(one, other):
    return np.sqrt(((one[:, None].astype(float) - other[None].astype(float)) ** 2).sum(2))


def radii(features, k):
    between = distances(features, features)
    np.fill_diagonal(between, np.inf)
    return np.sort(between, axis=1)[:, k - 1]


def kernel(one, other):
    return (one.astype(float) @ other.astype(float).T / one.shape[1] + 1) ** 3


def defined(generated, reference):
    """The papers' formulas, pair by pair."""
    generated, reference = generated.numpy(), reference.numpy()
    between, n, m = distances(generated, reference), len(generated), len(reference)
    within = [kernel(x, x)[~np.eye(len(x), dtype=bool)].mean() for x in (generated, reference)]
    return {
        "kid": within[0] + within[1] - 2 * kernel(generated, reference).mean(),
        "precision": sum(any(between[i, j] <= radii(reference, 3)[j] for j in range(m)) for i in range(n)) / n,
        "recall": sum(any(between[i, j] <= radii(generated, 3)[i] for i in range(n)) for j in range(m)) / m,
        "density": (between <= radii(reference, 5)).sum() / (5 * n),
        "coverage": (between.min(0) <= radii(reference, 5)).mean(),
    }


def test_radii_are_the_distances_to_the_third_and_fifth_others():
    features = points(40, seed=0)
    expected = np.stack([radii(features.numpy(), 3), radii(features.numpy(), 5)], axis=1)
    found = pairs_within(features).radii_NK
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("n", "m", "shift"), [(30, 45, 0.0), (45, 30, 0.7), (6, 50, 0.3), (20, 20, 30.0)])
def test_metrics_are_their_definitions(n, m, shift):
    generated, reference = points(n, seed=1, shift=shift), points(m, seed=2)
    found = compare(generated, reference)
    assert list(found) == NAMES
    assert found == pytest.approx(defined(generated, reference), rel=1e-9, abs=1e-9)


def test_the_examples_tell_the_metrics_apart():
    """None of the comparisons above is of zeros and ones alone."""
    shares = [compare(points(30, seed=1, shift=shift), points(45, seed=2)) for shift in (0.3, 0.7)]
    assert all(0 < metrics[name] < 1 for metrics in shares for name in ("precision", "recall", "coverage"))
    assert shares[0]["kid"] < shares[1]["kid"]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_do_not_matter(block):
    generated, reference = points(50, seed=3, shift=0.2), points(60, seed=4)
    whole, found = compare(generated, reference), compare(generated, reference, block=block)
    assert found.pop("kid") == pytest.approx(whole.pop("kid"), rel=1e-10)
    assert found == whole
    torch.testing.assert_close(
        pairs_within(reference, block=block).radii_NK, pairs_within(reference).radii_NK, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("width", [4, 64])
def test_kid_is_torchmetrics(width):
    generated, reference = points(80, seed=5, width=width, shift=0.1).double(), points(80, seed=6, width=width).double()
    with pytest.warns(UserWarning, match="memory"):
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=80)
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    assert compare(generated, reference)["kid"] == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_kid_of_equals_is_zero_on_average():
    reference = points(100, seed=7)
    found = [compare(points(100, seed=seed), reference)["kid"] for seed in range(10, 50)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(40)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_reference_itself_has_them_all(block, scale):
    """Every rim is met here: a point's neighbours are at its radius exactly."""
    reference = scale * points(50, seed=8, width=300)
    found = compare(reference, reference, block=block)
    assert [found[name] for name in NAMES[1:]] == [1, 1, (5 + 1) / 5, 1]


@pytest.mark.parametrize("block", BLOCKS)
def test_duplicates_are_neighbours_at_no_distance(block):
    reference = points(10, seed=9, width=300).repeat(7, 1)
    assert (pairs_within(reference, block=block).radii_NK < 1e-4).all()
    found = compare(reference[:10], reference, block=block)
    assert [found[name] for name in NAMES[1:]] == [1, 1, 7 / 5, 1]
    apart = compare(reference + 0.01, reference, block=block)
    assert [apart[name] for name in NAMES[1:]] == [0, 0, 0, 0]


def test_a_far_mean_does_not_matter():
    generated, reference = points(40, seed=10, shift=0.3).double(), points(50, seed=11).double()
    near, far = compare(generated, reference), compare(generated + 1e4, reference + 1e4)
    assert {**far, "kid": 0} == {**near, "kid": 0}


@pytest.mark.parametrize(("n", "m", "missing"), [(2, 50, {"recall"}), (4, 50, set()), (50, 5, {"density", "coverage"})])
def test_what_few_images_do_not_give_is_left_out(n, m, missing):
    found = compare(points(n, seed=12), points(m, seed=13))
    assert list(found) == [name for name in NAMES if name not in missing]


def test_three_reference_images_give_kid_and_recall():
    assert list(compare(points(50, seed=12), points(3, seed=13))) == ["kid", "recall"]
    assert pairs_within(points(4, seed=14)).radii_NK.isinf().tolist() == [[False, True]] * 4
    assert pairs_within(points(1, seed=14)).radii_NK.isinf().all()


def test_one_image_is_too_few():
    with pytest.raises(InputError, match="1 generated images: .* at least 2"):
        compare(points(1, seed=0), points(10, seed=1))
    with pytest.raises(InputError, match="1 reference images: .* at least 2"):
        compare(points(10, seed=0), points(1, seed=1))


@pytest.mark.parametrize("block", BLOCKS)
def test_nearest_distances_are_their_definition(block):
    features, reference = points(30, seed=15, shift=0.5), points(45, seed=16)
    found = nearest_distances(features, reference, block)
    np.testing.assert_allclose(found, distances(features.numpy(), reference.numpy()).min(1), rtol=1e-12)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_copy_is_at_no_distance_and_so_is_one_among_many(scale):
    reference = scale * points(50, seed=8, width=300) + 100 * scale
    assert nearest_distances(reference, reference, block=16).eq(0).all()
    assert nearest_distances(torch.cat((reference[:3], 2 * reference[3:])), reference).eq(0).sum() == 3


TRAINING = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])


def around(*radii):
    """Points so far from one training image or another."""
    return torch.stack([TRAINING[number % 3] - torch.tensor([0.0, radius]) for number, radius in enumerate(radii)])


@pytest.mark.parametrize(
    ("radii", "expected"),
    [
        ((0, 0, 0, 0), 1),  # copies
        ((1, 2, 3, 4), 0.5),  # the held-out images themselves
        ((4, 3, 2, 1), 0.5),
        ((2.5,), 0.5),
        ((1,), 7 / 8),  # a tie counts half
        ((0, 3.5, 9), (4 + 1 + 0) / 12),
        ((50, 60), 0),
    ],
)
def test_memorisation_by_hand(radii, expected):
    held_out = nearest_distances(around(1, 2, 3, 4), TRAINING)
    assert held_out.tolist() == [1, 2, 3, 4]
    assert memorisation(nearest_distances(around(*radii), TRAINING), held_out) == pytest.approx(expected)


def test_memorisation_is_the_statistic_of_mann_and_whitney():
    generated, held_out = (torch.randint(9, (count,)).double() for count in (70, 40))
    assert memorisation(generated, held_out) == pytest.approx(1 - mannwhitneyu(generated, held_out).statistic / (70 * 40))


def test_memorisation_of_equals_scatters_around_a_half_as_is_said():
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        generated, held_out = (torch.rand(count, generator=generator) for count in (50, 30))
        shares.append(memorisation(generated, held_out))
    deviation = np.sqrt((50 + 30 + 1) / (12 * 50 * 30))
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * deviation / np.sqrt(2000))
    assert np.std(shares) == pytest.approx(deviation, rel=0.07)
