"""Image files: a folder or a tar of them as a table; read any format as square RGB; write tensors as grids and PNG files."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from madformer.config import DataConfig
from madformer.config.data import MAX_PIXELS
from madformer.data.source_files import IMAGES, METADATA, NAME, Files, kind_of, lies_below, pattern_in, relative, root_of
from madformer.errors import BadImage, ConfigError
from madformer.runs.files import atomic_write, require_readable

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "WholeTarInfo",
    "decode_image",
    "image_table",
    "load_square",
    "read_settings",
    "save_png",
    "square_image",
    "tar_members",
    "to_grid",
    "to_pixels",
    "to_tiles",
    "to_unit",
]

MIN_SIDE = 64
"""In a grid, smaller images are magnified to at least this many pixels, or nobody sees them."""

MAX_GRID = 2048
"""Grids of more pixels along a side are made of reduced images: 64 of 1024 x 1024 would be 200 MB, and in TensorBoard, too."""

SETTINGS = "madformer"
"""Text chunk of a PNG file that holds how it was made, as JSON."""


FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
"""Formats that are read, as Pillow calls them. Others start programs (EPS), or are no images of pixels."""


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


def to_pixels(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] (the rest is clipped) to [B, Y, X, 3] bytes; one channel is grey, of more the first three are shown."""
    bytes_BCYX = ((images_BCYX.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    shown_BCYX = bytes_BCYX[:, :3] if bytes_BCYX.shape[1] >= 3 else bytes_BCYX[:, :1].expand(-1, 3, -1, -1)
    return rearrange(shown_BCYX, "b c y x -> b y x c").numpy()


def to_grid(images_BCYX: Tensor) -> np.ndarray:
    """Images in [-1, 1] side by side: [Y, X, 3] bytes."""
    return to_tiles(to_pixels(images_BCYX))


def to_tiles(pixels_BYX3: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images side by side, row by row, with a thin frame: [Y, X, 3] bytes.

    Small ones are magnified, and large ones reduced where there are many of them, both by an integer.

    Args:
        pixels_BYX3: the images, bytes.
        columns: images in a row; None: a nearly square grid.
    """
    columns = columns or math.ceil(math.sqrt(len(pixels_BYX3)))
    reduction = math.ceil(columns * max(pixels_BYX3.shape[1:3]) / MAX_GRID)
    if reduction > 1:
        pixels_BYX3 = np.stack([np.asarray(Image.fromarray(pixels_YX3).reduce(reduction)) for pixels_YX3 in pixels_BYX3])
    factor = math.ceil(MIN_SIDE / pixels_BYX3.shape[2])
    large_BYX3 = repeat(pixels_BYX3, "b y x c -> b (y fy) (x fx) c", fy=factor, fx=factor)
    framed_BYX3 = np.pad(large_BYX3, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
    missing = -len(framed_BYX3) % columns
    filled_BYX3 = np.pad(framed_BYX3, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=96)
    return rearrange(filled_BYX3, "(rows columns) y x c -> (rows y) (columns x) c", columns=columns)


def save_png(pixels_YX3: np.ndarray, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a whole PNG file, with how it was made in its metadata."""
    chunks = PngInfo()
    if settings is not None:
        chunks.add_text(SETTINGS, json.dumps(settings))
    with atomic_write(path) as temporary:
        Image.fromarray(pixels_YX3).save(temporary, format="PNG", pnginfo=chunks)


def read_settings(path: Path) -> dict[str, Any] | None:
    """How a PNG file was made, as `save_png` wrote it; empty if it does not say. None: there is no such file, or it is torn."""
    require_readable(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(SETTINGS, "")
            image.verify()
    except (OSError, SyntaxError, ValueError):  # SyntaxError is Pillow's for a wrong checksum
        return None
    try:
        settings = json.loads(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


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
    root = os.path.commonpath([shallow, deep]) if "://" not in shallow else str(data.source).rstrip("/")
    names = " and ".join(path.removeprefix(f"{root}/") for path in (shallow, deep))
    levels = "/".join("*" * (deep.removeprefix(f"{root}/").count("/") + 1))
    remedy = f"name those with classes, as data.source={pattern_in(root, levels)}, or all without: {pattern_in(root, '**')}"
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
    tables, images, listed = [], {path for path in files.splits[split] if kind_of(path) == IMAGES}, list[str]()
    for path in files.splits[split]:
        if path in images:
            continue
        with fsspec.open(path, "rb") if "://" in path else Path(path).open("rb") as file:
            table = readers[METADATA[PurePosixPath(path).name]](file)
        names = table["file_name"].to_pylist() if "file_name" in table.column_names else []
        folder = path.rpartition("/")[0]
        addresses = [
            f"{folder}/{name}" if "://" in path else os.path.normpath(os.path.join(folder, str(name)))  # noqa: PTH118
            for name in names
        ]
        problem = None
        if not names:
            problem = "names no images in a column file_name: name them there, relative to it, or give the file another name"
        elif path.endswith(".csv") and any(map(pa.types.is_binary, table.schema.types)):
            problem = "is not in UTF-8: save it as UTF-8"
        elif not data.allow_paths and (
            outside := [name for name in addresses if name not in images and not lies_below(name, root_of(data, path), False)]
        ):
            problem = f"names {outside[0]}, which is not below the source: set data.allow_paths=true if you trust it"
        elif twice := {*listed} & {*addresses}:
            problem = f"describes {min(twice)} again, after another metadata file: keep one of them"
        if problem:
            raise ConfigError(f"data.source = {data.source!r}: {path} {problem}")
        listed += addresses
        tables.append(table.drop_columns("file_name").append_column("image", pa.array(addresses, pa.string())))
    table = pa.concat_tables(tables, promote_options="permissive")
    if missing := sorted(images - set(listed)):
        files.left_out.setdefault("in no metadata file", []).extend(relative(missing))
    return table.append_column(NAME, pa.array(relative(listed), pa.string()))


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


def tar_members(tar: str) -> Iterator[tuple[str, Any]]:
    """The files of a tar, opened, by name. A ConfigError names the one after which the tar is broken."""
    from datasets.utils.file_utils import xopen

    last = "its beginning"
    try:
        with xopen(tar, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=WholeTarInfo) as archive:
            for member in archive:
                archive.members, last = [], member.name  # type: ignore[attr-defined]
                if member.isreg() and not member.name.rpartition("/")[2].startswith((".", "__")):
                    yield member.name, archive.extractfile(member)
    except tarfile.ReadError as error:
        raise ConfigError(f"{tar}: broken after {last} ({error}): later rows are lost; make or download it again") from error
