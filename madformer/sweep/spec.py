"""What a sweep is: a YAML file of a dozen lines, and the cells that it stands for. Needs no torch: mistakes show at once."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from madformer.config import ConfigError, ExperimentConfig, config_hash, load_experiment
from madformer.config.loading import all_keys, read_mapping
from madformer.config.rules import is_integer, require

ALIASES = {"model.diffusion_depth": "d", "model.ar_length": "l", "loss.lambda_hidden": "h"}
"""Short names of axes in the names of cells; another axis is called by the last part of its key."""

_OWN = {
    "seed": "set seeds",
    "name": "cells are named by their axes",
    "output_dir": "set output_dir of the sweep",
    "evaluation.nfe": "set evaluate.nfe",
}
"""Fields of an experiment that a sweep sets itself -> what to do instead."""


@dataclass(frozen=True)
class InferenceAxes:
    """What every trained cell is evaluated at; it never makes a new cell."""

    nfe: tuple[int, ...] | None = None
    """Budgets in layer evaluations per block; null: the experiment's evaluation.nfe."""


@dataclass(frozen=True)
class Sweep:
    """A grid of runs of one experiment."""

    name: str = ""
    """Its runs live in output_dir/name; default: the file's name."""
    experiment: str = ""
    """The experiment's YAML file, relative to the working directory."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Field -> value, for every cell."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Training axes, field -> list of values; a cell is trained for each combination and seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds that every combination is trained with."""
    evaluate: InferenceAxes = field(default_factory=InferenceAxes)
    """Inference axes."""
    workers: int | None = None
    """Trials side by side; null: as many as there are cores for `threads` each."""
    threads: int = 1
    """CPU threads of a trial: a fixed number, so that results do not depend on the machine's."""
    output_dir: str | None = None
    """Folder of sweeps; null: the experiment's."""

    def __post_init__(self) -> None:
        legal = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\n\0")
        require(legal, "name", self.name, "must be the name of a folder")
        require(self.experiment != "", "experiment", self.experiment, "must be the path of an experiment's YAML file")
        require(self.threads >= 1, "threads", self.threads, "must be at least 1")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1")
        legal = len(self.seeds) > 0 and all(is_integer(seed) and seed >= 0 for seed in self.seeds)
        require(legal, "seeds", list(self.seeds), "must be a list of integers of at least 0")
        _require_distinct("seeds", self.seeds)
        if self.evaluate.nfe is not None:
            require(len(self.evaluate.nfe) > 0, "evaluate.nfe", [], "must name at least one budget")
            _require_distinct("evaluate.nfe", self.evaluate.nfe)
        self._check_fields()

    def _check_fields(self) -> None:
        for where, values in (("overrides", self.overrides), ("grid", self.grid)):
            for key, value in values.items():
                _require_known(key, where)
                if key in _OWN and not (key == "evaluation.nfe" and where == "overrides" and self.evaluate.nfe is None):
                    raise ConfigError(f"{where}.{key} = {value!r}: {_OWN[key]}")
        for key, values in self.grid.items():
            remedy = "inference never makes a new cell: set it in overrides, or set evaluate.nfe"
            require(not key.startswith("evaluation"), f"grid.{key}", values, remedy)
            legal = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
            require(legal, f"grid.{key}", values, "must be a list of values, as in model.diffusion_depth: [2, 4, 8]")
            _require_distinct(f"grid.{key}", values)
            if key in self.overrides:
                raise ConfigError(f"overrides.{key} = {self.overrides[key]!r}: the grid varies it; set grid.{key}")

    @property
    def folder(self) -> Path:
        """Where its runs and its study live."""
        assert self.output_dir is not None, "load_sweep resolves it"
        return Path(self.output_dir) / self.name

    @property
    def worker_count(self) -> int:
        """Trials side by side, `workers` resolved."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers if self.workers is not None else max(1, cores // self.threads)

    def cells(self) -> list[Cell]:
        """All cells, the first axis and the seed varying slowest and fastest.

        Raises:
            FileNotFoundError: no such experiment file.
            ConfigError: a cell's configuration is not legal (the message names the cell), or two cells would be the same run.
        """
        return list(self._cells)

    @cached_property
    def _cells(self) -> tuple[Cell, ...]:
        axes = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        cells = tuple(self._cell(point, seed) for point in axes for seed in self.seeds)
        require_one_run_each(cells)
        return cells

    def _cell(self, axes: dict[str, Any], seed: int) -> Cell:
        name = "-".join([*(_label(key, value) for key, value in axes.items()), f"s{seed}"])
        given = {**self.overrides, **axes, "seed": seed, "name": name}
        if self.output_dir is not None:
            given["output_dir"] = str(self.folder)
        if self.evaluate.nfe is not None:
            given["evaluation.nfe"] = list(self.evaluate.nfe)
        overrides = tuple(f"{key}={_as_text(value)}" for key, value in given.items())
        try:
            config = load_experiment(self.experiment, overrides)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from error
        return Cell(name, self.experiment, overrides, axes, seed, config, config_hash(config))


@dataclass(frozen=True)
class Cell:
    """One combination of the training axes with one seed: one run, and its evaluations."""

    name: str
    """Readable, such as d7-l16-s0."""
    experiment: str
    """The experiment's YAML file."""
    overrides: tuple[str, ...]
    """What makes it of the experiment, as on the command line."""
    axes: dict[str, Any]
    """Field -> value, of the training axes."""
    seed: int
    config: ExperimentConfig
    config_hash: str

    @property
    def run(self) -> Path:
        """Where it lives."""
        return self.config.run_dir

    @property
    def budgets(self) -> tuple[int, ...]:
        """NFE budgets that it is evaluated at."""
        return self.config.evaluation.nfe

    @property
    def max_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.trainer.max_steps


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
    given = cast(dict[str, Any], OmegaConf.to_container(loaded))
    try:
        _check_keys(given)
        for override in overrides:
            _apply(given, override)
        sweep = _build({"name": path.stem, **given})
        if sweep.output_dir is None:
            first = sweep._cell({key: values[0] for key, values in sweep.grid.items()}, sweep.seeds[0])
            sweep = replace(sweep, output_dir=first.config.output_dir)
        sweep.cells()
        return sweep
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _build(given: dict[str, Any]) -> Sweep:
    try:
        return cast(Sweep, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sweep), given)))
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "the value")
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'a list entry'}: {what}") from error


def _sweep_keys() -> list[str]:
    return [item.name for item in fields(Sweep)]


def _check_keys(given: Mapping[str, Any]) -> None:
    """Refuse unknown keys of the file, and plain values where a mapping belongs."""
    for key, value in given.items():
        require(key not in all_keys(ExperimentConfig) or key in _sweep_keys(), key, value, "belongs under overrides")
        if key not in _sweep_keys():
            raise ConfigError(f"unknown key {key}; the nearest is {_nearest(key, _sweep_keys())}")
        if key in ("overrides", "grid", "evaluate"):
            require(isinstance(value, Mapping), key, value, "must be a mapping of fields to values")
    for key in given.get("evaluate", {}):
        if key not in (known := [item.name for item in fields(InferenceAxes)]):
            raise ConfigError(f"unknown key evaluate.{key}; the nearest is evaluate.{_nearest(key, known)}")
    for key, value in (("seeds", given.get("seeds", [])), ("evaluate.nfe", given.get("evaluate", {}).get("nfe") or [])):
        require(isinstance(value, list), key, value, "must be a list of integers")


def _apply(given: dict[str, Any], override: str) -> None:
    """Set one key from the command line: the sweep's own, or else a field of the experiment for every cell."""
    require("=" in override, "override", override, "must have the form key=value")
    key, text = override.split("=", 1)
    head, _, rest = key.partition(".")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from error
    if head not in _sweep_keys():
        _require_known(key, "override", also=_sweep_keys())
        given["overrides"] = {**given.get("overrides", {}), key: value}
    elif rest:
        require(head in ("overrides", "grid", "evaluate"), "override", override, f"{head} has no fields")
        given[head] = {**given.get(head, {}), rest: value}
    else:
        given[head] = value
    _check_keys(given)


def _require_known(key: str, where: str, also: Sequence[str] = ()) -> None:
    known = list(all_keys(ExperimentConfig))
    if key not in known:
        raise ConfigError(f"{where}: unknown key {key}; the nearest is {_nearest(key, [*also, *known])}")


def _nearest(key: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _require_distinct(name: str, values: Sequence[Any]) -> None:
    texts = [_as_text(value) for value in values]
    require(len(set(texts)) == len(texts), name, list(values), "a value occurs twice")


def require_one_run_each(cells: Sequence[Cell]) -> None:
    """Refuse two cells that would be the same run, or live in the same folder.

    Raises:
        ConfigError: such cells, both named.
    """
    for one, other in itertools.combinations(cells, 2):
        if one.config_hash == other.config_hash:
            raise ConfigError(f"cells {one.name} and {other.name} train the same weights: vary a field that is trained with")
        if one.name == other.name:
            raise ConfigError(f"cells {one.axes} and {other.axes} would both be named {one.name}")


def _label(key: str, value: Any) -> str:
    """An axis in a cell's name: d7, width64, channels16x32."""
    words = "x".join(_words(value))
    return ALIASES.get(key, key.rpartition(".")[2]) + re.sub(r"[^A-Za-z0-9._+-]+", "_", words)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _words(entry)
    else:
        yield value if isinstance(value, str) else _as_text(value)


def _as_text(value: Any) -> str:
    """A value as it is written on the command line, so that it is read back as the same."""
    if isinstance(value, str) and _reads_back(value):
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, separators=(",", ": "))


def _reads_back(text: str) -> bool:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])) == {"value": text}
    except (yaml.YAMLError, OmegaConfBaseException):
        return False
