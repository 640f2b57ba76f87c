"""The training stream as a LightningDataModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from madformer.config import ConfigError, ExperimentConfig
from madformer.data.digits import load_digits
from madformer.data.order import KeyedBatches, Portion, SampleOrder


class LatentDataModule(pl.LightningDataModule):
    """Endless batches of latents, resumed by the step alone.

    A batch is `{"latents": [B, C, h, w] float32, "keys": [B, 2] int64}`; a key is (step, index in the global batch), from
    which training draws the sample's noise. Gradient accumulation is set on the Trainer so that every optimiser step sees
    `data.batch_size` images, on any number of devices.

    Raises:
        ConfigError: the experiment names no data.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        if config.data.source is None:
            raise ConfigError("data.source = null: nothing to train on; the source that is there: digits")
        self.config = config
        self._images_NCYX = load_digits()[0]

    def setup(self, stage: str) -> None:
        """Share the batch out among the devices.

        Raises:
            ConfigError: the devices cannot share the batch equally.
        """
        if self.trainer is None:
            return
        data = self.config.data
        self._portion = Portion.of(
            data.batch_size, data.batch_size_per_device, self.trainer.global_rank, self.trainer.world_size
        )
        self.trainer.accumulate_grad_batches = self._portion.accumulation

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches from the trainer's step on. Lightning asks after it has restored a checkpoint."""
        assert self.trainer is not None
        order = SampleOrder(len(self._images_NCYX), self.config.data.batch_size, self.config.seed)
        batches = KeyedBatches(order, self._portion, self.trainer.global_step)
        dataset = _Keyed(self._images_NCYX)
        pinned = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(dataset, batch_sampler=batches, pin_memory=pinned)  # type: ignore[arg-type]


class _Keyed(Dataset[dict[str, Tensor]]):
    """Samples with the key that their noise is drawn from."""

    def __init__(self, latents_NChw: Tensor) -> None:
        self._latents_NChw = latents_NChw

    def __getitem__(self, place: Any) -> dict[str, Tensor]:
        step, index, sample = place
        return {"latents": self._latents_NChw[sample], "keys": torch.tensor([step, index])}
