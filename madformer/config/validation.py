"""Building blocks of the configuration's dataclasses: `setting` declares a field, `require` and its kin check values."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, field, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints
from unicodedata import category

from madformer.errors import ConfigError, InputError, mask_secrets

T = TypeVar("T")


def setting(
    default: T,
    *,
    new_run: bool | Literal["presence"] = True,
    neutral: object = MISSING,
    path: bool | Literal["as typed"] = False,
) -> T:
    """A dataclass field whose metadata say how it counts in a run's hash. A field with a plain default always counts.

    Args:
        default: the field's default.
        new_run: whether another value makes a new run. False: the field does not change the trained weights. "presence": it
            matters only whether there is a value.
        neutral: a value that is left out of the hash. Give one to a field that you add: existing runs then keep their hashes.
        path: whether `expand_path` applies when it is loaded. "as typed": it applies only when the path is opened; the hash
            keeps the path as typed.
    """
    return field(default=default, metadata={"new_run": new_run, "neutral": neutral, "path": path})


def require(legal: bool, name: str, value: object, remedy: str) -> None:
    """Raise with the field, its value and the remedy unless it is legal."""
    if not legal:
        shown = choice_name(value) if value is None or isinstance(value, bool) else repr(value)
        raise ConfigError(f"{name} = {shown}: {remedy}")


def require_at_least(least: int, section: str, config: object, *names: str) -> None:
    """Require fields to be integers of at least `least`."""
    for name in names:
        value = getattr(config, name)
        require(is_integer(value) and value >= least, f"{section}.{name}", value, f"must be an integer of at least {least}")


def require_types(section: str, config: Any) -> None:
    """Check what OmegaConf checks for YAML and nothing does for plain construction: choices, booleans, sections, lists.

    An integer in a field of floats becomes a float, as OmegaConf makes it, so that the same values have one hash.
    """
    for name, hint in type_hints(cast(Hashable, type(config))).items():
        value, arguments = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal:
            require(value in arguments, f"{section}.{name}", value, f"must be one of {', '.join(map(choice_name, arguments))}")
        elif get_origin(hint) is tuple:
            legal = isinstance(value, Sequence) and all(type(entry) is arguments[0] for entry in value)
            require(legal, f"{section}.{name}", value, f"must be a list of {arguments[0].__name__}")
            object.__setattr__(config, name, tuple(value))
        elif hint is bool or any(is_dataclass(choice) for choice in (hint, *arguments)):
            require(isinstance(value, hint), f"{section}.{name}", value, f"must be of type {getattr(hint, '__name__', hint)}")
        elif float in (hint, *arguments) and is_integer(value):
            object.__setattr__(config, name, float(value))


def choice_name(choice: str | bool | None) -> str:
    """A choice as YAML writes it."""
    if choice is None:
        return "null"
    return str(choice).lower() if isinstance(choice, bool) else choice


@cache
def type_hints(kind: Any) -> dict[str, Any]:
    """`get_type_hints`, evaluated once for each dataclass."""
    return get_type_hints(kind)


def is_integer(value: object) -> bool:
    """Whether it is an integer, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_folder_name(name: str) -> bool:
    """Whether it can be the name of one folder, in any terminal and YAML file: no control characters, at most 255 bytes."""
    legal = name not in ("", ".", "..") and not set(name) & set("/\\")
    return legal and not any(category(letter) in ("Cc", "Cs") for letter in name) and len(name.encode()) <= 255


def expand_path(name: str, path: str) -> str:
    """A path with the user's home folder in place of `~`, and variables of the environment in place of `$NAME`.

    Raises:
        ConfigError: there is no such home folder, or the variable is not set and no such path exists.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 - Path drops the ./ of ./~
    for variable in set(re.findall(r"\$\{?(\w+)", path)) - os.environ.keys():
        require(Path(expanded).exists(), name, path, f"${variable} is not set in the environment")
    require(not expanded.startswith("~"), name, path, f"there is no such home folder; a folder of that name is ./{path}")
    return expanded


def expand_variables(name: str, text: str) -> str:
    """A text with variables of the environment in place of `${oc.env:NAME}` and `$NAME`, for the moment when it is used.

    So a password is in the environment alone, and in no file.

    Raises:
        ConfigError: as `expand_path`.
    """
    return expand_path(name, re.sub(r"\$\{oc\.env:(\w+)\}", r"${\1}", text))


def require_no_secrets(name: str, value: object) -> None:
    """Refuse a password or a token in a URL, also within a list or a mapping.

    Raises:
        ConfigError: the message masks it, and says where it belongs.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            require_no_secrets(f"{name}.{key}" if name else str(key), entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            require_no_secrets(name, entry)
    elif isinstance(value, str):
        remedy = "a configuration is kept in files: put the secret into a variable of the environment, and write $NAME"
        require(mask_secrets(value) == value, name, value, remedy)


def typed_path(text: str | Path) -> Path:
    """A path of the command line. A shell leaves the `~` of --out=~/x alone.

    Raises:
        FileNotFoundError: as `expand_path`, or it is empty, as `"$NAME"` of the shell may be. (Before a `ValueError` click
            would print the usage.)
    """
    try:
        require(str(text) != "", "path", text, "must not be empty")
        return Path(text) if Path(text).exists() else Path(expand_path("path", str(text)))
    except ConfigError as error:
        raise FileNotFoundError(str(error)) from error


def from_json(kind: type[T], content: Mapping[str, Any], path: Path, remedy: str) -> T:
    """A dataclass of a JSON object, with tuples in place of lists, so that what was read equals what was written.

    Raises:
        InputError: a field is missing, unknown or of another type; the message ends with the remedy.
    """
    try:
        built = kind(**{name: _tuple(value) for name, value in content.items()})
    except TypeError as error:
        raise InputError(f"{path}: not what it should hold: {error}; {remedy}") from error
    for name, hint in type_hints(cast(Hashable, kind)).items():
        if not _fits(value := getattr(built, name), hint):
            raise InputError(f"{path}: {name} = {str(value)[:40]!r} is of another type; {remedy}")
    return built


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, with its entries."""
    kinds = get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, kind) for kind in kinds)
    if get_origin(hint) is tuple:
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(_fits(entry, kinds[1]) for entry in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint
