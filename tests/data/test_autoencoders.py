"""Autoencoders of diffusers from folders: their latents are those of diffusers' own pipelines; and what is refused."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from madformer.data.codec import build_codec
from tests.data.vaes import KL, LEVELS, complaint, images_of, save
from tests.hub import fill_cache

MEAN, DEVIATION = [0.1, -0.2, 0.3, -0.4], [0.5, 1.5, 2.5, 3.5]


def encode(folder, sizes):
    """The codec of a folder, with its latent channels and downsampling as expected, and images through it."""
    codec, images = build_codec(f"vae:{folder}"), images_of()
    assert (codec.latent_channels, codec.downsampling) == sizes
    return codec, images, *codec.encode(images)


@pytest.mark.parametrize("factors", [{}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
def test_kl_is_scaled(tmp_path, factors):
    module = save(diffusers.AutoencoderKL, tmp_path, **KL, **factors)
    codec, images, mean, deviation = encode(tmp_path, (4, 8))
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
    _, images, mean, deviation = encode(tmp_path, (4, 8))
    with torch.no_grad():
        posterior = module.encode(images).latent_dist
    center, width = torch.tensor(MEAN).view(1, 4, 1, 1), torch.tensor(DEVIATION).view(1, 4, 1, 1)
    torch.testing.assert_close(mean, (posterior.mean - center) * 0.5 / width)
    torch.testing.assert_close(deviation, posterior.std * 0.5 / width)


def test_tiny_has_no_distribution(tmp_path):
    sizes = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4, "latent_channels": 6}
    module = save(diffusers.AutoencoderTiny, tmp_path, **sizes, scaling_factor=2.0)
    codec, images, mean, deviation = encode(tmp_path, (6, 8))
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
    codec, images, mean, deviation = encode(tmp_path, (4, 4))
    with torch.no_grad():
        torch.testing.assert_close(mean, module.encode(images).latent * 0.41)
    assert not deviation.any() and codec.decode(mean).shape == images.shape


def test_flux2_is_packed_and_normalised_as_in_its_pipeline(tmp_path):
    from diffusers import Flux2Pipeline

    module = save(diffusers.AutoencoderKLFlux2, tmp_path, **LEVELS, latent_channels=4, batch_norm_eps=0.1)
    codec, images, mean, deviation = encode(tmp_path, (16, 16))
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
    codec, images, mean, deviation = encode(tmp_path, (16, 8))
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
    _, images, mean, deviation = encode(tmp_path, (16, 8))
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


def test_by_hub_id_from_its_cache(vae, tmp_path, cache):
    message = complaint("vae:owner/name")
    assert message.startswith("cannot be had: ") and message.endswith("; name a folder that exists, or take data.codec=pixels")
    fill_cache(cache, tmp_path / "vae", "vae")
    codec = build_codec("vae:owner/name")
    assert codec.sha256 == build_codec(f"vae:{tmp_path / 'vae'}").sha256 and codec.name == "vae:owner/name"


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


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_broken_folders(vae, tmp_path):
    folder = tmp_path / "vae"
    name = f"vae:{folder}"

    edit_config(folder, _class_name="UNet2DModel")
    assert complaint(name).startswith("UNet2DModel is not an autoencoder of diffusers")
    edit_config(folder, _class_name="AutoencoderOfTheFuture")
    assert complaint(name).startswith("AutoencoderOfTheFuture is not an autoencoder of diffusers")
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
    assert (
        complaint(name)
        == f"{folder / 'config.json'} is not the configuration of an autoencoder of diffusers: it has no _class_name"
    )
    (folder / "config.json").write_text("{")
    assert complaint(name).startswith(f"{folder / 'config.json'} is not JSON: ")
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
        (diffusers.AutoencoderRAE, "AutoencoderRAE cannot be used: it takes images of only one size"),
    ],
)
def test_autoencoders_that_are_none_of_images(tmp_path, kind, words):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind.__name__}))  # no weights are looked for
    assert complaint(f"vae:{tmp_path}").startswith(words)
