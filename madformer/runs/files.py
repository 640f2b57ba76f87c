"""Atomic writes: after a crash a file is the old one or the new one, never a part."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from madformer.errors import printable

PATIENCE_SECONDS = 5.0
"""How long `hold_lock` waits in silence."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`. At the end its file replaces that of `path`; after an error it is removed.

    The data is synced to the disk before the file is renamed. Who may read it follows from the umask, whatever wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors' files are the user's alone
            temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def require_readable(path: Path) -> None:
    """Refuse a file that another user keeps to himself, before a library calls it broken or missing.

    Raises:
        PermissionError: names the file.
    """
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def hold_lock(path: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file that is there for this alone. The system frees it when the process ends.

    Args:
        path: the file; it is made if it is missing.
        say: called with a line that names the holder, when that has kept the lock for `PATIENCE_SECONDS`; None: prints it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        (say or partial(print, flush=True))(f"{path}: waits for {' and '.join(lock_holders(path)) or 'another process'}")
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


def lock_holders(path: Path) -> list[str]:
    """Who locks a file, such as `process 12 (madformer evaluate RUN), which is stopped`; none of other machines."""
    try:
        status = path.stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    file = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    held = (line for line in lines if file in line and " WRITE " in line and "->" not in line)  # with an arrow: it waits too
    numbers = {int(line.split()[4]) for line in held}
    return [_describe_process(number) for number in sorted(numbers) if number > 0]


def _describe_process(number: int) -> str:
    try:
        process = psutil.Process(number)
        stopped = ", which is stopped" if process.status() == psutil.STATUS_STOPPED else ""
        return printable(f"process {number} ({' '.join(process.cmdline())[:200]}){stopped}")
    except psutil.Error:
        return f"process {number}"


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, so that it stays when the first one is removed; where that cannot be, copy it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        target.hardlink_to(source.resolve())
    except OSError:  # another disk, or another user's file
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(content: Any, **options: Any) -> str:
    """JSON with null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def append_line(path: Path, line: str) -> None:
    """Append one line. A last line that a crash cut short is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
