"""Load a `Sweep` from its YAML file and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from madformer.config import ExperimentConfig, load_experiment
from madformer.config.loading import (
    BASE,
    all_keys,
    as_typed,
    build,
    check_keys,
    defaults,
    is_utf8,
    merge,
    read_value,
    read_yaml,
    require_no_secrets_in,
    resolve,
)
from madformer.config.validation import require, require_no_secrets
from madformer.errors import ConfigError
from madformer.sweep.cells import sweep_cells
from madformer.sweep.spec import Sweep, require_known

_KEYS = [field.name for field in dataclass_fields(Sweep)]
_SECTIONS_OF_EXPERIMENTS = {field.name for field in dataclass_fields(ExperimentConfig)} - {*_KEYS}
_SECTIONS = ("overrides", "grid", "zip", "variants", "evaluate", "search", "decide", "slurm")
_NESTED = (("search", "space"), ("decide", "seeds"), ("decide", "contrasts"))
"""Keys whose fields can be set one by one."""


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
    content = read_yaml(path, "sweep", ", ".join(_KEYS))
    require_no_secrets_in(content, f"{path}: ")
    try:
        fields = resolve(content)
        if "experiment" not in fields and (sections := fields.keys() & {BASE, *_SECTIONS_OF_EXPERIMENTS}):
            raise ConfigError(f"an experiment ({min(sections)}: ...), no sweep; madformer train {path}")
        for key, value in fields.items():
            require(key in _KEYS or key not in all_keys(ExperimentConfig), key, value, "belongs under overrides")
        for override in overrides:
            check_keys(fields, Sweep)
            _apply(fields, override)
            require_no_secrets("override", override)
        fields.setdefault("name", path.stem)
        sweep = build(Sweep, merge(defaults(Sweep), DictConfig(fields)))
        if sweep.output_dir is None:
            sweep = replace(sweep, output_dir=load_experiment(sweep.experiment).output_dir)
        sweep_cells(sweep)
        if sweep.decide is not None:
            from madformer.sweep.adaptive import contrasts_of  # its imports, costs and progress, take a while

            contrasts_of(sweep)
        return sweep
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _apply(fields: dict[str, Any], override: str) -> None:
    """Set one key from the command line: the sweep's own, or else a field of the experiment for every cell."""
    require("=" in override, "override", override, "must have the form key=value")
    require(is_utf8(override), "override", override, "must be UTF-8")
    head = override.split("=", 1)[0].partition(".")[0]
    key, text = as_typed(override, Sweep if head in _KEYS else ExperimentConfig).split("=", 1)
    head, _, rest = key.partition(".")
    try:
        value = read_value(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from error
    if head not in _KEYS:
        require_known(key, "override", also=_KEYS)
        fields["overrides"] = {**fields.get("overrides", {}), key: value}
    elif rest:
        require(head in _SECTIONS, "override", override, f"{head} has no fields")
        fields[head] = _with(fields.get(head) or {}, head, rest, value)
    else:
        fields[head] = value


def _with(section: Mapping[str, Any], head: str, key: str, value: Any) -> dict[str, Any]:
    """A section with one more key; some sections have sections, with keys that have dots themselves."""
    name, _, rest = key.partition(".")
    if rest and (head == "variants" or (head, name) in _NESTED):
        return {**section, name: {**section.get(name, {}), rest: value}}
    return {**section, key: value}
