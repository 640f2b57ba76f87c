"""Rows of images from any source that the `datasets` library reads, copied to the disk or streamed in order; the digits.

No row is decoded here: it holds the bytes of its image file. The embedded data set, the 1,797 handwritten digits that ship with
scikit-learn, 8 x 8 grey pixels each, is a tensor. It has one split, `train`, and slices of it, as datasets writes them:
`train[:90%]` to learn, `train[90%:]` to hold out. As in the paper, the full training set is also the reference of the metric;
1,797 images are too few to estimate feature statistics from a part of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from madformer.config import DataConfig
from madformer.config.data import MAX_PIXELS
from madformer.config.validation import expand_variables
from madformer.data.open_dataset import DatasetSplit, open_split
from madformer.data.source_files import LABEL_NAMES, NAME, TEXT_NAMES, hash_files, kind_of, lies_below, list_classes, relative
from madformer.errors import BadImage, ConfigError, InputError
from madformer.lookup import explain_source_errors, silence_datasets

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

__all__ = [
    "ROWS_PER_SHARD",
    "ImageSource",
    "Row",
    "digits_sha256",
    "find_columns",
    "load_digits",
    "open_source",
]

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "images", "picture", "photo")

ROWS_PER_SHARD = 256
"""Rows of one unit of a source that is not streamed."""

_KEY, _URL = "__key__", "__url__"


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns."""

    image: str
    label: str | None
    text: str | None
    class_names: tuple[str, ...] | None
    """Names of the label's classes, if the data set gives them."""
    unread: str | None = None
    """A column that is called like labels, but holds no integers."""


@dataclass(frozen=True)
class Row:
    """One image of a source, undecoded."""

    key: str
    """Its name: WebDataset's key (after its tar's name if there are several), else the image's path within the data set, else
    its number. Unique if the names that the data set gives are."""
    label: int | None
    text: str | None
    content: bytes | None = field(repr=False)
    """The image file, if the data set holds it."""
    path: str | None
    """Where the image file is otherwise, here or at an fsspec address."""
    root: str | None = None
    """What the path must be below, if the data names it; None: we found it, or `data.allow_paths` is on."""
    max_pixels: int = MAX_PIXELS

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            BadImage: there is none.
            InputError: it is there, but cannot be read now.
        """
        import fsspec

        if self.content is not None:
            return self.content
        if self.path is None:
            raise BadImage("no image")
        if self.root is not None and not lies_below(self.path, self.root):
            raise BadImage(f"{self.path} is not below the source: set data.allow_paths=true if you trust the data")
        if self.root is not None and "://" not in self.path and not Path(self.path).is_file():
            raise BadImage(f"no such file: {self.path}")
        try:
            with fsspec.open(self.path, "rb") if "://" in self.path else Path(self.path).open("rb") as file:
                content: bytes = file.read()
                return content
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadImage(f"no such file: {self.path}") from None
        except PermissionError as error:
            raise BadImage(str(error)) from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error}; the same command goes on") from error


class ImageSource:
    """Rows of images, in units that can be read independently of each other.

    What a unit holds depends on the data and on `data.streaming` alone: 256 rows of a table that lies on this machine (and of
    a folder of images anywhere, of which the addresses alone are held), one file of a stream, or, if it is a single Parquet
    file, one of its row groups. Can be read by several threads at once.
    """

    def __init__(self, data: DataConfig, split: DatasetSplit, columns: Columns) -> None:
        from datasets import Dataset, IterableDataset

        dataset = split.dataset
        self.name = str(data.source)
        self.class_names = columns.class_names
        self.left_out = split.left_out
        """Names of files of the source that are not read, by reason."""
        self.expected_rows = split.expected_rows if isinstance(dataset, IterableDataset) else len(dataset)
        """Rows in all, of a stream as far as its data set says; None: it does not."""
        self._table = dataset if isinstance(dataset, Dataset) else None
        self._stream = None if isinstance(dataset, Dataset) else dataset
        self.columns = columns
        """Where images, labels and texts are."""
        self._files = split.files
        self._identity = [split.revision, split.split, data.subset]
        self._root, self._max_pixels = None if data.allow_paths else split.root, data.max_pixels
        self._tars = _tar_names(dataset, split.files)
        self._repeated = frozenset() if self._table is None else _repeated_paths(self._table, columns.image)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the images: of names, sizes and pieces of the files; for the hub's data, of the commit."""
        revision, split, subset = self._identity
        with explain_source_errors(self.name):
            parts = [revision] if revision else hash_files(self._files)
        return hashlib.sha256(json.dumps([parts, split, subset]).encode()).hexdigest()

    def summarise(self, rows: int | None = None, broken: int = 0, unlabelled: int = 0) -> str:
        """One line: images, classes, and what is left out, with names.

        Args:
            rows: images that were read; None: count the rows of the source, and those without a class.
            broken: images that could not be read.
            unlabelled: images without a class, of a source that has classes.
        """
        if rows is None:
            unlabelled = sum(self._labels[label] for label in self._labels if self._to_label(label) is None)
        count = rows if rows is not None or self.expected_rows is None else self.expected_rows - broken
        parts = ["images" if count is None else f"{count:,} images", list_classes(self.class_names, self.has_labels)]
        parts[1] += f" (column {self.columns.unread}, not integers)" if self.columns.unread else ""
        parts += [f"{unlabelled:,} images without a class"] if unlabelled else []
        left_out = [f"{broken:,} broken"] if broken else []
        for reason, names in self.left_out.items():
            left_out.append(f"{len(names):,} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        line = f"{self.name}: {', '.join(parts)}{'; left out: ' if left_out else ''}{', '.join(left_out)}"
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)

    @property
    def last_label(self) -> int | None:
        """The largest class number; None: there are no numbers, or they are not known yet."""
        return max((label for value in self._labels if (label := self._number(value)) is not None), default=None)

    @cached_property
    def _labels(self) -> dict[Any, int]:
        """How many rows have each label; empty: none, or a stream of other files than Parquet on this machine."""
        import pyarrow.dataset as ds

        name, local = self.columns.label, [file for file in self._files if kind_of(file) == "parquet" and "://" not in file]
        if name is None or (self._table is None and (not local or local != self._files)):
            return {}
        table = self._table.data if self._table is not None else ds.dataset(local, format="parquet").to_table(columns=[name])
        return {each["values"]: each["counts"] for each in table.column(name).value_counts().to_pylist()}

    @property
    def has_labels(self) -> bool:
        """Whether rows may have class numbers."""
        return self.columns.label is not None

    @property
    def has_texts(self) -> bool:
        """Whether rows may have texts."""
        return self.columns.text is not None

    @property
    def num_rows(self) -> int | None:
        """Rows in all; None: a stream, whose end is not known."""
        return None if self._table is None else len(self._table)

    @property
    def num_units(self) -> int:
        """Pieces that can be read independently."""
        if self._table is not None:
            return -(-len(self._table) // ROWS_PER_SHARD)
        assert self._stream is not None
        return self._stream.num_shards

    def row(self, index: int) -> Row:
        """Row `index` of a source that is not streamed."""
        assert self._table is not None, "a stream is read in order"
        example = self._table[index]
        key = self._key(example, str(index))
        return self._to_row(example, f"{key} ({index})" if index in self._repeated else key)

    def rows(self, unit: int, skip: int = 0) -> Iterator[Row]:
        """Rows of a unit in order, without its first `skip`.

        Raises:
            ConfigError: a file cannot be read to its end.
        """
        if self._table is not None:
            start = unit * ROWS_PER_SHARD
            for index in range(start + skip, min(start + ROWS_PER_SHARD, len(self._table))):
                yield self.row(index)
            return
        assert self._stream is not None
        prefix, keys = f"{unit}-" if self.num_units > 1 else "", set()
        with explain_source_errors(self.name, self._file_of(unit)):
            batches = self._stream.shard(num_shards=self.num_units, index=unit).iter(batch_size=1)
            for index, batch in enumerate(batches):
                example, number = {name: values[0] for name, values in batch.items()}, f"{prefix}{index}"
                key = self._key(example, number)
                key = f"{key} ({number})" if key in keys else key
                keys.add(key)
                if index >= skip:
                    yield self._to_row(example, key)

    def _file_of(self, unit: int) -> str | None:
        names = relative(self._files)
        return names[unit] if len(names) == self.num_units else names[0] if len(names) == 1 else None

    def _key(self, example: dict[str, Any], number: str) -> str:
        image = example[self.columns.image] or {"path": None}
        key = example.get(NAME) or example.get(_KEY) or image["path"] or number
        if self._tars is not None:
            key = f"{self._tars.get(example[_URL], Path(example[_URL]).stem)}/{key}"
        return key

    def _to_row(self, example: dict[str, Any], key: str) -> Row:
        image = example[self.columns.image] or {"bytes": None, "path": None}
        text = example[self.columns.text] if self.columns.text else None
        label = self._to_label(example[self.columns.label]) if self.columns.label else None
        return Row(key, label, text, image["bytes"], image["path"], self._root, self._max_pixels)

    def _to_label(self, value: Any) -> int | None:
        label = self._number(value)
        is_class = label is not None and label >= 0 and (self.class_names is None or label < len(self.class_names))
        return label if is_class else None

    def _number(self, value: Any) -> int | None:
        try:
            return None if value is None else int(value)
        except ValueError:
            problem = f"holds {value!r}, which is no class number; text is data.text_column"
            raise ConfigError(f"data.label_column = {self.columns.label!r}: {problem}") from None


def open_source(data: DataConfig) -> ImageSource:
    """The images that `data` names.

    Raises:
        ConfigError: no such source, nothing readable in it, a hub that cannot be reached or refuses, a broken file, an unknown
            split, subset or column, or a package missing for an address.
    """
    import datasets

    if data.source is None:
        raise ConfigError("data.source = null: must name a data set of the hub, files, or a folder")
    address = expand_variables("data.source", data.source)
    with explain_source_errors(data.source), silence_datasets():
        split = open_split(replace(data, source=address))
        if isinstance(split.dataset, datasets.Dataset) and not len(split.dataset):
            raise ConfigError(f"data.split = {data.split!r}: data.source = {data.source!r} has no rows there")
        columns = find_columns(split.dataset.features or datasets.Features(), data)
        names = (columns.image, columns.label, columns.text, NAME, _KEY, _URL)
        dataset = split.dataset.select_columns([name for name in split.dataset.features if name in names])
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
        return ImageSource(data, replace(split, dataset=dataset), columns)


def _repeated_paths(table: Dataset, image: str) -> frozenset[int]:
    """Rows whose image has the path of an earlier one."""
    import pyarrow.compute as pc

    paths = pc.struct_field(table.data.column(image), "path")
    if NAME in table.features or _KEY in table.features or pc.count_distinct(paths).as_py() == len(paths) - paths.null_count:
        return frozenset()
    first: dict[str, int] = {}
    return frozenset(row for row, path in enumerate(paths.to_pylist()) if path and first.setdefault(path, row) != row)


def _tar_names(dataset: Dataset | IterableDataset, files: list[str]) -> dict[str, str] | None:
    """Name of each tar by its address in the rows, which may be that of a copy; None: there is one at most."""
    from datasets import Dataset

    if _URL not in dataset.features:
        return None
    addresses = dataset.unique(_URL) if isinstance(dataset, Dataset) else files
    if len(addresses) < 2:
        return None
    names = relative(files if len(files) == len(addresses) else addresses)
    return {address: name.removesuffix(".tar") for address, name in zip(addresses, names, strict=True)}


def find_columns(features: Features, data: DataConfig) -> Columns:
    """The columns that `data` names; others are found by type, then by name.

    Raises:
        ConfigError: no column or several may hold the images, or a named column is missing or of another type.
    """
    import datasets

    images = _candidates("image_column", features, data, IMAGE_NAMES, datasets.Image, _holds_images)
    if len(images) != 1:
        problem = f"{' and '.join(images)} hold images" if images else "no column holds images"
        raise ConfigError(f"data.image_column = null: {problem}; name one of data.source = {data.source!r}: {_list(features)}")
    labels = _candidates("label_column", features, data, LABEL_NAMES, datasets.ClassLabel, _holds_labels)
    if len(labels) > 1:  # attributes rather than the class
        labels = [name for name in LABEL_NAMES if name in labels]
    if data.label_column is None:  # strings are numbers in WebDataset's column only
        labels = [name for name in labels if name == "cls" or "int" in features[name].dtype]
    texts = _candidates("text_column", features, data, TEXT_NAMES, None, _holds_texts)
    label = next(iter(labels), None)
    others = [] if label else [name for name in LABEL_NAMES if name in features and name not in texts]
    unread = [f"{name}: {getattr(features[name], 'dtype', 'nested')}" for name in others]
    classes = features[label] if label else None
    class_names = tuple(classes.names) if isinstance(classes, datasets.ClassLabel) else None
    return Columns(images[0], label, next(iter(texts), None), class_names, next(iter(unread), None))


def _candidates(
    field: str,
    features: Features,
    data: DataConfig,
    names: tuple[str, ...],
    feature_type: type | None,
    is_legal: Callable[[Any], bool],
) -> list[str]:
    column = getattr(data, field)
    if column is None:
        typed = [name for name, feature in features.items() if feature_type is not None and isinstance(feature, feature_type)]
        return typed or [name for name in names if name in features and is_legal(features[name])]
    if column not in features or not is_legal(features[column]):
        problem = "no such column, or of another type"
        raise ConfigError(f"data.{field} = {column!r}: {problem}; data.source = {data.source!r} has {_list(features)}")
    return [column]


def _list(features: Features) -> str:
    return ", ".join(f"{name} ({getattr(feature, 'dtype', type(feature).__name__)})" for name, feature in features.items())


def _holds_images(feature: Any) -> bool:
    import datasets

    is_struct = isinstance(feature, dict) and "bytes" in feature
    return isinstance(feature, datasets.Image) or is_struct or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+|string|binary", getattr(feature, "dtype", "")) is not None


def _holds_texts(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


@cache
def load_digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Digits, in scikit-learn's order.

    Args:
        split: `train`, all of them, or a slice of it in datasets' notation, in rows or per cent.

    Returns:
        images: [1797, 1, 8, 8] float32 in [-1, 1]; -1 is paper, 1 is ink, in steps of 1/8 (the scans have 17 grey levels).
        labels: [1797] int64, the digits 0 .. 9. Fewer of both for a slice.

    Every call returns the same two tensors: do not write into them.

    Raises:
        ConfigError: another split, or an empty slice.
    """
    if split != "train":
        images_NCYX, labels_N = load_digits()
        rows_M = _digit_rows(split, len(labels_N))
        return images_NCYX[rows_M], labels_N[rows_M]
    from sklearn import datasets  # type: ignore[import-untyped]  # here, because it takes a second that few commands need

    pixels_NP, labels_N = datasets.load_digits(return_X_y=True)
    images_NCYX = torch.from_numpy(pixels_NP).float().reshape(-1, 1, 8, 8) / 8 - 1
    return images_NCYX, torch.from_numpy(labels_N).long()


def digits_sha256(split: str = "train") -> str:
    """Fingerprint of the images, as other sources have one."""
    return hashlib.sha256(load_digits(split)[0].contiguous().numpy().tobytes()).hexdigest()


def _digit_rows(split: str, total: int) -> Tensor:
    """Numbers of a slice's rows."""
    from datasets import ReadInstruction

    legal = "must be train or a slice of it, such as train[:90%], for data.source = 'digits'"
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": total})
    except ValueError as error:
        raise ConfigError(f"data.split = {split!r}: {legal}") from error
    rows_M = torch.cat([torch.arange(total)[part.from_ : part.to] for part in parts])
    if not len(rows_M):
        raise ConfigError(f"data.split = {split!r}: empty, there are {total:,} digits; {legal}")
    return rows_M
