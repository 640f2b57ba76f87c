"""Trials that Optuna chooses, with stand-ins whose distance falls towards a learning rate of 0.003."""

import re
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from madformer.errors import ConfigError, InputError
from madformer.evaluation.record import append_point
from madformer.runs.files import append_preview
from madformer.sweep.driver import run_sweep
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.search import SearchQueue, search_cells
from madformer.sweep.status import print_status
from madformer.sweep.study import Storage
from madformer.sweep.trial import Outcome
from tests.conftest import ROOT
from tests.sweep.claimer import finish, train
from tests.sweep.driver import stand_ins
from tests.sweep.trial import point

SEARCH = f"""
name: small
experiment: {ROOT}/experiments/digits.yaml
overrides: {{trainer.max_steps: 10, evaluation.num_samples: 8}}
search:
  space:
    optimizer.lr: {{low: 1.0e-4, high: 0.1, log: true}}
    model.width: {{low: 16, high: 64, step: 16}}
    optimizer.betas: [[0.9, 0.95], [0.9, 0.99]]
  nfe: [16]
  trials: 8
workers: 2
"""


@pytest.fixture
def search_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SEARCH)
    return path


def run(search_file, *overrides):
    lines = []
    status = run_sweep(load_sweep(search_file, overrides), False, stand_ins, lines.append)
    return status, lines


def open_queue(search_file, *overrides):
    sweep = load_sweep(search_file, overrides)
    return SearchQueue(sweep, Storage(sweep))


def trials(search_file, *overrides):
    storage = Storage(load_sweep(search_file, overrides))
    found = storage.study.trials
    storage.close()
    return found


def journal(word):
    return [line for line in Path("journal").read_text().splitlines() if line.startswith(f"{word} ")]


def test_a_search_tries_as_many_as_asked_for_and_says_which_is_best(search_file):
    three, four = "search.trials=3", "search.trials=4"
    status, lines = run(search_file, three)
    assert status == 0 and len(journal("train")) == len(set(journal("train"))) == 3
    done = trials(search_file, three)
    assert [trial.state for trial in done] == [TrialState.COMPLETE] * 3
    for trial in done:
        lr = float(f"{trial.params['optimizer.lr']:.4g}")
        assert trial.value == pytest.approx(1000 / 16 + 100 * abs(lr - 0.003))
        assert trial.user_attrs["cell"] == f"lr{lr!r}-width{trial.params['model.width']}-betas" + (
            "0.9x0.95-s0" if trial.params["optimizer.betas"] == "[0.9,0.95]" else "0.9x0.99-s0"
        )
    best = min(done, key=lambda trial: trial.value)
    assert lines[-1] == f"  best: {best.user_attrs['cell']}, distance {best.value:.4g}"
    assert run(search_file, three)[0] == 0 and len(journal("train")) == 3
    assert run(search_file, four)[0] == 0 and len(journal("train")) == 4


@pytest.mark.parametrize("sampler", ["random", "nsga2", "qmc"])
def test_samplers_by_name(search_file, sampler):
    with open_queue(search_file, f"search.sampler={sampler}") as queue:
        assert len({trial.cell.name for trial in queue.claim(4).trials}) == 4
        assert type(queue.storage.study.sampler).__name__.lower().startswith({"nsga2": "nsgaii"}.get(sampler, sampler))


def test_two_drivers_share_a_search_and_do_not_begin_alike(search_file):
    with open_queue(search_file) as one, open_queue(search_file) as other:
        claimed = [*one.claim(3).trials, *other.claim(9).trials]
        assert len(claimed) == 8 and len({trial.cell.key for trial in claimed}) == 8
        assert one.claim().trials == [] and one.claim().may_have_more


def test_a_trial_that_died_is_taken_up_with_the_values_that_it_had(search_file):
    with open_queue(search_file, "search.trials=1") as queue:
        [trial] = queue.claim().trials
        queue.fail(trial, Outcome("failed", "killed", "killed by SIGKILL"))
        [again] = queue.claim().trials
        assert again.cell == trial.cell and again.number == trial.number + 1
        assert queue.claim().trials == []
    with open_queue(search_file, "search.trials=1") as queue:  # another process, which was told nothing
        queue.storage.rdb.set_trial_state_values(again.id, TrialState.FAIL)
        [last] = queue.claim().trials
        assert last.cell == trial.cell
        finish(last.cell)
        queue.complete(last)
        assert queue.summary() == [f"best: {trial.cell.name}, distance {trials(search_file)[-1].value:.4g}"]


def test_a_combination_that_is_not_legal_counts_and_says_why(search_file):
    illegal = "search={space: {model.diffusion_depth: [9]}, nfe: [16], trials: 2}"
    status, lines = run(search_file, illegal)
    reason = "cell d9-s0: model.diffusion_depth = 9: must be in 1..8 (model.depth)"
    assert status == 1 and lines[:2] == [f"trial {number} is not legal: {reason}" for number in (0, 1)]
    for trial in trials(search_file, illegal):
        assert trial.state == TrialState.FAIL
        assert trial.user_attrs["reason"] == "cell d9-s0: model.diffusion_depth = 9: must be in 1..8 (model.depth)"


def test_an_interrupted_trial_is_taken_up_once(search_file):
    four = "search.trials=4"
    with open_queue(search_file, four) as queue:
        claimed = queue.claim(4).trials
        for trial in claimed:
            queue.put_back(trial)
    with open_queue(search_file, four) as queue:
        again = [trial for _ in range(6) for trial in queue.claim().trials]
        assert sorted(trial.cell.key for trial in again) == sorted(trial.cell.key for trial in claimed)


def test_a_trial_that_was_asked_for_by_a_dead_driver_is_ended(search_file):
    with open_queue(search_file, "search.trials=1") as queue:
        queue.storage.study.ask()
        assert len(queue.claim(2).trials) == 1
        assert trials(search_file)[0].state == TrialState.FAIL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.max_steps=20", "the study was begun with trainer.max_steps = 10, not 20"),
        ("search.nfe=[32]", "the study was begun with search.nfe = [16], not [32]"),
        ("search.objectives=[fd_digits]", 'the study was begun with search.objectives = ["distance"], not ["fd_digits"]'),
    ],
)
def test_trials_that_cannot_be_compared_are_not_mixed(search_file, change, message):
    with open_queue(search_file):
        pass
    with pytest.raises(InputError, match=re.escape(f"small: {message}; give the sweep another name")):
        open_queue(search_file, change)
    open_queue(search_file, "search.trials=99", "search.sampler=random")


def test_two_objectives_and_a_budget_that_is_searched(search_file, capsys):
    """A run is trained once, whatever the number of budgets that it is evaluated at."""
    pareto = (
        "search={space: {optimizer.lr: [0.003, 0.3]}, nfe: [16, 32], trials: 12, objectives: [distance, nfe], sampler: random}"
    )
    status, lines = run(search_file, pareto)
    assert status == 0 and sorted(set(journal("train"))) == ["train lr0.003-s0", "train lr0.3-s0"]
    assert len(journal("trained")) == 2
    done = trials(search_file, pareto)
    assert len(done) == 12 and {trial.values[1] for trial in done} == {16, 32}
    assert {line.strip() for line in lines if "best" in line} == {
        "best: lr0.003-s0, distance 31.25, nfe 32",
        "best: lr0.003-s0, distance 62.5, nfe 16",
    }
    sweep = load_sweep(search_file, [pareto])
    assert sorted((cell.name, cell.budgets[0]) for cell in search_cells(sweep, done)) == [
        ("lr0.003-s0", 16), ("lr0.003-s0", 32), ("lr0.3-s0", 16), ("lr0.3-s0", 32)
    ]  # fmt: skip
    print_status(sweep)
    assert "best: lr0.003-s0, distance 62.5, nfe 16" in capsys.readouterr().out


def test_flops_are_an_objective(search_file):
    flops = ["search.trials=1", "search.objectives=[fd_digits,tflops]"]
    with open_queue(search_file, *flops) as queue:
        [trial] = queue.claim().trials
        finish(trial.cell)
        queue.complete(trial)
        assert trials(search_file, *flops)[0].values[1] == pytest.approx(16e-6)


def test_an_objective_that_was_not_measured_fails_and_says_what_was(search_file):
    with open_queue(search_file, "search.objectives=[fid]", "search.trials=1") as queue:
        [trial] = queue.claim().trials
        train(trial.cell)
        append_point(trial.cell.run, point(trial.cell.config, 16))
        queue.complete(trial)
        assert queue.cell_statuses()[trial.cell.key].reason == "search.objectives: no fid was measured, but fd_digits"


def test_a_pruner_ends_hopeless_trials_early_by_their_previews(search_file, monkeypatch):
    # The driver must see the preview of each of these short trials: the pruner learns from them.
    monkeypatch.setattr("madformer.sweep.driver._SECONDS_BETWEEN_QUERIES", 0.05)
    monkeypatch.setattr("madformer.sweep.driver._POLL_SECONDS", 0.1)
    monkeypatch.setenv("TRIAL_SECONDS", "0.4")
    median = ["search.pruner=median", "evaluation.preview_every=5", "evaluation.preview_nfe=16", "search.trials=7", "workers=1"]
    storage = Storage(load_sweep(search_file, median))
    for lr in (0.003, 0.004, 0.005, 0.006, 0.007, 0.9, 0.002):
        params = {"optimizer.lr": lr, "model.width": 32, "optimizer.betas": "[0.9,0.95]"}
        storage.study.enqueue_trial(params)
    storage.close()
    wide = "search.space.optimizer.lr={low: 1.0e-4, high: 1.0, log: true}"
    status, lines = run(search_file, wide, *median)
    assert status == 0
    states = [trial.state for trial in trials(search_file, wide, *median)]
    assert Counter(states) == {TrialState.COMPLETE: 6, TrialState.PRUNED: 1} and states[5] == TrialState.PRUNED
    ended = [line for line in lines if "ended early, others are better" in line]
    assert len(ended) == 1 and ended[0].startswith("lr0.9-width32")
    assert journal("interrupted") == ["interrupted lr0.9-width32-betas0.9x0.95-s0"]


def test_a_pruner_needs_previews(search_file):
    with pytest.raises(ConfigError, match=r"search.pruner = 'median': it judges by previews: set evaluation.preview_every"):
        load_sweep(search_file, ["search.pruner=median", "overrides.evaluation.preview_every=null"])


def test_previews_are_reported_once_each(search_file):
    with open_queue(search_file, "search.pruner=median", "evaluation.preview_nfe=16") as queue:
        [trial] = queue.claim().trials
        train(trial.cell)
        for step, value in ((5, 3.0), (10, 2.0)):
            append_preview(trial.cell.run, step, {"fd_digits": value, "fd_other": 7.0})
            assert not queue.should_prune(trial) and not queue.should_prune(trial)
        assert trials(search_file)[0].intermediate_values == {5: 3.0, 10: 2.0}


def test_another_space_needs_another_name(search_file):
    with open_queue(search_file) as queue:
        queue.claim()
    with open_queue(search_file, "search.space.optimizer.betas=[[0.5, 0.5]]") as queue:
        message = (
            "search.space: the study was begun with another one (CategoricalDistribution does not support dynamic value space.)"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            queue.claim()


def test_a_study_of_another_number_of_objectives_is_not_touched(search_file):
    Storage(load_sweep(search_file)).close()
    with pytest.raises(InputError, match="the study small has 1 objectives, not 2; give the sweep another name"):
        Storage(load_sweep(search_file, ["search.objectives=[distance,tflops]"]))
