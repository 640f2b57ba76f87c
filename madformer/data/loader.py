"""Read micro-batches from digits, latents or images: decode in threads, add captions, skip broken images."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from queue import Full, Queue
from threading import Event, Thread, current_thread
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from madformer.config import DataConfig, ExperimentConfig
from madformer.data.image_files import load_square
from madformer.data.latents import ShardReader
from madformer.data.prompts import PromptTokenizer
from madformer.data.sources import ImageSource, Row, load_digits
from madformer.errors import BadImage, ConfigError, DataError, InputError
from madformer.randomness import BatchIndex, keyed_generator

SECONDS_TO_END = 10
"""Longest wait, at the end of the program, for a thread that is stuck, for instance in a file system."""

Item = TypeVar("Item")
Result = TypeVar("Result")

Batch = dict[str, Any]


class MicroBatches(Generic[Item]):
    """Endless micro-batches of one device, each read as a whole.

    Args:
        items: one for each micro-batch, in order.
        read: makes a micro-batch from an item.
        workers: threads that read ahead. Batches do not depend on their number.
        pin_memory: whether to put batches into pinned memory, from which they go to a GPU faster.
    """

    def __init__(self, items: Iterable[Item], read: Callable[[Item], Batch], workers: int, pin_memory: bool) -> None:
        self.items, self.read, self.workers, self.pin_memory = items, read, workers, pin_memory

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches in the order of their items."""
        return prefetch(self._prepare, self.items, self.workers, queue_size=2 * self.workers)

    def _prepare(self, item: Item) -> Batch:
        batch = self.read(item)
        if not self.pin_memory:
            return batch
        return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}


@dataclass(frozen=True)
class Captions:
    """The caption of an image: its own text, or the prompt of its class."""

    class_prompts: tuple[str, ...] | None
    use_text: bool = False

    @staticmethod
    def of(config: ExperimentConfig, class_prompts: tuple[str, ...] | None, has_texts: bool, source: str) -> Captions:
        """Captions for the experiment's model. Class names that the experiment sets are preferred to texts.

        Args:
            config: the experiment.
            class_prompts: prompts of the source's classes, by label; None: it has no classes, or they have no names.
            has_texts: whether the source's images have texts.
            source: the source's name, for messages.

        Raises:
            ConfigError: the model has text, but the source has neither texts nor class names.
        """
        if config.model.text is None:
            return Captions(None)
        use_text = has_texts and config.data.class_names is None and config.data.prompts == "names"
        if not use_text and class_prompts is None:
            remedy = "set data.class_names, data.text_column or data.label_column, or take images that have some"
            raise ConfigError(f"{source}: neither texts nor named classes for a model with text: {remedy}")
        return Captions(class_prompts, use_text)

    def __call__(self, label: int | None, text: str | None) -> str:
        """The caption of an image; empty if it has none."""
        if self.use_text:
            return text or ""
        if self.class_prompts is None or label is None:
            return ""
        if label >= len(self.class_prompts):
            raise InputError(f"data.class_names: {len(self.class_prompts)} names, but there is an image of class {label}")
        return self.class_prompts[label]


class Samples(Protocol):
    """A data set with random access."""

    def __len__(self) -> int:
        """Number of samples in the data set."""

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Read samples and their captions by number.

        Args:
            samples: numbers of the samples, [B].
            flipped_B: whether to mirror each sample.

        Returns:
            `latents`, or `mean` (and `deviation`), or `images` [B, 3, Y, X] uint8; and a caption for each, perhaps empty.
        """


class DigitSamples:
    """scikit-learn's digits, in memory, as 8 x 8 latents."""

    def __init__(self, split: str, class_prompts: Sequence[str]) -> None:
        self._images_NCYX, self._labels_N = load_digits(split)
        self._prompts = class_prompts

    def __len__(self) -> int:
        return len(self._images_NCYX)

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Read digits and their captions. Digits are never mirrored."""
        numbers = torch.from_numpy(samples)
        return {"latents": self._images_NCYX[numbers]}, [self._prompts[label] for label in self._labels_N[numbers].tolist()]


class ShardSamples:
    """Latents on the disk: posterior means and deviations in float16."""

    def __init__(self, reader: ShardReader, captions: Captions) -> None:
        self.reader, self.captions = reader, captions

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Read moments of the posterior, for `flipped_B` those of the mirrored image, and captions."""
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


@dataclass(frozen=True)
class ImageReader:
    """Reads images of a source for training. It replaces a broken image by the next good one, and reports it."""

    data: DataConfig
    image_size: int
    captions: Captions

    def read(self, candidates: Iterable[Iterable[Row]], flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Read images and their captions.

        Args:
            candidates: for each image the rows to try, in order, until one can be read.
            flipped_B: whether to mirror each image.

        Returns:
            `images` [B, 3, Y, X] uint8, and, if images are broken, `skipped` with their keys and flaws; and the captions.

        Raises:
            DataError: no candidate of an image can be read, or more than `data.max_skipped` of them are broken.
        """
        images, skipped = list[DecodedImage](), list[tuple[str, str]]()
        for rows in candidates:
            broken: list[tuple[str, str]] = []
            image = next(skip_broken(decode_rows(rows, self.image_size, self.data.crop), self.data, broken), None)
            if image is None:
                raise DataError(
                    f"{self.data.source}: {len(broken)} images one after the other are broken: {_list_broken(broken)}"
                )
            images.append(image)
            skipped += broken
        pairs = zip(images, flipped_B, strict=True)
        batch: Batch = {
            "images": torch.stack([image.pixels_CYX.flip(-1) if flip else image.pixels_CYX for image, flip in pairs])
        }
        if skipped:
            batch["skipped"] = skipped
        return batch, [self.captions(image.row.label, image.row.text) for image in images]


class ImageSamples:
    """Images of a source with random access."""

    def __init__(self, source: ImageSource, reader: ImageReader) -> None:
        self.source, self.reader = source, reader

    def __len__(self) -> int:
        assert self.source.num_rows is not None
        return self.source.num_rows

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Read images with `ImageReader`. The next good row replaces a broken image."""
        return self.reader.read((self._rows_from(int(sample)) for sample in samples), flipped_B)

    def _rows_from(self, sample: int) -> Iterator[Row]:
        return (self.source.row((sample + offset) % len(self)) for offset in range(len(self)))


@dataclass(frozen=True)
class Collator:
    """Adds keys and tokens to every micro-batch, and draws which images to mirror."""

    seed: int
    flip: bool
    tokenizer: PromptTokenizer | None

    def draw_flips(self, batch_index: BatchIndex) -> np.ndarray:
        """Whether each sample is mirrored, [B] bool. The draw depends on seed, step and index."""
        if not self.flip:
            return np.zeros(len(batch_index.indices), dtype=bool)
        generators = (keyed_generator(self.seed, "flip", batch_index.step, index) for index in batch_index.indices)
        return np.array([bool(torch.rand(1, generator=generator) < 0.5) for generator in generators])

    def read(self, samples: Samples, batch_index: BatchIndex) -> Batch:
        """Read a micro-batch of samples, and `finish` it."""
        batch, captions = samples.read(batch_index.samples, self.draw_flips(batch_index))
        return self.finish(batch, captions, batch_index)

    def finish(self, batch: Batch, captions: Sequence[str], batch_index: BatchIndex) -> Batch:
        """Add `keys` [B, 2] (step, index in the global batch) and, for a model with text, `text` [B, T].

        Args:
            batch: changed in place.
            captions: one for each sample.
            batch_index: the micro-batch's place in training.
        """
        indices = torch.tensor(list(batch_index.indices))
        batch["keys"] = torch.stack([torch.full_like(indices, batch_index.step), indices], dim=1)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        return batch


@dataclass(frozen=True)
class DecodedImage:
    """A row of a source with the pixels of its image."""

    row: Row
    pixels_CYX: Tensor
    """uint8 [3, size, size]."""


class BrokenImage(NamedTuple):
    """A row of a source whose image cannot be read."""

    key: str
    flaw: str


def decode_rows(
    rows: Iterable[Row], size: int, crop: str, workers: int = 0, queue_size: int = 0
) -> Iterator[DecodedImage | BrokenImage]:
    """Decode rows in order to square images.

    Args:
        size: pixels along a side.
        crop: `data.crop`.
        workers: threads that decode ahead; 0: decode in this thread.
        queue_size: most decoded images that wait.

    Raises:
        InputError: an image exists, but cannot be read now.
    """
    return prefetch(partial(_decode, size=size, crop=crop), rows, workers, queue_size)


def skip_broken(
    images: Iterable[DecodedImage | BrokenImage], data: DataConfig, broken: list[tuple[str, str]]
) -> Iterator[DecodedImage]:
    """Yield the images that can be read.

    Args:
        data: has the limit, `data.max_skipped`.
        broken: receives the others, as (key, flaw).

    Raises:
        DataError: `broken` has more images than the limit.
    """
    for image in images:
        if isinstance(image, DecodedImage):
            yield image
        else:
            broken.append(image)
            require_few(data, broken)


def require_few(data: DataConfig, broken: Sequence[tuple[str, str]]) -> None:
    """Refuse more than `data.max_skipped` broken images, given as (key, flaw).

    Raises:
        DataError: there are more. The message names the first three.
    """
    if len(broken) > data.max_skipped:
        limit = f"more than data.max_skipped = {data.max_skipped} broken images"
        raise DataError(f"{data.source}: {limit}: {_list_broken(broken)}. Mend them or raise the limit; what is done is kept")


def _list_broken(broken: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{key}: {flaw}" for key, flaw in broken[:3]) + ("; ..." if len(broken) > 3 else "")


def _decode(row: Row, size: int, crop: str) -> DecodedImage | BrokenImage:
    try:
        return DecodedImage(row, load_square(row.read(), size, crop, row.max_pixels))
    except BadImage as error:
        return BrokenImage(row.key, str(error))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of at most `size` items. itertools.batched needs a newer Python than the oldest supported one."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, queue_size: int) -> Iterator[Result]:
    """`map(prepare, items)` in threads. Results come in order, and an error is raised in the place of its item's result.

    Args:
        items: one thread iterates over them.
        workers: threads that prepare items; 0: it is a plain `map`.
        queue_size: most results that wait.
    """
    if workers == 0:
        yield from map(prepare, items)
        return
    pool = _ThreadPool(prepare, items, workers, queue_size)
    try:
        while (result := pool.results.get()) is not None:
            yield result.result()
    finally:
        pool.close()


class _ThreadPool(Generic[Item, Result]):
    """Threads that can be stopped at any time, as an endless stream does not end by itself."""

    def __init__(self, prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, queue_size: int) -> None:
        self.results: Queue[Future[Result] | None] = Queue(queue_size)
        """Results in the order of the items; None: there are no more."""
        self._stop = Event()
        """Set when no further results are needed."""
        self._tasks: Queue[tuple[Future[Result], Item] | None] = Queue()
        self._threads = [Thread(target=self._read, args=(items, workers), daemon=True)]
        self._threads += [Thread(target=self._prepare, args=(prepare,), daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        # A thread that is inside torch or Pillow when the interpreter ends would abort the program.
        atexit.register(self.close)

    def close(self) -> None:
        """Stop the threads, and wait until they have finished their current items."""
        atexit.unregister(self.close)
        self._stop.set()
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
            failure: Future[Result] = Future()
            failure.set_exception(error)
            self._put(failure)
        finally:
            for _ in range(workers):
                self._tasks.put(None)

    def _prepare(self, prepare: Callable[[Item], Result]) -> None:
        while (task := self._tasks.get()) is not None:
            result, item = task
            if self._stop.is_set():
                continue
            try:
                result.set_result(prepare(item))
            except BaseException as error:
                result.set_exception(error)

    def _put(self, result: Future[Result] | None) -> bool:
        """Put a result into the queue, waiting for a place. Returns False if the threads are stopped."""
        while not self._stop.is_set():
            try:
                self.results.put(result, timeout=0.1)
                return True
            except Full:
                continue
        return False
