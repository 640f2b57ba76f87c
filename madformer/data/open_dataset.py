"""Open any source of images with the `datasets` library, and find its columns of images, labels and texts."""

from __future__ import annotations

import errno
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madformer.config import DataConfig
from madformer.errors import ConfigError, InputError
from madformer.lookup import describe, list_files

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features, IterableDataset

__all__ = ["Columns", "DatasetSplit", "explain_errors", "find_columns", "open_split", "silence_datasets"]

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "images", "picture", "photo")
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "fine_label", "target")
TEXT_NAMES = ("text", "caption", "txt", "prompt", "captions", "description")

_TABLES = {"parquet": ".parquet", "arrow": ".arrow", "webdataset": ".tar"}
_READABLE = ".parquet, .arrow, .tar (WebDataset), and image files (.jpg, .png, .webp ...)"


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a data set, as datasets reads it."""

    dataset: Dataset | IterableDataset
    files: list[str]
    """Paths or addresses of the data; empty: known to the hub's cache alone."""
    revision: str | None = None
    """Commit of a data set of the hub, with its name."""
    is_image_folder: bool = False
    expected_rows: int | None = None
    """Number of rows that the data set states."""


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns."""

    image: str
    label: str | None
    text: str | None
    class_names: tuple[str, ...] | None
    """Names of the label's classes, if the data set gives them."""


def open_split(data: DataConfig) -> DatasetSplit:
    """Open the split that `data` names: a table on this machine, or a stream.

    Raises:
        ConfigError: no such source, nothing readable in it, a hub that cannot be had, an unknown split or subset.
        Exception: whatever datasets, a file system or a file format raises; `explain_errors` makes a ConfigError of it.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    folder = Path(str(data.source)).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_saved(folder, data)
    builder = _find_builder(data)
    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    names = _split_names(data, list(files or builder.info.splits or {}))
    split_files = [file for name in names for file in files.get(name, [])]
    _require_whole(data, split_files)
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
    revision = f"{builder.repo_id}@{builder.hash}" if builder.repo_id else None
    info = (builder.info.splits or {}).get(data.split)
    rows = info.num_examples if info else None
    return DatasetSplit(dataset, split_files, revision, isinstance(builder, ImageFolder), rows or None)


def find_columns(features: Features, data: DataConfig) -> Columns:
    """Columns that `data` names; the rest is found by type, then by name.

    Raises:
        ConfigError: none or several may hold the images, or one that is named is not there or of another type.
    """
    import datasets

    images = _candidates("image_column", features, data, IMAGE_NAMES, datasets.Image, _holds_images)
    if len(images) != 1:
        problem = f"{' and '.join(images)} hold images" if images else "no column holds images"
        columns = _list(features)
        raise ConfigError(f"data.image_column = None: {problem}; name one of data.source = {data.source!r}: {columns}")
    labels = _candidates("label_column", features, data, LABEL_NAMES, datasets.ClassLabel, _holds_labels)
    if len(labels) > 1:  # attributes rather than the class
        labels = [name for name in LABEL_NAMES if name in labels]
    if data.label_column is None:  # strings are numbers in WebDataset's column only
        labels = [name for name in labels if name == "cls" or "int" in features[name].dtype]
    texts = _candidates("text_column", features, data, TEXT_NAMES, None, _holds_texts)
    label = next(iter(labels), None)
    classes = features[label] if label else None
    class_names = tuple(classes.names) if isinstance(classes, datasets.ClassLabel) else None
    return Columns(images[0], label, next(iter(texts), None), class_names)


@contextmanager
def explain_errors(source: str, file: str | None = None) -> Iterator[None]:
    """Turn whatever reading a source raises into a ConfigError of one line that names the source, and the file if known."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # file systems and formats raise errors of their own libraries
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cause from error  # the source is not to blame
        reason = describe(cause)
        if isinstance(cause, ImportError):
            missing = cause.name or getattr(cause.__cause__, "name", None)
            reason += f" (pip install {missing})" if missing else ""
        raise ConfigError(f"data.source = {source!r}: {f'{file}: ' if file else ''}cannot be read: {reason}") from error


@contextmanager
def silence_datasets() -> Iterator[None]:
    """Hide the log of datasets, whose errors are raised anyway, and its progress bars where there is no terminal."""
    import datasets

    level = datasets.logging.get_verbosity()
    hides_bars = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if hides_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if hides_bars:
            datasets.enable_progress_bars()


def _open_saved(folder: Path, data: DataConfig) -> DatasetSplit:
    """Map what `save_to_disk` wrote into memory, streamed or not."""
    import datasets

    content = datasets.load_from_disk(str(folder))
    splits = {str(content.split or "train"): content} if isinstance(content, datasets.Dataset) else dict(content)
    _split_names(data, list(splits))
    lengths = {name: len(split) for name, split in splits.items()}
    slices = datasets.ReadInstruction.from_spec(data.split).to_absolute(lengths)
    parts = [splits[part.splitname].select(range(lengths[part.splitname])[part.from_ : part.to]) for part in slices]
    dataset = datasets.concatenate_datasets(parts)
    return DatasetSplit(dataset, [file["filename"] for file in dataset.cache_files])


def _find_builder(data: DataConfig) -> DatasetBuilder:
    """What reads the source, by its form: a folder here, an address, files here, a data set of the hub."""
    source = str(data.source)
    local = Path(source).expanduser()
    try:
        if local.is_dir():
            return _folder_builder(data, local.resolve())
        if hub := re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?/?", source):
            return _hub_builder(data, hub[1], hub[2])
        if "://" in source:
            return _files_builder(data, source, _remote_patterns(source))
        if glob.has_magic(source) or local.is_file():
            path = os.path.abspath(local)  # noqa: PTH100  # resolving links would rename the files
            return _files_builder(data, path, {"train": [glob.escape(path) if local.is_file() else path]})
        if _may_be_on_the_hub(source):
            return _hub_builder(data, source, None)
    except FileNotFoundError as error:
        raise ConfigError(f"data.source = {source!r}: holds nothing readable; known are {_READABLE}") from error
    raise ConfigError(f"data.source = {source!r}: no such file or folder")


def _folder_builder(data: DataConfig, folder: Path) -> DatasetBuilder:
    from datasets.data_files import get_data_patterns

    if (folder / "README.md").exists():  # it may say what belongs to which split and subset
        return _load_builder(data, str(folder))
    return _image_folder_builder(data, folder) or _files_builder(data, str(folder), get_data_patterns(str(folder)))


def _image_folder_builder(data: DataConfig, folder: Path) -> DatasetBuilder | None:
    """Reader of a folder of images; None: it holds something else.

    datasets would list it 66 times to find splits (a quarter of an hour for ImageNet), and take a class called `train` for one.
    Here a folder has splits if that is what all its subfolders are called.
    """
    from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, DataFilesList
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    paths = sorted(_walk(folder))
    endings = {Path(path).suffix.lower() for path in paths}
    if data.subset or endings & {*_TABLES.values(), ".zip"} or not endings & {*ImageFolder.EXTENSIONS}:
        return None
    names = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
    paths = [path for path in paths if path.lower().endswith((*ImageFolder.EXTENSIONS, *ImageFolder.METADATA_FILENAMES))]
    subfolders = [path.removeprefix(f"{folder}/").split("/")[0] for path in paths]
    has_splits = set(subfolders) <= names.keys()
    files: dict[str, list[str]] = {}
    for path, subfolder in zip(paths, subfolders, strict=True):
        files.setdefault(names[subfolder] if has_splits else "train", []).append(path)
    data_files = {split: DataFilesList(paths, [_version(path) for path in paths]) for split, paths in files.items()}
    return ImageFolder(data_files=DataFilesDict(data_files))


def _version(path: str) -> tuple[str, ...]:
    """What makes a cached table of paths, labels and texts out of date."""
    return (str(Path(path).stat().st_mtime_ns),) if Path(path).name.startswith("metadata.") else ()


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (f"{root}/{name}" for name in names if not name.startswith("."))


def _may_be_on_the_hub(source: str) -> bool:
    import datasets.packaged_modules

    # The names of datasets' own readers would read whatever lies in the working directory.
    is_builder = (Path(datasets.packaged_modules.__file__).parent / source).is_dir()
    is_file = Path(source).suffix in _TABLES.values()
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not is_builder and not is_file


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


def _remote_patterns(url: str) -> dict[str, list[str]]:
    from datasets.data_files import get_data_patterns
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    if glob.has_magic(path) or filesystem.isfile(path):
        return {"train": [url]}
    if filesystem.isdir(path):
        return get_data_patterns(url)
    raise ConfigError(f"data.source = {url!r}: no such file or folder, or it cannot be reached")


def _files_builder(data: DataConfig, base: str, patterns: dict[str, list[str]]) -> DatasetBuilder:
    """Reader of files named one by one, or by patterns; of several kinds of file, the commonest."""
    from datasets.data_files import DataFilesDict
    from datasets.load import infer_module_for_data_files
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    files = DataFilesDict.from_patterns(patterns, base_path=base)
    if not any(files.values()):
        raise ConfigError(f"data.source = {data.source!r}: no file has such a name")
    endings = [*_TABLES.values(), *ImageFolder.EXTENSIONS, ".zip"]
    files = files.filter(extensions=endings, file_names=ImageFolder.METADATA_FILENAMES)
    kind, _ = infer_module_for_data_files(files, path=base)
    if kind in _TABLES:
        files = files.filter(extensions=[_TABLES[kind]])
    # Files are read as those of a folder without a README, which would have its say: this package's.
    return _load_builder(data, str(Path(__file__).parents[1]), data_files=files)


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


def _require_whole(data: DataConfig, files: list[str]) -> None:
    """Look at the ends of local files: tarfile takes what is cut off between two members for the end."""
    for file in files:
        end = bytes(1024) if file.endswith(".tar") else b"PAR1" if file.endswith(".parquet") else None
        if end is None or "://" in file:
            continue
        with Path(file).open("rb") as content:
            content.seek(max(0, content.seek(0, os.SEEK_END) - len(end)))
            if content.read() != end:
                raise ConfigError(f"data.source = {data.source!r}: {file} is cut off, or of another kind: its end is missing")


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
