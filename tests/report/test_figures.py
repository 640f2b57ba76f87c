"""The pictures of reports: what they show, how they are drawn."""

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from madformer.report import build_report
from madformer.report.diagnostics_report import draw_diagnostics
from madformer.report.figures import draw, fit, line, looks
from madformer.report.statistics import Estimate
from tests.points import DENOISING, diagnostics, point
from tests.report.curves import curve, seeds, small


def texts(svg: bytes) -> list[str]:
    """All that is written in a picture."""
    found = ElementTree.fromstring(svg.decode()).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()).strip() for element in found]


def size(png: bytes) -> tuple[int, ...]:
    return matplotlib.image.imread(io.BytesIO(png)).shape[:2]


def test_the_png_is_white_of_its_size_and_coloured(tmp_path):
    pixels = matplotlib.image.imread(io.BytesIO(draw(small(tmp_path))["png"]))
    assert pixels.shape == (760, 2000, 4) and np.all(pixels[:3, :3] == 1.0)
    colors = np.unique(np.round(pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
    assert len(colors) > 200
    lines = [[0, 114, 178], [213, 94, 0]]  # Okabe and Ito's blue and vermilion
    assert all(any(np.abs(colors - line).max(axis=1) <= 2) for line in lines)


def test_the_svg_names_labels_axes_and_budgets(tmp_path):
    svg = draw(small(tmp_path))["svg"].decode()
    written = texts(svg.encode())
    named = ["Digits (d: model.diffusion_depth)", "d2", "d16", "16", "32", "128"]
    named += ["Fréchet distance", "fd_digits (lower is better)"]
    named += ["sampling compute, GFLOPs per image", "sampling time, ms per image"]
    assert set(named) <= set(written)
    assert written.index("d2") < written.index("d16") and "dc:date" not in svg and "fill: #ffffff" in svg


def test_long_labels_make_a_taller_legend(tmp_path):
    curves = [curve(tmp_path, f"d{depth}", point(16, 72.0)) for depth in range(1, 9)]
    long = [replace(entry, label=f"{entry.label}-with-a-rather-long-name") for entry in curves]
    heights = [size(draw(build_report(each, ""))["png"])[0] for each in (curves, long)]
    assert heights == [804, 848]


def test_seeds_are_thin_lines_below_the_mean_and_dots_where_they_differ():
    panel = Figure().subplots()
    both = [Estimate(20.0, (19.0, 21.0), "training seeds"), Estimate(11.0, (10.0, 12.0), "training seeds")]
    line(panel, "d2", looks({"d2": ("d2", "")})["d2"], [1, 2], both)
    mean, *seeds = panel.lines
    assert [list(seed.get_ydata()) for seed in seeds] == [[19.0, 10.0], [21.0, 12.0]] and list(mean.get_ydata()) == [20.0, 11.0]
    assert all(seed.get_linewidth() < mean.get_linewidth() / 2 and seed.get_marker() == "." for seed in seeds)
    dots = Figure().subplots()
    line(dots, "d2", looks({"d2": ("d2", "")})["d2"], [1, 2], both, same_seeds=False)
    assert [(list(seed.get_xdata()), list(seed.get_ydata())) for seed in dots.lines[1:]] == [
        ([1, 1], [19.0, 21.0]), ([2, 2], [10.0, 12.0]),
    ]  # fmt: skip


def test_the_legend_explains_the_seeds_where_there_are_some(tmp_path):
    assert "a seed" in texts(draw(seeds(tmp_path))["svg"])
    assert "a seed" not in texts(draw(small(tmp_path / "small"))["svg"])


def test_a_picture_without_seconds_says_so_and_zero_or_less_is_drawn(tmp_path):
    points = [point(16, 0.0, seconds_per_image=None), point(32, -0.5, seconds_per_image=None)]
    svg = draw(build_report([curve(tmp_path, "d2", *points)], "KID"))["svg"].decode()
    assert "not measured" in svg and "not measured" not in draw(small(tmp_path / "small"))["svg"].decode()
    assert "−0.5" in svg or "-0.5" in svg


def test_every_cost_has_its_panel(tmp_path):
    pictures = draw(small(tmp_path), ("nfe", "flops", "seconds", "seconds_per_block", "memory"))
    written = texts(pictures["svg"])
    measured = ("compute, GFLOPs per image", "time, ms per image", "time, ms per block", "memory, MiB at the peak")
    assert {"layer evaluations per block (NFE)", *(f"sampling {name}" for name in measured)} <= set(written)
    assert written.count("not measured") == 1 and size(pictures["png"]) == (760, 3333)


def test_a_single_panel_is_drawn_too(tmp_path):
    assert size(draw(small(tmp_path), ("seconds",))["png"]) == (804, 666)


def test_the_limits_hold_every_seed():
    panel = Figure().subplots()
    fit(panel, [Estimate(20.0, (10.0, 30.0), "training seeds"), Estimate(15.0, (14.0, 16.0), "training seeds")], log=True)
    least, most = panel.get_ylim()
    assert panel.get_yscale() == "log" and 9 < least < 10 and 30 < most < 33


def test_colour_tells_configurations_apart_and_dashes_how_they_were_sampled():
    made = looks({"d2": ("d2", ""), "d2 · unipc": ("d2", "unipc"), "d4": ("d4", ""), "d4 · unipc": ("d4", "unipc")})
    assert made["d2"].color == made["d2 · unipc"].color != made["d4"].color
    assert made["d2"].line == made["d4"].line != made["d2 · unipc"].line
    alone = looks({"d2": ("d2", ""), "d2 · unipc": ("d2", "unipc")})
    assert alone["d2"].color != alone["d2 · unipc"].color
    many = looks({f"d{depth}": (f"d{depth}", "") for depth in range(50)}).values()
    assert len({(look.color, look.marker) for look in many}) == 50


def test_diagnostics_are_drawn_in_three_panels(tmp_path):
    made = build_report(
        [curve(tmp_path, "d2", point(16, 72.0), diagnostics()), curve(tmp_path, "d4", point(16, 72.0), diagnostics(2))], ""
    )
    assert made.diagnostics is not None
    written = texts(draw_diagnostics(made.diagnostics, "Digits")["svg"])
    for text in ("Digits: diagnostics", "denoising loss", "exposure gap", "variance that the condition explains", "d2", "d4"):
        assert text in written
    assert "no condition" not in written


def test_the_denoising_error_is_drawn_where_it_is_known(tmp_path):
    known, earlier = diagnostics(**DENOISING), diagnostics(2)
    made = build_report([curve(tmp_path, name, point(16, 72.0), line) for name, line in (("d2", known), ("d4", earlier))], "")
    assert made.diagnostics is not None
    pictures = draw_diagnostics(made.diagnostics, "")
    written = texts(pictures["svg"])
    assert size(pictures["png"]) == (760, 2666)
    assert {"denoising error", "error of returning", "the noisy block", "the mean image", "0.1", "1,000"} <= set(written)
    assert written.count("the noisy block") == 1, "in the legend of its panel alone"


def test_models_without_a_condition_leave_a_panel_empty(tmp_path):
    made = build_report([curve(tmp_path, "d2", point(16, 72.0), diagnostics(condition_explains=None))], "")
    assert made.diagnostics is not None
    assert "no condition" in texts(draw_diagnostics(made.diagnostics, "")["svg"])
