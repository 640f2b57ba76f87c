"""Codecs that are classes of one's own, modules or not; and classes that are no codec."""

import pytest
import torch

from madformer.data.codec import build_codec
from madformer.errors import ConfigError
from tests.data.vaes import complaint, images_of


@pytest.mark.parametrize("name", ["mine.py:Own", "lab/codecs.py:Own", "lab.codecs:Own"])
def test_own_class(own, name):
    codec = build_codec(name)
    assert (codec.name, codec.latent_channels, codec.downsampling) == (name, 2, 4)
    images = images_of()
    module = codec._autoencoder
    assert isinstance(module, torch.nn.Module) and not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):  # what a trainer of bf16-mixed does
        mean, deviation = codec.encode(images.clone().requires_grad_())
    torch.testing.assert_close(mean, (module.down(images) - 3) * 0.5)
    assert torch.equal(deviation, torch.ones_like(mean))
    torch.testing.assert_close(codec.decode(mean), module.up(module.down(images)).clamp(-1, 1))
    mean.mul(torch.ones((), requires_grad=True)).sum().backward()  # latents are inputs of training


@pytest.mark.parametrize("name", ["mine.py:Plain", "mine.py:Holder"])
def test_own_class_that_is_no_module(own, name):
    codec = build_codec(name).to("cpu")
    assert codec.device == torch.device("cpu")
    images = images_of()
    assert codec.decode(codec.encode(images)[0]).shape == images.shape


def test_weights_within_a_class_that_is_no_module(own):
    codec = build_codec("mine.py:Holder", "bfloat16")
    assert not codec._autoencoder.net.weight.requires_grad and codec._autoencoder.net.weight.dtype == torch.bfloat16
    assert codec.sha256 == build_codec("mine.py:Holder").sha256  # drawn from the same random state
    torch.rand(1)
    assert codec.sha256 != build_codec("mine.py:Holder").sha256
    assert build_codec("mine.py:Plain", "bfloat16").sha256 == build_codec("lab.codecs:Plain").sha256


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonsense", "must be pixels, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class"),
        ("mine.py:Own()", "must be pixels, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class"),
        ("other.py:Own", "no such file: other.py"),
        ("mine.py:Failing", "Failing() fails: KeyError: 'weights\\nare elsewhere'"),
        ("mine.py:WithoutChannels", "WithoutChannels.latent_channels must be an integer of at least 1, not None"),
        ("mine.py:WithoutDecode", "WithoutDecode has no method decode"),
        ("mine.py:NoScale", "scaling_factor must be finite, and no scale 0; it is [0.0]"),
        ("mine.py:Worded", "scaling_factor must be a number, or one for each channel, not 'large'"),
        ("mine.py:ManyShifts", "shift_factor must be a number, or one for each of 3 channels"),
    ],
)
def test_own_class_that_is_no_codec(own, name, words):
    assert complaint(name) == words


def test_own_class_that_gives_other_shapes(own):
    with pytest.raises(
        ConfigError, match=r"data.codec = 'mine.py:Alone': Alone.encode must give a mean and a standard deviation"
    ):
        build_codec("mine.py:Alone").encode(images_of())
    with pytest.raises(ConfigError, match=r"Halved.decode must give images of shape \[2, 3, 8, 8\], not \[2, 3, 4, 4\]"):
        build_codec("mine.py:Halved").decode(torch.zeros(2, 3, 4, 4))
