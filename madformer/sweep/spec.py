"""The specification of a sweep: the fields of its YAML file, their rules, and values as text. Needs no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from madformer.config import ExperimentConfig, load_experiment
from madformer.config.evaluation import TRIES, SamplerName
from madformer.config.loading import all_keys, as_text, check_text, is_text_field, nearest, require_distinct
from madformer.config.validation import is_folder_name, is_integer, require, setting
from madformer.errors import ConfigError
from madformer.evaluation.measurement import AXES, DISTANCE, METRICS, metric_key
from madformer.sweep.decisions import DEPTH_AXIS, Decide

ALIASES = {"model.diffusion_depth": "d", "model.ar_length": "l", "loss.lambda_hidden": "h", "loss.lambda_clean_tower": "c"}
"""Short names of axes in the names of cells. Other axes have the last part of their key."""

_ILLEGAL_CHARACTERS = re.compile(r"[^A-Za-z0-9._+-]+")

SET_BY_SWEEP = {
    "seed": "set seeds",
    "name": "cells are named by their axes",
    "output_dir": "set output_dir of the sweep",
    "evaluation.nfe": "set evaluate.nfe",
    "trainer.devices": "set devices_per_trial",
    "trainer.threads": "set threads",
    "trainer.num_nodes": "set slurm.nodes_per_trial",
}
"""Fields of an experiment that the sweep sets itself -> the remedy, for the message."""

VARIANT = "variant"
"""The name of the axis of variants. Other axes have the names of their fields."""

COST_OBJECTIVES = ("nfe", "tflops")
"""Objectives of a search that are costs, not metrics."""

_FIELDS = tuple(all_keys(ExperimentConfig))


@dataclass(frozen=True)
class InferenceAxes:
    """How each trained cell is evaluated. It never makes a new cell. An empty axis has the experiment's `evaluation` value."""

    nfe: tuple[int, ...] = ()
    """NFE budgets: layer evaluations per block. A cell skips budgets that its model cannot have."""
    steps: tuple[int, ...] = ()
    """Denoising steps per block, the same for all cells. The budget then depends on the cell's depth."""
    diffusion_depths: tuple[int, ...] = ()
    """Diffusion depths to sample elastic cells at. Other cells have one depth."""
    samplers: tuple[str, ...] = ()
    """Samplers by name."""
    spacings: tuple[str, ...] = ()
    """Spacings of the timesteps."""
    guidance: tuple[float, ...] = ()
    """Scales of classifier-free guidance."""
    guidance_intervals: tuple[str, ...] = ()
    """Intervals of timesteps at which guidance acts."""
    seeds: tuple[int, ...] = ()
    """Sampling seeds."""
    checkpoints: str = "newest"
    """`newest`; or `last5` for the last five and their mean, and the like."""
    tune: bool = False
    """Whether to tune the sampling too (`madformer tune`). All seeds of a design share one choice for each budget."""
    tries: int = TRIES
    """Number of samplings that tuning tries at each budget, the default included."""

    def __post_init__(self) -> None:
        for name in ("nfe", "steps", *(axis.sweep_key for axis in AXES.values())):
            require_distinct(f"evaluate.{name}", getattr(self, name))
        for sampler in self.samplers:
            legal = get_args(SamplerName)
            require(sampler in legal, "evaluate.samplers", sampler, f"must be of {', '.join(legal)}")
        is_newest = not self.tune or self.checkpoints == "newest"
        require(is_newest, "evaluate.checkpoints", self.checkpoints, "tuning measures only the newest one: set it to newest")
        require(self.tries >= 1, "evaluate.tries", self.tries, "must be at least 1")
        legal_name = re.fullmatch(r"newest|last[1-9]\d*", self.checkpoints) is not None
        require(legal_name, "evaluate.checkpoints", self.checkpoints, "must be newest, or last5 and the like")

    @property
    def last(self) -> int:
        """The number of checkpoints that are evaluated."""
        return 1 if self.checkpoints == "newest" else int(self.checkpoints.removeprefix("last"))


@dataclass(frozen=True)
class Search:
    """A search: Optuna chooses the trials, in place of a grid."""

    space: dict[str, Any] = field(default_factory=dict)
    """Field -> list of choices, or a range: {low: 1e-4, high: 1e-2, log: true}, {low: 16, high: 64, step: 16}."""
    nfe: tuple[int, ...] = ()
    """NFE budgets. With several, Optuna gives each trial one of them; a run is trained once for all of them."""
    trials: int = 20
    """Number of trials."""
    objectives: tuple[str, ...] = (DISTANCE,)
    """One or two objectives to minimise: `distance` (that of the first feature network), the name of a distance such as `fid`,
    `nfe`, or `tflops` (per image)."""
    sampler: Literal["tpe", "random", "nsga2", "qmc"] = "tpe"
    """Optuna's sampler."""
    pruner: Literal["none", "median", "halving", "hyperband"] = "none"
    """Optuna's pruner. It ends trials early whose previews have large distances (`evaluation.preview_every`)."""
    seed: int = 0
    """Seed of Optuna's sampler."""

    def __post_init__(self) -> None:
        require(len(self.space) > 0, "search.space", {}, "must name at least one field, as in loss.lambda_hidden: [0, 0.1, 1]")
        require(self.trials >= 1, "search.trials", self.trials, "must be at least 1")
        require(len(self.nfe) > 0, "search.nfe", [], "must name the budget that trials are judged at")
        require_distinct("search.nfe", self.nfe)
        objectives = list(self.objectives)
        require(1 <= len(objectives) <= 2, "search.objectives", objectives, "must be one or two, such as [distance, nfe]")
        require_distinct("search.objectives", self.objectives)
        for name in objectives:
            key = metric_key(name)
            legal = name in (DISTANCE, *COST_OBJECTIVES) or (key is not None and METRICS[key].is_distance)
            remedy = f"must be {DISTANCE}, {', '.join(COST_OBJECTIVES)}, or a distance such as fid or fd_digits"
            require(legal, "search.objectives", name, remedy)
        legal = any(name not in COST_OBJECTIVES for name in objectives)
        require(legal, "search.objectives", objectives, f"one must be {DISTANCE}: costs alone need no training")
        legal = "nfe" not in objectives or len(self.nfe) > 1
        require(legal, "search.nfe", list(self.nfe), "an objective is the NFE: name several budgets")
        legal = self.pruner == "none" or len(objectives) == 1
        require(legal, "search.pruner", self.pruner, "trials of two objectives cannot be ended early: set it to none")
        for key, choices in self.space.items():
            _check_choices(f"search.space.{key}", choices)


@dataclass(frozen=True)
class Slurm:
    """Options of a trial's Slurm job."""

    partition: str | None = None
    """Partition of the jobs (`sbatch --partition`); null: the cluster's default."""
    account: str | None = None
    """Account that is charged (`sbatch --account`); null: the user's default."""
    qos: str | None = None
    """Quality of service (`sbatch --qos`); null: the user's default."""
    minutes: int = 1440
    """Time limit of a job. A trial that takes longer is saved, queued again and resumed."""
    signal_seconds: int = 180
    """Seconds before the limit at which Slurm signals a trial to save its state. Slurm may signal up to a minute earlier."""
    nodes_per_trial: int = 1
    """Number of machines of a trial, each with `devices_per_trial` devices."""
    cpus_per_task: int | None = None
    """CPU cores for each device; null: the cluster's default."""
    mem_gb: float | None = None
    """Memory on each machine in GB; null: the cluster's default."""
    parallel: int | None = None
    """Most trials that are queued or running at once; null: as many as Slurm takes, in a search ten."""
    setup: tuple[str, ...] = field(default=(), metadata={"entries": "shell lines"})
    """Shell lines to run before the trial, such as `module load cuda`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch -> value, such as `constraint: a100` or `gres: gpu:a100:4`."""

    def __post_init__(self) -> None:
        for name in ("minutes", "nodes_per_trial"):
            require(getattr(self, name) >= 1, f"slurm.{name}", getattr(self, name), "must be at least 1")
        for name in ("cpus_per_task", "mem_gb", "parallel"):
            value = getattr(self, name)
            require(value is None or value > 0, f"slurm.{name}", value, "must be above 0")
        legal = 1 <= self.signal_seconds < 60 * self.minutes
        require(legal, "slurm.signal_seconds", self.signal_seconds, f"must be in 1..{60 * self.minutes - 1} (slurm.minutes)")


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep: runs of one experiment, by a grid or a search."""

    name: str = ""
    """Name of the sweep. Its runs are in the folder output_dir/name. Empty: the file's name."""
    experiment: str = setting("", path=True)
    """The experiment's YAML file, relative to the working directory."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Field -> value, for every cell."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Training axes, field -> list of values. A cell is trained for each combination and seed."""
    zip: dict[str, Any] = field(default_factory=dict)
    """Tied axes, field -> list of values, all of one length. First values go together, so do second values, and so on."""
    variants: dict[str, Any] = field(default_factory=dict)
    """Named sets of overrides, name -> field -> value. {} overrides nothing."""
    exclude: tuple[Any, ...] = ()
    """Combinations to leave out. Each entry is axis -> value or list of values. It leaves out cells that match all of it."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to train every combination with."""
    decide: Decide | None = None
    """Contrasts to decide, instead of `seeds`: the sweep trains only as many seeds as the decisions need."""
    search: Search | None = None
    """A search: Optuna chooses the trials, instead of grid, zip and variants."""
    evaluate: InferenceAxes = field(default_factory=InferenceAxes)
    """Inference axes: how each trained cell is evaluated."""
    devices_per_trial: int = 1
    """Number of devices of a trial on each machine; on the CPU, of processes."""
    trials_per_device: int = 1
    """Number of trials that share a GPU. Each reserves an equal share of it, and other sweeps may use the rest."""
    launcher: Literal["local", "slurm"] = "local"
    """Where trials run: `local`, on this machine, or `slurm`, as Slurm jobs."""
    slurm: Slurm = field(default_factory=Slurm)
    """Options of a trial's Slurm job."""
    storage: str | None = None
    """Database of the study, such as postgresql://user:$PASSWORD@host/name, for drivers on several machines; $NAME is a
    variable of the environment. null: SQLite, in the sweep's folder."""
    retries: int = 3
    """Most retries in a row of a trial that died (killed, lost machine) without progress."""
    workers: int | None = None
    """Number of trials at once on this machine; null: `trials_per_device` for each group of GPUs; on the CPU as many as its
    cores allow."""
    threads: int = 1
    """Threads of each process on the CPU. The number is fixed, so that results do not depend on the machine."""
    output_dir: str | None = setting(None, path=True)
    """Folder of sweeps; null: the experiment's."""

    def __post_init__(self) -> None:
        require(is_folder_name(self.name), "name", self.name, "must be the name of a folder")
        require(self.experiment != "", "experiment", self.experiment, "must be the path of an experiment's YAML file")
        for name in ("threads", "devices_per_trial", "trials_per_device"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "must be at least 1")
        require(self.retries >= 0, "retries", self.retries, "must be at least 0")
        legal = self.storage is None or re.match(r"[a-z0-9+]+://|\$", self.storage) is not None
        require(legal, "storage", self.storage, "must be a database's URL, such as postgresql://user@host/name")
        legal = len(self.seeds) > 0 and all(is_integer(seed) and seed >= 0 for seed in self.seeds)
        require(legal, "seeds", list(self.seeds), "must be a list of integers of at least 0")
        require_distinct("seeds", self.seeds)
        self._check_sharing()
        self._check_fields()
        self._check_axes()
        self._check_search()
        self._check_decide()

    def _check_sharing(self) -> None:
        if self.trials_per_device > 1:
            name, value = "trials_per_device", self.trials_per_device
            require(
                self.devices_per_trial == 1, name, value, f"devices_per_trial = {self.devices_per_trial}: set one of them to 1"
            )
            require(self.launcher == "local", name, value, "a job of Slurm has its devices to itself: set it to 1")
            require(self.accelerator != "cpu", name, value, "trials on the CPU share its cores: set workers instead")

    def _check_fields(self) -> None:
        sections: dict[str, Mapping[str, Any]] = {"overrides": self.overrides, "grid": self.grid, "zip": self.zip}
        for name, changes in self.variants.items():
            require(is_plain_name(name), "variants", name, "a variant's name must be of letters, digits, '.', '_', '+' and '-'")
            require(isinstance(changes, Mapping), f"variants.{name}", changes, "must be a mapping of fields to values")
            sections[f"variants.{name}"] = changes
        if self.search is not None:
            sections["search.space"] = self.search.space
        for where, values in sections.items():
            for key, value in values.items():
                require_known(key, where)
                if key in SET_BY_SWEEP:
                    raise ConfigError(f"{where}.{key} = {value!r}: {SET_BY_SWEEP[key]}")
                remedy = "inference never makes a new cell: set it in overrides, or under evaluate"
                legal = where == "overrides" or not key.startswith("evaluation")
                require(legal, f"{where}.{key}", value, remedy)
                check_text(f"{where}.{key}", value, is_text_field(key, ExperimentConfig))

    def _check_axes(self) -> None:
        for where, axes in (("grid", self.grid), ("zip", self.zip)):
            for key, values in axes.items():
                legal = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
                require(legal, f"{where}.{key}", values, "must be a list of values, as in model.diffusion_depth: [2, 4, 8]")
        for key, values in self.grid.items():
            require_distinct(f"grid.{key}", values)
        lengths = {key: len(values) for key, values in self.zip.items()}
        require(len(set(lengths.values())) <= 1, "zip", lengths, "tied axes must be of one length")
        self._check_once()
        for entry in self.exclude:
            require(isinstance(entry, Mapping) and len(entry) > 0, "exclude", entry, "must be a mapping of axes to values")
            for key in entry:
                remedy = f"must be an axis of the sweep: {', '.join(self.axes) or 'it has none'}"
                require(key in self.axes, "exclude", key, remedy)

    def _check_once(self) -> None:
        """Refuse a field that is set in two places."""
        if overlap := self.zip.keys() & self.grid.keys():
            raise ConfigError(f"zip.{min(overlap)}: the grid varies it too; name it once")
        axes = dict.fromkeys(self.zip, "zip") | dict.fromkeys(self.grid, "grid")
        switches = {key: f"variants.{name}" for name, changes in self.variants.items() for key in changes}
        if overlap := switches.keys() & axes.keys():
            key = min(overlap)
            raise ConfigError(f"{switches[key]}.{key}: the {axes[key]} varies it too; name it once")
        for key, where in axes.items():
            if key in self.overrides:
                raise ConfigError(f"overrides.{key} = {self.overrides[key]!r}: the {where} varies it; set {where}.{key}")

    def _check_search(self) -> None:
        if self.search is None:
            return
        for name in ("grid", "zip", "variants", "exclude"):
            require(not getattr(self, name), name, getattr(self, name), "a sweep is a grid or a search: leave one of them out")
        require(len(self.seeds) == 1, "seeds", list(self.seeds), "trials of a search have one seed")
        require(not self.evaluate.tune, "evaluate.tune", True, "a search has no designs with seeds to tune: set it to false")
        for name in ("nfe", "steps"):
            values = list(getattr(self.evaluate, name))
            require(not values, f"evaluate.{name}", values, "trials of a search have search.nfe")
        for key in self.search.space:
            if key in self.overrides:
                raise ConfigError(f"overrides.{key} = {self.overrides[key]!r}: the search varies it; leave one of them out")

    def _check_decide(self) -> None:
        if self.decide is None:
            return
        require(self.search is None, "decide", "...", "a search has no designs with seeds: leave one of them out")
        remedy = "seeds are added until all is decided: set decide.seeds.first and decide.seeds.most"
        require(self.seeds == (0,), "seeds", list(self.seeds), remedy)
        legal = self.decide.sampling == "fixed" or self.evaluate.tune
        require(legal, "decide.sampling", self.decide.sampling, "needs tuned samplings: set evaluate.tune=true")
        require(self.evaluate.last == 1, "evaluate.checkpoints", self.evaluate.checkpoints, "set it to newest, with decide")
        for key in self.decide.contrasts if self.decide.contrasts != "all" else ():
            axes = [*self.axes, *([DEPTH_AXIS] if self.evaluate.diffusion_depths else [])]
            require(key in axes, "decide.contrasts", key, f"must be an axis of the sweep: {', '.join(axes) or 'it has none'}")

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """Seeds that a combination may be trained with; for a sweep that decides, all up to its limit."""
        return self.seeds if self.decide is None else tuple(range(self.decide.seeds.most))

    @property
    def folder(self) -> Path:
        """The folder of the sweep's runs and study."""
        assert self.output_dir is not None, "load_sweep resolves it"
        return Path(self.output_dir) / self.name

    @property
    def cpu_workers(self) -> int:
        """Number of trials at once on the CPU: `workers`, or as many as the cores allow."""
        return self.workers or max(1, core_count() // (self.threads * self.devices_per_trial))

    @cached_property
    def accelerator(self) -> str:
        """The `trainer.accelerator` that the sweep's trials have."""
        default = load_experiment(self.experiment).trainer.accelerator
        return str(self.overrides.get("trainer.accelerator", default))

    @property
    def axes(self) -> list[str]:
        """Names of the axes, without the seed."""
        return [*([VARIANT] if self.variants else []), *self.grid, *self.zip]


def core_count() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_known(key: str, where: str, also: Sequence[str] = ()) -> None:
    """Refuse a key that is not a field of an experiment. The message names the nearest field.

    Args:
        where: section of the sweep's file, for the message.
        also: further keys that the message may name.
    """
    if key not in _FIELDS:
        raise ConfigError(f"{where}: unknown key {key}; the nearest is {nearest(key, [*also, *_FIELDS])}")


def _check_choices(name: str, choices: Any) -> None:
    """Check that choices are a list of values, or a range."""
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        require(len(choices) > 0, name, choices, "must name at least one value")
        require_distinct(name, choices)
        return
    legal = isinstance(choices, Mapping) and {"low", "high"} <= choices.keys() <= {"low", "high", "log", "step"}
    require(legal, name, choices, "must be a list of values, or a range such as {low: 0.01, high: 1, log: true}")
    numbers = [choices[key] for key in ("low", "high", "step") if key in choices]
    legal = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
    require(legal, name, choices, "low, high and step must be numbers")
    require(choices["low"] < choices["high"], name, choices, "low must be below high")
    require(choices.get("step", 1) > 0, name, choices, "step must be above 0")
    require(isinstance(choices.get("log", False), bool), name, choices, "log must be true or false")
    if choices.get("log"):
        require("step" not in choices, name, choices, "a logarithmic range has no step")
        require(choices["low"] > 0, name, choices, "a logarithmic range must begin above 0")


def label(key: str, value: Any) -> str:
    """An axis and its value in a cell's name: d7, width64, channels16x32."""
    return ALIASES.get(key, key.rpartition(".")[2]) + _ILLEGAL_CHARACTERS.sub("_", "x".join(_words(value)))


def is_plain_name(name: str) -> bool:
    """Whether a cell's name can contain this name unchanged."""
    return bool(name) and not _ILLEGAL_CHARACTERS.search(name)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _words(entry)
    else:
        yield value if isinstance(value, str) else as_text(value)
