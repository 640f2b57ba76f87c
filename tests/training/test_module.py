"""The LightningModule under a plain Trainer: what it optimises, averages, logs, and when it stops."""

import gzip
import json

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from madformer.config import OptimizerConfig, config_hash
from madformer.data.datamodule import LatentDataModule
from madformer.data.sources import load_digits
from madformer.diffusion.losses import compute_losses
from madformer.errors import ConfigError, NonFiniteError
from madformer.model import cost
from madformer.model.embedding import to_blocks
from madformer.model.layer_plan import AUXILIARY_OUTPUTS
from madformer.parallel import peak_flops
from madformer.randomness import keyed_generator
from madformer.training.module import LitMADFormer, parameter_groups, unused_parameters, wsd_factor
from madformer.training.train import train
from tests.conftest import SWITCHES, build, latents, prompts, timesteps, tiny
from tests.tiny_runs import scalars, tiny_run


def fit(config, **options):
    """A plain Trainer, as in a notebook."""
    module, data = LitMADFormer(config), LatentDataModule(config)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**{**settings, "accelerator": "cpu", **options})
    trainer.fit(module, data)
    return module, trainer


def weights(module):
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


def test_plain_trainer_stops_after_the_last_step(tmp_path):
    module, trainer = fit(tiny_run(tmp_path, "trainer.max_steps=7"))
    assert trainer.global_step == 7
    start = LitMADFormer(module.config)
    assert not torch.equal(start.model.boi_SD, module.model.boi_SD)


def test_fast_dev_run_makes_one_step(tmp_path):
    assert fit(tiny_run(tmp_path), fast_dev_run=True)[1].global_step == 1


def test_initialisation_depends_on_the_seed_and_leaves_the_global_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (LitMADFormer(tiny_run(tmp_path, f"seed={seed}")) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.model.boi_SD, same.model.boi_SD)
    assert not torch.equal(first.model.boi_SD, other.model.boi_SD)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    one_step = ("trainer.max_steps=1", "optimizer.grad_clip=1e9")
    whole, _ = fit(tiny_run(tmp_path, *one_step), precision="64-true")
    parts, trainer = fit(tiny_run(tmp_path, *one_step, "data.batch_size_per_device=5"), precision="64-true")
    assert trainer.accumulate_grad_batches == 4, "16 images, at most 5 at once: 4 parts of 4"
    for name, moment in first_moments(whole).items():
        torch.testing.assert_close(first_moments(parts)[name], moment, rtol=1e-7, atol=1e-9)


def first_moments(module):
    """After one step, a tenth of the gradient by parameter: the step itself hides the size of a gradient."""
    state = module.optimizers().optimizer.state
    return {name: state[parameter]["exp_avg"] for name, parameter in module.model.named_parameters() if parameter in state}


def test_a_step_by_hand(tmp_path):
    """One step of the Trainer is AdamW on the clipped gradient of the keyed batch, by the definitions."""
    config = tiny_run(tmp_path, "trainer.max_steps=1", "optimizer.warmup_fraction=0", "optimizer.decay_fraction=0")
    module, _ = fit(config)
    hand = LitMADFormer(config)
    order = torch.randperm(1797, generator=keyed_generator(0, "order", 0))[:16]
    clean = to_blocks(load_digits()[0][order], config.model.ar_length)
    draws = [hand.schedule.draw(clean[i : i + 1], 1, keyed_generator(0, "noise", 0, i)) for i in range(16)]
    noise, t = (torch.cat(part) for part in zip(*draws, strict=True))
    compute_losses(hand.model, hand.schedule, config.loss, clean, noise, t).total.backward()
    trained = [parameter for parameter in hand.model.parameters() if parameter.requires_grad]
    norm = torch.sqrt(sum(parameter.grad.pow(2).sum() for parameter in trained))
    groups = parameter_groups(hand.model)
    with torch.no_grad():
        for parameter in trained:
            gradient = parameter.grad * min(1.0, 1.0 / (float(norm) + 1e-6))
            decay = 0.05 if any(parameter is other for other in groups["decay"]) else 0.0
            parameter.mul_(1 - 3e-3 * decay).sub_(3e-3 * gradient / (gradient.abs() + 1e-8))
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, weights(hand)[name], rtol=1e-4, atol=1e-5)


def test_moving_average_is_warmed_up(tmp_path):
    history = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            history.append(weights(pl_module))

    module, _ = fit(tiny_run(tmp_path, "trainer.max_steps=5", "optimizer.ema_decay=0.3"), callbacks=[Watch()])
    history.append(weights(module))
    expected = {name: tensor.double() for name, tensor in history[0].items()}
    for step, now in enumerate(history[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name].double() for name in expected}
    average = module.ema.state_dict()
    for name in expected:
        torch.testing.assert_close(average[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    before = weights(module)
    with module.sampling_weights() as model:
        assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(module).items())


def test_norms_biases_and_embeddings_do_not_decay():
    model = build(tiny(text=None))
    groups = {id(parameter): name for name, members in parameter_groups(model).items() for parameter in members}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decayed = isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight"
            assert groups[id(parameter)] == ("decay" if decayed else "no_decay"), (type(module), name)


def test_unused_weights_are_frozen_and_every_other_one_moves(tmp_path):
    module, _ = fit(tiny_run(tmp_path, "trainer.max_steps=2", "loss.lambda_hidden=0", "model.use_condition=false"))
    start = weights(LitMADFormer(module.config))
    for name, parameter in module.model.named_parameters():
        assert torch.equal(start[name], parameter) != parameter.requires_grad, name
    assert any(not parameter.requires_grad for parameter in module.model.parameters())


def test_warm_up_stable_decay():
    config = OptimizerConfig(warmup_fraction=0.1, decay_fraction=0.5, decay_halvings=6)
    factors = [wsd_factor(step, config, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:51] == [1.0] * 41
    assert factors[51:] == pytest.approx([0.5 ** (6 * (step - 50) / 50) for step in range(51, 100)])
    assert wsd_factor(0, OptimizerConfig(), 1) == 1.0


def test_what_is_logged(tmp_path):
    fields = ["trainer.max_steps=4", "loss.lambda_clean_tower=0.5", "data.batch_size_per_device=8"]
    config = tiny_run(tmp_path, *fields, "model.prediction_type=sample")
    logger = TensorBoardLogger(save_dir=tmp_path, name="", version="")
    module, _ = fit(config, logger=logger)
    values = scalars(tmp_path)
    expected = {"loss/total", "loss/image", "loss/hidden", "loss/clean_tower", "gradient_norm", "lr"}
    assert values.keys() == expected | {f"loss_t/{i}" for i in range(4)} | {f"loss_block/{i}" for i in range(4)}
    assert [step for step, _ in values["loss/total"]] == [2, 4]
    at = {name: series[0][1] for name, series in values.items()}
    total = 5 * at["loss/image"] + 0.1 * at["loss/hidden"] + 0.5 * at["loss/clean_tower"]
    assert at["loss/total"] == pytest.approx(total, rel=1e-5)
    blocks = [at[f"loss_block/{i}"] for i in range(4)]
    assert at["loss/image"] == pytest.approx(sum(blocks) / 4, rel=1e-5), "every image has every block"
    assert at["loss_t/0"] < at["loss_t/3"], "little noise is easier to remove"
    assert module.last_loss > 0 and not module.last_loss.requires_grad


def test_throughput_counts_the_formulas_flops(tmp_path):
    config = tiny_run(tmp_path)
    module = LitMADFormer(config)
    module.throughput.count_step()
    values = module.throughput.measure(torch.device("cpu"), world_size=2)
    per_image = cost.training_flops(config.model, frozenset({"condition"})).total
    ratio = values["speed/tflops_per_device"] / values["speed/images_per_second"]
    assert ratio == pytest.approx(per_image / 2 / 1e12)


def test_mfu_leaves_recomputation_out(tmp_path, monkeypatch):
    monkeypatch.setattr("madformer.training.logging.device_name", lambda _: "NVIDIA H200")
    for checkpointing in (False, True):
        config = tiny_run(tmp_path, f"model.activation_checkpointing={checkpointing}", "trainer.precision=bf16-mixed")
        module = LitMADFormer(config)
        module.throughput.count_step()
        values = module.throughput.measure(torch.device("cpu"), world_size=1)
        flops = cost.training_flops(config.model, frozenset({"condition"}))
        rate = values["speed/images_per_second"]
        assert values["speed/mfu"] == pytest.approx(rate * (flops.forward + flops.backward) / 989e12)
        assert values.get("speed/hfu") == (pytest.approx(rate * flops.total / 989e12) if checkpointing else None)
        assert (flops.total > flops.model_flops) == checkpointing


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16-mixed", 989),
        ("NVIDIA H200", "32-true", 67),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5),
        ("NVIDIA L40S", "bf16-mixed", 362),
        ("NVIDIA L4", "bf16-mixed", 121),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165),
        ("NVIDIA RTX A1000", "bf16-mixed", None),
        ("NVIDIA H200 MIG 1g.18gb", "bf16-mixed", None),
        ("cpu", "32-true", None),
    ],
)
def test_peaks_of_gpus_by_their_names(name, precision, tflops):
    assert peak_flops(name, precision) == (tflops and tflops * 1e12)


def test_a_profile_is_a_trace_of_five_steps(tmp_path, capsys):
    config = tiny_run(tmp_path, "trainer.profile=true", "data.batch_size_per_device=8", "evaluation.preview_every=null")
    assert config_hash(config) == config_hash(tiny_run(tmp_path))
    train(config)
    (path,) = (config.run_dir / "profile").iterdir()
    assert path.name == "step-00000015.json.gz" and f"{path}: a trace of steps 11 to 15" in capsys.readouterr().out
    names = [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 5


def test_a_diverged_run_stops_and_says_where(tmp_path):
    config = tiny_run(tmp_path, "optimizer.lr=1e30", "optimizer.warmup_fraction=0")
    with pytest.raises(NonFiniteError, match=r"step 2: the \w+ loss is not finite; there is no checkpoint yet"):
        fit(config)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ConfigError, match="data.source = null: nothing to train on"):
        LatentDataModule(tiny_run(tmp_path, "data.source=null"))


@given(
    st.sampled_from(SWITCHES),
    st.sampled_from([1, 4]),
    st.integers(1, 3),
    st.sets(st.sampled_from(AUXILIARY_OUTPUTS)),
)
def test_unused_parameters_are_those_without_a_gradient(switches, ar_length, diffusion_depth, outputs):
    config = tiny(ar_length=ar_length, diffusion_depth=diffusion_depth, **switches)
    model = build(config)
    out = model(latents(config), latents(config, seed=5), timesteps(config), text=prompts(config), outputs=outputs)
    tensors = (out.denoised_BLCYX, out.condition_BLCYX, out.clean_tower_BLCYX, out.text_logits)
    sum((x**2).sum() for x in tensors if x is not None).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    unused = {id(parameter) for parameter in unused_parameters(model, outputs)}
    assert without == {name for name, parameter in model.named_parameters() if id(parameter) in unused}
