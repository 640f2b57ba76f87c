"""The configuration of training: optimiser and trainer. Defaults are the paper's FFHQ-1024 run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from madformer.config.validation import require, require_at_least, require_types, setting

LOGGERS = ("tensorboard", "csv", "wandb")
"""What can be in `trainer.loggers`."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, the learning rate schedule (warm-up, stable, decay), clipping, and the moving average of the weights."""

    lr: float = 3e-4
    """Learning rate between warm-up and decay."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    weight_decay: float = 0.05
    """Decoupled weight decay. Norms, biases and embeddings have none."""
    warmup_fraction: float = 0.01
    """Fraction of all steps, at the start, over which the learning rate rises linearly."""
    warmup_steps: int | None = setting(None, neutral=None)
    """Length of the warm-up in steps, instead of `warmup_fraction`. Runs that differ only in `trainer.max_steps` then share
    their steps before the decay. null: `warmup_fraction` counts."""
    decay_fraction: float = 0.15
    """Fraction of all steps, at the end, over which the learning rate falls exponentially."""
    decay_halvings: float = 6.0
    """Number of halvings of the learning rate during the decay: its factor is 0.5 ** (decay_halvings * progress)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient. A larger gradient is scaled down to this norm."""
    ema_decay: float = 0.9999
    """Decay of the moving average. It is warmed up: after t updates it is at most (1 + t) / (10 + t)."""

    def __post_init__(self) -> None:
        require_types("optimizer", self)
        for name in ("lr", "weight_decay", "decay_halvings", "grad_clip"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"optimizer.{name}", value, "must be a finite number of at least 0")
        for name in ("lr", "grad_clip"):
            require(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "must be above 0")
        legal = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(legal, "optimizer.betas", list(self.betas), "must be two numbers of at least 0 and below 1")
        for name in ("warmup_fraction", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}", value, "must be between 0 and 1")
        if self.warmup_steps is not None:
            require_at_least(0, "optimizer", self, "warmup_steps")
        legal = self.warmup_steps is not None or self.warmup_fraction + self.decay_fraction <= 1
        remedy = f"together with optimizer.warmup_fraction = {self.warmup_fraction} it must not exceed 1"
        require(legal, "optimizer.decay_fraction", self.decay_fraction, remedy)
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "must be at least 0 and below 1")


@dataclass(frozen=True)
class TrainerConfig:
    """Training length, precision, devices, and how often to save and log."""

    max_steps: int = 210_000
    """Number of optimiser steps of the whole run. The learning rate schedule depends on it."""
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    """32-true: float32; bf16-mixed: bfloat16 autocast with float32 weights."""
    accelerator: Literal["auto", "cpu", "cuda"] = setting("auto", new_run=False)
    """Kind of device; auto: CUDA if there is a GPU, else the CPU."""
    devices: int | None = setting(None, new_run=False)
    """Number of devices on each machine; null: all of them (on the CPU: one process)."""
    threads: int | None = setting(None, new_run=False)
    """Threads of each process that computes on the CPU; null: one for each core. A tiny model is fastest with 1."""
    num_nodes: int = setting(1, new_run=False)
    """Number of machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = setting("auto", new_run=False)
    """auto: one device, or DDP on several; fsdp: shard weights, gradients and optimiser state over all devices."""
    deterministic: bool = setting(False, new_run=False)
    """Whether to use only deterministic algorithms, so that two runs are equal bit for bit on CUDA too."""
    checkpoint_every: int = setting(10_000, new_run=False)
    """Number of steps between checkpoints."""
    checkpoint_steps: tuple[int, ...] = setting((), new_run=False)
    """Further steps at which a checkpoint is saved and kept, for branches of this run to begin from."""
    keep_checkpoints: int = setting(5, new_run=False)
    """Number of checkpoints to keep, the newest ones."""
    log_every: int = setting(50, new_run=False)
    """Number of steps between logged values."""
    loggers: tuple[str, ...] = setting(("tensorboard",), new_run=False)
    """Where the scalars of training go, of `tensorboard`, `csv` (`RUN/metrics.csv`) and `wandb` (Weights & Biases). Previews,
    samples and curves of evaluations are TensorBoard's alone."""
    profile: bool = setting(False, new_run=False)
    """Whether to write a trace of steps 11 to 15 after each start to `RUN/profile/`. Perfetto shows where their time goes."""

    def __post_init__(self) -> None:
        require_types("trainer", self)
        positive = ("max_steps", "num_nodes", "checkpoint_every", "keep_checkpoints", "log_every")
        require_at_least(1, "trainer", self, *positive)
        for name in ("devices", "threads"):
            if getattr(self, name) is not None:
                require_at_least(1, "trainer", self, name)
        legal = all(step >= 1 for step in self.checkpoint_steps)
        require(legal, "trainer.checkpoint_steps", list(self.checkpoint_steps), "must be integers of at least 1")
        legal = set(self.loggers) <= set(LOGGERS) and len(set(self.loggers)) == len(self.loggers)
        require(legal, "trainer.loggers", list(self.loggers), f"must be some of {', '.join(LOGGERS)}, each once")

    def saves_regularly(self, step: int) -> bool:
        """Whether a checkpoint is saved after this step even without `checkpoint_steps`."""
        return step % self.checkpoint_every == 0 or step >= self.max_steps


def decay_start(optimizer: OptimizerConfig, max_steps: int) -> int:
    """The last step after which a run still has the state of longer runs, which differ only in `max_steps`.

    The state includes the learning rate of the next step, so that rate is not lowered yet either (`wsd_factor`).
    """
    return math.floor(max_steps - optimizer.decay_fraction * max_steps)
