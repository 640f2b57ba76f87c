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
"""How long the end of the program waits for a thread that is stuck, in a file system for instance."""

Item = TypeVar("Item")
Result = TypeVar("Result")

Batch = dict[str, Any]


class MicroBatches(Generic[Item]):
    """Endless micro-batches of one device, each read as a whole.

    Args:
        items: what the micro-batches are read from, in order.
        read: makes a micro-batch of an item.
        workers: threads that read ahead; no batch depends on their number.
        pin_memory: whether batches lie in memory from which they go to a GPU fast.
    """

    def __init__(self, items: Iterable[Item], read: Callable[[Item], Batch], workers: int, pin_memory: bool) -> None:
        self.items, self.read, self.workers, self.pin_memory = items, read, workers, pin_memory

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches in order."""
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
        """Captions for the experiment's model; a list of class names that the experiment names goes before texts.

        Args:
            config: the experiment.
            class_prompts: prompts of the source's classes, by label; None: it has no classes, or they have no names.
            has_texts: whether its images have texts.
            source: its name.

        Raises:
            ConfigError: the model reads text, and there is none.
        """
        if config.model.text is None:
            return Captions(None)
        use_text = has_texts and config.data.class_names is None and config.data.prompts == "names"
        if not use_text and class_prompts is None:
            remedy = "set data.class_names, data.text_column or data.label_column, or take images that have some"
            raise ConfigError(f"{source}: neither texts nor named classes for a model with text: {remedy}")
        return Captions(class_prompts, use_text)

    def __call__(self, label: int | None, text: str | None) -> str:
        """The caption; empty if there is none."""
        if self.use_text:
            return text or ""
        if self.class_prompts is None or label is None:
            return ""
        if label >= len(self.class_prompts):
            raise InputError(f"data.class_names: {len(self.class_prompts)} names, but there is an image of class {label}")
        return self.class_prompts[label]


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


class DigitSamples:
    """scikit-learn's digits, in memory, as they are."""

    def __init__(self, split: str, class_prompts: Sequence[str]) -> None:
        self._images_NCYX, self._labels_N = load_digits(split)
        self._prompts = class_prompts

    def __len__(self) -> int:
        return len(self._images_NCYX)

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Digits, never mirrored."""
        numbers = torch.from_numpy(samples)
        return {"latents": self._images_NCYX[numbers]}, [self._prompts[label] for label in self._labels_N[numbers].tolist()]


class ShardSamples:
    """Latents on the disk: posterior means and deviations in float16."""

    def __init__(self, reader: ShardReader, captions: Captions) -> None:
        self.reader, self.captions = reader, captions

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Moments of the posterior; of the mirrored image for `flipped_B`."""
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
    """Reads images of a source for training; a broken one is replaced by the next good one, and named."""

    data: DataConfig
    image_size: int
    captions: Captions

    def read(self, candidates: Iterable[Iterable[Row]], flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """`images` [B, 3, Y, X] uint8, under `skipped` the keys and flaws of broken ones, if any; and the captions.

        Args:
            candidates: for each image the rows that it may be, best first.
            flipped_B: which images are to be mirrored.

        Raises:
            DataError: none of the candidates can be read, or none of the first `data.max_skipped` and one.
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
    """Images of a source that can be read anywhere."""

    def __init__(self, source: ImageSource, reader: ImageReader) -> None:
        self.source, self.reader = source, reader

    def __len__(self) -> int:
        assert self.source.num_rows is not None
        return self.source.num_rows

    def read(self, samples: np.ndarray, flipped_B: np.ndarray) -> tuple[Batch, list[str]]:
        """Images from `ImageReader`. A broken image is replaced by one of the next rows."""
        return self.reader.read((self._rows_from(int(sample)) for sample in samples), flipped_B)

    def _rows_from(self, sample: int) -> Iterator[Row]:
        return (self.source.row((sample + offset) % len(self)) for offset in range(len(self)))


@dataclass(frozen=True)
class Collator:
    """Adds to every micro-batch what depends on its index: keys, mirroring, tokens."""

    seed: int
    flip: bool
    tokenizer: PromptTokenizer | None

    def draw_flips(self, batch_index: BatchIndex) -> np.ndarray:
        """Which samples are mirrored: a function of seed, step and index."""
        if not self.flip:
            return np.zeros(len(batch_index.indices), dtype=bool)
        generators = (keyed_generator(self.seed, "flip", batch_index.step, index) for index in batch_index.indices)
        return np.array([bool(torch.rand(1, generator=generator) < 0.5) for generator in generators])

    def read(self, samples: Samples, batch_index: BatchIndex) -> Batch:
        """Read a micro-batch and finish it."""
        batch, captions = samples.read(batch_index.samples, self.draw_flips(batch_index))
        return self.finish(batch, captions, batch_index)

    def finish(self, batch: Batch, captions: Sequence[str], batch_index: BatchIndex) -> Batch:
        """Add `keys` [B, 2] (step, index in the global batch) and, for a model with text, `text` [B, T]."""
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
    """Bytes [3, size, size]."""


class BrokenImage(NamedTuple):
    """A row of a source whose image cannot be read."""

    key: str
    flaw: str


def decode_rows(
    rows: Iterable[Row], size: int, crop: str, workers: int = 0, queue_size: int = 0
) -> Iterator[DecodedImage | BrokenImage]:
    """Decode rows in their order to squares (`data.crop`), with `workers` threads and at most `queue_size` images waiting.

    Raises:
        InputError: an image is there, but cannot be read now.
    """
    return prefetch(partial(_decode, size=size, crop=crop), rows, workers, queue_size)


def skip_broken(
    images: Iterable[DecodedImage | BrokenImage], data: DataConfig, broken: list[tuple[str, str]]
) -> Iterator[DecodedImage]:
    """The images that can be read; the others are added to `broken`, as (key, flaw).

    Raises:
        DataError: `broken` holds more than `data.max_skipped`.
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
        DataError: with the first three.
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
    """Lists of at most `size` items; itertools.batched is newer than the oldest Python that we run on."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, queue_size: int) -> Iterator[Result]:
    """`map(prepare, items)`, in order, with at most `queue_size` results waiting; without workers it is just that.

    One thread goes through the items and `workers` threads prepare them. An error shows at the place of the item that met it.
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
    """Threads that can be stopped at any time: an endless stream has no end of its own."""

    def __init__(self, prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, queue_size: int) -> None:
        self.results: Queue[Future[Result] | None] = Queue(queue_size)
        """In the order of the items; None: there are no more."""
        self._stop = Event()
        """Set when the rest is not needed."""
        self._tasks: Queue[tuple[Future[Result], Item] | None] = Queue()
        self._threads = [Thread(target=self._read, args=(items, workers), daemon=True)]
        self._threads += [Thread(target=self._prepare, args=(prepare,), daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        # A thread that is inside of torch or Pillow when the interpreter ends would abort the program.
        atexit.register(self.close)

    def close(self) -> None:
        """Stop the threads and wait until what has begun has ended."""
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
        """Wait for a place among the results; whether somebody wants it."""
        while not self._stop.is_set():
            try:
                self.results.put(result, timeout=0.1)
                return True
            except Full:
                continue
        return False
