"""Both backends against attention with a dense mask, written down from the definition."""

import shutil
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from madformer.model import attention
from madformer.model.attention import _compiled_flex_attention, choose_backend, dense_mask, training_context
from madformer.model.layer_plan import LayerPlan
from tests.conftest import tiny

HEADS, WIDTH = 4, 16
CPU = torch.device("cpu")


def layer_plan(text=2, clean=3, noisy=3, size=2, draws=1, local=False, queries=("text", "clean", "noise")):
    counts = {"text": text, "clean": clean, "noise": noisy}
    keys = tuple(tower for tower in counts if counts[tower] and not (local and tower == "clean" and tower not in queries))
    return LayerPlan(tuple(tower for tower in queries if tower in keys), keys, text, clean, noisy, size, draws, local)


def towers(plan, names, heads, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "text": (batch, plan.text_tokens),
        "clean": (batch, plan.clean_blocks * plan.block_tokens),
        "noise": (batch * plan.draws, plan.noisy_blocks * plan.block_tokens),
    }
    return {
        n: torch.randn(sizes[n][0], heads, sizes[n][1], WIDTH, generator=generator, dtype=dtype, requires_grad=True)
        for n in names
    }


def sees(plan, query, key):
    """The definition, token by token; a token is (tower, index, draw)."""
    (q_tower, q, q_draw), (k_tower, k, k_draw) = query, key
    if k_tower == "text":
        return q_tower != "text" or k <= q
    if q_tower == "text" or (k_tower == "noise" and q_tower == "clean"):
        return False
    q, k = q // plan.block_tokens, k // plan.block_tokens
    if k_tower == q_tower == "noise" and q_draw != k_draw:
        return False
    if plan.local:
        return q_tower == k_tower and q == k
    if q_tower == "noise" and k_tower == "noise":
        return k == q if "clean" in plan.keys else k <= q
    return k <= q if q_tower == "clean" else k < q


def tokens(plan, names):
    counts = {"text": plan.text_tokens, "clean": plan.clean_blocks * plan.block_tokens}
    counts["noise"] = plan.noisy_blocks * plan.block_tokens
    return [(n, i, draw) for n in names for draw in range(plan.draws if n == "noise" else 1) for i in range(counts[n])]


def definition(plan):
    return torch.tensor([[sees(plan, q, k) for k in tokens(plan, plan.keys)] for q in tokens(plan, plan.queries)])


def masked(q, k, v, plan):
    """Attention of everything to everything under the mask; draws are made part of the sequence."""

    def join(x):
        parts = []
        for name, y in x.items():
            if name == "noise":
                y = y.unflatten(0, (-1, plan.draws)).transpose(1, 2).flatten(2, 3)
            parts.append(y.repeat_interleave(HEADS // y.shape[1], dim=1))
        return torch.cat(parts, dim=2)

    out = scaled_dot_product_attention(join(q), join(k), join(v), attn_mask=definition(plan))
    parts = dict(zip(q, out.split([plan.tokens(n) for n in q], dim=2), strict=True))
    if "noise" in parts:
        parts["noise"] = parts["noise"].unflatten(2, (plan.draws, -1)).transpose(1, 2).flatten(0, 1)
    return parts


plans = st.builds(
    layer_plan,
    text=st.integers(0, 3),
    clean=st.integers(0, 3),
    noisy=st.just(3),
    size=st.integers(1, 3),
    draws=st.integers(1, 3),
    local=st.booleans(),
    queries=st.sampled_from([("text", "clean", "noise"), ("noise",), ("clean", "noise")]),
)


@given(plans, st.sampled_from([1, 2, 4]))
def test_sdpa_equals_the_dense_mask_forward_and_backward(plan, kv_heads):
    assert torch.equal(dense_mask(plan), definition(plan))
    q, k, v = (
        towers(plan, names, heads, seed=seed)
        for seed, (names, heads) in enumerate([(plan.queries, HEADS), (plan.keys, kv_heads), (plan.keys, kv_heads)])
    )
    inputs = [*q.values(), *k.values(), *v.values()]
    ours, expected = training_context(plan, "sdpa", CPU).attend(q, k, v), masked(q, k, v, plan)
    assert list(ours) == list(expected)
    weights = {name: torch.randn_like(x) for name, x in expected.items()}
    gradients = [
        torch.autograd.grad(
            sum((weights[name] * x).sum() for name, x in result.items()), inputs, allow_unused=True, materialize_grads=True
        )
        for result in (ours, expected)
    ]
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name])
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.skipif(not shutil.which("g++"), reason="FlexAttention on the CPU is compiled with g++, which is not there")
@pytest.mark.parametrize(
    ("plan", "kv_heads"),
    [
        (layer_plan(), 2),
        (layer_plan(draws=2, queries=("noise",)), 4),
        (layer_plan(text=0, clean=0), 4),
        (layer_plan(local=True, text=0), 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_flex_equals_sdpa(plan, kv_heads):
    q = towers(plan, plan.queries, HEADS, dtype=torch.float32)
    k, v = (towers(plan, plan.keys, kv_heads, seed=seed, dtype=torch.float32) for seed in (1, 2))
    flex, sdpa = (training_context(plan, backend, CPU).attend(q, k, v) for backend in ("flex", "sdpa"))
    for name in sdpa:
        torch.testing.assert_close(flex[name], sdpa[name], rtol=1e-4, atol=1e-5)


def test_flex_masks_are_made_once_per_shape():
    plan = layer_plan(size=5)
    with torch.inference_mode():  # as in validation before the first training step
        mask = training_context(plan, "flex", CPU).block_mask
    assert training_context(layer_plan(size=5), "flex", CPU).block_mask is mask
    assert not mask.kv_indices.is_inference()


def test_flex_is_compiled_and_compiled_once():
    assert _compiled_flex_attention() is _compiled_flex_attention() is not flex_attention


@torch.no_grad()
def test_flex_compiles_once_for_each_pattern():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    flex = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)
    for compiled, plan in enumerate((layer_plan(size=7), layer_plan(size=7, local=True), layer_plan(size=7, draws=2)), start=1):
        q, k, v = (towers(plan, plan.keys, HEADS, seed=seed, dtype=torch.float32) for seed in range(3))
        for _ in range(3):
            training_context.cache_clear()  # another context of the same pattern, as of another model
            with mock.patch.object(attention, "_compiled_flex_attention", lambda: flex):
                training_context(plan, "flex", CPU).attend(q, k, v)
        assert counter.frame_count == compiled


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "backend"),
    [
        ({}, "cpu", torch.float32, "sdpa"),
        ({}, "cuda", torch.float32, "flex"),
        ({}, "cuda", torch.float64, "sdpa"),
        ({"num_heads": 4}, "cuda", torch.float32, "sdpa"),
        ({"attention_backend": "sdpa"}, "cuda", torch.float32, "sdpa"),
        ({"attention_backend": "flex"}, "cpu", torch.float32, "flex"),
    ],
)
def test_auto_takes_flex_where_its_kernels_run(changes, device, dtype, backend):
    with torch.no_grad():
        assert choose_backend(tiny(**{"width": 32, **changes}), torch.device(device), dtype) == backend


def test_flex_says_what_it_cannot_do_on_the_cpu():
    config = tiny(width=32, attention_backend="flex")
    with pytest.raises(ValueError, match="'flex': cannot train on the CPU; set it to sdpa or auto"):
        choose_backend(config, CPU, torch.float32)
    compiled = tiny(width=32, attention_backend="flex", compile=True)
    with torch.no_grad(), pytest.raises(ValueError, match="'flex': cannot be part of compiled layers on the CPU"):
        choose_backend(compiled, CPU, torch.float32)


def test_sdpa_multiplies_exactly_what_is_seen():
    plan = layer_plan(text=0, clean=4, noisy=4, size=8, draws=2, queries=("clean", "noise"))
    with torch.device("meta"):
        q, k, v = ({n: torch.empty(x.shape) for n, x in towers(plan, plan.keys, HEADS).items()} for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        training_context(plan, "sdpa", torch.device("meta")).attend(q, k, v)
    batch = 2
    assert counter.get_total_flops() == batch * 4 * HEADS * WIDTH * int(definition(plan).sum())
