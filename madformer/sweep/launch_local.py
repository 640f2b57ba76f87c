"""The local launcher: trials on this machine, each on its own group of GPUs, or on its share of one GPU."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from madformer.errors import ConfigError
from madformer.sweep.spec import Sweep, core_count
from madformer.sweep.trial import THREAD_VARIABLES, Commands, Outcome, TrialProcesses

if TYPE_CHECKING:
    from madformer.sweep.queue import Trial

GpuGroup = tuple[str, ...]
"""GPUs of one trial, as `CUDA_VISIBLE_DEVICES` names them."""

_Slot = tuple[GpuGroup, int]
"""Where a trial can run: its GPUs, and which of their `trials_per_device` shares."""

LOCK_PLACES: tuple[Path, ...] = (Path("/run/lock"), Path("/tmp"))
"""Where locks lie: in the first of these that all users may write to. Nobody tidies up in /run/lock."""

_WHOLE = 2**32
"""Number of lockable bytes that represent a whole GPU. The lock file is empty: bytes need not exist to be locked."""


def find_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    Raises:
        ConfigError: there are GPUs, but they cannot be counted.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        return _query_gpus("index")
    except (OSError, subprocess.SubprocessError):
        if any(Path("/dev").glob("nvidia[0-9]*")):
            raise ConfigError("there are GPUs here, but nvidia-smi does not list them: set CUDA_VISIBLE_DEVICES") from None
        return []


def gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU that this process may use, in GiB; None: there is none, or nvidia-smi does not report it."""
    try:
        gpus = find_gpus()
        return min(float(mib) for mib in _query_gpus("memory.total", f"--id={','.join(gpus)}")) / 1024 if gpus else None
    except (ConfigError, OSError, subprocess.SubprocessError, ValueError):
        return None


def _query_gpus(field: str, *options: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def group_gpus(gpus: list[str], size: int) -> list[GpuGroup]:
    """Groups of one size; GPUs that do not fill a group are not used."""
    return [tuple(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]


def lock_gpus(gpus: GpuGroup, part: int = 0, parts: int = 1) -> list[int] | None:
    """Lock GPUs, or one share of each, for a trial, against all other drivers of this machine; None: another trial holds one.

    A share is a range of bytes of the GPU's lock file. So trials with other numbers of shares, or with whole GPUs, never hold
    more than the GPU together.

    Pass the returned file descriptors on to the trial's processes. The system frees the GPUs when these and this process have
    closed them, so a trial that outlives its driver keeps its GPUs.

    Raises:
        ConfigError: another user has made the folder of the locks or a lock in it his own.
    """
    start = part * _WHOLE // parts
    length = (part + 1) * _WHOLE // parts - start
    locks: list[int] = []
    try:
        # A lock on the folder: systemd-tmpfiles removes nothing from one that is locked.
        locks.append(_open_for_all(lock_folder(), os.O_RDONLY | os.O_DIRECTORY))
        fcntl.flock(locks[0], fcntl.LOCK_SH)
        for gpu in gpus:
            path = lock_folder() / re.sub(r"[^\w.-]", "_", _identity(gpu))
            locks.append(_open_for_all(path, os.O_RDWR))
            # This lock belongs to the open file, as with `flock`: the trial's processes inherit it.
            fcntl.fcntl(locks[-1], fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
            if not os.fstat(locks[-1]).st_nlink:  # removed since it was opened
                raise BlockingIOError
    except BlockingIOError:
        release_gpus(locks)
        return None
    except OSError as error:
        release_gpus(locks)
        raise ConfigError(f"{error.filename}: {error.strerror}, and GPUs are locked there: remove it") from error
    return locks


@cache
def _identity(gpu: str) -> str:
    """The UUID of a GPU, if nvidia-smi tells it: numbers differ between users, and between jobs that see some GPUs alone."""
    try:
        return _query_gpus("uuid", f"--id={gpu}")[0] if gpu.isdigit() else gpu
    except (OSError, subprocess.SubprocessError, IndexError):
        return gpu


def lock_folder() -> Path:
    """The folder of the locks: one place for all users of this machine, whatever TMPDIR says."""
    shared = (path for path in LOCK_PLACES if path.is_dir() and path.stat().st_mode & 0o1002 == 0o1002)
    return next(shared, LOCK_PLACES[-1]) / "madformer-gpus"


def _open_for_all(path: Path, flags: int) -> int:
    """Open a file or a folder, which is made first if it is missing, such that all users can."""
    is_folder = bool(flags & os.O_DIRECTORY)
    with contextlib.suppress(FileExistsError):
        if is_folder:
            path.mkdir()
            path.chmod(0o1777)
        elif not path.exists():  # O_CREAT on another user's file is refused in a sticky folder
            number = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            os.fchmod(number, 0o666)
            return number
    return os.open(path, flags | os.O_NOFOLLOW)


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
    slot: _Slot | None
    locks: list[int]


class LocalLauncher:
    """Runs trials on this machine.

    Raises:
        ConfigError: there are fewer GPUs than a trial has, or none to share.
    """

    outlives_driver = False

    def __init__(self, sweep: Sweep, accelerator: str, commands: Commands, say: Callable[[str], None]) -> None:
        self._sweep, self._commands, self._say = sweep, commands, say
        gpus = [] if accelerator == "cpu" else find_gpus()
        groups = group_gpus(gpus, sweep.devices_per_trial)
        if (gpus or accelerator == "cuda") and not groups:
            raise ConfigError(f"devices_per_trial = {sweep.devices_per_trial}: there are {len(gpus)} GPUs here")
        if sweep.trials_per_device > 1 and not groups:
            raise ConfigError(f"trials_per_device = {sweep.trials_per_device}: there are no GPUs here: set workers instead")
        self._gpu_slots = [(group, part) for part in range(sweep.trials_per_device) for group in groups]
        count = len(self._gpu_slots)
        self._slots = min(sweep.workers or count, count) if self._gpu_slots else sweep.cpu_workers
        self._pool = ThreadPoolExecutor(self._slots)
        self._reserved_locks: dict[_Slot, list[int]] = {}
        self._running: list[_RunningTrial] = []

    @property
    def trials(self) -> list[Trial]:
        """The running trials."""
        return [running.trial for running in self._running]

    def free_slots(self) -> int:
        """Trials that can be started now; their GPUs are locked until `start`."""
        free = self._slots - len(self._running)
        if self._gpu_slots:
            busy = [running.slot for running in self._running if running.slot is not None]
            loads = Counter(gpus for gpus, _ in (*busy, *self._reserved_locks))
            slots = [slot for slot in self._gpu_slots if slot not in busy and slot not in self._reserved_locks]
            while slots and len(self._reserved_locks) < free:
                slot = min(slots, key=lambda slot: loads[slot[0]])  # on the least busy GPU
                slots.remove(slot)
                if (locks := lock_gpus(*slot, parts=self._sweep.trials_per_device)) is not None:
                    self._reserved_locks[slot] = locks
                    loads[slot[0]] += 1
            return len(self._reserved_locks)
        return free

    def start(self, trials: Sequence[Trial]) -> None:
        """Start trials, no more than there are free slots."""
        for trial in trials:
            slot = next(iter(self._reserved_locks), None)
            gpus, locks = (slot[0], self._reserved_locks.pop(slot)) if slot is not None else ((), [])
            processes = TrialProcesses(trial.cell, self._commands, self._say, self._environment(gpus), descriptors=locks)
            with _interrupts_delayed():  # a trial that is not in `_running` would not be stopped
                self._running.append(_RunningTrial(trial, processes, self._pool.submit(processes.run), slot, locks))
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
        if not gpus:
            return environment | dict.fromkeys(THREAD_VARIABLES, str(self._sweep.threads))
        if self._sweep.trials_per_device > 1:  # each trial gets its share of the cores, unless the user sets it
            environment = dict.fromkeys(THREAD_VARIABLES, str(max(1, core_count() // self._slots))) | environment
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


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
