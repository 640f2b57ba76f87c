"""Codecs: pixels, precision, the hash, the random state, custom classes; and what is no image, no latent and no codec."""

import shutil

import diffusers
import pytest
import torch

from madformer.data.codec import Codec, build_codec
from madformer.errors import ConfigError
from tests.data.vaes import KL, complaint, images_of, save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_latents(dtype, channels):
    codec = build_codec("pixels", dtype)
    images = images_of((5, 7))[:, :channels]
    mean, deviation = codec.encode(images)
    assert torch.equal(mean, images) and torch.equal(deviation, torch.zeros_like(images))
    assert torch.equal(codec.decode(2 * mean), (2 * images).clamp(-1, 1))
    assert (codec.name, codec.latent_channels, codec.downsampling) == ("pixels", 3, 1)


def test_hash_follows_what_decides_latents(vae, tmp_path):
    name = f"vae:{tmp_path / 'vae'}"
    expected = build_codec(name).sha256
    assert len(expected) == 64
    assert all(build_codec(name, dtype).sha256 == expected for dtype in ("bfloat16", "float16"))
    shutil.copytree(tmp_path / "vae", tmp_path / "copy")
    assert build_codec(f"vae:{tmp_path / 'copy'}").sha256 == expected

    vae.register_to_config(scaling_factor=0.2)
    vae.save_pretrained(tmp_path / "scaled")
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1
    vae.save_pretrained(tmp_path / "moved")
    others = [build_codec(f"vae:{tmp_path / other}").sha256 for other in ("scaled", "moved")]
    assert len({expected, *others, build_codec("pixels").sha256}) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hash_of_weights_stored_in_another_type(vae, tmp_path, dtype):
    vae.to(dtype).save_pretrained(tmp_path / "half")
    hashes = {build_codec(f"vae:{tmp_path / 'half'}", name).sha256 for name in ("float32", "bfloat16")}
    assert len(hashes) == 1


def test_lower_precision(vae, tmp_path):
    images = images_of()
    precise = build_codec(f"vae:{tmp_path / 'vae'}")
    rough = build_codec(f"vae:{tmp_path / 'vae'}", "bfloat16")
    mean, expected = rough.encode(images)[0], precise.encode(images)[0]
    assert mean.dtype == torch.float32 and not torch.equal(mean, expected)
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()
    decoded = rough.decode(expected)
    assert decoded.dtype == torch.float32 and (decoded - precise.decode(expected)).abs().max() < 0.1


@pytest.mark.parametrize(("force_upcast", "expected"), [(True, True), (False, False)])
def test_float16_only_where_it_does_not_overflow(tmp_path, caplog, force_upcast, expected):
    save(diffusers.AutoencoderKL, tmp_path, **KL, force_upcast=force_upcast)
    images = images_of((16, 16), batch=1)
    rough, precise = build_codec(f"vae:{tmp_path}", "float16"), build_codec(f"vae:{tmp_path}")
    assert torch.equal(rough.encode(images)[0], precise.encode(images)[0]) is expected
    assert ("float32" in caplog.text) is expected


def test_the_default_type_does_not_matter(vae, tmp_path):
    expected = build_codec(f"vae:{tmp_path / 'vae'}").sha256
    torch.set_default_dtype(torch.bfloat16)
    try:
        codec = build_codec(f"vae:{tmp_path / 'vae'}")
    finally:
        torch.set_default_dtype(torch.float32)
    assert codec.sha256 == expected and codec.encode(images_of())[0].dtype == torch.float32


def test_random_state_stays(vae, custom_codecs, tmp_path):
    before = torch.get_rng_state()
    for name in (f"vae:{tmp_path / 'vae'}", "mine.py:Custom", "pixels"):
        build_codec(name)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 20, 32), "20 x 32 pixels.*multiples of 8"),
        ((1, 3, 32, 20), "32 x 20 pixels.*multiples of 8"),
        ((1, 1, 32, 32), r"\[1, 1, 32, 32\].*\[B, 3, Y, X\]"),
        ((3, 32, 32), r"\[3, 32, 32\].*\[B, 3, Y, X\]"),
    ],
)
def test_wrong_images(vae, tmp_path, shape, words):
    with pytest.raises(ValueError, match=words):
        build_codec(f"vae:{tmp_path / 'vae'}").encode(torch.zeros(shape))


def test_wrong_latents_and_types(vae, tmp_path):
    codec = build_codec(f"vae:{tmp_path / 'vae'}")
    with pytest.raises(ValueError, match=r"latents of shape \[1, 3, 4, 4\].*\[B, 4, Y, X\]"):
        codec.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="uint8.*floating point"):
        codec.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[B, 1 or 3, Y, X\]"):
        build_codec("pixels").decode(torch.zeros(1, 4, 8, 8))


def test_it_is_an_ordinary_object(vae, tmp_path):
    codec = build_codec(f"vae:{tmp_path / 'vae'}")
    assert isinstance(codec, Codec) and not isinstance(codec, torch.nn.Module)


# Custom classes


@pytest.mark.parametrize("name", ["mine.py:Custom", "lab/codecs.py:Custom", "lab.codecs:Custom"])
def test_custom_class(custom_codecs, name):
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
def test_custom_class_that_is_no_module(custom_codecs, name):
    codec = build_codec(name).to("cpu")
    assert codec.device == torch.device("cpu")
    images = images_of()
    assert codec.decode(codec.encode(images)[0]).shape == images.shape


def test_weights_within_a_class_that_is_no_module(custom_codecs):
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
        ("mine.py:Custom()", "must be pixels, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class"),
        ("other.py:Custom", "no such file: other.py"),
        ("mine.py:Failing", "Failing() fails: KeyError: 'weights\\nare elsewhere'"),
        ("mine.py:WithoutChannels", "WithoutChannels.latent_channels must be an integer of at least 1, not None"),
        ("mine.py:WithoutDecode", "WithoutDecode has no method decode"),
        ("mine.py:NoScale", "scaling_factor must be finite, and no scale 0; it is [0.0]"),
        ("mine.py:Worded", "scaling_factor must be a number, or one for each channel, not 'large'"),
        ("mine.py:ManyShifts", "shift_factor must be a number, or one for each of 3 channels"),
    ],
)
def test_custom_class_that_is_no_codec(custom_codecs, name, words):
    assert complaint(name) == words


def test_custom_class_that_gives_other_shapes(custom_codecs):
    with pytest.raises(
        ConfigError, match=r"data.codec = 'mine.py:Alone': Alone.encode must give a mean and a standard deviation"
    ):
        build_codec("mine.py:Alone").encode(images_of())
    with pytest.raises(ConfigError, match=r"Halved.decode must give images of shape \[2, 3, 8, 8\], not \[2, 3, 4, 4\]"):
        build_codec("mine.py:Halved").decode(torch.zeros(2, 3, 4, 4))
