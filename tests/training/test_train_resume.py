"""A run that was killed and resumed is the run that was not, bit for bit."""

import shutil
import signal
import time

import pytest
import torch

from madformer.progress import read_progress
from madformer.runs.checkpoints import checkpoint_path, list_checkpoints
from madformer.runs.files import progress_path, read_previews
from tests.tiny_runs import command, differences, perform, run_until, scalars, tiny_run, train_command

LAST = 24


def loaded(run, step=LAST):
    return torch.load(checkpoint_path(run, step), weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    perform(train_command(folder))
    return folder / "digits"


def test_training_does_not_notice_previews(undisturbed, tmp_path):
    """Also of a sampler that draws noise, and over a whole reference."""
    perform(train_command(tmp_path, "evaluation.preview_every=null"))
    noisy = ("evaluation.preview_every=4", "evaluation.sampler=ddpm", f"evaluation.references={tmp_path / 'references'}")
    perform(train_command(tmp_path / "noisy", *noisy))
    assert [path.suffix for path in (tmp_path / "references").glob("*.safetensors")] == [".safetensors"]
    for run in (tmp_path / "digits", tmp_path / "noisy/digits"):
        assert differences(loaded(undisturbed), loaded(run)) == []
    assert "preview/fd_digits" in scalars(tmp_path / "noisy/digits") and "preview/fd_digits" not in scalars(tmp_path / "digits")


@pytest.mark.parametrize("overrides", [(), ("data.batch_size_per_device=8",)], ids=["plain", "accumulated"])
def test_killed_anywhere_and_resumed_is_uninterrupted(overrides, undisturbed, tmp_path):
    if overrides:
        perform(train_command(tmp_path / "whole", *overrides))
        undisturbed = tmp_path / "whole/digits"
    run = tmp_path / "digits"
    again = train_command(tmp_path, *overrides)
    for step, delay in ((6, 0.0), (12, 0.07)):  # once right behind a checkpoint, once some steps later

        def reached(step=step, delay=delay):
            exists = checkpoint_path(run, step).exists()
            time.sleep(delay if exists else 0)
            return exists

        status, printed = run_until(again, reached, tmp_path / "log")
        assert status == -signal.SIGKILL, printed
        assert not checkpoint_path(run, LAST).exists()
        again = command("train", "--resume", run)
    assert "resuming after step" in perform(again)
    assert differences(loaded(undisturbed), loaded(run)) == []
    assert scalars(run) == scalars(undisturbed) and read_previews(run) == read_previews(undisturbed) != []
    assert read_progress(progress_path(run))["step"].items() >= {"done": LAST, "total": LAST, "devices": 1}.items()
    assert f"trained already, {LAST} steps" in perform(again)


def test_interrupted_run_saves_the_step_it_is_in(undisturbed, tmp_path):
    """By Ctrl-C, and then by Slurm before a time limit."""
    run = tmp_path / "digits"
    for sign, step in ((signal.SIGINT, 6), (signal.SIGUSR2, 12)):
        status, printed = run_until(train_command(tmp_path), checkpoint_path(run, step).exists, tmp_path / "log", sign)
        assert status == 128 + sign and f"madformer train --resume {run}" in printed, printed
        newest = list_checkpoints(run)[-1]
        assert f"stopped after step {int(newest.stem[5:])}," in printed
    perform(train_command(tmp_path, "trainer.keep_checkpoints=3"))
    assert differences(loaded(undisturbed), loaded(run)) == []
    assert [int(path.stem[5:]) for path in list_checkpoints(run)] == [12, 18, 24], "regular ones alone, once there is a newer"


def test_torn_checkpoint_is_skipped_with_a_warning(undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "digits")
    checkpoint_path(run, 24).write_bytes(checkpoint_path(run, 24).read_bytes()[:5000])
    whole = bytearray(checkpoint_path(run, 18).read_bytes())
    whole[len(whole) // 2] ^= 1
    checkpoint_path(run, 18).write_bytes(whole)
    left = [run / "checkpoints/.step-00000030.ckpt.0a1b2c3d.tmp", run / "samples/.preview-00000030.png.0a1b2c3d.tmp"]
    for path in left:
        path.touch()
    printed = perform(command("train", "--resume", run))
    assert not any(path.exists() for path in left), "what a killed process left"
    assert f"{checkpoint_path(run, 24)} is torn" in printed and f"{checkpoint_path(run, 18)} is torn" in printed
    assert "resuming after step 12 of 24" in printed
    assert differences(loaded(undisturbed), loaded(run)) == []
    for path in list_checkpoints(run):
        path.write_bytes(b"torn")
    assert "none of its 4 checkpoints is intact" in perform(command("train", "--resume", run), status=2)


def test_a_run_is_not_trained_by_two_processes(undisturbed, tmp_path):
    from madformer.runs.files import claim_folder

    config = tiny_run(tmp_path)
    shutil.copytree(undisturbed, config.run_dir)
    checkpoint_path(config.run_dir, 24).unlink()
    with claim_folder(config.run_dir, "train"):
        assert f"{config.run_dir} is in use by another process" in perform(train_command(tmp_path), status=2)


def test_resume_with_other_settings_but_the_same_weights(undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "digits")
    for step in (18, 24):
        checkpoint_path(run, step).unlink()
    printed = perform(command("train", "--resume", run, "optimizer.lr=1"), status=2)
    assert "optimizer.lr = 0.003 there, 1.0 asked for" in printed
    perform(command("train", "--resume", run, "trainer.checkpoint_every=5", "trainer.keep_checkpoints=2"))
    assert [path.name for path in list_checkpoints(run)] == ["step-00000020.ckpt", "step-00000024.ckpt"]
    assert differences(loaded(undisturbed)["state_dict"], loaded(run)["state_dict"]) == []
