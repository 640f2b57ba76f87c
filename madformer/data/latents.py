"""Read and write a folder of latents: shards in Arrow's format, a JSON file for each, and one manifest.

Each JSON file ends with a checksum of itself, and names that of its shards. Files of older versions have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from madformer.config.validation import from_json
from madformer.errors import DataError, InputError
from madformer.runs.files import atomic_write, file_checksum, read_json, write_json

FORMAT = 1
"""Number of the files' layout."""

ENCODING, MANIFEST = "encoding.json", "manifest.json"

RECORD_BYTES = 64 * 2**20
"""Rows of so many bytes lie together in a shard and are mapped as one array."""

_REMEDY = "madformer encode makes it again"

_log = logging.getLogger(__name__)


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
    crop: str = "centre"

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
            pair = getattr(self, item.name), getattr(other, item.name)
            if pair[0] != pair[1]:
                existing, requested = (value if len(str(value)) <= 80 else f"{str(value)[:77]}..." for value in pair)
                return f"{item.name} = {existing!r} there, {requested!r} asked for"
        return None


def encoding_fields(encoding: Encoding) -> dict[str, Any]:
    """An encoding's fields for JSON; a crop of `centre` is left out, as in folders that are older than the field."""
    return {name: value for name, value in asdict(encoding).items() if (name, value) != ("crop", "centre")}


@dataclass(frozen=True)
class Shard:
    """Description of one shard."""

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
    xxh3: str = ""
    """`file_checksum` of its Arrow file; empty without rows, or if an older version wrote it."""

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
    """Description of a complete folder of latents."""

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
    checksums: tuple[str, ...] = ()
    """`Shard.xxh3` of each; older versions wrote none."""

    @property
    def sha256(self) -> str:
        """Of all latents, and of how they were made."""
        return hashlib.sha256(json.dumps([encoding_fields(self.encoding), self.shards], sort_keys=True).encode()).hexdigest()


class ShardWriter:
    """Collects the rows of one shard and puts it into its place as a whole.

    Rows are written in the order of `add`; how they were grouped does not show in the file.
    """

    def __init__(self, folder: Path, name: str, encoding: Encoding) -> None:
        self.folder, self.name, self.encoding = folder, name, encoding
        self._rows: list[dict[str, Any]] = []
        self._latents: dict[str, list[np.ndarray]] = {column: [] for column in encoding.arrays}

    def add(self, rows: Sequence[Mapping[str, Any]], latents: Mapping[str, np.ndarray]) -> None:
        """Add rows: `key`, `label`, `text` of each, and arrays [B, C, h, w] float16 for each column of latents."""
        self._rows += [dict(row) for row in rows]
        for column in self._latents:
            self._latents[column].append(latents[column])

    def finish(self, seen: int, last: bool, skipped: Sequence[tuple[str, str]]) -> Shard:
        """Write the shard, then its description."""
        sha256, xxh3, channels = "", "", self.encoding.latent_channels
        sums = square_sums = np.zeros(channels)
        if self._rows:
            arrays = {column: np.concatenate(parts) for column, parts in self._latents.items()}
            for mean_Chw in arrays["mean"]:  # row by row: all of it in float64 would be four times the shard
                sums = sums + mean_Chw.sum(axis=(1, 2), dtype=np.float64)
                square_sums = square_sums + np.square(mean_Chw, dtype=np.float64).sum(axis=(1, 2))
            sha256, xxh3 = self._write(arrays)
        channel_sums = tuple(sums.tolist()), tuple(square_sums.tolist())
        shard = Shard(self.name, len(self._rows), seen, last, sha256, *channel_sums, tuple(skipped), xxh3)
        write_shard(self.folder, shard)
        return shard

    def _write(self, arrays: Mapping[str, np.ndarray]) -> tuple[str, str]:
        import pyarrow as pa
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        features = {"key": Value("string")}
        features |= {"label": Value("int64")} if self.encoding.labels else {}
        features |= {"text": Value("string")} if self.encoding.texts else {}
        size = int(np.prod(self.encoding.latent_shape))
        table: dict[str, Any] = {
            name: pa.array([row[name] for row in self._rows], kind.pa_type) for name, kind in features.items()
        }
        for column, array_NChw in arrays.items():
            features[column] = List(Value("float16"), length=size)
            table[column] = pa.FixedSizeListArray.from_arrays(pa.array(array_NChw.reshape(-1)), size)
        rows_per_record = max(1, RECORD_BYTES // (2 * size * len(arrays)))
        with atomic_write(self.folder / f"{self.name}.arrow") as temporary:
            writer = ArrowWriter(path=str(temporary), features=Features(features))
            writer.write_table(pa.table(table), writer_batch_size=rows_per_record)
            writer.finalize()
            with temporary.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), file_checksum(temporary)


class ShardReader:
    """All rows of a folder of latents, mapped from the disk and numbered in the order of the shards.

    The checksum of a shard is looked at when the first of its rows is read, and never again.

    Raises:
        DataError: a shard that is missing or has other rows than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._content: dict[str, Any] = {}
        tables = [list(self._record_tables(name, rows)) for name, rows, _ in manifest.shards]
        self._tables = [table for parts in tables for table in parts]
        self._names = [name for (name, _, _), parts in zip(manifest.shards, tables, strict=True) for _ in parts]
        checksums = zip(manifest.shards, manifest.checksums, strict=bool(manifest.checksums))
        self._unread = {name: checksum for (name, _, _), checksum in checksums if checksum}
        """Shards of which no row was read, with their checksums."""
        self._ends = np.cumsum([len(table) for table in self._tables])
        self._starts = self._ends - [len(table) for table in self._tables]
        size = int(np.prod(manifest.encoding.latent_shape))
        self._arrays = {
            column: [table[column].chunk(0).flatten().to_numpy(zero_copy_only=True).reshape(-1, size) for table in self._tables]
            for column in manifest.encoding.arrays
        }

    def __len__(self) -> int:
        return self.manifest.rows

    def read(self, column: str, samples: np.ndarray) -> np.ndarray:
        """Latents [B, C, h, w] float16 of rows, copied out of a column.

        Raises:
            DataError: a shard does not match its checksum.
        """
        chunks, shape = self._arrays[column], self.manifest.encoding.latent_shape
        if not len(samples):
            return np.empty((0, *shape), dtype=np.float16)
        return np.concatenate([chunks[chunk][row] for chunk, row in self._locate(samples)]).reshape(len(samples), *shape)

    def values(self, column: str, samples: np.ndarray) -> list[Any]:
        """Keys, labels or texts of rows."""
        return [self._tables[chunk][column].chunk(0)[row].as_py() for chunk, row in self._locate(samples)]

    @cached_property
    def labels(self) -> np.ndarray:
        """Class numbers of all rows; -1: none."""
        return np.concatenate([table["label"].chunk(0).fill_null(-1).to_numpy() for table in self._tables])

    def _locate(self, samples: np.ndarray) -> Iterator[tuple[int, int]]:
        chunks = np.searchsorted(self._ends, samples, side="right")
        for name in {self._names[chunk] for chunk in chunks.tolist()} if self._unread else ():
            self._require_whole(name)
        return zip(chunks.tolist(), (samples - self._starts[chunks]).tolist(), strict=True)

    def _require_whole(self, name: str) -> None:
        """Look at a shard's checksum, in the memory that its rows are mapped to."""
        checksum = self._unread.get(name)
        if checksum and xxhash.xxh3_128_hexdigest(self._content[name]) != checksum:
            path = self.folder / f"{name}.arrow"
            raise DataError(f"{path}: torn: it does not match its checksum; madformer encode makes it again")
        self._unread.pop(name, None)

    def _record_tables(self, name: str, rows: int) -> Iterator[Any]:
        import pyarrow as pa

        path, encoding, remedy = self.folder / f"{name}.arrow", self.manifest.encoding, "madformer encode makes it again"
        if not path.is_file():
            raise DataError(f"{path}: missing, the manifest has it with {rows} rows; {remedy}")
        try:
            self._content[name] = pa.memory_map(str(path)).read_buffer()
            table = pa.ipc.open_stream(self._content[name]).read_all()
            columns = {"label": encoding.labels, "text": encoding.texts, "key": True, **dict.fromkeys(encoding.arrays, True)}
            table.select([name for name in columns if columns[name]]).validate()  # a flipped bit may lead outside the file
        except Exception as error:  # it leads pyarrow anywhere
            raise DataError(f"{path}: not a shard: {' '.join(str(error).split())}; {remedy}") from error
        if len(table) != rows:
            raise DataError(f"{path}: {len(table)} rows, the manifest says {rows}; {remedy}")
        for batch in table.to_batches():
            yield pa.Table.from_batches([batch])


def shard_name(unit: int, part: int) -> str:
    """Without an ending; names sort as the rows do."""
    return f"shard-{unit:06d}-{part:06d}"


def read_encoding(folder: Path) -> Encoding | None:
    """The encoding that a folder was begun with; None: it was not begun.

    Raises:
        InputError: another program's file.
    """
    content = read_json(folder / ENCODING, _REMEDY)
    return None if content is None else _encoding(content, folder / ENCODING)


def write_encoding(folder: Path, encoding: Encoding) -> None:
    """Write what is encoded into a folder, before the first shard."""
    write_json(folder / ENCODING, encoding_fields(encoding))


def write_shard(folder: Path, shard: Shard) -> None:
    """Write the description of a shard, which means that it is done."""
    write_json(folder / f"{shard.name}.json", asdict(shard))


def read_shards(folder: Path) -> dict[str, Shard]:
    """The shards that are done, by name, in order; one whose Arrow file was lost, or whose JSON file is broken, is not."""
    shards = dict[str, Shard]()
    for path in shard_descriptions(folder):
        try:
            shard = read_shard(path)
        except InputError as error:
            _log.warning("%s", error)
            continue
        if not shard.rows or (folder / f"{shard.name}.arrow").is_file():
            shards[shard.name] = shard
    return shards


def shard_descriptions(folder: Path) -> list[Path]:
    """The JSON files of shards, in the order of their rows."""
    return sorted(path for path in folder.glob("shard-*.json") if re.fullmatch(r"shard-\d+-\d+", path.stem))


def read_shard(path: Path) -> Shard:
    """The description of a shard.

    Raises:
        InputError: the file is broken.
    """
    shard = from_json(Shard, read_json(path, _REMEDY) or {}, path, _REMEDY)
    if shard.name != path.stem:
        raise InputError(f"{path}: it describes {shard.name}; {_REMEDY}")
    return shard


def find_shard_flaw(folder: Path, name: str, sha256: str, xxh3: str) -> str | None:
    """The reason why the Arrow file of a shard is torn; None: its checksum holds, or that of older versions, its SHA-256."""
    path = folder / f"{name}.arrow"
    if not path.is_file():
        return "missing"
    if xxh3:
        found, expected = file_checksum(path), xxh3
    else:
        with path.open("rb") as file:
            found, expected = hashlib.file_digest(file, "sha256").hexdigest(), sha256
    return None if found == expected else "it does not match its checksum"


def complete_units(shards: Iterable[Shard]) -> set[int]:
    """Units of the source of which all shards are done."""
    units: dict[int, list[Shard]] = {}
    for shard in shards:
        units.setdefault(shard.unit, []).append(shard)
    return {unit for unit, parts in units.items() if parts[-1].last and parts[-1].part == len(parts) - 1}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of latents.

    Raises:
        InputError: there is none, or it is of another program.
    """
    path = folder / MANIFEST
    content = read_json(path, _REMEDY)
    if content is None:
        problem = "encoding has not ended there" if (folder / ENCODING).is_file() else "no latents there"
        raise InputError(f"{folder}: {problem} (no {path.name}); madformer encode EXPERIMENT.yaml goes on")
    manifest = from_json(Manifest, {**content, "encoding": _encoding(content.get("encoding"), path)}, path, _REMEDY)
    if manifest.checksums and len(manifest.checksums) != len(manifest.shards):
        raise InputError(f"{path}: {len(manifest.checksums)} checksums of {len(manifest.shards)} shards; {_REMEDY}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which means that all shards are done."""
    write_json(folder / MANIFEST, asdict(manifest))


def summarise(encoding: Encoding, shards: Sequence[Shard], reconstruction: Mapping[str, float]) -> Manifest:
    """The manifest of all shards of a source."""
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
        checksums=tuple(shard.xxh3 for shard in shards if shard.rows),
    )


def _encoding(content: Any, path: Path) -> Encoding:
    if not isinstance(content, dict):
        raise InputError(f"{path}: its encoding is no JSON object; {_REMEDY}")
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; encode into a new folder")
    return from_json(Encoding, content, path, _REMEDY)
