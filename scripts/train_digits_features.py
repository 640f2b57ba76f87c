"""Train the classifier whose features make the metric `fd_digits`, and write the weights that the package ships.

The reported accuracy is that of a classifier that has not seen a fifth of the digits. The shipped one is trained in the same
way on all digits. On one machine the file is always the same bit for bit. Another processor or version of torch may round
differently. This is why the weights are shipped and records contain their hash.

    python scripts/train_digits_features.py [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from madformer.data.sources import load_digits
from madformer.evaluation.feature_networks import shipped
from madformer.runs.files import atomic_write

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 40, 64, 1e-3, 0.05
HELD_OUT = 360


def augment(images: Tensor, generator: torch.Generator, shifted: float = 0.25, noise: float = 0.05) -> Tensor:
    """Shift some images by up to one pixel along each axis, and add noise. Both improve accuracy.

    Both are small: features that are invariant to position and noise could not measure these in samples.
    """
    count = len(images)
    chosen = torch.rand(count, 1, generator=generator) < shifted
    row, column = torch.where(chosen, torch.randint(3, (count, 2), generator=generator), 1).unbind(1)
    tiles = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, 8, 1).unfold(3, 8, 1)  # [B, 1, 3, 3, 8, 8], one per shift
    images = tiles[torch.arange(count), :, row, column]
    return images + noise * torch.randn(images.shape, generator=generator)


def train(images: Tensor, labels: Tensor, seed: int = 0) -> nn.Sequential:
    """A classifier trained on these images; on one thread, the same one for the same seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = shipped.digits_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: steps // EPOCHS * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(classifier(augment(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is at their label."""
    return float((classifier(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Report held-out accuracy, then train on all digits and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shipped_file = Path(shipped.__file__).with_name("digits_features.safetensors")
    parser.add_argument("--out", type=Path, default=shipped_file, help="default: the file in the package")
    out: Path = parser.parse_args().out

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = load_digits()
    held_out, rest = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(
        [HELD_OUT, len(images) - HELD_OUT]
    )
    score = accuracy(train(images[rest], labels[rest]), images[held_out], labels[held_out])
    print(f"accuracy on {HELD_OUT} held-out digits: {score:.1%}")

    classifier = train(images, labels)
    print(f"accuracy of the shipped weights on all {len(images)}, which they saw: {accuracy(classifier, images, labels):.1%}")
    with atomic_write(out) as temporary:
        temporary.write_bytes(save(classifier.state_dict()))
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
