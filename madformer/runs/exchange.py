"""Import and export of weights: checkpoints of the released code, safetensors."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from madformer.config import (
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
from madformer.config.identity import named_folder, require_no_move, to_yaml
from madformer.config.loading import build
from madformer.errors import InputError
from madformer.model import MADFormer, cost
from madformer.model.official import from_released
from madformer.runs.checkpoints import (
    CONFIG_HASH,
    EMA,
    MODEL_PREFIX,
    Weights,
    checkpoint_path,
    load_model,
    newest_intact,
    parse_weights,
    save_checkpoint,
)
from madformer.runs.files import atomic_write, write_text

_SWITCHES = ("clear_clean", "clear_cond", "denoising_mlp", "diff_depth", "ar_len")
"""Keys that a released checkpoint's `args` must hold: the weights do not show these switches."""

_PAPER_STEPS = (19, 49, 99, 199)
"""The paper's budgets 280, 700, 1400, 2800 at D = 14 of 28 (Figure 4)."""


def import_run(source: Path, run: Path, weights: str, overrides: Sequence[str]) -> None:
    """Make a run from a released checkpoint or an exported file.

    Raises:
        InputError: no such file, another format, weights that contradict the switches, or a folder that is in use.
    """
    requested = parse_weights(weights)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run}: exists already; name a new folder")
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if source.suffix == ".safetensors":
        model, config = _read_exported(source)
    else:
        model = _read_released(source, requested)
        config = _experiment(model.config)
    config = _adopt(config, run, overrides)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    checkpoint = {
        "state_dict": {MODEL_PREFIX + name: tensor for name, tensor in state.items()},
        EMA: state,
        "global_step": 0,
        CONFIG_HASH: config_hash(config),
    }
    save_checkpoint(checkpoint, checkpoint_path(run, 0))
    write_config(config, run)
    print(f"{run}: {sum(tensor.numel() for tensor in state.values()):,} parameters of {source}")


def export_run(run: Path, out: Path, weights: str) -> None:
    """Write a run's newest weights as safetensors, and the configuration as a YAML file next to it.

    Raises:
        InputError: no run, no intact checkpoint, or a file name with another ending.
    """
    config = load_run(run)
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: must end in .safetensors")
    checkpoint = newest_intact(run)
    if checkpoint is None:
        raise InputError(f"{run}: no intact checkpoint")
    model = load_model(checkpoint, config, parse_weights(weights))
    with atomic_write(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    write_text(out.with_suffix(".yaml"), to_yaml(config))
    print(f"{out}, {out.with_suffix('.yaml')}: {weights} weights of {checkpoint}")


def _adopt(config: ExperimentConfig, run: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """The configuration of the imported run; a model of the size of digits gets the digits as its data."""
    model = config.model
    if config.data.source is None and (model.latent_channels, model.latent_size, model.text) == (1, 8, None):
        data = replace(config.data, source=DIGITS, codec=PIXELS)
        evaluation = replace(config.evaluation, feature_networks=("digits",))
        config = replace(config, data=data, evaluation=evaluation)
    require_no_move(overrides)
    config = replace(config, name=named_folder(run).name, output_dir=str(named_folder(run).parent))
    return build(ExperimentConfig, OmegaConf.structured(config), overrides, f"{run}: ")


def _experiment(model: ModelConfig) -> ExperimentConfig:
    """An experiment around a released model: losses that it can have, budgets of the paper's numbers of steps."""
    loss = LossConfig() if model.use_condition else LossConfig(lambda_hidden=0)
    budgets = tuple(cost.nfe(model, steps) for steps in _PAPER_STEPS)
    return ExperimentConfig(model=model, loss=loss, evaluation=EvaluationConfig(nfe=budgets))


def _read_released(source: Path, weights: Weights) -> MADFormer:
    with torch.serialization.safe_globals([argparse.Namespace]):  # the one class in it; nothing else is unpickled
        try:
            checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
            raise InputError(f"{source}: no checkpoint that torch reads: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, Mapping) or not {weights, "args"} <= checkpoint.keys():
        raise InputError(f"{source}: no released checkpoint: it must hold {weights} and args")
    args = vars(checkpoint["args"]) if isinstance(checkpoint["args"], argparse.Namespace) else checkpoint["args"]
    if missing := [name for name in _SWITCHES if name not in args]:
        raise InputError(f"{source}: its args lack {', '.join(missing)}")
    try:
        return from_released(
            checkpoint[weights],
            diffusion_depth=args["diff_depth"],
            ar_length=args["ar_len"],
            use_clean_blocks=not args["clear_clean"],
            use_condition=not args["clear_cond"],
            local_denoising=args["denoising_mlp"],
        )
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _read_exported(source: Path) -> tuple[MADFormer, ExperimentConfig]:
    config = load_experiment(source.with_suffix(".yaml"))
    with torch.device("meta"):
        model = MADFormer(config.model)
    try:
        model.load_state_dict(load(source.read_bytes()), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{source}: not the weights of {source.with_suffix('.yaml')}: {str(error).splitlines()[-1]}"
        ) from error
    return model, config
