"""Training data as a LightningDataModule: shards of latents, images encoded on the device, or digits.

With `data.streaming` images are read in order, and are neither copied nor encoded before. The stream of an epoch goes through
the source's units in an order drawn from (seed, epoch), and shuffles windows of `WINDOW` rows, each by a draw of its own. So it
depends only on seed and position, and a resumed run sees exactly the samples of an uninterrupted one. The cost: every device
reads the whole stream, and a resumed run reads its epoch's stream up to its position, without decoding.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from madformer.config import ExperimentConfig
from madformer.config.data import DIGITS
from madformer.data.codec import Codec, build_codec, require_fit
from madformer.data.image_files import to_unit
from madformer.data.latents import Manifest, ShardReader, read_manifest
from madformer.data.loader import (
    Batch,
    Captions,
    Collator,
    DigitSamples,
    ImageReader,
    ImageSamples,
    Item,
    MicroBatches,
    Samples,
    ShardSamples,
    batched,
    require_few,
)
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer, class_prompts
from madformer.data.source_files import list_classes
from madformer.data.sources import ImageSource, Row, digits_sha256, open_source
from madformer.errors import ConfigError, InputError
from madformer.randomness import BatchIndex, BatchSampler, BatchShard, SampleOrder, keyed_generator
from madformer.runs.checkpoints import CLASS_PROMPTS
from madformer.runs.files import append_line


class LatentDataModule(pl.LightningDataModule):
    """Endless batches of latents: from shards, from images encoded on the training device, or from digits.

    To resume, it needs only the step. Each batch has `"keys"`, [B, 2] int64 (step, index in the global batch), and for a model
    with text `"text"`, [B, T] int64. The threads that read it call `draw(batch)` of the trainer's module, which replaces the
    keys by noise (`LitMADFormer.draw`). On the device the batch has `"latents"`, [B, C, h, w] float32. Gradient accumulation is
    set on the Trainer so that every optimiser step sees `data.batch_size` images, on any number of devices.

    The codec belongs to this module and not to the model, so it is neither in checkpoints nor in the moving average.

    Raises:
        ConfigError: the experiment names no data, or its data does not exist or does not fit the model.
        InputError: latents that contradict the experiment.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        data = config.data
        self.config = config
        self.codec: Codec | None = None
        self.class_prompts: tuple[str, ...] | None = None
        """Prompts of the classes, by label; None: no classes."""
        self._summary = ""
        self._skipped_file = config.run_dir / "skipped.txt"
        """Broken images of the source so far, including those from before a restart."""
        self._epoch_size: int | None = None
        self._fingerprint: dict[str, str] = {}
        self._samples: Samples | None = None
        if data.source == DIGITS:
            self.class_prompts = class_prompts(None, DIGIT_NAMES, data.prompts)
            self._samples = DigitSamples(data.split, self.class_prompts or ())
            self._summary = f"{DIGITS}: {len(self._samples):,} images, {list_classes(DIGIT_NAMES, True)}"
            self._fingerprint["source"] = digits_sha256(data.split)
        elif data.latents is not None:
            self._samples = self._open_shards(Path(data.latents))
        elif data.source is not None:
            self._open_images(data.source)
        else:
            raise ConfigError(
                "data.source = null: nothing to train on; name images, or latents of them (data.latents), or digits"
            )
        if self.codec is None and (self._encodes or config.evaluation.preview_every):
            self.codec = build_codec(data.codec, data.codec_dtype)
        if self.codec is not None:
            require_fit(self.codec, config.model)
            self._image_size = config.model.latent_size * self.codec.downsampling
        if self._encodes and self.codec is not None:
            self._fingerprint["codec"] = self.codec.sha256
        if config.model.text and self.class_prompts is not None and data.source != DIGITS:
            self._fingerprint["class names"] = hashlib.sha256("\n".join(self.class_prompts).encode()).hexdigest()
        self.tokenizer = PromptTokenizer.of(data, config.model.text) if config.model.text else None
        if self.tokenizer and self.class_prompts:
            self.tokenizer.warn_if_equal(self.class_prompts)
        self._collator = Collator(config.seed, data.flip, self.tokenizer)

    def setup(self, stage: str) -> None:
        """Share the batch among the devices.

        Raises:
            ConfigError: the devices cannot share the batch equally.
        """
        if self.trainer is None:
            return
        data = self.config.data
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self._shard = BatchShard.of(data.batch_size, data.batch_size_per_device, rank, world_size)
        self.trainer.accumulate_grad_batches = self._shard.accumulation

    def train_dataloader(self) -> MicroBatches[Any]:
        """Batches from the trainer's step on. Lightning calls this after it has restored a checkpoint."""
        assert self.trainer is not None
        data, step = self.config.data, self.trainer.global_step
        pin_memory = self.trainer.strategy.root_device.type == "cuda"
        samples = self._samples
        if samples is None:
            reader = ImageReader(data, self._image_size, self._captions)
            if data.streaming:
                stream = ImageStream(self._source, reader, self._collator, self._shard, step, self._epoch_size)
                return MicroBatches(stream, self._and_draw(stream.read), data.workers, pin_memory)
            samples = ImageSamples(self._source, reader)
        sampler = BatchSampler(SampleOrder(len(samples), data.batch_size, self.config.seed), self._shard, step)
        workers = 0 if data.source == DIGITS else data.workers
        return MicroBatches(sampler, self._and_draw(partial(self._collator.read, samples)), workers, pin_memory)

    def _and_draw(self, read: Callable[[Item], Batch]) -> Callable[[Item], Batch]:
        assert self.trainer is not None
        draw = getattr(self.trainer.lightning_module, "draw", None)
        return read if draw is None else lambda item: draw(read(item))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn images or moments into latents on the training device, and record skipped images.

        Raises:
            InputError: more than `data.max_skipped` images are broken.
        """
        self._epoch_size = batch.pop("epoch_size", self._epoch_size)
        self._note(batch.pop("skipped", []))
        if "images" in batch:
            mean_BChw, deviation_BChw = self._encode(batch.pop("images"))
            batch["latents"] = mean_BChw + deviation_BChw * batch["posterior_noise"]
        elif "mean" in batch:
            batch["latents"] = batch.pop("mean").float()
            if "deviation" in batch:
                batch["latents"] += batch.pop("deviation").float() * batch["posterior_noise"]
        batch.pop("posterior_noise", None)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The data's fingerprint, the size of a stream's epoch, and the prompts of classes, for sampling."""
        names = list(self.class_prompts) if self.class_prompts is not None else None
        return {"fingerprint": self._fingerprint, "epoch_size": self._epoch_size, CLASS_PROMPTS: names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the same data.

        Raises:
            InputError: the checkpoint was trained on other data.
        """
        for part, expected in state_dict["fingerprint"].items():
            found = self._fingerprint.get(part)
            if found != expected:
                change = f"the {part} that this run was trained on (SHA-256 {expected[:12]}) is not the one that is there now"
                remedy = "bring it back, or start a run of another name"
                raise InputError(f"{self.config.run_dir}: {change} ({str(found)[:12]}); {remedy}")
        self._epoch_size = state_dict["epoch_size"]

    @property
    def source_sha256(self) -> str:
        """Fingerprint of the images; for latents, of the images that they were encoded from."""
        return self._fingerprint["source"]

    @property
    def _encodes(self) -> bool:
        return self._samples is None

    def _encode(self, images_BCYX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.codec is not None
        self.codec.to(images_BCYX.device)
        parts = [self.codec.encode(to_unit(part)) for part in images_BCYX.split(self.config.data.codec_batch_size)]
        means, deviations = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(deviations)

    @property
    def summary(self) -> str:
        """A line with the numbers of images and classes, and of images that are left out or were found broken so far."""
        return self._summary or self._source.summarise(broken=len(self._broken()))

    def _note(self, skipped: list[tuple[str, str]]) -> None:
        """Add broken images to the run's file, each once."""
        if not skipped:
            return
        lines = self._broken()
        self._skipped_file.parent.mkdir(parents=True, exist_ok=True)
        for key, flaw in skipped:
            if (line := f"{key}\t{flaw}") not in lines:
                append_line(self._skipped_file, line)
                lines.append(line)
        require_few(self.config.data, [(key, flaw) for key, _, flaw in (line.partition("\t") for line in lines)])

    def _broken(self) -> list[str]:
        file = self._skipped_file
        return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []

    def _open_images(self, name: str) -> None:
        self._source = open_source(self.config.data)
        source = self._source
        self._set_captions(source.has_labels, source.class_names, source.has_texts, name)
        if self._captions.class_prompts is not None:
            self._captions(source.last_label, None)  # refuses a class without a name; a stream refuses it when it comes
        self._fingerprint["source"] = self._source.fingerprint

    def _open_shards(self, folder: Path) -> ShardSamples:
        manifest = read_manifest(folder)
        self._require_same_encoding(folder, manifest)
        encoding = manifest.encoding
        self._set_captions(encoding.labels, encoding.class_names, encoding.texts, str(folder))
        skipped = f"; left out: {manifest.skipped:,} broken" if manifest.skipped else ""
        classes = list_classes(encoding.class_names, encoding.labels)
        self._summary = f"{folder}: {manifest.rows:,} images of {encoding.source}, {classes}{skipped}"
        self._fingerprint |= {"latents": manifest.sha256, "source": encoding.source_sha256}
        reader = ShardReader(folder, manifest)
        if encoding.labels and self._captions.class_prompts is not None:
            self._captions(int(reader.labels.max()), None)  # refuses a class without a name
        return ShardSamples(reader, self._captions)

    def _set_captions(self, has_labels: bool, names: Sequence[str] | None, has_texts: bool, source: str) -> None:
        data = self.config.data
        self.class_prompts = class_prompts(data.class_names, names, data.prompts) if has_labels else None
        self._captions = Captions.of(self.config, self.class_prompts, has_texts, source)

    def _require_same_encoding(self, folder: Path, manifest: Manifest) -> None:
        """Refuse latents that were not made for this experiment.

        Raises:
            InputError: the latents contradict the experiment. The message has the first field, with both values.
        """
        encoding, data, model = manifest.encoding, self.config.data, self.config.model
        pairs: list[tuple[str, object, object]] = [
            ("data.crop", encoding.crop, data.crop),
            ("data.codec_dtype", encoding.codec_dtype, data.codec_dtype),
            ("model.latent_channels", encoding.latent_channels, model.latent_channels),
            ("model.latent_size", encoding.latent_size, model.latent_size),
            ("data.split", encoding.split, data.split),
            ("data.subset", encoding.subset, data.subset),
        ]
        if not self._same_images(manifest):
            pairs.insert(0, ("data.source", encoding.source, data.source))
        for column in ("image_column", "label_column", "text_column"):
            if getattr(data, column) is not None:
                pairs.append((f"data.{column}", getattr(encoding, column), getattr(data, column)))
        if not self._same_codec(manifest):
            same_name = f" of other weights (SHA-256 {encoding.codec_sha256[:12]})" if encoding.codec == data.codec else ""
            pairs.insert(0, ("data.codec", encoding.codec + same_name, data.codec))
        for field, theirs, ours in pairs:
            if theirs != ours:
                problem = f"made with {field} = {theirs}, the experiment has {ours}"
                raise InputError(f"{folder}: {problem}: set {field}={theirs}, or encode into another folder (data.latents)")
        if data.flip and not encoding.flip:
            raise InputError(f"{folder}: made without mirrored images: set data.flip=false, or encode into another folder")

    def _same_images(self, manifest: Manifest) -> bool:
        """Whether the latents were encoded from the experiment's images, which may have moved since."""
        encoding, data = manifest.encoding, self.config.data
        if data.source in (None, encoding.source):
            return True
        try:
            return (
                open_source(replace(data, split=encoding.split, subset=encoding.subset)).fingerprint == encoding.source_sha256
            )
        except ConfigError:
            return False

    def _same_codec(self, manifest: Manifest) -> bool:
        """Whether the experiment's codec made the latents. A codec of another name may be the same, in another place.

        A codec of the same name is loaded and compared only if previews need it.
        """
        if manifest.encoding.codec == self.config.data.codec and not self.config.evaluation.preview_every:
            return True
        try:
            self.codec = build_codec(self.config.data.codec, self.config.data.codec_dtype)
        except ConfigError:
            if manifest.encoding.codec == self.config.data.codec:
                raise
            return False
        return self.codec.sha256 == manifest.encoding.codec_sha256


# ---- streamed images


WINDOW = 512
"""Number of undecoded rows that are in memory and shuffled together."""


@dataclass(frozen=True)
class RawBatch:
    """A micro-batch before it is decoded."""

    batch_index: BatchIndex
    rows: list[tuple[list[Row], int]]
    """For each image its window of rows, and its number in the window."""
    epoch_size: int | None
    """Rows of an epoch; None: no epoch has ended yet. With it a resumed run need not read earlier epochs again."""


class ImageStream:
    """Endless micro-batches of one device, from step `first_step` on. Iterate, and `read` each micro-batch."""

    def __init__(
        self,
        source: ImageSource,
        reader: ImageReader,
        collator: Collator,
        shard: BatchShard,
        first_step: int,
        epoch_size: int | None,
    ) -> None:
        self.source, self.reader, self.collator = source, reader, collator
        self.shard, self.first_step, self.epoch_size = shard, first_step, epoch_size

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield micro-batches before they are decoded."""
        batch_size = self.reader.data.batch_size
        start = self.first_step * batch_size
        epoch, offset = divmod(start, self.epoch_size) if self.epoch_size else (0, start)
        stream = self._stream(epoch, offset)
        for step in itertools.count(self.first_step):
            rows = list(itertools.islice(stream, batch_size))
            for part in range(self.shard.accumulation):
                batch_index = BatchIndex(step, self.shard.indices(part), np.arange(0))
                yield RawBatch(batch_index, [rows[index] for index in batch_index.indices], self.epoch_size)

    def read(self, raw: RawBatch) -> Batch:
        """Decode a micro-batch. The next good image of the same window replaces a broken one."""
        candidates = (itertools.chain(window[number:], window[:number]) for window, number in raw.rows)
        batch, captions = self.reader.read(candidates, self.collator.draw_flips(raw.batch_index))
        if raw.epoch_size:
            batch["epoch_size"] = raw.epoch_size
        return self.collator.finish(batch, captions, raw.batch_index)

    def _stream(self, epoch: int, offset: int) -> Iterator[tuple[list[Row], int]]:
        """Yield pairs (window, number of a row in it) without end, from row `offset` of `epoch` on."""
        while True:
            rows = self._rows(epoch)
            count = sum(1 for _ in itertools.islice(rows, offset // WINDOW * WINDOW))
            for window in batched(rows, WINDOW):
                generator = keyed_generator(self.collator.seed, "window", epoch, count // WINDOW)
                permutation = torch.randperm(len(window), generator=generator).tolist()
                shuffled = [window[number] for number in permutation]
                yield from ((shuffled, number) for number in range(max(0, offset - count), len(window)))
                count += len(window)
            if not count:
                raise InputError("data.source: the stream has no rows")
            self.epoch_size = count
            # A run may resume at an offset beyond the epoch's end, if the epoch's size was not known.
            epoch, offset = (epoch + offset // count, offset % count) if offset > count else (epoch + 1, 0)

    def _rows(self, epoch: int) -> Iterator[Row]:
        generator = keyed_generator(self.collator.seed, "units", epoch)
        units = torch.randperm(self.source.num_units, generator=generator).tolist()
        return itertools.chain.from_iterable(self.source.rows(unit) for unit in units)
