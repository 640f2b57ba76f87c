"""A run's own configuration: hashed, written once beside its checkpoints, read back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from madformer import __version__
from madformer.config.experiment import ExperimentConfig
from madformer.config.loading import FROZEN, load_experiment
from madformer.errors import InputError
from madformer.runs.files import write_text

_SAME_WEIGHTS: dict[str, frozenset[str]] = {
    "model": frozenset({"attention_backend", "activation_checkpointing", "compile"}),
    "data": frozenset({"batch_size_per_device", "codec_batch_size", "max_skipped", "workers"}),
    "trainer": frozenset(
        {
            "accelerator",
            "devices",
            "num_nodes",
            "strategy",
            "deterministic",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        }
    ),
}
"""Fields of a section that change how a run is computed or watched, not what it learns."""

_NO_WEIGHTS = frozenset({"name", "output_dir", "evaluation"})

_HASH = re.compile(r"^  config_hash: ['\"]?([0-9a-f]{16})['\"]?$", re.MULTILINE)
_HEAD_CHARACTERS = 200
"""The hash stands at the beginning of the file."""


def trained_fields(config: ExperimentConfig) -> dict[str, Any]:
    """Everything that changes the trained weights, as `section.field` -> value."""
    nested = {key: value for key, value in to_container(config).items() if key not in _NO_WEIGHTS}
    for section, left_out in _SAME_WEIGHTS.items():
        nested[section] = {key: value for key, value in nested[section].items() if key not in left_out}
    # Latents may move; a checkpoint remembers which ones they were.
    nested["data"]["latents"] = config.data.latents is not None
    return _flat(nested)


def config_hash(config: ExperimentConfig) -> str:
    """Sixteen hexadecimal digits over `trained_fields`: equal hashes, equal weights."""
    canonical = json.dumps(trained_fields(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def config_path(run: Path) -> Path:
    """Where a run's configuration lies."""
    return run / "config.yaml"


def write_config(config: ExperimentConfig, run: Path) -> None:
    """Write a run's configuration, with the code version and the hash."""
    write_text(config_path(run), to_yaml(config))


def to_yaml(config: ExperimentConfig) -> str:
    """All fields, with the code version and the hash; `load_experiment` reads it."""
    made_by = {FROZEN: {"madformer": __version__, "config_hash": config_hash(config)}}
    return OmegaConf.to_yaml(OmegaConf.create({**made_by, **to_container(config)}))


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A run's configuration under its present path, with overrides that do not change its weights.

    Raises:
        InputError: the folder is no run, or an override would change the weights.
    """
    path = config_path(Path(run))
    if not path.is_file():
        raise InputError(f"{run}: not a run: it has no {path.name}")
    config = load_experiment(path, overrides)
    require_same_weights(load_experiment(path), config, str(run))
    folder = path.parent.resolve()
    return replace(config, name=folder.name, output_dir=str(path.parent.parent if path.parent.name else folder.parent))


def require_same_weights(trained: ExperimentConfig, asked: ExperimentConfig, run: str) -> None:
    """Refuse to go on with a run under a configuration that would have trained other weights.

    Raises:
        InputError: the first field that differs, with both values.
    """
    before, now = trained_fields(trained), trained_fields(asked)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            difference = f"{name} = {before.get(name)!r} there, {now.get(name)!r} asked for"
            raise InputError(f"{run} is a run of another experiment: {difference}; give another name, or delete it")


def frozen_hash(run: Path) -> str | None:
    """The hash that a run's configuration was frozen with, without reading the rest of it; None: there is none."""
    try:
        with config_path(run).open(encoding="utf-8") as file:
            found = _HASH.search(file.read(_HEAD_CHARACTERS))
    except FileNotFoundError:
        return None
    return found[1] if found else None


def to_container(config: ExperimentConfig) -> dict[str, Any]:
    """All fields, nested by section, as plain values."""
    return {name: _plain(getattr(config, name)) for name in _names(ExperimentConfig)}


def _plain(value: Any) -> Any:
    """A section as a mapping, tuples as lists; unlike `dataclasses.asdict` it copies no number, a sweep has many."""
    if names := _names(cast(Hashable, type(value))):
        return {name: _plain(getattr(value, name)) for name in names}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """Fields of a section; none of what is no section."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
