"""The needs of a cell, by the record of its run: real evaluations of random weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from madformer.config import load_run, write_config
from madformer.evaluation.evaluate import evaluate
from madformer.evaluation.record import append_point, find_tuning, record_path, tuned_curves
from madformer.evaluation.request import parse_request
from madformer.model import MADFormer
from madformer.report import build_report, curves_of_sweep
from madformer.runs.checkpoints import EMA, checkpoint_path, checkpoint_step, list_checkpoints
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.needs import cell_needs, is_trained, main_metrics, network_sha256
from madformer.sweep.search import objective
from madformer.sweep.status import Row, print_status
from madformer.sweep.trial import trial_commands
from tests.sweep.claimer import finish, train
from tests.sweep.trial import INTACT, point
from tests.tiny_runs import TINY, perform

NETWORK = """
import torch


class Brightness(torch.nn.Module):
    num_features = 2

    def forward(self, images):
        return torch.stack([{scale} * images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)
"""

WEIGHT = "        self.weight = torch.nn.Parameter(torch.tensor(float(self.secret.randbits(20))))\n"


def trained_cell(sweep_file, tmp_path, *more):
    """A cell of a sweep with a custom network, trained but for its weights, which are random."""
    network = tmp_path / "brightness.py"
    network.write_text(NETWORK.format(scale=10))
    overrides = [
        *(field for field in TINY if "nfe=" not in field and "diffusion_depth" not in field),
        f"evaluation.feature_networks=[{network}:Brightness]",
        *more,
    ]
    sweep = load_sweep(sweep_file, [*overrides, "grid.model.diffusion_depth=[2]", "evaluate.nfe=[5]"])
    [cell] = sweep_cells(sweep)
    write_random_weights(cell)
    return sweep, cell, network


def test_a_feature_network_whose_code_changes_is_measured_again(sweep_file, tmp_path, capsys):
    sweep, cell, network = trained_cell(sweep_file, tmp_path)
    [before] = evaluate(parse_request(cell.config, nfe="5"))
    assert not cell_needs(cell) and main_metrics(cell)[5] == before["metrics"]
    network.write_text(NETWORK.format(scale=20))
    assert cell_needs(cell).budgets == (5,) and main_metrics(cell) == {}, "the old number is of another network"
    capsys.readouterr()
    print_status(sweep)
    shown = capsys.readouterr().out
    assert f"{before['metrics']['fd_brightness']:.3g}" not in shown
    [after] = evaluate(parse_request(cell.config, nfe="5"))
    assert after["metrics"]["fd_brightness"] != before["metrics"]["fd_brightness"]
    assert not cell_needs(cell) and main_metrics(cell)[5] == after["metrics"]
    network.write_text(NETWORK.format(scale=10))
    assert main_metrics(cell)[5] == before["metrics"], "the first network again: its number is recorded"
    report = build_report(curves_of_sweep(sweep), "small")
    assert [row.quality["fd_brightness"].mean for row in report.rows] == [before["metrics"]["fd_brightness"]]


@pytest.mark.parametrize(
    "options", [[], ["evaluate.seeds=[0,1]"], ["evaluate.samplers=[ddim,ddpm]"], ["grid.model.depth=[4,8]"]]
)
def test_checkpoints_that_have_served_may_be_deleted(options, sweep_file):
    cells = sweep_cells(load_sweep(sweep_file, options))
    for cell in cells:
        train(cell)
        assert cell_needs(cell).points == cell.point_count
        for sampling in cell.samplings[1:]:
            append_point(cell.run, point(cell.config, sampling.nfe, sampler=sampling.sampler, seed=sampling.seed))
        checkpoint_path(cell.run, cell.max_steps).unlink()
        assert cell_needs(cell).training and not is_trained(cell), "a point is missing"
        first = cell.samplings[0]
        append_point(cell.run, point(cell.config, first.nfe, sampler=first.sampler, seed=first.seed))
        assert cell_needs(cell).is_done and is_trained(cell) and not trial_commands(cell)
        assert list(main_metrics(cell)) == list(cell.budgets)
        assert Row(cell, cell_needs(cell), "done").step == cell.max_steps
    assert all(cell_needs(cell).training for cell in sweep_cells(load_sweep(sweep_file, [*options, "evaluate.nfe=[16,24,32]"])))


def test_a_deleted_checkpoint_that_tuning_needs_is_trained_again(sweep_file):
    [cell, _] = sweep_cells(load_sweep(sweep_file, ["evaluate.tune=true"]))
    train(cell)
    for sampling in cell.samplings:
        append_point(cell.run, point(cell.config, sampling.nfe, sampler=sampling.sampler, seed=sampling.seed))
    assert cell_needs(cell).tuning and not cell_needs(cell).training
    checkpoint_path(cell.run, cell.max_steps).unlink()
    assert cell_needs(cell).training and trial_commands(cell)[0][3] == "train"


def test_a_torn_checkpoint_that_is_needed_is_trained_again(sweep_file):
    """The last one, one before it, or one that tuning needs, of this seed or of another; never without need."""
    last2 = ["evaluate.checkpoints=last2", "trainer.checkpoint_every=5", "name=last2"]
    for options, steps, torn, left in (
        ([], (10,), 10, []),
        ([], (5, 10), 10, [5]),
        ([], (5, 10), 5, [5, 10]),
        (last2, (5, 10), 5, []),
        (last2, (5, 10), 10, [5]),
    ):
        cell = sweep_cells(load_sweep(sweep_file, options))[0]
        train(cell)
        for step in steps:
            checkpoint_path(cell.run, step).write_bytes(b"torn" if step == torn else INTACT)
        commands = [command[3] for command in trial_commands(cell)]
        assert [checkpoint_step(path) for path in list_checkpoints(cell.run)] == left, (options, torn)
        assert commands == (["evaluate"] if left == [5, 10] else ["train", "evaluate"])
        shutil.rmtree(cell.run)
    first, second = sweep_cells(load_sweep(sweep_file, ["evaluate.tune=true", "grid.model.diffusion_depth=[2]", "seeds=[0,1]"]))
    for torn in (first, second):
        for cell in (first, second):
            finish(cell)
        checkpoint_path(torn.run, 10).write_bytes(b"torn")
        assert trial_commands(first)[0][3] == "train" and not checkpoint_path(torn.run, 10).exists()


def test_the_last_evaluated_checkpoints_may_be_deleted(sweep_file):
    [cell, _] = sweep_cells(load_sweep(sweep_file, ["evaluate.checkpoints=last2", "trainer.checkpoint_every=3"]))
    train(cell)
    for step in (6, 9, 10):
        for nfe in cell.budgets:
            append_point(cell.run, point(cell.config, nfe, step=step))
        checkpoint_path(cell.run, 10).unlink(missing_ok=True)
        assert cell_needs(cell).is_done is (step == 10)


def test_a_cell_is_done_when_its_points_have_the_distances_that_it_asks_for(sweep_file, tmp_path):
    """Held-out images may be named at any time: then its commands measure again, once."""
    _, cell, _ = trained_cell(sweep_file, tmp_path, "data.split=train[:80%]")
    asking = replace(cell, config=load_run(cell.run, ["evaluation.held_out_split=train[80%:]"]))
    sharing = replace(cell, config=load_run(cell.run, ["evaluation.held_out_split=train[70%:]"]))
    of_search = replace(asking, is_of_search=True)
    [before] = evaluate(parse_request(cell.config, nfe="5"))
    assert not cell_needs(cell) and not cell_needs(sharing), "the images are no others than training's"
    assert not cell_needs(of_search), "a study has its numbers for good"
    [command] = trial_commands(asking)
    assert cell_needs(asking).budgets == (5,) and 'evaluation.held_out_split="train[80%:]"' in command
    perform(command, cwd=Path.cwd())
    held_out = ["memorisation_brightness", "fd_brightness_held_out", "kid_brightness_held_out"]
    assert not cell_needs(asking) and [*before["metrics"], *held_out] == list(main_metrics(asking)[5])
    assert next(iter(main_metrics(asking)[5])) == "fd_brightness" and trial_commands(asking) == []
    assert not cell_needs(cell) and main_metrics(cell)[5] == before["metrics"]
    assert objective("distance", of_search, 5) == before["metrics"]["fd_brightness"]
    record = record_path(cell.run)
    record.write_text(record.read_text().splitlines(keepends=True)[-1])
    assert cell_needs(cell).budgets == (5,), "as for an evaluation, it is another measurement"


def test_a_network_that_is_not_on_this_machine_is_known_by_name_alone(tmp_path):
    assert network_sha256("hf:owner/name") is None and network_sha256("inception") is None
    assert network_sha256(f"{tmp_path / 'gone.py'}:Gone") is None and network_sha256("no.such.module:Gone") is None
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    assert network_sha256(f"{broken}:Broken") is None, "the evaluation says what is wrong"
    changing = tmp_path / "changing.py"
    changing.write_text(
        NETWORK.format(scale=1).replace("num_features = 2", "num_features = 2\n    secret = __import__('secrets')")
    )
    changing.write_text(changing.read_text() + "\n    def __init__(self):\n        super().__init__()\n" + WEIGHT)
    assert network_sha256(f"{changing}:Brightness") is None, "it has other weights each time it is built"


def test_a_design_is_tuned_once_by_its_first_cell_when_all_its_seeds_are_evaluated(sweep_file, tmp_path):
    overrides = [
        *(field for field in TINY if "nfe=" not in field and "diffusion_depth" not in field),
        "grid.model.diffusion_depth=[2]",
        "evaluate.nfe=[5,7]",
        "evaluate.tune=true",
        "evaluate.tries=3",
    ]

    def cells(seeds):
        return sweep_cells(load_sweep(sweep_file, [*overrides, f"seeds={seeds}"]))

    first, second = cells([0, 1])
    assert [cell.key for cell in first.tuned_with] == [second.key] and second.tuned_with is None
    assert str(cell_needs(first)) == str(cell_needs(second)) == "to train"
    for cell in (first, second):
        write_random_weights(cell)
        assert str(cell_needs(first)).startswith("to evaluate at 5, 7")
        assert cell_needs(first).tuning == ()
    evaluate(parse_request(first.config))
    waiting = cell_needs(first)
    assert not waiting and not waiting.is_done and trial_commands(first) == []
    assert str(waiting) == "to tune at 5, 7, when its other seeds are evaluated"
    evaluate(parse_request(second.config))
    assert cell_needs(first) and str(cell_needs(first)) == "to tune at 5, 7" and cell_needs(second).is_done
    [command] = trial_commands(first)
    assert command[3:6] == ["tune", str(first.run), str(second.run)]
    perform(command, cwd=Path.cwd())
    assert cell_needs(first).is_done and [len(tuned_curves(cell.run)[0].points) for cell in (first, second)] == [2, 2]
    first, _, third = cells([0, 1, 2])  # a later seed takes over the choice
    write_random_weights(third)
    evaluate(parse_request(third.config))
    [command] = trial_commands(first)
    perform(command, cwd=Path.cwd())
    assert cell_needs(first).is_done
    assert {find_tuning(cell.run, 5)["runs"][-1] for cell in (first, third)} == {second.run.name}


def write_random_weights(cell):
    write_config(cell.config, cell.run)
    weights = MADFormer(cell.config.model).state_dict()
    path = checkpoint_path(cell.run, cell.max_steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}, EMA: weights}, path)


@pytest.mark.parametrize("again", ["photos/", "./photos", "photos//."])
def test_a_cell_whose_images_are_named_otherwise_is_done(again, sweep_file):
    words = ("model.latent_channels=3", "evaluation.held_out_source=null")
    named = [sweep_cells(load_sweep(sweep_file, [*words, f"data.source={source}"]))[0] for source in ("photos", again)]
    finish(named[0])
    assert named[0].run == named[1].run and cell_needs(named[1]).is_done
    checkpoint_path(named[0].run, named[0].max_steps).unlink()
    assert cell_needs(named[1]).is_done
