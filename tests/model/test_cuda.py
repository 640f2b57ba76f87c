"""The model on a GPU: it computes the same as on the CPU, and fast paths compute the same as slow ones.

`make test-gpu` runs these tests. Distances are relative: the norm of a difference over the norm of what is expected.
"""

import dataclasses
import functools

import pytest
import torch
from diffusers import DDIMScheduler

from madformer.config import DiffusionConfig, LossConfig, OptimizerConfig
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.model import MADFormer
from madformer.model.generation import BlockSampler, generate
from madformer.training.module import build_optimizer
from tests.conftest import TEXT, build, latents, prompts, tiny

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
WIDE = {"width": 64, "num_heads": 4, "latent_size": 16}
"""Heads wide enough for FlexAttention."""
SHALLOW = {**WIDE, "depth": 2, "diffusion_depth": 1}
"""Compiled in fewer seconds."""

EXACT = 1e-9
"""float64: only the order of sums differs, by 1e-16 each."""
FLOAT32 = 1e-4
"""float32 without TF32: rounding leaves some 3e-6 of a sample (float32 against float64, on the CPU)."""
BFLOAT16 = 5e-2
"""bfloat16 has 8 bits: rounding leaves up to 3e-2 of a sample, 2e-2 of gradients (against float32, on the CPU)."""


@pytest.fixture(autouse=True)
def no_tf32():
    """TF32 keeps 10 bits of a factor; torch has it on for convolutions."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, is_allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = is_allowed


def on_device(model, **changes):
    """A copy of a model on the GPU, with another configuration; in the model's own dtype."""
    copy = MADFormer(dataclasses.replace(model.config, **changes)).to(DEVICE, model.boi_SD.dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def train(model, autocast=False):
    """Denoised blocks, loss and gradients of one step with two noise draws."""
    config, device, generator = model.config, model.boi_SD.device, torch.Generator().manual_seed(0)
    schedule, clean = NoiseSchedule(DiffusionConfig()), latents(config).to(model.boi_SD.dtype)
    noise, t = schedule.draw(clean, 2, generator)
    text = None if config.text is None else prompts(config).to(device)
    weights = LossConfig(lambda_hidden=0.1 * config.use_condition)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        losses = compute_losses(model, schedule, weights, clean.to(device), noise.to(device), t.to(device), text)
    gradients = torch.autograd.grad(losses.total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return [losses.outputs.denoised_BLCYX, losses.total, torch.cat([gradient.flatten() for gradient in gradients])]


def sample(model, steps=3, autocast=False, **options):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
    options = {"seeds": [1, 2], **options}
    if model.config.text is not None:
        options = {"text": prompts(model.config), "guidance": 2.0, **options}
    with torch.autocast(model.boi_SD.device.type, torch.bfloat16, enabled=autocast):
        return generate(model, scheduler, steps, **options)


def distance(found, expected):
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.isfinite().all()
    return float((found - expected).norm() / expected.norm())


def require_close(found, expected, tolerance):
    for name, a, b in zip(("denoised", "loss", "gradients"), found, expected, strict=True):
        assert distance(a, b) < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FLOAT32)], ids=str)
def test_training_is_that_of_the_cpu(dtype, tolerance):
    model = build(tiny(**WIDE, text=TEXT, attention_backend="sdpa", compile=False)).to(dtype)
    require_close(train(on_device(model)), train(model), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FLOAT32)], ids=str)
@pytest.mark.parametrize("switches", [{}, {"text": TEXT, "num_kv_heads": 2}, {"use_clean_blocks": False}], ids=str)
def test_samples_are_those_of_the_cpu(switches, dtype, tolerance):
    model = build(tiny(**WIDE, **switches, compile=False)).to(dtype)
    assert distance(sample(on_device(model)), sample(model)) < tolerance


@pytest.mark.parametrize(
    ("switches", "autocast"),
    [
        ({}, False),
        ({}, True),
        ({"text": TEXT, "num_kv_heads": 2}, True),
        ({"use_clean_blocks": False}, True),
        ({"local_denoising": True}, True),
    ],
    ids=str,
)
def test_flex_trains_as_sdpa_does(switches, autocast):
    """Triton's kernel sums float32 products in TF32 where it likes: a tolerance of its 10 bits."""
    model = build(tiny(**WIDE, **switches, compile=False)).float()
    flex, sdpa = (on_device(model, attention_backend=backend) for backend in ("flex", "sdpa"))
    require_close(train(flex, autocast), train(sdpa, autocast), BFLOAT16 if autocast else 2e-3)


def test_bfloat16_trains_and_samples_almost_as_float32():
    model = on_device(build(tiny(**WIDE, text=TEXT, attention_backend="sdpa", compile=False)).float())
    require_close(train(model, autocast=True), train(model), 2 * BFLOAT16)
    assert distance(sample(model, autocast=True), sample(model)) < 2 * BFLOAT16


def test_compiled_parts_train_as_eager_ones():
    """With FlexAttention in both, whose kernel may use TF32, and so in another order."""
    model = build(tiny(**SHALLOW, attention_backend="flex")).float()
    compiled, eager = (on_device(model, compile=mode) for mode in (True, False))
    require_close(train(compiled), train(eager), 2e-3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("switches", [{}, {"text": TEXT}, {"use_clean_blocks": False, "local_denoising": True}], ids=str)
def test_graphs_sample_as_single_launches(switches, autocast, caplog):
    """The same kernels; a library may choose another for another stream. A second batch goes through the same graphs."""
    model = on_device(build(tiny(**WIDE, **switches, compile=False)).float()).eval()
    with_graphs, without = (
        functools.lru_cache(maxsize=1)(functools.partial(BlockSampler, use_graphs=graphs)) for graphs in (True, False)
    )
    for seeds in ([1, 2], [3, 4]):
        found = sample(model, 4, autocast, seeds=seeds, make_sampler=with_graphs)
        expected = sample(model, 4, autocast, seeds=seeds, make_sampler=without)
        assert distance(found, expected) < (1e-2 if autocast else 1e-5)
    assert with_graphs.cache_info().misses == 1 and "CUDA graphs are off" not in caplog.text


def test_weights_cast_once_sample_as_those_that_autocast_casts():
    """Gate and up are one product then, which may be summed in another order."""
    model = on_device(build(tiny(**WIDE, text=TEXT, compile=False)).float()).eval()
    expected = sample(model, autocast=True)
    model.prepare_for_sampling(torch.bfloat16)
    assert distance(sample(model, autocast=True), expected) < BFLOAT16


def test_compiled_parts_sample_as_eager_ones():
    model = build(tiny(**SHALLOW)).float()
    compiled, eager = (on_device(model, compile=mode) for mode in (True, False))
    assert distance(sample(compiled), sample(eager)) < FLOAT32


def test_a_training_step_does_not_wait_for_the_gpu():
    model = on_device(build(tiny(**WIDE, attention_backend="sdpa", compile=False)).float())
    optimizer, schedule = build_optimizer(model, OptimizerConfig(), fused=True), NoiseSchedule(DiffusionConfig())
    clean = latents(model.config).float()
    clean, noise, t = (tensor.to(DEVICE) for tensor in (clean, *schedule.draw(clean)))

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            total = compute_losses(model, schedule, LossConfig(), clean, noise, t).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one makes tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
