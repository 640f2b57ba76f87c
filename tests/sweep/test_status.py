"""The tables: what a sweep would cost, and how far it is."""

import pytest

from madformer.model.cost import nfe
from madformer.sweep.spec import load_sweep
from madformer.sweep.status import print_plan, print_status, with_unit
from madformer.sweep.study import Queue
from tests.sweep.test_study import finish, train


def rows(text):
    """Cells of the table's body by the first one."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {line[0]: line[1:] for line in lines}


def test_the_plan_says_what_each_cell_costs_and_what_is_left(sweep_file, capsys):
    sweep = load_sweep(sweep_file, ["grid.model.diffusion_depth=[2,4,8]"])
    one, other, _ = sweep.cells()
    finish(one)
    train(other)
    print_plan(sweep)
    text = capsys.readouterr().out
    table = rows(text)
    assert [table[name][-1] for name in ("d2-s0", "d4-s0", "d8-s0")] == ["done", "to evaluate", "to train"]
    assert [table[name][2].partition(" (")[2] for name in table] == ["5 steps)", "3 steps)", "2 steps)"]
    assert nfe(one.config.model, 5) == 16
    assert "3 cells: 1 to train, 1 to evaluate, 1 done." in " ".join(text.split())


def test_the_status_says_how_far_each_cell_is(sweep_file, capsys):
    sweep = load_sweep(sweep_file, ["grid.model.diffusion_depth=[1,2,4,8]"])
    with Queue(sweep.folder, sweep.cells()) as queue:
        finish(sweep.cells()[0])
        queue.fail(queue.claim(), "exit status 1\nRuntimeError: out of luck [cuda]")
        train(queue.claim().cell)
        print_status(sweep)
    assert rows(capsys.readouterr().out) == {
        "d1-s0": ["done", "10/10", "2/2", "fd_digits 41.67 at NFE 24", ""],
        "d2-s0": ["failed", "0/10", "0/2", "", "RuntimeError: out of luck [cuda]"],
        "d4-s0": ["running", "10/10", "0/2", "", ""],
        "d8-s0": ["waiting", "0/10", "0/2", "", ""],
    }


def test_a_log_is_not_cut(sweep_file, capsys):
    sweep = load_sweep(sweep_file)
    with Queue(sweep.folder, sweep.cells()) as queue:
        queue.fail(queue.claim(), "x" * 300)
        print_status(sweep)
    assert "x" * 300 in capsys.readouterr().out


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (999.6, "1 k"), (1234567, "1.23 M"), (6.55e20, "655 E")])
def test_units(number, text):
    assert with_unit(number) == text
