"""The files of a source, listed once by the rules of docs/data.md; a folder of images as a table of paths.

`datasets` would list a folder 66 times to guess splits from words in its paths, and take what it does not guess for nothing.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from madformer.config import DataConfig
from madformer.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["IMAGES", "NAME", "TABLES", "Files", "find_files", "hash_files", "image_table", "relative"]

NAME = "__name__"
"""Column with the name of an image within its source."""

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
IMAGES = "images"
READABLE = ".parquet, .arrow, .tar (WebDataset), and image files (.jpg, .png, .webp ...)"
METADATA = {"metadata.csv": "csv", "metadata.jsonl": "json", "metadata.parquet": "parquet"}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of folders and words in the names of tables that tell a split, as on the hub."""

HUB = r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?/?"
"""Address of a whole data set of the hub: its name and revision."""

PIECE = 2**14
"""Bytes at the start, in the middle and at the end of a file that its fingerprint covers."""

THREADS = 16


@dataclass
class Files:
    """What a source holds."""

    kind: str
    """`IMAGES`, or datasets' name of a kind of table."""
    splits: dict[str, list[str]]
    """Paths or addresses in order, by split; of images also metadata files."""
    has_splits: bool = True
    """False: files that are named themselves, which are all of it."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of files that are not read, by reason."""


def find_files(data: DataConfig) -> Files | None:
    """What the source's path, pattern or address holds; None: it is none of these.

    Raises:
        ConfigError: nothing readable in it, a folder that cannot be listed, or one that can be read in several ways.
    """
    source, left_out = str(data.source), dict[str, list[str]]()
    local = Path(source).expanduser()
    if local.is_dir():
        root = str(local.resolve())
        return _arrange(data, root, [f"{root}/{name}" for name in _walk(data, root, left_out)], left_out, is_folder=True)
    if "://" in source:
        return None if re.fullmatch(HUB, source) else _find_remote(data, source)
    if local.is_file():  # not resolved: links would rename the files
        return _arrange(data, "", [os.path.abspath(local)], left_out, is_folder=False)  # noqa: PTH100
    if glob.has_magic(source):
        found = sorted(path for path in glob.glob(os.path.abspath(local), recursive=True) if Path(path).is_file())  # noqa: PTH100, PTH207
        folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in found}}  # noqa: PTH120
        once = {(folders[os.path.dirname(path)], os.path.basename(path)): path for path in reversed(found)}  # noqa: PTH119, PTH120
        if not found:
            raise ConfigError(f"data.source = {source!r}: no file has such a name")
        paths = [path for path in sorted(once.values()) if _is_text(path, left_out)]
        return _arrange(data, "", paths, left_out, is_folder=False)
    return None


def _find_remote(data: DataConfig, url: str) -> Files:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    if filesystem.isfile(path):
        return _arrange(data, "", [url], {}, is_folder=False)
    if is_folder := not glob.has_magic(path):
        if not filesystem.isdir(path):
            raise ConfigError(f"data.source = {url!r}: no such file or folder, or it cannot be reached")
        found = filesystem.find(path, detail=True)
    else:
        found = filesystem.glob(path, detail=True)
        if not any(entry["type"] == "file" for entry in found.values()):
            raise ConfigError(f"data.source = {url!r}: no file has such a name")
    root = filesystem.unstrip_protocol(path).rstrip("/")
    addresses = sorted(filesystem.unstrip_protocol(name) for name, entry in found.items() if entry["type"] == "file")
    left_out = dict[str, list[str]]()
    if is_folder:
        hidden = [name for name in addresses if re.search(r"/(\.|__)", name.removeprefix(root))]
        addresses = [name for name in addresses if name not in set(hidden)]
        left_out |= {"hidden": hidden} if hidden else {}
    return _arrange(data, root, addresses, left_out, is_folder)


def _walk(data: DataConfig, root: str, left_out: dict[str, list[str]]) -> list[str]:
    """Names of all files below a folder, sorted; links are followed, and each folder is read once."""
    names, folders, links, seen = list[str](), [""], list[str](), set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # a folder goes before links to it
        try:
            status = Path(root, folder).stat()
            entries = sorted(os.scandir(Path(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"data.source = {data.source!r}: the folder {folder or '.'} cannot be read: {error}") from error
        if (status.st_dev, status.st_ino) in seen:
            left_out.setdefault("links to folders that are read already", []).append(folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith((".", "__")):
                left_out.setdefault("hidden", []).append(name)
            elif not _is_text(entry.name, left_out):
                if entry.is_dir():
                    raise ConfigError(
                        f"data.source = {data.source!r}: the folder {_shown(name)} has no name in UTF-8: rename it"
                    )
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(name)
            elif entry.is_file():
                names.append(name)
            else:  # a link to nothing, a socket
                left_out.setdefault("neither files nor folders", []).append(name)
    return sorted(names)


def _is_text(name: str, left_out: dict[str, list[str]]) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        left_out.setdefault("not named in UTF-8", []).append(_shown(name))
        return False
    return True


def _shown(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


# ---- Rules


def _arrange(data: DataConfig, root: str, paths: list[str], left_out: dict[str, list[str]], is_folder: bool) -> Files:
    """Sort files into splits, all of one kind; what is of no kind is left out.

    Raises:
        ConfigError: they are of several kinds or none, or the folder can be read in several ways.
    """
    kinds: dict[str, list[str]] = {}
    for path in paths:
        if kind := _kind(path):
            kinds.setdefault(kind, []).append(path)
        else:
            left_out.setdefault(_ending(path.rpartition("/")[2]) or "without ending", []).append(path.removeprefix(f"{root}/"))
    metadata = kinds.pop("metadata", [])
    if not kinds:
        raise ConfigError(f"data.source = {data.source!r}: holds nothing readable; known are {READABLE}")
    if len(kinds) > 1:
        examples = " and ".join(found[0].removeprefix(f"{root}/") for found in kinds.values())
        remedy = (
            f"name those to read, as data.source={_pattern(root, '**/*' + PurePosixPath(next(iter(kinds.values()))[0]).suffix)}"
        )
        raise ConfigError(f"data.source = {data.source!r}: holds files of several kinds ({examples}): {remedy}")
    ((kind, files),) = kinds.items()
    if kind == IMAGES:
        files = sorted([*files, *metadata])
    else:
        for path in metadata:
            left_out.setdefault("beside tables", []).append(path.removeprefix(f"{root}/"))
    if not is_folder:
        return Files(kind, {"train": files}, has_splits=False, left_out=left_out)
    split_of = _splits_of_images if kind == IMAGES else _splits_of_tables
    splits: dict[str, list[str]] = {}
    for path, split in zip(files, split_of(data, root, [path.removeprefix(f"{root}/") for path in files]), strict=True):
        splits.setdefault(split, []).append(path)
    usual = {split: splits[split] for split in SPLITS.values() if split in splits}
    return Files(kind, usual | splits, left_out=left_out)


def _kind(path: str) -> str | None:
    name = path.rpartition("/")[2]
    ending = _ending(name)
    return "metadata" if name in METADATA else TABLES.get(ending) or (IMAGES if ending in _image_endings() else None)


def _ending(name: str) -> str:
    return "".join(name.rpartition(".")[1:]).lower() if "." in name else ""


@cache
def _image_endings() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)


def _splits_of_images(data: DataConfig, root: str, names: list[str]) -> Iterable[str]:
    """The split of each image: what its top folder is called, if all of those are called like splits; else all are `train`."""
    folders = [name.split("/")[:-1] for name in names]
    if all(path and path[0] in SPLITS for path in folders):
        return [SPLITS[path[0]] for path in folders]
    called = sorted({"/".join(path[: level + 1]) for path in folders for level, part in enumerate(path) if part in SPLITS})
    one_class = len({SPLITS[PurePosixPath(path).name] for path in called}) < 2
    if not (one_class and all(part not in SPLITS for path in folders for part in path[:-1])):
        other = next(
            (path[0] if path else name for path, name in zip(folders, names, strict=True) if not {*path} & {*SPLITS}), None
        )
        beside = f", {other} beside it is not" if other else ""
        remedy = f"name one split, as data.source={root}/{called[0]}, or all images without classes: {_pattern(root, '**')}"
        raise ConfigError(f"data.source = {data.source!r}: the folder {called[0]} is called like a split{beside}: {remedy}")
    return ["train"] * len(names)


def _splits_of_tables(data: DataConfig, root: str, names: list[str]) -> Iterable[str]:
    """The split of each table: the word for one in its path; without such words all are `train`."""
    custom = [re.search(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.\w+$", name) for name in names]
    if all(custom):
        return [match[1] for match in custom if match]
    found = [{SPLITS[word] for word in re.split(r"[^A-Za-z]+", name) if word in SPLITS} for name in names]
    if not any(found):
        return ["train"] * len(names)
    for name, splits in zip(names, found, strict=True):
        if len(splits) != 1:
            problem = f"names the splits {' and '.join(sorted(splits))}" if splits else "names no split, other files do"
            remedy = f"name the files to read, as data.source={_pattern(root, '**/*' + PurePosixPath(name).suffix)}"
            raise ConfigError(f"data.source = {data.source!r}: {name} {problem}: {remedy}")
    return [split for splits in found for split in splits]


def _pattern(root: str, pattern: str) -> str:
    return f"'{glob.escape(root)}/{pattern}'"


# ---- Images


def image_table(files: Files, split: str, class_names: tuple[str, ...] | None, data: DataConfig) -> Dataset:
    """The images of a split as a table of paths: `image`, undecoded, `NAME`, and `label` or what metadata files say.

    Folders are classes if the images of a split lie equally deep in several of them. Classes are numbered over all splits. Rows
    are sorted by name, and for a slice by the hashes of names.

    Args:
        class_names: the classes in the order of their numbers; None: sorted.

    Raises:
        ConfigError: images of a folder lie at several depths, or a metadata file does not name its images.
    """
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value

    images = {name: [path for path in paths if _kind(path) == IMAGES] for name, paths in files.splits.items()}
    if len(images[split]) < len(files.splits[split]):
        table = _described_images(files, split, data)
        kinds = Features.from_arrow_schema(table.drop_columns("image").schema)
    else:
        folders = {name: [path.rsplit("/", 2)[-2] for path in paths] for name, paths in images.items()}
        depths = {name: {path.count("/") for path in paths} for name, paths in images.items()}
        if len(depths[split]) > 1 and files.kind == IMAGES and files.has_splits:
            _refuse_depths(data, images[split])
        flat = {name: set(parents) for name, parents in folders.items() if len(depths[name]) == 1}
        classes = sorted(set().union(*(found for found in flat.values() if len(found) > 1)))
        columns: dict[str, Any] = {NAME: relative(images[split])}
        kinds = Features({NAME: Value("string")})
        if split in flat and flat[split] <= set(classes):
            kinds["label"] = ClassLabel(names=list(class_names or classes))
            numbers = {name: kinds["label"].str2int(name) for name in flat[split]}
            columns["label"] = [numbers[name] for name in folders[split]]
        table = pa.table(columns).append_column("image", pa.array(images[split], pa.string()))
    paths = table["image"].combine_chunks()
    fields = {"bytes": pa.nulls(len(paths), pa.binary()), "path": paths}
    structs = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    table = table.set_column(table.column_names.index("image"), "image", structs)
    features = Features({"image": Image(decode=False), **{name: kinds[name] for name in table.column_names if name != "image"}})
    table = table.select(list(features)).cast(features.arrow_schema)
    if "[" in data.split:  # sorted by name and so by class, a slice would lack classes
        names = table[NAME].to_pylist()
        table = table.take(sorted(range(len(names)), key=lambda row: hashlib.sha256(names[row].encode()).digest()))
    return Dataset(table, DatasetInfo(features=features), fingerprint="images")  # else it would hash all paths


def _refuse_depths(data: DataConfig, paths: list[str]) -> None:
    shallow, deep = (pick(paths, key=lambda path: path.count("/")) for pick in (min, max))
    root = os.path.commonpath([shallow, deep]) if "://" not in shallow else str(data.source).rstrip("/")
    names = " and ".join(path.removeprefix(f"{root}/") for path in (shallow, deep))
    levels = "/".join("*" * (deep.removeprefix(f"{root}/").count("/") + 1))
    remedy = (
        f"name the images that have classes, as data.source={_pattern(root, levels)}, or all without: {_pattern(root, '**')}"
    )
    raise ConfigError(
        f"data.source = {data.source!r}: {names} lie at different depths, so that folders are no classes: {remedy}"
    )


def _described_images(files: Files, split: str, data: DataConfig) -> Any:
    """Rows of the metadata files of a split, as a table of Arrow; images that are in none are left out."""
    import fsspec
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers = {"csv": pyarrow.csv.read_csv, "json": pyarrow.json.read_json, "parquet": pyarrow.parquet.read_table}
    tables, images = [], {path for path in files.splits[split] if _kind(path) == IMAGES}
    for path in files.splits[split]:
        if path in images:
            continue
        with fsspec.open(path, "rb") as file:
            table = readers[METADATA[PurePosixPath(path).name]](file)
        if "file_name" not in table.column_names:
            remedy = "name its images there, relative to it, or give the file another name"
            raise ConfigError(f"data.source = {data.source!r}: {path} has no column file_name: {remedy}")
        folder = path.rpartition("/")[0]
        addresses = [
            os.path.normpath(f"{folder}/{name}") if "://" not in path else f"{folder}/{name}"
            for name in table["file_name"].to_pylist()
        ]
        tables.append(table.drop_columns("file_name").append_column("image", pa.array(addresses, pa.string())))
    table = pa.concat_tables(tables, promote_options="permissive")
    listed = table["image"].to_pylist()
    if missing := sorted(images - set(listed)):
        files.left_out["in no metadata file"] = relative(missing)
    return table.append_column(NAME, pa.array(relative(listed), pa.string()))


def relative(paths: list[str]) -> list[str]:
    """Names within the paths' common folder."""
    folders = [folder.split("/") for folder in {path.rpartition("/")[0] for path in paths}]
    first, last = min(folders), max(folders)
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    length = sum(len(part) + 1 for part in first[:depth])
    return [path[length:] for path in paths]


# ---- Fingerprints


def hash_files(paths: list[str]) -> list[list[Any]]:
    """Name within their common folder, size, and SHA-256 of three pieces of each file, sorted.

    Small files and metadata files are covered whole, and of images at an address the size alone: requests would take hours.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        hashes = list(threads.map(_hash_pieces, paths))
    return sorted([name, *found] for name, found in zip(relative(paths), hashes, strict=True))


def _hash_pieces(path: str) -> tuple[int, str]:
    if "://" in path:
        from fsspec.core import url_to_fs

        filesystem, place = url_to_fs(path)
        size, is_image = filesystem.size(place), _kind(path) == IMAGES
        parts = [] if is_image else [filesystem.cat_file(place, start, end) for start, end in _pieces(path, size)]
        return size, hashlib.sha256(b"".join(parts)).hexdigest()
    try:
        with Path(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            parts = [os.pread(file.fileno(), end - start, start) for start, end in _pieces(path, size)]
            return size, hashlib.sha256(b"".join(parts)).hexdigest()
    except (FileNotFoundError, PermissionError):
        return 0, ""  # a broken image, skipped where it is met


def _pieces(path: str, size: int) -> list[tuple[int, int]]:
    if size <= 3 * PIECE or _kind(path) == "metadata":
        return [(0, size)]
    return [(start, start + PIECE) for start in (0, (size - PIECE) // 2, size - PIECE)]
