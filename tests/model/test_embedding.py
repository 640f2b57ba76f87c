"""Tiles, positions and rotations."""

import math

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
from hypothesis import given
from hypothesis import strategies as st

from madformer.config import UNetConfig
from madformer.model.embedding import DownBlock, GroupNorm, UpBlock, text_positions, to_blocks, to_image, token_positions
from madformer.model.layer import rope
from tests.conftest import tiny


def test_blocks_are_tiles_in_raster_order():
    image = torch.arange(16).reshape(1, 1, 4, 4)
    blocks = to_blocks(image, 4)
    assert blocks[0, 1, 0].tolist() == [[2, 3], [6, 7]]
    assert blocks[0, 2, 0].tolist() == [[8, 9], [12, 13]]
    assert torch.equal(to_image(blocks), image)


@pytest.mark.parametrize("ar_length", [0, 3, 9])
def test_an_image_that_cannot_be_cut_so_is_refused(ar_length):
    with pytest.raises(ValueError, match=f"ar_length = {ar_length}: must be a square number whose root divides 4 x 4"):
        to_blocks(torch.zeros(1, 1, 4, 4), ar_length)


def test_positions_are_rows_and_columns_of_the_whole_image_and_text_lies_before_it():
    positions = token_positions(tiny())  # a token grid of 4 x 4
    assert positions[1].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert positions[2, 0].tolist() == [2, 0]
    assert text_positions(3).tolist() == [[-3, -3], [-2, -2], [-1, -1]]


def rotate(config, x_K, *position):
    return rope(torch.tensor([position]), config, torch.float64).rotate(x_K)[0, 0]


@given(st.tuples(*[st.integers(-20, 20)] * 6), st.integers(0, 5))
def test_axial_scores_depend_on_relative_position_alone(positions, seed):
    config = tiny(width=32)
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row, column, other_row, other_column, down, right = positions
    score = rotate(config, query, row, column) @ rotate(config, key, other_row, other_column)
    moved = rotate(config, query, row + down, column + right) @ rotate(config, key, other_row + down, other_column + right)
    torch.testing.assert_close(score, moved)
    torch.testing.assert_close(rotate(config, query, row, column).norm(), query.norm())


def test_each_axis_rotates_its_own_half():
    config, x = tiny(width=32), torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(rotate(config, x, 0, 7)[:8], x[:8])
    torch.testing.assert_close(rotate(config, x, 7, 0)[8:], x[8:])


@pytest.mark.parametrize(("pair", "frequency"), [(0, 1.0), (1, 0.1), (2, 0.01), (3, 0.001)])
def test_frequencies_are_powers_of_10000(pair, frequency):
    config, unit = tiny(width=32), torch.zeros(16, dtype=torch.float64)  # 10000 ** (-2 * pair / 8)
    unit[pair] = 1
    turned = rotate(config, unit, 3, 0)
    expected = torch.tensor([math.cos(3 * frequency), math.sin(3 * frequency)], dtype=torch.float64)
    torch.testing.assert_close(turned[[pair, pair + 4]], expected)


def diffusers_block(kind, attention, channels, layers, **sizes):
    """A block of diffusers, with group norms that take the accurate kernel."""
    shared = {"out_channels": channels, "temb_channels": 8, "num_layers": layers, "resnet_groups": 4, **sizes}
    if attention:
        how = {"downsample_type": "conv"} if kind == "down" else {"upsample_type": "conv"}
        block = (AttnDownBlock2D if kind == "down" else AttnUpBlock2D)(**shared, **how, attention_head_dim=channels // 2)
    else:
        block = (DownBlock2D if kind == "down" else UpBlock2D)(**shared)
    for module in list(block.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, torch.nn.GroupNorm):
                setattr(module, name, GroupNorm(norm.num_groups, norm.num_channels, norm.eps))
    return block


@pytest.mark.parametrize("blocks", [2, 64])
@pytest.mark.parametrize("attention", [False, True])
def test_a_u_net_s_blocks_are_diffusers_bit_for_bit(attention, blocks):
    torch.manual_seed(0)
    unet = UNetConfig(
        channels=(8, 16, 16), layers=(1, 2, 1), attention=(attention,) * 3, groups=4, num_heads=2, time_embed_dim=8
    )
    time, x, skips = torch.randn(blocks, 8), torch.randn(blocks, 8, 8, 8), torch.randn(3, blocks, 16, 4, 4)
    below = torch.randn(blocks, 16, 4, 4).to(memory_format=torch.channels_last)  # as the layers above hand them on
    pairs = [
        (DownBlock(unet, 1), diffusers_block("down", attention, 16, 2, in_channels=8), (x, time)),
        (
            UpBlock(unet, 1),
            diffusers_block("up", attention, 16, 3, in_channels=8, prev_output_channel=16),
            (below, (skips[0][:, :8], skips[1], skips[2]), time),
        ),
    ]
    for ours, theirs, inputs in pairs:
        ours.load_state_dict(theirs.state_dict())
        outputs = [block(*inputs) for block in (ours, theirs)]
        results = [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]
        gradients = [
            torch.autograd.grad(y.square().sum(), list(b.parameters())) for y, b in zip(results, (ours, theirs), strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True))
