"""The GPUs of this machine, in groups that trials hold: no two trials have the same one, whoever started them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
from pathlib import Path

from madformer.config import ConfigError

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
            let_go(held)
            return None
    return held


def let_go(held: list[int]) -> None:
    """Close files that `hold` has opened."""
    for number in held:
        with contextlib.suppress(OSError):
            os.close(number)
