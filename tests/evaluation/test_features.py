"""The shipped feature network and the registry."""

import copy

import pytest
import torch

from madformer.data.digits import load_digits
from madformer.evaluation.features import DigitsFeatures, feature_network, metric_name
from madformer.fingerprint import weights_sha256


@pytest.fixture(scope="module")
def network():
    return DigitsFeatures()


def test_features_tell_digits_apart(network):
    images, labels = load_digits()
    features = network(images)
    assert features.shape == (1797, network.num_features) and features.dtype == torch.float32
    logits = network.classifier[-1](features.double())
    assert (logits.argmax(1) == labels).float().mean() > 0.99

    known, others = slice(0, None, 2), slice(1, None, 2)
    centroids = torch.stack([features[known][labels[known] == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(features[others], centroids).argmin(1)
    assert (nearest == labels[others]).float().mean() > 0.97


def test_no_feature_is_dead_or_redundant(network):
    spectrum = torch.linalg.eigvalsh(network(load_digits()[0]).double().T.cov())
    assert spectrum[0] > 1e-5 * spectrum[-1]


def test_images_are_clipped(network):
    images = 3 * torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images), network(images.clamp(-1, 1)))


def test_network_is_frozen_and_the_same_in_both_modes(network):
    images = load_digits()[0][:8]
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert not network(images.clone().requires_grad_()).requires_grad
    assert torch.equal(copy.deepcopy(network).train()(images), network(images))


def test_features_do_not_depend_on_the_batch_or_on_reduced_precision(network):
    images = load_digits()[0][:64]
    together = network(images)
    torch.testing.assert_close(torch.cat([network(image[None]) for image in images]), together, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images), together)


def test_building_it_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    DigitsFeatures()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 3, 8, 8), (2, 1, 16, 16), (2, 4, 1, 8, 8)])
def test_wrong_shape_is_named(network, shape):
    with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\]") as error:
        network(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def test_integer_images_are_refused(network):
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_registry():
    assert isinstance(feature_network("digits"), DigitsFeatures)
    assert metric_name("digits") == "fd_digits"
    for function in (feature_network, metric_name):
        with pytest.raises(ValueError, match="'inception'.*digits"):
            function("inception")


def test_hash_follows_the_weights_alone(network):
    assert len(weights_sha256(network)) == 64
    assert weights_sha256(DigitsFeatures()) == weights_sha256(network)
    other = DigitsFeatures()
    other.classifier[0].bias[0] += 1e-9
    assert weights_sha256(other) != weights_sha256(network)
    assert weights_sha256(torch.nn.BatchNorm1d(3).bfloat16())  # scalars and types that numpy has not
