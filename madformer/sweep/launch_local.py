"""Trials on this machine, each on a group of devices of its own."""

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
from madformer.sweep.trial import Commands, Outcome, TrialProcesses

Group = tuple[str, ...]
"""GPUs of one trial, as `CUDA_VISIBLE_DEVICES` names them."""


def find_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    Raises:
        ConfigError: there are some, and their number is not to be had.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        if any(Path("/dev").glob("nvidia[0-9]*")):
            raise ConfigError("there are GPUs here, but nvidia-smi does not list them: set CUDA_VISIBLE_DEVICES") from None
        return []
    return listed.stdout.split()


def group(gpus: list[str], size: int) -> list[Group]:
    """GPUs in groups of one size; what is left over is not used."""
    return [tuple(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]


def hold(gpus: Group) -> list[int] | None:
    """Hold GPUs for a trial; None: somebody of this machine has one of them.

    The files that are returned are to be passed on to the trial's processes: the system lets go of the GPUs when they and
    this process have closed them, so that what outlives its driver keeps them.
    """
    folder = Path(tempfile.gettempdir()) / f"madformer-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    held: list[int] = []
    for gpu in gpus:
        held.append(os.open(folder / re.sub(r"[^\w.-]", "_", gpu), os.O_RDWR | os.O_CREAT, 0o600))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            release(held)
            return None
    return held


def release(held: list[int]) -> None:
    """Close files that `hold` has opened."""
    for number in held:
        with contextlib.suppress(OSError):
            os.close(number)


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Running:
    trial: Trial
    processes: TrialProcesses
    future: Future[Outcome]
    gpus: Group
    held: list[int]


class LocalLauncher:
    """Runs trials on this machine.

    Raises:
        ConfigError: there are fewer GPUs than a trial has.
    """

    outlives_driver = False
    """Whether trials go on when a driver is told to stop."""

    def __init__(self, sweep: Sweep, accelerator: str, commands: Commands, say: Callable[[str], None]) -> None:
        self._sweep, self._commands, self._say = sweep, commands, say
        gpus = [] if accelerator == "cpu" else find_gpus()
        self._groups = group(gpus, sweep.devices_per_trial)
        if (gpus or accelerator == "cuda") and not self._groups:
            raise ConfigError(f"devices_per_trial = {sweep.devices_per_trial}: there are {len(gpus)} GPUs here")
        self._slots = min(sweep.workers or len(self._groups), len(self._groups)) if self._groups else sweep.cpu_workers
        self._pool = ThreadPoolExecutor(self._slots)
        self._reserved: dict[Group, list[int]] = {}
        self._running: list[_Running] = []

    @property
    def trials(self) -> list[Trial]:
        """Those that run."""
        return [running.trial for running in self._running]

    def room(self) -> int:
        """How many trials can be started now; GPUs for them are held until `start`."""
        free = self._slots - len(self._running)
        if self._groups:
            busy = {running.gpus for running in self._running} | self._reserved.keys()
            for gpus in self._groups:
                if len(self._reserved) < free and gpus not in busy and (held := hold(gpus)) is not None:
                    self._reserved[gpus] = held
            return len(self._reserved)
        return free

    def start(self, trials: Sequence[Trial]) -> None:
        """Start trials, no more than there is room for."""
        for trial in trials:
            gpus, held = self._reserved.popitem() if self._reserved else ((), [])
            processes = TrialProcesses(trial.cell, self._commands, self._say, self._environment(gpus), inherited=held)
            with _interrupts_later():  # what runs and is not known to run would not be stopped
                self._running.append(_Running(trial, processes, self._pool.submit(processes.run), gpus, held))
        for held in self._reserved.values():
            release(held)
        self._reserved.clear()

    def ended(self, seconds: float) -> Iterator[tuple[Trial, Outcome]]:
        """Trials that have ended; waits for one so long."""
        if not self._running:
            time.sleep(seconds)
        wait([running.future for running in self._running], timeout=seconds, return_when=FIRST_COMPLETED)
        for running in [running for running in self._running if running.future.done()]:
            self._running.remove(running)
            release(running.held)
            yield running.trial, running.future.result()

    def end(self, trial: Trial) -> bool:
        """Have a trial save its state and end; whether it was told."""
        for running in self._running:
            if running.trial == trial:
                running.processes.stop(signal.SIGINT)
        return True

    def stop(self, how: signal.Signals) -> None:
        """Send all trials a signal, and wait for them."""
        for running in self._running:
            running.processes.stop(how)
        wait([running.future for running in self._running])

    def close(self) -> None:
        """Let go of everything; no trial runs any more."""
        self._pool.shutdown()

    def _environment(self, gpus: Group) -> dict[str, str]:
        # Within a job of Slurm's, a trial is no part of it: Lightning would take the job's tasks for its processes.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= dict.fromkeys(_THREADS, str(self._sweep.threads)) if not gpus else {}
        return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """A Ctrl-C or SIGTERM inside the block takes effect behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
