"""The training forward: what it leaks, what it skips, and what its options leave unchanged."""

import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from madformer.config import DiffusionConfig, LossConfig, UNetConfig
from madformer.diffusion.losses import compute_losses
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.model import MADFormer
from madformer.model.embedding import GroupNorm, TimestepEmbedding, skip_shapes
from madformer.model.generation import generate
from madformer.model.layer import DecoderLayer, RMSNorm, Rope
from madformer.model.layer_plan import existing_outputs, layer_plans
from madformer.model.madformer import AUXILIARY_TIMESTEP
from tests.conftest import SWITCHES, TEXT, build, latents, prompts, switch_name, timesteps, tiny
from tests.fake_gpu import CUDA, fake_gpu

configs = st.builds(
    tiny,
    ar_length=st.sampled_from([1, 4, 16]),
    depth=st.just(3),
    diffusion_depth=st.integers(1, 3),
    num_kv_heads=st.sampled_from([None, 1]),
    use_clean_blocks=st.booleans(),
    use_condition=st.booleans(),
    local_denoising=st.booleans(),
    parameter_sets=st.sampled_from(["separate", "shared"]),
    rope=st.sampled_from(["axial", "released"]),
    text=st.sampled_from([None, TEXT]),
    latent_size=st.just(8),
)


def forward(model, clean=None, noisy=None, batch=2, draws=1, **options):
    config = model.config
    clean = latents(config, batch) if clean is None else clean
    noisy = latents(config, batch * draws, seed=5) if noisy is None else noisy
    options = {"text": prompts(config, batch), **options}
    return model(clean, noisy, timesteps(config, batch * draws), **options)


@given(configs, st.data())
def test_no_prediction_sees_its_target(config, data):
    if config.ar_length == 16:
        config = dataclasses.replace(config, latent_size=16)
    model, clean = build(config), latents(config).requires_grad_()
    noisy = latents(config, seed=5).requires_grad_()
    out = forward(model, clean, noisy)
    block = data.draw(st.integers(0, config.ar_length - 1))

    def influence(output, inputs):
        """Largest gradient of the block's output with respect to each block of the inputs."""
        (gradient,) = torch.autograd.grad(
            (output[:, block] ** 2).sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return gradient.abs().amax((0, 2, 3, 4))

    assert not influence(out.denoised_BLCYX, clean)[block:].any()
    assert not influence(out.denoised_BLCYX, noisy)[block + 1 :].any()
    assert influence(out.denoised_BLCYX, noisy)[block] > 0
    if out.condition_BLCYX is not None:
        assert not influence(out.condition_BLCYX, clean)[block:].any()
        assert not influence(out.condition_BLCYX, noisy).any()
        earlier = slice(0 if config.ar_depth else max(block - 1, 0), block)  # without AR layers it is the embedding alone
        assert influence(out.condition_BLCYX, clean)[earlier].all()
    if out.clean_tower_BLCYX is not None:
        assert not influence(out.clean_tower_BLCYX, clean)[block + 1 :].any()
        assert not influence(out.clean_tower_BLCYX, noisy).any()
    if config.use_clean_blocks and not config.local_denoising:
        assert influence(out.denoised_BLCYX, clean)[:block].all()


@given(configs, st.integers(1, 3))
def test_draws_share_the_context_and_nothing_else(config, draws):
    assume(config.ar_length < 16)
    model, clean, t = build(config), latents(config), timesteps(config, 2 * draws)
    noisy, text = latents(config, 2 * draws, seed=5), prompts(config)
    together = model(clean, noisy, t, text=text)
    for draw in range(draws):
        alone = model(clean, noisy[draw::draws], t[draw::draws], text=text)
        torch.testing.assert_close(together.denoised_BLCYX[draw::draws], alone.denoised_BLCYX)
        if alone.condition_BLCYX is not None:
            torch.testing.assert_close(together.condition_BLCYX, alone.condition_BLCYX)


@pytest.mark.parametrize("switches", SWITCHES, ids=switch_name)
def test_outputs_that_nobody_wants_change_nothing_and_are_absent(switches):
    model = build(tiny(**switches))
    everything, alone = forward(model), forward(model, outputs=())
    torch.testing.assert_close(alone.denoised_BLCYX, everything.denoised_BLCYX)
    assert alone.condition_BLCYX is None and alone.clean_tower_BLCYX is None and alone.text_logits is None
    assert (everything.condition_BLCYX is not None) == switches["use_condition"]
    assert (everything.clean_tower_BLCYX is not None) == switches["use_clean_blocks"]
    assert (everything.text_logits is not None) == (switches["text"] is not None)
    for name in ("condition", "clean_tower"):
        if (wanted := getattr(everything, f"{name}_BLCYX")) is not None:
            torch.testing.assert_close(getattr(forward(model, outputs=[name]), f"{name}_BLCYX"), wanted)


def test_the_plan_leaves_out_what_nobody_reads():
    config = tiny(depth=3, diffusion_depth=1)
    plans = layer_plans(config, existing_outputs(config, ()))
    assert [plan.queries for plan in plans] == [("clean", "noise"), ("clean", "noise"), ("noise",)]
    assert {plan.keys for plan in plans} == {("clean", "noise")}
    local = tiny(depth=3, diffusion_depth=1, local_denoising=True)
    plans = layer_plans(local, existing_outputs(local, ()))
    assert [(plan.queries, plan.keys) for plan in plans] == [
        (("clean", "noise"), ("clean", "noise")),
        (("noise",), ("clean", "noise")),
        (("noise",), ("noise",)),
    ]
    unconditioned = tiny(depth=3, diffusion_depth=1, use_condition=False)
    assert [plan.queries for plan in layer_plans(unconditioned, frozenset())] == [("clean",), ("clean",), ("noise",)]


def test_every_layer_runs_the_plan_that_is_made_once():
    model = build(tiny(text=TEXT, depth=3, diffusion_depth=1, local_denoising=True))
    contexts = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, arguments: contexts.append(arguments[2]))
    text = torch.ones(2, 5, dtype=torch.long)
    forward(model, draws=2, text=text, outputs=("condition",))
    plans = layer_plans(model.config, frozenset({"condition"}), 5, 2)
    assert all(context.plan is plan for context, plan in zip(contexts, plans, strict=True))
    assert [(plan.text_tokens, plan.clean_blocks, plan.draws, plan.local) for plan in plans] == [
        (5, 3, 1, False),
        (5, 3, 1, False),
        (5, 3, 2, True),
    ]


def gradients(model, **options):
    out = forward(model, **options)
    loss = sum((x**2).mean() for x in (out.denoised_BLCYX, out.condition_BLCYX, out.clean_tower_BLCYX))
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("switches", [{}, {"text": TEXT}, {"local_denoising": True, "parameter_sets": "shared"}], ids=str)
def test_activation_checkpointing_changes_no_number(switches):
    model = build(tiny(**switches))
    again = MADFormer(dataclasses.replace(model.config, activation_checkpointing=True)).double()
    again.load_state_dict(model.state_dict())
    calls = []
    for part in (*again.layers, *again.downsampler.down_blocks, *again.upsampler.up_blocks):
        part.register_forward_pre_hook(lambda module, arguments: calls.append(module))
    for gradient, reference in zip(gradients(again), gradients(model), strict=True):
        assert torch.equal(gradient, reference)
    backward = calls[len(calls) // 2 :]
    assert {*backward} == {*calls} and len(calls) == 2 * len(backward)


def test_compiles_where_the_weights_are(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **_: compiled.append(type(part).__name__))
    MADFormer(tiny()).double()
    MADFormer(tiny(compile=False))
    assert not compiled
    MADFormer(tiny(depth=2, compile=True))
    assert compiled == ["DecoderLayer", "DecoderLayer", "Downsampler", "Upsampler"]
    compiled.clear()
    MADFormer(tiny(depth=1, diffusion_depth=1, compile=True, activation_checkpointing=True))
    assert compiled == ["DecoderLayer", "DownBlock", "DownBlock", "UpBlock", "UpBlock"]


@pytest.mark.slow
def test_compiled_layers_compute_the_same_in_training_and_sampling(monkeypatch):
    # Graphs are traced, guarded and differentiated; the code for them, which takes g++ a minute, is torch's own affair.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    model = build(tiny(depth=1, diffusion_depth=1))
    compiled = MADFormer(dataclasses.replace(model.config, compile=True)).double()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for x in (compiled, copy.deepcopy(compiled)):
        assert all(part._compiled_call_impl is not None for part in (*x.layers, x.downsampler, x.upsampler))
    compiled.load_state_dict(model.state_dict())
    for gradient, reference in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-8)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
    samples = [generate(x, scheduler, 2, initial_noise_BLCYX=latents(model.config)) for x in (compiled, model)]
    torch.testing.assert_close(*samples, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("switches", [{}, {"text": TEXT, "use_clean_blocks": False}], ids=str)
def test_builds_and_runs_on_the_meta_device(switches):
    config = tiny(**switches)
    with torch.device("meta"):
        model = MADFormer(config)
        clean, t = torch.empty(2, 4, 2, 4, 4), torch.zeros(2, 4, dtype=torch.long)
        out = model(clean, clean, t, text=prompts(config) if config.text is None else torch.zeros(2, 3, dtype=torch.long))
    assert out.denoised_BLCYX.is_meta and out.denoised_BLCYX.shape == clean.shape


def test_bfloat16_autocast_keeps_residual_stream_and_outputs_in_float32():
    model = build(tiny()).float()
    clean, noisy = latents(model.config).float(), latents(model.config, seed=5).float()
    exact = forward(model, clean, noisy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = forward(model, clean, noisy)
    assert rounded.denoised_BLCYX.dtype == torch.float32
    difference = (rounded.denoised_BLCYX - exact.denoised_BLCYX).norm()
    assert 0 < difference < 0.1 * exact.denoised_BLCYX.norm()


def test_what_stays_in_float32_under_autocast():
    model = build(tiny(unet=UNetConfig(channels=(8, 16), layers=(1, 1), attention=(False, True), num_heads=2))).float()
    kinds, dtypes = (RMSNorm, GroupNorm, TimestepEmbedding, DecoderLayer, torch.nn.Linear, torch.nn.Conv2d), {}
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(
                lambda module, _, output: dtypes.setdefault(type(module), set()).update(x.dtype for x in tree_leaves(output))
            )
    clean = latents(model.config).float()
    schedule = NoiseSchedule(DiffusionConfig())
    noise, t = schedule.draw(clean, 1, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16), mock.patch.object(Rope, "rotate", autospec=True) as rotate:
        rotate.side_effect = lambda rope, x: dtypes.setdefault(Rope, set()).update({x.dtype, rope.cos_P1K.dtype}) or x
        losses = compute_losses(model, schedule, LossConfig(), clean, noise, t)
    float32, bfloat16 = {torch.float32}, {torch.bfloat16}
    assert {x.dtype for x in tree_leaves(vars(losses)) if isinstance(x, torch.Tensor)} == float32
    exact = dict.fromkeys((RMSNorm, GroupNorm, TimestepEmbedding, DecoderLayer, Rope), float32)
    assert dtypes == {**exact, torch.nn.Linear: bfloat16, torch.nn.Conv2d: bfloat16}


def test_bfloat16_weights_leave_the_residual_stream_in_float32():
    model = build(tiny()).float()
    exact = forward(model, latents(model.config).float(), latents(model.config, seed=5).float())
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, _, output: streams.extend(x.dtype for x in output.values()))
    rounded = forward(model.bfloat16(), latents(model.config), latents(model.config, seed=5))
    assert {*streams, rounded.denoised_BLCYX.dtype} == {torch.float32}
    torch.testing.assert_close(rounded.denoised_BLCYX, exact.denoised_BLCYX, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("switches", [{}, {"text": TEXT, "num_kv_heads": 1}], ids=str)
def test_preparing_for_sampling_changes_no_number(switches, dtype):
    model = build(tiny(**switches)).float().eval()
    prepared = copy.deepcopy(model)
    prepared.prepare_for_sampling(dtype)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
    options = {"initial_noise_BLCYX": latents(model.config).float(), "text": prompts(model.config)}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        samples = [generate(x, scheduler, 2, **options) for x in (model, prepared)]
    assert torch.equal(*samples)
    assert prepared.state_dict().keys() == model.state_dict().keys()
    kept = {"boi_SD", "downsampler.time_embedding.linear_1.weight", "layers.0.towers.noise.ffn_norm.weight"}
    assert {prepared.get_parameter(name).dtype for name in kept} == {torch.float32}
    gate = prepared.layers[0].towers["noise"].gate
    assert gate.weight.dtype == (dtype or torch.float32)
    with pytest.raises(RuntimeError, match="prepared for sampling"):
        forward(prepared)


def test_rotations_are_made_once_and_serve_training_after_validation():
    model = build(tiny())
    with torch.inference_mode():
        forward(model)
    made = model.ropes(model.boi_SD.device, 0)["noise"].cos_P1K
    assert not made.is_inference()
    forward(model).denoised_BLCYX.sum().backward()
    assert model.ropes(model.boi_SD.device, 0)["noise"].cos_P1K is made


@pytest.mark.skipif(not torch.version.cuda, reason="needs a CUDA build of torch")
def test_the_unet_stays_channels_last_on_cuda():
    config = tiny(unet=UNetConfig(channels=(8, 16), layers=(1, 1), attention=(False, True), num_heads=2), compile=False)
    layouts = []
    with fake_gpu(CUDA), torch.device(CUDA):
        model = MADFormer(config)
        for half in (model.downsampler, model.upsampler):
            for module in half.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.register_forward_hook(
                        lambda module, inputs, _: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
                    )
        blocks_BLCYX = torch.randn(32, 4, 2, 4, 4)  # 128 blocks
        with torch.no_grad():  # in float32: without a card, torch believes that cuDNN takes no bfloat16
            model(blocks_BLCYX, blocks_BLCYX, torch.zeros(32, 4, dtype=torch.long))
    assert len(layouts) > 40 and all(layouts)


@pytest.mark.parametrize("form", ["raw", "sinusoidal"])
def test_neighbouring_timesteps_stay_apart_under_autocast(form):
    torch.manual_seed(0)
    embedding = TimestepEmbedding(tiny(timestep_embedding=form)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        late, later = embedding(torch.tensor([998, 999]))
    assert late.dtype == torch.float32 and not torch.equal(late, later)
    late, later = embedding.bfloat16()(torch.tensor([998, 999]))
    assert late.dtype == torch.bfloat16 and not torch.equal(late, later)


def test_clean_blocks_are_embedded_at_timestep_zero():
    model = build(tiny())
    zero = torch.zeros(2, 4, dtype=torch.long)
    torch.testing.assert_close(forward(model).denoised_BLCYX, forward(model, clean_t_BL=zero).denoised_BLCYX, rtol=0, atol=0)
    assert not torch.allclose(forward(model).denoised_BLCYX, forward(model, clean_t_BL=zero + 500).denoised_BLCYX)
    released = build(tiny(clean_timestep="released"))
    explicit = forward(released, clean_t_BL=timesteps(released.config))
    torch.testing.assert_close(forward(released).denoised_BLCYX, explicit.denoised_BLCYX, rtol=0, atol=0)


def test_the_first_condition_is_made_of_the_boi_block_alone():
    model = build(tiny(diffusion_depth=3))  # no AR layers: the condition is the BOI block, its skips are zeros
    config = model.config
    skips = [torch.zeros(2, c, rows, rows, dtype=torch.float64) for c, rows in skip_shapes(config.unet, config.block_size)]
    features = model.boi_SD.T.unflatten(1, (2, 2)).expand(2, -1, -1, -1)
    expected = model.upsampler(features, torch.full((2,), AUXILIARY_TIMESTEP), tuple(skips))
    torch.testing.assert_close(forward(model).condition_BLCYX[:, 0], expected)


def test_null_text_is_what_text_none_means():
    model = build(tiny(text=TEXT))
    padding = torch.zeros(2, 3, dtype=torch.long)
    torch.testing.assert_close(forward(model, text=None).denoised_BLCYX, forward(model, text=padding).denoised_BLCYX)
    assert not torch.allclose(forward(model).denoised_BLCYX, forward(model, text=padding).denoised_BLCYX)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"clean": torch.zeros(2, 4, 2, 8, 8)},
            r"clean_BLCYX has shape \(2, 4, 2, 8, 8\): the configuration needs \[batch, 4, 2, 4, 4\]",
        ),
        ({}, {"noisy": torch.zeros(3, 4, 2, 4, 4)}, "noisy_BLCYX has batch 3: must be a multiple of the clean batch, 2"),
        ({}, {"noisy": torch.zeros(4, 4, 2, 4, 4)}, r"t_BL has shape \(2, 4\): must be \(4, 4\)"),
        ({}, {"outputs": ["hidden"]}, r"outputs = \['hidden'\]: the auxiliary outputs are condition, clean_tower, text_logits"),
        ({}, {"text": torch.zeros(2, 3, dtype=torch.long)}, "text given to a model without text: set model.text"),
        ({}, {"clean_t_BL": torch.zeros(1, 1)}, r"clean_t_BL has shape \(1, 1\): must be \(2, 4\), as clean_BLCYX"),
        ({"text": TEXT}, {"text": torch.zeros(2, 0, dtype=torch.long)}, r"text has shape \(2, 0\): must be \[2, tokens\]"),
        ({"text": TEXT}, {"text": torch.zeros(1, 3, dtype=torch.long)}, r"text has shape \(1, 3\): must be \[2, tokens\]"),
        ({"clean_timestep": "released"}, {"draws": 2}, "2 draws per image: .*give clean_t_BL"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        forward(build(tiny(**changes)), **options)


@pytest.mark.parametrize("from_meta", [False, True])
def test_initialisation_is_the_released_one(from_meta):
    torch.manual_seed(0)
    config = tiny(width=64, num_heads=4, ffn_width=96, text=dataclasses.replace(TEXT, vocab_size=500))
    if from_meta:
        with torch.device("meta"):
            model = MADFormer(config)
        model.to_empty(device="cpu").reset_parameters()
    else:
        model = MADFormer(config)
    assert float(model.text.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.equal(model.layers[0].tower("clean").ffn_norm.weight, torch.ones(64))
    tower = model.layers[0].tower("noise")
    bound = (6 / (64 + 96)) ** 0.5
    assert tower.gate.weight.abs().max() <= bound
    assert float(tower.gate.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not tower.qkv.bias.any() and not tower.out.bias.any()
    assert float(model.boi_SD.detach().std()) == pytest.approx(1, abs=0.2)
