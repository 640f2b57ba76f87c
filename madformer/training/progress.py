"""Progress of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from madformer.config import ExperimentConfig
from madformer.parallel import device_name
from madformer.progress import ProgressDisplay, ProgressFile
from madformer.run import progress_path


class RunProgress(Callback):
    """Shows how far a run is, and its loss."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self._display: ProgressDisplay | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        facts = {"devices": trainer.world_size, "device": device_name(trainer.strategy.root_device)}
        self._display = ProgressDisplay(
            "step",
            "steps",
            self.config.trainer.max_steps,
            done=trainer.global_step,
            silent=not trainer.is_global_zero,
            file=ProgressFile(progress_path(self.config.run_dir), facts),
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where the run is."""
        assert self._display is not None
        self._display.show(trainer.global_step, lambda: f"loss {float(trainer.callback_metrics['loss']):.4f}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._display:
            self._display.close()
            self._display = None
