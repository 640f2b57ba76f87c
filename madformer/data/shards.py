"""Shards of latents: Arrow files that `datasets` opens too, written whole and mapped from the disk. A row is.

key    where the image came from
label  class number, if the source has classes
text   if the source has texts
mean   [C, h, w] float16, the posterior's mean, scaled as the model sees it
deviation  its standard deviation, if the codec has one
mean_flipped, deviation_flipped  the same of the mirrored image, if asked for
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from madformer.config import DataError
from madformer.data.manifest import Encoding, Manifest, Shard, write_shard
from madformer.files import replacing

RECORD_BYTES = 64 * 2**20
"""Rows of so many bytes lie together in a shard and are mapped as one array."""


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
        """Write the shard, then what is known of it."""
        sha256, channels = "", self.encoding.latent_channels
        sums = square_sums = np.zeros(channels)
        if self._rows:
            arrays = {column: np.concatenate(parts) for column, parts in self._latents.items()}
            for mean_Chw in arrays["mean"]:  # row by row: all of it in float64 would be four times the shard
                sums = sums + mean_Chw.sum(axis=(1, 2), dtype=np.float64)
                square_sums = square_sums + np.square(mean_Chw, dtype=np.float64).sum(axis=(1, 2))
            sha256 = self._write(arrays)
        known = (len(self._rows), seen, last, sha256, tuple(sums.tolist()), tuple(square_sums.tolist()), tuple(skipped))
        shard = Shard(self.name, *known)
        write_shard(self.folder, shard)
        return shard

    def _write(self, arrays: Mapping[str, np.ndarray]) -> str:
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
        with replacing(self.folder / f"{self.name}.arrow") as temporary:
            writer = ArrowWriter(path=str(temporary), features=Features(features))
            writer.write_table(pa.table(table), writer_batch_size=rows_per_record)
            writer.finalize()
            with temporary.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()


class ShardReader:
    """All rows of a folder of latents, mapped from the disk; the number of a row is its place in the order of the shards.

    Raises:
        InputError: no latents there.
        DataError: a shard that is missing or has other rows than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._tables = [table for name, rows, _ in manifest.shards for table in self._record_tables(name, rows)]
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
        """Latents [B, C, h, w] float16 of rows, copied out of a column."""
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
        return zip(chunks.tolist(), (samples - self._starts[chunks]).tolist(), strict=True)

    def _record_tables(self, name: str, rows: int) -> Iterator[Any]:
        import pyarrow as pa
        from datasets import Dataset

        path = self.folder / f"{name}.arrow"
        if not path.is_file():
            raise DataError(f"{path}: missing, the manifest has it with {rows} rows; madformer encode makes what is missing")
        try:
            table = Dataset.from_file(str(path)).data.table
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{path}: not a shard: {' '.join(str(error).split())}; delete it and its .json, and encode again"
            ) from error
        if len(table) != rows:
            raise DataError(f"{path}: {len(table)} rows, the manifest says {rows}; delete it and its .json, and encode again")
        for batch in table.to_batches():
            yield pa.Table.from_batches([batch])
