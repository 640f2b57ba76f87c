"""`madformer verify`: compare what lies on the disk with its checksums. It writes nothing and takes no lock."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from madformer.config import load_run, read_config_hash
from madformer.config.identity import config_path, is_run
from madformer.data.latents import (
    ENCODING,
    MANIFEST,
    find_shard_flaw,
    read_encoding,
    read_manifest,
    read_shard,
    shard_descriptions,
)
from madformer.errors import InputError
from madformer.runs.checkpoints import find_flaw, list_checkpoints, read_checksum
from madformer.runs.files import progress_path, require_readable

STUDY = "study.db"

_TRIES = 5
"""How often a study is copied that a driver writes to meanwhile."""

_ENCODE = "madformer encode EXPERIMENT.yaml makes it again"


@dataclass(frozen=True)
class Finding:
    """What became of one file."""

    path: Path
    kind: str
    """What it is, in the plural."""
    flaw: str = ""
    """Why it is broken, and what to do; empty: it is whole as far as one can tell."""
    has_checksum: bool = True


def verify(paths: Sequence[Path]) -> bool:
    """Print what of each path is whole, broken, or without a checksum: whether nothing is broken.

    Args:
        paths: runs, latents, references, features, folders of sweeps, folders of these, or single files of them.

    Raises:
        InputError: there is no such path, or nothing in it that can be verified.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    is_whole = True
    for path in paths:
        findings = list(_look(path))
        if not findings:
            raise InputError(f"{path}: nothing to verify: no run, latents, reference, features or study")
        broken = [finding for finding in findings if finding.flaw]
        is_whole &= not broken
        print(f"{path}: {_counted(findings)}", flush=True)
        for finding in broken:
            print(f"  {finding.path}: broken: {finding.flaw}", flush=True)
    return is_whole


def _counted(findings: Sequence[Finding]) -> str:
    states = Counter(
        ("broken" if finding.flaw else "whole" if finding.has_checksum else "no checksum", finding.kind) for finding in findings
    )
    parts = []
    for state in ("broken", "whole", "no checksum"):
        counts = [f"{count} {kind}" for (found, kind), count in states.items() if found == state]
        parts += [f"{state}: {', '.join(counts)}"] if counts else []
    return "; ".join(parts)


def _look(path: Path) -> Iterator[Finding]:
    """What is found of a path, by what it is."""
    if path.is_file():
        yield from _look_at_file(path)
        return
    has_latents = (path / ENCODING).is_file() or (path / MANIFEST).is_file()
    if is_run(path):
        yield from _run(path)
    elif has_latents:
        yield from _latents(path)
    else:
        for entry in sorted(path.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or entry.suffix == ".safetensors" or entry.name == STUDY:
                yield from _look(entry)


def _look_at_file(path: Path) -> Iterator[Finding]:
    if path.suffix in (".yaml", ".yml") and path.name != config_path(path.parent).name:
        from madformer.sweep.cells import sweep_cells
        from madformer.sweep.load_sweep import load_sweep
        from madformer.sweep.study import study_path

        sweep = load_sweep(path)
        runs = dict.fromkeys(cell.run for cell in sweep_cells(sweep))
        for each in (study_path(sweep), *runs):
            if each.exists():
                yield from _look(each)
    elif path.suffix == ".safetensors":
        yield _part(path) if path.name.startswith("part-") else _reference(path)
    elif path.suffix == ".db":
        yield _study(path)
    elif path.suffix in (".ckpt", ".pt", ".pth"):
        yield _checkpoint(path, "restore it, or delete it")
    elif path.suffix == ".arrow" or path.name in (ENCODING, MANIFEST):
        yield from (finding for finding in _latents(path.parent) if finding.path == path)
    elif is_run(path.parent):
        yield from (finding for finding in _run(path.parent) if finding.path == path)


def _run(run: Path) -> Iterator[Finding]:
    config = config_path(run)
    yield _checked(config, "configurations", lambda: load_run(run), read_config_hash(run) is not None)
    checkpoints = list_checkpoints(run)
    for path in checkpoints:
        newest = "" if path != checkpoints[-1] else f"; then madformer train --resume {run} makes it again"
        yield _checkpoint(path, f"delete it{newest}")
    for path in sorted(run.glob("features/*/part-*.safetensors")):
        yield _part(path)
    if (run / "evaluations.jsonl").is_file():
        yield _checked(run / "evaluations.jsonl", "records", lambda: _read_record(run), has_checksum=False)
    for path in (run / "previews.jsonl", progress_path(run)):
        if path.is_file():
            yield _checked(path, "logs", lambda path=path: _read_objects(path), has_checksum=False)  # type: ignore[misc]


def _checked(path: Path, kind: str, read: Callable[[], Any], has_checksum: bool = True) -> Finding:
    """A file that is whole if it can be read."""
    flaw = ""
    try:
        read()
    except InputError as error:
        flaw = str(error).removeprefix(f"{path}: ")
    except FileNotFoundError:  # a living process has replaced it
        pass
    except Exception as error:  # a flipped bit leads anywhere
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENOSPC):  # not the file's fault
            raise
        flaw = f"{' '.join(str(error).split())}; restore it"
    return Finding(path, kind, flaw, has_checksum)


def _checkpoint(path: Path, remedy: str) -> Finding:
    try:
        has_checksum, flaw = read_checksum(path) is not None, find_flaw(path)
    except FileNotFoundError:  # a living run has removed it
        return Finding(path, "checkpoints that are gone")
    if flaw and not path.exists():
        return Finding(path, "checkpoints that are gone")
    return Finding(path, "checkpoints", f"{flaw}; {remedy}" if flaw else "", has_checksum)


def _read_record(run: Path) -> None:
    from madformer.evaluation.measurement import Measurement
    from madformer.evaluation.record import read_choices, read_diagnostics, read_means, read_points

    for point in [*read_points(run), *read_points(run, "candidate"), *read_means(run)]:
        Measurement.of_point(point)
    read_choices(run)
    read_diagnostics(run)


def _read_objects(path: Path) -> None:
    """Read JSON objects: one, or one a line, of which a crash may have cut the last."""
    content = path.read_bytes()
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    for number, line in enumerate(lines, 1):
        try:
            is_object = isinstance(json.loads(line), dict)
        except ValueError:
            is_object = path.suffix == ".jsonl" and number == len(lines) and not content.endswith(b"\n")
        if not is_object:
            raise InputError(f"{path}: line {number} is no JSON object; delete it")


def _latents(folder: Path) -> Iterator[Finding]:
    for name, read in ((ENCODING, read_encoding), (MANIFEST, read_manifest)):
        if (folder / name).is_file():  # without a manifest it is not complete, which is no flaw
            yield _checked(folder / name, "descriptions", lambda read=read: read(folder))  # type: ignore[misc]
    shards = {}
    for path in shard_descriptions(folder):
        finding = _checked(path, "descriptions of shards", lambda path=path: shards.update({path.stem: read_shard(path)}))  # type: ignore[misc]
        yield finding
    expected = {name: (rows, sha256, "") for name, rows, sha256 in _manifest_shards(folder)}
    known = {name: (shard.rows, shard.sha256, shard.xxh3) for name, shard in shards.items() if shard.rows}
    for name, (rows, sha256, xxh3) in {**expected, **known}.items():
        path = folder / f"{name}.arrow"
        flaw = find_shard_flaw(folder, name, sha256, xxh3)
        if not flaw and expected and expected.get(name, ("", ""))[:2] != (rows, sha256):
            flaw = "the manifest has another one"
        yield Finding(path, "shards", f"{flaw}; {_ENCODE}" if flaw else "", bool(xxh3))
    for name in expected.keys() - {path.stem for path in shard_descriptions(folder)}:
        yield Finding(folder / f"{name}.json", "descriptions of shards", f"missing; {_ENCODE}")


def _manifest_shards(folder: Path) -> Sequence[tuple[str, int, str]]:
    try:
        return read_manifest(folder).shards
    except InputError:
        return ()


def _reference(path: Path) -> Finding:
    from safetensors import safe_open

    from madformer.evaluation.feature_cache import CHECKSUM
    from madformer.evaluation.reference import METADATA, load_reference

    has_checksum = False

    def read() -> None:
        nonlocal has_checksum
        require_readable(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if METADATA in metadata:
            load_reference(path)
            has_checksum = CHECKSUM in json.loads(metadata[METADATA])

    finding = _checked(path, "references", read)
    return Finding(path, finding.kind, finding.flaw, has_checksum or bool(finding.flaw))


def _part(path: Path) -> Finding:
    from safetensors import SafetensorError, safe_open

    from madformer.evaluation.feature_cache import CHECKSUM, load_part

    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            has_checksum = CHECKSUM in (file.metadata() or {})
        load_part(path)
    except SafetensorError as error:
        return Finding(path, "features", f"{' '.join(str(error).split())}; madformer evaluate samples them again")
    except FileNotFoundError:
        return Finding(path, "features that are gone")  # a living evaluation has measured them
    return Finding(path, "features", has_checksum=has_checksum)


def _study(path: Path) -> Finding:
    """SQLite's own check of the structure, on a copy: a study has no checksums, and may have to be completed by its log."""
    names = [path, *(path.with_name(f"{path.name}{ending}") for ending in ("-wal", "-journal"))]

    def state() -> list[tuple[int, int]]:
        states = (name.stat() for name in names if name.exists())
        return [(each.st_mtime_ns, each.st_size) for each in states]

    def read() -> None:
        for _ in range(_TRIES):
            with TemporaryDirectory() as folder:
                before = state()
                for name in names:
                    if name.exists():
                        shutil.copyfile(name, Path(folder) / name.name)
                is_still = state() == before  # else a driver wrote meanwhile
                flaw = _study_flaw(Path(folder) / path.name)
            if flaw is None:
                return
            if is_still:
                raise InputError(f"{path}: {flaw}; delete it: what is done is read from the runs")
            time.sleep(0.2)
        raise InputError(f"{path}: {flaw}, but it changes all the time; look again when its sweep rests")

    return _checked(path, "studies", read, has_checksum=False)


def _study_flaw(path: Path) -> str | None:
    connection = sqlite3.connect(path)
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
        connection.execute("SELECT count(*) FROM trials")
    except sqlite3.DatabaseError as error:
        found = [str(error)]
    finally:
        connection.close()
    return None if found == ["ok"] else found[0]
