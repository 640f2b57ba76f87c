"""From YAML and overrides to a configuration; what is wrong is said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from madformer.config.experiment import ExperimentConfig
from madformer.config.validation import require
from madformer.errors import ConfigError

FROZEN = "frozen"
"""Key of a run's configuration that says what froze it; no part of the experiment."""

BASE = "base"
"""Key of an experiment's file that names another one, by a path from its own folder, which it only changes."""


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML.

    Args:
        path: the YAML file; it holds only what differs from the defaults, or from the experiment that it names as its `base`.
        overrides: `section.field=value` strings, applied on top.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: broken YAML, an unknown key (the message names the nearest real one), a value of the wrong type or
            out of its legal range, or fields that contradict each other.
    """
    return _build(_read_experiment(Path(path)), overrides, str(path))


def _read_experiment(path: Path, above: Sequence[Path] = ()) -> DictConfig:
    """A file's fields on top of those of its base, or of the defaults; `above` are the files that are based on it."""
    loaded = read_mapping(path, "experiment", "sections (model, data, trainer, ...) to fields")
    base = _find_base(loaded, path, above)
    below = _defaults() if base is None else _read_experiment(base, [*above, path.resolve()])
    for key in {BASE, FROZEN} & loaded.keys():
        del loaded[key]
    return _merge(below, loaded, str(path))


def _find_base(loaded: DictConfig, path: Path, above: Sequence[Path]) -> Path | None:
    """The file that a file only changes; None: it changes the defaults."""
    remedy = "must be the path of another experiment's file"
    try:
        base = OmegaConf.select(loaded, BASE, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_mistake(error, str(path))}; {remedy}") from error
    if base is None:
        return None
    require(isinstance(base, str), f"{path}: {BASE}", base, remedy)
    found = path.parent / base
    legal = found.resolve() not in [*above, path.resolve()]
    require(legal, f"{path}: {BASE}", base, "must not be based on this file itself")
    return found


@cache
def _defaults() -> DictConfig:
    return OmegaConf.structured(ExperimentConfig)


def read_mapping(path: Path, kind: str, holds: str) -> DictConfig:
    """A YAML file that maps keys to values; `kind` of file and what it `holds` are for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: broken YAML or a broken interpolation, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind} file")
    try:
        loaded: object = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise _mistake(error, str(path)) from error
    except OSError as error:
        if error.errno is not None:  # the system's, not OmegaConf's own, which is of a bare number
            raise
        loaded = None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of {holds}")
    return loaded


def build_experiment(fields: DictConfig, overrides: Sequence[str], where: str) -> ExperimentConfig:
    """An experiment of its fields, nested by section, and overrides on top; `where` they are from is said in errors.

    Raises:
        ConfigError: as `load_experiment`.
    """
    return _build(_merge(_defaults(), fields, where), overrides, where)


def _build(below: DictConfig, overrides: Sequence[str], where: str) -> ExperimentConfig:
    """An experiment of all its fields, and overrides on top."""
    for override in overrides:
        require("=" in override, "override", override, "must have the form section.field=value")
    try:
        typed = OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {list(overrides)}: {' '.join(str(error).split())}") from error
    merged = _merge(below, typed, "override")
    try:
        return cast(ExperimentConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise _mistake(error, where) from error


def _merge(below: DictConfig, fields: DictConfig, where: str) -> DictConfig:
    """Fields on top of others, each file by itself: a mistake is that of the file where it stands."""
    _check_keys(OmegaConf.to_container(fields), ExperimentConfig, where)
    try:
        return cast(DictConfig, OmegaConf.merge(below, fields))
    except OmegaConfBaseException as error:
        raise _mistake(error, where) from error


def _mistake(error: OmegaConfBaseException, where: str) -> ConfigError:
    """What OmegaConf refuses, in one line."""
    field = getattr(error, "full_key", None) or "a list's entry"  # the only place that OmegaConf does not name
    what = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value")
    return ConfigError(f"{where}: {field}: {what}")


def _check_keys(given: Any, schema: type, where: str, prefix: str = "") -> None:
    """Refuse unknown keys, naming the nearest real one, and plain values where a section belongs."""
    hints = get_type_hints(schema)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} = {given!r}: must be a mapping of its fields ({', '.join(hints)})")
    for key, value in given.items():
        if key not in hints:
            near = nearest(f"{prefix}{key}", list(all_keys(ExperimentConfig)))
            raise ConfigError(f"{where}: unknown key {prefix}{key}; the nearest is {near}")
        choices = (hints[key], *get_args(hints[key]))
        for section in choices:
            if is_dataclass(section) and not (value is None and type(None) in choices):
                _check_keys(value, cast(type, section), where, f"{prefix}{key}.")


def nearest(key: str, known: Sequence[str]) -> str:
    """What was probably meant."""
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration's dataclass, `section.field` and the sections too."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        for section in (hint, *get_args(hint)):
            if is_dataclass(section):
                yield from all_keys(cast(type, section), f"{prefix}{name}.")
