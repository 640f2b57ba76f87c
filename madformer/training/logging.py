"""Scalars of a training step for the log: losses, as means over micro-batches and devices, and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from madformer.config import ExperimentConfig, wanted_outputs
from madformer.diffusion.losses import Losses
from madformer.model import cost
from madformer.parallel import device_name, peak_flops

Window = Sequence[tuple[Losses, Tensor]]
"""The micro-batches of a step: losses, and the timesteps of the noisy blocks [B * k, L]."""

Reduce = Callable[..., Any]
"""A strategy's mean or sum over devices."""

QUARTERS = 4
"""Parts of the noise schedule that have a loss of their own in the log."""


def mean_terms(window: Window, reduce: Reduce) -> dict[str, float]:
    """`loss/total` and each unweighted term, as `loss/image`."""
    batches = [{"total": losses.total.detach(), **losses.terms} for losses, _ in window]
    names = list(batches[0])
    values = torch.stack([torch.stack([terms[name].detach().float() for name in names]) for terms in batches]).mean(dim=0)
    return {f"loss/{name}": value for name, value in zip(names, reduce(values, reduce_op="mean").tolist(), strict=True)}


def block_losses(window: Window, config: ExperimentConfig, reduce: Reduce) -> dict[str, float]:
    """The image loss by quarter of the noise schedule (`loss_t/0`: least noise) and by block (`loss_block/0`: the first)."""
    image_BL = torch.cat([losses.image_BL for losses, _ in window]).double()
    t_BL = torch.cat([t for _, t in window])
    quarter_BL = t_BL * QUARTERS // config.diffusion.train_timesteps
    block_BL = torch.arange(t_BL.shape[1], device=t_BL.device).expand_as(t_BL)
    values: dict[str, float] = {}
    for prefix, group_BL, count in (("loss_t", quarter_BL, QUARTERS), ("loss_block", block_BL, t_BL.shape[1])):
        sums = torch.zeros(2, count, dtype=torch.float64, device=t_BL.device)
        sums[0].index_add_(0, group_BL.flatten(), image_BL.flatten())
        sums[1].index_add_(0, group_BL.flatten(), torch.ones_like(image_BL).flatten())
        totals, counts = reduce(sums, reduce_op="sum").tolist()
        values |= {f"{prefix}/{i}": totals[i] / counts[i] for i in range(count) if counts[i]}
    return values


class Throughput:
    """Speed between two logged steps, without the time of previews and checkpoints."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.batch_size = config.data.batch_size
        outputs = wanted_outputs(config.loss)
        self._flops_per_image = cost.training_flops(config.model, outputs, config.diffusion.draws_per_image)
        self._precision = config.trainer.precision
        self.start()

    def start(self) -> None:
        """Start measuring anew."""
        self._start_time, self._steps = time.perf_counter(), 0

    def count_step(self) -> None:
        """Count one step of the optimiser."""
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time of the block."""
        pause_time = time.perf_counter()
        yield
        self._start_time += time.perf_counter() - pause_time

    def measure(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Images per second, TFLOP/s of one device, and its share of the device's peak where that is known.

        Model FLOPs utilisation (`mfu`, PaLM's) leaves out what activation checkpointing computes again; with it there is
        `hfu` too, which is of all FLOPs.
        """
        rate = self._steps * self.batch_size / max(time.perf_counter() - self._start_time, 1e-9)
        self.start()
        flops, own = self._flops_per_image, rate / world_size
        values = {"speed/images_per_second": rate, "speed/tflops_per_device": own * flops.total / 1e12}
        if peak := peak_flops(device_name(device), self._precision):
            values["speed/mfu"] = own * flops.model_flops / peak
            if flops.recomputation:
                values["speed/hfu"] = own * flops.total / peak
        return values
