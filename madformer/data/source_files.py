"""The files of a source, listed once by the rules of docs/reference/data.md.

`datasets` would list a folder 66 times to guess splits from words in its paths, and silently ignore all other files.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain, takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from madformer.config import DataConfig
from madformer.errors import ConfigError

__all__ = [
    "FORMATS",
    "IMAGES",
    "LABEL_NAMES",
    "METADATA",
    "NAME",
    "TEXT_NAMES",
    "Files",
    "find_files",
    "hash_files",
    "image_endings",
    "kind_of",
    "left_out_by_ending",
    "lies_below",
    "list_classes",
    "list_folder",
    "pattern_in",
    "relative",
    "root_of",
    "shown",
]

NAME = "__name__"
"""Column with the name of an image within its source."""

LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "fine_label", "target")
TEXT_NAMES = ("text", "caption", "txt", "prompt", "captions", "description")

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
IMAGES = "images"
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
"""Formats that are read, as Pillow calls them. Others start programs (EPS), or are no images of pixels."""
READABLE = ".parquet, .arrow, .tar (WebDataset), and image files (.jpg, .png, .webp ...)"
METADATA = {"metadata.csv": "csv", "metadata.jsonl": "json", "metadata.parquet": "parquet"}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Folder names, and words in the names of tables, that name a split, as on the hub."""

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
    """False: a file or a pattern of files, which have no splits."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of files that are not read, by reason."""


def find_files(data: DataConfig) -> Files | None:
    """The files of a source that is a path, a pattern or a URL; None: it is none of these.

    Raises:
        ConfigError: nothing readable in it, a folder that cannot be listed, or an ambiguous one.
    """
    source, left_out = str(data.source), dict[str, list[str]]()
    local = Path(source).expanduser()
    if local.is_dir():
        root = str(local.resolve())
        return _arrange(data, root, _once(root, list_folder(data, root, left_out), left_out), left_out, is_folder=True)
    if "://" in source:
        return None if re.fullmatch(HUB, source) else _find_remote(data, source)
    if local.is_file():  # not resolved: links would rename the files
        path = os.path.abspath(local)  # noqa: PTH100
        return _arrange(data, path.rpartition("/")[0], [path], left_out, is_folder=False)
    if glob.has_magic(source):
        paths = _match(data, os.path.abspath(local), left_out)  # noqa: PTH100
        if not paths:
            raise ConfigError(f"data.source = {source!r}: no file has such a name")
        root = os.path.commonpath([path.rpartition("/")[0] for path in paths])
        paths = _once(root, [path for path in paths if _is_text(path, left_out)], left_out)
        return _arrange(data, root, paths, left_out, is_folder=False)
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
        is_hidden = {name: re.search(r"/(\.|__)", name.removeprefix(root)) is not None for name in addresses}
        hidden, addresses = ([name for name in addresses if is_hidden[name] is wanted] for wanted in (True, False))
        left_out |= {"hidden": hidden} if hidden else {}
    return _arrange(data, root, addresses, left_out, is_folder)


def _match(data: DataConfig, pattern: str, left_out: dict[str, list[str]]) -> list[str]:
    """Paths of all files that match the pattern; `**` matches any depth."""
    parts = pattern.split("/")
    if "**" not in parts:
        return [path for path in glob.glob(pattern) if Path(path).is_file()]  # noqa: PTH207
    depth = parts.index("**")  # glob would follow loops of links, and pass over folders that it cannot read
    roots = [root for root in glob.glob("/".join(parts[:depth]) or "/") if Path(root).is_dir()]  # noqa: PTH207
    found = [(root, path) for root in roots for path in list_folder(data, root, left_out)]
    return [path for root, path in found if _matches(path[len(root) + 1 :].split("/"), parts[depth:])]


def _matches(names: list[str], pattern: list[str]) -> bool:
    if pattern[:1] == ["**"]:
        return pattern == ["**"] or any(_matches(names[start:], pattern[1:]) for start in range(len(names)))
    if not names or not pattern:
        return names == pattern
    return fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _once(root: str, paths: list[str], left_out: dict[str, list[str]]) -> list[str]:
    """Sorted paths of different files; a file goes before links to it."""
    folders = {folder: os.path.realpath(folder) for folder in {path.rpartition("/")[0] for path in paths}}
    once: dict[str, str] = {}
    for is_link, _, path in sorted((os.path.islink(path), path.count("/"), path) for path in paths):  # noqa: PTH114
        folder, slash, name = path.rpartition("/")
        if once.setdefault(os.path.realpath(path) if is_link else folders[folder] + slash + name, path) != path:
            left_out.setdefault("links to files that are read already", []).append(path.removeprefix(f"{root}/"))
    return sorted(once.values())


def list_folder(data: DataConfig, root: str, left_out: dict[str, list[str]]) -> list[str]:
    """Paths of all files below a folder; links are followed, and each folder is read once."""
    paths, folders, links, seen = list[str](), [""], list[str](), set[tuple[int, int]]()
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
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or to a place without permission
                is_folder = is_file = False
            if entry.name.startswith((".", "__")):
                left_out.setdefault("hidden", []).append(name)
            elif not _is_text(entry.name, left_out):
                if is_folder:
                    raise ConfigError(
                        f"data.source = {data.source!r}: the folder {shown(name)} has no name in UTF-8: rename it"
                    )
            elif is_folder:
                (links if entry.is_symlink() else folders).append(name)
            elif is_file:
                paths.append(f"{root}/{name}")
            else:  # a link to nothing, a socket
                left_out.setdefault("neither files nor folders", []).append(name)
    return paths


def _is_text(name: str, left_out: dict[str, list[str]]) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        left_out.setdefault("not named in UTF-8", []).append(shown(name))
        return False
    return True


def shown(name: str) -> str:
    """A name for messages. Its bytes that are not UTF-8 are written in hexadecimal."""
    return os.fsencode(name).decode(errors="backslashreplace")


# ---- Rules


def _arrange(data: DataConfig, root: str, paths: list[str], left_out: dict[str, list[str]], is_folder: bool) -> Files:
    """Sort files into splits, all of one kind; files of no known kind are left out.

    Raises:
        ConfigError: they are of several kinds or none, or the folder is ambiguous.
    """
    kinds: dict[str, list[str]] = {}
    for path in paths:
        if kind := kind_of(path):
            kinds.setdefault(kind, []).append(path)
        else:
            left_out_by_ending(left_out, path.removeprefix(f"{root}/"))
    metadata = kinds.pop("metadata", [])
    if not kinds:
        raise ConfigError(f"data.source = {data.source!r}: holds nothing readable; known are {READABLE}")
    if len(kinds) > 1:
        examples = " and ".join(found[0].removeprefix(f"{root}/") for found in kinds.values())
        ending = PurePosixPath(next(iter(kinds.values()))[0]).suffix
        remedy = f"name those to read, as data.source={pattern_in(root, f'**/*{ending}')}"
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


def kind_of(path: str) -> str | None:
    """`IMAGES`, `metadata`, or datasets' name of a kind of table, by the file's name; None: it is not read."""
    name = path.rpartition("/")[2]
    ending = _ending(name)
    return "metadata" if name in METADATA else TABLES.get(ending) or (IMAGES if ending in image_endings() else None)


def left_out_by_ending(left_out: dict[str, list[str]], name: str) -> None:
    """Add a file that is of no known kind."""
    left_out.setdefault(_ending(name.rpartition("/")[2]) or "without ending", []).append(name)


def _ending(name: str) -> str:
    return "".join(name.rpartition(".")[1:]).lower() if "." in name else ""


@cache
def image_endings() -> frozenset[str]:
    """Endings of image files, such as `.png`."""
    from PIL import Image

    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def _splits_of_images(data: DataConfig, root: str, names: list[str]) -> Iterable[str]:
    """The split of each image: its top folder's, if all top folders are named like splits; else `train`."""
    folders = [name.split("/")[:-1] for name in names]
    splits = [[SPLITS.get(part.lower()) for part in path] for path in folders]
    if all(found and found[0] for found in splits):
        return [str(found[0]) for found in splits]
    words = [[_split_words(part) for part in path] for path in folders]  # also of train2017 or test_images
    named: Sequence[Sequence[Any]] = splits if any(map(any, splits)) else words
    called = sorted(
        {
            "/".join(path[: level + 1])
            for path, found in zip(folders, named, strict=True)
            for level in range(len(path))
            if found[level]
        }
    )
    one_class = len(set().union(*chain.from_iterable(words))) < 2
    if not one_class or any(split for found in splits for split in found[:-1]):
        other = next((name.split("/")[0] for name, found in zip(names, named, strict=True) if not any(found)), None)
        beside = f", {other} beside it is not" if other else ""
        remedy = f"name one split, as data.source={root}/{called[0]}, or all images: {pattern_in(root, '**')}"
        raise ConfigError(f"data.source = {data.source!r}: the folder {called[0]} is called like a split{beside}: {remedy}")
    return ["train"] * len(names)


def _splits_of_tables(data: DataConfig, root: str, names: list[str]) -> Iterable[str]:
    """The split of each table: that of the split word in its path; `train` if no path has such a word."""
    custom = [re.search(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.\w+$", name) for name in names]
    if all(custom):
        return [match[1] for match in custom if match]
    found = [_split_words(name) for name in names]
    if not any(found):
        return ["train"] * len(names)
    for name, splits in zip(names, found, strict=True):
        if len(splits) != 1:
            problem = f"names the splits {' and '.join(sorted(splits))}" if splits else "names no split, other files do"
            remedy = f"name the files to read, as data.source={pattern_in(root, '**/*' + PurePosixPath(name).suffix)}"
            raise ConfigError(f"data.source = {data.source!r}: {name} {problem}: {remedy}")
    return [split for splits in found for split in splits]


@cache  # a million images have few folders
def _split_words(name: str) -> frozenset[str]:
    return frozenset(SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS)


def pattern_in(root: str, pattern: str) -> str:
    """A pattern of files in a folder, quoted for a shell."""
    return f"'{glob.escape(root)}/{pattern}'"


def relative(paths: list[str]) -> list[str]:
    """Names within the paths' common folder."""
    folders = [folder.split("/") for folder in {path.rpartition("/")[0] for path in paths}]
    first, last = min(folders), max(folders)
    depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    length = sum(len(part) + 1 for part in first[:depth])
    return [path[length:] for path in paths]


def root_of(data: DataConfig, path: str) -> str:
    """The folder or address that files of a source lie below: the source itself, or the folder of one of its files."""
    source = str(data.source)
    if Path(source).expanduser().is_dir():
        return str(Path(source).expanduser())
    is_folder = "://" in source and path.startswith(source.rstrip("/") + "/")
    return source.rstrip("/") if is_folder else path.rpartition("/")[0] or f"hf://{source}"


def lies_below(path: str, root: str, follow_links: bool = True) -> bool:
    """Whether a path or an address is below a folder or an address."""
    if "://" in path or "://" in root:
        rest = path.removeprefix(f"{root}/")
        return rest != path and not {"..", "."} & set(rest.split("/")) and "::" not in rest and "%2e" not in rest.lower()
    final = os.path.realpath(path) if follow_links else os.path.abspath(path)  # noqa: PTH100
    roots = os.path.realpath(root), os.path.abspath(root)  # noqa: PTH100 - a link may lead to it
    return any(final.startswith(os.path.join(each, "")) for each in roots)  # noqa: PTH118


def list_classes(names: Sequence[str] | None, has_labels: bool) -> str:
    """How many classes there are and what the first ones are called, for messages."""
    if names is None:
        return "classes without names" if has_labels else "no classes"
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


# ---- Fingerprints


def hash_files(paths: list[str]) -> list[list[Any]]:
    """Name within their common folder, size, and SHA-256 of three pieces of each file, sorted.

    Small files and metadata files are hashed whole. For images at a URL only the size counts: requests would take hours.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        chunks = [paths[start : start + 1000] for start in range(0, len(paths), 1000)]
        hashes = list(chain.from_iterable(threads.map(lambda chunk: list(map(_hash_pieces, chunk)), chunks)))
    return sorted([name, *found] for name, found in zip(relative(paths), hashes, strict=True))


def _hash_pieces(path: str) -> tuple[int, str]:
    if "://" in path:
        from fsspec.core import url_to_fs

        filesystem, place = url_to_fs(path)
        size, is_image = filesystem.size(place), kind_of(path) == IMAGES
        parts = [] if is_image else [filesystem.cat_file(place, start, end) for start, end in _pieces(path, size)]
        return size, hashlib.sha256(b"".join(parts)).hexdigest()
    try:
        with Path(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            parts = [os.pread(file.fileno(), end - start, start) for start, end in _pieces(path, size)]
            return size, hashlib.sha256(b"".join(parts)).hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        return 0, ""  # a broken image, skipped where it is met


def _pieces(path: str, size: int) -> list[tuple[int, int]]:
    if size <= 3 * PIECE or kind_of(path) == "metadata":
        return [(0, size)]
    return [(start, start + PIECE) for start in (0, (size - PIECE) // 2, size - PIECE)]
