"""Data: how fast latents come from shards, how much encoding adds to the codec, and that memory does not grow.

Each number is a ratio of two measurements, taken in turn in one run. The files are synthetic and in the page cache, so the
disk's speed does not count.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.harness import cpu_name, positive, table
from madformer.config import ExperimentConfig, load_experiment, wanted_outputs
from madformer.data.codec import Codec, build_codec
from madformer.data.datamodule import LatentDataModule
from madformer.data.encode import encode_share
from madformer.data.latents import Encoding, ShardWriter, read_manifest, read_shards, shard_name, summarise, write_manifest
from madformer.data.loader import Batch
from madformer.data.prompts import imagenet_classes
from madformer.data.sources import ROWS_PER_SHARD
from madformer.lookup import silence_datasets
from madformer.model.cost import training_flops
from madformer.parallel import Share

RAW_GOAL = 0.5
"""Goal of reading latents, as a share of the speed of reading the files."""

NEED_GOAL = 10
"""Goal of one worker's reading, as a multiple of the images that training needs."""

ENCODE_GOAL = 0.9
"""Goal of encoding, as a share of the speed of the codec alone."""

MEMORY_GOAL = 0.05
"""Largest growth of memory, as a share of the bytes that are read."""

GPUS, GPU_FLOPS, MFU = 8, 989e12, 0.4  # assumed devices for training
_ASSUMED = f"{MFU:.0%} MFU of {GPUS} GPUs of {GPU_FLOPS / 1e12:.0f} TFLOP/s (H100, dense bfloat16, its data sheet; assumed)"

SHARD_BYTES = 512 * 2**20
"""Size of the shards of each shape, unless the number of rows is given."""

RAW_BUFFER = 256 * 2**20  # files are read into a buffer that is larger than the processor's caches

IMAGE_SIZE = 256
"""Pixels along the side of the encoded images."""

FREE_COPIES = 16
"""Copies of the images for the codec that costs nothing. A few images would all be decoded before the clock starts."""

_SETTLING = 3  # batches read before the clock starts

_EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_SHAPES: Mapping[str, tuple[str, ...]] = {
    "ffhq1024": (),
    "imagenet256": ("data.tokenizer=builtin", "model.text.vocab_size=2048", "model.text.pad_token_id=0"),
    "imagenet256 without text": ("model.text=null", "data.class_names=null"),
}
"""Experiments, and what is changed in them: the tokenizer is one that needs no network."""


class FreeCodec:
    """A codec with the shapes of Stable Diffusion's that costs almost nothing, to time the code around it."""

    latent_channels = 4
    downsampling = 8

    def encode(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Means of 8 x 8 pixels, and a fourth channel."""
        mean_BChw = avg_pool2d(images_BCYX, 8)
        mean_BChw = torch.cat([mean_BChw, mean_BChw[:, :1]], dim=1)
        return mean_BChw, torch.ones_like(mean_BChw)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Not there: encoding does not need it."""
        raise NotImplementedError


# ---- shards


@dataclass(frozen=True)
class Latents:
    """A folder of synthetic latents, and the experiment that trains from it."""

    name: str
    folder: Path
    rows: int

    @property
    def files(self) -> list[Path]:
        """The Arrow files."""
        return sorted(self.folder.glob("*.arrow"))

    @property
    def size(self) -> int:
        """Bytes of them."""
        return sum(path.stat().st_size for path in self.files)

    def configure(self, batch: int = 1, workers: int = 0) -> ExperimentConfig:
        """The experiment, with so many images at once."""
        given = (f"data.latents={self.folder}", f"data.batch_size={batch}", f"data.workers={workers}")
        more = (*given, "evaluation.preview_every=null", *_SHAPES[self.name])
        return load_experiment(_EXPERIMENTS / f"{self.name.split()[0]}.yaml", more)

    def batches(self, batch: int, workers: int) -> Iterator[Batch]:
        """Endless shuffled batches, as in training."""
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it reports missing devices
        data = LatentDataModule(self.configure(batch, workers))
        data.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        data.setup("fit")
        return iter(data.train_dataloader())


def write_latents(folder: Path, name: str, rows: int | None) -> Latents:
    """Write shards in the shape of an experiment; rows: None for `SHARD_BYTES`."""
    folder.mkdir()
    encoding = _encoding(Latents(name, folder, 0).configure())
    row_bytes = 2 * len(encoding.arrays) * int(np.prod(encoding.latent_shape))
    rows, generator = rows or SHARD_BYTES // row_bytes, np.random.default_rng(0)
    for unit, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        described = [{"key": str(row), "label": row % 1000} for row in range(start, min(start + ROWS_PER_SHARD, rows))]
        shape = (len(described), *encoding.latent_shape)
        writer = ShardWriter(folder, shard_name(unit, 0), encoding)
        writer.add(described, {part: generator.random(shape, np.float32).astype(np.float16) for part in encoding.arrays})
        writer.finish(seen=len(described), last=True, skipped=())
    write_manifest(folder, summarise(encoding, list(read_shards(folder).values()), {}))
    return Latents(name, folder, read_manifest(folder).rows)


def _encoding(config: ExperimentConfig) -> Encoding:
    """The encoding that `madformer encode` would write for the experiment; with labels if the model has text."""
    labels = config.model.text is not None
    known: dict[str, Any] = {**vars(config.data), **vars(config.model)}
    known = {item.name: known[item.name] for item in fields(Encoding) if item.name in known}
    known |= {"source_sha256": "", "codec_sha256": "", "image_size": 8 * config.model.latent_size, "stochastic": True}
    known |= {
        "image_column": "image",
        "label_column": "label" if labels else None,
        "text_column": None,
        "class_names": imagenet_classes() if labels else None,
    }
    return Encoding(**known, rows_per_shard=ROWS_PER_SHARD)


def measure_shards(latents: Latents, batch: int, repeats: int) -> dict[str, float]:
    """Median bytes per second by side: reading the files, reading latents in this process, and in one worker."""
    count = -(-latents.rows // batch)
    buffer = bytearray(min(latents.size, RAW_BUFFER))
    loaders = {side: latents.batches(batch, workers) for workers, side in enumerate(("0 workers", "1 worker"))}
    for loader in loaders.values():
        read_batches(loader, count)  # map all shards before timing
    seconds: dict[str, list[float]] = {"raw": [], **{side: [] for side in loaders}}
    read_raw(latents.files, buffer)
    for _ in range(repeats):
        seconds["raw"].append(read_raw(latents.files, buffer))
        for side, loader in loaders.items():
            read_batches(loader, _SETTLING)
            seconds[side].append(read_batches(loader, count))
    # An epoch's last batch goes on into the next epoch.
    read = {side: latents.size * (1 if side == "raw" else count * batch / latents.rows) for side in seconds}
    return {side: read[side] / statistics.median(times) for side, times in seconds.items()}


def read_raw(files: Sequence[Path], buffer: bytearray) -> float:
    """Seconds of reading all files one after the other, which fills the buffer again and again."""
    memory, filled = memoryview(buffer), 0
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(memory[filled:]):
                filled = (filled + read) % len(memory)
    return time.perf_counter() - start


def read_batches(batches: Iterator[Batch], count: int) -> float:
    """Seconds to read `count` batches."""
    start = time.perf_counter()
    next(itertools.islice(batches, count, count), None)
    return time.perf_counter() - start


def needed_images(config: ExperimentConfig) -> float:
    """Images per second that training on the assumed GPUs needs."""
    return GPUS * GPU_FLOPS * MFU / training_flops(config.model, wanted_outputs(config.loss)).total


def report_shards(shapes: Sequence[Latents], batch_sizes: Sequence[int], repeats: int) -> list[str]:
    """The table, and whether each shape is fast enough."""
    rows, verdicts = [], []
    heads = ["raw GB/s"] + [f"{side} {unit}" for side in ("0 workers", "1 worker") for unit in ("GB/s", "latents/s", "of raw")]
    for latents in shapes:
        row_bytes, need = latents.size / latents.rows, needed_images(latents.configure())
        verdicts.append(f"{latents.name}: training eats {need:.0f} images/s at {_ASSUMED}")
        for batch in batch_sizes:
            found, name = measure_shards(latents, batch, repeats), f"{latents.name}, batch {batch}"
            raw = found.pop("raw")
            parts = [(f"{rate / 1e9:.2f}", f"{rate / row_bytes:.0f}", f"{rate / raw:.0%}") for rate in found.values()]
            rows.append((name, [f"{raw / 1e9:.2f}", *itertools.chain(*parts)]))
            for side, rate in found.items():
                verdicts.append(verdict(f"{name}, {side}: share of raw speed", rate / raw, RAW_GOAL))
            multiple = found["1 worker"] / row_bytes / need
            verdicts.append(verdict(f"{name}: one worker reads, in multiples of the need", multiple, NEED_GOAL))
    what = ", ".join(f"{latents.rows} rows of {latents.name} in {len(latents.files)} files" for latents in shapes)
    return [f"shards, all from the page cache, mean and deviation: {what}", *table(heads, rows), *verdicts]


# ---- encode


def write_images(path: Path, images: int, copies: int) -> None:
    """JPEGs of gradients under noise, in a Parquet file; all of them again for each copy."""
    import datasets

    generator, (y, x) = np.random.default_rng(0), np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    contents = []
    for number in range(images):
        plain_YXC = np.stack([x, y, np.full_like(x, 37 * number % 200)], axis=-1)
        pixels_YXC = (plain_YXC + generator.normal(0, 10, plain_YXC.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels_YXC).save(buffer, format="JPEG", quality=95)
        contents.append({"bytes": buffer.getvalue(), "path": f"{number:06d}.jpg"})
    features = datasets.Features({"image": datasets.Image()})
    with silence_datasets():
        datasets.Dataset.from_dict({"image": contents * copies}, features=features).to_parquet(str(path))


def write_codec(folder: Path, channels: Sequence[int]) -> None:
    """An autoencoder of Stable Diffusion's architecture with random weights."""
    from diffusers import AutoencoderKL

    halves = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=tuple(channels), layers_per_block=2, latent_channels=4, **halves).save_pretrained(folder)


def time_encoding(config: ExperimentConfig, device: str, folder: Path) -> float:
    """Images a second of `encode_share` into a new folder, from the end of its first batch to the end of the last shard."""
    folder.mkdir()
    seen: list[tuple[float, int]] = []
    share = Share(0, 1, device, lambda done: seen.append((time.perf_counter(), done)))
    encode_share(share, replace(config.data, latents=str(folder)), _encoding(config))
    end, (start, first), (_, last) = time.perf_counter(), seen[0], seen[-1]
    return (last - first) / (end - start)


def time_codec(codec: Codec, images_BCYX: Tensor, batches: int) -> float:
    """Images a second of the codec alone."""
    start = time.perf_counter()
    for _ in range(batches):
        codec.encode(images_BCYX)
    if codec.device.type == "cuda":
        torch.cuda.synchronize(codec.device)
    return batches * len(images_BCYX) / (time.perf_counter() - start)


def measure_encoding(folder: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Images a second by side: the codec alone, encoding, encoding with a codec that costs nothing."""
    write_codec(folder / "codec", given.channels)
    names = {"encoding": f"vae:{folder / 'codec'}", "without codec": "benchmarks.data:FreeCodec"}
    settings = [f"model.latent_size={IMAGE_SIZE // 8}", "model.ar_length=4", f"data.workers={given.threads}"]
    settings += [f"data.codec_dtype={given.codec_dtype}", f"data.codec_batch_size={given.codec_batch}"]
    configs = {}
    for (side, name), copies in zip(names.items(), (1, FREE_COPIES), strict=True):
        write_images(folder / f"{side}.parquet", given.images, copies)
        differences = [f"data.source={folder / side}.parquet", f"data.codec={name}"]
        configs[side] = load_experiment(_EXPERIMENTS / "ffhq1024.yaml", [*settings, *differences])
    codec = build_codec(names["encoding"], given.codec_dtype, given.device)
    images_BCYX = torch.rand(given.codec_batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=given.device) * 2 - 1
    time_codec(codec, images_BCYX, 1)
    rates: dict[str, list[float]] = {"codec alone": [], **{side: [] for side in configs}}
    for repeat in range(given.repeats):
        rates["codec alone"].append(time_codec(codec, images_BCYX, given.images // given.codec_batch))
        for side, config in configs.items():
            rates[side].append(time_encoding(config, given.device, folder / f"{side} {repeat}"))
    return rates


def report_encoding(folder: Path, given: argparse.Namespace) -> list[str]:
    """The table, and whether the codec is kept busy."""
    rates = measure_encoding(folder, given)
    what = f"{given.images} JPEGs of {IMAGE_SIZE} x {IMAGE_SIZE}, batch {given.codec_batch}, {given.threads} decoding threads"
    medians = {side: statistics.median(found) for side, found in rates.items()}
    rows = [(side, [f"{medians[side]:.2f}", f"{min(found):.2f}", f"{max(found):.2f}"]) for side, found in rates.items()]
    shares = [one / alone for one, alone in zip(rates["encoding"], rates["codec alone"], strict=True)]
    return [
        f"encode: {what}; AutoencoderKL {tuple(given.channels)} {given.codec_dtype} on {given.device}",
        *table(["images/s", "least", "most"], rows),
        verdict("encode: share of the codec's speed, median of the repeats", statistics.median(shares), ENCODE_GOAL),
        f"encode: a codec of {medians['without codec']:.0f} images/s and more waits for the path around it",
    ]


# ---- memory


def anonymous_bytes() -> int:
    """Anonymous memory of this process, without memory that is mapped from shards."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "no RssAnon in /proc: Linux of 4.5 or later is needed"
    return 1024 * int(found[1])


def measure_memory(latents: Latents, batch: int, workers: int) -> list[int]:
    """Bytes after each batch of an epoch."""
    loader = latents.batches(batch, workers)
    return [anonymous_bytes() for _ in itertools.islice(loader, -(-latents.rows // batch))]


def report_memory(shapes: Sequence[Latents], batch: int) -> list[str]:
    """The table, and whether memory stays constant."""
    rows, verdicts = [], []
    for latents, workers in itertools.product(shapes, (0, 1)):
        seen = measure_memory(latents, batch, workers)
        name, early = f"{latents.name}, {workers} workers", -(-len(seen) // 10)
        read = latents.size * (len(seen) - early) / len(seen)
        rows.append((name, [f"{size / 2**20:.1f}" for size in (seen[early - 1], seen[-1], max(seen), read)]))
        growth = (seen[-1] - seen[early - 1]) / max(read, 1)
        verdicts.append(verdict(f"{name}: growth in shares of what was read", growth, MEMORY_GOAL, most=True))
    heads = ["MiB at 10 %", "at the end", "peak", "MiB read between"]
    return [f"memory: RssAnon over an epoch of shards, batch {batch}", *table(heads, rows), *verdicts]


def verdict(what: str, value: float, goal: float, most: bool = False) -> str:
    """A line that says whether a goal is reached."""
    reached = value <= goal if most else value >= goal
    return f"{what}: {value:.3g} (goal: at {'most' if most else 'least'} {goal:g}, {'reached' if reached else 'NOT reached'})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--part", choices=("shards", "encode", "memory"), default=None, help="None: all of them")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each side, interleaved")
    parser.add_argument("--rows", type=positive, default=None, help=f"of each shape; None: {SHARD_BYTES // 2**20} MiB of them")
    parser.add_argument("--batch", type=positive, nargs="+", default=[64, 256], help="latents at once; memory takes the first")
    parser.add_argument("--images", type=positive, default=64, help="to encode, more than one batch of the codec")
    parser.add_argument("--codec-batch", type=positive, default=16, help="images that the codec takes at once")
    parser.add_argument("--codec-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--channels", type=positive, nargs="+", default=[32, 64, 128, 128], help="SD's own are 128 256 512 512")
    parser.add_argument("--threads", type=positive, default=4, help="that decode images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the codec")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; take cpu")
    if given.images <= given.codec_batch:
        parser.error(f"--images {given.images}: must be more than one batch, --codec-batch {given.codec_batch}")
    if len(given.channels) != 4:
        parser.error(f"--channels: must be four, as in Stable Diffusion, not {len(given.channels)}")
    print(_header(given), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for lines in _parts(Path(temporary), given):
            print("\n".join(["", *lines]), flush=True)


def _parts(folder: Path, given: argparse.Namespace) -> Iterator[list[str]]:
    shapes: list[Latents] = []
    if given.part != "encode":
        # Another process writes: the heap of this one gets no gaps that growth could hide in.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
            shapes = [writer.submit(write_latents, folder / name, name, given.rows).result() for name in _SHAPES]
    if given.part in ("memory", None):
        yield report_memory(shapes, given.batch[0])
    if given.part in ("shards", None):
        yield report_shards(shapes, given.batch, given.repeats)
    if given.part in ("encode", None):
        yield report_encoding(folder, given)


def _header(given: argparse.Namespace) -> str:
    parts = [f"{name} {version(name)}" for name in ("torch", "datasets", "pyarrow", "diffusers")]
    parts += [f"Python {platform.python_version()}", cpu_name()]
    parts += [torch.cuda.get_device_name()] if given.device == "cuda" else []
    parts += [f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs", f"load {os.getloadavg()[0]:.1f} before"]
    return " | ".join(parts)


if __name__ == "__main__":
    main()
