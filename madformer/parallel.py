"""The same work on several devices: processes of this machine, or those that torchrun or Slurm started."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from madformer.config import ConfigError, TrainerConfig
from madformer.progress import ProgressDisplay

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Share:
    """One process among those that share some work."""

    rank: int
    world_size: int
    device: str
    count: Callable[[int], None]
    """To be told, often, how much this process has done; raises `StoppedError` when nobody wants the rest."""


Work = Callable[..., None]
"""Called with a `Share` and further arguments; a function of a module, so that another process finds it."""


class StoppedError(RuntimeError):
    """The work is not wanted any more: another process has failed, or the program that started this one has ended."""


def find_devices(settings: TrainerConfig) -> list[str]:
    """The devices of this machine that an experiment uses, by name; on the CPU one entry for each process.

    Raises:
        ConfigError: devices that are not there.
    """
    there = torch.cuda.device_count()
    if settings.accelerator == "cuda" and not there:
        raise ConfigError("trainer.accelerator = 'cuda': there is no CUDA device; set it to auto or cpu")
    if not there or settings.accelerator == "cpu":
        return ["cpu"] * (settings.devices or 1)
    if (settings.devices or 0) > there:
        raise ConfigError(f"trainer.devices = {settings.devices}: there are {there} CUDA devices")
    return [f"cuda:{index}" for index in range(settings.devices or there)]


def share_out(work: Work, arguments: tuple[Any, ...], devices: list[str], display: ProgressDisplay, before: int = 0) -> None:
    """Do the work on all devices and wait for it; on a single one in this process.

    Under torchrun or Slurm every process does one share and waits for no other.

    Args:
        work: called with (share, *arguments).
        before: what was done earlier, shown as part of the progress.

    Raises:
        Exception: the first one that a process met; the others are stopped.
    """
    cluster = _cluster()
    if cluster is not None or len(devices) == 1:
        rank, world_size, local = (cluster.global_rank(), cluster.world_size(), cluster.local_rank()) if cluster else (0, 1, 0)
        work(Share(rank, world_size, devices[local % len(devices)], lambda done: display.show(before + done)), *arguments)
    else:
        _start_processes(work, arguments, devices, display, before)


def cluster_rank() -> int | None:
    """This process among those that torchrun or Slurm started; None: they did not."""
    cluster = _cluster()
    return cluster.global_rank() if cluster else None


def _cluster() -> ClusterEnvironment | None:
    return next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)


def _start_processes(work: Work, arguments: tuple[Any, ...], devices: list[str], display: ProgressDisplay, before: int) -> None:
    context = multiprocessing.get_context("spawn")
    common = _Common(context.Array("q", len(devices), lock=False), context.Event())
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), context, _enter, (common, threads)) as pool:
        futures = [pool.submit(_work, rank, devices, work, arguments) for rank in range(len(devices))]
        try:
            while wait(futures, timeout=SECONDS_BETWEEN_LOOKS).not_done:
                display.show(before + sum(common.counts))
                if any(future.done() and future.exception() for future in futures):
                    break
        finally:
            common.stop.set()  # without effect on those that have ended
        errors = [error for future in futures if (error := future.exception()) and not isinstance(error, StoppedError)]
    display.show(before + sum(common.counts))
    if errors and isinstance(errors[0], BrokenProcessPool):
        raise RuntimeError("a process was killed, perhaps for want of memory; the same command goes on") from errors[0]
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class _Common:
    """What the processes have in common."""

    counts: Any
    stop: Any


_common: _Common
"""In a process that `share_out` started: such things are inherited, they cannot be sent."""


def _enter(common: _Common, threads: int) -> None:
    global _common
    _common = common
    torch.set_num_threads(threads)


def _work(rank: int, devices: list[str], work: Work, arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()

    def count(done: int) -> None:
        _common.counts[rank] = done
        if _common.stop.is_set() or (parent is not None and not parent.is_alive()):
            raise StoppedError

    work(Share(rank, len(devices), devices[rank], count), *arguments)
