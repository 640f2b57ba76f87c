"""Elastic runs: each training step draws its diffusion depth, and each depth is a model that is sampled like a fixed one."""

import itertools
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

from madformer.config import config_hash, load_run, wanted_outputs
from madformer.config.experiment import LossConfig, check_elastic, check_losses
from madformer.config.model import TextConfig
from madformer.errors import ConfigError
from madformer.evaluation.measurement import Sampling
from madformer.evaluation.record import find_tuning, read_points, run_curves, tuned_curves
from madformer.evaluation.sampling import sample_batches
from madformer.model import MADFormer, cost, memory
from madformer.runs.checkpoints import checkpoint_path, load_model
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.needs import cell_needs, cell_points
from madformer.sweep.trial import trial_commands
from madformer.training.module import draw_depth, unused_parameters
from tests.conftest import build, latents, timesteps, tiny
from tests.tiny_runs import DIGITS, TINY, command, differences, perform, run_until, scalars, tiny_run, train_command

DEPTHS = (1, 2, 3)
ELASTIC = "model.elastic_depths=[3,1,2]"
LAST = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    perform(train_command(folder, ELASTIC))
    return folder / "digits"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "digits")


def evaluate(run, *arguments, status=0):
    return perform(command("evaluate", run, *arguments), status)


def test_a_depth_is_drawn_for_each_step_by_seed_and_step_alone(tmp_path):
    config, other = tiny_run(tmp_path, ELASTIC), tiny_run(tmp_path, ELASTIC, "seed=1", "data.batch_size_per_device=2")
    drawn = [draw_depth(config, step) for step in range(3000)]
    assert drawn == [draw_depth(replace(other, seed=0), step) for step in range(3000)]
    assert drawn != [draw_depth(other, step) for step in range(3000)]
    assert sorted(Counter(drawn)) == [1, 2, 3] and all(900 < count < 1100 for count in Counter(drawn).values())


def test_a_step_is_that_of_a_model_of_the_drawn_depth(tmp_path):
    """The same losses and gradients, bit for bit, from the same weights."""
    for depth in DEPTHS:
        elastic, fixed = tiny(elastic_depths=DEPTHS), tiny(diffusion_depth=depth)
        one, other = build(elastic), build(fixed)
        other.load_state_dict(one.state_dict())
        arguments = (latents(elastic), latents(elastic, seed=5), timesteps(elastic))
        outputs = [one(*arguments, diffusion_depth=depth), other(*arguments)]
        for name in ("denoised_BLCYX", "condition_BLCYX", "clean_tower_BLCYX"):
            assert torch.equal(*(getattr(out, name) for out in outputs)), name
            for out in outputs:
                getattr(out, name).sum().backward(retain_graph=True)
        gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (one, other)]
        assert all(
            torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0] if gradients[0][name] is not None
        )
        assert {name for name, g in gradients[0].items() if g is None} == {
            name for name, g in gradients[1].items() if g is None
        }


def test_training_takes_the_drawn_depth_for_all_micro_batches_of_a_step(tmp_path, monkeypatch):
    seen = []
    forward = MADFormer.forward

    def spy(self, *args, diffusion_depth=None, **options):
        seen.append(diffusion_depth)
        return forward(self, *args, diffusion_depth=diffusion_depth, **options)

    monkeypatch.setattr(MADFormer, "forward", spy)
    short = ("trainer.max_steps=6", "data.batch_size_per_device=8", "evaluation.preview_every=null")
    perform(train_command(tmp_path, ELASTIC, *short))
    config = load_run(tmp_path / "digits")
    assert seen == [depth for step in range(6) for depth in [draw_depth(config, step)] * 2]


def test_killed_and_resumed_is_uninterrupted(trained, tmp_path):
    run = tmp_path / "digits"
    status, printed = run_until(train_command(tmp_path, ELASTIC), checkpoint_path(run, 12).exists, tmp_path / "log")
    assert status == -signal.SIGKILL, printed
    assert "resuming after step" in perform(command("train", "--resume", run))
    assert {tag for tag in scalars(run) if tag.startswith("loss_depth/")} == {f"loss_depth/{depth}" for depth in DEPTHS}
    assert differences(*(torch.load(checkpoint_path(each, LAST), weights_only=True) for each in (trained, run))) == []
    assert scalars(run) == scalars(trained)


def test_the_default_depth_makes_no_new_run(trained, tmp_path):
    one, other = (tiny_run(tmp_path, ELASTIC, f"model.diffusion_depth={depth}") for depth in (2, 3))
    assert config_hash(one) == config_hash(other) != config_hash(tiny_run(tmp_path))
    assert one.model.elastic_depths == DEPTHS, "the order does not count"
    assert load_run(trained, ["model.diffusion_depth=1"]).model.diffusion_depth == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.elastic_depths=[2]"], "model.elastic_depths = [2]: must be empty, or several different depths in 1..3"),
        (["model.elastic_depths=[2,4]"], "model.elastic_depths = [2, 4]: must be empty, or several different depths in 1..3"),
        (["model.elastic_depths=[2,2]"], "model.elastic_depths = [2, 2]: must be empty"),
        (["model.elastic_depths=[1,3]"], "model.diffusion_depth = 2: must be one of model.elastic_depths = [1, 3]"),
        ([ELASTIC, "model.use_condition=false", "loss.lambda_hidden=0"], "set model.use_condition=true, or leave it empty"),
        ([ELASTIC, "model.local_denoising=true"], "set model.local_denoising=false, or leave it empty"),
    ],
)
def test_what_cannot_be_elastic(overrides, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny_run(tmp_path, *overrides)
    assert message in str(error.value)


def test_all_depths_train_the_same_parameters_or_are_refused():
    """DistributedDataParallel waits for each gradient."""
    legal = set()
    choices = (True, False), (True, False), (True, False), ("separate", "shared"), (None, TextConfig(5, 2, 0, 0.1))
    names = ("use_clean_blocks", "use_condition", "local_denoising", "parameter_sets", "text")
    for values, hidden, tower in itertools.product(itertools.product(*choices), (0, 0.1), (0, 0.1)):
        switches, loss = dict(zip(names, values, strict=True)), LossConfig(1.0, 5.0, hidden, tower)
        config = tiny(elastic_depths=DEPTHS, **switches)
        try:
            check_losses(config, loss)
            check_elastic(config, loss)
        except ConfigError:
            continue
        legal.add(values[:4])
        with torch.device("meta"):
            model = MADFormer(config)
        unused = []
        for depth in DEPTHS:
            model.config = config.at_depth(depth)
            unused.append({id(parameter) for parameter in unused_parameters(model, wanted_outputs(loss))})
        assert unused[0] == unused[1] == unused[2], (switches, loss)
    assert len(legal) == 8, "all with the condition"


def test_each_depth_is_sampled_as_a_model_of_fixed_depth(trained):
    config = load_run(trained)
    model = load_model(checkpoint_path(trained, LAST), config)
    for depth in DEPTHS:
        sampling = Sampling.of_nfe(config, 5, depth=depth)
        fixed = replace(config, model=replace(config.model, diffusion_depth=depth, elastic_depths=()))
        alone = load_model(checkpoint_path(trained, LAST), fixed)
        samples = [
            torch.cat(list(sample_batches(each, settings, how, range(4))))
            for each, settings, how in ((model, config, sampling), (alone, fixed, Sampling.of_nfe(fixed, 5)))
        ]
        assert torch.equal(*samples)
        assert (sampling.steps, sampling.nfe) == ((5 - (3 - depth)) // depth, 5)


def test_costs_are_a_mean_over_depths_and_memory_is_the_most():
    config = replace(tiny(elastic_depths=DEPTHS), depth=3)
    flops = [cost.training_flops(config.at_depth(depth), draws=3).total for depth in DEPTHS]
    assert cost.training_flops(config, draws=3).total == pytest.approx(sum(flops) / 3, abs=3) and len(set(flops)) == 3
    needed = [memory.training_memory(config.at_depth(depth), 2, draws=3).total for depth in DEPTHS]
    assert memory.training_memory(config, 2, draws=3).total == max(needed) > min(needed)


def test_depths_are_an_axis_of_evaluations(run):
    evaluate(run, "--diffusion-depth", "1,3", "--nfe", "3,5")
    evaluate(run, "--nfe", "5")
    points = read_points(run)
    assert [(p["diffusion_depth"], p["nfe"], p["steps"]) for p in points] == [
        (1, 3, 1),
        (1, 5, 3),
        (3, 3, 1),
        (3, 5, 1),
        (2, 5, 2),
    ]
    assert {p["nfe_actual"] for p in points[2:4]} == {3} and points[0]["tflops_per_image"] < points[1]["tflops_per_image"]
    assert [(curve.sampling.diffusion_depth, list(curve.points)) for curve in run_curves(run)][:2] == [(1, [3, 5]), (3, [3, 5])]
    tags = {tag for tag in scalars(run) if tag.startswith("fd_digits_vs_nfe")}
    assert tags == {"fd_digits_vs_nfe/D = 1", "fd_digits_vs_nfe/D = 3", "fd_digits_vs_nfe/D = 2"}
    again = evaluate(run, "--diffusion-depth", "3", "--nfe", "5")
    assert again.count("recorded before") == 1 and "D = 3" in again
    assert "--diffusion-depth 1 " in points[0]["command"]


def test_depths_are_tuned_and_sampled_each_for_itself(run, tmp_path):
    perform(command("tune", run, "--diffusion-depth", "1,3", "--nfe", "5", "--tries", "2"))
    choices = {depth: find_tuning(run, 5, depth) for depth in DEPTHS}
    assert choices[2] is None and [choices[depth]["sampling"]["diffusion_depth"] for depth in (1, 3)] == [1, 3]
    assert [curve.sampling.diffusion_depth for curve in tuned_curves(run)] == [1, 3]
    assert (choices[1]["steps"], choices[3]["steps"]) == (3, 1)
    before = len(read_points(run))
    perform(command("tune", run, "--diffusion-depth", "1,3", "--nfe", "5", "--tries", "2"))
    assert len(read_points(run)) == before, "known choices are kept"
    assert "madformer tune" in evaluate(run, "--tuned", "--nfe", "5", status=2), "the default depth is not tuned"
    assert "D = 3" in evaluate(run, "--tuned", "--nfe", "5", "--diffusion-depth", "3")
    perform(command("sample", run, "--out", tmp_path / "out", "--num", "2", "--nfe", "5", "--diffusion-depth", "1"))
    assert "3 steps" in perform(
        command("sample", run, "--out", tmp_path / "out", "--num", "2", "--nfe", "5", "--diffusion-depth", "1")
    )
    clash = command("sample", run, "--out", tmp_path / "out", "--num", "2", "--nfe", "5", "--diffusion-depth", "3")
    assert "made in another way" in perform(clash, status=2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("--nfe", "5", "evaluation.nfe=[5,2000]"),
        ("--nfe", "5", "evaluation.preview_nfe=2000"),
        ("--steps", "3", "evaluation.nfe=[7]", "evaluation.spacing=list:999/500/0", "evaluation.preview_every=null"),
    ],
)
def test_a_depth_is_not_held_to_budgets_of_other_depths(overrides, run):
    """They are legal at the default depth, 2, and not at depth 1."""
    evaluate(run, "--diffusion-depth", "1", *overrides)
    assert [point["diffusion_depth"] for point in read_points(run)] == [1]


def test_a_search_over_the_depths_of_elastic_runs_is_refused(tmp_path):
    text = f"experiment: {DIGITS}\noverrides: {{model.elastic_depths: [2, 4]}}\n"
    text += "search: {space: {model.diffusion_depth: [2, 4]}, nfe: [16]}\n"
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(ConfigError, match="search.space.model.diffusion_depth = .*: an elastic run serves all its depths"):
        load_sweep(tmp_path / "search.yaml")


def test_a_depth_that_was_not_trained_is_refused(run):
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    assert "diffusion depth 4: not trained; the run has 1, 2, 3" in evaluate(run, "--diffusion-depth", "1,4", status=2)
    assert not read_points(run)


def test_a_report_has_a_curve_for_each_depth(run, tmp_path):
    evaluate(run, "--diffusion-depth", "1,2,3", "--nfe", "3,5")
    perform(command("report", run, "--out", tmp_path / "report"))
    header, *lines = (tmp_path / "report/report.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[::2]] == [f"digits · D = {depth}" for depth in DEPTHS]
    assert "diffusion_depth" in header.split(",")


def test_elastic_and_separate_cells_in_one_sweep(trained, tmp_path, monkeypatch):
    """Elastic cells have all depths of the sweep, others their own; steps give each depth its own budget."""
    monkeypatch.chdir(tmp_path)
    text = f"""
experiment: {DIGITS}
overrides: {{{", ".join(field.replace("=", ": ", 1) for field in TINY if not field.startswith(("model.diffusion", "evaluation.nfe")))}}}
variants: {{d1: {{model.diffusion_depth: 1}}, elastic: {{model.elastic_depths: [1, 2, 3], model.diffusion_depth: 2}}}}
evaluate: {{steps: [2], nfe: [5], diffusion_depths: [1, 3]}}
"""
    (tmp_path / "sweep.yaml").write_text(text)
    fixed, elastic = sweep_cells(load_sweep(tmp_path / "sweep.yaml"))
    assert [(s.diffusion_depth, s.nfe, s.steps) for s in fixed.samplings] == [(None, 5, 3), (None, 4, 2)]
    assert [(s.diffusion_depth, s.nfe, s.steps) for s in elastic.samplings] == [(1, 5, 3), (1, 4, 2), (3, 5, 1), (3, 6, 2)]
    shutil.copytree(trained, elastic.run)
    with pytest.raises(ConfigError, match="diffusion depth 4: not trained"):
        sweep_cells(load_sweep(tmp_path / "sweep.yaml", ["evaluate.diffusion_depths=[1,4]"]))
    assert str(cell_needs(elastic)) == "to evaluate at 5, 4, 6" and cell_needs(elastic).points == 4
    commands = trial_commands(elastic)
    assert [part[part.index("--nfe") :][:4] for part in commands] == [
        ["--nfe", "5,4", "--diffusion-depth", "1"],
        ["--nfe", "5,6", "--diffusion-depth", "3"],
    ]
    for each in commands:
        perform(each, cwd=tmp_path)
    assert cell_needs(elastic).is_done and len(cell_points(elastic)) == 4
    perform(command("tune", tmp_path / "sweep.yaml", "--tries", "1"), cwd=tmp_path)
    assert [find_tuning(elastic.run, nfe, depth) is not None for depth in (1, 2, 3) for nfe in (4, 5, 6)] == [
        *(True, True, False),
        *(False, False, False),
        *(False, True, True),
    ]
