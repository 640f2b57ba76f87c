"""`madformer encode`: turn images into shards of latents, on all devices. Run again, it resumes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from madformer.config import DataConfig, ExperimentConfig
from madformer.config.data import DIGITS
from madformer.data.codec import Codec, build_codec, require_fit
from madformer.data.image_files import load_square, save_png, to_grid, to_unit
from madformer.data.latents import (
    Encoding,
    Manifest,
    Shard,
    ShardReader,
    ShardWriter,
    complete_units,
    read_encoding,
    read_manifest,
    read_shards,
    shard_name,
    summarise,
    write_encoding,
    write_manifest,
)
from madformer.data.loader import DecodedImage, batched, decode_rows, require_few, skip_broken
from madformer.data.prompts import class_prompts
from madformer.data.sources import ROWS_PER_SHARD, ImageSource, open_source
from madformer.errors import ConfigError, DataError, InputError
from madformer.parallel import Share, cluster_rank, find_devices, own_device, share_out
from madformer.progress import ProgressDisplay
from madformer.runs.files import write_text
from madformer.runs.folder import claim_folder

RECONSTRUCTED = 32
"""Images that are decoded again when all is done, to see that the latents mean what they should."""

SHOWN = 8
"""Images in the picture, next to their originals."""


def encode(config: ExperimentConfig) -> None:
    """Fill the folder `data.latents` with the latents of all images of `data.source`.

    Raises:
        ConfigError: nothing to encode or nowhere to put it, or a codec whose latents are not the model's.
        InputError: the folder holds other latents, another process is at it, or too many images are broken.
    """
    data = config.data
    if data.latents is None:
        raise ConfigError("data.latents = null: name the folder that latents are written to, such as data.latents=latents/ffhq")
    if data.source in (None, DIGITS):
        raise ConfigError(f"data.source = {data.source!r}: nothing to encode; name a data set, files or a folder of images")
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
    """Encode every `world_size`-th unit of the source; shards that are done stay as they are."""
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
        """Write the shards of a unit that are missing; yields how many rows were seen, now and then."""
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
                if len(good_images) < len(batch):  # together with those of other shards, also of other processes
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
            remedy = "set data.codec_dtype=float32 or bfloat16, or mend its scaling factor"
            raise ConfigError(f"data.codec = {self.data.codec!r}: {problem}: {remedy}")
        rows = [{"key": image.row.key, "label": image.row.label, "text": image.row.text} for image in images]
        writer.add(rows, {column: array.numpy() for column, array in latents.items()})


def _describe(config: ExperimentConfig, source: ImageSource, codec: Codec) -> Encoding:
    """The encoding that the experiment asks for.

    Raises:
        ConfigError: the codec's latents are not the model's.
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
    existing = read_encoding(folder)
    if existing is None:
        write_encoding(folder, encoding)
    elif difference := existing.describe_difference(replace(encoding, source=existing.source)):
        raise InputError(f"{folder}: holds other latents: {difference}; name another folder (data.latents), or delete it")
    if cluster_rank() is None:
        _remove_temporary_files(folder)
    return existing or encoding


def _finish(folder: Path, encoding: Encoding, source: ImageSource, codec: Codec) -> None:
    """Write the manifest, once all units are complete."""
    shards = list(read_shards(folder).values())
    if complete_units(shards) != set(range(source.num_units)):
        remark = "this process has done its share; the last one writes the manifest (if none does: once more)"
        print(f"{folder}: {remark}", flush=True)
        return
    if not any(shard.rows for shard in shards):
        raise DataError(f"{encoding.source}: no image in it that can be read")
    _remove_temporary_files(folder)
    skipped = _skipped(shards)
    write_text(folder / "skipped.txt", "".join(f"{key}\t{flaw}\n" for key, flaw in skipped))
    manifest = summarise(encoding, shards, {})
    existing = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    if existing is None or (existing.sha256, existing.skipped) != (manifest.sha256, manifest.skipped):
        write_manifest(folder, replace(manifest, reconstruction=_reconstruct(folder, manifest, source, codec)))
    _report(folder, read_manifest(folder), source)


def _remove_temporary_files(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for path in folder.glob(".shard-*.tmp"):
        path.unlink(missing_ok=True)


def _skipped(shards: Iterable[Shard]) -> list[tuple[str, str]]:
    return [image for shard in shards for image in shard.skipped]


def _reconstruct(folder: Path, manifest: Manifest, source: ImageSource, codec: Codec) -> dict[str, float]:
    """Decode the first latents and compare them with their images; with a picture of some."""
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
        psnr = f"  decoded again, the first {quality['images']:.0f}: {quality['psnr']:.1f} dB PSNR"
        lines.append(f"{psnr}; beside their originals in {folder / 'reconstruction.png'}")
    mean = sum(manifest.channel_means) / len(manifest.channel_means)
    deviation = math.sqrt(sum(value**2 for value in manifest.channel_deviations) / len(manifest.channel_deviations))
    lines.append(f"  mean {mean:+.2f}, deviation {deviation:.2f} (of each channel: {folder / 'manifest.json'})")
    print("\n".join(lines), flush=True)
