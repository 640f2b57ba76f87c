"""TensorBoard shows a sweep: its server is asked, and a real browser if one is installed.

`make test-browser LOGDIR=runs/SWEEP` looks at a sweep of yours on digits, not at a tiny one that it trains.
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from madformer.config import load_run
from madformer.evaluation.tensorboard import AXES, write_pictures
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.trial import trial_commands
from tests.board import Board, tensorboard, until
from tests.browser import Browser, Chart, browser, needs_browser
from tests.conftest import ROOT
from tests.tiny_runs import TINY, perform

PICTURES = ROOT / "build/browser"
METRIC = "fd_digits"
ENDS = ("nfe_{nfe}", "{steps}_steps")
OUTLIERS = "Ignore outliers in chart scaling"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over depths with tiny models: the commands of its trials, one after the other."""
    if os.environ.get("LOGDIR"):
        return ROOT / os.environ["LOGDIR"]
    folder = tmp_path_factory.mktemp("sweep")
    tiny = [override for override in TINY if not override.startswith(("model.diffusion_depth=", "evaluation.nfe="))]
    grid = ["grid.model.diffusion_depth=[1,2,3]", "seeds=[0]", "evaluate.nfe=[3,6,9]", "evaluate.tune=false"]
    changes = [*grid, "trainer.max_steps=2", f"output_dir={folder}"]
    for cell in sweep_cells(load_sweep(ROOT / "sweeps/digits/digits_figure4_nfe.yaml", [*tiny, *changes])):
        for command in trial_commands(cell):
            perform(command)
    Image.new("L", (2, 1)).save(picture := io.BytesIO(), "png")
    write_pictures(folder, {"report": picture.getvalue()}, "2026-01-01T00:00:00+00:00")
    return folder


@pytest.fixture(scope="module")
def board(logdir: Path) -> Iterator[Board]:
    """A server that has read every run."""
    runs = set(measured(logdir))
    with tensorboard(logdir) as server:
        until(lambda: runs <= {run for run, tags in server.ask("plugin/scalars/tags").items() if f"{METRIC}_vs_nfe" in tags})
        yield server


@pytest.fixture
def window() -> Iterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with browser() as opened:
        yield opened


def measured(logdir: Path) -> dict[str, list[dict]]:
    """Every run of the sweep, as TensorBoard calls it, and what its record says, from the smallest budget to the largest."""
    records = {str(path.parent.relative_to(logdir)): path for path in logdir.rglob("evaluations.jsonl")}
    lines = {run: [json.loads(line) for line in path.read_text().splitlines()] for run, path in records.items()}
    return {
        run: sorted((line for line in lines[run] if line["kind"] == "point"), key=lambda point: point["nfe"])
        for run in sorted(lines)
    }


def curve(points: list[dict], axis: str) -> list[tuple[int, float]]:
    """Steps and values."""
    step_of, _ = AXES[axis]
    return sorted({step_of(point): point["metrics"][METRIC] for point in points}.items())


def test_the_server_has_every_curve_and_every_row(board, logdir):
    runs = measured(logdir)
    assert len(runs) >= 3 and set(runs) == set(board.ask("runs")) - {"."}, "the sweep's folder has the report's pictures"
    for run, points in runs.items():
        for axis in AXES:
            shown = board.ask(f"plugin/scalars/scalars?run={quote(run)}&tag={METRIC}_vs_{axis}")
            assert [(step, pytest.approx(value, rel=1e-6)) for _, step, value in shown] == curve(points, axis)

    charts = [chart["multiline"]["tag"][0] for chart in board.ask("plugin/custom_scalars/layout")["category"][0]["chart"]]
    for run, points in runs.items():
        for axis, tags in zip(AXES, charts, strict=True):
            answer = board.ask(f"plugin/custom_scalars/scalars?run={quote(run)}&tag={quote(tags)}")["tag_to_events"]
            assert [step for _, step, _ in answer[f"{METRIC}_vs_{axis}"]] == [step for step, _ in curve(points, axis)]

    query = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 99}
    rows = {row["name"]: row for row in board.ask("plugin/hparams/session_groups", query)["sessionGroups"]}
    assert set(rows) == set(runs)
    for run, points in runs.items():
        assert rows[run]["hparams"]["model.diffusion_depth"] == load_run(logdir / run).model.diffusion_depth
        ends = {name.format(**point): point["metrics"][METRIC] for name in ENDS for point in (points[0], points[-1])}
        shown = {cell["name"]["tag"]: cell["value"] for cell in rows[run]["metricValues"]}
        expected = {f"{METRIC}_at_{end}": value for end, value in ends.items()}
        assert shown == pytest.approx({tag: expected[tag] for tag in shown})
        assert {tag for tag in expected if "_nfe_" in tag} <= shown.keys()  # columns of steps are those of one run


def assert_drawn(chart: Chart, legend: dict[str, str], curves: dict[str, list[tuple[int, float]]], every_mark: bool) -> None:
    """Each run's curve is there in its colour, to scale and within the chart, and so are its marks."""
    wanted, drawn = [], []
    for (run, colour), (stroke, corners) in zip(legend.items(), chart.curves, strict=True):
        assert stroke == colour and len(corners) == len(curves[run]), run
        assert {(colour, place) for place in (corners if every_mark else corners[-1:])} <= chart.marks, run
        wanted += curves[run]
        drawn += corners
    for values, pixels, length, rises in zip(np.transpose(wanted), np.transpose(drawn), chart.size, (True, False), strict=True):
        slope, offset = np.polyfit(values, pixels, 1)
        np.testing.assert_allclose(pixels, slope * values + offset, atol=0.5)
        assert (slope > 0) == rises and (pixels >= 0).all() and (pixels <= length).all()


def legend_of(runs: dict[str, list[dict]], window: Browser) -> dict[str, str]:
    """The runs' colours, without the sweep's folder, which has no curves."""
    return {run: colour for run, colour in window.legend().items() if run != "."}


PAGES = {
    "scalars": f"/#scalars&_smoothingWeight=0&tagFilter={METRIC}_vs_",
    "custom_scalars": "/#custom_scalars&_smoothingWeight=0",
}


@needs_browser
@pytest.mark.parametrize("page", PAGES)
def test_every_curve_is_drawn(page, board, logdir, window):
    runs = measured(logdir)
    window.open(board.url + PAGES[page])

    def every_curve_is_drawn() -> None:
        window.untick("paper-checkbox", OUTLIERS)
        legend, charts = legend_of(runs, window), {chart.title.split()[0]: chart for chart in window.charts()}
        assert set(legend) == set(runs) and {f"{METRIC}_vs_{axis}" for axis in AXES} <= set(charts)
        for axis in AXES:
            curves = {run: curve(points, axis) for run, points in runs.items()}
            assert_drawn(charts[f"{METRIC}_vs_{axis}"], legend, curves, every_mark=page == "custom_scalars")

    until(every_curve_is_drawn)
    keep(window, page)


@needs_browser
def test_the_time_series_have_a_colour_for_all_seeds_of_a_cell(board, logdir, window):
    """They are drawn as pixels, not as shapes: each colour must be there."""
    runs = measured(logdir)
    window.open(f"{board.url}/?smoothing=0&tagFilter={METRIC}_vs_&runColorGroup={quote('regex:(.*)-s')}#timeseries")

    def every_colour_is_drawn() -> None:
        legend, cells = legend_of(runs, window), {run.rpartition("-s")[0] for run in runs}
        assert set(legend) == set(runs) and len(set(legend.values())) == min(len(cells), 7), "TensorBoard has seven colours"
        pixels = np.asarray(Image.open(io.BytesIO(window.picture("line-chart"))).convert("RGB")).astype(int)
        for colour in set(legend.values()):
            near = np.abs(pixels - [int(part) for part in colour[4:-1].split(",")]).max(2) < 16  # no grey is
            assert near.any(0).sum() > pixels.shape[1] / 20, colour  # a line, of which others may hide the most

    def set_and_drawn() -> None:
        window.untick("mat-checkbox", OUTLIERS)
        window.untick("mat-checkbox", "Enable step selection and data table")
        every_colour_is_drawn()

    until(set_and_drawn)
    window.click("button", "Settings")
    until(every_colour_is_drawn)
    keep(window, "time_series")


def keep(window: Browser, name: str) -> None:
    path = PICTURES / f"{name}.png"
    path.write_bytes(window.picture())
    print(path.relative_to(ROOT))
