"""Images in every layout that is known, and the rows that are read from them."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from madformer.config import DataConfig
from madformer.data.sources import ImageSource, Row, open_source
from tests.pictures import as_bytes, picture, write_parquet, write_tars

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
LAYOUTS = ["imagenet", "ffhq", "webdataset", "folder", "saved", "arrow"]


def source_of(path: str | Path, **fields: Any) -> ImageSource:
    return open_source(DataConfig(source=str(path), **fields))


def all_rows(source: ImageSource) -> list[Row]:
    return [row for unit in range(source.num_units) for row in source.rows(unit)]


def comparable(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row.key, row.label, row.text, row.read()) for row in rows]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_raw(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Parquet as others write it: without the types of datasets."""
    pq.write_table(pa.table(columns), path)
    return path


def rows_of_table(count: int) -> dict[str, list[Any]]:
    images = [{"bytes": as_bytes(picture(number)), "path": None} for number in range(count)]
    return {"image": images, "label": [number % 2 for number in range(count)]}


def table(count: int = 5) -> datasets.Dataset:
    return datasets.Dataset.from_dict(rows_of_table(count), features=FEATURES)


def write_folder(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 3) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            (folder / name / f"{number}.png").write_bytes(as_bytes(picture(10 * label + number)))
    return folder


def tars_with_all(folder: Path) -> Path:
    """Two tars whose keys begin anew, with classes and captions."""
    for tar in range(2):
        members = {}
        for number in range(3):
            members[f"{number:03d}.jpg"] = as_bytes(picture(3 * tar + number), "JPEG")
            members[f"{number:03d}.cls"] = str(number).encode()
            members[f"{number:03d}.txt"] = f"picture {number}".encode()
        write_tar(folder / f"part-{tar}.tar", members)
    return folder


def write_layout(layout: str, folder: Path) -> list[tuple[Any, ...]]:
    """Write a layout; the keys, labels, texts and bytes that are to be read from it."""
    folder.mkdir()
    if layout == "imagenet":
        (folder / "data").mkdir()
        write_parquet(folder / "data/train-00000-of-00001.parquet", rows=7)
        return [(f"picture_{number:04d}.png", number % 3, None, as_bytes(picture(number))) for number in range(7)]
    if layout == "ffhq":
        write_tars(folder, tars=2, rows=3)
        pictures = [as_bytes(picture(number), "WEBP", lossless=True) for number in range(6)]
        return [(f"part-{number // 3:04d}/{number:05d}", None, None, content) for number, content in enumerate(pictures)]
    if layout == "webdataset":
        tars_with_all(folder)
        members = [(tar, number) for tar in range(2) for number in range(3)]
        return [(f"part-{tar}/{n:03d}", n, f"picture {n}", as_bytes(picture(3 * tar + n), "JPEG")) for tar, n in members]
    if layout == "folder":
        write_folder(folder)
        files = [(label, name, number) for label, name in enumerate(("cat", "dog")) for number in range(3)]
        return [(f"{name}/{number}.png", label, None, as_bytes(picture(10 * label + number))) for label, name, number in files]
    if layout == "saved":
        table().save_to_disk(folder)
    else:
        table().save_to_disk(folder / "elsewhere")
        shutil.move(folder / "elsewhere/data-00000-of-00001.arrow", folder / "table.arrow")
        shutil.rmtree(folder / "elsewhere")
    return [(str(number), number % 2, None, as_bytes(picture(number))) for number in range(5)]
