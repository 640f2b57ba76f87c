"""A run that begins with the steps before the decay of a longer one is the run that was trained by itself, bit for bit."""

import shutil
from pathlib import Path

import pytest

from madformer.config import load_run
from madformer.config.identity import read_branch_step, read_config_hash
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from madformer.runs.folder import read_previews
from tests.pictures import overrides, write_parquet
from tests.tiny_runs import DIGITS, command, differences, perform, scalars, tiny_run, train_command
from tests.training.test_train_latents import TEXT
from tests.training.test_train_resume import loaded

STABLE = ("optimizer.warmup_steps=4", "optimizer.decay_fraction=0.25")
LENGTHS = {"trunk": 24, "branch": 16}
KINDS = ("accumulated", "text")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains one of the runs by itself, or as a branch; returns its folder."""
    pictures = tmp_path_factory.mktemp("pictures")
    write_parquet(pictures / "pictures.parquet", 37)

    def run_command(out, kind, length, *more):
        settings = (*STABLE, "trainer.checkpoint_every=6", "evaluation.preview_every=4", f"trainer.max_steps={length}", *more)
        if kind == "accumulated":
            return train_command(out, "data.batch_size_per_device=8", *settings)
        streamed = (*overrides(pictures, streaming=True), *TEXT)
        return command("train", DIGITS, *streamed, *settings, f"output_dir={out}")

    return run_command


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_is_the_run_that_was_trained_by_itself(kind, train, tmp_path):
    perform(train(tmp_path / "whole", kind, 16))
    perform(train(tmp_path / "trunk", kind, 24, "trainer.checkpoint_steps=[11]"))
    trunk, whole, run = tmp_path / "trunk/digits", tmp_path / "whole/digits", tmp_path / "branch/digits"
    assert [checkpoint_step(path) for path in list_checkpoints(trunk)] == [6, 11, 12, 18, 24]
    printed = perform([*train(tmp_path / "branch", kind, 16), "--branch", trunk])
    assert f"{run}: branching from {trunk} after step 12 of 16 steps" in printed
    assert differences(loaded(whole, 16), loaded(run, 16)) == []
    assert scalars(run) == scalars(whole) and read_previews(run) == read_previews(whole) != []
    for path in whole.glob("samples/*.png"):
        assert path.read_bytes() == (run / "samples" / path.name).read_bytes()
