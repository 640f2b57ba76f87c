"""Curves in TensorBoard: read back as TensorBoard reads them, and asked of a real server."""

import io
import re
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard import RecordWriter, SummaryWriter

from madformer.config.identity import is_run
from madformer.config.training import LOGGERS
from madformer.evaluation.evaluate import _hparams
from madformer.evaluation.record import record_path
from madformer.evaluation.tensorboard import drop_orphans, write_curves, write_pictures
from tests.board import tensorboard, until
from tests.conftest import ROOT
from tests.data.test_datamodule import TEXT
from tests.points import DENOISING, INCEPTION, at, diagnostics, mean, point, recorded, tuned
from tests.tiny_runs import command, perform, tiny_run, train_command

HPARAMS = {"model.diffusion_depth": 2, "optimizer.lr": 3e-4, "model.rope": "axial", "model.use_condition": True}


def read(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every tag of a run and its (step, value) pairs, in the file's order."""
    events = EventAccumulator(str(run), {"scalars": 0, "images": 0}).Reload()
    tags = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return tags | {tag: [(event.step, 0.0) for event in events.Images(tag)] for tag in events.Tags()["images"]}


def train(run: Path, steps: range, image_every: int = 4) -> Path:
    """An event file as training leaves it: a loss at every step and some pictures."""
    before = set(run.glob("*"))
    writer = SummaryWriter(run)
    for step in steps:
        writer.add_scalar("loss", 1 / step, step)
        if step % image_every == 0:
            writer.add_image("preview", torch.rand(1, 8, 8), step)
    writer.close()
    return next(iter(set(run.glob("*")) - before))


def test_tags_steps_and_values_are_exact(tmp_path):
    points = [point(16, 72.25), point(20, 40.0), point(128, 20.5)]
    write_curves(recorded(tmp_path, *points), HPARAMS)
    assert read(tmp_path) == {
        "fd_digits_vs_nfe": [(16, 72.25), (20, 40.0), (128, 20.5)],
        "fd_digits_vs_log2_nfe": [(400, 72.25), (432, 40.0), (700, 20.5)],
        "fd_digits_vs_tflops": [(8, 72.25), (10, 40.0), (64, 20.5)],
        "fd_digits_vs_seconds": [(4000, 72.25), (5000, 40.0), (32000, 20.5)],
        "fd_digits_at_nfe_16": [(1000, 72.25)],
        "fd_digits_at_nfe_128": [(1000, 20.5)],
        "fd_digits_at_2_steps": [(1000, 72.25)],
        "fd_digits_at_16_steps": [(1000, 20.5)],
    }


def test_drawn_twice_is_drawn_once(tmp_path):
    recorded(tmp_path, point(16, 72.0), point(32, 30.0))
    write_curves(tmp_path, HPARAMS)
    recorded(tmp_path, point(16, 71.0), point(64, 20.0))
    write_curves(tmp_path, HPARAMS)
    assert len(list(tmp_path.glob("events.out.tfevents.*.curves"))) == 1
    assert {path.name for path in tmp_path.iterdir()} - {next(tmp_path.glob("*.curves")).name} == {"evaluations.jsonl"}
    assert read(tmp_path)["fd_digits_vs_nfe"] == [(16, 71.0), (32, 30.0), (64, 20.0)]


def test_steps_rise_where_costs_do_not_and_equal_costs_are_one_point(tmp_path):
    recorded(tmp_path, point(16, 3.0, seconds_per_image=0.5), point(32, 2.0, seconds_per_image=0.25))
    recorded(tmp_path, point(64, 1.0, seconds_per_image=None, tflops_per_image=1.6e-5))
    write_curves(tmp_path, {})
    tags = read(tmp_path)
    assert tags["fd_digits_vs_seconds"] == [(250_000, 2.0), (500_000, 3.0)]
    assert tags["fd_digits_vs_tflops"] == [(8, 3.0), (16, 1.0)]


def test_every_metric_has_its_curves(tmp_path):
    write_curves(recorded(tmp_path, point(16, 0, metrics={"fid": 9.0, "kid": 0.5})), {})
    assert {tag for tag in read(tmp_path) if tag.endswith("_vs_nfe")} == {"fid_vs_nfe", "kid_vs_nfe"}


def test_a_point_is_the_mean_over_checkpoints_and_seeds(tmp_path):
    points = [point(16, 4.0), point(16, 6.0, seconds_per_image=0.002, **at(2000)), point(16, 8.0, seed=1)]
    write_curves(recorded(tmp_path, *points, mean(points)), HPARAMS)
    tags = read(tmp_path)
    assert tags["fd_digits_vs_nfe"] == [(16, 6.0)] and tags["fd_digits_vs_seconds"] == [(3333, 6.0)]
    assert tags["fd_digits_at_nfe_16"] == [(2000, 6.0)]


def test_other_samplers_guidances_and_weights_have_tags_that_say_so(tmp_path):
    recorded(tmp_path, point(16, 4.0), point(32, 3.0), point(16, 2.0, sampler="unipc"), point(16, 6.0, guidance=1.5))
    recorded(tmp_path, point(16, 7.0, weights="model"), point(16, 1.0, num_samples=9))
    recorded(tmp_path, point(16, 0, sampler="unipc", metrics={"fid": 5.0}, **INCEPTION))
    write_curves(tmp_path, {})
    assert {tag: pairs for tag, pairs in read(tmp_path).items() if "_vs_nfe" in tag} == {
        "fd_digits_vs_nfe": [(16, 4.0), (32, 3.0)],
        "fd_digits_vs_nfe/unipc": [(16, 2.0)],
        "fd_digits_vs_nfe/guidance 1.5": [(16, 6.0)],
        "fd_digits_vs_nfe/raw weights": [(16, 7.0)],
        "fid_vs_nfe/unipc": [(16, 5.0)],
    }


def test_a_tuned_run_has_one_more_curve_of_each_metric(tmp_path):
    recorded(tmp_path, point(16, 72.0), point(128, 20.0), *tuned(16, 40.0, 74.0), *tuned(16, 40.0, 74.0, "power:1.5"))
    recorded(tmp_path, point(16, 42.0, sampler="unipc", spacing="power:1.5", seed=3998, tuned=True, seconds_per_image=None))
    write_curves(recorded(tmp_path, *tuned(128, 20.0, 20.0, seconds_per_image=0.5)), HPARAMS)
    tags = read(tmp_path)
    assert {tag: pairs for tag, pairs in tags.items() if "tuned" in tag} == {
        "fd_digits_vs_nfe_tuned": [(16, 41.0), (128, 20.0)],
        "fd_digits_vs_log2_nfe_tuned": [(400, 41.0), (700, 20.0)],
        "fd_digits_vs_tflops_tuned": [(8, 41.0), (64, 20.0)],
        "fd_digits_vs_seconds_tuned": [(500_000, 20.0)],
    }
    assert tags["fd_digits_vs_nfe"] == [(16, 73.0), (128, 20.0)]
    assert {tag for tag in tags if "/" in tag} == set(), "neither choice is a curve of its own"


def test_tuned_points_of_an_older_step_or_of_another_metric_are_not_drawn(tmp_path):
    write_curves(recorded(tmp_path / "older", *tuned(16, 40.0, 74.0), point(16, 30.0, **at(2000))), {})
    assert not [tag for tag in read(tmp_path / "older") if "tuned" in tag]
    both = point(16, 0, metrics={"fd_digits": 72.0, "kid_digits": 9.0})
    write_curves(recorded(tmp_path / "metric", both, tuned(16, 40.0, 72.0)[0]), {})
    tags = [tag for tag in read(tmp_path / "metric") if "_vs_nfe" in tag]
    assert sorted(tags) == ["fd_digits_vs_nfe", "fd_digits_vs_nfe_tuned", "kid_digits_vs_nfe"]


def test_diagnostics_are_drawn_by_timestep_and_by_block(tmp_path):
    write_curves(recorded(tmp_path, diagnostics(4), diagnostics(1, **at(2000), condition_explains=None)), {})
    assert read(tmp_path) == {
        "diagnostics/loss_by_timestep": [(49, 0.125), (499, 0.25), (949, 0.5)],
        "diagnostics/loss_by_block": [(0, 0.375), (1, 0.25)],
        "diagnostics/exposure_gap_by_block": [(0, 0.0), (1, 0.25)],
    }
    write_curves(recorded(tmp_path, point(16, 72.0), diagnostics(**at(2000), **DENOISING)), {})
    tags = read(tmp_path)
    assert tags["diagnostics/denoising_error_by_timestep"] == [(0, 0.5), (10, 0.125), (999, 0.25)]
    assert tags["diagnostics/condition_explains_by_block"] == [(0, 0.25), (1, 0.75)] and tags["fd_digits_vs_nfe"]


def test_the_table_of_hyperparameters_has_the_frechet_distances_alone(tmp_path):
    write_curves(
        recorded(tmp_path / "many", point(16, 0, metrics={"kid": 1.0, "fid": 2.0, "recall": 3.0, "fd_dinov2": 4.0})), {}
    )
    ends = {"nfe_16", "2_steps"}
    names = {f"{metric}_at_{end}" for metric in ("fid", "fd_dinov2") for end in ends}
    assert {tag for tag in read(tmp_path / "many") if "_at_" in tag} == names
    write_curves(recorded(tmp_path / "none", point(16, 0, metrics={"kid": 1.0, "recall": 3.0})), {})
    assert {tag for tag in read(tmp_path / "none") if "_at_" in tag} == {f"kid_at_{end}" for end in ends}


@pytest.mark.parametrize(
    "values",
    [
        ["optimizer.warmup_steps=null", "optimizer.warmup_steps=3"],
        ["model.timestep_embedding=raw", "model.timestep_embedding=sinusoidal"],
        ["data.subset=null", "data.subset=some"],
        ["model.num_kv_heads=null", "model.num_kv_heads=1", "model.num_kv_heads=2"],
    ],
)
def test_rows_of_a_sweep_by_steps_share_their_columns(values, tmp_path):
    """TensorBoard takes the columns of the first run for all, and one type for each."""
    columns, kinds = [], []
    for number, value in enumerate(values):
        hparams = _hparams(tiny_run(tmp_path, value))
        name, _, text = value.partition("=")
        assert hparams[name] == text
        kinds.append({key: type(value) for key, value in hparams.items()})
        run = recorded(tmp_path / str(number), *(point(steps * (8 + number), 9.0, steps=steps) for steps in (2, 4)))
        write_curves(run, hparams)
        columns.append({tag for tag in read(run) if tag.endswith("_steps")})
    assert columns == [{"fd_digits_at_2_steps", "fd_digits_at_4_steps"}] * len(values)
    assert all(kind == kinds[0] for kind in kinds)


def test_a_run_without_evaluations_has_no_curves(tmp_path):
    write_curves(recorded(tmp_path, point(16, 72.0)), HPARAMS)
    record_path(tmp_path).unlink()
    write_curves(tmp_path, HPARAMS)
    assert list(tmp_path.iterdir()) == []


def test_training_s_events_stay_as_they_are(tmp_path):
    path = train(tmp_path, range(1, 6))
    before = path.read_bytes()
    for _ in range(2):
        write_curves(recorded(tmp_path, point(16, 72.0)), HPARAMS)
    assert path.read_bytes() == before
    assert [step for step, _ in read(tmp_path)["loss"]] == [1, 2, 3, 4, 5]


def test_a_failure_leaves_the_former_curves(tmp_path):
    write_curves(recorded(tmp_path, point(16, 72.0)), HPARAMS)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyError, match="list"):
        write_curves(tmp_path, {"unet.channels": [16, 32]})  # type: ignore[dict-item]
    assert sorted(tmp_path.iterdir()) == before


def test_half_written_files_are_not_for_tensorboard(tmp_path, monkeypatch):
    seen: list[str] = []
    write = RecordWriter.write

    def spy(writer: RecordWriter, data: bytes) -> None:
        write(writer, data)
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(RecordWriter, "write", spy)
    write_curves(recorded(tmp_path, point(16, 72.0)), HPARAMS)
    assert len(set(seen)) == 2 and not [name for name in seen if "tfevents" in name]


@pytest.mark.parametrize("cut", [0, 1, 5, 30])
def test_orphans_of_a_killed_run_vanish(tmp_path, cut):
    write_curves(recorded(tmp_path, point(16, 72.0)), HPARAMS)
    drawn = next(tmp_path.glob("*.curves"))
    path, untouched = train(tmp_path, range(1, 11)), drawn.read_bytes()
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - cut)
    drop_orphans(tmp_path, 6)
    tags = read(tmp_path)
    assert tags["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert tags["preview"] == [(4, 0.0)] and tags["fd_digits_vs_nfe"] == [(16, 72.0)]
    assert drawn.read_bytes() == untouched
    train(tmp_path, range(7, 9))
    assert [step for step, _ in read(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("ahead", [[2], [3600], [-50, 3600], [900, 3600, 86400]])
def test_no_step_is_lost_when_the_clock_is_set_back(ahead, tmp_path):
    """TensorBoard reads event files in the order of the times in their names."""
    for number, seconds in enumerate(ahead):
        path = train(tmp_path, range(10 * number + 1, 10 * number + 11))
        path.rename(tmp_path / f"events.out.tfevents.{int(time.time()) + seconds:010d}.host.{9 - number}")
    last = 10 * len(ahead)
    drop_orphans(tmp_path, last)
    resumed = train(tmp_path, range(last + 1, last + 4))
    paths = sorted(tmp_path.iterdir())
    assert paths[-1] == resumed and len(paths) == len(ahead) + 1
    assert [step for step, _ in read(tmp_path)["loss"]] == list(range(1, last + 4))


def test_whole_records_before_a_torn_one_stay(tmp_path):
    path = train(tmp_path, range(1, 4))
    whole = path.read_bytes()
    drop_orphans(tmp_path, 2)
    two = path.read_bytes()
    assert [step for step, _ in read(tmp_path)["loss"]] == [1, 2] and whole.startswith(two)
    for cut in range(len(two), len(whole)):
        path.write_bytes(whole[:cut])
        drop_orphans(tmp_path, 100)
        assert path.read_bytes() == two
    path.write_bytes(whole + b"\0" * 40)
    drop_orphans(tmp_path, 100)
    assert path.read_bytes() == whole


def test_a_file_of_which_nothing_stays_is_removed(tmp_path):
    for path in (train(tmp_path, range(7, 9)), tmp_path / "events.out.tfevents.0.empty"):
        path.touch()
    kept = train(tmp_path, range(1, 3))
    drop_orphans(tmp_path, 6)
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("options", [[], ["--load_fast=false"]], ids=["fast", "slow"])
def test_a_server_shows_the_curves_of_two_runs(tmp_path, options):
    for depth in (2, 4):
        metrics = [{"fd_digits": value + depth, "kid": 0.5} for value in (72.0, 20.0)]
        recorded(tmp_path / f"d{depth}", point(16, 0, metrics=metrics[0]), point(128, 0, metrics=metrics[1]), diagnostics())
        recorded(tmp_path / f"d{depth}", point(16, 60.0, sampler="unipc"), tuned(16, 50.0, 72.0)[0])
        write_curves(tmp_path / f"d{depth}", HPARAMS | {"model.diffusion_depth": depth})
        train(tmp_path / f"d{depth}", range(1, 3))

    with tensorboard(tmp_path, *options) as board:
        until(lambda: [len(tags) for tags in board.ask("plugin/scalars/tags").values()] == [25, 25])
        shown = board.ask("plugin/scalars/scalars?run=d4&tag=fd_digits_vs_seconds")
        assert [(step, value) for _, step, value in shown] == [(4000, 76.0), (32000, 24.0)]

        experiment = board.ask("plugin/hparams/experiment", {"experimentName": ""})
        kinds = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
        assert kinds.keys() == HPARAMS.keys() and kinds["model.use_condition"] == "DATA_TYPE_BOOL"
        metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
        assert metrics == [f"fd_digits_at_{end}" for end in ("nfe_16", "nfe_128", "2_steps", "16_steps")]
        query = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 9}
        table = {group["name"]: group for group in board.ask("plugin/hparams/session_groups", query)["sessionGroups"]}
        assert set(table) == {"d2", "d4"} and table["d4"]["hparams"] == HPARAMS | {"model.diffusion_depth": 4}
        assert [entry["value"] for entry in table["d4"]["metricValues"]] == [76.0, 24.0] * 2

        distance, other, errors = board.ask("plugin/custom_scalars/layout")["category"]
        charts = {chart["multiline"]["tag"][0]: chart["title"] for chart in distance["chart"]}
        assert "MFLOPs per image" in charts["^fd_digits_vs_tflops(/.*)?$"] and not distance.get("closed")
        axes = ("nfe", "log2_nfe", "tflops", "seconds")
        assert list(charts) == [f"^fd_digits_vs_{axis}{end}$" for axis in axes for end in ("(/.*)?", "_tuned(/.*)?")]
        assert other["title"].startswith("kid") and other["closed"] and len(other["chart"]) == 4, "not tuned"
        assert errors["chart"][0]["title"] == "loss_by_timestep (axis: timestep)"
        for run in ("d2", "d4"):
            found = board.ask(f"plugin/custom_scalars/scalars?run={run}&tag={quote(next(iter(charts)))}")["tag_to_events"]
            assert np.array(found["fd_digits_vs_nfe"])[:, 1].tolist() == [16, 128]
            assert set(found) == {"fd_digits_vs_nfe", "fd_digits_vs_nfe/unipc"}
            found = board.ask(f"plugin/custom_scalars/scalars?run={run}&tag={quote(list(charts)[1])}")["tag_to_events"]
            assert np.array(found["fd_digits_vs_nfe_tuned"])[:, 1:].tolist() == [[16, 50.0]] and len(found) == 1
            tag = errors["chart"][2]["multiline"]["tag"][0]
            found = board.ask(f"plugin/custom_scalars/scalars?run={run}&tag={quote(tag)}")["tag_to_events"]
            assert np.array(found["diagnostics/exposure_gap_by_block"])[:, 1:].tolist() == [[0, 0.0], [1, 0.25]]


def test_a_running_server_takes_new_curves_in_place_of_the_former(tmp_path):
    run = recorded(tmp_path / "d2", point(16, 72.0), point(128, 20.0))
    write_curves(run, HPARAMS)

    def shown() -> list[tuple[int, float]]:
        return [(step, value) for _, step, value in board.ask("plugin/scalars/scalars?run=d2&tag=fd_digits_vs_nfe")]

    with tensorboard(tmp_path) as board:
        until(lambda: shown() == [(16, 72.0), (128, 20.0)])
        write_curves(recorded(run, point(16, 71.0), point(32, 30.0)), HPARAMS)
        until(lambda: len(shown()) == 3)
        assert shown() == [(16, 71.0), (32, 30.0), (128, 20.0)]


PLACEHOLDERS = {
    "QUARTER": "[0-3]",
    "BLOCK": "[0-3]",
    "DEPTH": "2",
    "METRIC": "(fd|kid|precision|recall|density|coverage|memorisation)_digits(_held_out)?",
    "NFE": r"\d+",
    "STEPS": r"\d+",
    "HOW": "unipc",
    "SAMPLES": "ema, 2 steps, seed 0",
}
"""Words of docs/reference/tensorboard.md that stand for a part that differs -> that part in the run below."""


def test_the_page_lists_the_tags_of_a_run(tmp_path):
    losses = ("loss.lambda_clean_tower=0.1", "trainer.max_steps=6", "evaluation.preview_samples=2")
    perform(train_command(tmp_path, *TEXT, *losses))
    run = tmp_path / "digits"
    perform(command("evaluate", run, "--sampler", "ddim,unipc", "--num-samples", 8, "--diagnostics"))
    perform(command("tune", run, "--nfe", 5, "--tries", 2))
    perform(command("sample", run, "--num", 1, "--steps", 2, "--out", tmp_path / "samples"))
    files = [LegacyEventFileLoader(str(path)) for path in run.glob("events*")]
    tags = {value.tag for file in files for event in file.Load() for value in event.summary.value}

    page = (ROOT / "docs/reference/tensorboard.md").read_text()
    rows = re.findall(r"^\| `(.*?)` .*\| (.*?) \|$", page, re.MULTILINE)
    others = {*PLACEHOLDERS, *LOGGERS}
    conditions = {tag: condition for tag, condition in rows if tag not in others and not tag.startswith("report")}
    words = re.compile("|".join(PLACEHOLDERS))
    patterns = {tag: words.sub(lambda word: PLACEHOLDERS[word[0]], tag) for tag in conditions}
    assert {tag for tag in tags if not any(re.fullmatch(pattern, tag) for pattern in patterns.values())} == set()
    missing = {row for row, pattern in patterns.items() if not any(re.fullmatch(pattern, tag) for tag in tags)}
    assert missing == {row for row, condition in conditions.items() if condition.startswith(("GPUs", "elastic"))}


def test_a_report_s_pictures_take_the_place_of_former_ones(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, "png")
    for tag in ("former", "report"):
        write_pictures(tmp_path, {tag: file.getvalue()}, "2026-01-01T00:00:00+00:00")
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1 and not is_run(tmp_path)
    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    [picture] = events.Images("report")
    assert events.Tags()["images"] == ["report"]
    assert (picture.width, picture.height, picture.encoded_image_string) == (3, 2, file.getvalue())
    write_curves(recorded(tmp_path, point(16, 72.25)), HPARAMS)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2, "a run's curves leave them alone"
