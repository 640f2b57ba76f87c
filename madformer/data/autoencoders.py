"""The autoencoders of diffusers, loaded from a folder or the hub, with one interface for all.

Their classes differ in the result of `encode`, in the normalisation of latents, and in whether there is a frame axis. There is
no list of classes that map single images to latents and back. Each is tried on meta tensors before its weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.errors import InputError
from madformer.lookup import CONFIG, find_model, first_line

__all__ = ["DiffusersAutoencoder", "load_autoencoder"]

_PROBE_SIZE = 256
"""Pixels along a side of the image for the try, a multiple of every known downsampling."""

_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)

_UNFIT: Mapping[str, str] = {
    "AutoencoderRAE": "it takes images of only one size",
    "ConsistencyDecoderVAE": "its decoder draws random numbers",
}
"""Class -> the reason why it cannot be used. These classes pass the try, or fail it with a misleading error."""


class DiffusersAutoencoder(nn.Module):
    """An autoencoder of diffusers with the attributes and methods of a custom codec.

    Attributes:
        latent_channels: channels of the latents.
        downsampling: pixels along one side of a latent pixel.
        shift_factor, scaling_factor: latents are `(mean - shift_factor) * scaling_factor`; [1], or [C] for each channel.
    """

    def __init__(self, module: Any, latent_channels: int, downsampling: int) -> None:
        super().__init__()
        self.module = module
        self.latent_channels, self.downsampling = latent_channels, downsampling
        self.shift_factor, self.scaling_factor = _normalisation(module, latent_channels)

    def encode(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, before normalisation. A deterministic one has deviation 0."""
        return _encode(self.module, images_BCYX)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """The images of latents that are not normalised."""
        return _decode(self.module, latents_BChw)

    @property
    def overflows_in_float16(self) -> bool:
        """Whether the autoencoder's configuration says so (`force_upcast`)."""
        return bool(self.module.config.get("force_upcast"))


def load_autoencoder(location: str) -> DiffusersAutoencoder:
    """Load an autoencoder by its folder or hub id, in float32 on the CPU.

    Args:
        location: a folder that `save_pretrained` wrote; `owner/name` or `owner/name/subfolder` of the hub. For a pipeline, its
            `vae/` is used. Files in the hub's cache are used without asking the hub.

    Raises:
        InputError: the autoencoder is not available, or does not map single images to latents and back.
    """
    folder = find_model(location, _WEIGHTS, part="vae", remedy="name a folder that exists, or take data.codec=pixels")
    config = _read_config(folder / CONFIG)
    kind = _find_class(config)
    latent_channels, downsampling = _try_shapes(kind, config)
    try:
        # low_cpu_mem_usage=False avoids a warning that accelerate is missing.
        module, info = kind.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a file of weights can be broken in every way
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        raise InputError(f"the weights in {folder} are incomplete: {sorted(info['missing_keys'])[0]} is missing")
    return DiffusersAutoencoder(module, latent_channels, downsampling)


def _encode(module: Any, images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
    encoded = module.encode(images_BCYX.unsqueeze(2) if _has_frames(module) else images_BCYX)
    if "latent_dist" in encoded:
        mean, deviation = encoded.latent_dist.mode(), getattr(encoded.latent_dist, "std", None)
    else:
        mean, deviation = encoded.latents if "latents" in encoded else encoded.latent, None
    deviation = torch.zeros_like(mean) if deviation is None else deviation
    if _has_frames(module):
        mean, deviation = mean.squeeze(2), deviation.squeeze(2)
    patch = _patch_size(module)
    return F.pixel_unshuffle(mean, patch), F.pixel_unshuffle(deviation, patch)


def _decode(module: Any, latents_BChw: Tensor) -> Tensor:
    latents = F.pixel_shuffle(latents_BChw, _patch_size(module))
    if _has_frames(module):
        return module.decode(latents.unsqueeze(2)).sample.squeeze(2)
    return module.decode(latents).sample


def _has_frames(module: nn.Module) -> bool:
    return any(parameter.ndim == 5 for parameter in module.parameters())


def _patch_size(module: Any) -> int:
    """Latents along a side of a patch that is folded into channels. FLUX.2's pipeline folds, its autoencoder does not."""
    return module.config.patch_size[0] if type(module).__name__ == "AutoencoderKLFlux2" else 1


def _normalisation(module: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Shift and scale of latents as in the pipelines of the class, float64, each [1] or [C]."""
    values = {**module.config, **dict(module.named_buffers())}  # LTX keeps its statistics as buffers
    shift, scale = values.get("shift_factor") or 0.0, values.get("scaling_factor") or 1.0
    mean, deviation = values.get("latents_mean"), values.get("latents_std")
    if type(module).__name__ == "AutoencoderKLFlux2":
        mean, deviation = values["bn.running_mean"], (values["bn.running_var"].double() + module.config.batch_norm_eps).sqrt()
    if mean is not None and deviation is not None:
        statistics = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in (mean, deviation)])
        shift, deviation = statistics.reshape(2, channels, -1)[..., 0]  # Cosmos has them for each frame; an image is the first
        scale = scale / deviation
    return torch.as_tensor(shift, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)


def _try_shapes(kind: Any, config: dict[str, Any]) -> tuple[int, int]:
    """Latent channels and downsampling of a class that maps one image to latents and back."""
    if reason := _UNFIT.get(kind.__name__):
        raise InputError(f"{kind.__name__} cannot be used: {reason}")
    try:
        with torch.device("meta"), torch.no_grad():
            module = kind.from_config(config).to("meta").eval()
            images_BCYX = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE)
            latents_BChw, _ = _encode(module, images_BCYX)
            shape = _decode(module, latents_BChw).shape
            _, channels, height, _ = latents_BChw.shape
    except Exception as error:  # audio, video alone, missing arguments: each class fails in its own way
        raise InputError(f"{kind.__name__} does not map single images to latents and back: {first_line(error)}") from error
    if shape != images_BCYX.shape:
        raise InputError(f"{kind.__name__} turns an image of shape {list(images_BCYX.shape)} into {list(shape)}")
    return channels, _PROBE_SIZE // height


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise InputError(f"{path} is not the configuration of an autoencoder of diffusers: it has no _class_name")
    return config


def _find_class(config: dict[str, Any]) -> Any:
    import diffusers

    name = str(config["_class_name"])
    kind = getattr(diffusers, name, None)
    is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not is_model or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise InputError(f"{name} is not an autoencoder of diffusers {diffusers.__version__}")
    return kind
