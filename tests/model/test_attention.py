"""Both backends against attention with a dense mask, written down from the definition."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from madformer.model.attention import AttentionPattern, _compiled_flex_attention, choose_backend, dense_mask, training_context
from tests.conftest import tiny

HEADS, WIDTH = 4, 16
CPU = torch.device("cpu")


def pattern(text=2, clean=3, noisy=3, size=2, draws=1, local=False, queries=("text", "clean", "noise")):
    there = {"text": text, "clean": clean, "noise": noisy}
    keys = tuple(tower for tower in there if there[tower] and not (local and tower == "clean" and tower not in queries))
    return AttentionPattern(tuple(tower for tower in queries if tower in keys), keys, text, clean, noisy, size, draws, local)


def towers(pattern, names, heads, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "text": (batch, pattern.text_tokens),
        "clean": (batch, pattern.clean_blocks * pattern.block_tokens),
        "noise": (batch * pattern.draws, pattern.noisy_blocks * pattern.block_tokens),
    }
    return {
        n: torch.randn(sizes[n][0], heads, sizes[n][1], WIDTH, generator=generator, dtype=dtype, requires_grad=True)
        for n in names
    }


def sees(pattern, query, key):
    """The definition, token by token; a token is (tower, index, draw)."""
    (q_tower, q, q_draw), (k_tower, k, k_draw) = query, key
    if k_tower == "text":
        return q_tower != "text" or k <= q
    if q_tower == "text" or (k_tower == "noise" and q_tower == "clean"):
        return False
    q, k = q // pattern.block_tokens, k // pattern.block_tokens
    if k_tower == q_tower == "noise" and q_draw != k_draw:
        return False
    if pattern.local:
        return q_tower == k_tower and q == k
    if q_tower == "noise" and k_tower == "noise":
        return k == q if "clean" in pattern.keys else k <= q
    return k <= q if q_tower == "clean" else k < q


def tokens(pattern, names):
    counts = {"text": pattern.text_tokens, "clean": pattern.clean_blocks * pattern.block_tokens}
    counts["noise"] = pattern.noisy_blocks * pattern.block_tokens
    return [(n, i, draw) for n in names for draw in range(pattern.draws if n == "noise" else 1) for i in range(counts[n])]


def definition(pattern):
    return torch.tensor(
        [[sees(pattern, q, k) for k in tokens(pattern, pattern.keys)] for q in tokens(pattern, pattern.queries)]
    )


def masked(q, k, v, pattern):
    """Attention of everything to everything under the mask; draws are made part of the sequence."""

    def join(x):
        parts = []
        for name, y in x.items():
            if name == "noise":
                y = y.unflatten(0, (-1, pattern.draws)).transpose(1, 2).flatten(2, 3)
            parts.append(y.repeat_interleave(HEADS // y.shape[1], dim=1))
        return torch.cat(parts, dim=2)

    out = scaled_dot_product_attention(join(q), join(k), join(v), attn_mask=definition(pattern))
    parts = dict(zip(q, out.split([pattern.tokens(n) for n in q], dim=2), strict=True))
    if "noise" in parts:
        parts["noise"] = parts["noise"].unflatten(2, (pattern.draws, -1)).transpose(1, 2).flatten(0, 1)
    return parts


patterns = st.builds(
    pattern,
    text=st.integers(0, 3),
    clean=st.integers(0, 3),
    noisy=st.just(3),
    size=st.integers(1, 3),
    draws=st.integers(1, 3),
    local=st.booleans(),
    queries=st.sampled_from([("text", "clean", "noise"), ("noise",), ("clean", "noise")]),
)


@given(patterns, st.sampled_from([1, 2, 4]))
def test_sdpa_equals_the_dense_mask_forward_and_backward(pattern, kv_heads):
    assert torch.equal(dense_mask(pattern), definition(pattern))
    q, k, v = (
        towers(pattern, names, heads, seed=seed)
        for seed, (names, heads) in enumerate([(pattern.queries, HEADS), (pattern.keys, kv_heads), (pattern.keys, kv_heads)])
    )
    inputs = [*q.values(), *k.values(), *v.values()]
    ours, expected = training_context(pattern, "sdpa", CPU).attend(q, k, v), masked(q, k, v, pattern)
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
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.skipif(not shutil.which("g++"), reason="FlexAttention on the CPU is compiled with g++, which is not there")
@pytest.mark.parametrize(
    ("layout", "kv_heads"),
    [
        (pattern(), 2),
        (pattern(draws=2, queries=("noise",)), 4),
        (pattern(text=0, clean=0), 4),
        (pattern(local=True, text=0), 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_flex_equals_sdpa(layout, kv_heads):
    q = towers(layout, layout.queries, HEADS, dtype=torch.float32)
    k, v = (towers(layout, layout.keys, kv_heads, seed=seed, dtype=torch.float32) for seed in (1, 2))
    flex, sdpa = (training_context(layout, backend, CPU).attend(q, k, v) for backend in ("flex", "sdpa"))
    for name in sdpa:
        torch.testing.assert_close(flex[name], sdpa[name], rtol=1e-4, atol=1e-5)


def test_flex_masks_are_made_once_per_shape():
    layout = pattern(size=5)
    with torch.inference_mode():  # as in validation before the first training step
        mask = training_context(layout, "flex", CPU).block_mask
    assert training_context(pattern(size=5), "flex", CPU).block_mask is mask
    assert not mask.kv_indices.is_inference()


def test_flex_is_compiled_and_compiled_once():
    assert _compiled_flex_attention() is _compiled_flex_attention() is not flex_attention


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
    layout = pattern(text=0, clean=4, noisy=4, size=8, draws=2, queries=("clean", "noise"))
    with torch.device("meta"):
        q, k, v = ({n: torch.empty(x.shape) for n, x in towers(layout, layout.keys, HEADS).items()} for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        training_context(layout, "sdpa", torch.device("meta")).attend(q, k, v)
    batch = 2
    assert counter.get_total_flops() == batch * 4 * HEADS * WIDTH * int(definition(layout).sum())
