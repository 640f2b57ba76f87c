"""The benchmark of data at a tiny size: everything but the clock."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from benchmarks import data
from madformer.config import wanted_outputs
from madformer.data.codec import build_codec
from madformer.data.latents import ShardReader, read_manifest
from madformer.model.cost import training_flops

pytestmark = pytest.mark.slow

TINY = ["--repeats", "1", "--rows", "6", "--batch", "2", "4", "--images", "5", "--codec-batch", "2", "--threads", "2"]
TINY += ["--channels", "32", "32", "32", "32"]


def run(capsys, *arguments):
    data.main([*TINY, *arguments])
    return capsys.readouterr().out


def verdicts(printed):
    """What is said of each goal: the value, and whether it is reached."""
    pattern = r"^(.+): (\S+) \(goal: at (least|most) (\S+), (reached|NOT reached)\)$"
    found = re.findall(pattern, printed, re.MULTILINE)
    for _, value, kind, goal, said in found:
        reached = float(value) >= float(goal) if kind == "least" else float(value) <= float(goal)
        assert said == ("reached" if reached else "NOT reached")
    return {what: float(value) for what, value, *_ in found}


def test_shards(capsys):
    printed = run(capsys, "--part", "shards")
    assert printed.startswith("torch ") and f"{torch.get_num_threads()} threads of" in printed
    assert "6 rows of ffhq1024 in 1 files" in printed and "40% MFU of 8 GPUs of 989 TFLOP/s" in printed
    found = verdicts(printed)
    names = [f"{name}, batch {batch}" for name in data._SHAPES for batch in (2, 4)]
    expected = [f"{name}, {side}: share of raw speed" for name in names for side in ("0 workers", "1 worker")]
    assert found.keys() == {*expected, *(f"{name}: one worker reads, in multiples of the need" for name in names)}
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert "encode:" not in printed and "memory:" not in printed


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", data._SHAPES)
def test_an_epoch_reads_all_rows_shuffled(name, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROWS_PER_SHARD", 4)
    latents = data.write_latents(tmp_path / "latents", name, rows=6)
    assert len(latents.files) == 2 and latents.size == sum(path.stat().st_size for path in latents.files)
    reader = ShardReader(latents.folder, read_manifest(latents.folder))
    batches = list(itertools.islice(latents.batches(2, workers), 3))
    shape = (4, 128, 128) if name == "ffhq1024" else (4, 32, 32)
    assert all(batch[part].shape == (2, *shape) for batch in batches for part in ("mean", "deviation"))
    assert all(("text" in batch) == (name == "imagenet256") for batch in batches)
    for part in ("mean", "deviation"):
        rows = reader.read(part, np.arange(6)).reshape(6, -1)
        read = torch.cat([batch[part] for batch in batches]).numpy().reshape(6, -1)
        order = [next(number for number in range(6) if np.array_equal(rows[number], row)) for row in read]
        assert sorted(order) == list(range(6)) != order


def test_raw_reading_reads_all_bytes(tmp_path):
    contents = [b"ab" * 50, b"cd" * 3]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    buffer = bytearray(8)
    assert data.read_raw([tmp_path / "0", tmp_path / "1"], buffer) > 0
    assert bytes(buffer) == b"cd" + b"ab" + b"cdcd", "the last bytes of either file, where they fell"


def test_the_need_is_what_a_model_takes():
    config = data.Latents("ffhq1024", "latents", 1).configure()
    flops = training_flops(config.model, wanted_outputs(config.loss)).total
    assert data.needed_images(config) * flops == pytest.approx(0.4 * 8 * 989e12)


def test_encoding(capsys):
    printed = run(capsys, "--part", "encode")
    assert "5 JPEGs of 256 x 256, batch 2, 2 decoding threads; AutoencoderKL (32, 32, 32, 32) float32 on cpu" in printed
    (share,) = verdicts(printed).values()
    assert math.isfinite(share) and share > 0
    rates = re.findall(r"^(codec alone|encoding|without codec) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert len(rates) == 3 and all(0 < float(least) <= float(median) <= float(most) for _, median, least, most in rates)


def test_the_free_codec_gives_what_stable_diffusions_would():
    codec = build_codec("benchmarks.data:FreeCodec")
    mean_BChw, deviation_BChw = codec.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert mean_BChw.shape == deviation_BChw.shape == (2, 4, 2, 3)


def test_memory(capsys):
    printed = run(capsys, "--part", "memory")
    names = [f"{name}, {process}" for name in data._SHAPES for process in ("0 workers", "1 workers")]
    assert verdicts(printed).keys() == {f"{name}: growth in shares of what was read" for name in names}
    for name in names:
        (line,) = re.findall(rf"^{re.escape(name)} +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
        early, end, peak, read = map(float, line)
        assert 50 < early <= peak and 50 < end <= peak and read > 0


def test_a_miss_is_said():
    assert data.verdict("speed", 0.4, 0.5) == "speed: 0.4 (goal: at least 0.5, NOT reached)"
    assert data.verdict("growth", 0.4, 0.5, most=True) == "growth: 0.4 (goal: at most 0.5, reached)"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--images", "2"], "--images 2: must be more than one batch, --codec-batch 2"),
        (["--channels", "32", "64"], "must be four"),
        (["--rows", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(mistake, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main([*TINY, *mistake])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
