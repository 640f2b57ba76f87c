"""Train the classifier whose features make the metric `fd_cifar10`, and write the weights that the package ships.

It trains on the 50,000 training images of CIFAR-10, and measures accuracy on the 10,000 test images. The same machine and
number of threads give the same file bit for bit. Another processor or another version of torch may round differently. This is
why the weights are shipped and records contain their hash.

    python scripts/train_cifar10_features.py [--train SOURCE] [--test SOURCE] [--device cuda] [--threads N] [--out FILE]

A source is the data set on the hub, or a Parquet file of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from madformer.config import DataConfig
from madformer.data.image_files import load_square, to_unit
from madformer.data.sources import open_source
from madformer.evaluation.feature_networks import shipped
from madformer.runs.files import atomic_write

HUB = "uoft-cs/cifar10"
SIZE, SMALL = shipped.CIFAR10Features.size, 16
SEED, EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 0, 10, 128, 4e-3, 0.05, 0.1
SHIFT = 2
"""Pixels by which an image is shifted at most along each axis."""
SHARE_SMALL = 0.25
"""Share of batches that are reduced to 16 x 16 pixels and enlarged again, as models of that size are measured too."""


def read(source: str, split: str) -> tuple[Tensor, Tensor]:
    """All images and labels: uint8 [N, 3, 32, 32] and int64 [N]."""
    images, labels = [], []
    rows = open_source(DataConfig(source=source, split=split))
    for number in range(rows.num_rows or 0):
        row = rows.row(number)
        images.append(load_square(row.read(), SIZE))
        labels.append(row.label)
    return torch.stack(images), torch.tensor(labels)


def augment(images_BCYX: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, shift all by up to two pixels, and reduce a quarter of the batches to half of their size.

    There is no further augmentation: features that are invariant to sharpness, colour or noise could not measure these.
    """
    count = len(images_BCYX)
    mirrored_B = torch.rand(count, generator=generator).to(images_BCYX.device) < 0.5
    images_BCYX = torch.where(mirrored_B[:, None, None, None], images_BCYX.flip(3), images_BCYX)
    padded_BCYX = F.pad(images_BCYX, (SHIFT,) * 4, mode="reflect")
    tiles = padded_BCYX.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # [B, 3, 5, 5, 32, 32], one for each shift
    row_B, column_B = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
    images_BCYX = tiles[torch.arange(count), :, row_B, column_B]
    return at_size(images_BCYX, SMALL) if torch.rand((), generator=generator) < SHARE_SMALL else images_BCYX


def at_size(images_BCYX: Tensor, size: int) -> Tensor:
    """Images reduced to a smaller size and enlarged again."""
    return shipped.resize(shipped.resize(images_BCYX, size), SIZE)


def train(images: Tensor, labels: Tensor, device: torch.device) -> nn.Sequential:
    """A classifier trained on these images."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classifier = shipped.cifar10_classifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    begun = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: steps // EPOCHS * BATCH_SIZE]
        for batch in order.split(BATCH_SIZE):
            pixels_BCYX = augment(to_unit(images[batch].to(device)), generator)
            logits_BK = classifier(pixels_BCYX.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits_BK, labels[batch].to(device), label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {total * EPOCHS / steps:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, size: int, device: torch.device) -> float:
    """Share of images that are classified correctly after `at_size`."""
    hits = 0
    for pixels, label in zip(images.split(500), labels.split(500), strict=True):
        hits += int((classifier(at_size(to_unit(pixels.to(device)), size)).argmax(1).cpu() == label).sum())
    return hits / len(images)


def main() -> None:
    """Train, report accuracy, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shipped_file = Path(shipped.__file__).with_name("cifar10_features.safetensors")
    parser.add_argument("--train", default=HUB, help="training images; default: %(default)s")
    parser.add_argument("--test", default=HUB, help="test images; default: %(default)s")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: 1")
    parser.add_argument("--out", type=Path, default=shipped_file, help="default: the file in the package")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)

    test = read(options.test, "test")
    classifier = train(*read(options.train, "train"), options.device)
    for size in (SIZE, SMALL):
        score = accuracy(classifier, *test, size, options.device)
        print(f"accuracy on {len(test[0]):,} test images at {size} x {size} pixels: {score:.1%}")
    weights = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items() if value.is_floating_point()}
    with atomic_write(options.out) as temporary:
        temporary.write_bytes(save(weights))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
