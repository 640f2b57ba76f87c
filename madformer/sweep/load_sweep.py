"""From a sweep's YAML file and the command line to a `Sweep`; what is wrong is said in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from madformer.config import ExperimentConfig, load_experiment
from madformer.config.loading import all_keys, nearest, read_mapping
from madformer.config.validation import require
from madformer.errors import ConfigError
from madformer.sweep.cells import sweep_cells
from madformer.sweep.spec import InferenceAxes, Search, Slurm, Sweep, read_value, require_known

_SECTIONS = {"evaluate": InferenceAxes, "search": Search, "slurm": Slurm}
_MAPPINGS = ("overrides", "grid", "zip", "variants")
_LISTS = {
    "seeds": "integers",
    "exclude": "mappings",
    "evaluate.nfe": "integers",
    "evaluate.steps": "integers",
    "evaluate.samplers": "names",
    "evaluate.guidance": "numbers",
    "evaluate.seeds": "integers",
    "search.nfe": "integers",
    "search.objectives": "names",
    "slurm.setup": "shell lines",
}
"""Keys that hold a list -> of what."""


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep from YAML.

    Args:
        path: the YAML file.
        overrides: `key=value` strings: the sweep's own keys (`workers=2`, `grid.model.diffusion_depth=[2,4]`), or fields of
            the experiment for every cell (`trainer.max_steps=50`).

    Raises:
        FileNotFoundError: there is no such file, or not the experiment's.
        ConfigError: broken YAML, an unknown key (the message names the nearest real one), a value that is not legal, or a cell
            that is not (the message names it).
    """
    path = Path(path)
    loaded = read_mapping(path, "sweep", ", ".join(_sweep_keys()))
    try:
        given = _resolved(loaded)
        _check_keys(given)
        for override in overrides:
            _apply(given, override)
        sweep = _build({"name": path.stem, **given})
        if sweep.output_dir is None:
            sweep = replace(sweep, output_dir=load_experiment(sweep.experiment).output_dir)
        sweep_cells(sweep)
        return sweep
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _resolved(loaded: Any) -> dict[str, Any]:
    """Plain values, with variables of the environment in place of `${oc.env:NAME}`."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _build(given: dict[str, Any]) -> Sweep:
    try:
        return cast(Sweep, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sweep), given)))
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value")
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'a list entry'}: {what}") from error


def _sweep_keys() -> list[str]:
    return [item.name for item in fields(Sweep)]


def _check_keys(given: Mapping[str, Any]) -> None:
    """Refuse unknown keys of the file, and plain values where a mapping or a list belongs."""
    for key, value in given.items():
        require(key not in all_keys(ExperimentConfig) or key in _sweep_keys(), key, value, "belongs under overrides")
        if key not in _sweep_keys():
            raise ConfigError(f"unknown key {key}; the nearest is {nearest(key, _sweep_keys())}")
        if key in _MAPPINGS or (key in _SECTIONS and value is not None):
            require(isinstance(value, Mapping), key, value, "must be a mapping of fields to values")
    for section, kind in _SECTIONS.items():
        known = [item.name for item in fields(kind)]
        for key in given.get(section) or {}:
            if key not in known:
                raise ConfigError(f"unknown key {section}.{key}; the nearest is {section}.{nearest(key, known)}")
    for key, of in _LISTS.items():
        section, _, name = key.rpartition(".")
        value = ((given.get(section) or {}) if section else given).get(name)
        require(value is None or isinstance(value, list), key, value, f"must be a list of {of}")


def _apply(given: dict[str, Any], override: str) -> None:
    """Set one key from the command line: the sweep's own, or else a field of the experiment for every cell."""
    require("=" in override, "override", override, "must have the form key=value")
    key, text = override.split("=", 1)
    head, _, rest = key.partition(".")
    try:
        value = read_value(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from error
    if head not in _sweep_keys():
        require_known(key, "override", also=_sweep_keys())
        given["overrides"] = {**given.get("overrides", {}), key: value}
    elif rest:
        require(head in (*_MAPPINGS, *_SECTIONS), "override", override, f"{head} has no fields")
        given[head] = _with(given.get(head) or {}, head, rest, value)
    else:
        given[head] = value
    _check_keys(given)


def _with(section: Mapping[str, Any], head: str, key: str, value: Any) -> dict[str, Any]:
    """A section with one more key; of variants, and of a search's space, those of a field have dots themselves."""
    name, _, rest = key.partition(".")
    if rest and (head == "variants" or (head, name) == ("search", "space")):
        return {**section, name: {**section.get(name, {}), rest: value}}
    return {**section, key: value}
