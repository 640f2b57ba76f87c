"""What is known of a folder of latents: how they were made, each shard, and the manifest of them all.

A folder of latents has `encoding.json` (what is encoded, and how), and for each shard `shard-000000-000000.arrow` with its
rows and `shard-000000-000000.json` with what is known of them; a shard is done when the latter is there. `manifest.json` comes
last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from madformer.config import InputError
from madformer.files import write_text

FORMAT = 1
"""Of the files; another number, another layout."""


@dataclass(frozen=True)
class Encoding:
    """What decides the content of all shards."""

    source: str
    subset: str | None
    split: str
    streaming: bool
    source_sha256: str
    codec: str
    codec_sha256: str
    codec_dtype: str
    image_size: int
    latent_channels: int
    latent_size: int
    stochastic: bool
    """Whether the codec has a posterior to sample from; if not, no deviations are stored."""
    flip: bool
    image_column: str
    label_column: str | None
    text_column: str | None
    class_names: tuple[str, ...] | None
    rows_per_shard: int
    format: int = FORMAT

    @property
    def labels(self) -> bool:
        """Whether rows have class numbers."""
        return self.label_column is not None

    @property
    def texts(self) -> bool:
        """Whether rows have texts."""
        return self.text_column is not None

    @property
    def arrays(self) -> tuple[str, ...]:
        """Columns of latents."""
        parts = ("mean", "deviation") if self.stochastic else ("mean",)
        return parts + tuple(f"{part}_flipped" for part in parts if self.flip)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w]."""
        return self.latent_channels, self.latent_size, self.latent_size

    def describe_difference(self, other: Encoding) -> str | None:
        """The first field in which another encoding differs, with both values; None: in none."""
        for item in fields(self):
            here, there = getattr(self, item.name), getattr(other, item.name)
            if here != there:
                short = [value if len(str(value)) <= 80 else f"{str(value)[:77]}..." for value in (here, there)]
                return f"{item.name} = {short[0]!r} there, {short[1]!r} asked for"
        return None


@dataclass(frozen=True)
class Shard:
    """What is known of one shard."""

    name: str
    rows: int
    seen: int
    """Rows of the source that it was made of: the skipped ones too."""
    last: bool
    """Whether its unit of the source ends with it."""
    sha256: str
    """Of its Arrow file; empty without rows."""
    sums: tuple[float, ...]
    """Of the means, and of their squares, over all positions, by channel."""
    square_sums: tuple[float, ...]
    skipped: tuple[tuple[str, str], ...]
    """Key and reason of each broken image."""

    @property
    def unit(self) -> int:
        """Piece of the source that it belongs to."""
        return int(self.name.split("-")[1])

    @property
    def part(self) -> int:
        """Which one of its unit's shards it is."""
        return int(self.name.split("-")[2])


@dataclass(frozen=True)
class Manifest:
    """All that is known of a folder of latents."""

    encoding: Encoding
    rows: int
    skipped: int
    channel_means: tuple[float, ...]
    channel_deviations: tuple[float, ...]
    """Of the means' values, over all images and positions: near 1 where the scaling factor fits."""
    reconstruction: Mapping[str, float]
    """`psnr`, in dB, of the decoded latents of the first `images`."""
    shards: tuple[tuple[str, int, str], ...]
    """Name, rows and SHA-256 of each, in the order of their rows."""

    @property
    def sha256(self) -> str:
        """Of all latents, and of how they were made."""
        return hashlib.sha256(json.dumps([asdict(self.encoding), self.shards], sort_keys=True).encode()).hexdigest()


def shard_name(unit: int, part: int) -> str:
    """Without an ending; names sort as the rows do."""
    return f"shard-{unit:06d}-{part:06d}"


def read_encoding(folder: Path) -> Encoding | None:
    """What is being encoded there; None: nothing yet.

    Raises:
        InputError: another program's file.
    """
    return _encoding(found, folder / "encoding.json") if (found := _read_json(folder / "encoding.json")) else None


def write_encoding(folder: Path, encoding: Encoding) -> None:
    """Say what is encoded there, before anything is."""
    _write_json(folder / "encoding.json", asdict(encoding))


def write_shard(folder: Path, shard: Shard) -> None:
    """Say that a shard is done."""
    _write_json(folder / f"{shard.name}.json", asdict(shard))


def read_shards(folder: Path) -> dict[str, Shard]:
    """The shards that are done, by name, in order; one whose Arrow file was lost is not."""
    names = sorted(path for path in folder.glob("shard-*.json") if re.fullmatch(r"shard-\d+-\d+", path.stem))
    shards = (Shard(**_tuples(_read_json(path) or {})) for path in names)
    return {shard.name: shard for shard in shards if not shard.rows or (folder / f"{shard.name}.arrow").is_file()}


def complete_units(shards: Iterable[Shard]) -> set[int]:
    """Units of the source of which all shards are there."""
    parts: dict[int, list[Shard]] = {}
    for shard in shards:
        parts.setdefault(shard.unit, []).append(shard)
    return {unit for unit, every in parts.items() if every[-1].last and every[-1].part == len(every) - 1}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of latents.

    Raises:
        InputError: there is none, or it is of another program.
    """
    path = folder / "manifest.json"
    found = _read_json(path)
    if found is None:
        begun = "encoding has not ended there" if (folder / "encoding.json").is_file() else "no latents there"
        raise InputError(f"{folder}: {begun} (no {path.name}); madformer encode EXPERIMENT.yaml goes on")
    encoding = _encoding(found.pop("encoding", {}), path)
    try:
        return Manifest(encoding=encoding, **_tuples(found))
    except TypeError as error:
        raise InputError(f"{path}: not a manifest of latents: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Say that all is there."""
    _write_json(folder / "manifest.json", asdict(manifest))


def summarise(encoding: Encoding, shards: Sequence[Shard], reconstruction: Mapping[str, float]) -> Manifest:
    """The manifest of shards that are all there."""
    rows = sum(shard.rows for shard in shards)
    values = max(rows, 1) * encoding.latent_size**2
    means = np.sum([shard.sums for shard in shards], axis=0) / values
    squares = np.sum([shard.square_sums for shard in shards], axis=0) / values
    return Manifest(
        encoding=encoding,
        rows=rows,
        skipped=sum(len(shard.skipped) for shard in shards),
        channel_means=tuple(means.tolist()),
        channel_deviations=tuple(np.sqrt(np.maximum(squares - means**2, 0)).tolist()),
        reconstruction=dict(reconstruction),
        shards=tuple((shard.name, shard.rows, shard.sha256) for shard in shards if shard.rows),
    )


def _encoding(found: Mapping[str, Any], path: Path) -> Encoding:
    if found.get("format") != FORMAT:
        raise InputError(f"{path}: format {found.get('format')!r}, this version reads {FORMAT}; encode into a new folder")
    try:
        return Encoding(**_tuples(found))
    except TypeError as error:
        raise InputError(f"{path}: not of latents: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}; delete it, and encode again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; delete it, and encode again")
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples, so that what was read equals what was written."""

    def convert(value: Any) -> Any:
        return tuple(convert(entry) for entry in value) if isinstance(value, list) else value

    return {name: convert(value) for name, value in content.items()}
