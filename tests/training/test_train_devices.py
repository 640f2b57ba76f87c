"""Two processes train what one does: DDP and FSDP, on the CPU."""

import shutil

import pytest
import torch

from madformer.runs.checkpoints import checkpoint_path
from tests.tiny_runs import differences, execute, perform, scalars, train_command

LAST = 4
SETTINGS = (
    f"trainer.max_steps={LAST}",
    "trainer.checkpoint_every=2",
    "evaluation.preview_every=4",
    "optimizer.lr=1e-4",
    "loss.lambda_clean_tower=0.1",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    perform(train_command(folder, *SETTINGS))
    return folder / "digits"


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_devices_are_one(strategy, alone, tmp_path):
    """Losses, weights, average and optimiser; then a checkpoint of two devices is resumed on one."""
    two = (*SETTINGS, "trainer.devices=2", f"trainer.strategy={strategy}")
    execute(train_command(tmp_path, *two))
    run = tmp_path / "digits"
    require_close(alone, run)
    for tag, series in scalars(alone).items():
        assert [step for step, _ in scalars(run)[tag]] == [step for step, _ in series]
        assert scalars(run)[tag][-1][1] == pytest.approx(series[-1][1], rel=2e-3), tag
    checkpoint_path(run, LAST).unlink()
    assert "resuming after step 2 of 4" in perform(train_command(tmp_path, *SETTINGS))
    require_close(alone, run)


@pytest.mark.slow
def test_two_devices_go_on_from_one(alone, tmp_path):
    """By FSDP, which takes weights and moments apart; under DDP each process reads what a single one would."""
    run = shutil.copytree(alone, tmp_path / "digits")
    checkpoint_path(run, LAST).unlink()
    two = (*SETTINGS, "trainer.devices=2", "trainer.strategy=fsdp")
    assert "resuming after step 2 of 4" in execute(train_command(tmp_path, *two))
    require_close(alone, run)


def require_close(one, other):
    """Weights, average and the optimiser's moments to what the order of a sum leaves; the schedule exactly.

    Of weights the mean difference: Adam turns the noise of a vanishing gradient into steps as long as any other.
    """
    first, second = (torch.load(checkpoint_path(run, LAST), weights_only=True) for run in (one, other))
    for part in ("ema", "state_dict"):
        assert first[part].keys() == second[part].keys()
        apart = torch.cat([(second[part][name] - tensor).abs().flatten() for name, tensor in first[part].items()])
        assert apart.mean() < 1e-5, "4 steps of 1e-4 move most weights by some 2e-4"
    moments, others = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second))
    assert moments.keys() == others.keys()
    for name in ("exp_avg", "exp_avg_sq"):
        expected, found = (torch.cat([part[number][name].flatten() for number in moments]) for part in (moments, others))
        assert (found - expected).norm() < 0.02 * expected.norm(), name
    assert differences(first["lr_schedulers"], second["lr_schedulers"]) == []
