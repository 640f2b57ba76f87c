"""Code that is not the project's: classes of one's own, named where they are, and what is said of it when it fails."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from madformer.errors import InputError

__all__ = ["build_custom", "describe", "first_line", "modules_of"]


def build_custom(place: str, kind: str) -> Any:
    """An object of a class of one's own, built without arguments.

    Args:
        place: what to import: a module (`package.module`), or a file (`folder/file.py`).
        kind: name of the class in it.

    Raises:
        InputError: there is no such module, file or class, or it cannot be imported or built; the reason alone.
    """
    if place.endswith(".py") and not Path(place).is_file():
        raise InputError(f"no such file: {place}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the user's own code
        raise InputError(f"{place} cannot be imported: {describe(error)}") from error
    own = getattr(module, kind, None)
    if not isinstance(own, type):
        raise InputError(f"{place} has no class {kind}")
    try:
        return own()
    except Exception as error:  # the user's own code
        raise InputError(f"{kind}() fails: {describe(error)}") from error


def modules_of(built: object) -> nn.Module:
    """All modules in an object that need not be one itself."""
    if isinstance(built, nn.Module):
        return built
    return nn.ModuleList(part for part in getattr(built, "__dict__", {}).values() if isinstance(part, nn.Module))


def describe(error: Exception) -> str:
    """An exception's type and what it says in its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an exception says in its first line, or else its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def _import_file(path: Path) -> ModuleType:
    name = f"_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
