"""Vision networks of transformers as feature networks, small ones with random weights."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from madformer.data.codec import to_pixels
from madformer.evaluation.feature_networks import build_feature_network, pretrained
from madformer.evaluation.feature_networks.network import as_files
from tests.hub import fill_cache
from tests.networks import complaint

LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": 24, "patch_size": 8}
TEXT = {**LAYERS, "vocab_size": 8, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
SQUARE = {"size": {"height": 24, "width": 24}, "do_resize": True, "resample": 2}
CROPPED = {
    **SQUARE,
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 24, "width": 24},
    "do_center_crop": True,
    "resample": 3,
}
RESCALED = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
MEAN, DEVIATION = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def images_of(size=40, batch=3):
    """Gradients with some noise, here and there outside [-1, 1]."""
    ramp = torch.linspace(-1, 1, size)
    plain = torch.stack([ramp[:, None] * ramp, ramp.expand(size, size), ramp[:, None].expand(size, size)])
    return plain + 0.2 * torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def save(folder, config, processor=SQUARE, kind="ViTImageProcessor", head=transformers.AutoModel):
    """A network in a folder."""
    with torch.random.fork_rng(), pretrained._quiet():
        torch.manual_seed(0)
        model = head.from_config(config) if head is transformers.AutoModel else head(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    content = {**processor, **RESCALED, "image_mean": MEAN, "image_std": DEVIATION, "image_processor_type": kind}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return model.eval()


@pytest.fixture
def vit(tmp_path):
    """A classifier, whose checkpoint has no pooler, in the folder `vit`."""
    return save(tmp_path / "vit", transformers.ViTConfig(**VISION), head=transformers.ViTForImageClassification)


def prepared(images, resample):
    """What Pillow makes of images."""
    pictures = [Image.fromarray(pixels).resize((24, 24), resample) for pixels in to_pixels(images)]
    pixels = torch.stack([torch.tensor(np.asarray(picture)) for picture in pictures]).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def test_an_untrained_pooler_is_not_used(vit, tmp_path, capfd):
    before = torch.get_rng_state()
    network, images = build_feature_network(f"hf:{tmp_path / 'vit'}"), images_of(24)
    assert torch.equal(torch.get_rng_state(), before) and capfd.readouterr().err == ""
    assert (network.label, network.width) == ("vit", 16)
    pixels = (as_files(images) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    with torch.no_grad():
        expected = vit.vit(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(network(images).features_BD, expected)
    assert torch.equal(build_feature_network(f"hf:{tmp_path / 'vit'}")(images).features_BD, network(images).features_BD)


def test_the_vision_tower_of_clip(tmp_path):
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)
    model = save(tmp_path / "CLIP-tiny", config, CROPPED, "CLIPImageProcessor")
    network, images = build_feature_network(f"hf:{tmp_path / 'CLIP-tiny'}"), images_of()
    assert (network.label, network.width) == ("clip_tiny", 16)
    with torch.no_grad():  # the whole image, nothing is cropped
        expected = model.vision_model(pixel_values=prepared(images, Image.Resampling.BICUBIC)).pooler_output
    torch.testing.assert_close(network(images).features_BD, expected, rtol=1e-3, atol=5e-3)


def test_a_convolutional_network(tmp_path):
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    model = save(tmp_path / "resnet", config, {**SQUARE, "size": {"shortest_edge": 24}}, "ConvNextImageProcessor")
    network, images = build_feature_network(f"hf:{tmp_path / 'resnet'}"), images_of()
    with torch.no_grad():
        expected = model(prepared(images, Image.Resampling.BILINEAR)).pooler_output.flatten(1)
    assert network.width == 8
    torch.testing.assert_close(network(images).features_BD, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("size", [12, 64])
def test_resizing_is_that_of_pillow(resample, size):
    images = images_of(size)
    input = pretrained._Input(24, 24, pretrained._FILTERS[resample], 1 / 255, tuple(MEAN), tuple(DEVIATION))
    difference = (input.prepare(as_files(images)) - prepared(images, resample)).abs() * torch.tensor(DEVIATION).view(3, 1, 1)
    assert difference.max() < 2.01 / 255 and difference.mean() < 0.1 / 255


def test_pooling_without_a_pooler():
    class Fixed(torch.nn.Module):
        def __init__(self, hidden, pooled=None, token=None):
            super().__init__()
            self.outputs = transformers.modeling_outputs.BaseModelOutputWithPooling(hidden, pooled)
            if token is not None:
                self.cls_token = torch.nn.Parameter(token)

        def forward(self, pixel_values, return_dict):
            return self.outputs

    input = pretrained._Input(8, 8, "bilinear", 1.0, (0.0,), (1.0,))
    tokens, pixels, pooled = torch.randn(2, 5, 4), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 1, 1)
    cases = [
        (Fixed(tokens, pooled), True, pooled.flatten(1)),
        (Fixed(tokens, pooled), False, tokens.mean(1)),
        (Fixed(tokens, token=torch.zeros(4)), True, tokens[:, 0]),
        (Fixed(pixels), True, pixels.mean((2, 3))),
    ]
    for network, has_pooler, expected in cases:
        found = pretrained._Pretrained(network, input, has_pooler)(torch.zeros(2, 3, 8, 8))
        torch.testing.assert_close(found, expected)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_hash_follows_what_decides_features(vit, tmp_path):
    def sha256(folder):
        return build_feature_network(f"hf:{tmp_path / folder}").sha256

    first = sha256("vit")
    for folder in ("dinov2-large", "mean", "activation", "weights"):
        shutil.copytree(tmp_path / "vit", tmp_path / folder)
    assert sha256("dinov2-large") == first
    assert build_feature_network(f"hf:{tmp_path / 'dinov2-large'}").label == "dinov2_large", "the name alone does not make it"
    edit(tmp_path / "mean" / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    edit(tmp_path / "activation" / "config.json", hidden_act="relu")
    file = tmp_path / "weights" / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert len({first, *map(sha256, ("mean", "activation", "weights"))}) == 4


def test_only_the_network_of_fd_dinov2_is_called_so(tmp_path):
    large = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, image_size=28, mlp_ratio=1)
    save(tmp_path / "dinov2-large", large)
    assert build_feature_network(f"hf:{tmp_path / 'dinov2-large'}").label == "dinov2"


def test_broken_folders(vit, tmp_path):
    folder = tmp_path / "vit"
    name, file = f"hf:{folder}", folder / "preprocessor_config.json"
    edit(file, resample=1)
    assert complaint(name).startswith(f"the image processor in {folder} resizes in a way that is not known here: ")
    file.unlink()
    assert complaint(name).startswith(f"{folder} holds no preprocessor_config.json")
    file.write_text(json.dumps({**SQUARE, "image_processor_type": "ViTImageProcessor"}))

    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = next(key for key in weights if key.endswith("layernorm.weight"))
    save_file({key: tensor for key, tensor in weights.items() if key != lost}, file, {"format": "pt"})
    assert complaint(name).startswith(f"the weights in {folder} are incomplete: ")
    file.write_bytes(b"half")
    assert complaint(name).startswith(f"{folder} cannot be loaded: ")
    (folder / "config.json").unlink()
    assert complaint(name) == f"{folder} holds no config.json"
    assert complaint("hf:./missing").startswith("cannot be had: no such folder, and no hub id, which is owner/name; ")


def test_masked_autoencoders_draw_random_numbers(tmp_path):
    config = transformers.ViTMAEConfig(
        **VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    save(tmp_path / "mae", config)
    assert complaint(f"hf:{tmp_path / 'mae'}") == "gives different features for the same images"


def test_without_network_it_fails_at_once_unless_it_is_cached(vit, tmp_path, cache):
    start = time.monotonic()
    assert complaint("hf:owner/name").startswith("cannot be had: no such folder, and it is not in the cache")
    snapshot = fill_cache(cache, tmp_path / "vit")
    assert build_feature_network("hf:owner/name").sha256 == build_feature_network(f"hf:{tmp_path / 'vit'}").sha256
    (snapshot / "model.safetensors").unlink()  # a download that was cut off
    assert complaint("hf:owner/name").startswith("cannot be had: no such folder, and it is not in the cache")
    assert time.monotonic() - start < 5
