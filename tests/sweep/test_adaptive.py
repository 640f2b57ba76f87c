"""Sweeps that decide: which cells are wanted follows from what was measured, and from nothing else."""

import json
import random
import shutil

import pytest

from madformer.config import write_config
from madformer.errors import ConfigError, InputError
from madformer.evaluation.record import append_point, read_points, record_path
from madformer.report.tables import build_report
from madformer.report.write import curves_of, document
from madformer.runs.checkpoints import checkpoint_path
from madformer.sweep.adaptive import assess, contrasts_of, wanted_cells
from madformer.sweep.cells import sweep_cells
from madformer.sweep.driver import run_sweep
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.status import print_json, print_plan, print_status
from tests.conftest import ROOT
from tests.sweep.driver import stand_ins
from tests.sweep.trial import point

SWEEP = f"""
name: deciding
experiment: {ROOT}/experiments/digits.yaml
overrides: {{trainer.max_steps: 10, evaluation.num_samples: 8, evaluation.held_out_split: null}}
grid: {{model.diffusion_depth: [2, 4, 8]}}
evaluate: {{nfe: [16, 24]}}
decide:
  contrasts: {{model.diffusion_depth: 4}}
  metric: fd_digits
  nfe: [16]
  margin: 1.0
  seeds: {{first: 3, most: 6}}
"""


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deciding.yaml"
    path.write_text(SWEEP)
    return path


def load(sweep_file, *overrides):
    return load_sweep(sweep_file, overrides)


def measure(cell, value, **changes):
    """What training and an evaluation leave."""
    write_config(cell.config, cell.run)
    checkpoint_path(cell.run, cell.max_steps).parent.mkdir(exist_ok=True)
    checkpoint_path(cell.run, cell.max_steps).touch()
    for nfe in cell.budgets:
        append_point(cell.run, point(cell.config, nfe, metrics={"fd_digits": value, "kid_digits": 1.0}, **changes))


def names(sweep):
    return [cell.name for cell in wanted_cells(sweep)]


def states(sweep):
    return {contrast.label: decision.state for contrast, decision in assess(sweep).decisions.items()}


def values(cell, noise=0.1):
    """D = 2 is 5 better than D = 4, and D = 8 is level with it; seeds scatter together by more than that."""
    scatter = random.Random(repr((cell.axes, cell.seed))).gauss(0, noise)
    return 50 + 10 * cell.seed - 5 * (cell.axes["model.diffusion_depth"] == 2) + scatter


def test_seeds_are_added_only_where_a_contrast_is_undecided(sweep_file):
    sweep = load(sweep_file)
    assert len(sweep_cells(sweep)) == 18 and names(sweep) == [f"d{d}-s{s}" for d in (2, 4, 8) for s in (0, 1, 2)]
    for cell in wanted_cells(sweep):
        if cell.name != "d8-s2":
            measure(cell, values(cell))
    assert states(sweep) == {"d2 minus d4 at NFE 16": "different", "d8 minus d4 at NFE 16": "undecided"}
    assert len(names(sweep)) == 9, "a contrast waits for the seeds that it has asked for"
    measure(sweep_cells(sweep)[14], values(sweep_cells(sweep)[14], noise=0) + 3)
    assert names(sweep)[3:] == ["d4-s0", "d4-s1", "d4-s2", "d4-s3", "d8-s0", "d8-s1", "d8-s2", "d8-s3"]
    while new := [cell for cell in wanted_cells(sweep) if not read_points(cell.run)]:
        for cell in new:
            measure(cell, values(cell))
    assert names(sweep)[:4] == ["d2-s0", "d2-s1", "d2-s2", "d4-s0"], "what is decided takes no more seeds"
    assert names(sweep)[-1] == "d8-s5" and states(sweep)["d8 minus d4 at NFE 16"] == "undecided"
    assert assess(sweep).lines[1].endswith("after 6 seeds, at the limit")


def test_level_designs_are_equal_within_the_margin_and_without_one_never(sweep_file):
    sweep = load(sweep_file)
    for cell in sweep_cells(sweep):
        measure(cell, values(cell, noise=0.02))
    assert states(sweep) == {"d2 minus d4 at NFE 16": "different", "d8 minus d4 at NFE 16": "equal"}
    assert len(names(sweep)) == 9, "seeds that are there already are not asked for"
    assert states(load(sweep_file, "decide.margin=null"))["d8 minus d4 at NFE 16"] == "undecided"
    assert len(names(load(sweep_file, "decide.margin=null"))) == 15


def test_the_same_records_want_the_same_cells_in_any_order_of_arrival(sweep_file):
    sweep, orders = load(sweep_file, "decide.margin=null"), []
    for seed in range(3):
        shutil.rmtree("runs", ignore_errors=True)
        generator = random.Random(seed)
        while new := [cell for cell in wanted_cells(sweep) if not record_path(cell.run).exists()]:
            cell = generator.choice(new)
            measure(cell, values(cell, noise=4))
        orders.append((names(sweep), assess(sweep).lines))
    assert orders[0] == orders[1] == orders[2]


def test_all_pairs_of_designs_and_the_depths_of_an_elastic_run(sweep_file):
    pairs = [contrast.label for contrast in contrasts_of(load(sweep_file, "decide.contrasts=all", "decide.nfe=[]"))]
    assert pairs == [f"{pair} at NFE {nfe}" for pair in ("d2 minus d4", "d2 minus d8", "d4 minus d8") for nfe in (16, 24)]
    elastic = ["grid={}", "variants={e: {model.elastic_depths: [2, 4, 8]}}", "evaluate.diffusion_depths=[2,4]"]
    sweep = load(sweep_file, *elastic, "decide.contrasts={evaluate.diffusion_depth: 4}")
    assert [contrast.label for contrast in contrasts_of(sweep)] == ["e · D = 2 minus e · D = 4 at NFE 16"]
    for cell in wanted_cells(sweep):
        for depth in (2, 4):
            steps = {2: 5, 4: 3}[depth]
            measure(cell, 10.0 * depth + cell.seed, diffusion_depth=depth, steps=steps)
    assert states(sweep) == {"e · D = 2 minus e · D = 4 at NFE 16": "different"} and len(names(sweep)) == 3


def test_hours_end_the_adding_of_seeds(sweep_file):
    few = load(sweep_file, "decide.hours=1e-9", "decide.margin=null")
    for cell in wanted_cells(few):
        measure(cell, values(cell))
    assert len(names(few)) == 9 and assess(few).is_too_long
    assert len(names(load(sweep_file, "decide.hours=1e9", "decide.margin=null"))) == 11


def test_tied_axes_and_lists_are_compared_too_and_every_design_has_its_first_seeds(sweep_file):
    tied = ["grid={}", "zip={model.unet.channels: [[16], [8]], model.width: [32, 16]}", "decide.nfe=[16]"]
    sweep = load(sweep_file, *tied, "decide.contrasts={model.unet.channels: [16]}")
    assert [contrast.label for contrast in contrasts_of(sweep)] == ["channels8-width16 minus channels16-width32 at NFE 16"]
    alone = load(sweep_file, "exclude=[{model.diffusion_depth: [8]}]", "decide.contrasts={model.diffusion_depth: 4}")
    assert len(names(alone)) == 6
    beside = ["grid={}", "variants={a: {}, b: {model.diffusion_depth: 2}, c: {model.elastic_depths: [2, 4]}}"]
    sweep = load(sweep_file, *beside, "evaluate.diffusion_depths=[2,4]", "decide.contrasts={evaluate.diffusion_depth: 4}")
    assert names(sweep) == [f"{name}-s{seed}" for name in "abc" for seed in range(3)], "compared or not"


def test_an_unreadable_run_stops_its_own_contrasts_alone(sweep_file):
    sweep = load(sweep_file)
    for cell in wanted_cells(sweep):
        measure(cell, values(cell, noise=0.02))
    record_path(sweep_cells(sweep)[0].run).write_text("no JSON\n")
    assert states(sweep) == {"d2 minus d4 at NFE 16": "undecided", "d8 minus d4 at NFE 16": "equal"}


def test_hours_count_what_is_wanted_and_do_not_take_back_what_has_begun(sweep_file):
    sweep = load(sweep_file, "decide.margin=null")
    for cell in wanted_cells(sweep):
        measure(cell, values(cell))
    [one, *_] = [cell for cell in wanted_cells(sweep) if cell.seed == 3]
    write_config(one.config, one.run)
    for cell in [cell for cell in wanted_cells(sweep) if cell.seed == 3]:
        path = checkpoint_path(cell.run, 5)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [cell.seed for cell in wanted_cells(load(sweep_file, "decide.margin=null", "decide.hours=1e-9"))].count(3) == 2


def test_a_branch_s_seeds_bring_no_longer_design_with_them(sweep_file):
    """A trunk that nobody compares any more is not trained for its branches."""
    fixed = "overrides={optimizer.warmup_steps: 2, evaluation.num_samples: 8, evaluation.held_out_split: null}"
    axes = ["grid={trainer.max_steps: [20, 40, 4000]}", fixed, "decide.margin=null"]
    sweep = load(sweep_file, *axes, "decide.contrasts={trainer.max_steps: 20}")
    for cell in wanted_cells(sweep):
        offset = {20: 0, 40: random.Random(cell.seed).gauss(0, 3), 4000: -50}[cell.max_steps]
        measure(cell, 60 + offset + random.Random(f"{cell.seed} {cell.max_steps}").gauss(0, 0.1))
    more = [cell.name for cell in wanted_cells(sweep) if cell.seed == 3]
    assert more == ["max_steps20-s3", "max_steps40-s3"]
    assert [cell.trunk and cell.trunk.name for cell in wanted_cells(sweep) if cell.seed == 3] == ["max_steps40-s3", None]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[0,1]", "seeds = [0, 1]: seeds are added until all is decided: set decide.seeds.first and decide.seeds.most"),
        ("decide.alpha=2", "decide.alpha = 2.0: must be between 0 and 1"),
        ("decide.seeds.most=1", "decide.seeds.most = 1: must be at least first (3)"),
        ("decide.contrasts=none", "decide.contrasts = 'none': must be all, or name a value"),
        ("decide.contrasts.model.diffusion_depth=3", "decide.contrasts.model.diffusion_depth = 3: must be one of [2, 4, 8]"),
        ("decide.contrasts.model.width=3", "decide.contrasts = 'model.width': must be an axis of the sweep"),
        ("decide.sampling=tuned", "decide.sampling = 'tuned': needs tuned samplings: set evaluate.tune=true"),
        ("decide.nfe=[16,17]", "decide.nfe = 17: no two designs are evaluated at it: set evaluate.nfe"),
        ("decide.metric=fid", "decide.metric = 'fid': needs the network inception in evaluation.feature_networks = ['digits']"),
        ("decide.metric=loss", "decide.metric = 'loss': must be distance, or a metric such as fid or fd_digits"),
        (
            "decide.metric=memorisation_digits",
            "decide.metric = 'memorisation_digits': must be distance, or a metric such as fid",
        ),
        ("evaluate.checkpoints=last5", "evaluate.checkpoints = 'last5': set it to newest, with decide"),
    ],
)
def test_what_cannot_be_decided(sweep_file, override, message):
    with pytest.raises(ConfigError) as error:
        load(sweep_file, override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_metric_that_is_not_measured(sweep_file):
    sweep = load(sweep_file, "decide.metric=fd_mine")
    measure(sweep_cells(sweep)[0], 1.0)
    measure(sweep_cells(sweep)[6], 1.0)
    with pytest.raises(InputError, match="decide.metric = fd_mine: not measured; there are fd_digits, kid_digits"):
        assess(sweep)


def test_a_report_names_the_decisions(sweep_file):
    sweep = load(sweep_file)
    for cell in wanted_cells(sweep):
        measure(cell, values(cell, noise=0.02))
    report = build_report(*curves_of([sweep_file])[:2], decided=assess(sweep))
    start, decisions = report.markdown().split("\n\n")[1:3]
    assert start.startswith("**Decided by the sweep**") and "- d8 minus d4 at NFE 16: equal" in decisions
    assert document(report)["decisions"][1]["state"] == "equal" and document(report)["reference"] == "d4"


def test_a_driver_goes_on_until_all_is_decided(sweep_file, capsys):
    """The stand-ins measure 1000 / NFE whatever the depth: differences are zero, which is within the margin."""
    lines = []
    sweep = load(sweep_file, "workers=3")
    print_plan(sweep)
    assert "Some 9 runs in all, until everything is decided or at its limit." in capsys.readouterr().out
    assert run_sweep(sweep, commands=stand_ins, say=lines.append) == 0
    assert lines[-2:] == [f"  d{depth} minus d4 at NFE 16: equal, +0 (+0 to +0) after 3 seeds" for depth in (2, 8)]
    assert "deciding: 9 of 9 cells are done" in lines
    assert run_sweep(load(sweep_file, "decide.margin=null", "workers=3"), commands=stand_ins, say=lines.append) == 0
    assert "deciding: 18 of 18 cells are done" in lines and "undecided" in lines[-1] and "at the limit" in lines[-1]
    print_status(load(sweep_file))
    assert "d8 minus d4 at NFE 16: equal" in capsys.readouterr().out
    print_json(load(sweep_file))
    found = {"one": "d8", "reference": "d4", "nfe": 16, "state": "equal", "seeds": 3, "difference": 0.0}
    assert json.loads(capsys.readouterr().out)["contrasts"][1] == {**found, "interval": [0.0, 0.0], "expected_seeds": 0}
