"""Two processes train what one does: DDP and FSDP, on the CPU."""

import shutil
import signal

import pytest
import torch

from madformer.model import MADFormer
from madformer.runs.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from tests.tiny_runs import command, differences, execute, perform, run_until, scalars, train_command
from tests.training import sharded

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


def test_gathered_layers_are_in_bfloat16_and_the_rest_in_float32(tmp_path):
    """Shards, gradients and the residual stream stay in float32; fused AdamW obeys `found_inf`."""
    torch.multiprocessing.spawn(sharded.steps, (tmp_path,), nprocs=2)
    for dtype, seen in zip(sharded.DTYPES, torch.load(tmp_path / "seen.pt"), strict=True):
        require_like_one_device(seen, dtype)


def require_like_one_device(seen, dtype):
    assert seen["layer"] == {dtype or torch.float32}
    assert seen["root"] == seen["stream"] == {torch.float32}
    torch.manual_seed(0)
    model = MADFormer(sharded.CONFIG)
    loss = sharded.loss(model, dtype)
    loss.backward()
    assert seen["loss"] == pytest.approx(float(loss.detach()), rel=1e-6 if dtype is None else 0.02)
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert seen["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert seen["gradients"][name].dtype == torch.float32
        scale = gradient.norm().clamp(min=1e-3)
        assert (seen["gradients"][name] - gradient).norm() < (1e-4 if dtype is None else 0.2) * scale, name
    skipped, made = seen["weights"]
    for name, parameter in model.named_parameters():
        assert torch.equal(skipped[name], parameter), name
        assert torch.equal(made[name], parameter) == (name not in expected), name


@pytest.mark.slow
def test_two_devices_stop_together_and_resume_from_what_the_first_finds_intact(tmp_path):
    """Only the first process is asked to stop, and only it looks at checksums."""
    last, run = 60, tmp_path / "digits"
    settings = (*SETTINGS, f"trainer.max_steps={last}", "evaluation.preview_every=null")
    two = train_command(tmp_path, *settings, "trainer.devices=2", "trainer.strategy=ddp")
    status, printed = run_until(two, checkpoint_path(run, 4).exists, tmp_path / "log", signal.SIGINT)
    assert status == 128 + signal.SIGINT, printed
    *_, before, newest = list_checkpoints(run)
    assert checkpoint_step(newest) < last
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    printed = execute(command("train", "--resume", run))
    assert f"{newest} is torn" in printed and f"resuming after step {checkpoint_step(before)} of {last}" in printed
    perform(train_command(tmp_path / "alone", *settings))
    require_close(tmp_path / "alone/digits", run, last, 1e-4)


def require_close(one, other, last=LAST, apart=1e-5):
    """Weights, average and the optimiser's moments to what the order of a sum leaves; the schedule exactly.

    Of weights the mean difference: Adam turns the noise of a vanishing gradient into steps as long as any other.
    """
    first, second = (torch.load(checkpoint_path(run, last), weights_only=True) for run in (one, other))
    for part in ("ema", "state_dict"):
        assert first[part].keys() == second[part].keys()
        distances = torch.cat([(second[part][name] - tensor).abs().flatten() for name, tensor in first[part].items()])
        assert distances.mean() < apart, "4 steps of 1e-4 move most weights by some 2e-4"
    moments, others = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second))
    assert moments.keys() == others.keys()
    for name in ("exp_avg", "exp_avg_sq"):
        expected, found = (torch.cat([part[number][name].flatten() for number in moments]) for part in (moments, others))
        assert (found - expected).norm() < 0.02 * expected.norm(), name
    assert differences(first["lr_schedulers"], second["lr_schedulers"]) == []
