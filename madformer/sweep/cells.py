"""The cells of a sweep: the combinations of its axes, each with a checked configuration. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from madformer.config import (
    DiffusionConfig,
    ExperimentConfig,
    ModelConfig,
    budget_flaw,
    config_hash,
    load_experiment,
)
from madformer.config.identity import branch_limit, config_path, trunk_hash
from madformer.config.loading import as_text, expand_paths
from madformer.config.validation import require
from madformer.errors import ConfigError
from madformer.evaluation.measurement import AXES, DEPTH, Sampling, all_samplings, default_axes
from madformer.model import cost
from madformer.runs.checkpoints import KnownRuns
from madformer.sweep.spec import VARIANT, InferenceAxes, Search, Sweep, label


@dataclass(frozen=True)
class Cell:
    """One combination of a sweep's training axes with one seed; it becomes one run."""

    name: str
    """A readable name, such as d7-l16-s0."""
    experiment: str
    """The experiment's YAML file."""
    overrides: tuple[str, ...]
    """The fields that differ from the experiment, as on the command line."""
    axes: dict[str, Any]
    """Axis -> value. An axis is a field, or `variant`."""
    seed: int
    config: ExperimentConfig
    config_hash: str
    inference: InferenceAxes = field(default_factory=InferenceAxes)
    """How the cell is evaluated. An empty axis stands for the value in `config.evaluation`."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """Budgets that the cell's model cannot have -> the reason."""
    is_of_search: bool = False
    """Whether Optuna chose the cell."""
    tuned_with: tuple[Cell, ...] | None = None
    """With `evaluate.tune`: the first cell of a design has its other cells here, which are tuned with it. Else None."""
    trunk: Cell | None = None
    """The longest of the cells that differ only in `trainer.max_steps`; this cell shares its first steps. None: no trunk."""

    @property
    def branch_step(self) -> int:
        """The step of the trunk's run after which the cell's own training begins; 0: there is no trunk."""
        return branch_limit(self.trunk.config, self.config) if self.trunk else 0

    @property
    def design(self) -> str:
        """The cell's name without the seed, such as d2 of d2-s0; empty: there are no axes."""
        return "" if self.name == f"s{self.seed}" else self.name.removesuffix(f"-s{self.seed}")

    @property
    def key(self) -> str:
        """The cell's key in the study. It holds the budget in a search, whose cells may share a run."""
        return f"{self.config_hash}@{self.budgets[0]}" if self.is_of_search else self.config_hash

    @property
    def run(self) -> Path:
        """The folder of the cell's run."""
        return self.config.run_dir

    @property
    def budgets(self) -> tuple[int, ...]:
        """NFE budgets at which the cell is evaluated."""
        return self.config.evaluation.nfe

    @cached_property
    def samplings(self) -> tuple[Sampling, ...]:
        """All samplings of each of the cell's checkpoints, the main sampler and guidance first."""
        budgets = [Sampling.of_nfe(self.config, nfe, depth=depth) for depth in self.depths for nfe in self.budgets_at(depth)]
        return all_samplings(budgets, {name: getattr(self.inference, axis.sweep_key) for name, axis in AXES.items()})

    @property
    def main_samplings(self) -> list[Sampling]:
        """For each depth the samplings with the first sampler and guidance."""
        mains = {sampling.diffusion_depth: sampling.curve_key for sampling in reversed(self.samplings)}
        return [sampling for sampling in self.samplings if sampling.curve_key == mains[sampling.diffusion_depth]]

    @property
    def depths(self) -> tuple[int | None, ...]:
        """Diffusion depths at which the cell is sampled; None: its fixed one."""
        return _depths(self.config.model, self.inference)

    def defaults(self, nfe: int) -> list[Sampling]:
        """The default samplings that tuning is compared with at a budget, one for each depth that has this budget."""
        return [Sampling.of_nfe(self.config, nfe, depth=depth) for depth in self.depths if nfe in self.budgets_at(depth)]

    def budgets_at(self, depth: int | None) -> tuple[int, ...]:
        """NFE budgets at one of the cell's depths. Those of `evaluate.steps` depend on the depth."""
        return tuple(nfe for nfe in self.budgets if _has_budget(self.config.model.at_depth(depth), self.inference, nfe))

    @property
    def point_count(self) -> int:
        """Number of the record's points, once all are evaluated."""
        return len(self.samplings) * self.inference.last

    @property
    def device_count(self) -> int:
        """Number of a trial's devices, on all its machines."""
        return (self.config.trainer.devices or 1) * self.config.trainer.num_nodes

    @property
    def max_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.trainer.max_steps


class CellMaker:
    """Makes the cells of one sweep. It reads the experiment once and checks each section once."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._base = load_experiment(sweep.experiment)
        self._sections: dict[str, Any] = {}
        self._runs = KnownRuns(Path(sweep.output_dir)) if sweep.output_dir is not None else None

    def make(self, axes: Mapping[str, Any], seed: int, changes: Mapping[str, Any], budgets: Sequence[int]) -> Cell:
        """Make one cell.

        Args:
            axes: axis -> value, for the cell's name.
            seed: training seed.
            changes: field -> value, on top of the sweep's overrides.
            budgets: NFE budgets; empty: the experiment's.

        Raises:
            ConfigError: the cell's configuration is not legal. The message names the cell.
        """
        sweep = self._sweep
        labels = (str(value) if key == VARIANT else label(key, value) for key, value in axes.items())
        name = "-".join([*labels, f"s{seed}"])
        values = {**sweep.overrides, **changes, "seed": seed, "name": name, "output_dir": str(sweep.folder)}
        values |= {"trainer.devices": sweep.devices_per_trial, "trainer.threads": sweep.threads}
        if sweep.launcher == "slurm":
            values |= {"trainer.num_nodes": sweep.slurm.nodes_per_trial}
        try:
            config, skipped = self._configure(values, budgets)
            self._check_inference(config)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from error
        values["evaluation.nfe"] = list(config.evaluation.nfe)
        key = config_hash(config)
        if self._runs is not None and not config_path(config.run_dir).is_file() and (run := self._runs.find(key)):
            values |= {"name": run.name, "output_dir": str(run.parent)}
            config = replace(config, name=run.name, output_dir=str(run.parent))
        overrides = tuple(f"{key}={as_text(value)}" for key, value in values.items())
        is_of_search = sweep.search is not None
        return Cell(name, sweep.experiment, overrides, dict(axes), seed, config, key, sweep.evaluate, skipped, is_of_search)

    def check_search(self, search: Search) -> None:
        """Refuse a pruner without previews, and a search over the depth of elastic runs, which have all depths.

        Raises:
            ConfigError: the search has one of these flaws.
        """
        is_elastic = self._sweep.overrides.get("model.elastic_depths", self._base.model.elastic_depths)
        legal = not (is_elastic and "model.diffusion_depth" in search.space)
        remedy = "an elastic run serves all its depths: leave it out, or set model.elastic_depths=[]"
        require(legal, "search.space.model.diffusion_depth", search.space.get("model.diffusion_depth"), remedy)
        remedy = "it judges by previews: set evaluation.preview_every"
        require(search.pruner == "none" or self.preview_every is not None, "search.pruner", search.pruner, remedy)

    @property
    def preview_every(self) -> int | None:
        """Training steps from one preview to the next; None: there are no previews."""
        default = self._base.evaluation.preview_every
        return cast("int | None", self._sweep.overrides.get("evaluation.preview_every", default))

    def _configure(self, values: Mapping[str, Any], budgets: Sequence[int]) -> tuple[ExperimentConfig, dict[int, str]]:
        """The configuration with the budgets that its model can have, and the other budgets with the reason."""
        try:
            # These three have the right type already, and differ from cell to cell.
            identity = {key: values[key] for key in ("seed", "name", "output_dir")}
            changes = _nest({key: _convert(key, as_text(value)) for key, value in values.items() if key not in identity})
            model = self._section("model", changes.pop("model", {}))
            diffusion = self._section("diffusion", changes.pop("diffusion", {}))
            requested = self._budgets(budgets, model)
            flaws = {budget: self._flaw(budget, model, diffusion) for budget in requested}
            possible = [budget for budget, flaw in flaws.items() if flaw is None]
            evaluation = self._section("evaluation", {**changes.pop("evaluation", {}), "nfe": possible or requested})
            sections = {"model": model, "diffusion": diffusion, "evaluation": evaluation}
            sections |= {name: self._section(name, value) for name, value in changes.items()}
            return replace(self._base, **identity, **sections), {budget: flaw for budget, flaw in flaws.items() if flaw}
        except (ConfigError, OmegaConfBaseException, _Overlap):
            # Load as from the command line: this gives the error's message, or accepts unusual but legal values.
            overrides = [f"{key}={as_text(value)}" for key, value in values.items()]
            config = load_experiment(self._sweep.experiment, [*overrides, f"evaluation.nfe={self._budgets(budgets)}"])
            return replace(config, evaluation=replace(config.evaluation, nfe=tuple(self._budgets(budgets, config.model)))), {}

    def _budgets(self, nfe: Sequence[int], model: ModelConfig | None = None) -> list[int]:
        """The requested budgets and, given the model, those of `evaluate.steps`; if there are none, the experiment's."""
        axes = self._sweep.evaluate
        models = [] if model is None else [model.at_depth(depth) for depth in _depths(model, axes)]
        step_budgets = [cost.nfe(each, count) for each in models for count in axes.steps]
        return list(dict.fromkeys([*nfe, *step_budgets])) or list(self._base.evaluation.nfe)

    def _flaw(self, budget: int, model: ModelConfig, diffusion: DiffusionConfig) -> str | None:
        """Why a cell's model cannot have a budget at one of the depths for which it is requested; None: it can."""
        models = (model.at_depth(depth) for depth in _depths(model, self._sweep.evaluate))
        asked = [each for each in models if _has_budget(each, self._sweep.evaluate, budget)]
        return next(filter(None, (budget_flaw(budget, each, diffusion) for each in asked)), None)

    def _section(self, name: str, changes: Any) -> Any:
        """A section of the experiment with changes; cells with the same changes share it."""
        key = f"{name} {changes!r}"
        if key not in self._sections:
            self._sections[key] = expand_paths(_with_changes(getattr(self._base, name), changes), f"{name}.")
        return self._sections[key]

    def _check_inference(self, config: ExperimentConfig) -> None:
        """Refuse inference axes that the run cannot serve."""
        axes, trainer = self._sweep.evaluate, config.trainer
        for name, axis in AXES.items():
            for value in getattr(axes, axis.sweep_key) if name != DEPTH else ():
                replace(config, evaluation=replace(config.evaluation, **{name: value}))
        for name, default in default_axes(config).items():
            axis, values = AXES[name], getattr(axes, AXES[name].sweep_key)
            if name == DEPTH:
                continue  # each depth is tuned separately
            remedy = f"tuning is compared with evaluation.{name} = {default}: put that first, or set it to {values[:1]}"
            require(not (axes.tune and values and values[0] != default), f"evaluate.{axis.sweep_key}", list(values), remedy)
        count = min(trainer.keep_checkpoints, -(-trainer.max_steps // trainer.checkpoint_every))
        remedy = f"there will be {count} (trainer.keep_checkpoints, trainer.checkpoint_every)"
        require(axes.last <= count, "evaluate.checkpoints", axes.checkpoints, remedy)


def _depths(model: ModelConfig, inference: InferenceAxes) -> tuple[int | None, ...]:
    asked = (inference.diffusion_depths if model.elastic_depths else ()) or (None,)
    return tuple(model.sampled_depth(depth) for depth in asked)


def _has_budget(model: ModelConfig, inference: InferenceAxes, nfe: int) -> bool:
    """Whether a budget is requested at the model's depth. Each budget of `evaluate.steps` belongs to one depth."""
    steps = inference.steps
    return not steps or nfe in (*inference.nfe, *(cost.nfe(model, count) for count in steps))


def sweep_cells(sweep: Sweep) -> list[Cell]:
    """All cells of a grid. Variants vary slowest, then the grid's axes in order, then the tied axes, then the seed.

    A search has no cells here: its trials are in the study. The cells are made once for each `Sweep` object.

    Raises:
        FileNotFoundError: there is no such experiment file.
        ConfigError: a cell is not legal (the message names it), two cells would be the same run, or `exclude` names a
            combination that does not exist.
    """
    if sweep not in _CELLS:
        _CELLS[sweep] = _make_cells(sweep)
    return list(_CELLS[sweep])


_CELLS = WeakKeyDictionary[Sweep, tuple[Cell, ...]]()


def _make_cells(sweep: Sweep) -> tuple[Cell, ...]:
    maker = CellMaker(sweep)
    if sweep.search is not None:
        maker.check_search(sweep.search)
        return ()
    cells = tuple(
        maker.make(axes, seed, changes, sweep.evaluate.nfe) for axes, changes in _points(sweep) for seed in sweep.training_seeds
    )
    require(len(cells) > 0, "exclude", list(sweep.exclude), "leaves nothing of the sweep")
    _require_one_run_each(cells)
    return cells if sweep.decide is not None else related(sweep, cells)


def related(sweep: Sweep, cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells, with the field `trunk` set and, if the sweep tunes, the field `tuned_with`."""
    cells = _with_trunks(cells)
    return _with_designs(cells) if sweep.evaluate.tune else cells


def _with_trunks(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells. Of those that differ only in `trainer.max_steps`, the longest is the trunk and saves where others branch."""
    groups, changed = dict[str, list[Cell]](), dict[str, Cell]()
    for cell in cells:
        if cell.config.optimizer.warmup_steps is not None:
            groups.setdefault(trunk_hash(cell.config), []).append(cell)
    for group in groups.values():
        longest = max(group, key=lambda cell: cell.max_steps)
        branches = [replace(cell, trunk=longest) for cell in group if cell is not longest]
        if branches := [cell for cell in branches if cell.branch_step and _saves_enough(cell)]:
            trunk = _with_checkpoints(longest, {cell.branch_step for cell in branches})
            changed |= {trunk.name: trunk, **{cell.name: replace(cell, trunk=trunk) for cell in branches}}
    return tuple(changed.get(cell.name, cell) for cell in cells)


def _saves_enough(branch: Cell) -> bool:
    """Whether a branch saves as many checkpoints after its branch step as are evaluated."""
    trainer = branch.config.trainer
    return sum(map(trainer.saves_regularly, range(branch.branch_step, branch.max_steps + 1))) >= branch.inference.last


def _with_checkpoints(cell: Cell, more: set[int]) -> Cell:
    name, trainer = "trainer.checkpoint_steps", cell.config.trainer
    steps = sorted({*trainer.checkpoint_steps, *more})
    overrides = [override for override in cell.overrides if not override.startswith(f"{name}=")]
    config = replace(cell.config, trainer=replace(trainer, checkpoint_steps=tuple(steps)))
    return replace(cell, overrides=(*overrides, f"{name}={as_text(steps)}"), config=config)


def _with_designs(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells. The first one of each design has the others, which differ only in the seed, as `tuned_with`."""
    designs: dict[str, list[Cell]] = {}
    for cell in cells:
        designs.setdefault(repr(cell.axes), []).append(cell)
    firsts = {first.name: others for first, *others in designs.values()}
    return tuple(replace(cell, tuned_with=tuple(firsts[cell.name])) if cell.name in firsts else cell for cell in cells)


def _points(sweep: Sweep) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each combination: axis -> value, and field -> value that it sets."""
    variants = [({VARIANT: name}, changes) for name, changes in sweep.variants.items()] or [({}, {})]
    products = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    ties = [dict(zip(sweep.zip, values, strict=True)) for values in zip(*sweep.zip.values(), strict=True)] or [{}]
    matched = set[int]()
    for (variant, changes), product, tied_values in itertools.product(variants, products, ties):
        axes = {**variant, **product, **tied_values}
        matches = {number for number, entry in enumerate(sweep.exclude) if _matches(axes, entry)}
        matched |= matches
        if not matches:
            yield axes, {**changes, **product, **tied_values}
    for number, entry in enumerate(sweep.exclude):
        require(number in matched, "exclude", dict(entry), "there is no such combination")


def _matches(axes: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return all(axes[key] == value or (isinstance(value, list) and axes[key] in value) for key, value in entry.items())


def _require_one_run_each(cells: Sequence[Cell]) -> None:
    by_hash, by_name = dict[str, Cell](), dict[str, Cell]()
    for cell in cells:
        if (other := by_hash.setdefault(cell.config_hash, cell)) is not cell:
            raise ConfigError(f"cells {other.name} and {cell.name} train the same weights: vary a field that is trained with")
        if (other := by_name.setdefault(cell.name, cell)) is not cell:
            raise ConfigError(f"cells {other.axes} and {cell.axes} would both be named {cell.name}")


class _Overlap(Exception):  # noqa: N818 - never leaves this module
    """A section is set as a whole, on its own or together with some of its fields."""


@cache
def _schema() -> Any:
    return OmegaConf.structured(ExperimentConfig)


@cache
def _convert(key: str, text: str) -> Any:
    """A field's value in the type that a configuration holds."""
    if "${oc.env:" in text:
        raise _Overlap  # `load_experiment` resolves it, unless it stands for a secret
    merged = OmegaConf.merge(_schema(), OmegaConf.from_dotlist([f"{key}={text}"]))
    value = OmegaConf.select(merged, key)
    if isinstance(value, DictConfig):
        raise _Overlap  # only some fields of a section: the others keep the experiment's values, not the defaults
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value, as nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise _Overlap
        if isinstance(place.get(name), dict):
            raise _Overlap
        place[name] = value
    return nested


def _with_changes(value: Any, changes: Any) -> Any:
    """A section with some fields changed, or the new value of a field."""
    if not isinstance(changes, dict):
        return changes
    if not is_dataclass(value) or isinstance(value, type):
        raise _Overlap  # a field of a section that is null
    return replace(value, **{name: _with_changes(getattr(value, name), part) for name, part in changes.items()})
