"""The estimate of training memory, against the tensors that are alive after a forward on a GPU that computes nothing.

`python -m tests.model.test_memory` prints the tables of docs/how_to/devices.md, the second one only with a CUDA build of torch.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from madformer.config import DiffusionConfig, LossConfig, ModelConfig, UNetConfig, load_experiment, wanted_outputs
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.errors import ConfigError
from madformer.model import MADFormer, cost, memory
from madformer.model.generation import generate
from madformer.randomness import BatchShard
from madformer.training.train import build_trainer
from tests.conftest import ROOT, TEXT
from tests.fake_gpu import CUDA, fake_gpu

GIB = memory.GIB
FFHQ, IMAGENET = (load_experiment(ROOT / f"experiments/{name}.yaml") for name in ("ffhq1024", "imagenet256"))
CAPACITIES = {"80 GB": 80, "141 GB": 140}
"""GiB that remain of what a card is sold with, about."""

FEW_LAYERS = {"depth": 6, "diffusion_depth": 3}
CASES = {
    "ffhq1024": (FFHQ.model, LossConfig(), 1),
    "imagenet256": (IMAGENET.model, LossConfig(), 1),
    "every layer iterates": (replace(FFHQ.model, diffusion_depth=28), LossConfig(lambda_hidden=0), 1),
    "local denoising": (replace(FFHQ.model, local_denoising=True), LossConfig(), 1),
    "no clean blocks": (replace(FFHQ.model, use_clean_blocks=False), LossConfig(), 1),
    "four draws": (replace(FFHQ.model, **FEW_LAYERS), LossConfig(), 4),
    "grouped heads": (replace(FFHQ.model, num_kv_heads=6, **FEW_LAYERS), LossConfig(), 1),
    "activation checkpointing": (replace(FFHQ.model, activation_checkpointing=True), LossConfig(), 1),
    "shared, local, text": (
        replace(IMAGENET.model, parameter_sets="shared", local_denoising=True, **FEW_LAYERS),
        LossConfig(lambda_clean_tower=0.1),
        2,
    ),
}
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build of torch")


class Alive(TorchDispatchMode):
    """The storages that operators have made on a device, and whether they are still there."""

    def __init__(self, device: torch.device, parameters: list[Tensor]) -> None:
        super().__init__()
        self.device, self.excluded = device.type, {parameter.untyped_storage()._cdata for parameter in parameters}
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.excluded:
                    self.storages.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    @property
    def bytes(self) -> int:
        alive = {reference.cdata: size for reference, size in self.storages if not reference.expired()}
        return sum(alive.values())


class Flex(torch.autograd.Function):
    """FlexAttention as a compiled kernel: no scores. Uncompiled it would make them, and there is nothing to compile for."""

    @staticmethod
    def forward(ctx, q_BHPK, k_BGMK, v_BGMK):
        attended_BHPK, logsumexp_BHP = torch.empty_like(q_BHPK), q_BHPK.new_empty(q_BHPK.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q_BHPK, k_BGMK, v_BGMK, attended_BHPK, logsumexp_BHP)
        return attended_BHPK


@contextlib.contextmanager
def flex_kernel() -> Iterator[None]:
    def kernel():
        return lambda q, k, v, block_mask, enable_gqa: Flex.apply(q, k, v)

    with mock.patch("madformer.model.attention._compiled_flex_attention", kernel):
        yield


def alive_bytes(config: ModelConfig, losses: LossConfig, draws: int, dtype: str, device: torch.device, batch: int = 1) -> int:
    """Bytes that a forward leaves on the device for the backward pass, beside the parameters."""
    with torch.device(device):
        model = MADFormer(replace(config, compile=False))
        shape = (config.ar_length, config.latent_channels, config.block_size, config.block_size)
        clean, noise = torch.randn(batch, *shape), torch.randn(batch * draws, *shape)
        t = torch.zeros(batch * draws, config.ar_length, dtype=torch.long)
        text = torch.ones(batch, config.text.length, dtype=torch.long) if config.text else None
    is_rounded = dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, is_rounded, cache_enabled=False), flex_kernel():  # as Lightning has it
        with Alive(device, list(model.parameters())) as alive:
            result = compute_losses(model, NoiseSchedule(DiffusionConfig()), losses, clean, noise, t, text)
        assert result.total.requires_grad
        return alive.bytes


def estimated_bytes(config, losses, draws, dtype, batch=1):
    estimate = memory.training_memory(config, batch, dtype, wanted_outputs(losses), draws)
    return estimate.activations + estimate.casts


@needs_cuda_build
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_is_alive_on_cuda(case, dtype, backend):
    config, losses, draws = CASES[case]
    if case == "grouped heads" and (dtype, backend) == ("float32", "sdpa"):
        pytest.skip("no fused kernel takes grouped heads in float32")
    config = replace(config, attention_backend=backend)
    with fake_gpu(CUDA):
        measured = alive_bytes(config, losses, draws, dtype, CUDA)
    assert estimated_bytes(config, losses, draws, dtype) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"ar_length": 16}, {"use_clean_blocks": False, "text": TEXT}, {"local_denoising": True}, {"use_condition": False}],
    ids=str,
)
def test_activations_are_what_is_alive_on_the_cpu(changes):
    """In every build. In float32 the CPU keeps what CUDA does, but for channels-last copies of the U-Net."""
    unet = UNetConfig(channels=(32, 64), layers=(1, 2), attention=(False, True))
    sizes = {"latent_size": 32, "ar_length": 4, "depth": 4, "diffusion_depth": 2, "width": 128, "num_heads": 4}
    sizes |= {"ffn_width": 384, "unet": unet, "attention_backend": "sdpa"}
    config = ModelConfig(**{**sizes, **changes})
    losses = LossConfig(lambda_hidden=0.1 * config.use_condition)
    measured = alive_bytes(config, losses, 1, "float32", torch.device("cpu"), batch=2)
    assert estimated_bytes(config, losses, 1, "float32", batch=2) == pytest.approx(measured, rel=0.1)


class Peak(Alive):
    """The most bytes that were alive at once."""

    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.storages = [(reference, size) for reference, size in self.storages if not reference.expired()]
        self.peak = max(self.peak, self.bytes)
        return result


@pytest.mark.parametrize("changes", [{}, {"ar_length": 16}, {"width": 512}, {"local_denoising": True}, {"text": TEXT}], ids=str)
def test_sampling_needs_no_more_than_the_estimate(changes):
    unet = UNetConfig(channels=(32, 64), layers=(1, 2), attention=(False, True))
    sizes = {"latent_size": 32, "ar_length": 4, "depth": 4, "diffusion_depth": 2, "width": 128, "num_heads": 4}
    config = ModelConfig(**{**sizes, "ffn_width": 384, "unet": unet, "attention_backend": "sdpa", **changes})
    model, prompts = MADFormer(replace(config, compile=False)).eval(), None
    model.prepare_for_sampling()
    if config.text:
        prompts = torch.ones(4, config.text.length, dtype=torch.long)
    with torch.no_grad(), Peak(torch.device("cpu"), list(model.parameters())) as alive:
        guidance = 2.0 if config.text else 1.0
        generate(model, DDIMScheduler(prediction_type="sample"), 2, seeds=range(4), text=prompts, guidance=guidance)
    settings = SimpleNamespace(
        model=config, trainer=SimpleNamespace(precision="32-true"), evaluation=SimpleNamespace(batch_size=4)
    )
    estimate = (memory.sampling_memory(settings, guidance != 1) - GIB) / 1.05 - memory.weight_memory(config)
    assert alive.peak < estimate < 1.8 * alive.peak


def test_state_is_a_parameter_s_share():
    config = FFHQ.model
    parameters = sum(cost.parameters(config).values())
    plain, sharded = memory.training_memory(config, 1), memory.training_memory(config, 1, shards=8)
    assert (plain.weights, plain.optimizer, plain.gathered) == (4 * parameters, 8 * parameters, 0)
    assert sharded.weights == sharded.gradients == sharded.ema == pytest.approx(plain.weights / 8, abs=1)
    assert sharded.activations == plain.activations and 0 < sharded.gathered < plain.weights
    assert memory.training_memory(config, 1, "float32").casts == 0
    unet = {part: cost.parameters(config)[part] for part in ("downsampler", "upsampler")}
    # The U-Net's halves are called twice each: for clean and for noisy blocks, and for the denoised blocks and the condition.
    condition = memory.training_memory(config, 1, outputs={"condition"})
    once = parameters - config.block_tokens * config.width
    assert condition.casts == 2 * (once + sum(unet.values()))
    checkpointed = memory.training_memory(replace(config, activation_checkpointing=True), 1)
    assert checkpointed.activations + checkpointed.recomputed < plain.activations / 3
    layer = (once - sum(unet.values())) // config.depth
    assert checkpointed.recomputed == config.ar_length * cost.upsampler(config).blocks[-1].kept_bytes(2) + 2 * layer
    assert checkpointed.casts == 0


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5, 6, 12, 100])
def test_micro_batches_are_the_trainer_s(limit):
    config = replace(FFHQ, data=replace(FFHQ.data, batch_size=24, batch_size_per_device=limit))
    sizes = memory.micro_batches(config, 2)
    assert sizes[0] == BatchShard.of(24, limit, 0, 2).micro_batch and sizes[-1] == 1
    assert all(12 % size == 0 for size in sizes) and sizes == sorted(sizes, reverse=True)


LARGE = replace(FFHQ, data=replace(FFHQ.data, batch_size_per_device=8), model=replace(FFHQ.model, compile=False))


@pytest.mark.parametrize(
    ("gib", "remedy"),
    [
        (141, "data.batch_size_per_device=4"),
        (80, "data.batch_size_per_device=2"),
        (50, "model.activation_checkpointing=true"),
        (40, "data.batch_size_per_device=4 model.activation_checkpointing=true"),
        (16, "data.batch_size_per_device=2 model.activation_checkpointing=true trainer.strategy=fsdp"),
        (8, None),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(gib, remedy):
    with pytest.raises(ConfigError, match="8 images at once need about") as error:
        memory.check_memory(LARGE, 8, gib * GIB, "a card")
    if remedy is None:
        assert "no setting fits" in str(error.value)
        return
    settings, needed = memory.fitting_settings(LARGE, 8, gib * GIB)
    assert settings == remedy and f"a card has {gib} GiB: set {remedy} ({needed / GIB:.0f} GiB)" in str(error.value)
    overrides = ["model.compile=false", "data.batch_size_per_device=8", *settings.split()]
    fitting = load_experiment(ROOT / "experiments/ffhq1024.yaml", overrides)
    assert memory.device_memory(fitting, 8).total == needed and memory.check_memory(fitting, 8, gib * GIB, "a card") is None


def test_what_may_not_fit_is_warned_of():
    needed = memory.device_memory(LARGE, 8)
    assert memory.check_memory(LARGE, 8, int(needed.total / 0.89), "a card") is None
    assert "set data.batch_size_per_device=4" in memory.check_memory(LARGE, 8, int(needed.total / 0.95), "a card")
    compiled = replace(LARGE, model=FFHQ.model)
    assert "need up to" in memory.check_memory(compiled, 8, needed.compiled + 1, "a card")
    with pytest.raises(ConfigError, match="need up to"):
        memory.check_memory(compiled, 8, needed.compiled - 1, "a card")


def test_training_on_too_small_a_card_stops_before_anything_is_made(monkeypatch):
    monkeypatch.setattr("madformer.training.train.find_devices", lambda settings: ["cuda:0"] * 8)
    card = SimpleNamespace(total_memory=80 * 10**9, name="a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with pytest.raises(ConfigError, match=re.escape("a card has 75 GiB: set data.batch_size_per_device=2 (")):
        build_trainer(replace(FFHQ, data=replace(FFHQ.data, batch_size_per_device=None)))


def print_table() -> None:
    print("| experiment | strategy | checkpointing | " + " | ".join(f"{size} cards: images" for size in CAPACITIES) + " |")
    print("| --- | --- | --- |" + " --- |" * len(CAPACITIES))
    for experiment in (FFHQ, IMAGENET):
        for strategy in ("ddp", "fsdp"):
            for checkpointing in (False, True):
                columns = []
                for gib in CAPACITIES.values():
                    model = replace(experiment.model, activation_checkpointing=checkpointing)
                    trainer, data = replace(experiment.trainer, strategy=strategy), experiment.data
                    for images in memory.micro_batches(replace(experiment, data=replace(data, batch_size_per_device=None)), 8):
                        limited = replace(data, batch_size_per_device=images)
                        config = replace(experiment, model=model, trainer=trainer, data=limited)
                        if (needed := memory.device_memory(config, 8).total) <= 0.9 * gib * GIB:
                            columns.append(f"{images} ({needed / GIB:.0f} GiB)")
                            break
                name = {False: "off", True: "on"}[checkpointing]
                print(f"| {experiment.name} | {strategy.upper()} | {name} | " + " | ".join(columns) + " |")
    if torch.version.cuda is not None:
        print("\n| model, one image | dtype | backend | alive (GiB) | estimate |\n| --- | --- | --- | ---: | ---: |")
        for name, (model, losses, draws) in CASES.items():
            for dtype in ("bfloat16", "float32"):
                for backend in ("flex", "sdpa"):
                    config = replace(model, attention_backend=backend)
                    with fake_gpu(CUDA):
                        measured = alive_bytes(config, losses, draws, dtype, CUDA) / GIB
                    estimate = estimated_bytes(config, losses, draws, dtype) / GIB
                    print(f"| {name} | {dtype} | {backend} | {measured:.2f} | {estimate:.2f} |")


if __name__ == "__main__":
    print_table()
