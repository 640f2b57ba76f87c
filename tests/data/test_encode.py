"""Encoding: what the shards hold, that it goes on where it stopped, and what it refuses."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio

from madformer.config.identity import to_yaml
from madformer.data import encode as encoding_module
from madformer.data import sources
from madformer.data.encode import encode
from madformer.data.image_files import load_square, to_unit
from madformer.data.latents import ShardReader, read_manifest
from madformer.errors import ConfigError, InputError
from tests.conftest import ROOT
from tests.pictures import as_bytes, experiment, moments, overrides, picture, write_parquet, write_tars
from tests.tiny_runs import DIGITS, command, environment, execute, perform


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(encoding_module, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(sources, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks and pictures."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".arrow", ".json", ".txt"))
    return {path.name: path.read_bytes() for path in names}


def read_all(folder: Path) -> tuple[ShardReader, np.ndarray]:
    reader = ShardReader(folder, read_manifest(folder))
    return reader, np.arange(len(reader))


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_hold_the_posteriors_of_all_images_in_order(streaming, tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=21)
    encode(experiment(tmp_path, latents=tmp_path / "latents", flip=True, streaming=streaming))
    reader, rows = read_all(tmp_path / "latents")
    assert len(reader) == 21 and reader.values("label", rows) == [number % 3 for number in range(21)]
    assert reader.values("key", rows) == [f"picture_{number:04d}.png" for number in range(21)]
    for number in rows.tolist():
        for suffix, flipped in (("", False), ("_flipped", True)):
            mean, deviation = moments(number, flipped)
            assert torch.equal(torch.from_numpy(reader.read(f"mean{suffix}", rows[[number]])[0]), mean.half())
            assert torch.equal(torch.from_numpy(reader.read(f"deviation{suffix}", rows[[number]])[0]), deviation.half())
    encoding = reader.manifest.encoding
    assert (encoding.image_size, encoding.latent_shape, encoding.class_names) == (16, (3, 8, 8), ("cat", "dog", "eel"))
    originals = to_unit(torch.stack([load_square(as_bytes(picture(number)), 16) for number in rows.tolist()]))
    decoded = F.interpolate(torch.from_numpy(reader.read("mean", rows)).float(), scale_factor=2.0).clamp(-1, 1)
    psnr = peak_signal_noise_ratio(decoded, originals, data_range=2.0, dim=(1, 2, 3))
    assert reader.manifest.reconstruction == {"psnr": pytest.approx(float(psnr), abs=6e-4), "images": 21}
    assert (tmp_path / "latents/reconstruction.png").is_file()


def test_the_layout_of_ffhq_on_the_hub(tmp_path):
    write_tars(tmp_path / "tars", tars=3, rows=10)
    encode(experiment(tmp_path, source=tmp_path / "tars", streaming=True, latents=tmp_path / "latents"))
    reader, rows = read_all(tmp_path / "latents")
    assert len(reader) == 30 and not reader.manifest.encoding.labels
    keys = reader.values("key", rows)
    assert [key.split("/")[-1] for key in keys] == [f"{number:05d}" for number in range(30)] and len(set(keys)) == 30
    assert torch.equal(torch.from_numpy(reader.read("mean", rows[[17]])[0]), moments(17)[0].half())


def test_latents_without_a_posterior_have_no_deviations(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=5)
    config = experiment(tmp_path, "model.latent_size=16", "model.ar_length=4", codec="pixels", latents=tmp_path / "latents")
    encode(config)
    reader, rows = read_all(tmp_path / "latents")
    assert reader.manifest.encoding.arrays == ("mean",) and reader.manifest.reconstruction["psnr"] > 60
    pixels = to_unit(load_square(as_bytes(picture(4)), 16))
    assert torch.equal(torch.from_numpy(reader.read("mean", rows[[4]])[0]), pixels.half())


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_skipped_and_named(streaming, tmp_path, capsys):
    write_parquet(tmp_path / "pictures.parquet", rows=21, broken=(0, 9, 10, 20))
    config = experiment(tmp_path, latents=tmp_path / "latents", streaming=streaming)
    encode(config)
    reader, rows = read_all(tmp_path / "latents")
    good = [number for number in range(21) if number not in (0, 9, 10, 20)]
    assert reader.values("key", rows) == [f"picture_{number:04d}.png" for number in good]
    named = (tmp_path / "latents/skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in named] == [f"picture_{number:04d}.png" for number in (0, 9, 10, 20)]
    assert "truncated" in named[0] and "skipped: 4 broken images" in capsys.readouterr().out


def test_too_many_broken_images_stop_it_and_lose_nothing(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=21, broken=(9, 10, 20))
    folder = tmp_path / "latents"
    with pytest.raises(InputError, match=r"more than data\.max_skipped = 1 broken images: picture_0009\.png: "):
        encode(experiment(tmp_path, latents=folder, max_skipped=1))
    assert (folder / "shard-000000-000000.arrow").is_file() and not (folder / "manifest.json").exists()
    encode(experiment(tmp_path, latents=folder, max_skipped=3))
    assert read_manifest(folder).rows == 18


@pytest.mark.parametrize("streaming", [False, True])
def test_interrupted_at_any_place_it_ends_with_the_same_files(streaming, tmp_path, monkeypatch):
    write_parquet(tmp_path / "pictures.parquet", rows=45, broken=(13,))
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    encode(experiment(tmp_path, latents=whole, streaming=streaming))
    for calls in (1, 3, 3, 0, 5):
        left, add = [calls], encoding_module._Encoder._add

        def stop_after(self, *arguments, left=left, add=add):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            add(self, *arguments)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(encoding_module._Encoder, "_add", stop_after)
            encode(experiment(tmp_path, latents=pieces, streaming=streaming))
        assert not (pieces / "manifest.json").exists()
    assert len(list(pieces.glob("*.arrow"))) == 4
    encode(experiment(tmp_path, latents=pieces, streaming=streaming))
    assert contents(pieces) == contents(whole)


def test_again_it_does_nothing_and_what_is_missing_is_made_anew(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=21)
    folder = tmp_path / "latents"
    encode(experiment(tmp_path, latents=folder))
    before, times = contents(folder), {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    encode(experiment(tmp_path, latents=folder))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")} == times
    (folder / "shard-000001-000000.arrow").unlink()
    encode(experiment(tmp_path, latents=folder))
    assert contents(folder) == before


def test_repaired_latents_have_a_new_manifest(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=21, broken=(2,))
    folder = tmp_path / "latents"
    encode(experiment(tmp_path, latents=folder))
    before, manifest = read_manifest(folder), folder / "manifest.json"
    changed = manifest.read_text().replace('"rows": 20', '"rows": 19').replace("   7,", "   6,")
    manifest.write_text(re.sub(r',\s*"checksum": "\w+"', "", changed))
    assert read_manifest(folder) != before, "as if another image had been broken then"
    encode(experiment(tmp_path, latents=folder))
    assert read_manifest(folder) == before


def test_another_column_is_another_encoding(tmp_path):
    images = [{"bytes": as_bytes(picture(number)), "path": f"{number}.png"} for number in range(20)]
    features = Features({"image": Image(), "mask": Image()})
    Dataset.from_dict({"image": images, "mask": images[::-1]}, features=features).to_parquet(tmp_path / "pictures.parquet")
    encode(experiment(tmp_path, latents=tmp_path / "latents", image_column="image"))
    with pytest.raises(InputError, match="holds other latents: image_column = 'image' there, 'mask' asked for"):
        encode(experiment(tmp_path, latents=tmp_path / "latents", image_column="mask"))


def test_another_crop_is_another_encoding(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=5)
    centre, corner = (tmp_path / name for name in ("centre", "corner"))
    encode(experiment(tmp_path, latents=centre))
    with pytest.raises(InputError, match="holds other latents: crop = 'centre' there, 'top_left' asked for"):
        encode(experiment(tmp_path, latents=centre, crop="top_left"))
    encode(experiment(tmp_path, latents=corner, crop="top_left"))
    means = [reader.read("mean", rows) for reader, rows in map(read_all, (centre, corner))]
    assert means[0].shape == means[1].shape and not np.array_equal(*means)
    # What lies on disks has no such field, and keeps its hash.
    encoding, manifest = json.loads((centre / "encoding.json").read_text()), read_manifest(centre)
    assert "crop" not in encoding and read_manifest(corner).encoding.crop == "top_left"
    encoding.pop("checksum")
    before = json.dumps([encoding, manifest.shards], sort_keys=True).encode()
    assert manifest.sha256 == hashlib.sha256(before).hexdigest()


def test_other_latents_are_not_mixed_in(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=5)
    folder = tmp_path / "latents"
    encode(experiment(tmp_path, latents=folder))
    with pytest.raises(InputError, match=r"holds other latents: flip = False there, True asked for; name another folder"):
        encode(experiment(tmp_path, latents=folder, flip=True))
    write_parquet(tmp_path / "pictures.parquet", rows=6)
    with pytest.raises(InputError, match="holds other latents: source_sha256 = "):
        encode(experiment(tmp_path, latents=folder))


def test_what_cannot_be_encoded(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=3, broken=(0, 1, 2))
    with pytest.raises(ConfigError, match=r"data\.latents = null: name the folder"):
        encode(experiment(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.source = null: nothing to encode"):
        encode(experiment(tmp_path, source=None, latents=tmp_path / "latents"))
    with pytest.raises(ConfigError, match=r"its latents have 3 channels, the model's 4: set model\.latent_channels=3"):
        encode(experiment(tmp_path, "model.latent_channels=4", latents=tmp_path / "latents"))
    assert not (tmp_path / "latents").exists()
    with pytest.raises(InputError, match="none of its images can be read"):
        encode(experiment(tmp_path, latents=tmp_path / "latents"))


def test_a_codec_that_overflows_is_told_apart(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=3)
    codec = tmp_path / "large.py"
    codec.write_text(
        "class Large:\n    latent_channels, downsampling = 3, 2\n"
        "    def encode(self, images):\n        mean = 1e6 + images[..., ::2, ::2]\n        return mean, 0 * mean\n"
        "    def decode(self, latents):\n        return latents\n"
    )
    with pytest.raises(
        ConfigError, match=re.escape("NaN or infinity in float16, or more than float16 holds: set data.codec_dtype")
    ):
        encode(experiment(tmp_path, codec=f"{codec}:Large", codec_dtype="float16", latents=tmp_path / "latents"))


def encode_command(folder, **data):
    return command("encode", DIGITS, *overrides(folder, **data))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    """Shards have their full size here: 256 rows."""
    write_parquet(tmp_path / "pictures.parquet", rows=600, broken=(500,))
    printed = execute(encode_command(tmp_path, latents=tmp_path / "one", codec_batch_size=64))
    assert "599 latents 3 x 8 x 8" in printed and "3 shards" in printed and "images/s" in printed
    execute([*encode_command(tmp_path, latents=tmp_path / "two", codec_batch_size=64), "trainer.devices=2"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_two_machines_write_what_one_writes(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=600, broken=(500,))
    execute(encode_command(tmp_path, latents=tmp_path / "one", codec_batch_size=64))
    both = encode_command(tmp_path, latents=tmp_path / "two", codec_batch_size=64)
    torchrun = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "test",
    }
    ranks = [subprocess.Popen(both, cwd=ROOT, env={**environment(), **torchrun, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_killed_it_ends_with_the_same_shards(tmp_path):
    """Two processes and the program that started them, or that program alone; KILLS=5 kills more often."""
    write_parquet(tmp_path / "pictures.parquet", rows=1500)
    execute(encode_command(tmp_path, latents=tmp_path / "whole", codec_batch_size=8))
    killed = [*encode_command(tmp_path, latents=tmp_path / "killed", codec_batch_size=8), "trainer.devices=2"]
    for kill in range(int(os.environ.get("KILLS", "2"))):
        process = subprocess.Popen(killed, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while (
            len(list((tmp_path / "killed").glob("shard-*"))) < 1 + kill
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.02)
        if kill % 2:
            os.kill(process.pid, signal.SIGKILL)  # the program alone: the processes that it started notice
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    execute(killed)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))


def test_only_one_program_fills_a_folder(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=5)
    holder = f"import time\nfrom pathlib import Path\nfrom madformer.runs.files import claim_folder\nwith claim_folder(Path({str(tmp_path / 'latents')!r}), 'encode'):\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=r"is in use by another process \(encode\)"):
            encode(experiment(tmp_path, latents=tmp_path / "latents"))
        process.kill()


def test_the_manifest_is_json_that_others_read(tmp_path):
    write_parquet(tmp_path / "pictures.parquet", rows=5)
    encode(experiment(tmp_path, latents=tmp_path / "latents"))
    manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
    assert manifest["rows"] == 5 and manifest["encoding"]["codec"].endswith("halving.py:Halving")
    assert len(manifest["channel_means"]) == len(manifest["channel_deviations"]) == 3


@pytest.mark.parametrize("damage", ["shard", "description", "manifest", "encoding", "older version"])
def test_what_is_torn_is_made_again(damage, tmp_path, caplog):
    write_parquet(tmp_path / "pictures.parquet", rows=21)
    folder, file = tmp_path / "latents", tmp_path / "experiment.yaml"
    config = experiment(tmp_path, latents=folder)
    encode(config)
    file.write_text(to_yaml(config))
    before = contents(folder)
    names = {"shard": "shard-000001-000000.arrow", "description": "shard-000002-000000.json"}
    names |= {"manifest": "manifest.json", "encoding": "encoding.json", "older version": "shard-000000-000000.json"}
    path = folder / names[damage]
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    if damage == "older version":
        path.write_text(re.sub(r',\s*"(xxh3|checksum)": "\w+"', "", before[path.name].decode()))
    printed = perform(command("encode", file, "--verify"), status=0 if damage == "older version" else 1)
    assert ("no checksum: 1 shards" if damage == "older version" else "broken: ") in printed
    encode(config)
    assert contents(folder) == before and (caplog.records or damage in ("manifest", "encoding", "older version"))
    assert "broken" not in perform(command("encode", file, "--verify"))
