"""From YAML and overrides to a configuration; what is wrong is said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from madformer.config.experiment import ExperimentConfig
from madformer.config.rules import ConfigError, require

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
    return build_experiment(_read_experiment(Path(path)), overrides, str(path))


def _read_experiment(path: Path, above: Sequence[Path] = ()) -> DictConfig:
    """The fields of a file on top of those of its base; `above` are the files that are based on it."""
    loaded = read_mapping(path, "experiment", "sections (model, data, trainer, ...) to fields")
    base = loaded.pop(BASE, None)
    if above or base is not None:  # a mistake is this file's, not that of the one at the end
        _check_keys(OmegaConf.to_container(loaded), ExperimentConfig, str(path))
    if base is None:
        return loaded
    require(isinstance(base, str), f"{path}: {BASE}", base, "must be the path of another experiment's file")
    chain = [*above, path.resolve()]
    require((path.parent / base).resolve() not in chain, f"{path}: {BASE}", base, "must not be based on this file itself")
    return cast(DictConfig, OmegaConf.merge(_read_experiment(path.parent / base, chain), loaded))


def read_mapping(path: Path, kind: str, holds: str) -> DictConfig:
    """A YAML file that maps keys to values; `kind` of file and what it `holds` are for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: broken YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind} file")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of {holds}")
    return loaded


def build_experiment(fields: DictConfig, overrides: Sequence[str], where: str) -> ExperimentConfig:
    """An experiment of its fields, nested by section, and overrides on top; `where` they are from is said in errors.

    Raises:
        ConfigError: as `load_experiment`.
    """
    fields = OmegaConf.masked_copy(fields, [str(key) for key in fields if key != FROZEN])
    _check_keys(OmegaConf.to_container(fields), ExperimentConfig, where)
    for override in overrides:
        require("=" in override, "override", override, "must have the form section.field=value")
    try:
        typed = OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {list(overrides)}: {' '.join(str(error).split())}") from error
    _check_keys(OmegaConf.to_container(typed), ExperimentConfig, "override")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), fields, typed)
        return cast(ExperimentConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "a list's entry"  # the only place that OmegaConf does not name
        what = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value")
        raise ConfigError(f"{where}: {field}: {what}") from error


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
