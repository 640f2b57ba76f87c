"""Micro-batches read ahead by threads: what they are made of, and the order they come in."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Full, Queue
from threading import Event, Thread, current_thread
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from madformer.data.digits import load_digits
from madformer.data.image_files import load_square
from madformer.data.latents import ShardReader
from madformer.data.order import BatchIndex
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer
from madformer.data.sources import ImageSource, Row
from madformer.errors import BadImage, DataError, InputError
from madformer.randomness import keyed_generator

SECONDS_TO_END = 10
"""How long the end of the program waits for a thread that is stuck, in a file system for instance."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`map(prepare, items)`, in order, with at most `ahead` results waiting; without workers it is just that.

    One thread goes through the items and `workers` threads prepare them. An error shows at the place of the item that met it.
    """
    if workers == 0:
        yield from map(prepare, items)
        return
    crew = _Crew(prepare, items, workers, ahead)
    try:
        while (result := crew.results.get()) is not None:
            yield result.result()
    finally:
        crew.dismiss()


class _Crew(Generic[Item, Result]):
    """Threads that can be sent home at any time: an endless stream has no end of its own."""

    def __init__(self, prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> None:
        self.results: Queue[Future[Result] | None] = Queue(ahead)
        """In the order of the items; None: there are no more."""
        self.abandoned = Event()
        """Set when nobody wants the rest."""
        self._tasks: Queue[tuple[Future[Result], Item] | None] = Queue()
        self._threads = [Thread(target=self._read, args=(items, workers), daemon=True)]
        self._threads += [Thread(target=self._prepare, args=(prepare,), daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        # A thread that is inside of torch or Pillow when the interpreter ends would abort the program.
        atexit.register(self.dismiss)

    def dismiss(self) -> None:
        """Nobody wants the rest: wait until what has begun has ended."""
        atexit.unregister(self.dismiss)
        self.abandoned.set()
        for thread in self._threads:
            if thread is not current_thread():
                thread.join(timeout=SECONDS_TO_END)

    def _read(self, items: Iterable[Item], workers: int) -> None:
        try:
            for item in items:
                result: Future[Result] = Future()
                if not self._put(result):
                    break
                self._tasks.put((result, item))
            self._put(None)
        except BaseException as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            self._put(failed)
        finally:
            for _ in range(workers):
                self._tasks.put(None)

    def _prepare(self, prepare: Callable[[Item], Result]) -> None:
        while (task := self._tasks.get()) is not None:
            result, item = task
            if self.abandoned.is_set():
                continue
            try:
                result.set_result(prepare(item))
            except BaseException as error:
                result.set_exception(error)

    def _put(self, result: Future[Result] | None) -> bool:
        """Wait for a place among the results; whether somebody wants it."""
        while not self.abandoned.is_set():
            try:
                self.results.put(result, timeout=0.1)
                return True
            except Full:
                continue
        return False


@dataclass(frozen=True)
class Picture:
    """A row of a source after decoding."""

    row: Row
    pixels_CYX: Tensor | None
    """Bytes [3, size, size]; None: the image is broken."""
    flaw: str = ""
    """What is wrong with it."""


def read_pictures(rows: Iterable[Row], size: int, workers: int, ahead: int) -> Iterator[Picture]:
    """Decode rows in their order, with `workers` threads and at most `ahead` pictures waiting.

    Raises:
        InputError: an image is there, but cannot be read now.
    """
    return prefetch(partial(_decode, size=size), rows, workers, ahead)


def require_few(source: str | None, skipped: list[tuple[str, str]], most: int) -> None:
    """Refuse more than `data.max_skipped` broken images, given as (key, flaw).

    Raises:
        DataError: with the first three.
    """
    if len(skipped) > most:
        first = "; ".join(f"{key}: {flaw}" for key, flaw in skipped[:3])
        limit = f"more than data.max_skipped = {most} broken images"
        raise DataError(f"{source}: {limit}: {first}; ... Mend them or raise the limit; what is done is kept")


def _decode(row: Row, size: int) -> Picture:
    try:
        return Picture(row, load_square(row.read(), size))
    except BadImage as error:
        return Picture(row, None, str(error))


Batch = dict[str, Any]


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
class Collator:
    """What every micro-batch gets: its keys, its mirrored samples, its tokens."""

    seed: int
    flip: bool
    tokenizer: PromptTokenizer | None

    def flipped(self, places: BatchIndex) -> np.ndarray:
        """Which samples are mirrored: a function of seed and place."""
        if not self.flip:
            return np.zeros(len(places.indices), dtype=bool)
        generators = (keyed_generator(self.seed, "flip", places.step, index) for index in places.indices)
        return np.array([bool(torch.rand(1, generator=generator) < 0.5) for generator in generators])

    def read(self, samples: Samples, places: BatchIndex) -> Batch:
        """The micro-batch at its places."""
        batch, captions = samples.read(places.samples, self.flipped(places))
        return self.finish(batch, captions, places)

    def finish(self, batch: Batch, captions: Sequence[str], places: BatchIndex) -> Batch:
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
