"""Measure a GPU for docs/explanation/performance.md: training steps and sampling, eager, compiled and as released.

    python -m benchmarks.gpu --out gpu.json

The most important rows come first. No row starts after the time limit, and the file is written after every row, so stopping
the program loses nothing. A row that fails or runs out of memory reports its error, and the next one runs. Times are medians
after a warm-up. `ratio` compares with the first row of the same work, size and batch, our eager one. The released formulation
is eager too, as its gathering of tokens by masks cannot be compiled as a whole. On a CPU only eager rows run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler

from benchmarks.baseline import Baseline
from benchmarks.harness import SIZES, cpu_name, sized, table
from benchmarks.measure import Run, Setup, matmul_rate, seconds_of
from benchmarks.training_step import Losses
from madformer.config import LossConfig, OptimizerConfig, load_experiment, wanted_outputs
from madformer.model import cost, memory
from madformer.model.generation import BlockSampler, generate
from madformer.model.madformer import MADFormer
from madformer.parallel import device_name, peak_flops
from madformer.runs.files import write_text
from madformer.training.ema import MovingAverage
from madformer.training.module import build_optimizer, unused_parameters

REPEATS = 5
"""Timed runs of a row."""

STEPS = 4
"""Denoising steps of each block. The cost of a step does not depend on their number."""

SHRINK = 0.85
"""Factor by which a batch that does not fit is made smaller."""

_EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_LOSSES = LossConfig()


@dataclass(frozen=True)
class Case:
    """The work that one row measures."""

    work: Literal["matmul", "copy", "training", "sampling"]
    """The first two: what the card can do at best."""
    size: str = ""
    batch: int | None = None
    """Images at once; None: as many as fit."""
    side: str = "ours"
    """ours, or a formulation of `benchmarks.baseline`: dense or sparse in training, recomputed in sampling."""
    compiled: bool = False
    graphs: bool = False
    """Denoising steps are CUDA graphs."""
    foreach: bool = False
    """AdamW without its fused kernel."""

    @property
    def name(self) -> str:
        """As the table has it."""
        if not self.size:
            return self.work
        details = [self.work, "compiled" if self.compiled else "eager"]
        details += ["graphs"] * self.graphs
        details += [] if self.side == "ours" else [f"released ({self.side})"]
        return ", ".join(details + ["AdamW foreach"] * self.foreach + ["largest batch"] * (self.batch is None))


@dataclass
class Card:
    """The device that everything runs on, and its peak."""

    device: torch.device
    memory: int
    """Bytes that a batch may need."""
    matmul: float = 0.0
    """FLOP/s measured."""
    compiled_for: tuple[str, str, int | None] | None = None
    """The work, size and batch that compiled code is there for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of autocast."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def dtype_name(self) -> str:
        """As the estimates of memory name it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def peak(self) -> float | None:
        """FLOP/s by the data sheet; None: not known."""
        return peak_flops(device_name(self.device), "bf16-mixed" if self.device.type == "cuda" else "32-true")

    def describe(self) -> dict[str, str | None]:
        """Its name, and the versions that its numbers belong to."""
        name, driver = cpu_name(), None
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
                driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        return {"card": name, "driver": driver, "torch": torch.__version__, "python": platform.python_version()}


def cases(sizes: Sequence[str], cuda: bool) -> list[Case]:
    """All rows, the most important first."""
    shipped = {size: _shipped_batch(size) for size in sizes}
    found = [Case("matmul"), Case("copy")]
    for size in sizes:
        training, sampling = Case("training", size, shipped[size]), Case("sampling", size, 8)
        found += [training, replace(training, compiled=True), replace(training, side="sparse")]
        found += [replace(training, batch=None, compiled=cuda)]
        found += _sampling_cases(sampling)
    for size in sizes:
        for batch in (1, 64):
            found += _sampling_cases(Case("sampling", size, batch))
        training = Case("training", size, shipped[size])
        found += [replace(training, foreach=True), replace(training, side="dense")]
    return [case for case in found if cuda or not case.compiled]


def _sampling_cases(case: Case) -> list[Case]:
    compiled = replace(case, compiled=True)
    return [case, compiled, replace(compiled, graphs=True), replace(case, side="recomputed")]


def _shipped_batch(size: str) -> int:
    data = load_experiment(_EXPERIMENTS / f"{size}.yaml").data
    return data.batch_size_per_device or data.batch_size


# ---- what is timed


def build(case: Case, card: Card) -> MADFormer:
    """The model of a row, with random weights."""
    with torch.device(card.device):
        return MADFormer(replace(sized(case.size), compile=case.compiled))


def training_step(case: Case, card: Card, batch: int) -> Run:
    """A whole step as `madformer train` makes it: losses, backward, clipping, AdamW, moving average."""
    model = build(case, card)
    losses = Losses(model, _LOSSES, batch).by_side()[case.side]
    if case.side == "ours":
        for parameter in unused_parameters(model, wanted_outputs(_LOSSES)):
            parameter.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(), fused=not case.foreach)
    average, setup = MovingAverage(model, OptimizerConfig().ema_decay), Setup(model.config, card.device, card.dtype)

    def step() -> None:
        optimizer.zero_grad()
        with setup.autocast(cache_enabled=False):  # as Lightning has it
            total = losses()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OptimizerConfig().grad_clip)
        optimizer.step()
        average.update(0)

    return step


def generation(case: Case, card: Card, batch: int) -> Run:
    """All blocks of a batch of images, by a model prepared for sampling, as evaluations have it."""
    model = prepared(case, card)
    c, setup = model.config, Setup(model.config, card.device, card.dtype)
    scheduler = DDIMScheduler(prediction_type=c.prediction_type, clip_sample=False)
    noise_BLCYX = torch.randn(batch, c.ar_length, c.latent_channels, c.block_size, c.block_size, device=card.device)
    baseline, make_sampler = Baseline(model), functools.lru_cache(maxsize=1)(_block_sampler(case))

    def run() -> None:
        with setup.autocast():
            if case.side == "ours":
                generate(model, scheduler, STEPS, initial_noise_BLCYX=noise_BLCYX, make_sampler=make_sampler)
            else:
                baseline.generate(scheduler, STEPS, noise_BLCYX)

    return run


def prepared(case: Case, card: Card) -> MADFormer:
    """The model of a row that samples."""
    model = build(case, card).eval()
    model.prepare_for_sampling(card.dtype if card.dtype != torch.float32 else None)
    return model


def _block_sampler(case: Case) -> Callable[..., BlockSampler]:
    return functools.partial(BlockSampler, use_graphs=case.graphs)


def denoising_step(case: Case, card: Card, batch: int) -> Run:
    """One step of the last block, the one that sees most."""
    model = prepared(case, card)
    c, setup = model.config, Setup(model.config, card.device, card.dtype)
    scheduler = DDIMScheduler(prediction_type=c.prediction_type, clip_sample=False)
    latents_BCYX = torch.randn(batch, c.latent_channels, c.block_size, c.block_size, device=card.device)
    with torch.no_grad(), setup.autocast():
        sampler = _block_sampler(case)(model, batch, 0, 1.0, card.dtype)
        sampler.start_images(scheduler, None, None)
        sampler.set_timesteps(STEPS)
        sampler.start_block(c.ar_length - 1, latents_BCYX if c.ar_length > 1 else None)

    @torch.no_grad()
    def step() -> None:
        with setup.autocast():
            sampler.predict(latents_BCYX, 0)

    return step


def flops(case: Case, batch: int) -> int:
    """Of our formulation; the released one does more for the same result."""
    config = sized(case.size)
    if case.work == "training":
        return batch * cost.training_flops(config, wanted_outputs(_LOSSES)).model_flops
    return batch * cost.sampling_flops(config).total(STEPS)


def estimated_bytes(case: Case, card: Card, batch: int) -> int:
    """Of our formulation, as `madformer` estimates it."""
    config = sized(case.size)
    if case.work == "training":
        return memory.training_memory(config, batch, card.dtype_name, wanted_outputs(_LOSSES)).total
    return memory.weight_memory(config) + memory.cache_memory(config, batch, card.dtype_name)


def batches_to_try(case: Case, card: Card) -> Iterator[int]:
    """The batches to try for a row: its own, or, if it wants the largest, that of the estimate and then smaller ones."""
    if case.batch is not None:
        yield case.batch
        return
    one, two = (estimated_bytes(case, card, batch) for batch in (1, 2))
    batch = max(1, 1 + (card.memory - one) // (two - one))
    while batch > 1:
        yield batch
        batch = int(SHRINK * batch)
    yield 1


# ---- rows


def measure(case: Case, card: Card) -> dict[str, Any]:
    """The numbers of a row.

    Raises:
        torch.OutOfMemoryError: no batch of the row fits.
    """
    if case.work == "matmul":
        card.matmul = matmul_rate(card.device, card.dtype)
        return {"tflops": card.matmul / 1e12, "mfu": card.matmul / card.peak if card.peak else None, "of_matmul": 1.0}
    if case.work == "copy":
        source = torch.empty(2**32 if card.device.type == "cuda" else 2**26, dtype=torch.uint8, device=card.device)
        target = torch.empty_like(source)
        seconds = _median_seconds(lambda: target.copy_(source), card)
        return {"seconds": seconds, "tb_per_second": 2 * source.nbytes / seconds / 1e12}
    make = training_step if case.work == "training" else generation
    for batch in batches_to_try(case, card):
        _free_memory(card, (case.work, case.size, batch))
        try:
            seconds = _median_seconds(make(case, card, batch), card)
        except torch.OutOfMemoryError:
            if case.batch is not None or batch == 1:
                raise
            continue
        ours, cuda = case.side == "ours", card.device.type == "cuda"
        rate = flops(case, batch) / seconds
        return {
            "batch": batch,
            "seconds": seconds,
            "tflops": rate / 1e12 if ours else None,
            "mfu": rate / card.peak if ours and card.peak else None,
            "of_matmul": rate / card.matmul if ours and card.matmul else None,
            "peak_gib": torch.cuda.max_memory_allocated(card.device) / 2**30 if cuda else None,
            "estimated_gib": estimated_bytes(case, card, batch) / 2**30 if ours else None,
        }
    raise AssertionError("the last batch is measured or raises")


def _median_seconds(run: Run, card: Card) -> float:
    for _ in range(2):  # compiles, and allocates what later runs use again
        run()
    return statistics.median(seconds_of(run, card.device) for _ in range(REPEATS))


def _free_memory(card: Card, next_work: tuple[str, str, int | None]) -> None:
    gc.collect()
    if card.device.type == "cuda":
        if card.compiled_for != next_work:
            torch.compiler.reset()  # a second batch size would make shapes dynamic
            card.compiled_for = next_work
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(card.device)


def measure_rows(todo: Sequence[Case], card: Card, minutes: float, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measure until all rows are done or the time is up. `write` gets all rows after each new one."""
    end, rows = time.monotonic() + 60 * minutes, list[dict[str, Any]]()
    blank = dict.fromkeys(("batch", "seconds", "tflops", "mfu", "of_matmul", "peak_gib", "estimated_gib", "ratio", "error"))
    first_seconds: dict[tuple[str, str, int | None], float] = {}
    for case in todo:
        if time.monotonic() >= end:
            break
        row: dict[str, Any] = {"name": case.name, "size": case.size, **blank}
        try:
            row |= measure(case, card)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # a row that fails must not end the program
            row["error"] = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
        if row["seconds"]:
            first = first_seconds.setdefault((case.work, case.size, row["batch"]), row["seconds"])
            row["ratio"] = row["seconds"] / first
        rows.append(row)
        write(rows)


def write_traces(size: str, card: Card, folder: Path) -> None:
    """Chrome traces of a training step and of a denoising step, compiled on a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if card.device.type == "cuda" else []
    for work, make in (("training", training_step), ("denoising", denoising_step)):
        _free_memory(card, (work, size, None))
        case = Case("training" if work == "training" else "sampling", size, None, compiled=card.device.type == "cuda")
        step = make(case, card, _shipped_batch(size) if work == "training" else 8)
        _median_seconds(step, card)
        with torch.profiler.profile(activities=activities) as profile:
            seconds_of(step, card.device)
        profile.export_chrome_trace(str(folder / f"{work}-{size}.json.gz"))


# ---- what is printed


def as_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a row; a failed one ends with its error."""
    columns = {"batch": "d", "seconds": ".4f", "tflops": ".3g", "mfu": ".0%", "of_matmul": ".0%"}
    columns |= {"peak_gib": ".1f", "estimated_gib": ".1f", "ratio": ".2f"}
    lines = []
    for row in rows:
        cells = ["-" if row[name] is None else format(row[name], form) for name, form in columns.items()]
        lines.append((f"{row['size']} {row['name']}".strip(), [*cells, row["error"] or ""]))
    return table([*columns, ""], lines)


def sentence(card: dict[str, str | None], rows: Sequence[dict[str, Any]]) -> str:
    """The fastest row of each work and size, for the docs."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        if row["tflops"] and row["seconds"]:
            key = row["name"].split(",")[0], row["size"], row["batch"]
            best[key] = min(best.get(key, row), row, key=lambda row: row["seconds"])
    parts = []
    for (work, size, batch), row in best.items():
        what = "a training step" if work == "training" else f"sampling with {STEPS} steps a block"
        share = f" ({row['mfu']:.0%} MFU)" if row["mfu"] else ""
        parts.append(f"{what} of {size} with {batch} images takes {row['seconds']:.3g} s, {row['tflops']:.3g} TFLOP/s{share}")
    return f"{card['card']}, driver {card['driver']}, torch {card['torch']}: {'; '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [size for size in SIZES if (_EXPERIMENTS / f"{size}.yaml").exists()]
    parser.add_argument("--size", choices=choices, nargs="+", default=["ffhq1024", "imagenet256"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8, help="no row starts later; 8 unless set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="also trace two steps of the first size, after the rows")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; take cpu")
    cuda = given.device == "cuda"
    card = Card(torch.device(given.device), torch.cuda.mem_get_info()[0] if cuda else 2**26)
    content: dict[str, Any] = {**card.describe(), "rows": []}

    def write(rows: list[dict[str, Any]]) -> None:
        content["rows"] = rows
        write_text(given.out, json.dumps(content, indent=1))
        print(as_table(rows[-1:])[-1], flush=True)

    measure_rows(cases(given.size, cuda), card, given.minutes, write)
    if content["rows"]:
        print("", *as_table(content["rows"]), "", sentence(content, content["rows"]), sep="\n")
    if given.trace:
        write_traces(given.size[0], card, given.trace)


if __name__ == "__main__":
    main()
