"""A run's folder: `config.yaml`, `checkpoints/`, `samples/`, `evaluations.jsonl`, TensorBoard event files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from madformer.config import ExperimentConfig, InputError, load_run, require_same_weights
from madformer.config.frozen import config_path

Purpose = Literal["train", "evaluate", "encode", "sample"]
"""What a folder is held for."""


def is_run(folder: Path) -> bool:
    """Whether a run has begun there."""
    return config_path(folder).is_file()


def require_own_run(config: ExperimentConfig) -> None:
    """Refuse an experiment whose folder holds another experiment's run.

    Raises:
        InputError: the first field that differs, with both values.
    """
    if is_run(config.run_dir):
        require_same_weights(load_run(config.run_dir), config, str(config.run_dir))


@contextlib.contextmanager
def claim_folder(folder: Path, purpose: Purpose, rank: int = 0) -> Iterator[None]:
    """Hold a folder for one purpose, so that no two processes write the same files; the system lets go when the process dies.

    Args:
        rank: of a process among those that work together; the first one holds the folder for all.

    Raises:
        InputError: another process holds it.
    """
    if rank != 0:
        yield
        return
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{purpose}.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise InputError(f"{folder} is in use by another process ({purpose}); wait for it, or stop it") from None
    finally:
        if not existed and {path.name for path in folder.iterdir()} <= {f".{purpose}.lock"}:
            (folder / f".{purpose}.lock").unlink(missing_ok=True)  # it ended before it began: leave nothing
            folder.rmdir()
