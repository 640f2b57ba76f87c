"""Callbacks of a training run: checkpoints, previews, progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from madformer.config import ExperimentConfig
from madformer.data.codec import save_png, to_grid
from madformer.evaluation.feature_networks import FeatureNetwork, build_feature_networks
from madformer.evaluation.measurement import Sampling, metric_name
from madformer.evaluation.metrics import FrechetDistance
from madformer.evaluation.reference import find_reference
from madformer.evaluation.sampling import default_prompts, sample_batches
from madformer.parallel import device_name
from madformer.progress import ProgressDisplay, ProgressFile
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints, load_checkpoint, save_checkpoint
from madformer.runs.files import append_preview, progress_path
from madformer.training.module import LitMADFormer

_log = logging.getLogger(__name__)


STOP_INTERVAL = 10
"""Steps between two looks of several processes on accelerators at whether one was asked to stop: each waits for the devices."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written by `save_checkpoint`, read from the file's memory: processes of one machine share it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """The checkpoint that the first process has chosen; it alone has looked at checksums."""
        choice = [path]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(choice)
        return load_checkpoint(Path(choice[0]))


class RunCheckpoints(Checkpoint):
    """A checkpoint every `trainer.checkpoint_every` steps, at `trainer.checkpoint_steps`, at the end, and on request.

    The last `trainer.keep_checkpoints` regular ones stay, those of `trainer.checkpoint_steps`, and the newest: a checkpoint of
    a stop displaces no regular one.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.stop_requested = False
        """Set it at any time: the run saves its state after the current step, and stops."""
        self.stopped = False
        """Whether the run has stopped on request."""
        self._last_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """There is nothing to save before the first step."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the state if a checkpoint is due after this step."""
        step, settings = trainer.global_step, self.config.trainer
        if step == self._last_step:
            return  # in the middle of accumulation
        assert isinstance(pl_module, LitMADFormer)
        self._last_step = step
        due = settings.saves_regularly(step) or step in settings.checkpoint_steps
        stop = self.stop_requested
        if trainer.world_size > 1:
            agree = due or step % STOP_INTERVAL == 0 or not pl_module.runs_ahead
            stop = agree and trainer.strategy.reduce_boolean_decision(stop, all=False)
        if due or stop:
            self._save(trainer, pl_module, step)
        if stop:
            self.stopped = trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, pl_module: LitMADFormer, step: int) -> None:
        path = checkpoint_path(self.config.run_dir, step)
        with pl_module.throughput.pause():
            for logger in trainer.loggers:  # a checkpoint's log must be on the disk before the checkpoint is
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.flush()
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            self._remove_old()
        pl_module.last_checkpoint = str(path)

    def _remove_old(self) -> None:
        settings, checkpoints = self.config.trainer, list_checkpoints(self.config.run_dir)
        steps = {checkpoint_step(path): path for path in checkpoints}
        regular = [path for step, path in steps.items() if settings.saves_regularly(step)]
        kept = [path for step, path in steps.items() if step in settings.checkpoint_steps]
        for path in set(checkpoints) - {*regular[-settings.keep_checkpoints :], *kept, checkpoints[-1]}:
            path.unlink()


class Preview(Callback):
    """A grid of samples and quick distances, of the averaged weights, every `evaluation.preview_every` steps.

    Every device samples its share. Training does not change: samples have their own generators.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self._distances: list[tuple[FeatureNetwork, FrechetDistance]] = []
        self._previewed_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step that a run resumes from: its preview came before its checkpoint. Find the references."""
        self._previewed_step = trainer.global_step
        if self.config.evaluation.preview_every:
            self._distances = list(self._find_distances(trainer))

    def _find_distances(self, trainer: pl.Trainer) -> Iterator[tuple[FeatureNetwork, FrechetDistance]]:
        data, device = trainer.datamodule, trainer.strategy.root_device  # type: ignore[attr-defined]
        size = self.config.model.latent_size * data.codec.downsampling
        for network in build_feature_networks(self.config.evaluation.feature_networks, device):
            reference = find_reference(network, self.config, size, data.source_sha256)
            yield network, FrechetDistance(reference.moments, device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample if a preview is due after this step."""
        interval, step = self.config.evaluation.preview_every, trainer.global_step
        if interval and step % interval == 0 and step != self._previewed_step:
            self._previewed_step = step
            assert isinstance(pl_module, LitMADFormer)
            with pl_module.throughput.pause():
                images_BCYX = self._sample(trainer, pl_module)
                values = self._measure(trainer, step, images_BCYX)
                if trainer.is_global_zero:
                    self._show(trainer, step, images_BCYX, values)

    def _sample(self, trainer: pl.Trainer, module: LitMADFormer) -> Tensor:
        """This device's share of the samples, as many on every device: sharded models gather their weights together."""
        evaluation = self.config.evaluation
        share = max(2, evaluation.preview_samples // trainer.world_size)
        indices = range(trainer.global_rank * share, (trainer.global_rank + 1) * share)
        sampling = Sampling.of_nfe(self.config, evaluation.preview_nfe)
        data = trainer.datamodule  # type: ignore[attr-defined]
        prompts = default_prompts(data.class_prompts, indices) if self.config.model.text else None
        text_BT = data.tokenizer(prompts) if prompts else None
        # Compiling for these few samples takes minutes.
        eager = torch.compiler.set_stance("force_eager") if module.runs_ahead else nullcontext()
        with module.sampling_weights() as model, eager:
            batches = sample_batches(model, self.config, sampling, indices, text_BT)
            return torch.cat([data.codec.to(batch.device).decode(batch).cpu() for batch in batches])

    def _measure(self, trainer: pl.Trainer, step: int, images_BCYX: Tensor) -> dict[str, float]:
        # All devices must decide alike: a device that measures waits for the others.
        if not trainer.strategy.reduce_boolean_decision(bool(images_BCYX.isfinite().all()), all=True):
            _log.warning("preview at step %d: samples hold NaN or infinity, there is no distance", step)
            return {}
        values = {}
        for network, distance in self._distances:
            distance.reset()
            for batch_BCYX in images_BCYX.split(self.config.evaluation.batch_size):
                distance.update(network(batch_BCYX).features_BD)
            values[metric_name("fd", network.label)] = distance.compute()
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _show(self, trainer: pl.Trainer, step: int, images_BCYX: Tensor, values: dict[str, float]) -> None:
        if values:
            append_preview(self.config.run_dir, step, values)
        grid = to_grid(images_BCYX[:64])
        save_png(grid, self.config.run_dir / "samples" / f"preview-{step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_metrics({f"preview/{metric}": value for metric, value in values.items()}, step)
                logger.experiment.add_image("preview/samples", grid, step, dataformats="HWC")


class RunProgress(Callback):
    """The step that a run has reached, and its loss, in the terminal and in `progress.json`."""

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
        """Show the step."""
        assert self._display is not None
        # One device's loss is not the batch's, and collecting the others' would mean waiting: show the last logged loss.
        loss: Any = pl_module.last_loss if trainer.world_size == 1 else pl_module.mean_loss
        self._display.show(trainer.global_step, lambda: "" if loss is None else f"loss {float(loss):.4f}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the terminal, also after an error."""
        if self._display:
            self._display.close()
            self._display = None


class Profile(Callback):
    """With `trainer.profile` a trace of steps 11 to 15 of this process, once caches and compiled kernels are warm."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self._profiler: torch.profiler.profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the steps."""
        self._first = trainer.global_step + 10

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start before the first of the steps."""
        wanted = self.config.trainer.profile and trainer.is_global_zero
        if wanted and trainer.global_step == self._first and self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the trace after the last of the steps, or of the run."""
        settings = self.config.trainer
        if self._profiler and trainer.global_step >= min(self._first + 5, settings.max_steps):
            path = self.config.run_dir / "profile" / f"step-{trainer.global_step:08d}.json.gz"
            path.parent.mkdir(exist_ok=True)
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(path))
            steps = f"{self._first + 1} to {trainer.global_step}"
            self._profiler, self._first = None, -1
            print(f"{path}: a trace of steps {steps}; open it in https://ui.perfetto.dev", flush=True)
