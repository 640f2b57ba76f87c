"""Evaluation: the share of its time that goes into sampling, decoding, features and statistics, at the full size of FFHQ-1024.

Networks have their real sizes and random weights. If the whole cannot be run, a part is timed and multiplied by its number of
occurrences; the output says so. Evaluations compute in float32, whatever the precision of training.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, PretrainedConfig, ResNetConfig

from benchmarks.data import verdict, write_codec
from benchmarks.harness import header, positive, table
from benchmarks.measure import Run, Setup, count_flops, matmul_rate, seconds_of
from madformer.config import ExperimentConfig, load_experiment
from madformer.data.codec import Codec, build_codec
from madformer.data.image_files import load_square
from madformer.diffusion.samplers import build_sampler
from madformer.errors import ConfigError
from madformer.evaluation.feature_cache import PHASES, SIZES, SampleRequest, read_parts, sample_features
from madformer.evaluation.feature_networks import FeatureNetwork, build_feature_network
from madformer.evaluation.feature_networks.pretrained import _quiet
from madformer.evaluation.measurement import Sampling
from madformer.evaluation.metrics import Moments, frechet_distance
from madformer.evaluation.neighbours import NEIGHBOURS, Within, compare_pairs, pairs_within
from madformer.evaluation.reference import KEPT
from madformer.model import MADFormer, cost
from madformer.model.generation import BlockSampler
from madformer.model.layer import autocast_dtype

GOAL = 0.15
"""Largest share of an evaluation's time for all work but sampling."""

INCEPTION_GFLOPS = 11.4
"""Of one image of 299 x 299, two for each of its 5.7 G multiplications."""

_EXPERIMENT = Path(__file__).parents[1] / "experiments/ffhq1024.yaml"
_DINOV2_LARGE = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)
_REPEATS = 3


class StandIn(NamedTuple):
    """A feature network of transformers with random weights."""

    name: str
    config: PretrainedConfig
    side: int
    """Pixels along the side of what it takes."""

    def build(self, folder: Path, device: str) -> FeatureNetwork:
        """The network, by way of a checkpoint in a new folder."""
        with torch.random.fork_rng(devices=[]), _quiet():
            AutoModel.from_config(self.config).save_pretrained(folder)
        size, normal = {"height": self.side, "width": self.side}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        steps = {"do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        processor = {"image_processor_type": "ViTImageProcessor", "size": size, **steps, **normal}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return build_feature_network(f"hf:{folder}", device)

    @property
    def gflops(self) -> float:
        """Of one image."""
        with torch.device("meta"):
            network, images_BCYX = AutoModel.from_config(self.config).eval(), torch.empty(1, 3, self.side, self.side)
        return count_flops(lambda: network(pixel_values=images_BCYX)) / 1e9


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    overrides: tuple[str, ...]
    """What is changed in the experiment."""
    channels: tuple[int, ...]
    """Of the codec."""
    networks: tuple[StandIn, ...]
    """The first one takes Inception's place."""
    points: tuple[int, int]
    """Generated and reference features whose pairs a CPU looks at; a GPU looks at all."""


FULL = Size(
    overrides=(),
    channels=(128, 256, 512, 512),
    networks=(StandIn("ResNet-50", ResNetConfig(), 299), StandIn("DINOv2-large", _DINOV2_LARGE, 224)),
    points=(2048, 2048),
)
"""The released model, Stable Diffusion's autoencoder, and networks that look at images at their own size."""

QUICK = Size(
    overrides=(
        *("model.latent_size=8", "model.ar_length=4", "model.depth=3", "model.diffusion_depth=2", "model.width=32"),
        *("model.num_heads=2", "model.ffn_width=48", "model.unet.channels=[8,16]", "model.unet.layers=[1,1]"),
        *("model.unet.attention=[false,false]", "model.unet.groups=4", "model.unet.num_heads=2"),
    ),
    channels=(32, 32, 32, 32),
    networks=(
        StandIn("a small ResNet", ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]), 32),
        StandIn("a small DINOv2", Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28), 28),
    ),
    points=(64, 128),
)
"""Shows that everything works, and says nothing about its costs."""


@dataclass(frozen=True)
class Bench:
    """What is measured, and where."""

    size: Size
    config: ExperimentConfig
    """Its output folder takes whatever has to lie in files."""
    sampling: Sampling
    device: torch.device
    images: int
    """That run through an evaluation as a whole; 0: parts of it are timed one by one."""
    points: tuple[int, int]
    """Generated and reference features whose pairs are looked at."""

    @property
    def batch(self) -> int:
        """Images at once."""
        return self.config.evaluation.batch_size

    @property
    def count(self) -> int:
        """Samples of the evaluation whose time is asked for."""
        return self.config.evaluation.num_samples

    @property
    def partners(self) -> int:
        """Reference images whose pairs with the samples are looked at: as many, as far as they are kept."""
        return min(self.count, KEPT)

    @property
    def side(self) -> int:
        """Pixels along the side of an image."""
        return 8 * self.config.model.latent_size

    @property
    def folder(self) -> Path:
        """For files."""
        return Path(self.config.output_dir)

    def seconds(self, run: Run) -> float:
        """Median of some runs, after one that is not timed."""
        run()
        return statistics.median(seconds_of(run, self.device) for _ in range(_REPEATS))


def prepare(size: Size, nfe: int, batch: int, images: int, device: str, folder: str) -> Bench:
    """Put together what is asked for.

    Raises:
        ConfigError: the model has no such budget.
    """
    settings = (f"output_dir={folder}", f"evaluation.batch_size={batch}", f"evaluation.nfe=[{nfe}]")
    config = load_experiment(_EXPERIMENT, [*size.overrides, *settings])
    count = config.evaluation.num_samples
    points = (count, min(count, KEPT)) if device == "cuda" else size.points
    return Bench(size, config, Sampling.of_nfe(config, nfe), torch.device(device), images, points)


class NamedNetwork(NamedTuple):
    """A feature network, with its name and a description for the table."""

    name: str
    network: FeatureNetwork
    description: str


def named_networks(bench: Bench) -> Iterator[NamedNetwork]:
    """The networks, one at a time: Inception or what stands for it, and a heavier one."""
    for number, stand_in in enumerate(bench.size.networks):
        description = f"{stand_in.side} x {stand_in.side}, random weights, {stand_in.gflops:.3g} GFLOPs an image"
        if not number and bench.size is FULL:
            try:
                network = build_feature_network("inception", str(bench.device))
                yield NamedNetwork("Inception", network, f"299 x 299, {INCEPTION_GFLOPS:g} GFLOPs an image")
                continue
            except ConfigError as error:
                description += f"; in place of Inception, which has {INCEPTION_GFLOPS:g} ({error})"
        network = stand_in.build(bench.folder / f"network-{number}", str(bench.device))
        yield NamedNetwork(stand_in.name, network, description)


# ---- sampling


class Part(NamedTuple):
    """A part of sampling that occurs several times for each image."""

    stage: str
    times: int
    run: Run


def sampling_parts(bench: Bench, model: MADFormer) -> list[Part]:
    """Parts whose costs, times their numbers, add up to the cost of `generate`. They must run in this order.

    Each block costs more than the previous one by the keys of one block, which is constant. Only block 0 has no clean tower. So
    blocks 1 .. L - 1 together cost L - 1 times block L / 2.
    """
    c, evaluation, steps = bench.config.model, bench.config.evaluation, bench.sampling.steps
    scheduler = build_sampler(bench.config.diffusion, c.prediction_type, evaluation.sampler)
    text_tokens = 0 if c.text is None else c.text.length
    sampler = BlockSampler(model, bench.batch, text_tokens, 1.0, autocast_dtype(bench.device, model.boi_SD.dtype))
    sampler.start_images(scheduler, None, None)
    sampler.set_timesteps(steps)
    for layer in sampler.cache.layers:
        layer.normal_()  # in place of blocks that were not sampled
    latents_BCYX = torch.randn(bench.batch, c.latent_channels, c.block_size, c.block_size, device=bench.device)
    parts = []
    for block, times in ((0, 1), (c.ar_length // 2, c.ar_length - 1)):
        previous_BCYX = latents_BCYX if block else None
        parts.append(Part("AR stage", times, functools.partial(sampler.start_block, block, previous_BCYX)))
        parts.append(Part("denoising", times * steps, functools.partial(sampler.predict, latents_BCYX, 0)))
    return parts


@torch.no_grad()
def time_sampling(bench: Bench) -> dict[str, float]:
    """Seconds an image by stage, from the parts."""
    seconds: dict[str, float] = {}
    for part in sampling_parts(bench, MADFormer(bench.config.model).eval().to(bench.device)):
        seconds[part.stage] = seconds.get(part.stage, 0.0) + part.times * bench.seconds(part.run) / bench.batch
    return seconds


def sampling_flops(bench: Bench) -> dict[str, int]:
    """FLOPs an image by stage."""
    flops = cost.sampling_flops(bench.config.model)
    total, ar_stage = flops.total(bench.sampling.steps), flops.total(0)
    return {"AR stage": ar_stage, "denoising": total - ar_stage}


# ---- the other phases


def open_codec(bench: Bench) -> Codec:
    """The experiment's, with random weights."""
    folder = bench.folder / "codec"
    write_codec(folder, bench.size.channels)
    return build_codec(f"vae:{folder}", bench.config.data.codec_dtype, bench.device)


def time_decoding(bench: Bench) -> float:
    """Seconds an image."""
    c, codec = bench.config.model, open_codec(bench)
    latents_BChw = torch.randn(bench.batch, c.latent_channels, c.latent_size, c.latent_size, device=bench.device)
    codec.decode(latents_BChw[..., :16, :16])  # only once and a part: on a CPU a whole image takes minutes
    return seconds_of(lambda: codec.decode(latents_BChw), bench.device) / bench.batch


def time_features(bench: Bench, network: FeatureNetwork) -> float:
    """Seconds an image."""
    images_BCYX = torch.rand(bench.batch, 3, bench.side, bench.side, device=bench.device) * 2 - 1
    return bench.seconds(lambda: network(images_BCYX)) / bench.batch


def pair_operations(generated: int, reference: int) -> float:
    """The number of pairs that `compare_pairs` and the reference's `pairs_within` compute; their cost is proportional to it."""
    return generated * reference + generated**2 / 2 + reference**2 / 2


def time_statistics(bench: Bench, width: int) -> float:
    """Seconds of an evaluation's distances. An inception score would add almost nothing."""
    (n, m), device = bench.points, bench.device
    generated_ND, reference_MD = torch.randn(bench.count, width, device=device), torch.randn(m, width, device=device)
    moments, radii_MK = Moments.of(reference_MD), torch.ones(m, len(NEIGHBOURS), dtype=torch.float64)
    distance = seconds_of(lambda: frechet_distance(Moments.of(generated_ND), moments), device)
    pairs = seconds_of(lambda: compare_pairs(generated_ND[:n], reference_MD, Within(radii_MK, 0.0)), device)
    pairs += seconds_of(lambda: pairs_within(reference_MD), device)
    return distance + pairs * pair_operations(bench.count, bench.partners) / pair_operations(n, m)


def photograph(side: int) -> bytes:
    """A PNG of smooth colours under noise, with about as many bytes as FFHQ's have."""
    generator = np.random.default_rng(0)
    plain = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    noisy_YXC = np.asarray(plain) + generator.normal(0, 2, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy_YXC.clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


# ---- an evaluation as a whole


def evaluate(bench: Bench, model: MADFormer, codec: Codec, network: FeatureNetwork) -> dict[str, float]:
    """Seconds an image by phase, as `madformer evaluate` records them, without those of the first batch."""
    folder = bench.folder / "features" / network.label
    request = SampleRequest(bench.config, bench.sampling, ("",) * bench.images, "random weights")
    sample_features(folder, request, model, codec, [network], range(bench.images), lambda _: None)
    parts = list(read_parts(folder))
    later = int(torch.cat([part[SIZES] for part in parts])[1:].sum())
    return {phase: float(torch.cat([part[phase] for part in parts])[1:].sum()) / later for phase in PHASES}


# ---- the report


def time_parts(bench: Bench) -> Iterator[list[str]]:
    """The tables, from parts that are built and timed one after the other."""
    sampling = time_sampling(bench)
    yield report_sampling(bench, sampling, sampling_flops(bench))
    phases = {"sampling": sum(sampling.values()), "decoding": time_decoding(bench)}
    for entry in named_networks(bench):
        yield report_evaluation(bench, entry, phases | {"features": time_features(bench, entry.network)})


def run_whole(bench: Bench) -> Iterator[list[str]]:
    """The tables, from an evaluation with each network."""
    model, codec = MADFormer(bench.config.model).eval().to(bench.device), open_codec(bench)
    for entry in named_networks(bench):
        phases = evaluate(bench, model, codec, entry.network)
        sampling, flops = {"all": phases["sampling"]}, {"all": sum(sampling_flops(bench).values())}
        yield [*report_sampling(bench, sampling, flops), "", *report_evaluation(bench, entry, phases)]


def report_sampling(bench: Bench, seconds: Mapping[str, float], flops: Mapping[str, int]) -> list[str]:
    """Compare seconds with FLOPs: correctly scaled stages compute at about the same speed."""
    steps, blocks = bench.sampling.steps, bench.config.model.ar_length
    how = f"run, {bench.images - bench.batch} images after a first batch that does not count"
    if not bench.images:
        parts = f"one start of the AR stage and one denoising step, in block 0 and in block {blocks // 2}"
        how = f"NOT run, scaled from {parts} (the mean of the others), to {blocks} starts and {blocks} x {steps} steps"
    rate = matmul_rate(bench.device, torch.float32)
    rows = [
        (stage, [f"{s:.4g}", f"{flops[stage] / 1e12:.4g}", f"{flops[stage] / s / 1e12:.3g}", f"{flops[stage] / s / rate:.0%}"])
        for stage, s in seconds.items()
    ]
    return [f"sampling: {how}", *table(["s/image", "TFLOP", "TFLOP/s", "of matmul rate"], rows)]


def report_evaluation(bench: Bench, entry: NamedNetwork, phases: Mapping[str, float]) -> list[str]:
    """The time of an evaluation with a network, from its seconds per image, and the time of its reference."""
    content, metrics = photograph(bench.side), time_statistics(bench, entry.network.width)
    reading = bench.seconds(lambda: load_square(content, bench.side))
    an_image = f"{reading:.3g} s an image for reading (a PNG, one thread) and {phases['features']:.3g} s for features"
    return [
        f"{entry.name}: {entry.description}, {entry.network.width:,} features",
        *report_shares(bench, entry.name, {phase: bench.count * phases[phase] for phase in PHASES} | {"statistics": metrics}),
        f"its reference, once for all runs: {an_image}",
    ]


def report_shares(bench: Bench, name: str, seconds: Mapping[str, float]) -> list[str]:
    """The table of an evaluation, and whether the goal is reached."""
    total = sum(seconds.values())
    rows = [(phase, [f"{each:,.1f}", f"{each / total:.2%}"]) for phase, each in seconds.items()]
    (n, m), full = bench.points, (bench.count, bench.partners)
    all_pairs = f"{full[0]:,} x {full[1]:,}"
    pairs = f"all pairs, {all_pairs}," if (n, m) == full else f"pairs of {n:,} x {m:,} features, scaled to {all_pairs},"
    return [
        *table([f"s for {bench.count:,} images", "share"], rows),
        f"statistics: {pairs} and the Fréchet distance at full size",
        verdict(f"all but sampling, with {name}", 1 - seconds["sampling"] / total, GOAL, most=True),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nfe", type=positive, default=280, help="budget; the paper's smallest is the least favourable one")
    parser.add_argument("--batch", type=positive, default=None, help="images at once; None: 16 on a GPU, 1 on a CPU")
    whole = "images to run as a whole, more than a batch; None: two batches on a GPU; on a CPU none, parts are timed and scaled"
    parser.add_argument("--images", type=positive, default=None, help=whole)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny networks: shows that everything works")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; take cpu")
    batch = given.batch or (16 if given.device == "cuda" else 1)
    images = given.images or (2 * batch if given.device == "cuda" else 0)
    if 0 < images <= batch:
        parser.error(f"--images {images}: must be more than one batch, --batch {batch}: the first one does not count")
    size = QUICK if given.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        try:
            bench = prepare(size, given.nfe, batch, images, given.device, temporary)
        except ConfigError as error:
            parser.error(str(error))
        what = f"NFE {given.nfe} = {bench.sampling.steps} steps, batch {batch}, load {os.getloadavg()[0]:.1f} before"
        print(header(Setup(bench.config.model, bench.device, torch.float32), what), flush=True)
        for lines in (run_whole if images else time_parts)(bench):
            print("\n".join(["", *lines]), flush=True)


if __name__ == "__main__":
    main()
