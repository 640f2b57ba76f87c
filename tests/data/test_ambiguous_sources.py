"""Images of every kind of source that could be lost, doubled or mislabelled without a word: they are read, counted, or refused."""

import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madformer.errors import ConfigError
from tests.data.layouts import all_rows, source_of, write_raw, write_tar
from tests.data.test_source_files import JPEG, PNG, fill, found
from tests.pictures import as_bytes, overrides, picture
from tests.tiny_runs import DIGITS, command, perform

pytestmark = pytest.mark.usefixtures("local_cache")


def labelled(folder, **fields):
    return [(row.key, row.label, row.text) for row in all_rows(source_of(folder, **fields))]


# Folders


@pytest.mark.parametrize(
    ("names", "called"),
    [
        (("train2017/1.png", "val2017/2.png"), "train2017"),
        (("train_images/cat/1.png", "train_images/dog/2.png", "test_images/cat/3.png"), "test_images"),
        (("train/cat/1.png", "train/dog/2.png", "Test-Set/cat/3.png"), "train"),
        (("faces/my train/1.png", "faces/my eval/2.png"), "faces/my eval"),
        (("Training Data/1.png", "validation.old/2.png", "bus/3.png"), "Training Data"),
    ],
)
def test_folders_that_are_almost_called_like_splits_are_no_classes(names, called, tmp_path):
    fill(tmp_path, *names)
    with pytest.raises(
        ConfigError, match=f"the folder {called} is called like a split.*: name one split, as .*, or all"
    ) as caught:
        source_of(tmp_path)
    assert source_of(str(caught.value).rpartition("'")[0].rpartition("'")[2]).num_rows == len(names)
    assert source_of(tmp_path / called).num_rows == sum(name.startswith(called) for name in names)


@pytest.mark.parametrize("folders", [("train", "bus"), ("bullet train", "freight train"), ("protest", "evaluate", "trained")])
def test_folders_of_one_split_word_are_classes(folders, tmp_path):
    assert found(fill(tmp_path, *(f"{folder}/1.png" for folder in folders))) == [
        (f"{folder}/1.png", folder) for folder in sorted(folders)
    ]


@pytest.mark.parametrize("configs", [[{"config_name": "default"}], True, [{"config_name": "a", "data_files": []}], [None]])
def test_a_card_that_names_no_files_does_not_decide(configs, tmp_path):
    fill(tmp_path, "plane/1.png", "train/1.png", "bus/1.png")
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    assert [label for _, label in found(tmp_path)] == ["bus", "plane", "train"]


def test_files_that_a_card_does_not_name_are_counted(tmp_path):
    fill(tmp_path, "a/1.png", "a/2.png", "a/notes.txt", "a/3.heic", "b/1.png", "b/2.png")
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "a/*"}]}]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    assert [name for name, _ in found(tmp_path)] == ["1.png", "2.png"]
    said = source_of(tmp_path).summarise()
    assert "2 images" in said and "2 not named by README.md (b/1.png, b/2.png)" in said and "1 .heic (a/3.heic)" in said


def test_a_file_that_a_card_names_otherwise_is_not_left_out(tmp_path):
    fill(tmp_path, "real/1.png", "other/2.png", "3.png")
    (tmp_path / "link").symlink_to("real")
    paths = {"one": ["link/*", "./3.png"], "two": ["other/*"]}
    card = {"configs": [{"config_name": name, "data_files": paths[name]} for name in paths]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    said = source_of(tmp_path, subset="one", streaming=True).summarise()
    assert said.endswith("1 not named by README.md for subset one (other/2.png)")


def test_formats_are_images_if_they_can_be_read(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png", "favicon.ico", "cat/film.mpg", "dog/layers.psd", "dog/print.eps", "sky.fits")
    for name, kind in (("1.avif", "AVIF"), ("2.JPG", "JPEG"), ("3.jfif", "JPEG"), ("4.gif", "GIF"), ("5.Tiff", "TIFF")):
        (tmp_path / "dog" / name).write_bytes(as_bytes(picture(5), kind))
    assert [name for name, _ in found(tmp_path)] == [
        "cat/1.png", *(f"dog/{name}" for name in ("1.avif", "1.png", "2.JPG", "3.jfif", "4.gif", "5.Tiff"))
    ]  # fmt: skip
    said = source_of(tmp_path).summarise()
    assert all(name in said for name in ("favicon.ico", "film.mpg", "layers.psd", "print.eps", "sky.fits"))


def test_a_file_state_json_makes_no_saved_table(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png", "state.json")
    assert found(tmp_path) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]


# Metadata files


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("file_name,text\n1.png,a\n1.png,b\n", "describes .*1.png again: keep one row of each image"),
        ("file_name,text\n1.png,a\n./1.png,b\n", "describes .*1.png again: keep one row of each image"),
        ("file_name,text\n1.png,a\n,b\n", "has no file_name in row 2"),
        ("file_name,text,text\n1.png,a,b\n", r"has two columns of one name \(file_name, text, text\)"),
        ("file_name,text\n1.png,a,b\n", "metadata.csv: cannot be read: .*Expected 2 columns, got 3"),
    ],
)
def test_rows_of_metadata_that_are_no_image_each_are_refused(rows, said, tmp_path):
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text(rows)
    with pytest.raises(ConfigError, match=said):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("file_name,text\n1.png,12\n2.png,007\n", [("1.png", None, "12"), ("2.png", None, "007")]),
        ("file_name,caption\n1.png,true\n2.png,NA\n", [("1.png", None, "true"), ("2.png", None, "NA")]),
        ("file_name,text\n1.png,\n2.png,\n", [("1.png", None, None), ("2.png", None, None)]),
        ("\ufefffile_name,text\r\n1.png,a\r\n2.png,b\r\n", [("1.png", None, "a"), ("2.png", None, "b")]),
        ("file_name,image,__name__,label\n1.png,9,x,1\n2.png,8,y,\n", [("1.png", 1, None), ("2.png", None, None)]),
    ],
)
def test_metadata_are_read_as_they_are_written(rows, expected, tmp_path):
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text(rows)
    assert labelled(tmp_path) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["text\n1.png,a", "caption\n1.png,b"], ["a", "b"]),
        (["caption\n1.png,a", "prompt\n1.png,b", "text\n1.png,c"], ["a", "b", "c"]),
        (["text\n1.png,a", "label\n1.png,7", "description\n1.png,c"], ["a", None, "c"]),
    ],
)
def test_metadata_files_may_call_the_text_otherwise(rows, expected, tmp_path):
    for number, text in enumerate(rows):
        fill(tmp_path / str(number), "1.png")
        (tmp_path / f"{number}/metadata.csv").write_text(f"file_name,{text}\n")
    assert [text for _, _, text in labelled(tmp_path)] == expected


def test_columns_beside_the_text_that_hold_no_text_are_ignored(tmp_path):
    fill(tmp_path, "1.png", "2.png")
    rows = [{"file_name": f"{number}.png", "text": "a", "captions": ["b"], "description": {"c": 1}} for number in (1, 2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labelled(tmp_path) == [("1.png", None, "a"), ("2.png", None, "a")]


def test_images_that_metadata_lack_are_named_by_their_paths(tmp_path):
    fill(tmp_path, "1.png", "more/1.png", "more/2.png")
    (tmp_path / "metadata.csv").write_text("file_name\n1.png\n")
    assert source_of(tmp_path).summarise().endswith("left out: 2 in no metadata file (more/1.png, more/2.png)")


# Tables


def table_of(names, label="label"):
    rows = {"image": [{"bytes": PNG, "path": None}] * 2, label: [0, 1]}
    kinds = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(rows, features=kinds)


def save(table, path):
    """As Parquet or Arrow."""
    if path.suffix == ".parquet":
        pq.write_table(table.data.table, path)
    else:
        with pa.ipc.new_stream(str(path), table.data.table.schema) as writer:
            writer.write_table(table.data.table)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_other_classes_or_columns_are_refused(ending, streaming, tmp_path):
    save(table_of(["cat", "dog"]), tmp_path / f"a.{ending}")
    for other, said in (
        (table_of(["dog", "cat"]), r"has 2 classes \(cat, dog\) in column label, but .* 2 classes \(dog, cat\)"),
        (table_of(["cat", "dog", "eel"]), r"but .* 3 classes \(cat, dog, eel\): name files of one kind"),
        (table_of(["cat", "dog"], "target"), r"has the columns image .*, label \(int64\), but .* target \(int64\): name"),
    ):
        save(other, tmp_path / f"b.{ending}")
        with pytest.raises(ConfigError, match=said):
            source_of(tmp_path, streaming=streaming)
    save(table_of(["cat", "dog"]).select([]), tmp_path / f"b.{ending}")
    source = source_of(tmp_path, streaming=streaming)
    assert len(all_rows(source)) == 2 and source.summarise().endswith(f"left out: 1 without rows (b.{ending})")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog"], "no classes (column label: string, not integers)"),
        ([1.0, None], "no classes (column label: float64, not integers)"),
        ([[1], [2]], "no classes (column label: nested, not integers)"),
        ([1, 2], "classes without names"),
        ([-1, None], "classes without names, 2 images without a class"),
    ],
)
def test_labels_that_are_not_read_are_named(labels, said, tmp_path):
    write_raw(tmp_path / "a.parquet", {"image": [PNG, JPEG], "label": labels})
    assert source_of(tmp_path).summarise().endswith(f"2 images, {said}")
    if labels == ["cat", "dog"]:
        assert source_of(tmp_path, text_column="label").summarise().endswith("2 images, no classes")


@pytest.mark.parametrize("name", ["1.arrow", "1.parquet", "1.tar"])
def test_a_table_in_a_folder_that_datasets_takes_for_a_chain_is_refused(name, tmp_path):
    folder = tmp_path / "a::b"
    folder.mkdir()
    if name.endswith(".tar"):
        write_tar(folder / name, {"1.jpg": JPEG})
    else:
        save(table_of(["cat", "dog"]), folder / name)
    with pytest.raises(ConfigError, match=rf"a::b/{name}: a path of a table must not have :: in it: rename it"):
        source_of(folder)


# WebDataset


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("tars", "expected"),
    [
        ([{"1.jpg": JPEG, "1.CLS": b"4"}, {"2.JPG": JPEG, "2.Cls": b"5"}], [("0/1", 4, None), ("1/2", 5, None)]),
        ([{"1.jpg": JPEG, "1.txt": b"a"}, {"2.jpg": JPEG, "2.caption": b"b"}], [("0/1", None, "a"), ("1/2", None, "b")]),
        ([{"1.jpg": JPEG, "1.cls": b"4"}, {"2.jpg": JPEG, "2.label": b"5"}], [("0/1", 4, None), ("1/2", 5, None)]),
        ([{"1.jpg": JPEG, "1.caption": b"a", "1.txt": b"x", "2.jpg": JPEG, "2.txt": b"b"}], [("1", None, "a"), ("2", None, "b")]),
        ([{"caf\udce9.jpg": JPEG}, {"1.avif": as_bytes(picture(1), "AVIF")}], [("0/caf\\xe9", None, None), ("1/1", None, None)]),
        ([{"1.jpg": JPEG, "__MACOSX/2.jpg": b"", "./3.jpg": JPEG}], [("1", None, None), ("./3", None, None)]),
    ],
)  # fmt: skip
def test_columns_of_tars_by_other_names(tars, expected, streaming, tmp_path):
    for number, members in enumerate(tars):
        write_tar(tmp_path / f"{number}.tar", members)
    assert labelled(tmp_path, streaming=streaming) == expected


def test_a_copy_of_a_tar_is_read_only_for_the_same_columns(tmp_path):
    members = {"1.jpg": JPEG, "1.txt": b"a", "1.cls": b"4", "2.jpg": JPEG, "2.caption": b"b", "2.label": b"5"}
    write_tar(tmp_path / "a.tar", members)
    for fields, expected in (
        ({"text_column": "txt"}, [("1", 4, "a"), ("2", 5, None)]),
        ({}, [("1", 4, "a"), ("2", 5, "b")]),
        ({"text_column": "caption", "label_column": "cls"}, [("1", 4, None), ("2", None, "b")]),
    ):
        assert labelled(tmp_path / "a.tar", **fields) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("name", ["2.jpg", "1.cls", "2.png"])
def test_links_in_a_tar_are_refused(name, kind, streaming, tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": JPEG, "0.cls": b"1", "1.jpg": JPEG})
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, "1.jpg"
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.addfile(link)
    with pytest.raises(ConfigError, match=rf"a\.tar: {name} is a link: store the file itself"):
        all_rows(source_of(tmp_path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_later_sample_of_several_images_is_refused_unless_one_is_named(streaming, tmp_path, monkeypatch):
    monkeypatch.setattr("madformer.data.open_dataset.MANY_SAMPLES", 1)
    write_tar(tmp_path / "a.tar", {"1.jpg": JPEG, "2.mask.png": PNG, "2.photo.png": PNG})
    with pytest.raises(ConfigError, match=r"a\.tar: sample 2 has 2 images, the first samples one: set data\.image_column"):
        all_rows(source_of(tmp_path, streaming=streaming))
    first, second = all_rows(source_of(tmp_path, streaming=streaming, image_column="photo.png"))
    assert first.content is None and second.content == PNG


# What commands say


def test_training_ends_with_the_images_that_it_found_broken(tmp_path):
    fill(tmp_path / "photos", "1.png", "2.png", "3.png", "4.heic")
    (tmp_path / "photos/empty.png").write_bytes(b"")
    (tmp_path / "photos/cut.jpg").write_bytes(JPEG[:200])
    fields = overrides(tmp_path, source=tmp_path / "photos", batch_size=5)
    printed = perform(command("train", DIGITS, *fields, "trainer.max_steps=2", "trainer.checkpoint_every=1"))
    first, last = (line.strip() for line in printed.splitlines() if "photos: " in line)
    assert first.endswith("photos: 5 images, no classes; left out: 1 .heic (4.heic)")
    assert last.endswith("photos: 3 images, no classes; left out: 2 broken, 1 .heic (4.heic)")
    printed = perform(command("encode", DIGITS, *fields, f"data.latents={tmp_path / 'latents'}"))
    assert last in printed
