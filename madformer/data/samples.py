"""What a micro-batch is read from: digits, shards of latents, or images that are encoded later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from madformer.config import DataError, InputError
from madformer.data.digits import load_digits
from madformer.data.images import BadImage, load_square
from madformer.data.order import Places
from madformer.data.prefetch import prefetch
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer
from madformer.data.shards import ShardReader
from madformer.data.sources import ImageSource, Row
from madformer.randomness import keyed_generator

Batch = dict[str, Any]
Item = TypeVar("Item")


class Samples(Protocol):
    """A data set that can be read anywhere."""

    def __len__(self) -> int:
        """How many samples there are."""

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """The samples of those numbers and their captions.

        Args:
            samples: [B] numbers.
            flipped_B: which ones are to be mirrored.

        Returns:
            `latents`, or `mean` (and `deviation`), or `images` [B, 3, Y, X] uint8; and a caption for each, perhaps empty.
        """


@dataclass(frozen=True)
class Captions:
    """What is said of an image: its own text, or the prompt of its class."""

    class_prompts: tuple[str, ...] | None
    use_text: bool = False

    def __call__(self, label: int | None, text: str | None) -> str:
        """The caption; empty if there is none."""
        if self.use_text:
            return text or ""
        if self.class_prompts is None or label is None:
            return ""
        if label >= len(self.class_prompts):
            raise InputError(f"data.class_names: {len(self.class_prompts)} names, but there is an image of class {label}")
        return self.class_prompts[label]


class DigitSamples:
    """scikit-learn's digits, in memory, as they are."""

    def __init__(self, split: str) -> None:
        self._images_NCYX, self._labels_N = load_digits(split)

    def __len__(self) -> int:
        return len(self._images_NCYX)

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Digits, never mirrored."""
        numbers = torch.from_numpy(samples)
        return {"latents": self._images_NCYX[numbers]}, [DIGIT_NAMES[label] for label in self._labels_N[numbers].tolist()]


class ShardSamples:
    """Latents on the disk: posterior means and deviations in float16."""

    def __init__(self, reader: ShardReader, captions: Captions) -> None:
        self.reader, self.captions = reader, captions

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Moments of the posterior, of the mirrored image where asked for."""
        encoding = self.reader.manifest.encoding
        batch = {}
        for column in ("mean", "deviation") if encoding.stochastic else ("mean",):
            array = self.reader.read(column, samples)
            if flipped_B.any():
                array[flipped_B] = self.reader.read(f"{column}_flipped", samples[flipped_B])
            batch[column] = torch.from_numpy(array)
        if self.captions.use_text:
            return batch, [self.captions(None, text) for text in self.reader.values("text", samples)]
        if self.captions.class_prompts is not None:
            labels = self.reader.labels[samples].tolist()
            return batch, [self.captions(label if label >= 0 else None, None) for label in labels]
        return batch, [""] * len(samples)


class ImageSamples:
    """Images of a source that can be read anywhere; a broken one is replaced by the next good one, and named."""

    def __init__(self, source: ImageSource, captions: Captions, image_size: int, max_skipped: int) -> None:
        self.source, self.captions, self.image_size, self.max_skipped = source, captions, image_size, max_skipped

    def __len__(self) -> int:
        assert self.source.num_rows is not None
        return self.source.num_rows

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Images as bytes, and under `skipped` the keys and flaws of broken ones."""
        found = [first_good(self._rows_from(int(sample)), self.image_size, self.max_skipped) for sample in samples]
        return collate(found, flipped_B, self.captions)

    def _rows_from(self, sample: int) -> Iterator[Row]:
        return (self.source.row((sample + offset) % len(self)) for offset in range(len(self)))


@dataclass(frozen=True)
class ReadImage:
    """A row with its image, and the broken ones before it."""

    row: Row
    pixels_CYX: Tensor
    skipped: tuple[tuple[str, str], ...]


def first_good(rows: Iterator[Row], image_size: int, max_skipped: int) -> ReadImage:
    """The first row whose image can be read.

    Raises:
        DataError: there is none, or none among the first `max_skipped` and one.
    """
    skipped: list[tuple[str, str]] = []
    for row in rows:
        try:
            return ReadImage(row, load_square(row.read(), image_size), tuple(skipped))
        except BadImage as error:
            skipped.append((row.key, str(error)))
            if len(skipped) > max_skipped:
                break
    first = "; ".join(f"{key}: {flaw}" for key, flaw in skipped[:3])
    raise DataError(
        f"data.source: {len(skipped)} broken images, one after the other (data.max_skipped = {max_skipped}): {first}"
    )


def collate(images: Sequence[ReadImage], flipped_B: np.ndarray, captions: Captions) -> tuple[Batch, list[str]]:
    """Images of a micro-batch together, mirrored where asked for."""
    pixels = [
        image.pixels_CYX.flip(-1) if flipped else image.pixels_CYX for image, flipped in zip(images, flipped_B, strict=True)
    ]
    batch: Batch = {"images": torch.stack(pixels)}
    if skipped := [flaw for image in images for flaw in image.skipped]:
        batch["skipped"] = skipped
    return batch, [captions(image.row.label, image.row.text) for image in images]


@dataclass(frozen=True)
class Finishing:
    """What every micro-batch gets: its keys, its mirrored samples, its tokens."""

    seed: int
    flip: bool
    tokenizer: PromptTokenizer | None

    def flipped(self, places: Places) -> np.ndarray:
        """Which samples are mirrored: a function of seed and place."""
        if not self.flip:
            return np.zeros(len(places.indices), dtype=bool)
        generators = (keyed_generator(self.seed, "flip", places.step, index) for index in places.indices)
        return np.array([bool(torch.rand(1, generator=generator) < 0.5) for generator in generators])

    def read(self, samples: Samples, places: Places) -> Batch:
        """The micro-batch at its places."""
        batch, captions = samples.read(places.samples, self.flipped(places))
        return self.finish(batch, captions, places)

    def finish(self, batch: Batch, captions: Sequence[str], places: Places) -> Batch:
        """Add `keys` [B, 2] (step, place in the global batch) and, for a model with text, `text` [B, T]."""
        indices = torch.tensor(list(places.indices))
        batch["keys"] = torch.stack([torch.full_like(indices, places.step), indices], dim=1)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        return batch


class MicroBatches(Generic[Item]):
    """Endless micro-batches of one device, from step `first_step` on, each read as a whole.

    Args:
        workers: threads that read ahead; no batch depends on their number.
        pinned: whether batches lie in memory from which they go to a GPU fast.
    """

    def __init__(self, places: Iterable[Item], read: Callable[[Item], Batch], workers: int, pinned: bool) -> None:
        self.places, self.read, self.workers, self.pinned = places, read, workers, pinned

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches in order."""
        return prefetch(self._prepare, self.places, self.workers, ahead=2 * self.workers)

    def _prepare(self, place: Item) -> Batch:
        batch = self.read(place)
        if not self.pinned:
            return batch
        return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
