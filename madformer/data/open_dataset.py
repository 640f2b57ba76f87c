"""Open any source of images. All but folders of image files are opened by the `datasets` library."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madformer.config import DataConfig
from madformer.config.data import WHOLE
from madformer.data.image_files import NUMBERS, image_table, is_image, sample_columns, samples_of_tar
from madformer.data.source_files import (
    HUB,
    IMAGES,
    LABEL_NAMES,
    NAME,
    TEXT_NAMES,
    Files,
    find_files,
    kind_of,
    left_out_by_ending,
    lies_below,
    list_classes,
    list_folder,
    relative,
    root_of,
)
from madformer.errors import ConfigError, InputError
from madformer.lookup import explain_source_errors, files_of_card, list_files, read_card

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features, IterableDataset

__all__ = ["DatasetSplit", "open_split"]

MANY_SAMPLES, FIRST_SAMPLES = 1000, 16
"""How many samples of a WebDataset are read to find its columns: of the first tar, and of each other tar or of one at a URL."""

TAR_RULES = 2
"""Raise it if `samples_of_tar` finds labels or texts elsewhere, or copies of a tar in the cache keep what was found before."""


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a data set, as datasets reads it."""

    dataset: Dataset | IterableDataset
    files: list[str]
    """Paths or addresses of the data; empty: known to the hub's cache alone."""
    revision: str | None = None
    """Commit of a data set of the hub, with its name."""
    split: str = "train"
    """The requested split; for files, which have no splits, `train` or a slice of it."""
    expected_rows: int | None = None
    """Number of rows that the data set states."""
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of files that are not read, by reason."""
    root: str | None = None
    """What paths in rows must be below; None: they were found here, not read from the data."""


def open_split(data: DataConfig) -> DatasetSplit:
    """Open the split that `data` names: a table on this machine, or a stream.

    Raises:
        ConfigError: no such source, nothing readable in it, a hub that cannot be had, an unknown split or subset.
        Exception: whatever datasets, a file system or a file format raises; `explain_source_errors` makes a ConfigError of it.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    folder = Path(str(data.source)).expanduser()
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_saved(folder, data)
    found = None if read_card(folder) else _find_files(data)
    if found is not None and found.kind == IMAGES:
        return _open_images(found, data)
    found = found and _with_rows(data, found)
    builder = _known_builder(data) if found is None else _files_builder(data, found)
    files = found or _known_files(data, builder)
    root = root_of(data, next(chain.from_iterable(files.splits.values()), ""))
    if builder.repo_id and found is None:
        _require_own(data, chain.from_iterable(files.splits.values()), f"hf://datasets/{builder.repo_id}@")
    if isinstance(builder, ImageFolder) and not any(file.endswith(".zip") for names in files.splits.values() for file in names):
        return replace(_open_images(files, data, builder), revision=_revision(builder))
    if not files.has_splits:
        data = replace(data, split=_whole_split(data))
    names = _split_names(data, list(files.splits or builder.info.splits or {}))
    split_files = [file for name in names for file in files.splits.get(name, [])]
    require_whole(data, split_files)
    if isinstance(builder, WebDataset) and split_files:
        _set_samples(builder, data, split_files)
    dataset: Dataset | IterableDataset
    if data.streaming:
        if not split_files:  # a copy has other files than the hub, so its units would be others too
            remedy = "set data.streaming=false to read the copy in the cache"
            raise ConfigError(f"data.source = {data.source!r}: the hub cannot be reached to stream from it; {remedy}")
        dataset = builder.as_streaming_dataset(split=data.split)
        if len(split_files) == 1:
            dataset = dataset.reshard()  # a Parquet file into its row groups; others stay as they are
    else:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=data.split)
        if isinstance(builder, ImageFolder):  # images from archives: their copies have other names
            paths = dataset.data.column("image").combine_chunks().field("path").to_pylist()
            dataset = dataset.add_column(NAME, relative(paths))
    info = (builder.info.splits or {}).get(data.split)
    rows = info.num_examples if info else None
    below = None if isinstance(builder, ImageFolder) else root
    return DatasetSplit(dataset, split_files, _revision(builder), data.split, rows or None, files.left_out, below)


def _open_saved(folder: Path, data: DataConfig) -> DatasetSplit:
    """Map what `save_to_disk` wrote into memory, streamed or not."""
    import datasets

    content = datasets.load_from_disk(str(folder))
    splits = {str(content.split or "train"): content} if isinstance(content, datasets.Dataset) else dict(content)
    _split_names(data, list(splits))
    dataset = _select(splits, data.split)
    files = [file["filename"] for file in dataset.cache_files]
    _require_own(data, map(os.path.realpath, files), str(folder))
    return DatasetSplit(dataset, files, split=data.split, root=str(folder))


def _select(splits: Mapping[str, Dataset], split: str) -> Dataset:
    import datasets

    lengths = {name: len(table) for name, table in splits.items()}
    slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    rows = [(part.splitname, range(lengths[part.splitname])[part.from_ : part.to]) for part in slices]
    # select refuses an empty range that begins at the end
    return datasets.concatenate_datasets([splits[name].select(part or range(0)) for name, part in rows])


def _open_images(files: Files, data: DataConfig, builder: DatasetBuilder | None = None) -> DatasetSplit:
    """Image files as a table of paths; those at an address are copied, unless they are streamed."""
    import datasets

    if not files.has_splits:
        data = replace(data, split=_whole_split(data))
    names, tables, given = _split_names(data, list(files.splits)), {}, None
    split_files = [file for name in names for file in files.splits[name]]
    if builder is not None and "label" in (builder.info.features or {}):  # the data set's card numbers its classes
        given = tuple(builder.info.features["label"].names)
    for name in names:
        tables[name] = image_table(files, name, given, data)
        paths = tables[name].data.column("image").combine_chunks().field("path").to_pylist()
        split_files += paths  # metadata files may describe images elsewhere
        if not data.streaming and "://" in "".join(paths[:1]):
            copies = datasets.DownloadManager().download(paths)
            rows = [{"bytes": None, "path": copy} for copy in copies]
            column = datasets.Image(decode=False)
            tables[name] = tables[name].remove_columns("image").add_column("image", rows, feature=column)
    return DatasetSplit(
        _select(tables, data.split), list(dict.fromkeys(split_files)), split=data.split, left_out=files.left_out
    )


def _require_own(data: DataConfig, names: Iterable[str], root: str) -> None:
    """Refuse data that have files elsewhere read: a README.md may name any path and address."""
    of_hub = root.endswith("@")  # any revision
    outside = (name for name in names if not (name.startswith(root) if of_hub else lies_below(name, root, follow_links=False)))
    if not data.allow_paths and (name := next(outside, None)):
        remedy = "set data.allow_paths=true if you trust it"
        raise ConfigError(f"data.source = {data.source!r}: names {name}, which is not below it: {remedy}")


def _find_files(data: DataConfig) -> Files | None:
    files = find_files(data)
    if files is not None and data.subset is not None:
        problem = "has none, as no README.md there names any (configs): set data.subset=null"
        raise ConfigError(f"data.subset = {data.subset!r}: data.source = {data.source!r} {problem}")
    return files


def _known_builder(data: DataConfig) -> DatasetBuilder:
    """Reader of a folder with a README.md that lists `configs`, or of a data set of the hub."""
    source = str(data.source)
    local = Path(source).expanduser()
    try:
        if local.is_dir():
            named = files_of_card(read_card(local))
            _require_own(data, (name if "://" in name else str(local / name) for name in named), str(local))
            return _load_builder(data, str(local.resolve()))
        if hub := re.fullmatch(HUB, source):
            return _hub_builder(data, hub[1], hub[2])
        if _may_be_on_the_hub(source):
            return _hub_builder(data, source, None)
    except FileNotFoundError as error:
        raise ConfigError(f"data.source = {source!r}: holds nothing readable") from error
    raise ConfigError(f"data.source = {source!r}: no such file or folder")


def _known_files(data: DataConfig, builder: DatasetBuilder) -> Files:
    """The files that a README.md or the hub assigns to splits. Others in a folder are left out."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    splits = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    left_out: dict[str, list[str]] = {}
    reason = "not named by README.md" + (f" for subset {data.subset}" if data.subset else "")
    if isinstance(builder, ImageFolder):
        splits = {split: [name for name in names if kind_of(name) or name.endswith(".zip")] for split, names in splits.items()}
    folder = Path(str(data.source)).expanduser()
    if folder.is_dir():
        root = str(folder.resolve())
        named = {os.path.realpath(name) for name in (*chain.from_iterable(splits.values()), f"{root}/README.md")}
        for path in sorted(list_folder(data, root, left_out)):
            if os.path.realpath(path) in named:
                continue
            if kind_of(path):
                left_out.setdefault(reason, []).append(path.removeprefix(f"{root}/"))
            else:
                left_out_by_ending(left_out, path.removeprefix(f"{root}/"))
    return Files("", splits, left_out=left_out)


def _revision(builder: DatasetBuilder) -> str | None:
    return f"{builder.repo_id}@{builder.hash}" if builder.repo_id else None


def _may_be_on_the_hub(source: str) -> bool:
    import datasets.packaged_modules

    # The names of datasets' own readers would read whatever lies in the working directory.
    is_builder = (Path(datasets.packaged_modules.__file__).parent / source).is_dir()
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not is_builder and not kind_of(source)


def _load_builder(data: DataConfig, path: str, **options: Any) -> DatasetBuilder:
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(path, data.subset, **options)
    except ValueError as error:
        names = re.search(r"(?:Available|available configs): \[(.*?)\]", str(error))
        if names is None:
            raise
        raise ConfigError(
            f"data.subset = {data.subset!r}: must be one of {names[1]}, which data.source = {data.source!r} has"
        ) from None


def _hub_builder(data: DataConfig, name: str, revision: str | None) -> DatasetBuilder:
    """Reader of a data set of the hub; of its copy in the cache when the hub cannot be reached.

    The hub goes first, because its data set may have changed. datasets alone would ask it six times, over 23 seconds.
    """
    try:
        list_files(name, "dataset", revision)
    except InputError as error:
        copy = _cached_builder(data, name)
        if copy is None or revision not in (None, copy.hash):
            remedy = "name a local file or folder, or log in with `hf auth login`"
            raise ConfigError(f"data.source = {data.source!r}: cannot be had: {error}; {remedy}") from error
        return copy
    return _load_builder(data, name, revision=revision)


def _cached_builder(data: DataConfig, name: str) -> DatasetBuilder | None:
    import datasets

    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        return _load_builder(data, name)
    except (OSError, ValueError):
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _with_rows(data: DataConfig, files: Files) -> Files:
    """Tables that have rows. All must have the columns and classes of the first, as datasets reads no others."""
    from datasets import ClassLabel, Features
    from datasets.table import CastError, table_cast

    splits, first, empty = dict[str, list[str]](), None, list[str]()
    paths = list(chain.from_iterable(files.splits.values()))
    if files.kind != IMAGES and (path := next((path for path in paths if "::" in path and "://" not in path), None)):
        raise ConfigError(f"data.source = {data.source!r}: {path}: a path of a table must not have :: in it: rename it")
    if files.kind not in ("parquet", "arrow"):
        return files
    require_whole(data, paths)
    for split, names in files.splits.items():
        for path in names:
            if "://" not in path:
                with explain_source_errors(str(data.source), path):
                    has_rows, schema = _look_into(path)
                    kinds = Features.from_arrow_schema(schema)
                    classes = {name: kind.names for name, kind in kinds.items() if isinstance(kind, ClassLabel)}
                if not has_rows:
                    empty.append(path)
                    continue
                first = first or (path, schema, classes)
                try:
                    table_cast(schema.empty_table(), first[1])
                except (CastError, TypeError, ValueError):
                    columns = [", ".join(f"{field.name} ({field.type})" for field in kind) for kind in (first[1], schema)]
                    problem = f"{first[0]} has the columns {columns[0]}, but {path} {columns[1]}: name files of one kind"
                    raise ConfigError(f"data.source = {data.source!r}: {problem}") from None
                if other := next((name for name in classes if first[2].get(name, classes[name]) != classes[name]), None):
                    pairs = list_classes(first[2][other], True), list_classes(classes[other], True)
                    problem = f"{first[0]} has {pairs[0]} in column {other}, but {path} {pairs[1]}: name files of one kind"
                    raise ConfigError(f"data.source = {data.source!r}: {problem}")
            splits.setdefault(split, []).append(path)
    if not splits:
        raise ConfigError(f"data.source = {data.source!r}: holds no rows")
    left_out = files.left_out | ({"without rows": relative(empty)} if empty else {})
    return replace(files, splits=splits, left_out=left_out)


def _look_into(path: str) -> tuple[bool, Any]:
    """Whether a table has rows, and its schema."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    if kind_of(path) == "parquet":
        with ParquetFile(path) as file:
            return file.metadata.num_rows > 0, file.schema_arrow
    with pa.memory_map(path) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(file)
            return any(table.get_batch(number).num_rows for number in range(table.num_record_batches)), table.schema
        return any(batch.num_rows for batch in reader), reader.schema


def require_whole(data: DataConfig, files: list[str]) -> None:
    """Check the ends of local files: tarfile reads a file that was cut off between two members without an error."""
    for file in files:
        end = bytes(1024) if kind_of(file) == "webdataset" else b"PAR1" if kind_of(file) == "parquet" else None
        if end is None or "://" in file:
            continue
        with Path(file).open("rb") as content:
            content.seek(max(0, content.seek(0, os.SEEK_END) - len(end)))
            if content.read() != end:
                raise ConfigError(f"data.source = {data.source!r}: {file} is cut off, or of another kind: its end is missing")


def _files_builder(data: DataConfig, files: Files) -> DatasetBuilder:
    """Reader of tables."""
    from datasets.data_files import DataFilesDict

    escaped = {split: [glob.escape(path) for path in paths] for split, paths in files.splits.items()}
    data_files = DataFilesDict.from_patterns(escaped)
    paths = [path for paths in files.splits.values() for path in paths]
    options: dict[str, Any] = {}
    if files.kind == "webdataset":  # part of the name of datasets' cached copy, like all keyword arguments
        rules = f"rules {TAR_RULES}, label {data.label_column}, text {data.text_column}"
        options = {"features": _tar_features(data, paths), "description": rules}
    # datasets obeys a README.md in the folder that it is given, so it is given one without: this package's.
    return _load_builder(data, str(Path(__file__).parents[1]), data_files=data_files, **options)


def _set_samples(builder: Any, data: DataConfig, tars: list[str]) -> None:
    """Let a reader of WebDataset take samples that lack columns or hold images of several formats.

    By default it demands that the first five samples have the same columns, and drops further columns of later samples.
    """
    from datasets import Image

    builder.info.features = features = builder.info.features or _tar_features(data, tars)
    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    main = images[0] if len(images) == 1 else None
    builder._get_pipeline_from_tar = partial(samples_of_tar, dict.fromkeys(features), main, data)


def _tar_features(data: DataConfig, tars: list[str]) -> Features:
    """Columns of images, labels and texts; one for all images if every sample has one, in whatever format."""
    from datasets import Features, Image, Value

    require_whole(data, tars)
    samples = list[set[str]]()
    for tar in tars:
        is_first, is_remote = tar == tars[0], "://" in tar
        if is_first or not is_remote:  # of tars at an address only the first is looked at
            with explain_source_errors(str(data.source), tar):
                samples += sample_columns(tar, MANY_SAMPLES if is_first and not is_remote else FIRST_SAMPLES)
    if not samples:
        raise ConfigError(f"data.source = {data.source!r}: holds no rows")
    named = [column for column in (data.image_column, data.label_column, data.text_column) if column]
    columns = list(dict.fromkeys([*(column for sample in samples for column in sorted(sample)), *named]))
    images = [column for column in columns if is_image(column)]
    if data.image_column is None and all(sum(map(is_image, sample)) < 2 for sample in samples):
        images = images[:1]
    kinds = {column: "int64" if column in NUMBERS else "string" if column in TEXT_NAMES else "binary" for column in columns}
    others = {
        column: Value(kind) for column, kind in kinds.items() if column in {*LABEL_NAMES, *TEXT_NAMES, *named} - {*images}
    }
    return Features({**others, **dict.fromkeys(images, Image()), "__key__": Value("string"), "__url__": Value("string")})


def _whole_split(data: DataConfig) -> str:
    """A split of files that have none, as slices of `train`."""
    parts = [re.fullmatch(rf"\s*({'|'.join(WHOLE)})\s*(\[.*\])?\s*", part) for part in data.split.split("+")]
    if not all(parts) or len({part[1] for part in parts if part}) != 1:
        legal = f"must be train or a slice of it, such as train[:90%]: data.source = {data.source!r} has no splits"
        raise ConfigError(f"data.split = {data.split!r}: {legal} ({', '.join(WHOLE)} all mean the whole)")
    return "+".join(f"train{part[2] or ''}" for part in parts if part)


def _split_names(data: DataConfig, splits: list[str]) -> list[str]:
    """The splits that `data.split` is made of: one of them, or of a table also slices, such as `train[:90%]`."""
    from datasets import ReadInstruction

    legal = f"must be one of {', '.join(splits)}, which data.source = {data.source!r} has"
    try:
        parts = [part.splitname for part in ReadInstruction.from_spec(data.split).to_absolute(dict.fromkeys(splits, 1))]
    except ValueError as error:
        raise ConfigError(f"data.split = {data.split!r}: {legal}") from error
    if data.streaming and data.split not in splits:
        raise ConfigError(f"data.split = {data.split!r}: {legal}; slices need data.streaming=false")
    return list(dict.fromkeys(parts))
