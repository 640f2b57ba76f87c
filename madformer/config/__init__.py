"""The configuration of an experiment: its dataclasses, their rules, and loading from YAML.

It imports no torch, so a mistake in a YAML file is reported at once. A broken rule raises `ConfigError` with the field, its
value and the legal values. The rules are in `__post_init__`, so they hold for YAML and for construction in Python.
"""

from __future__ import annotations

from madformer.config.data import DataConfig
from madformer.config.evaluation import EvaluationConfig
from madformer.config.experiment import DiffusionConfig, ExperimentConfig, LossConfig, budget_flaw, check_losses, wanted_outputs
from madformer.config.identity import (
    config_hash,
    load_run,
    read_config_hash,
    require_same_run,
    trained_fields,
    write_config,
)
from madformer.config.loading import load_experiment
from madformer.config.model import MIN_FLEX_HEAD_WIDTH, ModelConfig, TextConfig, UNetConfig
from madformer.config.training import OptimizerConfig, TrainerConfig

__all__ = [
    "MIN_FLEX_HEAD_WIDTH",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TextConfig",
    "TrainerConfig",
    "UNetConfig",
    "budget_flaw",
    "check_losses",
    "config_hash",
    "load_experiment",
    "load_run",
    "read_config_hash",
    "require_same_run",
    "trained_fields",
    "wanted_outputs",
    "write_config",
]
