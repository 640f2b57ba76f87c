"""The tables: what a sweep would cost, and how far it is."""

import json
import time

import pytest
from typer.testing import CliRunner

from madformer.cli import app
from madformer.errors import InputError
from madformer.model.cost import nfe
from madformer.progress import with_unit
from madformer.runs.files import append_preview, progress_path
from madformer.sweep.cells import sweep_cells
from madformer.sweep.forecast import training_flops
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.status import print_plan, print_status
from madformer.sweep.trial import Outcome
from tests.sweep.claimer import finish, open_queue, train


def rows(text):
    """Cells of the table's body by the first one."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {line[0]: line[1:] for line in lines[1:]}


def plan(sweep_file, capsys, *overrides, **options):
    print_plan(load_sweep(sweep_file, overrides), **options)
    return capsys.readouterr().out


def test_the_plan_says_what_each_cell_costs_and_what_is_left(sweep_file, capsys):
    three = "grid.model.diffusion_depth=[2,4,8]"
    one, other, _ = sweep_cells(load_sweep(sweep_file, [three]))
    finish(one)
    train(other)
    text = plan(sweep_file, capsys, three)
    table = rows(text)
    assert [table[name][-1] for name in ("d2-s0", "d4-s0", "d8-s0")] == ["done", "to evaluate", "to train"]
    assert [table[name][2].partition(" (")[2] for name in table] == ["5 steps)", "3 steps)", "2 steps)"]
    assert nfe(one.config.model, 5) == 16
    assert "3 cells: 1 to train, 1 to evaluate, 1 done." in " ".join(text.split())


def test_the_plan_names_the_budgets_that_it_skips(sweep_file, capsys):
    text = plan(sweep_file, capsys, "evaluate.nfe=[6,16]", "grid={model.depth: [4, 8]}", "model.diffusion_depth=2")
    assert [row[2] for row in rows(text).values()][1] == "skipped"
    reason = "with model.depth = 8 and model.diffusion_depth = 2 a budget must be in 8..2007"
    assert f"skipped, NFE 6: {reason}: depth8-s0" in text


def hours(text):
    return float(text.split(" CPU-hours, of which")[0].split()[-1])


def test_hours_are_flops_over_what_a_device_does(sweep_file, capsys):
    """One cell, costs from the table: 10 steps of 32 images, 8 samples at each of two budgets."""
    one = "grid.model.diffusion_depth=[8]"
    text = plan(sweep_file, capsys, one, tflops=0.001, mfu=0.5)
    row = rows(text)["d8-s0"]
    [training] = [float(row[1].split()[0]) * {"G": 1e9}[row[1].split()[1]]]
    sampling = sum(float(cell.split()[0]) * 1e6 * 8 for cell in row[2:4])
    assert hours(text) == pytest.approx((training + sampling) / 0.5e9 / 3600, rel=0.02)
    assert "Times assume 0.001 TFLOP/s (the device named) at an MFU of 50%" in text
    assert hours(plan(sweep_file, capsys, one, tflops=0.002, mfu=0.5)) == pytest.approx(hours(text) / 2, rel=0.02)


def test_a_measured_rate_comes_before_an_assumed_one(sweep_file, capsys):
    """One cell has been trained at two steps a second by two processes: the others take as long for as many FLOPs."""
    for cell in sweep_cells(load_sweep(sweep_file))[:1]:
        train(cell)
        entry = {"done": 10, "total": 10, "per_second": 2.0, "time": time.time(), "devices": 2}
        progress_path(cell.run).write_text(json.dumps({"step": entry}))
    text = plan(sweep_file, capsys, "overrides.evaluation.num_samples=2")
    assert "Times by measured rates: each run's own, or those of the others." in text
    # two cells of 10 steps, 10 CPU-seconds each; two samples cost next to nothing
    assert hours(text) == pytest.approx(20 / 3600, rel=0.05)


def test_the_plan_of_a_search_says_what_its_trials_cost(sweep_file, capsys):
    search = "search={space: {model.diffusion_depth: [2, 4, 9]}, nfe: [16], trials: 30}"
    text = plan(sweep_file, capsys, "grid={}", "evaluate={}", search)
    assert "a search of 30 trials by tpe" in text and "model.diffusion_depth: [2, 4, 9]" in text
    legal = int(text.split("drawn at random ")[1].split()[0])
    assert 20 < legal < 64, "a diffusion depth of 9 is not legal"


def test_the_status_says_how_far_each_cell_is(sweep_file, capsys):
    sweep = load_sweep(sweep_file, ["grid.model.diffusion_depth=[1,2,4,8]"])
    with open_queue(sweep) as queue:
        finish(sweep_cells(sweep)[0])
        failed, running = queue.claim(2).trials
        queue.fail(failed, Outcome("failed", "out of memory", "exit status 1\na\nRuntimeError: out of luck [cuda]"))
        train(running.cell)
        append_preview(running.cell.run, 5, {"fd_digits": 123.4})
        entry = {"done": 7, "total": 10, "per_second": 2.5, "time": time.time(), "devices": 1}
        progress_path(running.cell.run).write_text(json.dumps({"step": entry}))
        print_status(sweep)
    text = capsys.readouterr().out
    assert rows(text) == {
        "d1-s0": ["done", "10/10", "", "2/2", "fd_digits 41.67 at NFE 24", ""],
        "d2-s0": ["failed", "0/10", "", "0/2", "", "out of memory: exit status 1"],
        "d4-s0": ["running", "7/10", "2.5 steps/s", "0/2", "fd_digits 123.4 at step 5", ""],
        "d8-s0": ["waiting", "0/10", "", "0/2", "", ""],
    }
    lines = [line.strip() for line in text.splitlines()]
    assert lines[-3:] == ["d2-s0 failed (out of memory), runs/small/d2-s0/log.txt:", "a", "RuntimeError: out of luck [cuda]"]
    # 2.5 steps of 10 a second: 1.2 s are left of the one that runs, 4 s of the one that waits
    assert any(line.startswith("4 cells: 1 done, 1 failed, 1 running, 1 waiting; about 0:00:0") for line in lines)


@pytest.mark.parametrize(
    ("written", "looked_at", "rate"),
    [
        (1, 7201, "silent for 2:00:00"),
        (-7200, 7200, "silent for 2:00:00"),
        (-7200, 5, ""),
        (-9, 100, ""),
        (1, 5, "2.5 steps/s"),
    ],
)
def test_a_run_that_says_nothing_is_shown_to_be_silent(written, looked_at, rate, sweep_file, capsys, monkeypatch):
    """Seconds after the start of its trial. What a former trial wrote is not this one's silence."""
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as queue:
        [trial] = queue.claim(1).trials
        train(trial.cell)
        start = time.time()
        entry = {"done": 7, "total": 10, "per_second": 2.5, "time": start + written, "devices": 1}
        progress_path(trial.cell.run).write_text(json.dumps({"step": entry}))
        monkeypatch.setattr(time, "time", lambda: start + looked_at)
        print_status(sweep)
        monkeypatch.undo()
    assert rows(capsys.readouterr().out)["d2-s0"][2] == rate


@pytest.mark.parametrize("budgets", ["[16,24]", "[16,32]", "[40]"])
def test_a_cell_that_does_not_run_is_not_silent(budgets, sweep_file, capsys, monkeypatch):
    """Its points were recorded by an earlier trial, and its checkpoints are deleted."""
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as queue:
        [trial] = queue.claim(1).trials
        finish(trial.cell)
        queue.complete(trial)
    for path in (trial.cell.run / "checkpoints").iterdir():
        path.unlink()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    print_status(load_sweep(sweep_file, [f"evaluate.nfe={budgets}"]))
    monkeypatch.undo()
    done = budgets == "[16,24]"
    assert rows(capsys.readouterr().out)["d2-s0"][:3] == ["done" if done else "waiting", "10/10" if done else "0/10", ""]


def test_the_trials_of_a_dead_driver_are_waiting(sweep_file, capsys, monkeypatch):
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as queue:
        queue.claim(1)
    print_status(sweep)
    assert rows(capsys.readouterr().out)["d2-s0"][0] == "running"
    monkeypatch.setattr("madformer.sweep.queue.is_dead", lambda owner: True)
    print_status(sweep)
    assert rows(capsys.readouterr().out)["d2-s0"][0] == "waiting"


def test_looking_leaves_nothing_behind(sweep_file, capsys, tmp_path):
    print_status(load_sweep(sweep_file))
    assert rows(capsys.readouterr().out)["d2-s0"][0] == "waiting" and not (tmp_path / "runs").exists()


def test_a_log_is_not_cut(sweep_file, capsys):
    sweep = load_sweep(sweep_file)
    with open_queue(sweep) as queue:
        [trial] = queue.claim(1).trials
        queue.fail(trial, Outcome("failed", "error", "x" * 300))
        print_status(sweep)
    assert "x" * 300 in capsys.readouterr().out


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (999.6, "1 k"), (1234567, "1.23 M"), (6.55e20, "655 E")])
def test_units(number, text):
    assert with_unit(number) == text


def test_plan_and_status_are_the_same_json_document(sweep_file, capsys):
    one, other = sweep_cells(load_sweep(sweep_file))
    finish(one)
    documents = []
    for command in ("plan", "status"):
        result = CliRunner().invoke(app, ["sweep", command, str(sweep_file), "--json"], catch_exceptions=False)
        documents.append(json.loads(result.stdout))
    assert documents[0] == documents[1] and [cell["cell"] for cell in documents[0]["cells"]] == [one.name, other.name]
    done, waiting = documents[0]["cells"]
    assert (done["state"], done["needs"]["budgets"], done["device_seconds_left"]) == ("done", [], 0)
    assert (waiting["state"], waiting["needs"]["training"], waiting["metrics"]) == ("waiting", True, {})
    assert waiting["training_flops"] == training_flops(other.config) and waiting["axes"] == other.axes
    assert [entry["nfe"] for entry in waiting["flops_per_image"]] == list(other.budgets)
    refused = "--json: one sweep at a time, and without --memory"
    with pytest.raises(InputError, match=refused):
        CliRunner().invoke(app, ["sweep", "plan", str(sweep_file), "--json", "--memory", "80"], catch_exceptions=False)
