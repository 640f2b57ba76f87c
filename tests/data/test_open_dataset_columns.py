"""Columns of images, classes and captions, named or found; and rows that lack something."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madformer.errors import BadImage, ConfigError
from tests.data.layouts import all_rows, comparable, rows_of_table, source_of, table, write_folder, write_raw
from tests.pictures import as_bytes, picture

pytestmark = pytest.mark.usefixtures("own_cache")


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
        ({}, "data.image_column = None: image and jpg hold images; name one of data.source = {source!r}: {columns}"),
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
        ConfigError, match=r"data\.image_column = None: no column holds images; .*: image \(string\), n \(int64\)$"
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
    with pytest.raises(ConfigError, match=r"^data\.label_column = 'cls': holds 'cat', which is no class number$"):
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
