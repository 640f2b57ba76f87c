"""Codecs: pixels, autoencoders of diffusers from folders and the hub, and classes of one's own."""

import json
import logging
import shutil
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from madformer.config import ConfigError
from madformer.data.codec import Codec, build_codec

LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 8, 8),
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
KL = {**LEVELS, "latent_channels": 4, "sample_size": 32}
MEAN, DEVIATION = [0.1, -0.2, 0.3, -0.4], [0.5, 1.5, 2.5, 3.5]

OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch

class Own(torch.nn.Module):
    latent_channels = 2
    downsampling = 4
    scaling_factor = 0.5
    shift_factor = 3.0

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 2, 4, stride=4)
        self.up = torch.nn.ConvTranspose2d(2, 3, 4, stride=4)

    def encode(self, images):
        assert not torch.is_autocast_enabled(images.device.type)
        mean = self.down(images)
        return mean, torch.full_like(mean, 2.0)

    def decode(self, latents):
        return self.up(latents)

@dataclass
class Plain:
    latent_channels: int = 3
    downsampling: int = 2

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean, torch.zeros_like(mean)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=2)

class Holder(Plain):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 3, 2, stride=2)

    def encode(self, images):
        return self.net(images), self.net(images)

class Small(Plain):
    limit = 2 * 3 * 16 * 16

    def __init__(self):
        super().__init__()
        self.sizes = []

    def _take(self, tensor, factor):
        self.sizes.append(len(tensor))
        if tensor.numel() * factor > self.limit:
            raise torch.OutOfMemoryError("as on a small device")

    def encode(self, images):
        self._take(images, 1)
        return super().encode(images)

    def decode(self, latents):
        self._take(latents, 4)
        return super().decode(latents)

class Tiled(torch.nn.Module):
    latent_channels = 4
    downsampling = 8

    def __init__(self):
        super().__init__()
        import diffusers
        self.vae = diffusers.AutoencoderKL(**KL)
        for part, limit in ((self.vae.encoder, 32), (self.vae.decoder, 4)):
            part.register_forward_pre_hook(lambda module, inputs, limit=limit: self._take(inputs[0], limit))

    def _take(self, tensor, limit):
        if tensor.shape[-1] > limit or len(tensor) > 1:
            raise torch.OutOfMemoryError("as on a small device")

    def encode(self, images):
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents):
        return self.vae.decode(latents).sample

class Failing(Plain):
    def __init__(self):
        raise KeyError("weights\\nare elsewhere")

class WithoutChannels(Plain):
    def __init__(self):
        self.latent_channels = None

class WithoutDecode:
    latent_channels = 3
    downsampling = 2
    encode = Plain.encode

class Alone(Plain):
    def encode(self, images):
        return super().encode(images)[0]

class Halved(Plain):
    def decode(self, latents):
        return latents

class NoScale(Plain):
    scaling_factor = 0

class Worded(Plain):
    scaling_factor = "large"

class ManyShifts(Plain):
    shift_factor = (1.0, 2.0)

number = 3
""".replace("**KL", f"**{KL!r}")


def images_of(size=(32, 48), batch=2, seed=0):
    """Gradients with some noise."""
    rows, columns = torch.linspace(-0.9, 0.9, size[0]), torch.linspace(-0.9, 0.9, size[1])
    plain = torch.stack([rows[:, None] + 0 * columns, columns + 0 * rows[:, None], rows[:, None] * columns])
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
    return (plain + 0.1 * noise).clamp(-1, 1)


def save(kind, folder, **config):
    """A small autoencoder with random weights, in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(**config).eval()
        for name, buffer in module.named_buffers():
            if name.startswith("bn.running"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    module.save_pretrained(folder)
    return module


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def vae(tmp_path):
    """Of Stable Diffusion's architecture."""
    return save(diffusers.AutoencoderKL, tmp_path / "vae", **KL)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "lab").mkdir()
    shutil.copy("mine.py", "lab/codecs.py")


def complaint(name):
    with pytest.raises(ConfigError) as error:
        build_codec(name)
    message = str(error.value)
    assert message.startswith(f"data.codec = {name!r}: ") and "\n" not in message
    return message.removeprefix(f"data.codec = {name!r}: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_latents(dtype, channels):
    codec = build_codec("pixels", dtype)
    images = images_of((5, 7))[:, :channels]
    mean, deviation = codec.encode(images)
    assert torch.equal(mean, images) and torch.equal(deviation, torch.zeros_like(images))
    assert torch.equal(codec.decode(2 * mean), (2 * images).clamp(-1, 1))
    assert (codec.name, codec.latent_channels, codec.downsampling) == ("pixels", 3, 1)


@pytest.mark.parametrize("factors", [{}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
def test_kl_is_scaled(tmp_path, factors):
    module = save(diffusers.AutoencoderKL, tmp_path, **KL, **factors)
    codec = build_codec(f"vae:{tmp_path}")
    assert (codec.latent_channels, codec.downsampling) == (4, 8)
    images = images_of()
    mean, deviation = codec.encode(images)
    with torch.no_grad():
        posterior = module.encode(images).latent_dist
        decoded = module.decode(posterior.mean).sample.clamp(-1, 1)
    scale, shift = factors.get("scaling_factor", 0.18215), factors.get("shift_factor", 0.0)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close(deviation, posterior.std * scale)
    torch.testing.assert_close(codec.decode(mean), decoded, rtol=1e-4, atol=1e-5)
    assert mean.dtype == deviation.dtype == torch.float32 and mean.std() > 0 and not mean.requires_grad


def test_kl_with_statistics(tmp_path):
    """As in SDXL's pipelines; the scale is by the deviation, and the shift is the mean alone."""
    statistics = {"latents_mean": MEAN, "latents_std": DEVIATION, "scaling_factor": 0.5}
    module = save(diffusers.AutoencoderKL, tmp_path, **KL, **statistics)
    images = images_of()
    mean, deviation = build_codec(f"vae:{tmp_path}").encode(images)
    with torch.no_grad():
        posterior = module.encode(images).latent_dist
    center, width = torch.tensor(MEAN).view(1, 4, 1, 1), torch.tensor(DEVIATION).view(1, 4, 1, 1)
    torch.testing.assert_close(mean, (posterior.mean - center) * 0.5 / width)
    torch.testing.assert_close(deviation, posterior.std * 0.5 / width)


def test_tiny_has_no_distribution(tmp_path):
    sizes = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4, "latent_channels": 6}
    module = save(diffusers.AutoencoderTiny, tmp_path, **sizes, scaling_factor=2.0)
    codec = build_codec(f"vae:{tmp_path}")
    assert (codec.latent_channels, codec.downsampling) == (6, 8)
    images = images_of()
    mean, deviation = codec.encode(images)
    with torch.no_grad():
        latents = module.encode(images).latents
        torch.testing.assert_close(codec.decode(mean), module.decode(latents).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, latents * 2)
    assert torch.equal(deviation, torch.zeros_like(mean))


def test_dc_has_no_distribution(tmp_path):
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    widths = {"encoder_block_out_channels": (4, 8, 8), "decoder_block_out_channels": (4, 8, 8)}
    layers = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    module = save(
        diffusers.AutoencoderDC,
        tmp_path,
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.41,
        **blocks,
        **widths,
        **layers,
    )
    codec = build_codec(f"vae:{tmp_path}")
    assert (codec.latent_channels, codec.downsampling) == (4, 4)
    images = images_of()
    mean, deviation = codec.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(mean, module.encode(images).latent * 0.41)
    assert not deviation.any() and codec.decode(mean).shape == images.shape


def test_flux2_is_packed_and_normalised_as_in_its_pipeline(tmp_path):
    from diffusers import Flux2Pipeline

    module = save(diffusers.AutoencoderKLFlux2, tmp_path, **LEVELS, latent_channels=4, batch_norm_eps=0.1)
    codec = build_codec(f"vae:{tmp_path}")
    assert (codec.latent_channels, codec.downsampling) == (16, 16)
    images = images_of()
    mean, deviation = codec.encode(images)
    with torch.no_grad():
        posterior = module.encode(images).latent_dist
        center = module.bn.running_mean.view(1, -1, 1, 1)
        width = (module.bn.running_var.view(1, -1, 1, 1) + module.config.batch_norm_eps).sqrt()
        packed = (Flux2Pipeline._patchify_latents(posterior.mean) - center) / width
        decoded = module.decode(Flux2Pipeline._unpatchify_latents(packed * width + center)).sample.clamp(-1, 1)
    torch.testing.assert_close(mean, packed)
    torch.testing.assert_close(deviation, Flux2Pipeline._patchify_latents(posterior.std) / width)
    torch.testing.assert_close(codec.decode(mean), decoded, rtol=1e-4, atol=1e-5)


def test_video_autoencoder_takes_one_frame(tmp_path):
    module = save(diffusers.AutoencoderKLWan, tmp_path, base_dim=4, z_dim=16, num_res_blocks=1)
    codec = build_codec(f"vae:{tmp_path}")
    assert (codec.latent_channels, codec.downsampling) == (16, 8)
    images = images_of()
    mean, deviation = codec.encode(images)
    width = torch.tensor(module.config.latents_std).view(1, 16, 1, 1)
    with torch.no_grad():
        posterior = module.encode(images.unsqueeze(2)).latent_dist
        decoded = module.decode(posterior.mean).sample.squeeze(2)
    torch.testing.assert_close(
        mean, (posterior.mean.squeeze(2) - torch.tensor(module.config.latents_mean).view(1, 16, 1, 1)) / width
    )
    torch.testing.assert_close(deviation, posterior.std.squeeze(2) / width)
    torch.testing.assert_close(codec.decode(mean), decoded, rtol=1e-4, atol=1e-5)


def test_statistics_of_the_first_frame(tmp_path):
    widths = {"encoder_block_out_channels": (4,) * 4, "decode_block_out_channels": (4,) * 4}
    module = save(diffusers.AutoencoderKLCosmos, tmp_path, **widths, num_layers=1)
    images = images_of()
    mean, deviation = build_codec(f"vae:{tmp_path}").encode(images)
    center, width = (
        torch.tensor(module.config[name]).view(1, 16, -1)[..., :1, None] for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        latents = module.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)
    torch.testing.assert_close(mean, (latents - center) / width)
    assert not deviation.any()


def test_folder_of_a_pipeline(vae, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert build_codec(f"vae:{tmp_path}").sha256 == build_codec(f"vae:{tmp_path / 'vae'}").sha256


def test_attention_under_its_former_names(vae, tmp_path):
    """As in the published weights of Stable Diffusion's autoencoder."""
    expected = build_codec(f"vae:{tmp_path / 'vae'}").sha256
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(file)
    for new, old in former.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, file, {"format": "pt"})
    assert build_codec(f"vae:{tmp_path / 'vae'}").sha256 == expected


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


def test_random_state_stays(vae, own, tmp_path):
    before = torch.get_rng_state()
    for name in (f"vae:{tmp_path / 'vae'}", "mine.py:Own", "pixels"):
        build_codec(name)
        assert torch.equal(torch.get_rng_state(), before)


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


def test_fewer_images_at_once_where_memory_does_not_suffice(own, caplog):
    codec, enough = build_codec("mine.py:Small"), build_codec("mine.py:Plain")
    images = images_of((16, 16), batch=9)
    sizes = codec._autoencoder.sizes
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mean, deviation = codec.encode(images)
            assert torch.equal(mean, enough.encode(images)[0]) and not deviation.any()
    assert sizes == [9, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "codec mine.py:Small: memory does not suffice to encode 9 images at once: from now on 2 at once"
    ]
    sizes.clear()
    assert torch.equal(codec.decode(mean), enough.decode(mean)) and sizes == [9, 4, 2, 2, 2, 2, 1]
    sizes.clear()
    codec.encode(images_of((8, 8), batch=8))  # smaller images are another matter
    assert sizes == [8]


def test_a_single_image_too_large(own, caplog):
    codec = build_codec("mine.py:Small")
    with pytest.raises(torch.OutOfMemoryError, match="small device"):
        codec.encode(images_of((32, 32)))
    assert codec._autoencoder.sizes == [2, 1] and not caplog.records


def test_tiles_where_memory_does_not_suffice_for_one_image(own, caplog):
    codec = build_codec("mine.py:Tiled")
    vae = codec._autoencoder.vae
    images = images_of((64, 64))
    mean, deviation = codec.encode(images)
    assert mean.shape == deviation.shape == (2, 4, 8, 8) and not vae.use_tiling
    vae.enable_tiling()
    with torch.no_grad():
        expected = torch.cat([vae.encode(image[None]).latent_dist.mean for image in images])
    vae.disable_tiling()
    assert torch.equal(mean, expected) and torch.equal(codec.encode(images)[0], expected)
    assert len(caplog.records) == 1 and "from now on 1 at once, in overlapping tiles" in caplog.text
    codec.encode(images_of((32, 32), batch=1))
    assert codec.decode(mean).shape == images.shape and "to decode 2 images" in caplog.text


def test_no_call_is_repeated_where_memory_suffices(own):
    codec = build_codec("mine.py:Small")
    codec.encode(images_of((16, 16)))
    assert codec._autoencoder.sizes == [2]


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonsense", "must be pixels, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class"),
        ("mine.py:Own()", "must be pixels, vae:HUB_ID_OR_FOLDER, module.path:Class or file.py:Class"),
        ("other.py:Own", "no such file: other.py"),
        ("no_such_module:Own", "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken.py:Own", "broken.py cannot be imported: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("mine.py:Missing", "mine.py has no class Missing"),
        ("mine.py:number", "mine.py has no class number"),
        ("mine.py:Failing", "Failing() fails: KeyError: 'weights\\nare elsewhere'"),
        ("mine.py:WithoutChannels", "WithoutChannels.latent_channels must be an integer of at least 1, not None"),
        ("mine.py:WithoutDecode", "WithoutDecode has no method decode"),
        ("mine.py:NoScale", "scaling_factor must be finite, and no scale 0; it is [0.0]"),
        ("mine.py:Worded", "scaling_factor must be a number, or one for each channel, not 'large'"),
        ("mine.py:ManyShifts", "shift_factor must be a number, or one for each of 3 channels"),
    ],
)
def test_own_class_that_is_no_codec(own, name, words):
    Path("broken.py").write_text("no code")
    assert complaint(name) == words


def test_own_class_that_gives_other_shapes(own):
    with pytest.raises(
        ConfigError, match=r"data.codec = 'mine.py:Alone': Alone.encode must give a mean and a standard deviation"
    ):
        build_codec("mine.py:Alone").encode(images_of())
    with pytest.raises(ConfigError, match=r"Halved.decode must give images of shape \[2, 3, 8, 8\], not \[2, 3, 4, 4\]"):
        build_codec("mine.py:Halved").decode(torch.zeros(2, 3, 4, 4))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_broken_folders(vae, tmp_path):
    folder = tmp_path / "vae"
    name = f"vae:{folder}"

    edit_config(folder, _class_name="UNet2DModel")
    assert complaint(name).startswith("UNet2DModel is no autoencoder of diffusers")
    edit_config(folder, _class_name="AutoencoderOfTheFuture")
    assert complaint(name).startswith("AutoencoderOfTheFuture is no autoencoder of diffusers")
    edit_config(folder, _class_name="AutoencoderKL", in_channels=1)
    assert complaint(name).startswith("AutoencoderKL does not map single images to latents and back: ")
    edit_config(folder, in_channels=3, out_channels=4)
    assert complaint(name) == "AutoencoderKL turns an image of shape [1, 3, 256, 256] into [1, 4, 256, 256]"
    edit_config(folder, out_channels=3)

    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key: tensor for key, tensor in weights.items() if key != "decoder.conv_in.bias"}, file, {"format": "pt"})
    assert complaint(name) == f"the weights in {folder} are incomplete: decoder.conv_in.bias is missing"
    file.write_bytes(file.read_bytes()[:1000])
    assert complaint(name).startswith(f"{folder} cannot be loaded: ")
    file.unlink()
    assert complaint(name).startswith(f"{folder} cannot be loaded: ")

    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert complaint(name) == f"{folder / 'config.json'} is of no autoencoder of diffusers: it names no _class_name"
    (folder / "config.json").write_text("{")
    assert complaint(name).startswith(f"{folder / 'config.json'} is no JSON: ")
    (folder / "config.json").unlink()
    assert complaint(name) == f"{folder} holds no config.json, nor a vae/ that does"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (diffusers.AutoencoderOobleck, "AutoencoderOobleck does not map single images to latents and back: "),
        (
            diffusers.AutoencoderKLTemporalDecoder,
            "AutoencoderKLTemporalDecoder does not map single images to latents and back: ",
        ),
        (diffusers.ConsistencyDecoderVAE, "ConsistencyDecoderVAE cannot be used: its decoder draws random numbers"),
        (diffusers.AutoencoderRAE, "AutoencoderRAE cannot be used: it takes images of one size alone"),
    ],
)
def test_autoencoders_that_are_none_of_images(tmp_path, kind, words):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind.__name__}))  # no weights are looked for
    assert complaint(f"vae:{tmp_path}").startswith(words)


@pytest.mark.parametrize("location", ["./missing", "/missing/vae", "missing", "a b/c", "../owner/name"])
def test_no_folder_and_no_hub_id(location):
    assert complaint(f"vae:{location}") == "no such folder, and no hub id, which is owner/name or owner/name/subfolder"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


def fill(cache, folder, subfolder):
    """What the hub's library leaves of the repository owner/name."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40) / subfolder)


@pytest.mark.parametrize(
    ("subfolder", "location"), [("", "owner/name"), ("vae", "owner/name"), ("vae", "owner/name/vae"), ("a/b", "owner/name/a/b")]
)
def test_cached_files_need_no_network(vae, tmp_path, cache, subfolder, location):
    fill(cache, tmp_path / "vae", subfolder)
    codec = build_codec(f"vae:{location}")
    assert codec.sha256 == build_codec(f"vae:{tmp_path / 'vae'}").sha256 and codec.name == f"vae:{location}"


def test_without_network_it_fails_at_once(vae, tmp_path, cache):
    start = time.monotonic()
    message = complaint("vae:owner/name")
    assert message.startswith("cannot be had: ") and message.endswith("; name a folder that exists, or take data.codec=pixels")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    fill(cache, tmp_path / "vae", "")  # a download that was cut off
    assert complaint("vae:owner/name") == message
    assert time.monotonic() - start < 5


class Hub(BaseHTTPRequestHandler):
    """A hub that has no repository but owner/name, which holds no weights."""

    def do_GET(self):
        body = json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": [{"rfilename": "README.md"}]}).encode()
        found = self.path == "/api/models/owner/name"
        self.send_response(200 if found else 403 if "gated" in self.path else 401)
        if not found:
            self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
            body = b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("owner/nmae", "the hub has no such repository, or it is private (`hf auth login`)"),
        ("owner/gated", "its owner must grant access first (accept the terms on its page, then `hf auth login`)"),
        ("owner/name", "owner/name holds no vae/config.json"),
        ("owner/name/other", "owner/name holds no other/config.json"),
    ],
)
def test_what_the_hub_says(cache, monkeypatch, location, reason):
    from huggingface_hub import constants

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            message = complaint(f"vae:{location}")
        finally:
            server.shutdown()
    assert message == f"cannot be had: {reason}; name a folder that exists, or take data.codec=pixels"


def test_it_is_an_ordinary_object(vae, tmp_path):
    codec = build_codec(f"vae:{tmp_path / 'vae'}")
    assert isinstance(codec, Codec) and not isinstance(codec, torch.nn.Module)
