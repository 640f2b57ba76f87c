"""Share work among devices: in processes of this machine, or in those that torchrun or Slurm started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Literal

from madformer.config import TrainerConfig
from madformer.errors import ConfigError, ProcessKilledError, StoppedError
from madformer.progress import ProgressDisplay

if TYPE_CHECKING:
    import torch
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

_POLL_SECONDS = 0.2

PEAK_TFLOPS = {
    "A100": (312, 19.5),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "GH200": (989, 67),
    "B200": (2250, 80),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "A40": (149.7, 37.4),
    "RTX 4090": (165, 82.6),
}
"""Words in a GPU's name -> dense TFLOP/s in bfloat16, and in float32 without TF32, by NVIDIA's data sheets. The first that
fits counts."""


@dataclass(frozen=True)
class Share:
    """One process's share of some work."""

    rank: int
    world_size: int
    device: str
    count: Callable[[int], None]
    """Call it often with how much this process has done so far. It raises `StoppedError` when the work must end."""


Work = Callable[..., None]
"""A function called with a `Share` and further arguments. It is a module's, so that other processes can import it."""


def find_devices(settings: TrainerConfig) -> list[str]:
    """Names of this machine's devices that an experiment uses. On the CPU there is one entry for each process.

    Raises:
        ConfigError: there are fewer devices than the experiment sets.
    """
    import torch

    count = torch.cuda.device_count()
    if settings.accelerator == "cuda" and not count:
        raise ConfigError("trainer.accelerator = 'cuda': there is no CUDA device; set it to auto or cpu")
    if not count or settings.accelerator == "cpu":
        return ["cpu"] * (settings.devices or 1)
    if (settings.devices or 0) > count:
        raise ConfigError(f"trainer.devices = {settings.devices}: there are {count} CUDA devices")
    return [f"cuda:{index}" for index in range(settings.devices or count)]


def limit_threads(settings: TrainerConfig, devices: Sequence[str]) -> None:
    """Set this process's CPU threads: `trainer.threads` for each of the `devices` that it computes for."""
    import torch

    if settings.threads is not None and devices[0] == "cpu":
        torch.set_num_threads(settings.threads * len(devices))


def device_name(device: torch.device) -> str:
    """The model of a GPU, or `cpu`."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(name: str, precision: Literal["32-true", "bf16-mixed"]) -> float | None:
    """Peak FLOP/s of a whole GPU of this name; None: it is not in `PEAK_TFLOPS`."""
    found = (peaks for words, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name) and "MIG" not in name)
    peaks = next(found, None)
    return None if peaks is None else peaks[precision == "32-true"] * 1e12


def share_out(work: Work, arguments: tuple[Any, ...], devices: list[str], display: ProgressDisplay, before: int = 0) -> None:
    """Do the work on all devices and wait for it. A single device needs no further process.

    Under torchrun or Slurm every process does one share and does not wait for the others.

    Args:
        work: called with (share, *arguments).
        arguments: further arguments of the work.
        devices: names of devices, one for each process.
        before: the amount done earlier; it counts as progress.

    Raises:
        Exception: a process failed, and this is its error; the others are stopped.
        ProcessKilledError: a process was killed; the others are stopped.
    """
    cluster = _cluster()
    if cluster is not None or len(devices) == 1:
        rank, world_size = (cluster.global_rank(), cluster.world_size()) if cluster else (0, 1)
        # The other processes' progress is not known here. Assume that it equals this one's.
        _make_current(own_device(devices))
        work(Share(rank, world_size, own_device(devices), lambda done: display.show(before + done * world_size)), *arguments)
    else:
        _start_processes(work, arguments, devices, display, before)


def cluster_rank() -> int | None:
    """The rank of this process among those that torchrun or Slurm started; None: it was started alone."""
    cluster = _cluster()
    return cluster.global_rank() if cluster else None


def own_device(devices: list[str]) -> str:
    """The device that this process works on."""
    cluster = _cluster()
    return devices[cluster.local_rank() % len(devices)] if cluster else devices[0]


def _cluster() -> ClusterEnvironment | None:
    """The cluster of several processes that this one belongs to; None: it runs alone and may use all devices."""
    import torch

    by_torchrun = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    by_srun = os.environ.get("SLURM_STEP_ID", "").isdigit()  # a batch script has variables of tasks that it did not start
    if not by_torchrun and not by_srun:
        return None
    # This import takes seconds.
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds: list[type[ClusterEnvironment]] = [TorchElasticEnvironment]
    if by_srun:
        kinds.append(SLURMEnvironment)
    clusters = (kind() for kind in kinds if kind.detect())
    return next((cluster for cluster in clusters if cluster.world_size() > 1), None)


def _start_processes(work: Work, arguments: tuple[Any, ...], devices: list[str], display: ProgressDisplay, before: int) -> None:
    import torch

    context = multiprocessing.get_context("spawn")
    shared = _SharedState(context.RawArray("q", len(devices)), context.RawValue("b", 0))
    threads = max(1, torch.get_num_threads() // len(devices))
    processes, receivers = [], []
    resource_tracker.ensure_running()  # started later, it would unblock interrupts
    with _interrupts_blocked():  # `_work` unblocks them when a process can handle one
        for rank in range(len(devices)):
            receiver, sender = context.Pipe(duplex=False)
            process_arguments = (shared, threads, rank, devices, sender, work, arguments)
            processes.append(context.Process(target=_work, args=process_arguments, daemon=True))
            processes[-1].start()
            receivers.append(receiver)
            sender.close()  # so that `recv` ends with EOFError if the process sends nothing
    try:
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            wait(alive, timeout=_POLL_SECONDS)
            display.show(before + sum(shared.counts))
            if any(process.exitcode for process in processes):
                break
    finally:
        shared.stop.value = 1  # processes that have ended ignore it
        for process in processes:
            process.join()
    display.show(before + sum(shared.counts))
    for receiver in receivers:
        with contextlib.suppress(EOFError):  # the process sent no error
            if not isinstance(error := receiver.recv(), StoppedError):
                raise error
    if any(process.exitcode for process in processes):
        message = "a process was killed, perhaps because memory ran out; what was complete is kept, the same command goes on"
        raise ProcessKilledError(message)


@dataclass(frozen=True)
class _SharedState:
    """Memory that the processes share, without locks: a killed process would never release them."""

    counts: Any
    stop: Any


def _work(
    shared: _SharedState,
    threads: int,
    rank: int,
    devices: list[str],
    sender: Connection,
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    """Do one share in a process of its own; send the error if there is one."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(done: int) -> None:
        shared.counts[rank] = done
        if shared.stop.value:
            raise StoppedError

    # Ctrl-C reaches every process of a terminal. Only the parent prints a message.
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        _make_current(devices[rank])
        work(Share(rank, len(devices), devices[rank], count), *arguments)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        sender.send(error)
        sys.exit(1)


def _make_current(device: str) -> None:
    """Make a GPU the default of libraries."""
    import torch

    if device != "cpu":
        torch.cuda.set_device(device)


def _end_with_parent() -> None:
    """End this process when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C, also in processes that are started meanwhile."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
