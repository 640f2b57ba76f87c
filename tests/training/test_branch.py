"""A run that begins with the steps before the decay of a longer one is the run that was trained by itself, bit for bit."""

import shutil
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madformer.config import OptimizerConfig, load_run, write_config
from madformer.config.identity import read_branch_step, read_config_hash
from madformer.config.training import decay_start
from madformer.evaluation.tensorboard import write_curves
from madformer.runs.checkpoints import EMA, checkpoint_path, checkpoint_step, list_checkpoints, save_checkpoint
from madformer.runs.files import link_or_copy
from madformer.training.module import wsd_factor
from tests.pictures import overrides, write_parquet
from tests.tiny_runs import DIGITS, command, differences, execute, perform, scalars
from tests.training.test_train_latents import TEXT
from tests.training.test_train_resume import loaded

SETTINGS = ("optimizer.warmup_steps=4", "optimizer.decay_fraction=0.25", "trainer.checkpoint_every=6")


@given(st.integers(0, 40), st.floats(0, 1), st.integers(1, 300), st.integers(1, 300))
def test_runs_share_their_learning_rate_up_to_the_decay_of_the_shorter_one(warmup, decay, one, other):
    config = OptimizerConfig(warmup_steps=warmup, decay_fraction=decay)
    start = min(decay_start(config, one), decay_start(config, other))
    for step in range(start + 1):
        assert wsd_factor(step, config, one) == wsd_factor(step, config, other) == min(1.0, (step + 1) / max(warmup, 1))
    if max(start + 2, warmup) < min(one, other):
        assert wsd_factor(max(start + 2, warmup), config, min(one, other)) < 1, "no step more is shared"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The command that trains a run of so many steps: on a stream of pictures with texts, with accumulation."""
    folder = tmp_path_factory.mktemp("pictures")
    write_parquet(folder / "pictures.parquet", 37)
    data = (*overrides(folder, streaming=True), *TEXT, "data.batch_size_per_device=8", "evaluation.preview_every=4")

    def make(out, steps, *more):
        return command("train", DIGITS, *data, *SETTINGS, f"trainer.max_steps={steps}", f"output_dir={out}", *more)

    return make


@pytest.fixture(scope="module")
def trunk(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk")
    perform(train(folder, 24, "trainer.checkpoint_steps=[9,11]", "trainer.keep_checkpoints=2"))
    (folder / "digits/skipped.txt").write_text("key\tflaw\n")
    return folder / "digits"


def test_a_branch_is_the_run_that_was_trained_by_itself(train, trunk, tmp_path):
    perform(train(tmp_path / "whole", 16))
    whole, run = tmp_path / "whole/digits", tmp_path / "branch/digits"
    assert [checkpoint_step(path) for path in list_checkpoints(trunk)] == [9, 11, 18, 24]
    write_curves(trunk, {})
    again = train(tmp_path / "branch", 16, "--branch", trunk)
    printed = perform(again)
    assert f"{run}: branching from {trunk} after step 11 of 16 steps" in printed
    assert differences(loaded(whole, 16), loaded(run, 16)) == []
    assert scalars(run) == scalars(whole)
    for path in whole.glob("samples/*.png"):
        assert path.read_bytes() == (run / "samples" / path.name).read_bytes()
    assert (run / "skipped.txt").read_text() == "key\tflaw\n"
    assert read_config_hash(run) == read_config_hash(whole) and (read_branch_step(run), read_branch_step(whole)) == (11, 0)
    assert "trained already, 16 steps" in perform(again)
    checkpoint_path(run, 16).unlink()
    assert "resuming after step 12 of 16" in perform([*again[:-1], tmp_path / "gone"]), "it needs its trunk no more"
    assert differences(loaded(whole, 16), loaded(run, 16)) == []


def test_a_branch_that_was_killed_before_it_began_begins_again(train, trunk, tmp_path):
    """Its checkpoint comes last: without one, all else is replaced. From the start, its configuration names no trunk."""
    run, original = tmp_path / "digits", shutil.copytree(trunk, tmp_path / "trunk")
    alone = train(tmp_path, 12, "evaluation.preview_every=null", "trainer.checkpoint_every=12")
    again = [*alone, "--branch", original]
    perform(again)
    assert read_branch_step(run) == 9
    series = scalars(run)
    for path in list_checkpoints(run):
        path.unlink()
    (run / "checkpoints/.step-00000009.ckpt.12ab.tmp").touch()
    assert "branching" in perform(again) and scalars(run) == series
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012.ckpt"]
    assert not checkpoint_path(run, 12).samefile(checkpoint_path(original, 24))
    checkpoint_path(run, 12).unlink()
    assert "training 12 steps" in perform(alone)
    assert read_branch_step(run) == 0 and scalars(run) == series


def test_a_checkpoint_that_its_run_removes_meanwhile_is_not_missed(train, trunk, tmp_path, monkeypatch):
    original = shutil.copytree(trunk, tmp_path / "trunk")

    def link(source, target):
        checkpoint_path(original, 11).unlink(missing_ok=True)
        link_or_copy(source, target)

    monkeypatch.setattr("madformer.training.train.link_or_copy", link)
    assert "after step 9 of 16 steps" in perform(train(tmp_path, 16, "--branch", original))
    assert [path.name for path in (tmp_path / "digits/checkpoints").glob("*.tmp")] == []


def test_what_cannot_be_branched_from_is_refused_and_leaves_nothing(train, trunk, tmp_path):
    def refused(*words, folder=tmp_path / "new", steps=16, run=trunk):
        line = perform([*train(folder, steps), *words, "--branch", run], status=2)
        assert len(line.splitlines()) == 1 and not (tmp_path / "new/digits").exists()
        return line

    assert f"{trunk} is not the trunk of {tmp_path / 'new/digits'}: optimizer.lr = 0.003 there, 1.0 asked for" in refused(
        "optimizer.lr=1"
    )
    assert "cannot be its own trunk" in refused(folder=trunk.parent, steps=24)
    assert "is a run of another experiment: trainer.max_steps" in refused(folder=trunk.parent)
    assert "no intact checkpoint at or before step 6, where the first decay begins; there are: 9, 11, 18, 24" in refused(
        steps=8
    )
    assert "gone: not a run" in refused(run=tmp_path / "gone")
    assert "give one of them" in perform(command("train", "--resume", trunk, "--branch", trunk), status=2)
    assert "give an EXPERIMENT.yaml" in perform(command("train", "--branch", trunk), status=2)
    old = shutil.copytree(trunk, tmp_path / "old")
    config = (old / "config.yaml").read_text()
    changed = load_run(trunk)
    write_config(replace(changed, optimizer=replace(changed.optimizer, warmup_steps=None)), old)
    assert f"{old} has no branches, its warm-up depends on trainer.max_steps: name a run" in refused(run=old)
    (old / "config.yaml").write_text(config)
    weights = loaded(old, 11)
    for path in list_checkpoints(old):
        path.unlink()
    save_checkpoint({"state_dict": weights["state_dict"], EMA: weights[EMA], "global_step": 0}, checkpoint_path(old, 0))
    assert "its weights are imported; they can be evaluated" in refused(run=old)


@pytest.mark.slow
def test_two_devices_branch_as_one(train, trunk, tmp_path):
    """Started by Lightning, and by torchrun, where no process waits for what the first one copies."""
    two = ("trainer.devices=2", "trainer.strategy=ddp", "--branch", trunk)
    printed = execute(train(tmp_path / "lightning", 16, *two))
    assert printed.count("branching from") == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "madformer"]
    execute([*torchrun, *train(tmp_path / "torchrun", 16, *two)[3:]])
    first, second = (loaded(tmp_path / name / "digits", 16) for name in ("lightning", "torchrun"))
    assert differences(first, second) == [] and read_branch_step(tmp_path / "torchrun/digits") == 11


def test_files_of_another_disk_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights")
    link_or_copy(source, target)
    assert target.read_bytes() == b"weights" and not target.samefile(source)
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "gone", target)
