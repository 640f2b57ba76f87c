"""Reports on sweeps that are not done, and on searches."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from madformer.config import write_config
from madformer.errors import InputError
from madformer.report.write import report_on
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.search import SearchQueue
from madformer.sweep.status import print_status
from madformer.sweep.study import Storage
from tests.conftest import ROOT
from tests.points import point, recorded

BASE = f"experiment: {ROOT}/experiments/digits.yaml\noverrides: {{evaluation.held_out_split: null}}\n"
GRID = f"{BASE}grid: {{model.diffusion_depth: [2, 4]}}\n"
SEARCH = f"{BASE}search: {{space: {{optimizer.lr: [0.1, 0.2]}}, nfe: [16, 32], trials: 6}}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measure(cell, value):
    write_config(cell.config, cell.run)
    recorded(cell.run, *(point(nfe, value) for nfe in (16, 32)))


def test_a_sweep_that_is_not_done_is_reported_on_as_far_as_it_is(here, capsys, caplog):
    (here / "grid.yaml").write_text(GRID)
    with pytest.raises(InputError, match=re.escape("grid: none of 2 cells is evaluated: madformer sweep run does that")):
        report_on(["grid.yaml"], None)
    measure(sweep_cells(load_sweep("grid.yaml"))[1], 30.0)
    report_on(["grid.yaml"], None)
    printed = capsys.readouterr().out
    assert "| d4 |" in printed and "| d2 |" not in printed and (here / "runs/grid/report.csv").is_file()
    assert "1 of 2 cells are not evaluated (d2-s0, ...): madformer sweep run does that" in caplog.text


def test_of_a_pattern_of_runs_those_with_numbers_are_reported_on(here, capsys, caplog):
    (here / "grid.yaml").write_text(GRID)
    first, second = sweep_cells(load_sweep("grid.yaml"))
    write_config(first.config, first.run)
    measure(second, 30.0)
    report_on([str(first.run), str(second.run), str(here)], None)
    assert "30.0" in capsys.readouterr().out and (here / "report/report.csv").is_file()
    assert caplog.messages == [f"{here}: no runs, left out", f"{first.run}: not evaluated, left out"]


def test_seeds_alone_are_one_line_of_the_sweep_s_name_and_its_own_number_of_samples(here, capsys, caplog):
    (here / "three.yaml").write_text(f"{BASE}seeds: [0, 1, 2]\n")
    for cell, value in zip(sweep_cells(load_sweep("three.yaml")), (30.0, 31.0, 32.0), strict=True):
        measure(cell, value)
    recorded(cell.run, point(16, 1.0, num_samples=50_000))
    report_on(["three.yaml"], None)
    assert "| three | 31.0 ± 2.5 | 31.0 ± 2.5 |" in capsys.readouterr().out
    report_on(["three.yaml", "overrides.evaluation.num_samples=50000"], None)
    assert "| three | 1.00 |" in capsys.readouterr().out and "2 of 3 cells are not evaluated" in caplog.text


def test_a_search_is_reported_on_run_by_run(here, capsys):
    (here / "search.yaml").write_text(SEARCH)
    sweep = load_sweep("search.yaml")
    with SearchQueue(sweep, Storage(sweep)) as queue:
        cells = {trial.cell.run: trial.cell for trial in queue.claim(6).trials}
    assert len(cells) == 2, "trials of several budgets share a run"
    for cell in cells.values():
        measure(cell, 40.0)
    report_on(["search.yaml"], None)
    printed = capsys.readouterr().out
    assert "| lr0.1 |" in printed and "| lr0.2 |" in printed


@pytest.mark.parametrize(
    "grid", ["{optimizer.lr: [0.1, 0.2]}", "{model.diffusion_depth: [2, 5]}", "{loss.lambda_hidden: [0.2]}"]
)
def test_another_sweep_of_the_same_name_does_not_overwrite_the_report(grid, here, capsys):
    (here / "grid.yaml").write_text(GRID)
    for cell in sweep_cells(load_sweep("grid.yaml")):
        measure(cell, 30.0)
    report_on(["grid.yaml"], None)
    before = (here / "runs/grid/report.md").read_bytes()
    (here / "more").mkdir()
    (here / "more/grid.yaml").write_text(f"{BASE}grid: {grid}\nname: grid\n")
    for cell in sweep_cells(load_sweep("more/grid.yaml")):
        measure(cell, 20.0)
    with pytest.raises(InputError, match=r"grid/report.json is the report of another sweep of this name, .*/grid.yaml: give"):
        report_on(["more/grid.yaml"], None)
    assert (here / "runs/grid/report.md").read_bytes() == before
    report_on(["more/grid.yaml"], here / "own")
    report_on(["grid.yaml"], None)
    (here / "grid.yaml").rename(here / "moved.yaml")
    report_on(["moved.yaml"], None)


def test_the_sweep_s_folder_has_the_pictures_for_tensorboard_once(here, capsys):
    (here / "grid.yaml").write_text(GRID)
    for cell in sweep_cells(load_sweep("grid.yaml")):
        measure(cell, 30.0)
    for _ in range(2):
        report_on(["grid.yaml"], None, metric="fd_digits")
    events = EventAccumulator(str(here / "runs/grid"), {"images": 0}).Reload()
    assert len(list((here / "runs/grid").glob("events.out.tfevents.*"))) == 1
    assert {tag: len(events.Images(tag)) for tag in events.Tags()["images"]} == {"report": 1, "report-contrasts": 1}
    assert events.Images("report")[0].encoded_image_string == (here / "runs/grid/report.png").read_bytes()
    page = (here / "runs/grid/report.html").read_text()
    assert "<dd>madformer report grid.yaml --metric fd_digits</dd>" in page and "<dd>model.diffusion_depth: 2, 4</dd>" in page
    print_status(load_sweep("grid.yaml"))
    assert "2 cells" in capsys.readouterr().out
    report_on(["grid.yaml"], here / "other")
    assert not list((here / "other").glob("events.out.tfevents.*"))
