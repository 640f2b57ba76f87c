"""Images of every layout: the same rows copied or streamed, in units that cover everything once, known by a fingerprint."""

import os
import pickle
import shutil
from itertools import chain
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, IterableDataset

from madformer.data import source_files, sources
from madformer.data.image_files import load_square
from tests.data.layouts import LAYOUTS, all_rows, comparable, source_of, table, write_folder, write_layout, write_raw
from tests.pictures import as_bytes, picture, write_parquet, write_tars

pytestmark = pytest.mark.usefixtures("local_cache")


@pytest.mark.parametrize("place", ["here", "remote"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_same_copied_and_streamed_here_and_far_away(layout, place, tmp_path, memory):
    expected, address = write_layout(layout, tmp_path / "data"), str(tmp_path / "data")
    if place == "remote":
        address = "memory://bucket/data"
        memory.put(f"{tmp_path / 'data'}/", f"{address}/", recursive=True)
        shutil.rmtree(tmp_path / "data")
    copied, streamed = source_of(address), source_of(address, streaming=True)
    assert comparable(all_rows(copied)) == expected
    assert comparable(all_rows(streamed)) == expected
    assert copied.fingerprint == streamed.fingerprint
    assert copied.num_rows == len(expected)
    assert comparable([copied.row(index) for index in range(len(expected))]) == expected
    assert all(load_square(row.read(), 8).shape == (3, 8, 8) for row in all_rows(streamed))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_source_says_of_itself(streaming, tmp_path):
    write_layout("imagenet", tmp_path / "imagenet")
    write_layout("ffhq", tmp_path / "ffhq")
    write_layout("webdataset", tmp_path / "webdataset")
    imagenet = source_of(tmp_path / "imagenet", streaming=streaming)
    assert (imagenet.class_names, imagenet.has_labels, imagenet.has_texts) == (("cat", "dog", "eel"), True, False)
    ffhq = source_of(tmp_path / "ffhq", streaming=streaming)
    assert (ffhq.class_names, ffhq.has_labels, ffhq.has_texts) == (None, False, False)
    captioned = source_of(tmp_path / "webdataset", streaming=streaming)
    assert (captioned.class_names, captioned.has_labels, captioned.has_texts) == (None, True, True)
    assert [source.num_rows for source in (imagenet, ffhq, captioned)] == ([None] * 3 if streaming else [7, 6, 6])


def test_nothing_is_decoded(tmp_path):
    """Bytes that are no image reach the reader, and every file name its key."""
    columns = {"image": [{"bytes": b"no image", "path": "a.png"}], "label": [0]}
    write_raw(tmp_path / "a.parquet", columns)
    for streaming in (False, True):
        (row,) = all_rows(source_of(tmp_path / "a.parquet", streaming=streaming))
        assert (row.key, row.read()) == ("a.png", b"no image")
        assert b"no image" not in repr(row).encode()


def test_nothing_is_printed(tmp_path, capfd):
    write_tars(tmp_path, tars=20, rows=1)
    for streaming in (False, True):
        all_rows(source_of(tmp_path, streaming=streaming))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


# Units


def test_units_of_a_table_are_ranges_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_PER_SHARD", 4)
    source = source_of(write_parquet(tmp_path / "a.parquet", rows=10))
    units = [[row.key for row in source.rows(unit)] for unit in range(source.num_units)]
    assert [len(unit) for unit in units] == [4, 4, 2]
    assert list(chain(*units)) == [source.row(index).key for index in range(10)]


def test_units_of_a_stream_are_files(tmp_path):
    write_tars(tmp_path, tars=3, rows=2)
    source = source_of(tmp_path, streaming=True)
    units = [[row.key for row in source.rows(unit)] for unit in range(source.num_units)]
    assert units == [[f"part-{tar:04d}/{2 * tar + number:05d}" for number in range(2)] for tar in range(3)]


def test_units_of_a_single_parquet_file_are_its_row_groups(tmp_path):
    table(7).to_parquet(tmp_path / "a.parquet", batch_size=3)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    source = source_of(tmp_path / "a.parquet", streaming=True)
    units = [[row.read() for row in source.rows(unit)] for unit in range(source.num_units)]
    assert [len(unit) for unit in units] == [3, 3, 1]
    assert list(chain(*units)) == [as_bytes(picture(number)) for number in range(7)]
    assert len({row.key for row in all_rows(source)}) == 7


def test_a_folder_of_images_streams_as_a_table_of_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_PER_SHARD", 4)
    source = source_of(write_folder(tmp_path / "data"), streaming=True)
    assert (source.num_rows, source.num_units) == (6, 2)
    assert source.row(5) == list(source.rows(1))[-1]
    assert all(row.content is None and Path(row.path).is_relative_to(tmp_path) for row in all_rows(source))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("streaming", [False, True])
def test_reading_goes_on_anywhere_and_from_a_copy(layout, streaming, tmp_path):
    write_layout(layout, tmp_path / "data")
    source = source_of(tmp_path / "data", streaming=streaming)
    copy = pickle.loads(pickle.dumps(source))
    for unit in range(source.num_units):
        rows = list(source.rows(unit))
        for skip in range(len(rows) + 2):
            assert list(copy.rows(unit, skip)) == rows[skip:]


class Units(IterableDataset):
    """All rows, read by the second of two workers."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        from torch.utils.data import get_worker_info

        return iter([row.key for row in all_rows(self.source)] if get_worker_info().id == 1 else [])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_worker_reads_all_of_a_unit(streaming, tmp_path):
    write_tars(tmp_path, tars=2, rows=3)
    source = source_of(tmp_path, streaming=streaming)
    loader = DataLoader(Units(source), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [row.key for row in all_rows(source)]


# Fingerprints


def test_fingerprints_are_of_content_and_names_within_the_source(tmp_path, memory):
    write_tars(tmp_path / "one", tars=2, rows=2)
    first = source_of(tmp_path / "one").fingerprint
    assert len(first) == 64 and int(first, 16) >= 0
    shutil.copytree(tmp_path / "one", tmp_path / "deep/in/another/folder")
    memory.put(f"{tmp_path / 'one'}/", "memory://bucket/", recursive=True)
    for address in (tmp_path / "deep", f"{tmp_path / 'one'}/", tmp_path / "one/*.tar", "memory://bucket"):
        assert source_of(address, streaming=True).fingerprint == first
    (tmp_path / "one/part-0000.tar").touch()
    assert source_of(tmp_path / "one").fingerprint == first
    (tmp_path / "one/part-0001.tar").rename(tmp_path / "one/part-0002.tar")
    renamed = source_of(tmp_path / "one").fingerprint
    shutil.copy(tmp_path / "one/part-0002.tar", tmp_path / "one/part-0003.tar")
    added = source_of(tmp_path / "one").fingerprint
    with (tmp_path / "one/part-0003.tar").open("ab") as file:
        file.write(bytes(512))
    assert len({first, renamed, added, source_of(tmp_path / "one").fingerprint}) == 4


@pytest.mark.parametrize("place", ["start", "middle", "end", "captions"])
def test_other_content_of_the_same_size_and_time_has_another_fingerprint(place, tmp_path):
    folder = write_folder(tmp_path / "data")
    large = as_bytes(picture(0, (400, 300)), "BMP")
    (folder / "cat/large.bmp").write_bytes(large)
    (folder / "metadata.csv").write_text(
        "file_name,text\ncat/large.bmp,one\n" if place == "captions" else "file_name\ncat/large.bmp\n"
    )
    first = source_of(folder).fingerprint
    changed = folder / ("metadata.csv" if place == "captions" else "cat/large.bmp")
    before, content = changed.stat(), bytearray(changed.read_bytes())
    assert len(large) > 3 * source_files.PIECE
    content[{"start": 60, "middle": len(content) // 2, "end": -60, "captions": -3}[place]] ^= 1
    changed.write_bytes(content)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source_of(folder).fingerprint != first


def test_fingerprints_tell_splits_apart(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", rows=2)
    shutil.copy(tmp_path / "train.parquet", tmp_path / "test.parquet")
    assert source_of(tmp_path, split="train").fingerprint != source_of(tmp_path, split="test").fingerprint
