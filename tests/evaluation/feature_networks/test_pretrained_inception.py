"""Inception and TorchScript files as feature networks."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from madformer.evaluation.feature_networks import build_feature_network
from madformer.evaluation.feature_networks import pretrained as inception
from madformer.evaluation.feature_networks.network import as_files
from tests.networks import complaint

needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity, of the extra fid, is not installed"
)


class Tiny(nn.Module):
    """The signature of the published inception-2015-12-05.pt."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.drop = nn.Dropout()

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        features = self.drop(self.conv(img.float() / 255)).mean(dim=(2, 3))
        return features if return_features else torch.softmax(features, dim=1)[:, :2]


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


class Maps(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def images_of(channels=3, size=32, batch=3):
    """Gradients with some noise, here and there outside [-1, 1]."""
    ramp = torch.linspace(-1, 1, size)
    plain = torch.stack([ramp[:, None] * ramp, ramp.expand(size, size), ramp[:, None].expand(size, size)])[:channels]
    return plain + 0.2 * torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def script(module, path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = module()
    torch.jit.script(built).save(str(path))
    return built.eval()


def test_torchscript_gives_features(tmp_path):
    file = tmp_path / "My Net-1.pt"
    module = script(Tiny, file)
    network, images = build_feature_network(f"torchscript:{file}"), images_of()
    assert (network.label, network.width) == ("my_net_1", 4)
    assert network.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with torch.no_grad():
        expected = module(as_files(images), return_features=True)
    found = network(images)
    torch.testing.assert_close(found.features_BD, expected)
    assert found.features_BD.dtype == torch.float32 and found.logits_BK is None
    grey = images[:, :1]
    assert torch.equal(network(grey).features_BD, network(grey.expand(-1, 3, -1, -1)).features_BD)
    with pytest.raises(ValueError, match="1 or 3"):
        network(torch.zeros(2, 2, 8, 8))


def test_torchscript_without_options(tmp_path):
    script(Plain, tmp_path / "inception.pt")
    network = build_feature_network(f"torchscript:{tmp_path / 'inception.pt'}")
    assert (network.label, network.width) == ("torchscript_inception", 3)  # not that of FID
    torch.testing.assert_close(network(images_of()).features_BD, as_files(images_of()).float().mean((2, 3)))


def test_the_published_file_is_inception(tmp_path, monkeypatch):
    file = tmp_path / "any.pt"
    script(Tiny, file)
    monkeypatch.setattr(inception, "_SCRIPT_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    assert build_feature_network(f"torchscript:{file}").label == "inception"


def test_files_that_are_no_torchscript(tmp_path):
    assert complaint("torchscript:missing.pt") == "no such file: missing.pt"
    (tmp_path / "text.pt").write_text("no network")
    assert complaint(f"torchscript:{tmp_path / 'text.pt'}").startswith(f"{tmp_path / 'text.pt'} is not a TorchScript file: ")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    assert complaint(f"torchscript:{tmp_path / 'state.pt'}").startswith(f"{tmp_path / 'state.pt'} is not a TorchScript file: ")
    script(Maps, tmp_path / "maps.pt")
    assert complaint(f"torchscript:{tmp_path / 'maps.pt'}").startswith("must give features of shape [2, d]")


@pytest.mark.parametrize("name", ["inception", "inception:weights.pth"])
def test_without_the_extra(monkeypatch, name):
    for module in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    assert complaint(name) == "needs torch-fidelity and torchvision: pip install 'madformer[fid]'"


@needs_fidelity
def test_inception_of_a_file(tmp_path, monkeypatch):
    library = inception._import_library()
    file = tmp_path / "weights.pth"
    state = {}
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: state.update(self.state_dict()))
        torch.save({}, file)
        library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    assert "a TorchScript file is torchscript:FILE" in complaint(f"inception:{file}")
    assert complaint("inception:missing.pth") == "no such file: missing.pth"
    torch.save(state, file)

    before = torch.get_rng_state()
    network, images = build_feature_network(f"inception:{file}"), images_of()
    assert torch.equal(torch.get_rng_state(), before)
    assert (network.label, network.width) == ("weights", 2048)
    found = network(images)
    reference = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(file))
    features, logits = reference(as_files(images))
    assert torch.equal(found.features_BD, features) and torch.equal(found.logits_BK, logits)
    assert found.logits_BK.shape == (3, 1008)

    monkeypatch.setattr(inception, "_WEIGHTS_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    genuine = build_feature_network(f"inception:{file}")
    assert genuine.label == "inception" and genuine.sha256 == network.sha256


@needs_fidelity
def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    library = inception._import_library()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(library, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights.pth")  # where nothing listens
    message = complaint("inception")
    assert message.startswith("its weights cannot be downloaded (") and "inception:FILE takes a local" in message
    torn = tmp_path / "checkpoints" / Path("weights-inception-2015-12-05-6726825d.pth")
    torn.write_bytes(b"half")
    assert complaint("inception") == f"{torn} is torn: remove it, and it is downloaded again"
