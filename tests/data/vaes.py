"""Small autoencoders of diffusers, images for them, and what is said of a codec that is none."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from madformer.data.codec import build_codec
from madformer.errors import ConfigError

LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 8, 8),
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
KL: dict[str, Any] = {**LEVELS, "latent_channels": 4, "sample_size": 32}


def images_of(size: tuple[int, int] = (32, 48), batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Gradients with some noise."""
    rows, columns = torch.linspace(-0.9, 0.9, size[0]), torch.linspace(-0.9, 0.9, size[1])
    plain = torch.stack([rows[:, None] + 0 * columns, columns + 0 * rows[:, None], rows[:, None] * columns])
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
    return (plain + 0.1 * noise).clamp(-1, 1)


def save(kind: Any, folder: Path, **config: Any) -> Any:
    """A small autoencoder with random weights, in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(**config).eval()
        for name, buffer in module.named_buffers():
            if name.startswith("bn.running"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    module.save_pretrained(folder)
    return module


def complaint(name: str) -> str:
    """What is wrong with that codec: a line, without the name that it begins with."""
    beginning = f"data.codec = {name!r}: "
    with pytest.raises(ConfigError, match=rf"^{re.escape(beginning)}.+\Z") as error:
        build_codec(name)
    return str(error.value).removeprefix(beginning)
