"""Training on latents of images: resumed it is uninterrupted, bit for bit, and the codec stays outside."""

import signal

import pytest
import torch

from madformer.data.encode import encode
from madformer.runs.checkpoints import checkpoint_path
from tests.pictures import experiment, overrides, write_parquet
from tests.tiny_runs import DIGITS, command, differences, perform, run_until, scalars
from tests.training.test_train_resume import LAST, loaded

TEXT = ("model.text.vocab_size=2048", "model.text.pad_token_id=0", "model.text.length=6", "data.tokenizer=builtin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 pictures, 2.3 batches, and latents of them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_parquet(folder / "pictures.parquet", 37)
    encode(experiment(folder, latents=folder / "latents", flip=True))
    return folder


def train(folder, out, *more, **data):
    return command("train", DIGITS, *overrides(folder, **data), *TEXT, f"output_dir={out}", *more)


KINDS = {"shards": {"flip": True, "latents": "latents"}, "stream": {"streaming": True}}


@pytest.mark.parametrize(("kind", "workers"), [("shards", (0, 2)), ("stream", (1,))], ids=["shards", "stream"])
def test_killed_in_an_epoch_and_resumed_is_uninterrupted(kind, workers, folder, tmp_path):
    data = {name: folder / value if name == "latents" else value for name, value in KINDS[kind].items()}
    perform(train(folder, tmp_path / "whole", **data))
    whole = tmp_path / "whole/digits"
    for count in workers:
        run = tmp_path / f"killed{count}/digits"
        killed = train(folder, run.parent, **data, workers=count)
        status, printed = run_until(killed, checkpoint_path(run, 6).exists, tmp_path / "log")
        assert status == -signal.SIGKILL and not checkpoint_path(run, LAST).exists(), printed
        assert "resuming after step" in perform(command("train", "--resume", run, "data.workers=0"))
        assert differences(loaded(whole), loaded(run)) == []
        assert scalars(run) == scalars(whole)


def test_the_codec_is_neither_in_checkpoints_nor_in_the_average(folder, tmp_path):
    perform(train(folder, tmp_path, "trainer.max_steps=6", "evaluation.preview_every=6"))
    run = tmp_path / "digits"
    checkpoint = torch.load(checkpoint_path(run, 6), weights_only=True)
    names = {*checkpoint["state_dict"], *checkpoint["ema"]}
    assert not [name for name in names if "codec" in name or "gain" in name]
    assert checkpoint["LatentDataModule"]["fingerprint"].keys() == {"source", "codec", "class names"}
    assert (run / "samples/preview-00000006.png").is_file(), "decoded by the codec"


def test_moved_latents_are_gone_on_with(folder, tmp_path):
    settings = ("trainer.max_steps=12", "trainer.checkpoint_every=6")
    perform(train(folder, tmp_path, *settings, latents=folder / "latents"))
    run = tmp_path / "digits"
    checkpoint_path(run, 12).unlink()
    moved = tmp_path / "moved"
    (folder / "latents").rename(moved)
    try:
        assert "no latents there" in perform(command("train", "--resume", run), status=2)
        perform(command("train", "--resume", run, f"data.latents={moved}"))
    finally:
        moved.rename(folder / "latents")
