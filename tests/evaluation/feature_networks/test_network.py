"""Feature networks by name: what they all do, the digits', and classes of one's own."""

import copy
from pathlib import Path

import pytest
import torch

from madformer.config.evaluation import SHIPPED_NETWORKS
from madformer.data.sources import load_digits
from madformer.errors import ConfigError, InputError
from madformer.evaluation.feature_networks import DigitsFeatures, FeatureNetwork, build_feature_network
from madformer.evaluation.feature_networks.network import as_files, make_label
from madformer.evaluation.measurement import metric_name
from madformer.evaluation.metrics import Moments, frechet_distance
from madformer.runs.checkpoints import weights_sha256
from tests.networks import complaint

SOURCE = """
import torch
from torch import nn

class Quarters(nn.Module):
    def __init__(self, scale={scale}):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.noise = nn.Dropout()

    def forward(self, images):
        assert not torch.is_autocast_enabled("cpu") and images.dtype == torch.float32
        return self.noise(self.scale * nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))

class Inception(Quarters):
    pass

class Plain:
    def __init__(self):
        self.layer = nn.Linear(4, 2)

    def __call__(self, images):
        return self.layer(images.mean((1, 2, 3), keepdim=True).flatten(1).expand(-1, 4))

class Sized(Plain):
    num_features = 5

    def __call__(self, images):
        return images.flatten(1)[:, :5] if images.shape[1:] == (1, 8, 8) else images.flatten(1)

class Misnumbered(Plain):
    num_features = "many"

class Failing(Plain):
    def __init__(self):
        raise KeyError("weights\\nare elsewhere")

class Leaving(Plain):
    def __init__(self):
        raise SystemExit(3)

class Maps(Plain):
    def __call__(self, images):
        return images

class Pair(Plain):
    def __call__(self, images):
        return images.flatten(1), images

class Whole(Plain):
    def __call__(self, images):
        return images.flatten(1).long()

class Random(Plain):
    def __call__(self, images):
        return images.flatten(1)[:, :3] + torch.randn(len(images), 3)

class Small(Plain):
    def __call__(self, images):
        return images.reshape(-1, 64)

class NoCall:
    pass
"""


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """A user's file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(SOURCE.format(scale=1.0))


def images_of(channels=3, size=16, batch=4, seed=0):
    """Gradients with some noise, here and there outside [-1, 1]."""
    ramp = torch.linspace(-1, 1, size)
    plain = torch.stack([ramp[:, None] * ramp, ramp.expand(size, size), ramp[:, None].expand(size, size)])[:channels]
    return plain + 0.2 * torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


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
    with pytest.raises(InputError, match=r"\[B, 1, 8, 8\]; take another of evaluation.feature_networks$") as error:
        network(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def test_integer_images_are_refused(network):
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_hash_follows_the_weights_alone(network):
    assert len(weights_sha256(network)) == 64
    assert weights_sha256(DigitsFeatures()) == weights_sha256(network)
    other = DigitsFeatures()
    other.classifier[0].bias[0] += 1e-9
    assert weights_sha256(other) != weights_sha256(network)
    assert weights_sha256(torch.nn.BatchNorm1d(3).bfloat16())  # scalars and types that numpy has not


def test_digits_by_name(network):
    built = build_feature_network("digits")
    images = load_digits()[0][:8]
    found = built(images)
    assert isinstance(built, FeatureNetwork) and (built.name, built.label, built.width) == ("digits", "digits", 64)
    assert torch.equal(found.features_BD, network(images)) and found.logits_BK is None
    assert built.sha256 == weights_sha256(network) and built.to("cpu") is built and built.device == torch.device("cpu")


@pytest.fixture(scope="module")
def photographs():
    """32 x 32 tiles of scikit-learn's two photographs, half of each: [N, 3, 32, 32] in [-1, 1]."""
    from sklearn.datasets import load_sample_images

    tiles = [torch.tensor(image).permute(2, 0, 1).unfold(1, 32, 32).unfold(2, 32, 32) for image in load_sample_images().images]
    images = torch.cat([tile.permute(1, 2, 0, 3, 4).flatten(0, 1) for tile in tiles]).float() / 127.5 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def test_features_of_photographs_rank_what_is_spoiled(photographs):
    network = build_feature_network("cifar10")
    features = {0.0: network(photographs).features_BD}
    assert features[0.0].shape == (len(photographs), 128) and features[0.0].dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    for deviation in (0.05, 0.1, 0.2):
        noise = deviation * torch.randn(photographs.shape, generator=generator)
        features[deviation] = network(photographs + noise).features_BD
    half = len(photographs) // 2
    reference = Moments.of(features[0.0][:half])
    distances = [frechet_distance(Moments.of(each[half:]), reference) for each in features.values()]
    assert distances == sorted(distances) and distances[-1] > 2 * distances[0]


def test_features_of_photographs_of_any_size_and_colour(photographs):
    network = build_feature_network("cifar10")
    some = photographs[:8]
    for size in (8, 16, 33, 64):
        resized = torch.nn.functional.interpolate(some, (size, size), mode="bilinear", antialias=True)
        assert network(resized).features_BD.shape == (8, 128)
    together = network(some).features_BD
    torch.testing.assert_close(torch.cat([network(image[None]).features_BD for image in some]), together, rtol=1e-4, atol=1e-5)
    grey = some[:, :1]
    assert torch.equal(network(grey).features_BD, network(grey.expand(-1, 3, -1, -1)).features_BD)
    assert torch.equal(network(some + 1e-4).features_BD, network(as_files(some).float() / 127.5 - 1).features_BD)
    with pytest.raises(ValueError, match=r"\[B, 1 or 3, Y, X\]"):
        network(torch.zeros(2, 4, 32, 32))


@pytest.mark.parametrize("name", SHIPPED_NETWORKS)
def test_a_shipped_network_is_the_one_whose_hash_is_known(name):
    before = torch.get_rng_state()
    built = build_feature_network(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert (built.name, built.label, built.sha256) == (name, name, SHIPPED_NETWORKS[name])


def test_metrics_are_named_after_their_network():
    assert metric_name("fd", "inception") == "fid"
    for metric in ("kid", "inception_score", "precision", "recall", "density", "coverage"):
        assert metric_name(metric, "inception") == metric
        assert metric_name(metric, "dinov2") == f"{metric}_dinov2"
    assert metric_name("fd", "digits") == "fd_digits"


def test_labels_promise_no_other_network():
    assert make_label("hf", "ViT-base.16") == "vit_base_16"
    assert make_label("own", "Inception") == "own_inception"
    assert make_label("torchscript", "dinov2") == "torchscript_dinov2"


@pytest.mark.parametrize("name", ["Inception", "digits:", "hf:", "torchscript:", "net", "mine.py:Net()"])
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match=r"evaluation.feature_networks.*digits, cifar10, inception, .*file.py:Class"):
        build_feature_network(name)


def test_images_as_files_hold_them():
    images = torch.tensor([-2.0, -1.0, -0.998, 0.0, 0.999, 1.0, 1.5]).view(7, 1, 1, 1)
    found = as_files(images)
    assert found.dtype == torch.uint8 and found.shape == (7, 3, 1, 1)
    assert found[:, 2].flatten().tolist() == [0, 0, 0, 128, 255, 255, 255]
    with pytest.raises(ValueError, match=r"\[2, 4, 8, 8\].*1 or 3"):
        as_files(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((2, 3, 8, 8), torch.nan), "images hold NaN or infinity"),
        (torch.full((2, 3, 8, 8), torch.inf), "images hold NaN or infinity"),
        (torch.zeros(3, 8, 8), r"\[3, 8, 8\].*\[B, C, Y, X\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8.*floating point"),
    ],
)
def test_images_that_cannot_be_described(user_file, images, words):
    with pytest.raises(ValueError, match=words):
        build_feature_network("mine.py:Quarters")(images)


@pytest.mark.parametrize("name", ["mine.py:Quarters", "mine:Quarters"])
def test_own_module(user_file, name):
    network, images = build_feature_network(name), images_of()
    assert (network.name, network.label, network.width) == (name, "quarters", 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images.double().requires_grad_()).features_BD
    expected = torch.nn.functional.adaptive_avg_pool2d(images.clamp(-1, 1), 2).flatten(1)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_own_class_that_is_no_module(user_file):
    network = build_feature_network("mine.py:Plain")
    assert (network.label, network.width) == ("plain", 2)
    assert network(images_of()).features_BD.shape == (4, 2)
    assert not any(parameter.requires_grad for parameter in network._module.parameters())


def test_own_class_of_other_images_says_its_width(user_file):
    network = build_feature_network("mine.py:Sized")
    assert network.width == 5 and network(images_of(1, 8)).features_BD.shape == (4, 5)
    with pytest.raises(ConfigError, match=r"'mine.py:Sized': must give features of shape \[4, 5\].*not \[4, 768\]"):
        network(images_of())


def test_own_label_is_never_that_of_fid(user_file):
    assert build_feature_network("mine.py:Inception").label == "own_inception"


def test_own_hash_follows_weights_and_code(user_file):
    Path("again.py").write_text(SOURCE.format(scale=1.0))
    Path("weights.py").write_text(SOURCE.format(scale=2.0))
    Path("code.py").write_text(SOURCE.format(scale=1.0).replace("avg_pool", "max_pool"))
    files = ("mine", "again", "weights", "code")
    first, again, *others = (build_feature_network(f"{file}.py:Quarters").sha256 for file in files)
    assert len(first) == 64 and first == again and len({first, *others}) == 3


def test_random_weights_are_the_same_whenever_a_network_is_built(user_file):
    first = build_feature_network("mine.py:Plain").sha256
    torch.rand(3)
    assert build_feature_network("mine.py:Plain").sha256 == first


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other.py:Own", "no such file: other.py"),
        ("no_such_module:Own", "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("mine.py:Missing", "mine.py has no class Missing"),
        ("mine.py:NoCall", "NoCall cannot be called: it needs forward or __call__"),
        ("mine.py:Failing", "Failing() fails: KeyError: 'weights\\nare elsewhere'"),
        ("mine.py:Leaving", "Leaving() fails: SystemExit: 3"),
        ("mine.py:Misnumbered", "Misnumbered.num_features must be an integer of at least 1, not 'many'"),
        ("mine.py:Maps", "must give features of shape [2, d], floating point; not [2, 3, 256, 256], torch.float32"),
        ("mine.py:Whole", "must give features of shape [2, d], floating point; not [2, 196608], torch.int64"),
        ("mine.py:Pair", "must give features of shape [2, d], not tuple"),
        ("mine.py:Small", "must give features of shape [2, d], floating point; not [6144, 64], torch.float32"),
        ("mine.py:Random", "gives different features for the same images"),
    ],
)
def test_own_class_that_is_no_network(user_file, name, words):
    assert complaint(name) == words


def test_building_leaves_the_random_state_alone(user_file):
    before = torch.get_rng_state()
    for name in ("mine.py:Plain", "digits"):
        build_feature_network(name)
        assert torch.equal(torch.get_rng_state(), before)


def test_reduced_precision_of_the_trainer_stays_outside(user_file):
    seen = []
    network = build_feature_network("mine.py:Quarters")
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    network._module.register_forward_hook(lambda *_: seen.extend(switch.fp32_precision for switch in switches))
    torch.set_float32_matmul_precision("high")
    try:
        before = [switch.fp32_precision for switch in switches]
        network(images_of())
        assert seen == ["ieee", "ieee"] and [switch.fp32_precision for switch in switches] == before
        assert torch.get_float32_matmul_precision() == "high" and "tf32" in before
    finally:
        torch.set_float32_matmul_precision("highest")
