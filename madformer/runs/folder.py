"""A run's folder: `config.yaml`, `checkpoints/`, `samples/`, `evaluations.jsonl`, TensorBoard event files.

`previews.jsonl` holds the quick distances of training, `progress.json` the progress of its commands.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from madformer.config import ExperimentConfig, require_same_run
from madformer.config.identity import config_path
from madformer.errors import InputError
from madformer.runs.files import append_line, atomic_write, lock_holders, to_json, write_text

Purpose = Literal["train", "evaluate", "tune", "encode", "sample", "import"]
"""The command that claims a folder."""


def is_run(folder: Path) -> bool:
    """Whether a run has begun there."""
    return config_path(folder).is_file()


def progress_path(run: Path) -> Path:
    """The file with the progress of its commands."""
    return run / "progress.json"


def append_preview(run: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add the metrics of a preview, the main one first."""
    append_line(_previews_path(run), to_json({"step": step, "metrics": dict(metrics)}))


def read_previews(run: Path) -> list[dict[str, Any]]:
    """`step` and `metrics` of all previews so far, without a last line that a crash cut short."""
    try:
        lines = _previews_path(run).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    previews = []
    for line in lines:
        with contextlib.suppress(ValueError):
            previews.append(json.loads(line))
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


def require_no_other_run(config: ExperimentConfig, but: str = "") -> None:
    """Refuse an experiment whose folder holds another experiment's run.

    Args:
        but: a field that may differ.

    Raises:
        InputError: the first field that differs, with both values.
    """
    if is_run(config.run_dir):
        require_same_run(config, but)


@contextlib.contextmanager
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
    lock = FileLock(folder / f".{purpose}.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        holder = "".join(f": {each}" for each in lock_holders(folder / f".{purpose}.lock"))
        raise InputError(f"{folder} is in use by another process ({purpose}){holder}; wait for it, or stop it") from None
    finally:
        if not existed and {path.name for path in folder.iterdir()} <= {f".{purpose}.lock"}:
            (folder / f".{purpose}.lock").unlink(missing_ok=True)  # it ended before it began: leave nothing
            folder.rmdir()


def _previews_path(run: Path) -> Path:
    return run / "previews.jsonl"
