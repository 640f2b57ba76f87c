"""How values and cells are written: on the command line, in the names of folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ALIASES = {"model.diffusion_depth": "d", "model.ar_length": "l", "loss.lambda_hidden": "h", "loss.lambda_clean_tower": "c"}
"""Short names of axes in the names of cells; another axis is called by the last part of its key."""

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.+/-]*")
_RESERVED = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan"))
_UNFIT = re.compile(r"[^A-Za-z0-9._+-]+")


def as_text(value: Any) -> str:
    """A value as it is written on the command line, so that it is read back as the same."""
    if isinstance(value, str):
        return value if _reads_back(value) else json.dumps(value)
    return repr(value) if isinstance(value, float) else json.dumps(value, separators=(",", ": "))


def label(key: str, value: Any) -> str:
    """An axis in a cell's name: d7, width64, channels16x32."""
    return ALIASES.get(key, key.rpartition(".")[2]) + _UNFIT.sub("_", "x".join(_words(value)))


def is_folder_name(name: str) -> bool:
    """Whether a folder can be called so, and a part of a cell's name."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\n\0")


def is_plain_name(name: str) -> bool:
    """Whether it stands in a cell's name as it is."""
    return bool(name) and not _UNFIT.search(name)


def read_value(text: str) -> Any:
    """A value from the command line.

    Raises:
        yaml.YAMLError, OmegaConfBaseException: it is none.
    """
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _words(entry)
    else:
        yield value if isinstance(value, str) else as_text(value)


@cache
def _reads_back(text: str) -> bool:
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return True  # as a thousand names of cells are
    try:
        return read_value(text) == text
    except (yaml.YAMLError, OmegaConfBaseException):
        return False
