"""The splits and classes of a folder, the files that are left out, and the ambiguous folders that are refused."""

import glob
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from madformer.config import config_hash, load_run, write_config
from madformer.config.experiment import has_held_out
from madformer.config.identity import require_no_other_run, run_hash
from madformer.data.datamodule import LatentDataModule
from madformer.data.encode import encode
from madformer.errors import ConfigError, InputError
from tests.data.layouts import all_rows, source_of, write_layout, write_raw, write_tar
from tests.pictures import as_bytes, experiment, picture, write_parquet, write_tars

pytestmark = pytest.mark.usefixtures("local_cache")


def fill(folder: Path, *names: str) -> Path:
    """Different images of those names; other files hold a line of text."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_bytes(picture(number)) if path.suffix in (".png", ".jpg") else b"a line\n")
    return folder


def found(folder, **fields):
    source = source_of(folder, **fields)
    names = source.class_names
    return [(row.key, row.label if names is None or row.label is None else names[row.label]) for row in all_rows(source)]


JPEG, PNG = as_bytes(picture(1), "JPEG"), as_bytes(picture(2))
CATS_AND_DOGS = ("cat/1.png", "cat/2.png", "dog/1.png")
READ = [("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog/1.png", "dog")]


@pytest.mark.parametrize(
    "beside", ["README.md", "README.txt", "cat/notes on training.txt", "labels.csv", "test.json", "LICENSE"]
)
def test_other_files_change_nothing(beside, tmp_path):
    assert found(fill(tmp_path, *CATS_AND_DOGS, beside)) == READ
    assert source_of(tmp_path).summarise().endswith(f"({beside})")


@pytest.mark.parametrize("name", ["the test.png", "val-1.png", "dev.png", "train_2.png"])
def test_words_in_names_of_images_are_no_splits(name, tmp_path):
    for beside in ((), ("README.md",)):
        assert found(fill(tmp_path, "1.png", "2.png", name, *beside)) == [
            (key, None) for key in sorted(["1.png", "2.png", name])
        ]


def test_a_card_without_configs_does_not_decide(tmp_path):
    fill(tmp_path, "test/1.png", "bus/1.png")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Vehicles\n")
    assert found(tmp_path) == [("bus/1.png", "bus"), ("test/1.png", "test")]


def test_splits_of_a_folder(tmp_path):
    fill(
        tmp_path, *(f"training/{name}" for name in CATS_AND_DOGS), "test/1.png", "test/2.png", "dev/cat/1.png", "dev/dog/1.png"
    )
    assert found(tmp_path) == READ
    assert found(tmp_path, split="test") == [("1.png", None), ("2.png", None)]
    assert found(tmp_path, split="validation") == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert found(tmp_path, split="train[:1]+validation[1:]") == [("cat/1.png", "cat"), ("dog/1.png", "dog")]


def test_a_slice_of_a_folder_holds_all_classes(tmp_path):
    fill(tmp_path, *(f"{name}/{number}.png" for name in ("bird", "cat", "dog") for number in range(20)))
    held_out, rest, everything = (found(tmp_path, split=split) for split in ("train[70%:]", "train[:70%]", "train"))
    assert sorted(held_out + rest) == everything and len(held_out) == 18
    assert {label for _, label in held_out} == {label for _, label in rest} == {"bird", "cat", "dog"}
    fill(tmp_path / "moved", *(f"{name}/{number}.png" for name in ("bird", "cat", "dog") for number in range(20)))
    assert found(tmp_path / "moved", split="train[70%:]") == held_out


@pytest.mark.parametrize("split", ["train[:0]", "train[3:]", "train[50%:10%]", "train[7:]+train[:0]"])
def test_an_empty_slice_is_refused(split, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.split = .*: data\.source = '.*' has no rows there$"):
        source_of(fill(tmp_path, *CATS_AND_DOGS), split=split)
    write_parquet(tmp_path / "cat/a.parquet", rows=3)
    with pytest.raises(ConfigError):
        source_of(tmp_path / "cat/a.parquet", split=split)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/cat/1.png", "test/cat/1.png", "cover.jpg"), "the folder test is called like a split, cover.jpg beside it is not"),
        (("train/1.png", "val/1.png", "masks/1.png"), "the folder train is called like a split, masks beside it is not"),
        (("train/cat/1.png", "train/dog/1.png", "extra/cat/1.png"), "the folder train is called like a split, extra beside it"),
        (("cat/train/1.png", "cat/eval/1.png", "dog/train/1.png"), "the folder cat/eval is called like a split: name one split"),
        (("train/cat/1.png", "dev/cat/1.png", "metadata.jsonl"), "the folder dev is called like a split, metadata.jsonl beside"),
        (("cover.jpg", *CATS_AND_DOGS), r"cover.jpg and cat/1.png lie at different depths"),
        (("cat/1.png", "dog/big/1.png", "dog/small/2.png"), r"cat/1.png and dog/big/1.png lie at different depths"),
        (("train/cat/1.png", "train/2.png", "test/1.png"), r"2.png and cat/1.png lie at different depths"),
        (("dog/1.png", "cat/1.png", "cat/2.png/x.png"), r"cat/1.png and cat/2.png/x.png lie at different depths"),
    ],
)  # fmt: skip
def test_an_ambiguous_folder_is_refused_with_a_way_to_read_it(names, said, tmp_path):
    fill(tmp_path, *names)
    with pytest.raises(ConfigError, match=f"^data.source = '{tmp_path}': {said}") as caught:
        source_of(tmp_path)
    if "metadata.jsonl" in names:  # which describes images, here none
        (tmp_path / "metadata.jsonl").unlink()
    pattern = str(caught.value).rpartition("'")[0].rpartition("'")[2]
    images = [name for name in names if name.endswith(("png", "jpg"))]
    inside = [name for name in images if (tmp_path / name).is_relative_to(pattern.removesuffix("/**"))]
    assert pattern.endswith("/**") and source_of(pattern).num_rows == len(inside) > 1


def test_names_begin_behind_the_common_folder(tmp_path):
    fill(tmp_path, "a/b/1.png", "a/b-c/1.png", "a/b c/1.png")
    assert [key for key, _ in found(tmp_path)] == ["b c/1.png", "b-c/1.png", "b/1.png"]


def test_what_is_no_image_or_no_name_is_left_out_counted_and_named(tmp_path):
    fill(tmp_path, *CATS_AND_DOGS, "cat/3.HEIC", "cat/4.heic", "._1.png", "__MACOSX/1.png", "dog/a [2].png", "dog/b %20#.png")
    (tmp_path / "dog/gone.png").symlink_to("nowhere.png")
    (tmp_path / "dogs").symlink_to(tmp_path / "dog")
    (tmp_path / "cat/loop").symlink_to(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/n\xf6rdlich.png")).write_bytes(as_bytes(picture(9)))
    assert found(tmp_path) == [*READ, ("dog/a [2].png", "dog"), ("dog/b %20#.png", "dog")]
    said = source_of(tmp_path).summarise().split("; left out: ")[1].removesuffix(")").split("), ")
    assert sorted(said) == [
        "1 neither files nor folders (dog/gone.png",
        r"1 not named in UTF-8 (n\xf6rdlich.png",
        "2 .heic (cat/3.HEIC, cat/4.heic",
        "2 hidden (._1.png, __MACOSX",
        "2 links to folders that are read already (dogs, cat/loop",
    ]


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.png", "/[cd]*/**/*.png"])
def test_links_are_read_once_whatever_they_lead_to(pattern, tmp_path):
    folder, other = fill(tmp_path / "a [1]", *CATS_AND_DOGS), fill(tmp_path / "other", "9.png")
    for link, target in (("cat/self.png", "self.png"), ("cat/a.png", "../dog/1.png"), ("dog/loop", ".."), ("cat/loop", "..")):
        (folder / link).symlink_to(target)
    (folder / "dog/outside.png").symlink_to(other / "9.png")
    (folder / "dog/outside again.png").symlink_to(other / "9.png")
    source = glob.escape(str(folder)) + pattern if pattern else folder
    names = [name for name, _ in found(source)]
    assert names == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/outside again.png"]
    said = source_of(source).summarise().split("; left out: ")[1]
    assert "self.png" in said and "links to files that are read already" in said and str(tmp_path) not in said


def test_one_entry_that_cannot_be_looked_at_is_left_out(tmp_path, monkeypatch):
    fill(tmp_path, *CATS_AND_DOGS)
    (tmp_path / "dog/2.png").symlink_to("1.png")

    def refuse(path):
        return [Refusing(entry) if entry.is_symlink() else entry for entry in scan(path)]

    class Refusing:
        def __init__(self, entry):
            self.name = entry.name

        def is_dir(self):
            raise PermissionError(13, "Permission denied")

    scan = os.scandir
    monkeypatch.setattr("madformer.data.source_files.os.scandir", refuse)
    assert found(tmp_path) == READ
    assert source_of(tmp_path).summarise().endswith("left out: 1 neither files nor folders (dog/2.png)")


def test_splits_in_capital_letters(tmp_path):
    fill(tmp_path / "images", "Train/cat/1.png", "Train/dog/2.png", "TEST/cat/3.png")
    assert [name for name, _ in found(tmp_path / "images")] == ["cat/1.png", "dog/2.png"]
    assert [name for name, _ in found(tmp_path / "images", split="test")] == ["3.png"]
    (tmp_path / "tables").mkdir()
    for number, name in enumerate(("Train", "Val", "TEST")):
        write_parquet(tmp_path / f"tables/{name}.parquet", rows=number + 1)
    assert [source_of(tmp_path / "tables", split=split).num_rows for split in ("train", "validation", "test")] == [1, 2, 3]
    with pytest.raises(ConfigError, match="the folder Test is called like a split, masks beside it is not"):
        source_of(fill(tmp_path / "mixed", "Train/1.png", "Test/1.png", "masks/1.png"))


def test_a_pattern_of_several_kinds_is_refused_with_a_pattern_in_the_same_folder(tmp_path):
    fill(tmp_path, "1.png")
    write_parquet(tmp_path / "2.parquet", rows=1)
    with pytest.raises(ConfigError, match=rf"\(1\.png and 2\.parquet\): name those to read, as data\.source='{tmp_path}/\*\*/"):
        source_of(tmp_path / "*")


@pytest.mark.parametrize("name", ["nobody.png", "photos/nobody.JPG", "nobody.PARQUET"])
def test_a_file_that_is_not_there_is_no_data_set_of_the_hub(name):
    with pytest.raises(ConfigError, match=r"no such file or folder$"):
        source_of(name)


def test_the_summary_is_one_line(tmp_path):
    fill(tmp_path, "1.png", "a\nb.txt", "é.txt")
    assert source_of(tmp_path).summarise().endswith(r"left out: 2 .txt (a\nb.txt, é.txt)")


def test_folders_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    fill(tmp_path, *CATS_AND_DOGS)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    for source in (tmp_path, tmp_path / "**/*.png"):
        with monkeypatch.context() as patched, pytest.raises(ConfigError, match=r"the folder dog cannot be read: .*Permission"):
            patched.setattr("madformer.data.source_files.os.scandir", refuse)
            source_of(source)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9l\xe9phant")).mkdir()
    with pytest.raises(ConfigError, match=r"the folder \\xe9l\\xe9phant has no name in UTF-8: rename it"):
        source_of(tmp_path)


def test_metadata_says_which_images_it_describes(tmp_path):
    fill(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png", "text": null}\n{"file_name": "1.png", "text": "one"}\n')
    source = source_of(tmp_path)
    assert [(row.key, row.text) for row in all_rows(source)] == [("2.png", None), ("1.png", "one")]
    assert source.summarise().endswith("left out: 1 in no metadata file (3.png)")
    (tmp_path / "metadata.jsonl").write_text('{"name": "1.png"}\n')
    with pytest.raises(ConfigError, match=r"metadata\.jsonl names no images in a column file_name: name them there"):
        source_of(tmp_path)


def test_metadata_may_describe_images_elsewhere(tmp_path):
    folder, other = fill(tmp_path / "a::b", "1.png"), fill(tmp_path / "other", "2.png", "3.png")
    (folder / "metadata.csv").write_text(f"file_name,text\n1.png,x\n../other/2.png,y\n{other}/3.png,z\n")
    source = source_of(folder, allow_paths=True)
    assert [row.read() for row in all_rows(source)][1:] == [(other / f"{n}.png").read_bytes() for n in (2, 3)]
    before = source.fingerprint
    (other / "2.png").write_bytes(as_bytes(picture(9)))
    assert source_of(folder, allow_paths=True).fingerprint != before


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"metadata.csv": b"file_name,text\n"}, r"metadata\.csv names no images in a column file_name"),
        ({"metadata.csv": b"file_name,text\n1.png,caf\xe9\n"}, r"metadata\.csv is not in UTF-8"),
        (
            {"metadata.csv": b"file_name,text\n1.png,a\n", "metadata.jsonl": b'{"file_name": "1.png", "text": "b"}'},
            r"metadata\.jsonl describes .*1\.png again",
        ),
    ],
)
def test_metadata_that_would_lose_or_double_images_is_refused(files, said, tmp_path):
    fill(tmp_path, "1.png")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        source_of(tmp_path)


# Tables


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_other_columns_are_refused_and_those_without_rows_left_out(streaming, tmp_path):
    write_raw(tmp_path / "a.parquet", {"image": [PNG], "label": [1]})
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "b.parquet")
    source = source_of(tmp_path, streaming=streaming)
    assert [row.label for row in all_rows(source)] == [1] and source.summarise().endswith("1 without rows (b.parquet)")
    with pytest.raises(ConfigError, match="holds no rows"):
        source_of(tmp_path / "b.parquet", streaming=streaming)
    for other in ({"image": [PNG], "text": ["a"]}, {"img": [PNG], "label": [1]}, {"image": [{"bytes": PNG}], "label": [1]}):
        write_raw(tmp_path / "c.parquet", other)
        with pytest.raises(ConfigError, match=r"a\.parquet has the columns image \(binary\), label .*, but .*c\.parquet im"):
            source_of(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"1.jpg": b"", "2.jpg": b"", "1.cls": b"1", "2.cls": b"2"}, "the files of sample 1 do not follow each other: sort"),
        ({"1.txt": b"a", "2.txt": b"b", "1.jpg": b"", "2.jpg": b""}, "the files of sample 1 do not follow each other: sort"),
        ({"1.jpg": b"", "1.cls": b"cat"}, r"1\.cls is no number"),
        ({"1.jpg": b"", "1.cls": b""}, r"1\.cls is no number"),
        ({"1.jpg": b"", "1.txt": b"\xff"}, r"1\.txt is no text"),
        ({}, "holds no rows"),
    ],
)
def test_samples_that_would_lose_labels_are_refused(members, said, streaming, tmp_path):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ConfigError, match=said):
        all_rows(source_of(tmp_path, streaming=streaming))


@pytest.mark.parametrize("name", ["cifar_test.parquet", "my validation set.parquet", "train-and-test.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_has_no_splits(name, streaming, tmp_path):
    path = write_parquet(tmp_path / name, rows=10)
    sources = [source_of(path, split=split, streaming=streaming) for split in ("train", "validation", "test")]
    assert [len(all_rows(source)) for source in sources] == [10, 10, 10]
    assert len({source.fingerprint for source in sources}) == 1
    assert source_of(path, split="test[:80%]").num_rows == 8
    for split in ("eval", "train+test", "train[:50%]+test[50%:]"):
        with pytest.raises(
            ConfigError, match=r"must be train or a slice of it, .* has no splits \(train, validation, test all"
        ):
            source_of(path, split=split)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train-0.tar", "more.tar"), "more.tar names no split, other files do: name the files to read, as data.source="),
        (("train/test.tar", "train/1.tar"), "train/test.tar names the splits test and train: name the files to read"),
        (("1.tar", "cover.png"), r"holds files of several kinds \(1.tar and cover.png\): name those to read, as data.source="),
    ],
)
def test_ambiguous_tables_are_refused(names, said, tmp_path):
    for name in names:
        write_tar(tmp_path / name, {"1.jpg": as_bytes(picture(0), "JPEG")})
    with pytest.raises(ConfigError, match=f"^data.source = '{tmp_path}': {said}") as caught:
        source_of(tmp_path)
    pattern = str(caught.value).rpartition("'")[0].rpartition("'")[2]
    assert source_of(pattern).num_rows == sum(name.endswith(".tar") for name in names)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("tars", "expected"),
    [
        ([{"1.png": PNG, "1.cls": b"4", "2.jpeg": JPEG}], [(PNG, 4, None), (JPEG, None, None)]),
        ([{"1.webp": PNG}, {"1.photo.png": PNG, "2.JPG": JPEG}], [(PNG, None, None), (PNG, None, None), (JPEG, None, None)]),
        ([{"1.jpg": JPEG}, {"1.jpg": JPEG, "1.cls": b"2"}], [(JPEG, None, None), (JPEG, 2, None)]),
        ([{"1.jpg": JPEG, "2.jpg": JPEG, "2.caption": b"two"}], [(JPEG, None, None), (JPEG, None, "two")]),
        ([{"1.jpg": JPEG, "1.json": b"{", "2.json": b'{"a": 1}', "2.jpg": JPEG}], [(JPEG, None, None), (JPEG, None, None)]),
    ],
)  # fmt: skip
def test_samples_of_tars_may_differ(streaming, tars, expected, tmp_path):
    for number, members in enumerate(tars):
        write_tar(tmp_path / f"{number}.tar", members)
    rows = all_rows(source_of(tmp_path, streaming=streaming))
    assert [(row.read(), row.label, row.text) for row in rows] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["cls", "txt", "caption"])
def test_a_column_that_the_first_samples_lack_is_refused_and_can_be_named(column, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr("madformer.data.open_dataset.MANY_SAMPLES", 3)
    members = {f"{number}.jpg": JPEG for number in range(4)}
    write_tar(tmp_path / "a.tar", {**members, "4.jpg": JPEG, f"4.{column}": b"7"})
    field = "label_column" if column == "cls" else "text_column"
    with pytest.raises(ConfigError, match=rf"a\.tar: 4\.{column} is of a column .*: set data\.{field}={column}$"):
        all_rows(source_of(tmp_path, streaming=streaming))
    rows = all_rows(source_of(tmp_path, streaming=streaming, **{field: column}))
    assert [row.label if column == "cls" else row.text for row in rows] == [None] * 4 + [7 if column == "cls" else "7"]


def test_counts_and_classes_in_one_line(tmp_path):
    write_layout("imagenet", tmp_path / "a")
    write_tars(tmp_path / "b", tars=1, rows=2)
    fill(tmp_path / "c", *CATS_AND_DOGS, "x.svg")
    lines = [source_of(tmp_path / name).summarise().removeprefix(f"{tmp_path}/") for name in "abc"]
    assert lines == [
        "a: 7 images, 3 classes (cat, dog, eel)",
        "b: 2 images, no classes",
        "c: 3 images, 2 classes (cat, dog); left out: 1 .svg (x.svg)",
    ]
    source = source_of(tmp_path / "c")
    assert "2 images, 2 classes (cat, dog), 1 images without a class; left out: 1 broken, 1 .svg" in source.summarise(2, 1, 1)


# Images that move


def test_images_may_move_and_others_in_their_place_are_refused(tmp_path):
    folder = fill(tmp_path / "photos", *CATS_AND_DOGS)
    config = experiment(tmp_path, source=folder, latents=tmp_path / "latents")
    encode(config)
    moved, other = shutil.copytree(folder, tmp_path / "elsewhere/pictures"), shutil.copytree(folder, tmp_path / "other")
    (other / "cat/1.png").write_bytes(as_bytes(picture(7)))
    before = (tmp_path / "latents/manifest.json").read_bytes()
    encode(experiment(tmp_path, source=moved, latents=tmp_path / "latents"))
    assert (tmp_path / "latents/manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="holds other latents: source_sha256"):
        encode(experiment(tmp_path, source=other, latents=tmp_path / "latents"))
    LatentDataModule(experiment(tmp_path, source=f"{moved}/", latents=tmp_path / "latents"))
    with pytest.raises(InputError, match=rf"made with data\.source = {folder}, the experiment has {other}"):
        LatentDataModule(experiment(tmp_path, source=other, latents=tmp_path / "latents"))


def test_a_run_goes_on_where_its_images_are_now(tmp_path):
    folder = fill(tmp_path / "photos", *CATS_AND_DOGS)
    config = experiment(tmp_path, source=folder)
    write_config(config, config.run_dir)
    state = LatentDataModule(config).state_dict()
    moved, other = shutil.copytree(folder, tmp_path / "moved"), shutil.copytree(folder, tmp_path / "other")
    (other / "dog/1.png").write_bytes(as_bytes(picture(7)))
    resumed = load_run(config.run_dir, [f"data.source={moved}"])
    LatentDataModule(resumed).load_state_dict(state)
    assert run_hash(resumed) == config_hash(config) != config_hash(resumed)
    with pytest.raises(InputError, match="the source that this run was trained on"):
        LatentDataModule(load_run(config.run_dir, [f"data.source={other}"])).load_state_dict(state)
    require_no_other_run(resumed, but="data.source")
    require_no_other_run(replace(config, data=replace(config.data, source=f"{folder}/")))
    with pytest.raises(
        InputError, match=rf"if these are the same images, madformer train --resume {config.run_dir} data\.source="
    ):
        require_no_other_run(resumed)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_without_a_name_shows_before_training(streaming, tmp_path):
    write_raw(tmp_path / "a.parquet", {"image": [as_bytes(picture(0))] * 4, "label": [0, None, 7, 1]})
    (tmp_path / "names.txt").write_text("".join(f"name {number}\n" for number in range(7)))
    text = ("model.text.length=3", "model.text.vocab_size=2048", "model.text.pad_token_id=0", "data.tokenizer=builtin")
    config = experiment(tmp_path, *text, source=tmp_path / "a.parquet", class_names=tmp_path / "names.txt", streaming=streaming)
    with pytest.raises(InputError, match="7 names, but there is an image of class 7"):
        LatentDataModule(config)
    with (tmp_path / "names.txt").open("a") as file:
        file.write("name 7\n")
    assert LatentDataModule(config).summary.endswith("images, classes without names, 1 images without a class")


@pytest.mark.parametrize(
    ("source", "split", "held_out", "expected"),
    [
        ("faces.parquet", "train", {"held_out_split": "test"}, False),
        ("/data/*.tar", "train", {"held_out_split": "validation[:10%]"}, False),
        ("s3://bucket/a.parquet", "train[:80%]", {"held_out_split": "test[80%:]"}, True),
        ("faces.parquet", "train", {"held_out_source": "others.parquet", "held_out_split": "test"}, True),
        ("owner/name", "train", {"held_out_split": "test"}, True),
        ("folder", "train", {"held_out_split": "test"}, True),
    ],
)
def test_splits_of_a_file_are_not_held_out_from_each_other(source, split, held_out, expected, tmp_path):
    config = experiment(tmp_path, source=source, split=split)
    assert has_held_out(replace(config, evaluation=replace(config.evaluation, **held_out))) is expected
