"""AdamW over two groups of parameters, and its warm-up-stable-decay schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from madformer.config import OptimizerConfig
from madformer.model import MADFormer


def build_optimizer(model: MADFormer, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; norms, biases and embeddings (BOI block included) do not decay."""
    groups = parameter_groups(model)
    settings: list[dict[str, Any]] = [
        {"params": groups["decayed"], "weight_decay": config.weight_decay},
        {"params": groups["kept"], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(settings, lr=config.lr, betas=(beta1, beta2))


def parameter_groups(model: MADFormer) -> dict[str, list[nn.Parameter]]:
    """Trained parameters with (`decayed`) and without (`kept`) weight decay."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} | {model.boi_SD}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "kept": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups["kept" if parameter.ndim < 2 or parameter in embeddings else "decayed"].append(parameter)
    return groups


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, max_steps: int) -> LambdaLR:
    """The learning rate of every step."""
    return LambdaLR(optimizer, lambda step: wsd_factor(step, config, max_steps))


def wsd_factor(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """What the learning rate is multiplied with at a step (0-based): linear warm-up, 1, then 0.5 ** (halvings * progress).

    As in the released code; transformers' schedule of this name has no exponential decay.
    """
    warmup, decay = config.warmup_fraction * max_steps, config.decay_fraction * max_steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    if step > max_steps - decay:
        return 0.5 ** (config.decay_halvings * (step - max_steps + decay) / decay)
    return 1.0
