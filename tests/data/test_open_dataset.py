"""Where images are found: files and patterns, splits and subsets, columns, the hub's cache; and what is broken or missing."""

import tarfile
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madformer.errors import BadImage, ConfigError
from tests.data.layouts import all_rows, comparable, rows_of_table, source_of, table, write_folder, write_layout, write_raw
from tests.pictures import as_bytes, picture, write_parquet, write_tars

pytestmark = pytest.mark.usefixtures("local_cache")


@pytest.mark.parametrize("pattern", ["*.tar", "part-0000.tar", "../data/part-*.tar", "{folder}/*.tar", "~/data/*.tar"])
def test_files_and_patterns(pattern, tmp_path, monkeypatch):
    write_tars(tmp_path / "data", tars=2, rows=2)
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = all_rows(source_of(pattern.format(folder=tmp_path / "data")))
    assert len(rows) == (2 if pattern == "part-0000.tar" else 4)


def test_a_file_with_brackets_in_its_name(tmp_path):
    write_parquet(tmp_path / "faces [1].parquet", rows=2)
    assert len(all_rows(source_of(tmp_path / "faces [1].parquet"))) == 2


def test_remote_files_and_patterns(tmp_path, memory):
    write_tars(tmp_path, tars=2, rows=2)
    memory.put(f"{tmp_path}/", "memory://bucket/", recursive=True)
    for streaming in (False, True):
        assert len(all_rows(source_of("memory://bucket/*.tar", streaming=streaming))) == 4
        assert [row.key for row in all_rows(source_of("memory://bucket/part-0001.tar", streaming=streaming))] == [
            "00002",
            "00003",
        ]


def test_other_files_in_a_folder_are_left_alone(tmp_path, memory):
    write_tars(tmp_path / "data", tars=1, rows=2)
    (tmp_path / "data/LICENSE").write_text("free")
    (tmp_path / "data/notes.txt").write_text("taken in spring")
    memory.put(f"{tmp_path / 'data'}/", "memory://bucket/", recursive=True)
    assert len(all_rows(source_of(tmp_path / "data"))) == len(all_rows(source_of("memory://bucket", streaming=True))) == 2


# Splits and subsets


def test_splits_and_subsets(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows=4)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows=2)
    assert [source_of(tmp_path, split=split).num_rows for split in ("train", "test")] == [4, 2]
    with pytest.raises(ConfigError, match=r"^data\.split = 'val': must be one of train, test, which data\.source = '.*' has$"):
        source_of(tmp_path, split="val")
    card = "---\nconfigs:\n- config_name: large\n  data_files: data/train-*\n- config_name: small\n  data_files: data/test-*\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert [source_of(tmp_path, subset=subset).num_rows for subset in ("large", "small")] == [4, 2]
    for subset in ("medium", None):
        with pytest.raises(
            ConfigError, match=rf"^data\.subset = {subset!r}: must be one of 'large', 'small', which data\.source"
        ):
            source_of(tmp_path, subset=subset)


@pytest.mark.parametrize("saved", [False, True])
def test_slices_of_a_table_share_no_row(saved, tmp_path):
    path = write_parquet(tmp_path / "pictures.parquet", rows=20)
    if saved:
        datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).save_to_disk(
            str(path := tmp_path / "saved")
        )
    keys = [
        [source.row(row).key for row in range(source.num_rows)]
        for source in (source_of(path, split=split) for split in ("train[:90%]", "train[90%:]", "train"))
    ]
    assert [len(part) for part in keys] == [18, 2, 20] and keys[0] + keys[1] == keys[2]
    assert source_of(path, split="train[:90%]").fingerprint != source_of(path, split="train[90%:]").fingerprint
    with pytest.raises(ConfigError, match=r"data\.split = 'train\[90%:\]': .*; slices need data\.streaming=false"):
        source_of(path, split="train[90%:]", streaming=True)


def test_saved_splits(tmp_path):
    datasets.DatasetDict(train=table(4), test=table(2)).save_to_disk(tmp_path / "saved")
    assert source_of(tmp_path / "saved", split="test").num_rows == 2
    with pytest.raises(ConfigError, match=r"data\.split = 'validation': must be one of train, test,"):
        source_of(tmp_path / "saved", split="validation")


def test_a_folder_of_images_has_splits_only_if_all_its_folders_are_called_so(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "split" / split)
    split = source_of(tmp_path / "split", split="validation")
    assert split.class_names == ("cat", "dog") and split.num_rows == 6
    vehicles = source_of(write_folder(tmp_path / "vehicles", classes=("bus", "tram", "train")))
    assert vehicles.class_names == ("bus", "train", "tram") and vehicles.num_rows == 9


# Columns


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_named(streaming, tmp_path):
    images = [as_bytes(picture(number)) for number in range(2)]
    columns = {"a": images, "b": images[::-1], "n": [3, 4], "m": [5, 6], "words": ["x", "y"], "caption": ["p", "q"]}
    fields = {"image_column": "b", "label_column": "m", "text_column": "words", "streaming": streaming}
    rows = all_rows(source_of(write_raw(tmp_path / "a.parquet", columns), **fields))
    assert comparable(rows) == [("0", 5, "x", images[1]), ("1", 6, "y", images[0])]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_without_types_are_found_by_name(streaming, tmp_path):
    image = as_bytes(picture(0))
    columns = {"image": [{"bytes": image, "path": "a.png"}], "label": [1], "class": ["cat"], "caption": ["a cat"]}
    assert comparable(all_rows(source_of(write_raw(tmp_path / "a.parquet", columns), streaming=streaming))) == [
        ("a.png", 1, "a cat", image)
    ]


def test_captions_beside_images(tmp_path):
    folder = write_folder(tmp_path / "data", classes=("a",))
    (folder / "metadata.csv").write_text("file_name,text\na/2.png,two\na/0.png,nought\n")
    for streaming in (False, True):
        rows = all_rows(source_of(folder, streaming=streaming))
        assert [(row.key, row.text) for row in rows] == [("2.png", "two"), ("0.png", "nought")]
        assert rows[0].read() == as_bytes(picture(2))
    (folder / "metadata.csv").write_text("file_name,text\na/2.png,TWO\na/0.png,nought\n")
    assert source_of(folder).row(0).text == "TWO"


def test_attributes_are_not_the_class(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.ClassLabel(names=["no", "yes"]) for name in ("hat", "smile")}}
    )
    columns = {"image": rows_of_table(1)["image"], "hat": [0], "smile": [1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    assert not source_of(tmp_path / "a.parquet").has_labels
    smiling = source_of(tmp_path / "a.parquet", label_column="smile")
    assert smiling.row(0).label == 1 and smiling.class_names == ("no", "yes")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data.image_column = null: image and jpg hold images; name one of data.source = {source!r}: {columns}"),
        ({"image_column": "picture"}, "data.image_column = 'picture': no such column, or of another type; data.source = {source!r} has {columns}"),
        ({"image_column": "n"}, "data.image_column = 'n': no such column, or of another type; data.source = {source!r} has {columns}"),
        ({"image_column": "jpg", "label_column": "no"}, "data.label_column = 'no': no such column, or of another type; data.source = {source!r} has {columns}"),
        ({"image_column": "jpg", "text_column": "n"}, "data.text_column = 'n': no such column, or of another type; data.source = {source!r} has {columns}"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_told(fields, message, tmp_path):
    image = as_bytes(picture(0))
    source = write_raw(tmp_path / "a.parquet", {"image": [image], "jpg": [image], "n": [0]})
    with pytest.raises(ConfigError) as caught:
        source_of(source, **fields)
    assert str(caught.value) == message.format(source=str(source), columns="image (binary), jpg (binary), n (int64)")


def test_no_column_of_images(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.image_column = null: no column holds images; .*: image \(string\), n \(int64\)$"
    ):
        source_of(write_raw(tmp_path / "a.parquet", {"image": ["http://nowhere/a.png"], "n": [0]}))


# Rows that lack something


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_none(streaming, tmp_path):
    plain = write_raw(tmp_path / "plain.parquet", {"image": [as_bytes(picture(0))] * 4, "label": [0, -1, None, 9]})
    assert [row.label for row in all_rows(source_of(plain, streaming=streaming))] == [0, None, None, 9]
    named = table(4).data.table.set_column(1, "label", pa.array([1, -1, None, 2]))
    pq.write_table(named.replace_schema_metadata(table().data.schema.metadata), tmp_path / "named.parquet")
    assert [row.label for row in all_rows(source_of(tmp_path / "named.parquet", streaming=streaming))] == [1, None, None, None]


@pytest.mark.parametrize("streaming", [False, True])
def test_class_numbers_as_text(streaming, tmp_path):
    image = [as_bytes(picture(0))] * 2
    for name, values in {"text": ["0", "12\n"], "bytes": [b"0", b"12"]}.items():
        source = source_of(write_raw(tmp_path / f"{name}.parquet", {"image": image, "cls": values}), streaming=streaming)
        assert [row.label for row in all_rows(source)] == [0, 12]
    names = source_of(write_raw(tmp_path / "names.parquet", {"image": image, "cls": ["cat", "dog"]}), streaming=streaming)
    with pytest.raises(ConfigError, match=r"^data\.label_column = 'cls': holds 'cat', which is no class number; text is data"):
        all_rows(names)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_an_image(streaming, tmp_path):
    images = [{"bytes": as_bytes(picture(0)), "path": None}, None, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    good, null, gone = all_rows(source_of(write_raw(tmp_path / "a.parquet", {"image": images}), streaming=streaming))
    assert good.read() == as_bytes(picture(0))
    with pytest.raises(BadImage, match="^no image$"):
        null.read()
    with pytest.raises(BadImage, match=r"^no such file: .*gone\.png$"):
        gone.read()


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_that_are_no_names_get_their_rows_number(streaming, tmp_path):
    images = [{"bytes": as_bytes(picture(n)), "path": path} for n, path in enumerate(("image.jpg", "b.jpg", "image.jpg", None))]
    rows = all_rows(source_of(write_raw(tmp_path / "a.parquet", {"image": images}), streaming=streaming))
    assert [row.key for row in rows] == ["image.jpg", "b.jpg", "image.jpg (2)", "3"]


# Broken files


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_file_cut_anywhere_is_named(kind, streaming, tmp_path):
    write_tars(tmp_path, tars=2, rows=2) if kind == "tar" else [
        write_parquet(tmp_path / f"part-{n:04d}.parquet", rows=3) for n in range(2)
    ]
    path = tmp_path / f"part-0001.{kind}"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))  # tars are filled up with zeros
    for length in [0, 1, 511, 512, 513, 1024, end // 2, end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            ConfigError, match=rf"^data\.source = '.*': .*part-0001\.{kind} is cut off, or of another kind: its end is missing$"
        ):
            source_of(tmp_path, streaming=streaming)


@pytest.mark.parametrize("cache", ["file", "file/folder", "/proc/1/cache"])
def test_a_cache_that_cannot_be_written_is_not_the_source(cache, tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", rows=2)
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / cache)
    with pytest.raises(ConfigError, match=r"^/.*, in the cache of data sets: set HF_HOME to a folder that can be written$"):
        source_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_remote_tar_cut_in_an_image(streaming, tmp_path, memory):
    write_tars(tmp_path, tars=2, rows=2)
    whole = (tmp_path / "part-0001.tar").read_bytes()
    memory.pipe("/bucket/part-0000.tar", (tmp_path / "part-0000.tar").read_bytes())
    memory.pipe("/bucket/part-0001.tar", whole[:600])
    file = r"part-0001\.tar: " if streaming else ""
    with pytest.raises(
        ConfigError, match=rf"^data\.source = 'memory://bucket': {file}cannot be read: ReadError: unexpected end of data$"
    ):
        all_rows(source_of("memory://bucket", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_contents(streaming, tmp_path):
    for number in range(2):
        write_parquet(tmp_path / f"part-{number}.parquet", rows=30)
    path = tmp_path / "part-1.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:30] + bytes(200) + content[230:])
    with pytest.raises(ConfigError) as caught:
        all_rows(source_of(tmp_path, streaming=streaming))
    assert str(caught.value).startswith(f"data.source = {str(tmp_path)!r}: ") and "\n" not in str(caught.value)
    assert ("part-1.parquet: cannot be read" if streaming else "cannot be read") in str(caught.value)


def test_a_broken_table_of_arrow(tmp_path):
    write_layout("arrow", tmp_path / "data")
    content = (tmp_path / "data/table.arrow").read_bytes()
    (tmp_path / "data/table.arrow").write_bytes(content[: len(content) // 2])
    for streaming in (False, True):
        with pytest.raises(ConfigError, match=r"^data\.source = '.*cannot be read: "):
            all_rows(source_of(tmp_path / "data", streaming=streaming))


# What is not there


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/gone", "no such file or folder"),
        ("gone/and/away", "no such file or folder"),
        ("gone.tar", "no such file or folder"),
        ("parquet", "no such file or folder"),  # datasets would read the working directory
        ("{folder}/*.tar", "no file has such a name"),
        ("{folder}/empty", r"holds nothing readable; known are \.parquet, \.arrow, \.tar"),
        ("{folder}/junk", r"holds nothing readable; known are \.parquet, \.arrow, \.tar"),
        ("{folder}/junk/a.bin", r"holds nothing readable; known are \.parquet, \.arrow, \.tar"),
        ("memory://gone", "no such file or folder, or it cannot be reached"),
        ("memory://gone/*.tar", "no file has such a name"),
        ("nonsense://gone", "cannot be read: ValueError: Protocol not known: nonsense"),
    ],
)
def test_what_is_not_there(source, message, tmp_path, monkeypatch, memory):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/a.bin").write_bytes(b"?")
    source = source.format(folder=tmp_path)
    with pytest.raises(ConfigError, match=rf"^data\.source = '{source.replace('*', '[*]')}': {message}"):
        source_of(source)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"^data\.source = 's3://bucket/a': cannot be read: .*\(pip install s3fs\)$"):
        source_of("s3://bucket/a")


@pytest.mark.parametrize("source", ["owner/name", "name", "hf://datasets/owner/name", "hf://datasets/owner/name@v1"])
def test_the_hub_cannot_be_had(source):
    begin = time.monotonic()
    with pytest.raises(
        ConfigError,
        match=rf"^data\.source = '{source}': cannot be had: no such folder, and .*offline.*; name a local file or folder, or log in",
    ):
        source_of(source)
    assert time.monotonic() - begin < 5  # datasets alone tries for 23 seconds


def test_the_hubs_copy_in_the_cache_is_read_without_the_hub(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    builder = datasets.load_dataset_builder("parquet", data_files=str(write_parquet(tmp_path / "a.parquet", rows=3)))
    cached = datasets.config.HF_DATASETS_CACHE / "owner___name/default/0.0.0" / commit
    builder.download_and_prepare(str(cached))
    (cached / "parquet-train.arrow").rename(cached / "name-train.arrow")
    information = (cached / "dataset_info.json").read_text()
    (cached / "dataset_info.json").write_text(information.replace('"dataset_name": "parquet"', '"dataset_name": "name"'))
    source = source_of("owner/name")
    assert [row.key for row in all_rows(source)] == [f"picture_{number:04d}.png" for number in range(3)]
    assert source_of(f"hf://datasets/owner/name@{commit}").fingerprint == source.fingerprint
    with pytest.raises(ConfigError, match="cannot be had"):  # another revision than the cached one
        source_of("hf://datasets/owner/name@v2")
    with pytest.raises(ConfigError, match=r"set data\.streaming=false to read the copy in the cache"):
        source_of("owner/name", streaming=True)


def other_size(content, header):
    """A size that leads to the middle of the next file, with the header's own checksum in order."""
    info = tarfile.TarInfo.frombuf(bytes(content[header : header + 512]), "utf-8", "strict")
    info.size -= 512
    content[header : header + 512] = info.tobuf()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("memory_address", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content, header: content.__setitem__(header + 3, content[header + 3] ^ 1),
        lambda content, header: content.__setitem__(header + 150, content[header + 150] ^ 2),
        lambda content, header: content.__setitem__(slice(header, header + 512), bytes(512)),
        lambda content, header: content.__setitem__(slice(header, header + 1024), bytes(1024)),
        lambda content, header: content.__delitem__(slice(header + 512, None)),
        lambda content, header: content.__delitem__(slice(header, None)),
        other_size,
    ],
    ids=["name", "header's checksum", "block of zeros", "two blocks of zeros", "cut in a file", "cut between files", "size"],
)
def test_a_damaged_tar_loses_no_row_silently(damage, memory_address, streaming, tmp_path, memory):
    [path] = write_tars(tmp_path, tars=1, rows=6)
    with tarfile.open(path) as archive:
        header = archive.getmembers()[3].offset
    content = bytearray(path.read_bytes())
    damage(content, header)
    path.write_bytes(content)
    if memory_address:
        memory.put(str(path), "memory://bucket/part-0000.tar")
    with pytest.raises(ConfigError) as caught:
        all_rows(source_of("memory://bucket/part-0000.tar" if memory_address else path, streaming=streaming))
    assert "\n" not in str(caught.value) and "part-0000.tar" in str(caught.value)
