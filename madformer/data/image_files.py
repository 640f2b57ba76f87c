"""Image files: a folder or a tar of them as a table; read any format as square RGB."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from madformer.config import DataConfig
from madformer.config.data import MAX_PIXELS
from madformer.data.source_files import (
    FORMATS,
    IMAGES,
    LABEL_NAMES,
    METADATA,
    NAME,
    TEXT_NAMES,
    Files,
    image_endings,
    kind_of,
    lies_below,
    pattern_in,
    relative,
    root_of,
    shown,
)
from madformer.errors import BadImage, ConfigError
from madformer.lookup import explain_source_errors

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "NUMBERS",
    "decode_image",
    "image_table",
    "is_image",
    "load_square",
    "sample_columns",
    "samples_of_tar",
    "square_image",
    "to_unit",
]


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a file, upright (EXIF) and in mode RGB; what is transparent lies on white, 16 bits are scaled to 8.

    Raises:
        BadImage: empty, cut off or broken, of no format in `FORMATS`, or of more than `max_pixels`.
    """
    if not content:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(content), formats=_readable_formats())
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels: more than data.max_pixels = {max_pixels:,}")
        image.load()
        return _to_rgb(_upright(image))
    except BadImage:
        raise
    except UnidentifiedImageError:  # its own message is an address in memory
        raise BadImage("no image, or of a format that is not read") from None
    except Exception as error:  # Pillow's readers raise whatever they run into: struct.error, SyntaxError, KeyError ...
        reason = str(error).strip().splitlines()
        raise BadImage(reason[0] if reason else type(error).__name__) from error


def square_image(image: Image.Image, size: int, crop: str = "centre") -> Tensor:
    """A square of an RGB image, scaled so that its shorter side fits: uint8 [3, size, size].

    Args:
        crop: `data.crop`. `centre`: exactly as ADM prepares ImageNet (`center_crop_arr` of guided-diffusion), halved by a box
            filter while it stays at least as large as wanted, then bicubic. `top_left`: as the released code, the largest
            square at the top left, then Lanczos. An image of the right size stays as it is.

    Raises:
        BadImage: so long and thin that its shorter side cannot be enlarged to `size`.
    """
    if crop == "top_left":
        side = min(image.size)
        square = image.crop((0, 0, side, side)).resize((size, size), resample=Image.Resampling.LANCZOS)
        return rearrange(torch.from_numpy(np.array(square)), "y x c -> c y x").contiguous()
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels: too thin for a square of {size}")
    pixels_YXC = np.array(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    square_YXC = pixels_YXC[top : top + size, left : left + size]
    return rearrange(torch.from_numpy(square_YXC), "y x c -> c y x").contiguous()


@cache
def _readable_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def load_square(content: bytes, size: int, crop: str = "centre", max_pixels: int = MAX_PIXELS) -> Tensor:
    """A square of the image in a file, cropped by `data.crop`: uint8 [3, size, size].

    Raises:
        BadImage: as `decode_image` and `square_image`.
    """
    return square_image(decode_image(content, max_pixels), size, crop)


def to_unit(images_BCYX: Tensor) -> Tensor:
    """Bytes 0 .. 255 to float32 in [-1, 1]."""
    return images_BCYX.float() / 127.5 - 1


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF says nothing about the pixels, which are loaded by now
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips or drops bits, depending on its version
        depth16_YX = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((depth16_YX + 128) // 257).astype(np.uint8))
    elif image.mode == "F":  # either 0 .. 1 or 0 .. 255; nothing in the file says which
        values_YX = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values_YX * (255 if values_YX.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_table(files: Files, split: str, class_names: tuple[str, ...] | None, data: DataConfig) -> Dataset:
    """The images of a split as a table of paths: `image`, undecoded, `NAME`, and `label` or what metadata files say.

    Folders are classes if there are several and the images of a split are all at the same depth. Classes are numbered over all
    splits. Rows are sorted by name; for a slice, by the hashes of the names.

    Args:
        class_names: the classes in the order of their numbers; None: sorted.

    Raises:
        ConfigError: images of a folder lie at several depths, or a metadata file does not name its images.
    """
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value

    images = {name: [path for path in paths if kind_of(path) == IMAGES] for name, paths in files.splits.items()}
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
    return Dataset(table, DatasetInfo(features=features), fingerprint="images")  # without one, datasets would hash all paths


def _refuse_depths(data: DataConfig, paths: list[str]) -> None:
    shallow, deep = (pick(paths, key=lambda path: path.count("/")) for pick in (min, max))
    root = os.path.commonpath(paths) if "://" not in shallow else str(data.source).rstrip("/")
    names = " and ".join(path.removeprefix(f"{root}/") for path in (shallow, deep))
    levels = "/".join("*" * (deep.removeprefix(f"{root}/").count("/") + 1))
    remedy = f"name those with classes, as data.source={pattern_in(root, levels)}, or all without: {pattern_in(root, '**')}"
    raise ConfigError(
        f"data.source = {data.source!r}: {names} lie at different depths, so that folders are no classes: {remedy}"
    )


def _described_images(files: Files, split: str, data: DataConfig) -> Any:
    """Rows of the metadata files of a split, as a table of Arrow; images that are in none are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables, images = [], {path for path in files.splits[split] if kind_of(path) == IMAGES}
    listed, rows = list[str](), Counter[str]()
    for path in files.splits[split]:
        if path in images:
            continue
        with explain_source_errors(str(data.source), path):
            table = _read_metadata(data, path)
        names = table["file_name"].to_pylist() if "file_name" in table.column_names else []
        folder = path.rpartition("/")[0]
        addresses = [
            f"{folder}/{name}" if "://" in path else os.path.normpath(os.path.join(folder, str(name)))  # noqa: PTH118
            for name in names
        ]
        rows.update(addresses)
        problem = None
        if not names:
            problem = "names no images in a column file_name: name them there, relative to it, or give the file another name"
        elif len(set(table.column_names)) < len(table.column_names):
            problem = f"has two columns of one name ({', '.join(table.column_names)}): rename one"
        elif not all(names):
            problem = (
                f"has no file_name in row {next(row for row, name in enumerate(names, 1) if not name)}: name an image there"
            )
        elif not data.allow_paths and (
            outside := [name for name in addresses if name not in images and not lies_below(name, root_of(data, path), False)]
        ):
            problem = f"names {outside[0]}, which is not below the source: set data.allow_paths=true if you trust it"
        elif twice := next((name for name in addresses if rows[name] > 1), None):
            problem = f"describes {twice} again: keep one row of each image"
        if problem:
            raise ConfigError(f"data.source = {data.source!r}: {path} {problem}")
        listed += addresses
        table = table.select([name for name in table.column_names if name not in ("file_name", "image", NAME)])
        tables.append(table.append_column("image", pa.array(addresses, pa.string())))
    table = pa.concat_tables(tables, promote_options="permissive")
    strings = {field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)}
    if data.text_column is None and len(texts := [name for name in TEXT_NAMES if name in strings]) > 1:
        text = pc.coalesce(*(table[name].cast(pa.string()) for name in texts))  # each file may call it otherwise
        table = table.drop_columns(texts).append_column(texts[0], text)
    if missing := sorted(images - set(listed)):
        everything = sorted({*images, *listed})
        names = dict(zip(everything, relative(everything), strict=True))
        files.left_out.setdefault("in no metadata file", []).extend(names[path] for path in missing)
    return table.append_column(NAME, pa.array(relative(listed), pa.string()))


def _read_metadata(data: DataConfig, path: str) -> Any:
    """A metadata file as a table of Arrow. In CSV names and texts stay as they are, even if all are numbers."""
    import fsspec
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    with fsspec.open(path, "rb") if "://" in path else Path(path).open("rb") as file:
        content = file.read()
    kind, source = METADATA[PurePosixPath(path).name], pa.BufferReader(content)
    if kind == "parquet":
        return pyarrow.parquet.read_table(source)
    try:
        content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"data.source = {data.source!r}: {path} is not in UTF-8: save it as UTF-8") from None
    if kind == "json":
        return pyarrow.json.read_json(source)
    strings = dict.fromkeys(("file_name", *TEXT_NAMES, data.text_column or "text"), pa.string())
    table = pyarrow.csv.read_csv(source, convert_options=pyarrow.csv.ConvertOptions(column_types=strings))
    for index, (name, cells) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if name in strings:  # an empty cell is no text
            table = table.set_column(index, name, pc.if_else(pc.equal(cells, ""), None, cells))
    return table


NUMBERS = ("cls", "cls2", "index", "inx", "id")
"""Columns of WebDataset that `datasets` reads as integers."""


class WholeTarInfo(tarfile.TarInfo):
    """A header. Where tarfile would take a broken one, or a cut, for the end of the tar, it raises tarfile.ReadError."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> WholeTarInfo:
        """Read the next header."""
        file: Any = archive.fileobj
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            rest = [len(block) if not any(block) else -1 for block in iter(lambda: file.read(10240), b"")]
            if -1 in rest or sum(rest) < 512:  # a second block of zeros, and more of them, as tar writes
                raise tarfile.ReadError("a block of zeros that is not the end") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def sample_columns(tar: str, limit: int) -> Iterator[set[str]]:
    """Names of the columns of a tar's first samples."""
    import fsspec

    with fsspec.open(tar, "rb") as file, tarfile.open(fileobj=file, tarinfo=WholeTarInfo) as archive:
        names = (_key_and_column(member.name) for member in archive if member.isfile())
        samples = groupby(names, key=itemgetter(0))
        yield from ({column for _, column in sample} for key, sample in islice(samples, limit) if key)


def samples_of_tar(empty: dict[str, None], main: str | None, data: DataConfig, tar: str, _: object) -> Iterator[dict[str, Any]]:
    """Samples of a tar, each with all columns.

    Unless `data` names the column, a sample's label may be in any of `LABEL_NAMES` beside `cls`, and its text in any of
    `TEXT_NAMES`.

    Args:
        empty: the columns.
        main: the column that takes the only image of a sample, whatever its format; None: images stay in their columns.
        data: names columns.
        tar: path or address.

    Raises:
        ConfigError: labels or texts in a column that the first samples lack, or of no number or text; one column twice in a
            sample, a link, several images where other samples have one, or a sample in pieces.
    """
    from datasets.packaged_modules.webdataset.webdataset import DECODERS, text_loads

    decoders, has_image = {**DECODERS, **dict.fromkeys(TEXT_NAMES, text_loads)}, dict[str, bool]()
    text = next((name for name in TEXT_NAMES if name in empty and not data.text_column), None)
    label = "cls" if "cls" in empty and not data.label_column else None
    groups = [("text_column", text, TEXT_NAMES), ("label_column", label, LABEL_NAMES)]
    for key, group in groupby(_tar_members(tar), key=lambda member: _key_and_column(member[0])[0]):
        if not key:
            continue
        files, images = dict[str, tuple[str, bytes]](), list[bytes]()
        for name, file in group:
            column = _key_and_column(name)[1]
            field, taker, _ = next((each for each in groups if column in each[2]), ("", None, ()))
            is_other_image = bool(main) and column not in empty and is_image(column)
            if not (column in empty or is_other_image or (field and getattr(data, field) is None)):
                continue
            if file is None:
                remedy = "store the file itself (tar --dereference --hard-dereference)"
                raise ConfigError(f"{tar}: {name} is a link: {remedy}")
            if column in files:
                raise ConfigError(f"{tar}: {name} is there twice: write it once")
            if is_other_image:
                images.append(file.read())
            elif column in empty or taker:
                files[column] = name, file.read()
            else:
                raise ConfigError(f"{tar}: {name} is of a column that the first samples lack: set data.{field}={column}")
        for _, taker, names in groups:
            other = next((column for column in names if column in files), None)
            if taker and taker not in files and other:
                files[taker] = files[other]
        sample: dict[str, Any] = {**empty, "__key__": key, "__url__": tar}
        for column, (name, content) in files.items():
            if column in empty:
                try:
                    sample[column] = decoders[column](content) if column in decoders else content
                except ValueError as error:
                    raise ConfigError(f"{tar}: {name} is no {'number' if column in NUMBERS else 'text'}: {error}") from error
        if main and sample[main] is None and len(images) > 1 and data.image_column is None:
            raise ConfigError(f"{tar}: sample {key} has {len(images)} images, the first samples one: set data.image_column")
        if main and sample[main] is None and len(images) == 1:
            sample[main] = images[0]
        whole = any(sample[column] is not None for column in empty if is_image(column))
        if not (has_image.get(key, True) and (whole or key not in has_image)):
            raise ConfigError(f"{tar}: the files of sample {key} do not follow each other: sort the files in it by name")
        has_image[key] = whole
        yield sample


def is_image(column: str) -> bool:
    """Whether a column of WebDataset holds images."""
    return f".{column.rpartition('.')[2]}" in image_endings()


def _key_and_column(name: str) -> tuple[str, str]:
    """What a file of a tar belongs to, by its name. As in WebDataset, the case of endings does not count."""
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    key, column = base_plus_ext(name)
    return key or "", (column or "").lower()


def _tar_members(tar: str) -> Iterator[tuple[str, Any]]:
    """The files of a tar, opened, by name; of a link, None. A ConfigError names the one after which the tar is broken."""
    from datasets.utils.file_utils import xopen

    last = "its beginning"
    try:
        with xopen(tar, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=WholeTarInfo) as archive:
            for member in archive:
                archive.members, last = [], shown(member.name)  # type: ignore[attr-defined]
                is_hidden = any(part.startswith((".", "__")) for part in member.name.split("/") if part not in (".", ".."))
                if not (is_hidden or member.isdir()):
                    yield last, archive.extractfile(member) if member.isreg() else None
    except tarfile.ReadError as error:
        raise ConfigError(f"{tar}: broken after {last} ({error}): later rows are lost; make or download it again") from error
