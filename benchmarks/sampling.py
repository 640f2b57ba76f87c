"""Sampling: ours against the released formulation, which recomputes the clean tower at every denoising step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import Baseline
from benchmarks.harness import header, options, parse, positive, report
from benchmarks.measure import Run, Setup, measure
from madformer.config import ModelConfig
from madformer.model.generation import generate
from madformer.model.madformer import MADFormer

Generation = Callable[[Any], Tensor]
"""A scheduler -> latents."""


class CountingScheduler(DDIMScheduler):  # type: ignore[misc]
    """Adds up the FLOPs of the network within denoising steps, from a step's input to its update."""

    counter: FlopCounterMode
    flops = start = 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """A step begins."""
        self.start = self.counter.get_total_flops()
        return super().scale_model_input(sample, timestep)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The network has answered."""
        self.flops += self.counter.get_total_flops() - self.start
        return super().step(*args, **kwargs)


def generations(model: MADFormer, batch: int, steps: int) -> dict[str, Generation]:
    """For each side, a generation of all blocks from the same noise."""
    c, device = model.config, model.boi_SD.device
    noise_BLCYX = torch.randn(batch, c.ar_length, c.latent_channels, c.block_size, c.block_size, device=device)
    baseline = Baseline(model)
    return {
        "ours": lambda scheduler: generate(model, scheduler, steps, initial_noise_BLCYX=noise_BLCYX),
        "recomputed": lambda scheduler: baseline.generate(scheduler, steps, noise_BLCYX),
    }


def sampling_runs(setup: Setup, batch: int, steps: int) -> dict[str, Run]:
    """The generations, in the precision asked for."""
    scheduler = DDIMScheduler(prediction_type=setup.config.prediction_type, clip_sample=False)

    def run(generation: Generation) -> None:
        with setup.autocast():
            generation(scheduler)

    model = MADFormer(setup.config).to(setup.device).eval()
    model.prepare_for_sampling(setup.dtype if setup.dtype != torch.float32 else None)
    return {name: functools.partial(run, generation) for name, generation in generations(model, batch, steps).items()}


def sampling_flops(config: ModelConfig, batch: int = 1) -> dict[str, tuple[int, int]]:
    """By side, FLOPs of a generation with one denoising step for each block, and of those steps alone."""
    with torch.device("meta"):
        model = MADFormer(replace(config, compile=False))
    counts = {}
    for name, generation in generations(model, batch, steps=1).items():
        scheduler = CountingScheduler(prediction_type=config.prediction_type, clip_sample=False)
        with FlopCounterMode(display=False) as scheduler.counter:
            generation(scheduler)
        counts[name] = scheduler.counter.get_total_flops(), scheduler.flops
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = options(__doc__, batch=4)
    parser.add_argument("--steps", type=positive, default=10, help="denoising steps of each block")
    given, setup = parse(parser, arguments)
    config = setup.config
    print(header(setup, f"batch {given.batch}, {given.steps} steps"), flush=True)
    counts = sampling_flops(config, given.batch)
    flops = {name: once + (given.steps - 1) * step for name, (once, step) in counts.items()}
    runs = sampling_runs(setup, given.batch, given.steps) if setup.runs else {}
    sides = measure(setup, runs, flops, given.repeats)
    print(report(setup, sides, tokens=given.batch * config.ar_length * config.block_tokens, unit="generation"))
    print(f"the denoising steps alone: {counts['recomputed'][1] / counts['ours'][1]:.3f} in FLOPs")


if __name__ == "__main__":
    main()
