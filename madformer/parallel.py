"""The same work on several devices: processes of this machine, or those that torchrun or Slurm started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from madformer.config import TrainerConfig
from madformer.errors import ConfigError, ProcessKilledError, StoppedError
from madformer.progress import ProgressDisplay

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

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


def device_name(device: torch.device) -> str:
    """What kind of device it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def share_out(work: Work, arguments: tuple[Any, ...], devices: list[str], display: ProgressDisplay, before: int = 0) -> None:
    """Do the work on all devices and wait for it; on a single one in this process.

    Under torchrun or Slurm every process does one share and waits for no other.

    Args:
        work: called with (share, *arguments).
        before: what was done earlier, shown as part of the progress.

    Raises:
        Exception: what a process met; the others are stopped.
        ProcessKilledError: a process was killed; the others are ended.
    """
    cluster = _cluster()
    if cluster is not None or len(devices) == 1:
        rank, world_size = (cluster.global_rank(), cluster.world_size()) if cluster else (0, 1)
        # The others' progress is not known here: they will be about as far.
        work(Share(rank, world_size, own_device(devices), lambda done: display.show(before + done * world_size)), *arguments)
    else:
        _start_processes(work, arguments, devices, display, before)


def cluster_rank() -> int | None:
    """This process among those that torchrun or Slurm started; None: they did not."""
    cluster = _cluster()
    return cluster.global_rank() if cluster else None


def own_device(devices: list[str]) -> str:
    """The device of this process."""
    cluster = _cluster()
    return devices[cluster.local_rank() % len(devices)] if cluster else devices[0]


def _cluster() -> ClusterEnvironment | None:
    """What started this process together with others; a lone one may use all devices."""
    by_torchrun = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    by_srun = os.environ.get("SLURM_STEP_ID", "").isdigit()  # a batch script is told of tasks that it has not started
    if not by_torchrun and not by_srun:
        return None
    # Seconds, which a process without others does not spend.
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds: list[type[ClusterEnvironment]] = [TorchElasticEnvironment]
    if by_srun:
        kinds.append(SLURMEnvironment)
    found = (kind() for kind in kinds if kind.detect())
    return next((cluster for cluster in found if cluster.world_size() > 1), None)


def _start_processes(work: Work, arguments: tuple[Any, ...], devices: list[str], display: ProgressDisplay, before: int) -> None:
    context = multiprocessing.get_context("spawn")
    common = _Common(context.RawArray("q", len(devices)), context.RawValue("b", 0))
    threads = max(1, torch.get_num_threads() // len(devices))
    processes, receivers = [], []
    resource_tracker.ensure_running()  # it would let interrupts through
    with _interrupts_held():  # until the processes can deal with one, see `_work`
        for rank in range(len(devices)):
            receiver, sender = context.Pipe(duplex=False)
            given = (common, threads, rank, devices, sender, work, arguments)
            processes.append(context.Process(target=_work, args=given, daemon=True))
            processes[-1].start()
            receivers.append(receiver)
            sender.close()  # this end of it: what the process does not send is then an end, not a wait
    try:
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            wait(alive, timeout=SECONDS_BETWEEN_LOOKS)
            display.show(before + sum(common.counts))
            if any(process.exitcode for process in processes):
                break
    finally:
        common.stop.value = 1  # without effect on those that have ended
        for process in processes:
            process.join()
    display.show(before + sum(common.counts))
    for receiver in receivers:
        with contextlib.suppress(EOFError):  # it had nothing to say
            if not isinstance(error := receiver.recv(), StoppedError):
                raise error
    if any(process.exitcode for process in processes):
        message = "a process was killed, perhaps for want of memory; what was complete is kept, the same command goes on"
        raise ProcessKilledError(message)


@dataclass(frozen=True)
class _Common:
    """What the processes have in common, without locks: one that is killed would hold them for ever."""

    counts: Any
    stop: Any


def _work(
    common: _Common,
    threads: int,
    rank: int,
    devices: list[str],
    sender: Connection,
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    """One of the processes: its share, and what became of it."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(done: int) -> None:
        common.counts[rank] = done
        if common.stop.value:
            raise StoppedError

    # Ctrl-C reaches every process of a terminal. It would end one that starts with a traceback; the parent says what is to say.
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work(Share(rank, len(devices), devices[rank], count), *arguments)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        sender.send(error)
        sys.exit(1)


def _end_with_parent() -> None:
    """Without it, a process whose parent was killed would work on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started meanwhile hold Ctrl-C back as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
