"""Checkpoints of the released MADFormer code: import and export of its state dicts.

The code has two branches: `main` (FFHQ, no text) and `imagenet` (a text tower, token embeddings and a head). The
names in a state dict tell the branch, and the shapes tell the sizes. The rest is constant in the released code: 8 group-norm
groups, 8 U-Net heads, epsilon prediction, its own RoPE, and clean blocks embedded with the noisy block's timestep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache, reduce

import torch
from torch import Tensor

from madformer.config import ModelConfig, TextConfig, UNetConfig
from madformer.model.layer_plan import TOWERS
from madformer.model.madformer import MADFormer

_LAYER_NAMES = {
    "input_layernorm_list": "attention_norm",
    "self_attn.qkv_list": "qkv",
    "self_attn.q_norm_list": "q_norm",
    "self_attn.k_norm_list": "k_norm",
    "self_attn.proj_list": "out",
    "post_attention_layernorm_list": "ffn_norm",
    "mlp_list.{}.gate_proj": "gate",
    "mlp_list.{}.up_proj": "up",
    "mlp_list.{}.down_proj": "down",
}
"""Released module of a layer -> our module of a tower; {} or the end is the tower's number."""

_TEXT_NAMES = [("embed_tokens.weight", "text.embedding.weight"), ("lm_head.weight", "text.head.weight")]
"""Names that only the `imagenet` branch has: released name, our name."""

_TEXT_ROPE = "text_rope.inv_freq"
"""A buffer of the `imagenet` branch, once in the model and once in each layer: the constant frequencies of its text RoPE."""

_HEAD_WIDTH = 64
"""Width of the released code's heads."""

_PROMPT_TOKENS = 2
"""BOS and a class number."""

_LLAMA_EOS = 128_001
"""Padding of prompts: the end-of-text token of Llama 3."""

_RELEASED_FIELDS = {
    "rope": "released",
    "prediction_type": "epsilon",
    "clean_timestep": "released",
    "timestep_embedding": "raw",
}
"""Fields that are the same in every released model."""

_UNET_CONSTANTS = {"groups": 8, "num_heads": 8}


def from_released(
    state_dict: Mapping[str, Tensor],
    diffusion_depth: int,
    ar_length: int,
    use_clean_blocks: bool = True,
    use_condition: bool = True,
    local_denoising: bool = False,
) -> MADFormer:
    """A model with released weights of either branch. The weights do not contain the switches, so pass them.

    Args:
        state_dict: parameters by released name, as in a checkpoint's `model` or `ema`. They are copied, to one dtype.

    Raises:
        ValueError: not a released state dict, or switches that contradict its sizes.
    """
    config = released_config(
        state_dict,
        diffusion_depth=diffusion_depth,
        ar_length=ar_length,
        use_clean_blocks=use_clean_blocks,
        use_condition=use_condition,
        local_denoising=local_denoising,
    )
    renamed = rename_released(state_dict, config)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in renamed.values()))
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in renamed.items()}
    with torch.device("meta"):
        model = MADFormer(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)


def to_released(model: MADFormer) -> dict[str, Tensor]:
    """The model's state dict by released names, copied. A parameter set that several towers share is copied for each.

    Raises:
        ValueError: the model does something that the released code cannot.
    """
    return {name: tensor.clone() for name, tensor in rename_ours(model.state_dict(), model.config).items()}


def rename_released(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Released weights by our names, for a model of `config` (`released_config`). They share memory with `state_dict`.

    Raises:
        ValueError: tensors are missing or unknown, or have other shapes.
    """
    names, known, shapes = _names(config), dict(_names(config, all_towers=True)), _shapes(config)
    if missing := [released_name for released_name, _ in names if released_name not in state_dict]:
        raise ValueError(f"released state dict lacks {len(missing)} tensors, the first is {missing[0]!r}")
    buffers = released_buffers(config)
    for name, frequencies in buffers.items():
        found = state_dict.get(name, frequencies)
        if found.shape != frequencies.shape or not torch.allclose(found.float(), frequencies, rtol=0.01):
            raise ValueError(f"{name} is not 10000 ** -(2k / {_HEAD_WIDTH}): only this text RoPE is supported")
    if unknown := [name for name in state_dict if name not in known and name not in buffers]:
        raise ValueError(f"released state dict has {len(unknown)} tensors too many for its sizes, the first is {unknown[0]!r}")
    weights = {}
    for released_name, name in names:
        tensor = state_dict[released_name].squeeze(0) if name == "boi_SD" else state_dict[released_name]
        if tensor.shape != shapes[name]:
            raise ValueError(f"{released_name} has shape {tuple(tensor.shape)}: must be {tuple(shapes[name])}")
        weights[name] = tensor.detach()
    return weights


def rename_ours(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A model's weights by released names, the inverse of `rename_released`. They share memory with `state_dict`.

    Raises:
        ValueError: the model does something that the released code cannot.
    """
    rules: list[tuple[str, object, str, object]] = [
        ("model", config, name, value)
        for name, value in {**_RELEASED_FIELDS, "kv_heads": config.num_heads, "head_width": _HEAD_WIDTH}.items()
    ]
    rules += [("model.unet", config.unet, name, value) for name, value in _UNET_CONSTANTS.items()]
    rules += [("model.text", config.text, "final_norm", False)] if config.text else []
    for section, fields, name, value in rules:
        if getattr(fields, name) != value:
            raise ValueError(f"{section}.{name} = {getattr(fields, name)!r}: the released code supports only {value!r}")
    if len(set(config.unet.channels[1:])) > 1:
        raise ValueError(f"model.unet.channels = {config.unet.channels}: the released code needs equal levels after the first")
    weights = {**state_dict, "boi_SD": state_dict["boi_SD"][None]}
    return {released_name: weights[name].detach() for released_name, name in _names(config, all_towers=True)}


def released_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """Buffers in a released state dict beside the parameters. They are constants; the released code refuses files without."""
    if config.text is None:
        return {}
    prefixes = ("", *(f"blocks.{layer}.self_attn." for layer in range(config.depth)))
    return {prefix + _TEXT_ROPE: 1 / 10_000 ** (torch.arange(0, _HEAD_WIDTH, 2) / _HEAD_WIDTH) for prefix in prefixes}


def released_config(state_dict: Mapping[str, Tensor], *, ar_length: int, **switches: int | bool) -> ModelConfig:
    """The configuration of a released state dict. Its weights do not contain the AR length and the switches, so pass them.

    Raises:
        ValueError: not a released state dict, or switches that contradict its sizes.
    """
    _check_tensors(state_dict)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    rows = math.isqrt(ar_length) if isinstance(ar_length, int) and ar_length > 0 else 1  # else ModelConfig refuses it
    try:
        if len(shapes["boi_block"]) != 3 or math.isqrt(shapes["boi_block"][1]) ** 2 != shapes["boi_block"][1]:
            raise ValueError(f"boi_block has shape {shapes['boi_block']}: must be [1, a square number of tokens, width]")
        _, block_tokens, width = shapes["boi_block"]
        head_width = shapes["blocks.0.self_attn.q_norm_list.1.weight"][0]
        levels = _count(shapes, r"downsampler\.down_blocks\.(\d+)\.")
        config = ModelConfig(
            latent_channels=shapes["downsampler.conv_in.weight"][1],
            latent_size=math.isqrt(block_tokens) * 2 ** (levels - 1) * rows,
            ar_length=ar_length,
            depth=_count(shapes, r"blocks\.(\d+)\."),
            width=width,
            num_heads=width // head_width,
            ffn_width=shapes["blocks.0.mlp_list.1.gate_proj.weight"][0],
            unet=_released_unet(shapes, levels),
            text=_released_text(shapes),
            **_RELEASED_FIELDS,  # type: ignore[arg-type]
            **switches,  # type: ignore[arg-type]
        )
    except KeyError as error:
        raise ValueError(f"not a released MADFormer state dict: it lacks {error.args[0]!r}") from error
    except (IndexError, ZeroDivisionError, TypeError) as error:
        raise ValueError("not a released MADFormer state dict: its sizes contradict each other") from error
    return config


def _check_tensors(state_dict: Mapping[str, Tensor]) -> None:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"released state dict is a {type(state_dict).__name__}: must map names to tensors")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            entry = "'ema' or 'model'" if name in ("ema", "model") else repr(name)
            whole = f"; give the checkpoint's entry {entry}" if isinstance(value, Mapping) else ""
            raise ValueError(f"released state dict: {name!r} is not a floating-point tensor{whole}")
    if wrapped := [name for name in state_dict if str(name).endswith(".boi_block")]:
        prefix = wrapped[0].removesuffix("boi_block")
        raise ValueError(f"released state dict: names begin with {prefix!r}, which a wrapper added: remove it from each name")


def _released_unet(shapes: Mapping[str, tuple[int, ...]], levels: int) -> UNetConfig:
    blocks = [f"downsampler.down_blocks.{level}" for level in range(levels)]
    return UNetConfig(
        channels=tuple(shapes[f"{block}.resnets.0.conv1.weight"][0] for block in blocks),
        layers=tuple(_count(shapes, rf"{re.escape(block)}\.resnets\.(\d+)\.") for block in blocks),
        attention=tuple(f"{block}.attentions.0.to_q.weight" in shapes for block in blocks),
        **_UNET_CONSTANTS,
        time_embed_dim=shapes["downsampler.time_embedding.linear_1.weight"][0],
    )


def _released_text(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig | None:
    """The text configuration of the `imagenet` branch; None: the state dict is of `main`."""
    if _TEXT_NAMES[0][0] not in shapes:
        return None
    vocab_size = shapes[_TEXT_NAMES[0][0]][0]
    pad = min(_LLAMA_EOS, vocab_size - 1)
    return TextConfig(vocab_size, length=_PROMPT_TOKENS, pad_token_id=pad, dropout=0.0, final_norm=False)


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """The number of different indices that the pattern finds at the start of names."""
    found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    if not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return len(found)


@cache
def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in MADFormer(config).state_dict().items()}


def _names(config: ModelConfig, all_towers: bool = False) -> list[tuple[str, str]]:
    """(released name, our name) of every parameter; with `all_towers` also those of released towers that our model lacks."""
    unet = [name for name in _shapes(config) if name.startswith(("downsampler.", "upsampler."))]
    names = [("boi_block", "boi_SD"), *((name, name) for name in unet), *(_TEXT_NAMES if config.text else [])]
    released_towers = TOWERS if config.text else TOWERS[1:]
    towers = tuple(tower for tower in released_towers if tower != "clean" or config.use_clean_blocks)
    for layer in range(config.depth):
        for number, tower in enumerate(released_towers):
            if tower not in towers and not all_towers:
                continue
            source = "shared" if config.parameter_sets == "shared" else tower if tower in towers else "noise"
            for released_name, name in _LAYER_NAMES.items():
                module = released_name.format(number) if "{}" in released_name else f"{released_name}.{number}"
                for kind in ("weight", "bias") if name in ("qkv", "out") else ("weight",):
                    names.append((f"blocks.{layer}.{module}.{kind}", f"layers.{layer}.towers.{source}.{name}.{kind}"))
    return names
