"""Train a run: build the Trainer with its devices and strategy, resume, and stop on signals."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from madformer.config import ExperimentConfig, TrainerConfig, load_run, write_config
from madformer.config.identity import is_run, run_hash
from madformer.data.datamodule import LatentDataModule
from madformer.errors import InputError, Interrupted
from madformer.evaluation.feature_networks import require_fitting_networks
from madformer.evaluation.tensorboard import copy_events, drop_orphans
from madformer.model.memory import check_memory
from madformer.parallel import find_devices, limit_threads
from madformer.randomness import BatchShard
from madformer.runs.checkpoints import (
    DATA,
    TRAINED_BY,
    checkpoint_path,
    checkpoint_step,
    find_branch_point,
    list_checkpoints,
    load_checkpoint,
    newest_intact,
    require_own,
)
from madformer.runs.files import (
    STALE_SECONDS,
    atomic_write,
    claim_folder,
    copy_traces,
    drop_previews,
    link_or_copy,
    remove_stale,
)
from madformer.training.callbacks import AtomicCheckpointIO, Preview, Profile, RunCheckpoints, RunProgress
from madformer.training.logging import build_loggers, copy_rows, where_logged
from madformer.training.module import LitMADFormer

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def train(config: ExperimentConfig, module_class: type[LitMADFormer] = LitMADFormer, branch: Path | None = None) -> Path:
    """Train a run from its newest intact checkpoint, or from the start if it has none. A finished run stays as it is.

    Args:
        module_class: a custom class, for another loss. Checkpoints name it, the configuration does not.
        branch: a run that differs in `trainer.max_steps` alone; if this one has no checkpoint, it begins with that one's newest
            intact checkpoint before the decay of both.

    Returns:
        The run's folder.

    Raises:
        ConfigError: there is nothing to train on, a logger is not installed, or the devices are missing, too small, or cannot
            share the batch.
        InputError: another process trains this run, none of its checkpoints is intact, or they are of another class; or there
            is nothing to branch from.
        NonFiniteError: the run has diverged.
        Interrupted: a signal has stopped the run.
    """
    run = config.run_dir
    _silence_lightning()
    data = LatentDataModule(config)
    trainer, checkpoints = build_trainer(config)
    if _rank() == 0:
        require_fitting_networks(config, data.codec)
    with claim_folder(run, "train", _rank()):
        if _rank() == 0:
            remove_stale(run / "checkpoints")
            remove_stale(run / "samples", "preview-*")
            remove_stale(run, seconds=STALE_SECONDS)  # other commands write there too
        begins_as_branch = branch is not None and not list_checkpoints(run)
        if branch is not None and begins_as_branch and _rank() == 0:
            _begin_branch(config, module_class, branch)
        checkpoint = _newest_checkpoint(config, module_class, begins_as_branch)
        step = checkpoint_step(checkpoint) if checkpoint else 0
        if _rank() == 0 and (checkpoint is None or not is_run(run)):
            write_config(config, run)
        if checkpoint and step >= config.trainer.max_steps:
            data.load_state_dict(load_checkpoint(checkpoint)[DATA])  # fails if the images were replaced
            _print(f"{run}: trained already, {config.trainer.max_steps} steps")
            return run
        if _rank() == 0:
            drop_orphans(run, step)
            drop_previews(run, step)
            copy_rows(run, run, step)
        goal = f"{config.trainer.max_steps} steps (config hash {run_hash(config)})"
        origin = f"branching from {branch}" if begins_as_branch else "resuming"
        _print(f"{run}: {f'{origin} after step {step} of' if step else 'training'} {goal}")
        _print(f"  {data.summary}")
        _fit(trainer, checkpoints, module_class(config), data, checkpoint)
    _print("\n".join([f"{run}: trained, {config.trainer.max_steps} steps", f"  {data.summary}", *where_logged(config)]))
    return run


def _begin_branch(config: ExperimentConfig, module_class: type[LitMADFormer], trunk: Path) -> None:
    """Copy what a run wrote up to the step where this one branches off. Its checkpoint comes last: before, nothing has begun.

    Raises:
        InputError: there is no such checkpoint, or another class has trained it.
    """
    run, source = config.run_dir, find_branch_point(config, trunk)
    step = checkpoint_step(source)
    _require_trainable(checkpoint := load_checkpoint(source), trunk, module_class)
    require_own(checkpoint, source, load_run(trunk))
    try:
        with atomic_write(checkpoint_path(run, step)) as temporary:
            link_or_copy(source, temporary)  # ours from now on, though the other run may remove its own
            copy_events(trunk, run, step)
            drop_previews(run, 0)
            copy_traces(trunk, run, step)
            copy_rows(trunk, run, step)
            write_config(config, run, {"step": step, "run": str(trunk)})
    except FileNotFoundError:
        if source.is_file():
            raise
        _begin_branch(config, module_class, trunk)  # it was removed meanwhile


def _newest_checkpoint(
    config: ExperimentConfig, module_class: type[LitMADFormer], begins_as_branch: bool = False
) -> Path | None:
    """The checkpoint to resume from. The first process's choice goes for all (`AtomicCheckpointIO`); it looks at checksums.

    Raises:
        InputError: all checkpoints are torn, or the newest one holds imported weights, or another class or configuration has
            trained it.
    """
    run, first = config.run_dir, _rank() == 0
    if begins_as_branch and not first:
        return checkpoint_path(run, 0)  # whichever: the first process may not have chosen yet
    path = newest_intact(run, checksums=first)
    if path and not first and checkpoint_step(path) >= config.trainer.max_steps:
        path = newest_intact(run)  # to end here without the first process would leave it waiting
    if path is None and (checkpoints := list_checkpoints(run)):
        raise InputError(f"{run}: none of its {len(checkpoints)} checkpoints is intact; delete them to start anew")
    if path is not None:
        _require_trainable(checkpoint := load_checkpoint(path), run, module_class)
        require_own(checkpoint, path, config)
    return path


def _require_trainable(checkpoint: dict[str, Any], run: Path, module_class: type[LitMADFormer]) -> None:
    """Refuse a checkpoint of imported weights, or of another class."""
    name = module_class.__qualname__
    if "optimizer_states" not in checkpoint:
        raise InputError(f"{run}: its weights are imported; they can be evaluated and sampled, not trained on")
    if (trainer := checkpoint.get(TRAINED_BY, LitMADFormer.__qualname__)) != name:
        raise InputError(f"{run}: trained by {trainer}, not {name}; go on with that, or name another run")


def _fit(
    trainer: pl.Trainer, checkpoints: RunCheckpoints, module: LitMADFormer, data: LatentDataModule, checkpoint: Path | None
) -> None:
    """Train to the last step.

    Raises:
        Interrupted: a signal has stopped the run.
    """
    module.last_checkpoint = str(checkpoint) if checkpoint else None
    with _stop_on_signals(checkpoints) as signals:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if checkpoints.stopped:
        raise Interrupted(data.config.run_dir, trainer.global_step, signals[0] if signals else signal.SIGTERM)


@contextmanager
def _stop_on_signals(checkpoints: RunCheckpoints) -> Iterator[list[int]]:
    """Stop the run after its current step on Ctrl-C, SIGTERM, and Slurm's signals before a time limit.

    A second Ctrl-C stops it at once. Yields the list of signals that arrive.
    """
    signals: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signals.append(number)
        checkpoints.stop_requested = True
        if len(signals) == 1:  # Slurm may send it twice
            _print("stopping after this step; Ctrl-C stops at once, without saving")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    handlers = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def build_trainer(config: ExperimentConfig) -> tuple[pl.Trainer, RunCheckpoints]:
    """Lightning's Trainer for an experiment, and its callback that saves and stops.

    Raises:
        ConfigError: the devices are missing, have too little memory, or cannot share the batch equally; or a logger is not
            installed.
    """
    settings = config.trainer
    devices = find_devices(settings)
    limit_threads(settings, devices[:1])  # Lightning starts a process for each device
    BatchShard.of(config.data.batch_size, config.data.batch_size_per_device, 0, len(devices) * settings.num_nodes)
    if devices[0] != "cpu":
        card = min(map(torch.cuda.get_device_properties, devices), key=lambda properties: properties.total_memory)
        if warning := check_memory(config, len(devices) * settings.num_nodes, card.total_memory, card.name):
            _print(f"warning: {warning}")
    checkpoints = RunCheckpoints(config)
    trainer = pl.Trainer(
        accelerator=devices[0].split(":")[0],
        devices=len(devices),
        num_nodes=settings.num_nodes,
        strategy=build_strategy(settings, len(devices)),
        precision=settings.precision,
        max_steps=settings.max_steps,
        deterministic=settings.deterministic,
        benchmark=devices[0] != "cpu" and not settings.deterministic,
        callbacks=[Preview(config), Profile(config), RunProgress(config), checkpoints],
        plugins=[AtomicCheckpointIO(), *_slurm()],
        logger=build_loggers(config),
        default_root_dir=config.run_dir,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # Signals are `_stop_on_signals`'s. Lightning would have processes wait for the first one's before every micro-batch.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer, checkpoints


def build_strategy(config: TrainerConfig, devices: int) -> Strategy | str:
    """Lightning's strategy for a Trainer on `devices` devices of each node."""
    world_size = devices * config.num_nodes
    if config.strategy == "fsdp":
        # One file with whole tensors: a checkpoint does not depend on the number of devices that wrote it.
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if config.strategy == "ddp" or world_size > 1:
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def _slurm() -> list[SLURMEnvironment]:
    """Under srun, Slurm's tasks are the processes. Lightning's own save at a time limit would win over later checkpoints."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _silence_lightning() -> None:
    """Drop Lightning's messages about itself; warnings that a user can act on stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*deprecated",
        ".*does not have many workers.*",
        ".*`srun` command is available.*",
        ".*overridden `on_before_batch_transfer`.*",
        ".*FSDP2-wrapped module.*returned a view.*",
        ".*Grad strides do not match bucket view strides.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _rank() -> int:
    """The rank of this process among those that Lightning, torchrun or Slurm started together."""
    return int(getattr(rank_zero_only, "rank", 0))


@rank_zero_only
def _print(line: str) -> None:
    print(line, flush=True)
