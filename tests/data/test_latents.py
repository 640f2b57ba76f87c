"""Shards hold what was put in, as `datasets` reads it too, and a folder of them is refused when it is not whole."""

import dataclasses
import json
import re

import numpy as np
import pytest
from datasets import Dataset

from madformer.data import latents as shards
from madformer.data.latents import (
    Encoding,
    ShardReader,
    ShardWriter,
    read_manifest,
    read_shards,
    summarise,
    write_encoding,
    write_manifest,
)
from madformer.errors import InputError

ENCODING = Encoding(
    source="images",
    subset=None,
    split="train",
    streaming=False,
    source_sha256="0" * 64,
    codec="pixels",
    codec_sha256="1" * 64,
    codec_dtype="float32",
    image_size=16,
    latent_channels=2,
    latent_size=4,
    stochastic=True,
    flip=True,
    image_column="image",
    label_column="label",
    text_column="text",
    class_names=("a", "b"),
    rows_per_shard=8,
)


def latents(rows, encoding=ENCODING, seed=0):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(rows, *encoding.latent_shape)).astype(np.float16) for name in encoding.arrays}


def fill(folder, sizes=(5, 0, 7), encoding=ENCODING):
    """Shards of so many rows; gives all rows together."""
    folder.mkdir(exist_ok=True)
    write_encoding(folder, encoding)
    number, parts = 0, []
    for unit, rows in enumerate(sizes):
        writer, arrays = ShardWriter(folder, f"shard-{unit:06d}-000000", encoding), latents(rows, encoding, seed=unit)
        for row in range(rows):  # one by one: how they are grouped does not matter
            described = {"key": f"image {number}", "label": None if number == 3 else number % 2, "text": f"text {number}"}
            writer.add([described], {name: array[row : row + 1] for name, array in arrays.items()})
            number += 1
        writer.finish(seen=rows + unit, last=True, skipped=[(f"bad {unit}", "torn")] * unit)
        parts.append(arrays)
    manifest = summarise(encoding, list(read_shards(folder).values()), {"psnr": 30.0, "images": 2})
    write_manifest(folder, manifest)
    return {name: np.concatenate([arrays[name] for arrays in parts]) for name in encoding.arrays}


@pytest.mark.parametrize("record_bytes", [1, 2**20])
def test_what_is_written_is_read(record_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORD_BYTES", record_bytes)
    expected = fill(tmp_path)
    reader = ShardReader(tmp_path, read_manifest(tmp_path))
    samples = np.array([11, 0, 4, 5, 3, 3])
    assert len(reader) == 12
    for column in ENCODING.arrays:
        assert np.array_equal(reader.read(column, samples), expected[column][samples])
    assert reader.values("key", samples) == [f"image {number}" for number in samples]
    assert reader.values("label", samples) == [1, 0, 0, 1, None, None]
    assert reader.values("text", samples[:1]) == ["text 11"]


def test_datasets_reads_a_shard(tmp_path):
    expected = fill(tmp_path)
    table = Dataset.from_file(str(tmp_path / "shard-000002-000000.arrow"))
    assert table.num_rows == 7 and table[0]["key"] == "image 5"
    assert np.array_equal(np.asarray(table[6]["mean"], dtype=np.float16), expected["mean"][11].reshape(-1))


def test_the_manifest_counts_and_measures(tmp_path):
    means = fill(tmp_path)["mean"].astype(np.float64)
    manifest = read_manifest(tmp_path)
    assert (manifest.rows, manifest.skipped, manifest.encoding) == (12, 3, ENCODING)
    assert manifest.channel_means == pytest.approx(means.mean(axis=(0, 2, 3)))
    assert manifest.channel_deviations == pytest.approx(means.std(axis=(0, 2, 3)))
    assert [rows for _, rows, _ in manifest.shards] == [5, 7], "a shard without rows is no file"


def test_the_manifests_hash_is_that_of_the_latents_and_how_they_were_made(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "same")
    fill(tmp_path / "other", encoding=dataclasses.replace(ENCODING, codec_sha256="2" * 64))
    one, same, other = (read_manifest(tmp_path / name).sha256 for name in ("one", "same", "other"))
    assert one == same != other


def test_flaws_are_named(tmp_path):
    fill(tmp_path)
    manifest, path = read_manifest(tmp_path), tmp_path / "shard-000002-000000.arrow"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=re.escape(f"{path}: ")):
        ShardReader(tmp_path, manifest)
    path.unlink()
    with pytest.raises(InputError, match="missing, the manifest has it with 7 rows"):
        ShardReader(tmp_path, manifest)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"encoding": {"format": 99}}))
    with pytest.raises(InputError, match="format 99, this version reads 1"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="encoding has not ended there"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="no latents there"):
        read_manifest(tmp_path / "nowhere")
