"""Import and export of weights: checkpoints of the released code, safetensors. Files are mapped, no tensor is copied."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from madformer.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    config_hash,
    load_experiment,
    load_run,
    write_config,
)
from madformer.config.data import DIGITS, PIXELS
from madformer.config.identity import config_path, is_run, named_folder, require_no_move, to_yaml
from madformer.config.loading import build, read_value
from madformer.errors import ConfigError, InputError
from madformer.lookup import find_file
from madformer.model import MADFormer, cost
from madformer.model.official import released_buffers, released_config, rename_ours, rename_released
from madformer.runs.checkpoints import (
    CONFIG_HASH,
    EMA,
    MODEL_PREFIX,
    Weights,
    checkpoint_path,
    find_flaw,
    load_weights,
    newest_intact,
    parse_weights,
    save_checkpoint,
)
from madformer.runs.files import atomic_write, claim_folder, remove_stale, save_tensors, write_text

HUB_FILE = "ckpts.pt"
"""The checkpoint in the authors' repository on the hub, `JunhaoC/MADFormer-FFHQ`."""

_RELEASED = (".pt", ".pth", ".ckpt")
_SAFETENSORS = ".safetensors"

_BOI = "boi_block"
"""A tensor of every released state dict, and of none of ours."""

_SWITCHES = {
    "clear_clean": ("use_clean_blocks", True),
    "clear_cond": ("use_condition", True),
    "denoising_mlp": ("local_denoising", False),
    "diff_depth": ("diffusion_depth", False),
    "ar_len": ("ar_length", False),
}
"""Switches that weights do not show: key of a released checkpoint's `args` -> field of the model, and whether it is negated."""

_PAPER_STEPS = (19, 49, 99, 199)
"""The paper's budgets 280, 700, 1400, 2800 at D = 14 of 28 (Figure 4)."""

CLASS_NUMBERS = DataConfig(
    class_names="imagenet",
    prompts="numbers",
    tokenizer="meta-llama/Llama-3.2-1B",
    bos=True,
    padding_side="left",
    crop="top_left",
    batch_size=256,
)
"""Images and prompts as the released `imagenet` branch has them."""


def import_run(source: Path, run: Path, weights: str, overrides: Sequence[str]) -> None:
    """Make a run from a released checkpoint or an exported file. Its configuration records the file's SHA-256.

    Args:
        source: a file, or `owner/name` of the hub, of which `ckpts.pt` is used.

    Raises:
        InputError: no such file, another format, weights that contradict the switches, or a folder that is in use.
    """
    requested = parse_weights(weights)
    begun = (run / ".import.lock").exists()  # by an import that was killed, or is at work
    if run.exists() and not begun and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run}: exists already; name a new folder")
    file = _find(source)
    content = _read(file, requested)
    if _has_boi(content) or file.suffix != _SAFETENSORS:
        state, config = _convert(file, content, requested, overrides)
    else:
        state, config = _check_exported(file, content)
    config = _adopt(config, run, overrides)
    _require_shapes(state, config.model, str(run))
    state = {name: tensor.float() for name, tensor in state.items()}
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    checkpoint = {
        "state_dict": {MODEL_PREFIX + name: tensor for name, tensor in state.items()},
        EMA: state,
        "global_step": 0,
        CONFIG_HASH: config_hash(config),
    }
    origin = {"source": str(source), "sha256": sha256, "weights": weights}
    with claim_folder(run, "import"):
        if is_run(run) and config_path(run).read_text(encoding="utf-8") != to_yaml(config, {"imported": origin}):
            raise InputError(f"{run}: exists already; name a new folder")
        if not is_run(run):
            for folder in (run, checkpoint_path(run, 0).parent):
                remove_stale(folder)
            save_checkpoint(checkpoint, checkpoint_path(run, 0))
            write_config(config, run, imported=origin)
    print(f"{run}: {sum(tensor.numel() for tensor in state.values()):,} parameters of {source} (SHA-256 {sha256[:12]})")


def export_run(run: Path, out: Path, weights: str) -> None:
    """Write a run's newest weights: as safetensors with the configuration in a YAML file, or as a released checkpoint.

    Args:
        out: `.safetensors`, or `.pt` for a checkpoint that the released code reads.

    Raises:
        InputError: no run, no intact checkpoint, another ending, or a model that the released code cannot represent.
    """
    config, requested = load_run(run), parse_weights(weights)
    if out.suffix not in (_SAFETENSORS, ".pt"):
        raise InputError(f"--out {out}: must end in .safetensors, or in .pt for the released form")
    checkpoint = newest_intact(run)
    if checkpoint is None:
        raise InputError(f"{run}: no intact checkpoint")
    state = load_weights(checkpoint, config, requested)
    if out.suffix == _SAFETENSORS:
        with atomic_write(out) as temporary:
            save_tensors(state, temporary)
        write_text(out.with_suffix(".yaml"), to_yaml(config))
        print(f"{out}, {out.with_suffix('.yaml')}: {weights} weights of {checkpoint}")
        return
    try:
        renamed = rename_ours(state, config.model)
    except ValueError as error:
        raise InputError(f"{run}: {error}; export it as .safetensors") from error
    # The released code samples from the entry "model". The tensors are in the file once.
    whole = {**renamed, **released_buffers(config.model)}
    save_checkpoint({weights: renamed, "model": whole, "args": _released_args(config.model)}, out)
    print(f"{out}: {weights} weights of {checkpoint}, by the released names")


def _released_args(model: ModelConfig) -> argparse.Namespace:
    """What the released code reads from a checkpoint's `args` to sample."""
    values = {name: (getattr(model, field), negated) for name, (field, negated) in _SWITCHES.items()}
    return argparse.Namespace(
        **{name: not value if negated else value for name, (value, negated) in values.items()},
        block_size=model.block_tokens,
        image_size=8 * model.latent_size,
        model_config_path="./src/configs/model/madformer.json",
        patch_size=1,
        pre_downsample_block_size=model.block_size**2,
        spatial_len=model.ar_length * model.block_tokens,
        vae_latent_size=model.latent_channels,
    )


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if source.is_dir():
        remedy = "a run, which needs no import; copy its folder" if is_run(source) else "a folder; name the file in it"
        raise InputError(f"{source}: {remedy}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or source.suffix in (*_RELEASED, _SAFETENSORS):
        raise InputError(f"{source}: no such file")
    try:
        return find_file(str(source), HUB_FILE)
    except InputError as error:
        raise InputError(
            f"{source}: cannot be had: {error}; download its {HUB_FILE} elsewhere, and import that file"
        ) from error


def _read(file: Path, weights: Weights) -> Mapping[str, Any]:
    """A file's content: a state dict, or a checkpoint with a state dict as an entry."""
    if file.suffix == _SAFETENSORS:
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: not the weights of a model: torn, or no safetensors file: {error}") from error
    if flaw := find_flaw(file):
        raise InputError(f"{file}: torn, or no zip archive, as torch.save writes them: {flaw}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # the only class that is unpickled
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            remedy = "torch.save its weights alone, and import those"
            raise InputError(
                f"{file}: holds more than tensors, numbers and a Namespace, which is not read: {remedy}"
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{file}: no checkpoint that torch reads: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: no released checkpoint: it holds a {type(content).__name__}, not {weights}")
    if not (weights in content or _has_boi(content)):
        other = "model" if weights == "ema" else "ema"
        remedy = f"say --weights {other}" if other in content else f"torch.save the weights as its {weights}"
        held = ", ".join(str(name) for name in itertools.islice(content, 3)) or "nothing"
        raise InputError(f"{file}: no released checkpoint: it must hold {weights}, it holds {held}: {remedy}")
    return content


def _has_boi(content: Mapping[str, Any]) -> bool:
    """Whether it is a released state dict, perhaps with a prefix before its names."""
    return any(str(name).endswith(_BOI) for name in content)


def _convert(
    file: Path, content: Mapping[str, Any], weights: Weights, overrides: Sequence[str]
) -> tuple[dict[str, Tensor], ExperimentConfig]:
    """A released state dict by our names, and an experiment around its model."""
    args = content.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, Mapping):
        raise InputError(f"{file}: no released checkpoint: its args are a {type(args).__name__}")
    known = {name: (args[name], *entry) for name, entry in _SWITCHES.items() if name in args}
    switches = {field: not value if negated and isinstance(value, bool) else value for value, field, negated in known.values()}
    switches |= _overridden_switches(overrides)
    if missing := [(name, field) for name, (field, _) in _SWITCHES.items() if field not in switches]:
        remedy = f"say {' '.join(f'model.{field}=...' for _, field in missing)}"
        raise InputError(f"{file}: its args lack {', '.join(name for name, _ in missing)}: {remedy}")
    state = content.get(weights, content)
    try:
        model = released_config(state, **switches)
        return rename_released(state, model), _experiment(model)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def _overridden_switches(overrides: Sequence[str]) -> dict[str, Any]:
    fields, switches = {field for field, _ in _SWITCHES.values()}, {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if equals and name.removeprefix("model.") in fields and name.startswith("model."):
            try:
                switches[name.removeprefix("model.")] = read_value(value)
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                raise ConfigError(f"override {override}: {' '.join(str(error).split())}") from error
    return switches


def _check_exported(file: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ExperimentConfig]:
    if not file.with_suffix(".yaml").is_file():
        raise InputError(f"{file}: no released state dict, which has {_BOI}, and no export, which has a .yaml of its name")
    if odd := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise InputError(f"{file}: {odd[0]} holds no floating-point numbers")
    config = load_experiment(file.with_suffix(".yaml"))
    _require_shapes(state, config.model, f"{file}: not the weights of {file.with_suffix('.yaml')}")
    return dict(state), config


def _require_shapes(state: Mapping[str, Tensor], model: ModelConfig, where: str) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in MADFormer(model).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(f"{where}: {name} has shape {found.get(name)}, the configuration's model {expected.get(name)}")


def _adopt(config: ExperimentConfig, run: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """The configuration of the imported run; a model of the size of digits gets the digits as its data."""
    model = config.model
    if config.data.source is None and (model.latent_channels, model.latent_size) == (1, 8):
        data = replace(config.data, source=DIGITS, codec=PIXELS)
        evaluation = replace(config.evaluation, feature_networks=("digits",))
        config = replace(config, data=data, evaluation=evaluation)
    require_no_move(overrides)
    config = replace(config, name=named_folder(run).name, output_dir=str(named_folder(run).parent))
    return build(ExperimentConfig, OmegaConf.structured(config), overrides, f"{run}: ")


def _experiment(model: ModelConfig) -> ExperimentConfig:
    """An experiment for a released model, with the losses and data of its branch and the paper's NFE budgets."""
    loss = LossConfig(lambda_image=1.0, lambda_text=0.0, lambda_hidden=0.1 if model.use_condition else 0.0)
    budgets = tuple(cost.nfe(model, steps) for steps in _PAPER_STEPS)
    if model.text is None:
        return ExperimentConfig(model=model, loss=loss, evaluation=EvaluationConfig(nfe=budgets))
    evaluation = EvaluationConfig(nfe=budgets, num_samples=50_000)
    return ExperimentConfig(model=model, loss=loss, data=CLASS_NUMBERS, evaluation=evaluation)
