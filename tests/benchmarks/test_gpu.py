"""The benchmark of a GPU, on the CPU: the same path, with a tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Card, Case, batches_to_try, cases, estimated_bytes, measure_rows
from benchmarks.harness import SIZES
from tests.benchmarks.test_benchmarks import TINY

CARD = Card(torch.device("cpu"), 2**28)


@pytest.fixture(autouse=True)
def tiny_digits(monkeypatch):
    """The experiment's batch, a smaller model."""
    monkeypatch.setitem(SIZES, "digits", replace(TINY, depth=2, diffusion_depth=1))
    monkeypatch.setattr(gpu, "REPEATS", 1)


def measured(todo, card=CARD):
    written = []
    measure_rows(todo, card, 5.0, lambda rows: written.append(list(rows)))
    assert [len(rows) for rows in written] == list(range(1, len(todo) + 1)), "written after every row"
    return written[-1]


def test_the_command_writes_rows_and_traces(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "cases", lambda sizes, cuda: cases(sizes, cuda)[:6])
    out = tmp_path / "gpu.json"
    gpu.main(["--size", "digits", "--device", "cpu", "--minutes", "3", "--out", str(out), "--trace", str(tmp_path / "traces")])
    content = json.loads(out.read_text())
    assert content["torch"] == torch.__version__ and content["card"]
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows)[:3] == ["matmul", "copy", "training, eager"] and len(rows) == 6
    assert all(row["error"] is None for row in content["rows"])
    step, released = rows["training, eager"], rows["training, eager, released (sparse)"]
    assert step["batch"] == 32 and step["seconds"] > 0 and step["mfu"] is None and step["ratio"] == 1
    assert step["of_matmul"] == pytest.approx(step["tflops"] / rows["matmul"]["tflops"])
    assert released["ratio"] == pytest.approx(released["seconds"] / step["seconds"]) and released["tflops"] is None
    printed = capsys.readouterr().out
    assert "a training step of digits with 32 images takes" in printed and "out of memory" not in printed
    assert {path.name for path in (tmp_path / "traces").iterdir()} == {"training-digits.json.gz", "denoising-digits.json.gz"}


def test_a_failure_costs_one_row(monkeypatch):
    def fail(case, card, batch):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if batch == 2 and case.batch:
            raise RuntimeError("no kernel\nwith details")
        return generation(case, card, batch)

    generation, largest = gpu.generation, Case("sampling", "digits")
    monkeypatch.setattr(gpu, "generation", fail)
    rows = measured([Case("sampling", "digits", batch) for batch in (3, 2, 1)])
    assert [row["error"] for row in rows] == ["out of memory", "RuntimeError: no kernel", None]
    assert [row["seconds"] is None for row in rows] == [True, True, False]
    [row] = measured([largest], replace(CARD, memory=estimated_bytes(largest, CARD, 5)))
    assert (row["batch"], row["error"]) == (2, None), "5, 4 and 3 do not fit"


def test_the_largest_batch_is_that_of_the_estimate():
    case = Case("training", "digits", None)
    card = replace(CARD, memory=estimated_bytes(case, CARD, 20))
    assert list(batches_to_try(case, card)) == [20, 17, 14, 11, 9, 7, 5, 4, 3, 2, 1]
    assert list(batches_to_try(case, replace(CARD, memory=0))) == [1]


def test_no_row_starts_after_the_limit(tmp_path):
    out = tmp_path / "gpu.json"
    gpu.main(["--size", "digits", "--device", "cpu", "--minutes", "0", "--out", str(out)])
    assert not out.exists()


def test_every_row_has_a_name_of_its_own():
    names = [(case.size, case.batch, case.name) for case in cases(["ffhq1024", "imagenet256"], cuda=True)]
    assert len(set(names)) == len(names) == 38
    assert not any(case.compiled for case in cases(["digits"], cuda=False))
