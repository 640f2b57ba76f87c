"""A feature network of one's own."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from madformer.config.rules import InputError, is_integer
from madformer.evaluation.features.network import FeatureNetwork, make_label
from madformer.fingerprint import weights_sha256
from madformer.importing import build_own, modules_of


class _Own(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        self.weights = modules_of(own)

    def forward(self, images_BCYX: Tensor) -> Any:
        return self.own(images_BCYX.float().clamp(-1, 1))


def build_own_network(name: str) -> FeatureNetwork:
    """The class that `module.path:Class` or `file.py:Class` names, built without arguments; an nn.Module or not.

    It is called with images [B, C, Y, X] float32 in [-1, 1] and gives features [B, d]. Where it has an attribute
    `num_features`, that is d; else it must take RGB images of 256 x 256, which are tried. Its SHA-256 is of the weights and
    of the file that the class is in.

    Raises:
        InputError: it cannot be imported or built, or is no feature network.
    """
    place, _, kind = name.rpartition(":")
    own = build_own(place, kind)
    if not callable(own):
        raise InputError(f"{kind} cannot be called: it needs forward or __call__")
    width = getattr(own, "num_features", None)
    if width is not None and not (is_integer(width) and width >= 1):
        raise InputError(f"{kind}.num_features must be an integer of at least 1, not {width!r}")
    module = _Own(own)
    parts = (kind, _source_sha256(type(own)), weights_sha256(module.weights))
    sha256 = hashlib.sha256(repr(parts).encode()).hexdigest()
    return FeatureNetwork(name, make_label("own", kind), module, sha256, width)


def _source_sha256(kind: type) -> str:
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
