"""`madformer encode`: turn images into shards of latents, on all devices. The same command resumes after an interruption."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from madformer.config import DataConfig, ExperimentConfig
from madformer.config.data import DIGITS
from madformer.config.validation import require
from madformer.data.codec import Codec, build_codec, require_fit, save_png, to_grid
from madformer.data.image_files import load_square, to_unit
from madformer.data.latents import (
    ENCODING,
    Encoding,
    Manifest,
    Shard,
    ShardReader,
    ShardWriter,
    complete_units,
    find_shard_flaw,
    read_encoding,
    read_manifest,
    read_shards,
    shard_name,
    summarise,
    write_encoding,
    write_manifest,
    write_shard,
)
from madformer.data.loader import DecodedImage, batched, decode_rows, require_few, skip_broken
from madformer.data.prompts import class_prompts
from madformer.data.sources import ROWS_PER_SHARD, ImageSource, open_source
from madformer.errors import ConfigError, DataError, InputError
from madformer.parallel import Share, cluster_rank, find_devices, own_device, share_out
from madformer.progress import ProgressDisplay
from madformer.runs.files import STALE_SECONDS, claim_folder, file_checksum, remove_stale, write_text

_log = logging.getLogger(__name__)

RECONSTRUCTED = 32
"""Number of images that are decoded at the end, to check the latents."""

SHOWN = 8
"""Number of images in the picture, next to their originals."""


def encode(config: ExperimentConfig) -> None:
    """Fill the folder `data.latents` with the latents of all images of `data.source`.

    Raises:
        ConfigError: no images or no folder are named, or the codec's latents do not fit the model.
        InputError: the folder holds other latents, another process encodes into it, or too many images are broken.
    """
    data = config.data
    if data.latents is None:
        raise ConfigError("data.latents = null: name the folder that latents are written to, such as data.latents=latents/ffhq")
    remedy = "nothing to encode; name a data set, files or a folder of images"
    require(data.source not in (None, DIGITS), "data.source", data.source, remedy)
    folder, devices = Path(data.latents), find_devices(config.trainer)
    source, codec = open_source(data), build_codec(data.codec, data.codec_dtype, own_device(devices))
    encoding = _describe(config, source, codec)
    rank = cluster_rank()
    with claim_folder(folder, "encode", rank or 0):
        encoding = _begin(folder, encoding)
        count = sum(shard.seen for shard in read_shards(folder).values())
        with ProgressDisplay("encoded", "images", source.expected_rows, count, silent=bool(rank)) as display:
            share_out(encode_share, (data, encoding), devices, display, count)
        _finish(folder, encoding, source, codec)


def encode_share(share: Share, data: DataConfig, encoding: Encoding) -> None:
    """Encode every `world_size`-th unit of the source. Shards that are done stay as they are.

    Args:
        encoding: the encoding in the folder.
    """
    source, codec = open_source(data), build_codec(data.codec, data.codec_dtype, share.device)
    encoder, count = _Encoder(data, encoding, source, codec), 0
    for unit in range(share.rank, source.num_units, share.world_size):
        for seen in encoder.encode_unit(unit):
            count += seen
            share.count(count)


class _Encoder:
    def __init__(self, data: DataConfig, encoding: Encoding, source: ImageSource, codec: Codec) -> None:
        self.data, self.encoding, self.source, self.codec = data, encoding, source, codec
        self.folder = Path(data.latents or "")
        self.shards = read_shards(self.folder)

    def encode_unit(self, unit: int) -> Iterator[int]:
        """Write the shards of a unit that are missing or torn. Yields the number of rows read since the last yield."""
        for shard in [shard for shard in self.shards.values() if shard.unit == unit and shard.rows]:
            if flaw := find_shard_flaw(self.folder, shard.name, shard.sha256, shard.xxh3):
                _log.warning("%s: %s: it is made again", self.folder / f"{shard.name}.arrow", flaw)
                del self.shards[shard.name]
            elif not shard.xxh3:  # an older version wrote it
                write_shard(self.folder, replace(shard, xxh3=file_checksum(self.folder / f"{shard.name}.arrow")))
        first_part = next(part for part in itertools.count() if shard_name(unit, part) not in self.shards)
        if first_part and self.shards[shard_name(unit, first_part - 1)].last:
            return
        rows = self.source.rows(unit, skip=first_part * ROWS_PER_SHARD)
        queue_size = 2 * self.data.codec_batch_size + self.data.workers
        images = decode_rows(rows, self.encoding.image_size, self.encoding.crop, self.data.workers, queue_size)
        next_image = next(images, None)
        for part in itertools.count(first_part):
            writer = ShardWriter(self.folder, shard_name(unit, part), self.encoding)
            first = [] if next_image is None else [next_image]
            images_of_shard = itertools.chain(first, itertools.islice(images, ROWS_PER_SHARD - 1))
            seen, skipped = 0, list[tuple[str, str]]()
            for batch in batched(images_of_shard, self.data.codec_batch_size):
                good_images = list(skip_broken(batch, self.data, skipped))
                if len(good_images) < len(batch):  # the limit is for all shards together, also other processes'
                    require_few(self.data, [*skipped, *_skipped(read_shards(self.folder).values())])
                self._add(writer, good_images)
                seen += len(batch)
                yield len(batch)
            next_image = next(images, None) if seen == ROWS_PER_SHARD else None
            writer.finish(seen, next_image is None, skipped)
            if next_image is None:
                return

    def _add(self, writer: ShardWriter, images: Sequence[DecodedImage]) -> None:
        if not images:
            return
        images_BCYX = to_unit(torch.stack([image.pixels_CYX for image in images]).to(self.codec.device))
        moments = dict(zip(("mean", "deviation"), self.codec.encode(images_BCYX), strict=True))
        if self.encoding.flip:
            mirrored = self.codec.encode(images_BCYX.flip(-1))
            moments |= dict(zip(("mean_flipped", "deviation_flipped"), mirrored, strict=True))
        latents = {column: moments[column].half().cpu() for column in self.encoding.arrays}
        if not all(bool(array.isfinite().all()) for array in latents.values()):
            problem = f"gives NaN or infinity in {self.data.codec_dtype}, or more than float16 holds"
            remedy = "set data.codec_dtype=float32 or bfloat16, or correct its scaling factor"
            raise ConfigError(f"data.codec = {self.data.codec!r}: {problem}: {remedy}")
        rows = [{"key": image.row.key, "label": image.row.label, "text": image.row.text} for image in images]
        writer.add(rows, {column: array.numpy() for column, array in latents.items()})


def _describe(config: ExperimentConfig, source: ImageSource, codec: Codec) -> Encoding:
    """The encoding that the experiment needs.

    Raises:
        ConfigError: the codec's latents do not fit the model.
    """
    data, model = config.data, config.model
    assert data.source is not None
    require_fit(codec, model)
    return Encoding(
        source=data.source,
        subset=data.subset,
        split=data.split,
        streaming=data.streaming,
        source_sha256=source.fingerprint,
        codec=data.codec,
        codec_sha256=codec.sha256,
        codec_dtype=data.codec_dtype,
        image_size=model.latent_size * codec.downsampling,
        latent_channels=model.latent_channels,
        latent_size=model.latent_size,
        stochastic=_is_stochastic(codec),
        flip=data.flip,
        image_column=source.columns.image,
        label_column=source.columns.label,
        text_column=source.columns.text,
        class_names=class_prompts(data.class_names, source.class_names) if source.has_labels else None,
        rows_per_shard=ROWS_PER_SHARD,
        crop=data.crop,
    )


def _is_stochastic(codec: Codec) -> bool:
    side = 4 * codec.downsampling
    noise_BCYX = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return bool(codec.encode(noise_BCYX.to(codec.device))[1].any())


def _begin(folder: Path, encoding: Encoding) -> Encoding:
    """Write the encoding, or check that it equals the one already in the folder. The images may have moved since.

    Raises:
        InputError: the folder holds other latents.
    """
    existing = _find_encoding(folder)
    if existing is None:
        write_encoding(folder, encoding)
    elif difference := existing.describe_difference(replace(encoding, source=existing.source)):
        raise InputError(f"{folder}: holds other latents: {difference}; name another folder (data.latents), or delete it")
    if cluster_rank() is None:
        remove_stale(folder)
    return existing or encoding


def _find_encoding(folder: Path) -> Encoding | None:
    """The encoding that a folder was begun with; the manifest has it too, should its own file be torn or lost.

    Raises:
        InputError: it is torn, and so is the manifest, or there is none yet.
    """
    flaw = None
    try:
        if (found := read_encoding(folder)) is not None:
            return found
    except InputError as error:
        flaw = error
    try:
        encoding = read_manifest(folder).encoding
    except InputError:
        if flaw is None:
            return None
        remedy = "delete the folder, or this file alone if you know that all shards are of this experiment"
        raise InputError(f"{folder / ENCODING}: torn, and no manifest says what it held; {remedy}") from flaw
    write_encoding(folder, encoding)
    return encoding


def _finish(folder: Path, encoding: Encoding, source: ImageSource, codec: Codec) -> None:
    """Write the manifest, once all units are complete."""
    shards = list(read_shards(folder).values())
    if complete_units(shards) != set(range(source.num_units)):
        remark = "this process has done its share; the last one writes the manifest (if none does, run the command again)"
        print(f"{folder}: {remark}", flush=True)
        return
    if not any(shard.rows for shard in shards):
        raise DataError(f"{encoding.source}: none of its images can be read")
    remove_stale(folder, "shard-*", STALE_SECONDS)  # another process may make a torn shard again
    skipped = _skipped(shards)
    write_text(folder / "skipped.txt", "".join(f"{key}\t{flaw}\n" for key, flaw in skipped))
    manifest = summarise(encoding, shards, {})
    existing = None
    with contextlib.suppress(InputError):  # it is missing or torn
        existing = read_manifest(folder)
    fresh = manifest.sha256, manifest.skipped, manifest.checksums
    if existing is None or (existing.sha256, existing.skipped, existing.checksums) != fresh:
        write_manifest(folder, replace(manifest, reconstruction=_reconstruct(folder, manifest, source, codec)))
    _report(folder, read_manifest(folder), source)


def _skipped(shards: Iterable[Shard]) -> list[tuple[str, str]]:
    return [image for shard in shards for image in shard.skipped]


def _reconstruct(folder: Path, manifest: Manifest, source: ImageSource, codec: Codec) -> dict[str, float]:
    """Decode the first latents, compare them with their images, and save a picture of some."""
    reader, size, crop = ShardReader(folder, manifest), manifest.encoding.image_size, manifest.encoding.crop
    keys = reader.values("key", np.arange(min(RECONSTRUCTED, len(reader))))
    rows = (row for unit in range(source.num_units) for row in source.rows(unit) if row.key in keys)
    squares = [load_square(row.read(), size, crop, row.max_pixels) for row in itertools.islice(rows, len(keys))]
    originals_BCYX = to_unit(torch.stack(squares))
    latents_BChw = torch.from_numpy(reader.read("mean", np.arange(len(keys)))).float()
    decoded_BCYX = torch.cat([codec.decode(part.to(codec.device)).cpu() for part in latents_BChw.split(SHOWN)])
    pairs_BCYX = torch.stack([originals_BCYX, decoded_BCYX], dim=1)[:SHOWN].flatten(0, 1)
    save_png(to_grid(pairs_BCYX), folder / "reconstruction.png")
    error_B = (decoded_BCYX - originals_BCYX).square().mean(dim=(1, 2, 3))
    psnr = 10 * (4 / error_B).log10().mean()  # of values from -1 to 1
    return {"psnr": round(float(psnr), 3), "images": len(keys)}


def _report(folder: Path, manifest: Manifest, source: ImageSource) -> None:
    encoding = manifest.encoding
    unlabelled = int((ShardReader(folder, manifest).labels < 0).sum()) if encoding.labels else 0
    shape = " x ".join(map(str, encoding.latent_shape))
    lines = [f"{folder}: {manifest.rows} latents {shape} of {encoding.source}, {len(manifest.shards)} shards"]
    lines.append(f"  {source.summarise(manifest.rows, manifest.skipped, unlabelled)}")
    if manifest.skipped:
        lines.append(f"  skipped: {manifest.skipped} broken images, named in {folder / 'skipped.txt'}")
    if quality := manifest.reconstruction:
        psnr = f"  the first {quality['images']:.0f}, decoded again: {quality['psnr']:.1f} dB PSNR"
        lines.append(f"{psnr}; next to their originals in {folder / 'reconstruction.png'}")
    mean = sum(manifest.channel_means) / len(manifest.channel_means)
    deviation = math.sqrt(sum(value**2 for value in manifest.channel_deviations) / len(manifest.channel_deviations))
    lines.append(f"  mean {mean:+.2f}, deviation {deviation:.2f} (of each channel: {folder / 'manifest.json'})")
    print("\n".join(lines), flush=True)
