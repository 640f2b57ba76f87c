"""Train a run: devices and strategy, resuming, stopping."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from madformer.config import ExperimentConfig, TrainerConfig, config_hash, write_config
from madformer.data.datamodule import LatentDataModule
from madformer.data.order import BatchShard
from madformer.errors import InputError, Interrupted
from madformer.evaluation.tensorboard import drop_orphans
from madformer.parallel import find_devices
from madformer.runs.checkpoints import TRAINED_BY, checkpoint_step, list_checkpoints, load_checkpoint, newest_intact
from madformer.runs.folder import claim_folder, drop_previews, is_run
from madformer.training.callbacks import Preview, RunCheckpoints, RunProgress, WholeFileIO
from madformer.training.module import LitMADFormer


def build_strategy(config: TrainerConfig, devices: int) -> Strategy | str:
    """Lightning's strategy for a Trainer on `devices` devices of each node."""
    world_size = devices * config.num_nodes
    if config.strategy == "fsdp":
        # One file with whole tensors: a checkpoint does not depend on the number of devices that wrote it.
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if config.strategy == "ddp" or world_size > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def train(config: ExperimentConfig, kind: type[LitMADFormer] = LitMADFormer) -> Path:
    """Train a run, from its newest intact checkpoint if it has one; a finished run is left alone.

    Args:
        kind: a class of one's own, with another loss. The configuration does not know of it, the checkpoints do.

    Returns:
        The run's folder.

    Raises:
        ConfigError: nothing to train on, or devices that are not there or cannot share the batch.
        InputError: another process trains this run, no checkpoint of it is intact, or they are of another class.
        NonFiniteError: the run has diverged.
        Interrupted: it was asked to stop.
    """
    run = config.run_dir
    _quieten()
    data = LatentDataModule(config)
    trainer, checkpoints = build_trainer(config)
    with claim_folder(run, "train", _rank()):
        checkpoint = _newest(config, kind)
        step = checkpoint_step(checkpoint) if checkpoint else 0
        if step >= config.trainer.max_steps:
            _say(f"{run}: trained already, {config.trainer.max_steps} steps")
            return run
        if _rank() == 0:
            if not is_run(run):
                write_config(config, run)
            drop_orphans(run, step)
            drop_previews(run, step)
        goal = f"{config.trainer.max_steps} steps (config hash {config_hash(config)})"
        _say(f"{run}: {f'resuming after step {step} of' if step else 'training'} {goal}")
        _fit(trainer, checkpoints, kind(config), data, checkpoint)
    _say(f"{run}: trained, {config.trainer.max_steps} steps")
    return run


def _fit(
    trainer: pl.Trainer, checkpoints: RunCheckpoints, module: LitMADFormer, data: LatentDataModule, checkpoint: Path | None
) -> None:
    """Train to the end.

    Raises:
        Interrupted: the run was asked to stop.
    """
    module.last_checkpoint = str(checkpoint) if checkpoint else None
    # Lightning raises its own exception after SIGTERM, when the state has been saved.
    with _stopping_on_signal(checkpoints) as received, suppress(SIGTERMException):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if checkpoints.stopped:
        raise Interrupted(data.config.run_dir, trainer.global_step, received[0] if received else signal.SIGTERM)


def build_trainer(config: ExperimentConfig) -> tuple[pl.Trainer, RunCheckpoints]:
    """Lightning's Trainer for an experiment, and its callback that saves and stops.

    Raises:
        ConfigError: devices that are not there, or that cannot share the batch equally.
    """
    settings = config.trainer
    devices = find_devices(settings)
    BatchShard.of(config.data.batch_size, config.data.batch_size_per_device, 0, len(devices) * settings.num_nodes)
    checkpoints = RunCheckpoints(config)
    trainer = pl.Trainer(
        accelerator=devices[0].split(":")[0],
        devices=len(devices),
        num_nodes=settings.num_nodes,
        strategy=build_strategy(settings, len(devices)),
        precision=settings.precision,
        max_steps=settings.max_steps,
        deterministic=settings.deterministic,
        callbacks=[Preview(config), RunProgress(config), checkpoints],
        plugins=[WholeFileIO(), *_slurm()],
        logger=RunLogger(save_dir=config.run_dir, name="", version=""),
        default_root_dir=config.run_dir,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer, checkpoints


def _slurm() -> list[SLURMEnvironment]:
    """Under srun its tasks are the processes. What Lightning saves before a time limit would win over later checkpoints."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class RunLogger(TensorBoardLogger):
    """Events beside the run's configuration, without Lightning's own hparams.yaml."""

    def save(self) -> None:
        """Put what was logged onto the disk."""
        self.experiment.flush()


def _quieten() -> None:
    """Leave out what Lightning says about itself; warnings that a user can act on stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for noise in (
        ".*LeafSpec.*deprecated",
        ".*does not have many workers.*",
        ".*`srun` command is available.*",
        ".*overridden `on_before_batch_transfer`.*",
        ".*FSDP2-wrapped module.*returned a view.*",
    ):
        warnings.filterwarnings("ignore", message=noise)


def _rank() -> int:
    """This process among those that Lightning, torchrun or Slurm started together."""
    return int(getattr(rank_zero_only, "rank", 0))


def _newest(config: ExperimentConfig, kind: type[LitMADFormer]) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        InputError: there are checkpoints and all of them are torn, or the newest one is of imported weights, or a class with
            another loss has made it.
    """
    checkpoint, every = newest_intact(config.run_dir), list_checkpoints(config.run_dir)
    if checkpoint is None and every:
        raise InputError(f"{config.run_dir}: none of its {len(every)} checkpoints is intact; delete them to start anew")
    if checkpoint is not None:
        saved, mine = load_checkpoint(checkpoint), kind.__qualname__
        if "optimizer_states" not in saved:
            raise InputError(f"{config.run_dir}: its weights are imported; they can be evaluated and sampled, not trained on")
        if (theirs := saved.get(TRAINED_BY, LitMADFormer.__qualname__)) != mine:
            raise InputError(f"{config.run_dir}: trained by {theirs}, not {mine}; go on with that, or name another run")
    return checkpoint


@contextmanager
def _stopping_on_signal(checkpoints: RunCheckpoints) -> Iterator[list[int]]:
    """Stop the run after the step that it is in on Ctrl-C, SIGTERM, and what Slurm sends before a time limit.

    A second Ctrl-C stops it at once. Yields what was received.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        checkpoints.stop_requested = True
        if len(received) == 1:  # Slurm may say so twice
            _say("stopping after this step; Ctrl-C stops at once, without saving")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
