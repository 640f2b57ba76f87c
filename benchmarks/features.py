"""The changes of images that a feature network detects: metrics of images of known quality, and the bias of few samples.

    python -m benchmarks.features cifar10_train.parquet cifar10_test.parquet

Each row of the first table compares a set of images with all training images: test images, unchanged, degraded, or without one
class; and training images, which stand for a generator that copies. The more images are degraded, the larger their distance
should be. Copies should have memorisation 1. The other half of the test images is held out.
The second table shows distances of few images, and the bias that is expected for their number.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import positive, table
from madformer.config import DataConfig
from madformer.data.codec import to_pixels
from madformer.data.image_files import load_square, to_unit
from madformer.data.sources import open_source
from madformer.evaluation.feature_networks import FeatureNetwork, build_feature_network
from madformer.evaluation.measurement import MEMORISATION
from madformer.evaluation.metrics import Moments, frechet_bias, frechet_distance
from madformer.evaluation.neighbours import compare_pairs, memorisation, nearest_distances, pairs_within

BATCH = 500
SAMPLES = 5_000
"""Images of a row of the first table, at most; metrics over pairs compare them with as many training images."""

LEFT_OUT = 3
"""The class that a row lacks: cats, of CIFAR-10."""

METRICS = ("precision", "recall", "density", "coverage", MEMORISATION)
"""Columns of the first table, after both distances."""

COUNTS = (1_024, 2_048, 10_000)
"""Rows of the second table."""

Spoil = Callable[[Tensor], Tensor]


def read(source: str, size: int) -> tuple[Tensor, Tensor]:
    """All images at that size, in a random order: uint8 [N, 3, Y, X], and their labels [N]."""
    rows = open_source(DataConfig(source=source))
    order = torch.randperm(rows.num_rows or 0, generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [rows.row(number) for number in order]
    images = torch.stack([load_square(row.read(), size) for row in chosen])
    return images, torch.tensor([-1 if row.label is None else row.label for row in chosen])


def features(network: FeatureNetwork, images: Tensor, spoil: Spoil = torch.clone) -> Tensor:
    """Features [N, D] of bytes [N, 3, Y, X]."""
    torch.manual_seed(0)
    return torch.cat([network(spoil(to_unit(batch))).features_BD for batch in images.split(BATCH)])


def jpeg(quality: int) -> Spoil:
    """Save and read as JPEG."""

    def spoil(images_BCYX: Tensor) -> Tensor:
        read_back = []
        for pixels_YX3 in to_pixels(images_BCYX):
            file = io.BytesIO()
            Image.fromarray(pixels_YX3).save(file, format="JPEG", quality=quality)
            read_back.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
        return to_unit(torch.stack(read_back))

    return spoil


def blur(width: float) -> Spoil:
    """Convolve with a Gaussian of that standard deviation, in pixels."""
    places = torch.arange(-4, 5)
    kernel = torch.exp(-(places**2) / (2 * width**2))
    kernel_YX = torch.outer(kernel, kernel) / kernel.sum() ** 2

    def spoil(images_BCYX: Tensor) -> Tensor:
        padded_BCYX = F.pad(images_BCYX, (4,) * 4, mode="reflect")
        return F.conv2d(padded_BCYX, kernel_YX.expand(3, 1, -1, -1), groups=3)

    return spoil


def noise(deviation: float) -> Spoil:
    """Add Gaussian noise of that standard deviation, in units of [-1, 1]."""
    return lambda images_BCYX: images_BCYX + deviation * torch.randn_like(images_BCYX)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="training images, as data.source")
    parser.add_argument("test", help="test images of the same kind")
    parser.add_argument("--network", default="cifar10", help="as in evaluation.feature_networks; default: cifar10")
    parser.add_argument("--size", type=positive, default=32, help="pixels along the side of an image; default: 32")
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    network = build_feature_network(options.network)
    (train, _), (test, labels) = read(options.train, options.size), read(options.test, options.size)

    train_ND = features(network, train)
    moments = Moments.of(train_ND)
    half = len(train_ND) // 2
    some_training_ND = train_ND[:SAMPLES]
    within = pairs_within(some_training_ND)
    held_out_M = nearest_distances(features(network, test[SAMPLES:]), train_ND)

    def row(name: str, found_ND: Tensor) -> tuple[str, list[str]]:
        pairs = compare_pairs(found_ND, some_training_ND, within)
        pairs[MEMORISATION] = memorisation(nearest_distances(found_ND, train_ND), held_out_M)
        distance = frechet_distance(Moments.of(found_ND), moments)
        shown = (f"{pairs[key]:.3f}" for key in METRICS)
        return name, [f"{len(found_ND):,}", f"{distance:.2f}", f"{1e3 * pairs['kid']:.2f}", *shown]

    some = test[:SAMPLES]
    halves = frechet_distance(Moments.of(train_ND[:half]), Moments.of(train_ND[half:]))
    rows = [
        ("half of the training images, against the other half", [f"{half:,}", f"{halves:.2f}", *[""] * (1 + len(METRICS))]),
        row("training images (memorised)", train_ND[half : half + SAMPLES]),
        row("test images", features(network, some)),
        row("test images without one class", features(network, test[labels != LEFT_OUT][:SAMPLES])),
        *(row(f"test images, JPEG of quality {quality}", features(network, some, jpeg(quality))) for quality in (90, 50, 20)),
        *(row(f"test images, blurred by {width} pixels", features(network, some, blur(width))) for width in (0.4, 0.6, 1.0)),
        *(row(f"test images, noise of {size}", features(network, some, noise(size))) for size in (0.05, 0.1, 0.2)),
    ]
    print(f"{options.network}, {options.size} x {options.size} pixels, {len(train):,} training and {len(test):,} test images")
    print(*table(["number", "Fréchet", "kernel x 1000", *METRICS], rows), "", sep="\n")
    test_ND = features(network, test)
    biases = [
        (
            f"{count:,}",
            [f"{distance:.2f}" for distance in (*_distances(test_ND, train_ND, count, moments), frechet_bias(moments, count))],
        )
        for count in COUNTS
        if count <= len(test_ND)
    ]
    heads = ["test images", "training images", "bias expected of samples like the training images"]
    print(*table(heads, biases), sep="\n")


def _distances(test_ND: Tensor, train_ND: Tensor, count: int, moments: Moments) -> list[float]:
    return [frechet_distance(Moments.of(features_ND[:count]), moments) for features_ND in (test_ND, train_ND)]


if __name__ == "__main__":
    main()
