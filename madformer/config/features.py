"""The names of feature networks."""

from __future__ import annotations

import re

from madformer.config.rules import require

_LEGAL = re.compile(r"digits|inception|(inception|torchscript|hf):.+|.+:[A-Za-z_]\w*")


def check_feature_network_name(name: str) -> None:
    """Refuse what can be no feature network.

    Raises:
        ConfigError: with the legal forms.
    """
    legal = "digits, inception, inception:FILE, torchscript:FILE, hf:MODEL, module.path:Class or file.py:Class"
    require(_LEGAL.fullmatch(name) is not None, "evaluation.feature_networks", name, f"must be {legal}")
