"""Synthetic images in the layouts of the hub's data sets, and experiments on them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch import Tensor
from torch.nn.functional import avg_pool2d

from madformer.config import ExperimentConfig, load_experiment
from madformer.data.image_files import load_square, to_unit
from tests.tiny_runs import DIGITS, TINY

CODEC = """
import torch
from torch import nn


class Halving(nn.Module):
    latent_channels = 3
    downsampling = 2
    scaling_factor = 2.0

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def encode(self, images):
        mean = self.gain * nn.functional.avg_pool2d(images, 2)
        return mean, 0.1 + 0.05 * mean.abs()

    def decode(self, latents):
        return nn.functional.interpolate(latents / self.gain, scale_factor=2.0).clamp(-1, 1)
"""
"""A custom codec with a posterior: means of 2 x 2 pixels."""


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Pillow.Image:
    """A gradient with a disc, another one for each number."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    disc = (x - (5 * number) % width) ** 2 + (y - (3 * number) % height) ** 2 < 16
    channels = [x * 12 % 256, y * 15 % 256, np.full_like(x, number * 37 % 256)]
    return Pillow.fromarray(np.where(disc[..., None], 255, np.stack(channels, axis=-1)).astype(np.uint8))


def as_bytes(image: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_parquet(
    path: Path, rows: int, broken: tuple[int, ...] = (), classes: tuple[str, ...] = ("cat", "dog", "eel")
) -> Path:
    """ImageNet's layout on the hub: `image` (bytes and name) and `label`; the broken images are cut short."""
    images = [as_bytes(picture(number)) for number in range(rows)]
    contents = [content[: len(content) // 2] if number in broken else content for number, content in enumerate(images)]
    columns = {
        "image": [{"bytes": content, "path": f"picture_{number:04d}.png"} for number, content in enumerate(contents)],
        "label": [number % len(classes) for number in range(rows)],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")})).cast(features).to_parquet(path)
    return path


def write_tars(folder: Path, tars: int, rows: int) -> list[Path]:
    """FFHQ-1024's layout on the hub: WebDataset tars of `00001.webp`, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for tar in range(tars):
        paths.append(folder / f"part-{tar:04d}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for _ in range(rows):
                content = as_bytes(picture(number), "WEBP", lossless=True)
                member = tarfile.TarInfo(f"{number:05d}.webp")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                number += 1
    return paths


def write_codec(folder: Path) -> str:
    """The name of that codec, for `data.codec`."""
    path = folder / "halving.py"
    path.write_text(CODEC)
    return f"{path}:Halving"


def moments(number: int, flipped: bool = False) -> tuple[Tensor, Tensor]:
    """Scaled mean and deviation of a picture through that codec, by hand."""
    image = to_unit(load_square(as_bytes(picture(number)), 16)[None])
    mean = 0.5 * avg_pool2d(image.flip(-1) if flipped else image, 2)
    return 2 * mean[0], 2 * (0.1 + 0.05 * mean[0].abs())


def overrides(folder: Path, **data: Any) -> list[str]:
    """A tiny model on 8 x 8 latents of 16 x 16 pixels, through the codec above."""
    fields = {"source": folder / "pictures.parquet", "codec": write_codec(folder), "workers": 0, "codec_batch_size": 4, **data}
    settings = [*TINY, "model.latent_channels=3", "evaluation.preview_every=null", "evaluation.feature_networks=[]"]
    return [*settings, f"output_dir={folder / 'runs'}", *(f"data.{name}={_text(value)}" for name, value in fields.items())]


def experiment(folder: Path, *more: str, **data: Any) -> ExperimentConfig:
    """The experiment of `overrides`."""
    return load_experiment(DIGITS, [*overrides(folder, **data), *more])


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
