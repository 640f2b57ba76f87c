"""Data from strangers: which files they can have opened, how much memory they can take, and which programs start."""

import io
import json
import os
import shutil
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from PIL import Image

from madformer.config import DataConfig, ExperimentConfig, config_hash
from madformer.data.image_files import decode_image
from madformer.data.loader import decode_rows, skip_broken
from madformer.data.source_files import lies_below
from madformer.errors import BadImage, ConfigError, DataError
from tests.data.layouts import all_rows, source_of, write_raw
from tests.pictures import as_bytes, picture, write_parquet

pytestmark = pytest.mark.usefixtures("local_cache")

TRUST = "set data.allow_paths=true if you trust"


@pytest.fixture
def private(tmp_path):
    """An image of the user that no data set has any business with."""
    path = tmp_path / "private/photo.png"
    path.parent.mkdir()
    path.write_bytes(as_bytes(picture(7)))
    return path


@pytest.fixture
def server():
    """A web server on this machine that counts its requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", requests
    listening.shutdown()
    listening.server_close()


def test_a_source_may_lie_behind_a_link(tmp_path):
    folder, link = tmp_path / "disk/photos", tmp_path / "photos"
    folder.mkdir(parents=True)
    link.symlink_to(folder)
    write_parquet(folder / "train.parquet", 2)
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    assert [row.read() for row in all_rows(source_of(link))] == [as_bytes(picture(number)) for number in range(2)]
    for path in folder.iterdir():
        path.unlink()
    (folder / "1.png").write_bytes(as_bytes(picture(1)))
    (folder / "metadata.csv").write_text("file_name\n1.png\ngone.png\n")
    first, second = all_rows(source_of(link))
    assert first.read() == as_bytes(picture(1))
    with pytest.raises(BadImage, match="no such file"):
        second.read()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["absolute", "dots", "link", "address", "chain", "fifo", "device"])
def test_rows_open_no_file_and_no_address_elsewhere(how, streaming, private, server, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ".link").symlink_to(private.parent)
    os.mkfifo(folder / "fifo")
    (folder / "own.bin").write_bytes(as_bytes(picture(1)))
    path = {
        "absolute": str(private),
        "dots": f"{folder}/../private/photo.png",
        "link": f"{folder}/.link/photo.png",
        "address": f"{server[0]}/x.png",
        "chain": f"simplecache::{server[0]}/x.png",
        "fifo": f"{folder}/fifo",
        "device": "/dev/zero",
    }[how]
    rows = [
        {"bytes": as_bytes(picture(0)), "path": path},
        {"bytes": None, "path": path},
        {"bytes": None, "path": f"{folder}/own.bin"},
    ]
    write_raw(folder / "a.parquet", {"image": rows})
    first, second, own = all_rows(source_of(folder, streaming=streaming))
    assert first.read() == as_bytes(picture(0)) and own.read() == as_bytes(picture(1))
    with pytest.raises(BadImage, match="no such file" if how == "fifo" else TRUST):
        second.read()
    assert not server[1]
    if how in ("absolute", "dots", "link"):
        trusted = all_rows(source_of(folder, streaming=streaming, allow_paths=True))
        assert trusted[1].read() == private.read_bytes()


def test_rows_that_are_refused_are_counted_and_too_many_are_an_error(private, tmp_path):
    rows = [{"bytes": as_bytes(picture(0)), "path": None}, *[{"bytes": None, "path": str(private)}] * 3]
    folder = tmp_path / "data"
    folder.mkdir()
    write_raw(folder / "a.parquet", {"image": rows})
    for limit in (3, 2):
        broken, data = [], DataConfig(source=str(folder / "a.parquet"), max_skipped=limit)
        images = skip_broken(decode_rows(all_rows(source_of(folder / "a.parquet")), 16, "centre"), data, broken)
        if limit == 3:
            assert len(list(images)) == 1 and len(broken) == 3
        else:
            with pytest.raises(DataError, match=TRUST):
                list(images)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("name", ["../private/photo.png", "{private}", "a/../../private/photo.png"])
def test_metadata_name_no_images_elsewhere(name, kind, private, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "1.png").write_bytes(as_bytes(picture(1)))
    name = name.format(private=private)
    text = f"file_name,text\n1.png,a\n{name},b\n"
    if kind == "jsonl":
        text = "\n".join(json.dumps({"file_name": each, "text": "a"}) for each in ("1.png", name))
    (folder / f"metadata.{kind}").write_text(text)
    with pytest.raises(ConfigError, match=TRUST):
        source_of(folder)
    assert len(all_rows(source_of(folder, allow_paths=True))) == 2


@pytest.mark.parametrize(
    "files", ["{private}/*.parquet", "../private/*.parquet", "{url}/x.parquet", ["a.parquet", "{url}/y.parquet"]]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_readme_names_no_files_elsewhere(files, nested, private, server, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (folder / "a.parquet", private.parent / "b.parquet"):
        write_parquet(place, 3)
    files = json.loads(json.dumps(files).replace("{private}", str(private.parent)).replace("{url}", server[0]))
    named = [{"split": "train", "path": files}] if nested else files
    card = {"configs": [{"config_name": "default", "data_files": named}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(ConfigError, match=TRUST):
        source_of(folder)
    assert not server[1], "no request before the check"


def test_a_saved_table_names_no_files_elsewhere(private, tmp_path):
    saved, other = tmp_path / "saved", tmp_path / "private/table"
    for place, number in ((saved, 1), (other, 2)):
        datasets.Dataset.from_dict({"image": [{"bytes": as_bytes(picture(number)), "path": None}]}).save_to_disk(place)
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../private/table/{state['_data_files'][0]['filename']}"}]
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=TRUST):
        source_of(saved)


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("https://h/a/x.png", "https://h/a", True),
        ("https://h/ab/x.png", "https://h/a", False),
        ("https://h/a/../b/x.png", "https://h/a", False),
        ("https://h/a/%2e%2e/b/x.png", "https://h/a", False),
        ("https://h/a/x::https://evil/y", "https://h/a", False),
        ("https://evil/x?https://h/a/x.png", "https://h/a", False),
        ("/etc/x", "https://h/a", False),
        ("https://h/a", "/data", False),
        ("/data/x", "/data", True),
        ("/database/x", "/data", False),
        ("/data/./a/../x", "/data", True),
    ],
)
def test_what_lies_below(path, root, below):
    assert lies_below(path, root) is lies_below(path, root, follow_links=False) is below


def empty_png(width, height):
    """The header of a file of black pixels, and its first rows."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(9999))),
        (b"IEND", b""),
    )
    framed = (struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13_370, 13_370), (10_001, 10_000), (100_000_001, 1), (200_000, 200_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(size, monkeypatch):
    content = empty_png(*size)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=r"more than data\.max_pixels = 100,000,000|decompression bomb"):
        decode_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_the_limit_of_pixels_is_exact_and_holds_for_every_format(kind):
    content = as_bytes(picture(1), kind)
    assert decode_image(content, 320).size == (20, 16)
    with pytest.raises(BadImage, match="^20 x 16 pixels: more than"):
        decode_image(content, 319)


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\nshowpage\n"


@pytest.mark.parametrize("kind", ["EPS", "IM", "ICO", "ICNS", "SPIDER", "MSP", "DDS", "PDF", "program", "hidden"])
def test_formats_that_are_not_read_start_nothing(kind, monkeypatch):
    for start in ("subprocess.Popen", "os.system", "subprocess.check_call"):
        monkeypatch.setattr(start, lambda *_, **__: pytest.fail("a program"))
    image, buffer = picture(1, (32, 32)), io.BytesIO()
    if kind == "program":
        buffer.write(PROGRAM)
    elif kind == "hidden":  # EPS with a preview, as Windows writes it
        buffer.write(b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, len(PROGRAM), 0, 0, 0, 0, 0xFFFF)[:28] + PROGRAM)
    else:
        image.convert({"SPIDER": "F", "MSP": "1"}.get(kind, "RGB")).save(buffer, kind)
    with pytest.raises(BadImage, match="no image, or of a format that is not read"):
        decode_image(buffer.getvalue())


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "MPO", "PCX", "PPM", "SGI", "TGA"])
def test_formats_of_pixels_are_read(kind):
    if kind in Image.registered_extensions().values():
        assert decode_image(as_bytes(picture(1, (32, 32)), kind)).size == (32, 32)


def test_the_limits_make_no_other_run():
    for changes in ({}, {"max_pixels": 5}, {"allow_paths": True}):
        assert config_hash(ExperimentConfig(data=DataConfig(**changes))) == config_hash(ExperimentConfig())
    for value in (0, -1, 1.5, 10**12):
        with pytest.raises(ConfigError, match=r"data\.max_pixels"):
            DataConfig(max_pixels=value)


def test_pickles_in_the_place_of_known_files_run_nothing(tmp_path):
    """A checkpoint, a reference, cached features and a tokenizer of a stranger."""
    import pickle

    import torch

    from madformer.errors import InputError
    from madformer.evaluation.feature_cache import read_parts
    from madformer.evaluation.reference import load_reference
    from madformer.runs.checkpoints import load_checkpoint
    from madformer.runs.exchange import import_run

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"state_dict": Evil(), "ema": {}}, tmp_path / "step-00000001.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Evil()))
    for name in ("step-00000001.ckpt", "old.ckpt"):
        with pytest.raises(InputError):
            load_checkpoint(tmp_path / name)
        with pytest.raises(InputError):
            import_run(tmp_path / name, tmp_path / "run", "ema", [])
    shutil.copyfile(tmp_path / "old.ckpt", tmp_path / "x.safetensors")
    with pytest.raises(InputError):
        load_reference(tmp_path / "x.safetensors")
    shutil.copyfile(tmp_path / "old.ckpt", tmp_path / "part-0.safetensors")
    assert list(read_parts(tmp_path)) == []
    assert not (tmp_path / "ran").exists()
