"""Diagnostics side by side."""

from typing import Any

from madformer.report import Curve
from madformer.report.diagnostics_report import gather_diagnostics
from tests.points import DENOISING, point, recorded
from tests.points import diagnostics as made


def diagnosed(root, label: str, scale: float = 1.0, seed: int = 0, **changes: Any) -> Curve:
    return Curve(label, recorded(root / f"{label}-s{seed}", made(scale, **changes)), {}, seed)


TABLE = """\
### Diagnostics

- 256 held-out images; EMA weights; training step 1,000.
- Loss: the denoiser's, by timestep t and by block, after real blocks.
- Exposure gap: how much farther samples are from real blocks, as a share of the distances between them, after the model's own \
blocks than after real ones; 0 at the first block; sampled at NFE 32 with ddim.
- The condition explains this share of the blocks' variance before any denoising (the mean over blocks); 1 is all, \
below 0 is worse than the mean image.

|  | loss at t = 49 | loss at t = 499 | loss at t = 949 | loss, first block | loss, last block | mean exposure gap | \
gap, last block | condition explains |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| d2 | 0.125 | 0.250 | 0.500 | 0.375 | 0.250 | 0.125 | 0.250 | 0.500 |
| d16 | 0.250 | 0.500 | 1.00 | 0.750 | 0.500 | 0.250 | 0.500 | – |
"""


def test_a_table_to_the_letter(tmp_path):
    curves = [diagnosed(tmp_path, "d16", 2, condition_explains=None), diagnosed(tmp_path, "d2")]
    gathered = gather_diagnostics(curves)
    assert gathered is not None and gathered.markdown() + "\n" == TABLE


def test_runs_that_nobody_diagnosed_are_left_out(tmp_path):
    plain = Curve("d4", recorded(tmp_path / "d4", point(16, 72.0)), {}, 0)
    assert gather_diagnostics([plain]) is None
    gathered = gather_diagnostics([plain, diagnosed(tmp_path, "d2")])
    assert gathered is not None and [diagnosis.label for diagnosis in gathered.diagnoses] == ["d2"]


def test_two_seeds_have_a_mean_in_figures_and_are_both_shown_in_tables(tmp_path):
    gathered = gather_diagnostics([diagnosed(tmp_path, "d2"), diagnosed(tmp_path, "d2", 3, seed=1)])
    assert gathered is not None
    [diagnosis] = gathered.diagnoses
    assert [estimated.mean for estimated in diagnosis.loss_by_timestep] == [0.25, 0.5, 1.0]
    assert diagnosis.exposure_gap[1].values == (0.25, 0.75) and diagnosis.exposure_gap[1].over == "training seeds"
    assert "| 0.250 and 0.750 |" in gathered.markdown()


def test_what_differs_between_diagnoses_is_said(tmp_path):
    other = diagnosed(tmp_path, "d4", images=512, held_out=False, timesteps=[9, 99, 999])
    gathered = gather_diagnostics([diagnosed(tmp_path, "d2"), other])
    assert gathered is not None
    text = gathered.markdown()
    assert "**Not all diagnostics are comparable**: they differ in images, held_out, timesteps." in text
    assert "256 or 512 held-out images or images of the training set" in text and "| loss at low t |" in text


def test_a_seed_diagnosed_at_other_timesteps_is_not_averaged(tmp_path):
    odd = diagnosed(tmp_path, "d2", 9, seed=1, timesteps=[9, 99, 999])
    gathered = gather_diagnostics([diagnosed(tmp_path, "d2"), odd])
    assert gathered is not None and gathered.diagnoses[0].loss_by_timestep[0].values == (0.125,)
    assert "they differ in timesteps" in gathered.markdown()


def test_a_seed_without_the_denoising_error_counts_for_all_else(tmp_path):
    known = diagnosed(tmp_path, "d2", seed=1, **DENOISING)
    gathered = gather_diagnostics([diagnosed(tmp_path, "d2"), known])
    assert gathered is not None
    [diagnosis] = gathered.diagnoses
    assert diagnosis.denoising_timesteps == (0, 10, 999) and len(diagnosis.loss_by_block[0].values) == 2
    assert [estimated.values for estimated in diagnosis.denoising_error] == [(0.5,), (0.125,), (0.25,)]
    assert [estimated.mean for estimated in (*diagnosis.noisy_error, *diagnosis.mean_error)] == [0.25, 0.5, 2.0, 0.5, 0.5, 0.5]
    assert "- Denoising error: " in gathered.markdown()


def test_the_error_of_the_gap_is_mentioned_where_it_is_known(tmp_path):
    exposure = {**made()["exposure"], "gap_error": [0.0, 0.0432]}
    gathered = gather_diagnostics([diagnosed(tmp_path, "d2", exposure=exposure)])
    assert gathered is not None and "its standard error is at most 0.04 a run." in gathered.markdown()
