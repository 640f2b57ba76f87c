"""Progress of a run: a bar on a terminal, plain lines in a log; both with a rate and the time that is left."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class RunProgress(Callback):
    """Shows how far a run is."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self._bar: Progress | None = None
        self._step = self._first_step = 0
        self._start = self._said = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._first_step = self._step = trainer.global_step
        self._start = self._said = time.monotonic()
        if trainer.is_global_zero and sys.stdout.isatty():
            rate, loss = TextColumn("{task.fields[rate]:.2f} steps/s"), TextColumn("loss {task.fields[loss]:.4f}")
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                rate,
                loss,
                TimeRemainingColumn(),
                console=Console(),
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=self.max_steps, completed=self._step, rate=0.0, loss=float("nan"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where the run is, not too often."""
        if trainer.global_step == self._step or not trainer.is_global_zero:
            return
        self._step, now = trainer.global_step, time.monotonic()
        interval = 0.2 if self._bar else SECONDS_BETWEEN_LINES
        if now - self._said < interval and self._step < self.max_steps:
            return
        self._said = now
        rate = (self._step - self._first_step) / (now - self._start)
        loss = float(trainer.callback_metrics["loss"])
        if self._bar:
            self._bar.update(self._task, completed=self._step, rate=rate, loss=loss)
        else:
            left = timedelta(seconds=round((self.max_steps - self._step) / rate))
            print(f"step {self._step}/{self.max_steps}  loss {loss:.4f}  {rate:.2f} steps/s  {left} left", flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._bar:
            self._bar.stop()
            self._bar = None
