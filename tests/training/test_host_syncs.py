"""On an accelerator the host runs ahead: a training step waits for none of its numbers, and a bad step is found later.

Forced on the CPU, where fused AdamW and `found_inf` work as on a GPU.
"""

from itertools import repeat

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from madformer.data.datamodule import LatentDataModule
from madformer.data.loader import MicroBatches
from madformer.errors import NonFiniteError
from madformer.runs.checkpoints import list_checkpoints
from madformer.training.callbacks import STOP_INTERVAL
from madformer.training.module import LitMADFormer
from madformer.training.train import build_trainer
from tests.tiny_runs import tiny_run

BAD = 5


class RunsAhead(LitMADFormer):
    """Trains as on an accelerator."""

    runs_ahead = True


class WithoutValues(RunsAhead):
    """Fake tensors lie where they are: they cannot be swapped for moved ones."""

    def _apply(self, fn, recurse=True):
        return self


class Poisoned(RunsAhead):
    """Its hidden loss is NaN at step `BAD` alone."""

    def losses(self, batch):
        losses = super().losses(batch)
        if self.trainer.global_step + 1 == BAD:
            losses.terms["hidden"] = losses.terms["hidden"] * float("nan")
            losses.total = losses.total + losses.terms["hidden"]
        return losses


class Watch(Callback):
    """Weights and moments after each step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = pl_module.optimizers().optimizer
        tensors = [*pl_module.model.state_dict().values()]
        tensors += [tensor for state in optimizer.state.values() for tensor in state.values()]
        self.states.append([tensor.clone() for tensor in tensors])


def unmoved(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("log_every", "checkpoint_every", "found"), [(8, 100, 8), (100, 6, 6), (100, 100, 9)])
def test_a_bad_step_is_named_at_the_next_look_and_no_checkpoint_is_written_after_it(
    log_every, checkpoint_every, found, tmp_path
):
    """The looks are at a logged step, before a checkpoint, and at the end of a run that another Trainer ends early."""
    intervals = (f"trainer.log_every={log_every}", f"trainer.checkpoint_every={checkpoint_every}")
    config = tiny_run(tmp_path, *intervals, "trainer.max_steps=20", "evaluation.preview_every=null")
    trainer, _ = build_trainer(config)
    watch = Watch()
    trainer.callbacks.insert(0, watch)
    trainer.fit_loop.epoch_loop.max_steps = 9
    module = Poisoned(config)
    with pytest.raises(NonFiniteError, match=f"^step {BAD}: the hidden loss is not finite; there is no checkpoint yet"):
        trainer.fit(module, LatentDataModule(config))
    steps = len(watch.states) + (found == log_every)  # a logged step ends before its callbacks
    assert steps == found and list_checkpoints(config.run_dir) == []
    assert unmoved(watch.states[BAD - 2], watch.states[BAD - 1]) and not unmoved(watch.states[BAD - 1], watch.states[BAD])
    assert all(tensor.isfinite().all() for tensor in watch.states[-1])
    assert all(tensor.isfinite().all() for tensor in module.ema.state_dict().values())


def test_the_newest_checkpoint_before_a_bad_step_is_named(tmp_path):
    fields = ("trainer.log_every=100", "trainer.checkpoint_every=2", "evaluation.preview_every=null")
    config = tiny_run(tmp_path, *fields)
    trainer, _ = build_trainer(config)
    with pytest.raises(NonFiniteError, match=f"^step {BAD}: .*; the last good checkpoint is .*step-00000004.ckpt"):
        trainer.fit(Poisoned(config), LatentDataModule(config))
    assert [path.name for path in list_checkpoints(config.run_dir)] == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_running_ahead_trains_the_same_weights(tmp_path):
    """To what fused kernels round otherwise."""
    config = tiny_run(tmp_path, "trainer.max_steps=4", "evaluation.preview_every=null", "optimizer.lr=1e-4")
    found = []
    for module in (LitMADFormer(config), RunsAhead(config)):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.fit(module, LatentDataModule(config))
        found.append(module.model.state_dict())
        assert trainer.optimizers[0].defaults["fused"] == (True if isinstance(module, RunsAhead) else None)
    apart = torch.cat([(found[1][name] - tensor).abs().flatten() for name, tensor in found[0].items()])
    assert apart.mean() < 2e-6, "4 steps of 1e-4 move most weights by some 2e-4"


@pytest.mark.parametrize(("module_class", "last"), [(LitMADFormer, 3), (RunsAhead, STOP_INTERVAL)])
def test_processes_on_accelerators_agree_to_stop_every_ten_steps_and_none_within_accumulation(
    module_class, last, tmp_path, monkeypatch
):
    """The first micro-batch of step 3 brings the signal. One process stands for two: the strategy asks nobody else."""
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    config = tiny_run(tmp_path, "data.batch_size_per_device=4", "trainer.checkpoint_every=100", "evaluation.preview_every=null")
    trainer, checkpoints = build_trainer(config)
    decisions = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            checkpoints.stop_requested |= batch_idx == 4

    def reduce(decision, all):
        decisions.append(trainer.global_step)
        return decision

    trainer.callbacks.insert(0, Ask())
    monkeypatch.setattr(trainer.strategy, "reduce_boolean_decision", reduce)
    trainer.fit(module_class(config), LatentDataModule(config))
    assert trainer.accumulate_grad_batches == 2 and checkpoints.stopped
    assert [path.name for path in list_checkpoints(config.run_dir)] == [f"step-{last:08d}.ckpt"]
    assert decisions == ([1, 2, 3] if module_class is LitMADFormer else [STOP_INTERVAL])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_step_waits_for_nothing(accumulation, tmp_path, monkeypatch):
    """On tensors without values, every `.item()` or `.tolist()` raises: only the look at the end of the run does."""
    text = ("model.text.vocab_size=2048", "model.text.length=3", "model.text.pad_token_id=0")
    fields = ("trainer.log_every=100", "trainer.max_steps=100", "trainer.checkpoint_every=100", "loss.lambda_clean_tower=0.1")
    config = tiny_run(tmp_path, *fields, *text, "data.tokenizer=builtin", "evaluation.preview_every=null", "data.batch_size=4")
    model, drawer = config.model, LitMADFormer(config)
    shape = (4, model.latent_channels, model.latent_size, model.latent_size)
    batch = {"latents": torch.zeros(shape), "keys": torch.zeros(4, 2, dtype=torch.int64)}
    batch = drawer.draw({**batch, "text": torch.ones(4, 3, dtype=torch.int64)})
    ends = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ends.append(trainer.global_step)

    monkeypatch.setattr("madformer.progress.ProgressDisplay.show", lambda *_: None)  # it reads the loss when it prints
    trainer, _ = build_trainer(config)
    trainer.callbacks.append(Count())
    trainer.fit_loop.epoch_loop.max_steps, trainer.accumulate_grad_batches = 3, accumulation
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        with pytest.raises(DataDependentOutputException) as caught:
            trainer.fit(WithoutValues(config), MicroBatches(repeat(fake), dict, 0, pin_memory=False))
    assert ends[-1] == 3 and len(ends) == 3 * accumulation
    assert any(entry.name == "on_train_end" for entry in caught.traceback)
