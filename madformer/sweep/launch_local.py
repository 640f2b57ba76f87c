"""The local launcher: trials on this machine, each on its own group of GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from madformer.errors import ConfigError
from madformer.sweep.queue import Trial
from madformer.sweep.spec import Sweep
from madformer.sweep.trial import THREAD_VARIABLES, Commands, Outcome, TrialProcesses

GpuGroup = tuple[str, ...]
"""GPUs of one trial, as `CUDA_VISIBLE_DEVICES` names them."""


def find_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    Raises:
        ConfigError: there are GPUs, but they cannot be counted.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        if any(Path("/dev").glob("nvidia[0-9]*")):
            raise ConfigError("there are GPUs here, but nvidia-smi does not list them: set CUDA_VISIBLE_DEVICES") from None
        return []
    return result.stdout.split()


def group_gpus(gpus: list[str], size: int) -> list[GpuGroup]:
    """Groups of one size; GPUs that do not fill a group are not used."""
    return [tuple(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]


def lock_gpus(gpus: GpuGroup) -> list[int] | None:
    """Lock GPUs for a trial, against other drivers of this user; None: one of them is locked.

    Pass the returned file descriptors on to the trial's processes. The system frees the GPUs when these and this process have
    closed them, so a trial that outlives its driver keeps its GPUs.
    """
    folder = Path(tempfile.gettempdir()) / f"madformer-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locks: list[int] = []
    for gpu in gpus:
        locks.append(os.open(folder / re.sub(r"[^\w.-]", "_", gpu), os.O_RDWR | os.O_CREAT, 0o600))
        try:
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            release_gpus(locks)
            return None
    return locks


def release_gpus(locks: list[int]) -> None:
    """Close the file descriptors of `lock_gpus`."""
    for number in locks:
        with contextlib.suppress(OSError):
            os.close(number)


@dataclass
class _RunningTrial:
    trial: Trial
    processes: TrialProcesses
    future: Future[Outcome]
    gpus: GpuGroup
    locks: list[int]


class LocalLauncher:
    """Runs trials on this machine.

    Raises:
        ConfigError: there are fewer GPUs than a trial has.
    """

    outlives_driver = False

    def __init__(self, sweep: Sweep, accelerator: str, commands: Commands, say: Callable[[str], None]) -> None:
        self._sweep, self._commands, self._say = sweep, commands, say
        gpus = [] if accelerator == "cpu" else find_gpus()
        self._groups = group_gpus(gpus, sweep.devices_per_trial)
        if (gpus or accelerator == "cuda") and not self._groups:
            raise ConfigError(f"devices_per_trial = {sweep.devices_per_trial}: there are {len(gpus)} GPUs here")
        self._slots = min(sweep.workers or len(self._groups), len(self._groups)) if self._groups else sweep.cpu_workers
        self._pool = ThreadPoolExecutor(self._slots)
        self._reserved_locks: dict[GpuGroup, list[int]] = {}
        self._running: list[_RunningTrial] = []

    @property
    def trials(self) -> list[Trial]:
        """The running trials."""
        return [running.trial for running in self._running]

    def free_slots(self) -> int:
        """Trials that can be started now; their GPUs are locked until `start`."""
        free = self._slots - len(self._running)
        if self._groups:
            busy = {running.gpus for running in self._running} | self._reserved_locks.keys()
            for gpus in self._groups:
                if len(self._reserved_locks) < free and gpus not in busy and (locks := lock_gpus(gpus)) is not None:
                    self._reserved_locks[gpus] = locks
            return len(self._reserved_locks)
        return free

    def start(self, trials: Sequence[Trial]) -> None:
        """Start trials, no more than there are free slots."""
        for trial in trials:
            gpus, locks = self._reserved_locks.popitem() if self._reserved_locks else ((), [])
            processes = TrialProcesses(trial.cell, self._commands, self._say, self._environment(gpus), descriptors=locks)
            with _interrupts_delayed():  # a trial that is not in `_running` would not be stopped
                self._running.append(_RunningTrial(trial, processes, self._pool.submit(processes.run), gpus, locks))
        for locks in self._reserved_locks.values():
            release_gpus(locks)
        self._reserved_locks.clear()

    def finished_trials(self, seconds: float) -> Iterator[tuple[Trial, Outcome]]:
        """Trials that have ended; waits so long for one."""
        if not self._running:
            time.sleep(seconds)
        wait([running.future for running in self._running], timeout=seconds, return_when=FIRST_COMPLETED)
        for running in [running for running in self._running if running.future.done()]:
            self._running.remove(running)
            release_gpus(running.locks)
            yield running.trial, running.future.result()

    def interrupt(self, trial: Trial) -> bool:
        """Let a trial save its state and end; whether it received the signal."""
        for running in self._running:
            if running.trial == trial:
                running.processes.stop(signal.SIGINT)
        return True

    def stop(self, signal_number: signal.Signals) -> None:
        """Send a signal to all trials and wait for them."""
        for running in self._running:
            running.processes.stop(signal_number)
        wait([running.future for running in self._running])

    def close(self) -> None:
        """Free all resources; no trial runs any more."""
        self._pool.shutdown()

    def _environment(self, gpus: GpuGroup) -> dict[str, str]:
        # Inside a job of Slurm, a trial is not part of the job: Lightning would take the job's tasks for its processes.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(self._sweep.threads)) if not gpus else {}
        return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


@contextlib.contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Ctrl-C or SIGTERM inside the block takes effect after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: signals.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        raise KeyboardInterrupt
