"""Searches: Optuna chooses trials and prunes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from madformer.config import load_experiment, trained_fields
from madformer.config.loading import as_text
from madformer.errors import ConfigError, InputError
from madformer.evaluation.measurement import DISTANCE
from madformer.runs.files import read_previews
from madformer.sweep.cells import Cell, CellMaker
from madformer.sweep.needs import main_metrics, main_points
from madformer.sweep.queue import (
    FAILED_ATTEMPTS,
    JOB,
    KEY,
    KIND,
    REASON,
    Queue,
    Trial,
    cell_status,
    job_attribute,
    newest_trials,
)
from madformer.sweep.spec import Search, Sweep
from madformer.sweep.study import Storage, heartbeat_warnings_off, study_exists
from madformer.sweep.trial import Outcome

NFE = "nfe"
"""The only parameter of a trial that is not a field of its configuration."""

_RETRY = "retry"
"""Attribute of a trial that retries another one: the number of that trial."""

SAMPLED_TRIALS = 64
"""Number of random trials from which the cost of a trial is estimated."""

_COMMON_FIELDS = "common"
"""Attribute of the study: the fields that all its trials have in common."""


class SearchQueue(Queue):
    """The trials of a search. A trial that died is retried with the same values."""

    def __init__(self, sweep: Sweep, storage: Storage) -> None:
        super().__init__(sweep, storage, [])
        assert sweep.search is not None
        self._search, self._space = sweep.search, Space(sweep)
        self._optuna_trials: dict[int, optuna.Trial] = {}
        self._reported_steps: dict[int, int] = {}
        self._require_same_search()
        storage.study.pruner = make_pruner(self._search, self._space.preview_every)

    def _require_same_search(self) -> None:
        """Refuse a search whose trials cannot be compared with those of the study.

        Raises:
            InputError: the study began with another experiment, overrides, budgets or objectives.
        """
        fields = self._space.common_fields()
        study_fields = self.storage.study.user_attrs.get(_COMMON_FIELDS)
        if study_fields is None:
            self.storage.study.set_user_attr(_COMMON_FIELDS, fields)
            return
        for name in sorted(fields.keys() | study_fields.keys()):
            if fields.get(name) != study_fields.get(name):
                what = f"the study was begun with {name} = {study_fields.get(name)}, not {fields.get(name)}"
                raise InputError(f"{self._sweep.name}: {what}; give the sweep another name")

    def complete(self, trial: Trial) -> None:
        """Record that a trial is done, with its objectives."""
        [budget] = trial.cell.budgets
        metrics = main_metrics(trial.cell)[budget]
        try:
            values = [objective(name, trial.cell, budget) for name in self._search.objectives]
        except KeyError as error:
            what = f"no {error.args[0]} was measured, but {', '.join(metrics)}"
            self.fail(trial, Outcome("failed", "mistake", f"search.objectives: {what}"))
        else:
            attributes = {f"{name}@{budget}": value for name, value in metrics.items()}
            self._finish(trial, TrialState.COMPLETE, attributes, values)

    def should_prune(self, trial: Trial) -> bool:
        """Whether the pruner ends a running trial, given its previews so far."""
        if self._search.pruner == "none":
            return False
        optuna_trial = self._optuna_trials[trial.number]
        for preview in read_previews(trial.cell.run):
            if preview["step"] <= self._reported_steps.get(trial.number, 0):
                continue
            value = next(iter(preview["metrics"].values()))
            try:
                self.storage.retry(lambda value=value, step=preview["step"]: optuna_trial.report(value, step))  # type: ignore[misc]
            except UpdateFinishedTrialError:
                return False
            self._reported_steps[trial.number] = preview["step"]
            if self.storage.retry(optuna_trial.should_prune):
                return True
        return False

    def summary(self) -> list[str]:
        """A line on the best trial, or one for each trial of the Pareto front."""
        return describe_best(self.storage.retry(lambda: self.storage.study.best_trials), self._search)

    def _start_trials(self, trials: Sequence[FrozenTrial], limit: int) -> Iterator[Trial]:
        self._fail_unnamed_trials()
        self._retry_dead_trials(trials)
        while limit and self._has_more_trials():
            # Each trial has a seed of its own, else several drivers would begin with the same trials.
            count = len(self.storage.study.get_trials(deepcopy=False))
            self.storage.study.sampler = make_sampler(self._search, self._search.seed + count)
            with heartbeat_warnings_off():
                trial = self.storage.study.ask()
            try:
                cell = self._space.suggest(trial)
            except ConfigError as error:
                for name, value in {KEY: f"not legal {trial.number}", KIND: "mistake", REASON: str(error)}.items():
                    trial.set_user_attr(name, value)
                self.storage.say(f"trial {trial.number} is not legal: {error}")
                self.storage.study.tell(trial, state=TrialState.FAIL)
                continue
            for name, value in {KEY: cell.key, "cell": cell.name}.items():
                trial.set_user_attr(name, value)
            self._cells[cell.key] = cell
            self._optuna_trials[trial.number] = trial
            limit -= 1
            yield Trial(trial.number, trial._trial_id, cell, trial.user_attrs.get(JOB))

    def _fail_unnamed_trials(self) -> None:
        """Fail trials whose driver died before it named their cell. The lock is held, so no driver is naming one now."""
        for trial in self.storage.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if KEY not in trial.user_attrs:
                self.storage.rdb.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _has_more_trials(self) -> bool:
        """Whether a trial waits, or the search has not had all its trials yet."""
        trials = self.storage.study.get_trials(deepcopy=False)
        return count_trials(trials) < self._search.trials or any(trial.state == TrialState.WAITING for trial in trials)

    def _retry_dead_trials(self, trials: Sequence[FrozenTrial]) -> None:
        for key, trial in newest_trials(trials).items():
            if trial.state == TrialState.FAIL:
                status = cell_status(trial, self._sweep.retries, self._cells[key])
                if status.state == "waiting":
                    self._add(self._cells[key], {FAILED_ATTEMPTS: status.failed_attempts})

    def _add(self, cell: Cell, attributes: Mapping[str, Any]) -> None:
        trial = newest_trials(self._trials())[cell.key]
        names = {KEY: cell.key, "cell": cell.name, _RETRY: trial.number}
        self.storage.study.enqueue_trial(trial.params, user_attrs={**names, **attributes, **job_attribute(trial)})

    def _trials(self) -> list[FrozenTrial]:
        """Trials of all drivers. Cells of other drivers' trials are made here, from the trials' parameters."""
        trials = [trial for trial in self.storage.study.get_trials(deepcopy=False) if KEY in trial.user_attrs]
        for trial in trials:
            key = trial.user_attrs[KEY]
            if key not in self._cells and (cell := self._space.cell_of(trial.params)) is not None and cell.key == key:
                self._cells[key] = cell
        return [trial for trial in trials if trial.user_attrs[KEY] in self._cells]


class Space:
    """The space of a search. It makes the cells of the space's points."""

    def __init__(self, sweep: Sweep) -> None:
        assert sweep.search is not None
        self._sweep, self._search, self._seed, self._maker = sweep, sweep.search, sweep.seeds[0], CellMaker(sweep)
        self._choices = {
            key: {_as_choice(value): value for value in choices}
            for key, choices in self._search.space.items()
            if not isinstance(choices, Mapping)
        }

    def common_fields(self) -> dict[str, str]:
        """Fields that trials must have in common to be comparable, with their values as text."""
        search, sweep = self._search, self._sweep
        fields = {**trained_fields(load_experiment(sweep.experiment)), **sweep.overrides, "seed": self._seed}
        criteria = {"search.nfe": list(search.nfe), "search.objectives": list(search.objectives)}
        return {name: as_text(value) for name, value in {**fields, **criteria}.items() if name not in search.space}

    @property
    def preview_every(self) -> int:
        """Training steps from one preview to the next; 1 if there are no previews."""
        return self._maker.preview_every or 1

    def suggest(self, trial: optuna.Trial) -> Cell:
        """The cell of a new trial.

        Raises:
            ConfigError: its configuration is not legal.
            InputError: the study began with another space.
        """
        try:
            for key, choices in self._search.space.items():
                if key in self._choices:
                    trial.suggest_categorical(key, list(self._choices[key]))
                elif all(isinstance(number, int) for number in (choices["low"], choices["high"], choices.get("step", 1))):
                    trial.suggest_int(
                        key, choices["low"], choices["high"], step=choices.get("step", 1), log=_is_logarithmic(choices)
                    )
                else:
                    trial.suggest_float(
                        key, choices["low"], choices["high"], step=choices.get("step"), log=_is_logarithmic(choices)
                    )
            if len(self._search.nfe) > 1:
                trial.suggest_categorical(NFE, list(self._search.nfe))
        except ValueError as error:
            raise InputError(
                f"search.space: the study was begun with another one ({error}); give the sweep another name"
            ) from error
        return self._make(trial.params)

    def cell_of(self, params: Mapping[str, Any]) -> Cell | None:
        """The cell of a trial; None: its values are from another space, or not legal."""
        try:
            return self._make(params)
        except (KeyError, ConfigError):
            return None

    def _make(self, params: Mapping[str, Any]) -> Cell:
        axes = {
            key: self._choices[key][params[key]] if key in self._choices else _rounded(params[key])
            for key in self._search.space
        }
        budget = params[NFE] if len(self._search.nfe) > 1 else self._search.nfe[0]
        return self._maker.make(axes, self._seed, axes, [budget])


def count_trials(trials: Sequence[FrozenTrial]) -> int:
    """Number of trials of a search so far, without those that retry others."""
    return sum(KEY in trial.user_attrs and _RETRY not in trial.user_attrs for trial in trials)


def search_cells(sweep: Sweep, trials: Sequence[FrozenTrial]) -> list[Cell]:
    """The cells of a search so far, each once, in the order of their trials."""
    space = Space(sweep)
    cells = (space.cell_of(trial.params) for trial in trials if KEY in trial.user_attrs)
    return list({cell.key: cell for cell in cells if cell is not None}.values())


def describe_best(trials: Sequence[FrozenTrial], search: Search) -> list[str]:
    """A line for each of the best trials, by the first objective."""
    lines = []
    for trial in sorted(trials, key=lambda trial: trial.values):
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(search.objectives, trial.values, strict=True))
        lines.append(f"best: {trial.user_attrs.get('cell')}, {values}")
    return lines if len(search.objectives) > 1 else lines[:1]


def study_cells(sweep: Sweep) -> list[Cell]:
    """The cells of a search so far, read from its study."""
    if not study_exists(sweep):
        return []
    try:
        storage = Storage(sweep, read_only=True)
    except KeyError:  # a database without this study
        return []
    try:
        return search_cells(sweep, storage.study.get_trials(deepcopy=False))
    finally:
        storage.close()


def sample_cells(sweep: Sweep, count: int = SAMPLED_TRIALS) -> list[Cell]:
    """The legal cells among `count` random points of a search's space.

    Raises:
        ConfigError: no point is legal.
    """
    space = Space(sweep)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    cells = list[Cell]()
    for _ in range(count):
        try:
            cells.append(space.suggest(study.ask()))
        except ConfigError:
            continue
    if not cells:
        raise ConfigError(f"search.space: of {count} trials drawn at random none is legal")
    return cells


def objective(name: str, cell: Cell, budget: int) -> float:
    """The value of an objective for a cell that is done.

    Args:
        name: an entry of `search.objectives`.
        budget: NFE budget that the trial is judged at.

    Raises:
        KeyError: the metric was not measured.
    """
    if name == "nfe":
        return float(budget)
    if name == "tflops":
        return max(float(point["tflops_per_image"]) for point in main_points(cell)[budget])
    metrics = main_metrics(cell)[budget]
    return next(iter(metrics.values())) if name == DISTANCE else metrics[name]


def make_sampler(search: Search, seed: int) -> BaseSampler:
    """Optuna's sampler that `search.sampler` names."""
    makers: dict[str, Any] = {
        "tpe": lambda: TPESampler(seed=seed, constant_liar=True),
        "random": lambda: RandomSampler(seed=seed),
        "nsga2": lambda: NSGAIISampler(seed=seed),
        "qmc": lambda: QMCSampler(seed=search.seed, scramble=True),
    }
    with heartbeat_warnings_off():
        return makers[search.sampler]()


def make_pruner(search: Search, preview_every: int) -> BasePruner:
    """Optuna's pruner that `search.pruner` names; previews are `preview_every` steps apart."""
    makers: dict[str, Any] = {
        "none": NopPruner,
        "median": MedianPruner,
        "halving": lambda: SuccessiveHalvingPruner(min_resource=preview_every),
        "hyperband": lambda: HyperbandPruner(min_resource=preview_every),
    }
    return makers[search.pruner]()


def _as_choice(value: Any) -> Any:
    """A choice in a form that the study can store."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else as_text(value)


def _rounded(number: float) -> float:
    """A number rounded to four digits, since names of folders contain it."""
    return float(f"{number:.4g}") if isinstance(number, float) and math.isfinite(number) else number


def _is_logarithmic(choices: Mapping[str, Any]) -> bool:
    return bool(choices.get("log", False))
