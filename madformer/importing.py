"""Custom classes: import and build a user's class by name, and explain its errors."""

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


def build_custom(location: str, class_name: str) -> Any:
    """An object of a custom class, built without arguments.

    Args:
        location: what to import: a module (`package.module`), or a file (`folder/file.py`).
        class_name: name of the class in it.

    Raises:
        InputError: there is no such module, file or class, or it cannot be imported or built; the reason alone.
    """
    if location.endswith(".py") and not Path(location).is_file():
        raise InputError(f"no such file: {location}")
    try:
        module = _import_file(Path(location)) if location.endswith(".py") else importlib.import_module(location)
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{location} cannot be imported: {describe(error)}") from error
    custom = getattr(module, class_name, None)
    if not isinstance(custom, type):
        raise InputError(f"{location} has no class {class_name}")
    try:
        return custom()
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{class_name}() fails: {describe(error)}") from error


def modules_of(instance: object) -> nn.Module:
    """All modules in an object that need not be one itself."""
    if isinstance(instance, nn.Module):
        return instance
    return nn.ModuleList(part for part in getattr(instance, "__dict__", {}).values() if isinstance(part, nn.Module))


def describe(error: BaseException) -> str:
    """An exception's type and what it says in its first line."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or else its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def _import_file(path: Path) -> ModuleType:
    name = f"_custom_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
