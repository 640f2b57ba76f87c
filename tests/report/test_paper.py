"""The comparison of runs with the paper's numbers."""

import csv
from dataclasses import replace

import pytest

from madformer.config import ExperimentConfig, LossConfig, load_experiment, write_config
from madformer.report import Curve, build_report, write_report
from madformer.report.paper import design_of, paper
from madformer.sweep.cells import sweep_cells
from tests.conftest import ROOT
from tests.points import point, recorded

DIGITS = load_experiment(ROOT / "experiments/digits.yaml")


def run(root, label, *values, seed=0, nfe=64, steps=None, base=DIGITS, lambda_hidden=0.1, **model):
    """A run of a design, measured at rising budgets (doubling from `nfe`)."""
    config = replace(base, model=replace(base.model, **model), loss=LossConfig(lambda_hidden=lambda_hidden), seed=seed)
    points = [point(nfe * 2**index, value, **({} if steps is None else {"steps": steps})) for index, value in enumerate(values)]
    folder = recorded(root / f"{label}-s{seed}", *points)
    write_config(config, folder)
    return Curve(label, folder, {}, seed)


def depths(root, values, **changes):
    return [run(root, f"d{depth}", *value, diffusion_depth=depth, **changes) for depth, value in values.items()]


def test_all_numbers_of_the_paper_are_there():
    """Table 1: 8, Table 2: 7, Tables 3 and 5: 6, Table 4: 4, Table 6: 12."""
    data, tables = paper()
    assert [len(table.cells) for table in tables] == [4, 4, 3, 2, 3, 3, 3]
    assert sum(len(cell.distances) for table in tables for cell in table.cells) == 43
    assert tables[0].cells[3].distances == {"ffhq1024": 15.9, "imagenet256": 27.4}
    for one in data:
        config = load_experiment(ROOT / f"experiments/{one.name}.yaml")
        assert (config.model.ar_length, config.model.latent_size) == (one.ar_length, one.latent_size)
        assert config.evaluation.num_samples == one.samples
        at_default = [cell for table in tables for cell in table.cells if cell.has(design_of(config), one, any_length=False)]
        assert len(at_default) == 7, "the default is in every table"


@pytest.mark.parametrize("data", ["ffhq1024", "imagenet256"])
def test_every_cell_of_the_paper_s_sweeps_has_its_number(data, monkeypatch, tmp_path):
    from madformer.sweep.load_sweep import load_sweep

    monkeypatch.chdir(ROOT)
    [one] = [entry for entry in paper()[0] if entry.name == data]
    sweeps = [load_sweep(path, [f"output_dir={tmp_path}"]) for path in sorted((ROOT / "sweeps/paper").glob(f"{data}_table*"))]
    assert len(sweeps) == 7
    for sweep, table in zip(sweeps, sorted(paper()[1], key=order), strict=True):
        named = [cell for cell in table.cells if data in cell.distances]
        for cell in sweep_cells(sweep):
            found = [entry for entry in named if entry.has(design_of(cell.config), one, any_length=False)]
            assert len(found) == 1, cell.name
        assert len(sweep_cells(sweep)) == len(named)


def order(table):
    """Files are in the order of the alphabet: clean_tower before hidden."""
    return table.title.replace("hidden", "z")


def test_depths_stand_beside_the_same_shares_of_the_paper_s(tmp_path):
    report = build_report(depths(tmp_path, {2: [40, 18], 4: [50, 19], 6: [70, 16], 8: [90, 17]}), "Depths")
    text = report.markdown()
    assert (
        "| Table 1, diffusion depth | fd_digits ↓ at NFE 128 | seeds | the paper's | FID, FFHQ-1024 | FID, ImageNet-256 |"
        in text
    )
    assert (
        "| d6 | 16.0 | 1 | 21 of 28 layers iterate | 16.6 | 28.1 |\n| d8 | 17.0 | 1 | 28 of 28 layers iterate | 15.9 | 27.4 |"
        in text
    )
    assert "- FFHQ-1024: 4 of 6 pairs stand in the paper's order; of fewer than 3 seeds" in text
    assert "The lowest mean is that of d6 here, in the paper that of 28 of 28 layers iterate." in text
    assert "Here d2 is set against d8: 55.6 % below it at NFE 64 and 5.88 % above it at NFE 128." in text
    assert "Table 2" not in text and "What it cost" in text


def test_seeds_say_which_orders_are_sure(tmp_path):
    values = {"both": (20.0, 20.2, 20.1), "clean": (29.0, 29.2, 29.1), "condition": (20.3, 19.9, 20.13)}
    models = {"both": {}, "clean": {"use_condition": False, "lambda_hidden": 0}, "condition": {"use_clean_blocks": False}}
    curves = [
        run(tmp_path, label, value, seed=seed, **models[label]) for label in values for seed, value in enumerate(values[label])
    ]
    text = build_report(curves, "Conditioning").markdown()
    assert (
        "| both | 20.1 ± 0.2 | 3 | both | 17.8 | 30.0 |" in text
        and "| clean | 29.1 ± 0.2 | 3 | clean blocks alone | 20.1 | 31.9 |" in text
    )
    assert (
        "- FFHQ-1024: 3 of 3 pairs stand in the paper's order; of those that differ by more than seeds do (Holm, p < 0.05), 2 of 2."
        in text
    )
    assert "Figure 4" not in text
    alike = build_report([entry for entry in curves if entry.label != "clean"], "Alike").markdown()
    assert "1 of 1 pairs stand in the paper's order; none differ by more than seeds do (Holm, p < 0.05)." in alike


def test_pairs_with_a_single_seed_do_not_hide_the_others(tmp_path):
    values = {2: (40.0, 40.1, 40.2), 4: (30.0, 30.2, 30.1), 8: (20.0,)}
    curves = [
        run(tmp_path, f"d{depth}", value, seed=seed, diffusion_depth=depth)
        for depth, each in values.items()
        for seed, value in enumerate(each)
    ]
    text = build_report(curves, "Seeds").markdown()
    counted = "of those that differ by more than seeds do (Holm, p < 0.05), 1 of 1; 2 of fewer than 3 seeds"
    assert f"FFHQ-1024: 3 of 3 pairs stand in the paper's order; {counted}, which another training may order otherwise." in text


def test_of_depths_and_lengths_each_data_set_has_its_own(tmp_path):
    curves = [
        run(tmp_path, f"d{depth}-l{length}", 20.0 - depth + length, diffusion_depth=depth, ar_length=length)
        for depth in (2, 8)
        for length in (4, 16)
    ]
    report = build_report(curves, "Grid")
    text = report.markdown()
    assert "| d2-l4 | 22.0 | 1 | 7 of 28 layers iterate |  | 34.0 |" in text
    assert "| d2-l16 | 34.0 | 1 | 7 of 28 layers iterate | 20.2 |  |" in text
    assert "FFHQ-1024: 1 of 1 pairs" in text and "ImageNet-256: 1 of 1 pairs" in text
    assert [row[-2:] for row in report.comparison.rows()[1:]] == [[None, 34.0], [20.2, None], [None, 27.4], [15.9, None]]


def test_lengths_are_compared_as_they_are_and_a_design_twice_not_at_all(tmp_path):
    lengths = [run(tmp_path, f"l{length}", 20.0 - length, ar_length=length) for length in (1, 4, 16)]
    text = build_report(lengths, "Lengths").markdown()
    assert "| l1 | 19.0 | 1 | 1 block |  | 28.4 |\n| l4 | 16.0 | 1 | 4 blocks | 18.9 | 30.0 |" in text and "Table 1" not in text
    assert "FFHQ-1024: 1 of 1 pairs" in text and "ImageNet-256: 0 of 3 pairs" in text
    twins = [run(tmp_path / "twins", name, 20.0, width=width) for name, width in (("w32", 32), ("w64", 64))]
    assert build_report(twins, "Widths").comparison is None
    bare = [Curve("d2", recorded(tmp_path / "bare", point(16, 1.0)), {}, 0)]
    assert build_report(bare, "Without configurations").comparison is None


def test_latents_of_the_paper_s_size_are_beside_the_data_of_that_size(tmp_path):
    ffhq = ExperimentConfig()
    report = build_report(depths(tmp_path, {7: [20], 28: [16]}, base=ffhq), "FFHQ")
    assert report.comparison is not None and [one.name for one in report.comparison.tables[0].data] == ["ffhq1024"]
    assert "| d28 | 16.0 | 1 | 28 of 28 layers iterate | 15.9 |" in report.markdown()
    other = depths(tmp_path / "other", {7: [20], 28: [16]}, base=ffhq, ar_length=64)
    assert build_report(other, "64 blocks are in no table but the second").comparison is None


def test_labels_meet_in_steps_where_budgets_differ(tmp_path):
    curves = [run(tmp_path, f"d{depth}", 20.0 + depth, nfe=8 + 49 * depth, steps=50, diffusion_depth=depth) for depth in (2, 4)]
    text = build_report(curves, "Steps").markdown()
    assert "| fd_digits ↓ | 50 steps |\n| --- | ---: |\n| d2 | 22.0 |\n| d4 | 24.0 |" in text
    assert "| Table 1, diffusion depth | fd_digits ↓ at 50 steps |" in text
    for entry in curves:  # one step is the same budget at every depth
        recorded(entry.run, point(8, 90.0, steps=1))
    recorded(curves[0].run, point(28, 50.0, steps=10))
    text = build_report(curves, "A budget in common, and a point that one lacks").markdown()
    assert "| fd_digits ↓ | 1 step | 10 steps | 50 steps |" in text and "| d4 | 90.0 | – | 24.0 |" in text
    assert "| Table 1, diffusion depth | fd_digits ↓ at 50 steps |" in text


def test_a_sweep_s_own_budgets_are_reported_on(tmp_path):
    [curve] = depths(tmp_path, {2: [40, 18]})
    assert [row.nfe for row in build_report([replace(curve, budgets=frozenset([128, 256]))], "Own").rows] == [128]


def test_the_files_hold_the_comparison_and_a_page_that_needs_no_other(tmp_path):
    report = build_report(depths(tmp_path, {2: [40, 18], 8: [90, 17]}), "_Depths_ & <more>")
    paths = {path.name: path for path in write_report(report, tmp_path / "out", "report")}
    rows = list(csv.DictReader(paths["report-paper.csv"].open()))
    assert [(row["label"], row["fd_digits"], row["paper_ffhq1024"], row["at"]) for row in rows] == [
        ("d2", "18.0", "20.2", "NFE 128"), ("d8", "17.0", "15.9", "NFE 128"),
    ]  # fmt: skip
    page = paths["report.html"].read_text()
    assert page.count("<table>") == 7 and 'src="data:image/svg+xml;base64,' in page and 'src="report' not in page
    assert (
        "<title>_Depths_ &amp; &lt;more&gt;</title>" in page
        and "<more>" not in page
        and "http" not in page.replace("http-equiv", "")
    )
