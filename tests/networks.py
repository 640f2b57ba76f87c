"""Feature networks that cannot be had."""

import re

import pytest

from madformer.errors import ConfigError
from madformer.evaluation.feature_networks import build_feature_network


def complaint(name: str) -> str:
    """What is said of a network that cannot be had: one line, after the field and the name."""
    field = f"evaluation.feature_networks: {name!r}: "
    with pytest.raises(ConfigError, match=rf"\A{re.escape(field)}[^\n]*\Z") as error:
        build_feature_network(name)
    return str(error.value).removeprefix(field)
