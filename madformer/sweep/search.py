"""Trials that Optuna chooses: what it is asked, what it is told, and which trials it ends early."""

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
from madformer.errors import ConfigError, InputError
from madformer.runs.folder import read_previews
from madformer.sweep.cells import Cell, CellMaker
from madformer.sweep.needs import main_metrics, main_points
from madformer.sweep.queue import JOB, KEY, KIND, REASON, STRIKES, Queue, Trial, job_of, newest_trials, standing_of
from madformer.sweep.spec import DISTANCE, Search, Sweep, as_text
from madformer.sweep.study import Storage, exists, quiet
from madformer.sweep.trial import Outcome

NFE = "nfe"
"""The parameter of a trial that is no field of its configuration."""

_RETRY = "retry"
"""Attribute of a trial that takes up what another one of the search began."""

_COMMON = "common"
"""Attribute of the study: what all its trials have in common."""


class SearchQueue(Queue):
    """The trials of a search. One that died is taken up with the values that it had."""

    def __init__(self, sweep: Sweep, storage: Storage) -> None:
        super().__init__(sweep, storage, [])
        assert sweep.search is not None
        self._search, self._space = sweep.search, Space(sweep)
        self._asked: dict[int, optuna.Trial] = {}
        self._reported: dict[int, int] = {}
        self._require_same_search()
        storage.study.pruner = make_pruner(self._search, self._space.preview_every)

    def _require_same_search(self) -> None:
        """Refuse trials that are not to be compared with those that are there.

        Raises:
            InputError: another experiment, overrides, budgets or objectives than the study was begun with.
        """
        now = self._space.common()
        before = self.storage.study.user_attrs.get(_COMMON)
        if before is None:
            self.storage.study.set_user_attr(_COMMON, now)
        elif different := [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]:
            what = f"the study was begun with {different[0]} = {before.get(different[0])}, not {now.get(different[0])}"
            raise InputError(f"{self._sweep.name}: {what}; give the sweep another name")

    def complete(self, trial: Trial) -> None:
        """Tell the objectives of a claimed trial that is done."""
        [budget] = trial.cell.budgets
        metrics = main_metrics(trial.cell)[budget]
        facts = {f"{name}@{budget}": value for name, value in metrics.items()}
        try:
            values = [objective(name, trial.cell, budget) for name in self._search.objectives]
        except KeyError as error:
            what = f"no {error.args[0]} was measured, but {', '.join(metrics)}"
            self.fail(trial, Outcome("failed", "mistake", f"search.objectives: {what}"))
        else:
            self._tell(trial, TrialState.COMPLETE, facts, values)

    def is_hopeless(self, trial: Trial) -> bool:
        """Whether a running trial is to be ended early, by its previews so far."""
        if self._search.pruner == "none":
            return False
        asked = self._asked[trial.number]
        for preview in read_previews(trial.cell.run):
            if preview["step"] <= self._reported.get(trial.number, 0):
                continue
            value = next(iter(preview["metrics"].values()))
            try:
                self.storage.retry(lambda value=value, step=preview["step"]: asked.report(value, step))  # type: ignore[misc]
            except UpdateFinishedTrialError:
                return False
            self._reported[trial.number] = preview["step"]
            if self.storage.retry(asked.should_prune):
                return True
        return False

    def findings(self) -> list[str]:
        """The best trials: one, or those of the Pareto front."""
        return describe_best(self.storage.retry(lambda: self.storage.study.best_trials), self._search)

    def _next(self, trials: Sequence[FrozenTrial], most: int) -> Iterator[Trial]:
        self._end_unnamed()
        self._take_up_the_dead(trials)
        while most and self._may_ask():
            # A seed of its own for each trial: those of several drivers must not be alike.
            there = len(self.storage.study.get_trials(deepcopy=False))
            self.storage.study.sampler = make_sampler(self._search, self._search.seed + there)
            with quiet():
                asked = self.storage.study.ask()
            try:
                cell = self._space.suggest(asked)
            except ConfigError as error:
                for name, value in {KEY: f"not legal {asked.number}", KIND: "mistake", REASON: str(error)}.items():
                    asked.set_user_attr(name, value)
                self.storage.say(f"trial {asked.number} is not legal: {error}")
                self.storage.study.tell(asked, state=TrialState.FAIL)
                continue
            for name, value in {KEY: cell.key, "cell": cell.name}.items():
                asked.set_user_attr(name, value)
            self._cells[cell.key] = cell
            self._asked[asked.number] = asked
            most -= 1
            yield Trial(asked.number, asked._trial_id, cell, asked.user_attrs.get(JOB))

    def _end_unnamed(self) -> None:
        """End trials that a driver had asked for when it died; under the lock nobody is about to name them."""
        for trial in self.storage.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if KEY not in trial.user_attrs:
                self.storage.rdb.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _may_ask(self) -> bool:
        """Whether a trial waits, or the search may have one more."""
        trials = self.storage.study.get_trials(deepcopy=False)
        return begun(trials) < self._search.trials or any(trial.state == TrialState.WAITING for trial in trials)

    def _take_up_the_dead(self, trials: Sequence[FrozenTrial]) -> None:
        for key, last in newest_trials(trials).items():
            if last.state == TrialState.FAIL:
                standing = standing_of(last, self._sweep.retries, self._cells[key])
                if standing.state == "waiting":
                    self._add(self._cells[key], {STRIKES: standing.failed_attempts})

    def _add(self, cell: Cell, facts: Mapping[str, Any]) -> None:
        last = newest_trials(self._trials())[cell.key]
        known = {KEY: cell.key, "cell": cell.name, _RETRY: last.number}
        self.storage.study.enqueue_trial(last.params, user_attrs={**known, **facts, **job_of(last)})

    def _trials(self) -> list[FrozenTrial]:
        """Trials of all drivers: their cells are made of their parameters."""
        trials = [trial for trial in self.storage.study.get_trials(deepcopy=False) if KEY in trial.user_attrs]
        for trial in trials:
            key = trial.user_attrs[KEY]
            if key not in self._cells and (cell := self._space.cell_of(trial.params)) is not None and cell.key == key:
                self._cells[key] = cell
        return [trial for trial in trials if trial.user_attrs[KEY] in self._cells]


class Space:
    """What a search chooses from, and the cells that this makes."""

    def __init__(self, sweep: Sweep) -> None:
        assert sweep.search is not None
        self._sweep, self._search, self._seed, self._maker = sweep, sweep.search, sweep.seeds[0], CellMaker(sweep)
        self._choices = {
            key: {_as_choice(value): value for value in choices}
            for key, choices in self._search.space.items()
            if not isinstance(choices, Mapping)
        }

    def common(self) -> dict[str, str]:
        """What trials must have in common to be compared, as text."""
        search, sweep = self._search, self._sweep
        fields = {**trained_fields(load_experiment(sweep.experiment)), **sweep.overrides, "seed": self._seed}
        judged = {"search.nfe": list(search.nfe), "search.objectives": list(search.objectives)}
        return {name: as_text(value) for name, value in {**fields, **judged}.items() if name not in search.space}

    @property
    def preview_every(self) -> int:
        """Training steps from one preview to the next; 1 where there are none."""
        return self._maker.preview_every or 1

    def suggest(self, trial: optuna.Trial) -> Cell:
        """The cell that a trial is to be.

        Raises:
            ConfigError: its configuration is not legal.
            InputError: the study was begun with another space.
        """
        try:
            for key, choices in self._search.space.items():
                if key in self._choices:
                    trial.suggest_categorical(key, list(self._choices[key]))
                elif all(isinstance(number, int) for number in (choices["low"], choices["high"], choices.get("step", 1))):
                    trial.suggest_int(key, choices["low"], choices["high"], step=choices.get("step", 1), log=_log(choices))
                else:
                    trial.suggest_float(key, choices["low"], choices["high"], step=choices.get("step"), log=_log(choices))
            if len(self._search.nfe) > 1:
                trial.suggest_categorical(NFE, list(self._search.nfe))
        except ValueError as error:
            raise InputError(
                f"search.space: the study was begun with another one ({error}); give the sweep another name"
            ) from error
        return self._make(trial.params)

    def cell_of(self, params: Mapping[str, Any]) -> Cell | None:
        """The cell of a trial; None: it has values of another space, or is not legal."""
        try:
            return self._make(params)
        except (KeyError, ConfigError):
            return None

    def _make(self, params: Mapping[str, Any]) -> Cell:
        axes = {
            key: self._choices[key][params[key]] if key in self._choices else _short(params[key]) for key in self._search.space
        }
        budget = params[NFE] if len(self._search.nfe) > 1 else self._search.nfe[0]
        return self._maker.make(axes, self._seed, axes, [budget])


def begun(trials: Sequence[FrozenTrial]) -> int:
    """How many trials of a search there were, without those that took up others."""
    return sum(KEY in trial.user_attrs and _RETRY not in trial.user_attrs for trial in trials)


def search_cells(sweep: Sweep, trials: Sequence[FrozenTrial]) -> list[Cell]:
    """The cells of a search so far, each once, in the order in which they were chosen."""
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


def tried_cells(sweep: Sweep) -> list[Cell]:
    """The cells of a search so far, as its study has them."""
    if not exists(sweep):
        return []
    storage = Storage(sweep)
    try:
        return search_cells(sweep, storage.study.get_trials(deepcopy=False))
    finally:
        storage.close()


def sample_cells(sweep: Sweep, count: int) -> list[Cell]:
    """Cells that a search may choose, drawn at random; those that are not legal are left out."""
    space = Space(sweep)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    cells = list[Cell]()
    for _ in range(count):
        try:
            cells.append(space.suggest(study.ask()))
        except ConfigError:
            continue
    return cells


def objective(name: str, cell: Cell, budget: int) -> float:
    """What an objective of a search is for a cell that is done.

    Raises:
        KeyError: it was not measured.
    """
    if name == "nfe":
        return float(budget)
    if name == "tflops":
        return max(float(point["tflops_per_image"]) for point in main_points(cell)[budget])
    metrics = main_metrics(cell)[budget]
    return next(iter(metrics.values())) if name == DISTANCE else metrics[name]


def make_sampler(search: Search, seed: int) -> BaseSampler:
    """Optuna's algorithm by its name."""
    makers: dict[str, Any] = {
        "tpe": lambda: TPESampler(seed=seed, constant_liar=True),
        "random": lambda: RandomSampler(seed=seed),
        "nsga2": lambda: NSGAIISampler(seed=seed),
        "qmc": lambda: QMCSampler(seed=search.seed, scramble=True),
    }
    with quiet():
        return makers[search.sampler]()


def make_pruner(search: Search, preview_every: int) -> BasePruner:
    """Optuna's rule by its name."""
    makers: dict[str, Any] = {
        "none": NopPruner,
        "median": MedianPruner,
        "halving": lambda: SuccessiveHalvingPruner(min_resource=preview_every),
        "hyperband": lambda: HyperbandPruner(min_resource=preview_every),
    }
    return makers[search.pruner]()


def _as_choice(value: Any) -> Any:
    """A choice in a form that the storage keeps."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else as_text(value)


def _short(number: float) -> float:
    """A number of four digits: names of folders have it in them."""
    return float(f"{number:.4g}") if isinstance(number, float) and math.isfinite(number) else number


def _log(choices: Mapping[str, Any]) -> bool:
    return bool(choices.get("log", False))
