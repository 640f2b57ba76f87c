"""What an experiment is: dataclasses, loading and rules.

Every other module reads these and this one imports none of them, nor torch: a mistake in a YAML file is reported at once.
A rule that is broken raises `ConfigError` with the field, its value and the legal values; construction in Python and
loading from YAML go through the same rules, because they live in `__post_init__`.
"""

from __future__ import annotations

from madformer.config.data import DataConfig
from madformer.config.evaluation import EvaluationConfig
from madformer.config.experiment import DiffusionConfig, ExperimentConfig, LossConfig, budget_flaw, check_losses, wanted_outputs
from madformer.config.identity import (
    config_hash,
    load_run,
    read_config_hash,
    require_same_weights,
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
    "require_same_weights",
    "trained_fields",
    "wanted_outputs",
    "write_config",
]
