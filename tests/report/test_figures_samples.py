"""Samples side by side."""

import io
import re
import shutil

import pytest
from PIL import Image

from madformer.errors import InputError
from madformer.report import build_report, curves_of_runs
from madformer.report.write import draw_samples
from tests.points import at, point, recorded
from tests.tiny_runs import command, perform, train_command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and its copy under another name."""
    root = tmp_path_factory.mktemp("runs")
    quick = (
        "trainer.max_steps=1",
        "trainer.checkpoint_every=1",
        "evaluation.preview_every=null",
        "optimizer.warmup_fraction=0",
    )
    perform(train_command(root, "name=one", *quick))
    recorded(root / "one", point(3, 70.0, steps=1, **at(1)), point(5, 60.0, steps=2, **at(1)))
    shutil.copytree(root / "one", root / "two")
    return [root / "one", root / "two"]


def test_the_same_weights_and_noise_make_the_same_images(runs, tmp_path):
    ask = command("report", *runs, "--samples", 3, "--out", tmp_path / "out")
    printed = perform(ask)
    assert "report-samples.png" in printed and "steps, seed 0" in printed
    made = [sorted(run.glob("samples/compared/*/00*.png")) for run in runs]
    assert [path.parts[-2:] for path in made[0]] == [path.parts[-2:] for path in made[1]] and len(made[0]) == 6
    assert [path.read_bytes() for path in made[0]] != [], "two budgets, three images"
    images = [[Image.open(path).tobytes() for path in paths] for paths in made]
    assert images[0] == images[1] and len(set(images[0])) == 6
    sheet = (tmp_path / "out/report-samples.png").read_bytes()
    assert Image.open(io.BytesIO(sheet)).size[0] == 2000
    page = (tmp_path / "out/report.html").read_text()
    assert (
        page.count('src="data:image/png;base64,') == 1 and "](report-samples.png)" in (tmp_path / "out/report.md").read_text()
    )
    before = [path.stat().st_mtime_ns for path in made[0]]
    assert "there already" in perform(ask) and [path.stat().st_mtime_ns for path in made[0]] == before
    assert (tmp_path / "out/report-samples.png").read_bytes() == sheet


def test_labels_without_a_budget_in_common_have_no_samples(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    (other / "evaluations.jsonl").unlink()
    recorded(other, point(7, 50.0, steps=3, **at(1)))
    gone = shutil.copytree(runs[0], tmp_path / "gone")
    recorded(gone, point(3, 50.0, steps=1, **at(2000)))
    with pytest.raises(InputError, match="step-00002000.ckpt was evaluated and is gone"):
        draw_samples(build_report(curves_of_runs([gone]), "Gone"), 3)
    with pytest.raises(InputError, match=re.escape("--samples: there is no budget that all labels were evaluated at")):
        draw_samples(build_report(curves_of_runs([runs[0], other]), "Apart"), 3)
