"""Atomic writes: after a crash a file is the old one or the new one, never a part. And what a run's folder holds.

A run is `config.yaml`, `checkpoints/`, `samples/`, `evaluations.jsonl` and TensorBoard's event files. `previews.jsonl` holds
the quick distances of training, `progress.json` the progress of its commands.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import xxhash
from filelock import FileLock, Timeout

from madformer.errors import InputError, printable

_CHECKSUM = "checksum"
"""Key of a JSON file's checksum, which is of all other keys."""

Purpose = Literal["train", "evaluate", "tune", "encode", "sample", "import"]
"""The command that claims a folder."""

STALE_SECONDS = 3600.0
"""A process that lives replaces a temporary file sooner."""

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
        made = temporary.stat()
        if made.st_mode != mode and made.st_nlink == 1:  # safetensors' are the user's alone; a linked one is another's too
            temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


class ChecksumWriter:
    """A file that takes the checksum of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, xxhash.xxh3_128()

    def write(self, content: Any) -> int:
        """Write bytes, or what has some."""
        self._digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    @property
    def checksum(self) -> str:
        """Hexadecimal XXH3 (128 bits) of everything so far."""
        return self._digest.hexdigest()


def file_checksum(path: Path, leave_out: int = 0, ending: bytes = b"") -> str:
    """Hexadecimal XXH3 (128 bits) of a file, which keeps up with the memory: it finds accidents, not attacks.

    Args:
        path: the file.
        leave_out: bytes at its end that do not count.
        ending: counts in their place.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - leave_out
        while left > 0 and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
    digest.update(ending)
    return digest.hexdigest()


def remove_stale(folder: Path, name: str = "*", seconds: float = 0) -> None:
    """Remove temporary files that killed processes left in a folder.

    Args:
        folder: where they are.
        name: a pattern of the names that they were to have.
        seconds: how long nobody has written to them. 0: for whoever alone may write such files now, as its lock says.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if not seconds or time.time() - path.stat().st_mtime > seconds:
                path.unlink()


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
    return [_describe_process(number) for number in sorted(_locking(path)) if number > 0]


def _locking(path: Path) -> set[int]:
    """The processes that lock a file; below 1: one of another container."""
    try:
        status = path.stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    file = f":{status.st_ino} "  # devices have other numbers there on some file systems
    held = (line for line in lines if file in line and " WRITE " in line and "->" not in line)  # with an arrow: it waits too
    return {int(line.split()[4]) for line in held}


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


def parse_json(text: str | bytes) -> Any:
    """JSON as `to_json` writes it.

    Raises:
        ValueError: it is broken, or holds NaN or infinity.
    """
    return json.loads(text, parse_constant=_refuse_constant)


def is_finite(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and abs(value) < math.inf


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of itself."""
    checked = {**content, _CHECKSUM: _checksum_of(content)}
    write_text(path, json.dumps(checked, indent=1) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """The JSON object that `write_json` wrote, without the checksum; None: there is no such file.

    Raises:
        InputError: it is torn; the message ends with the remedy.
    """
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; {remedy}")
    if content.pop(_CHECKSUM, None) not in (None, _checksum_of(content)):  # older versions wrote none
        raise InputError(f"{path}: torn: it does not match its checksum; {remedy}")
    return content


def _checksum_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()


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


def progress_path(run: Path) -> Path:
    """The file with the progress of its commands."""
    return run / "progress.json"


def append_preview(run: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add the metrics of a preview, the main one first."""
    append_line(_previews_path(run), to_json({"step": step, "metrics": dict(metrics)}))


def read_previews(run: Path) -> list[dict[str, Any]]:
    """`step` and `metrics` of all previews so far, without broken lines. The first metric is a finite number."""
    try:
        lines = _previews_path(run).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    previews = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            preview = parse_json(line)
            if isinstance(preview["step"], int) and is_finite(next(iter(preview["metrics"].values()), None)):
                previews.append(preview)
    return previews


def drop_previews(run: Path, step: int) -> None:
    """Remove the previews after the step that a run resumes from."""
    _copy_previews(run, run, step)


def copy_traces(run: Path, branch: Path, step: int) -> None:
    """Copy what a run has written up to a step, but event files and checkpoints: previews, their pictures, skipped images."""
    _copy_previews(run, branch, step)
    pictures = [path for path in run.glob("samples/preview-*.png") if path.stem <= f"preview-{step:08d}"]
    for path in (run / "skipped.txt", *pictures):
        if path.is_file():
            with atomic_write(branch / path.relative_to(run)) as temporary:
                shutil.copyfile(path, temporary)


def _copy_previews(source: Path, target: Path, step: int) -> None:
    if previews := read_previews(source):
        kept = (to_json(preview) + "\n" for preview in previews if preview["step"] <= step)
        write_text(_previews_path(target), "".join(kept))


@contextmanager
def claim_folder(folder: Path, purpose: Purpose, rank: int = 0) -> Iterator[None]:
    """Claim a folder for one purpose, so that no two processes write the same files. The claim ends with the process.

    Args:
        rank: of a process among those that work together; the first one claims the folder for all.

    Raises:
        InputError: another process has claimed it.
    """
    if rank != 0:
        yield
        return
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{purpose}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "".join(f": {each}" for each in lock_holders(path))
        raise InputError(f"{folder} is in use by another process ({purpose}){holder}; wait for it, or stop it") from None
    try:
        yield
    finally:
        try:
            if not existed and [each.name for each in folder.iterdir()] == [path.name]:  # it ended before it began
                path.unlink()  # while it is held: whoever waits for it sees that it is gone
                with contextlib.suppress(OSError):  # another process begins there
                    folder.rmdir()
        finally:
            lock.release()


def is_claimed(folder: Path, purpose: Purpose) -> bool | None:
    """Whether a process of this machine claims a folder, found out without claiming it; None: the system does not say."""
    return bool(_locking(folder / f".{purpose}.lock")) if Path("/proc/locks").exists() else None


def _previews_path(run: Path) -> Path:
    return run / "previews.jsonl"


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous copies of tensors as safetensors.

    Raises:
        OSError: as the system says, such as a full disk; safetensors has an error of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
