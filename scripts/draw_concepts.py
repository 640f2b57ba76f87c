"""Draw the figures of docs/explanation/concepts.md: the axes of the model, and other systems in its design space.

python scripts/draw_concepts.py        (or `make docs`)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from madformer.runs.files import write_text

FOLDER = Path(__file__).parents[1] / "docs" / "images"

# Readable in words in the file, and the same bytes for the same versions.
STYLE: dict[Any, Any] = {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "madformer"}
ONCE, ITERATES, INK, CLEAN = "#0072b2", "#d55e00", "0.2", "0.75"

DEPTH, DIFFUSION_DEPTH, ROWS = 8, 3, 2
COLUMN, LAYER, WIDE = 2.5, 0.36, 1.15
"""Units from one block to the next, from one layer to the next, and of a layer's width."""
CONDITION = 1.0
"""Room between the stages."""


def axes_of_the_model(panel: Axes) -> None:
    """Layers upwards, blocks to the right: which are evaluated once for a block, which at every step."""
    panel.set(xlim=(-2.75, 9.8), ylim=(-1.5, 5.25))
    top = DEPTH * LAYER + CONDITION
    for block in range(ROWS**2):
        _block(panel, block, top)
    stage_top = (DEPTH - DIFFUSION_DEPTH) * LAYER
    _stage(panel, 0, stage_top, "AR stage\nlayers 1 .. N − D\nonce per block", ONCE)
    _stage(panel, stage_top + CONDITION, top, "diffusion stage\nlayers N − D + 1 .. N\nonce per step", ITERATES)
    _arrow(panel, (-2.55, -0.1), (-2.55, top + 0.1), linewidth=1.4)
    panel.text(-2.67, top / 2, "depth axis", rotation=90, ha="right", va="center", color=INK, weight="bold")
    _arrow(panel, (-0.3, -1.0), (3 * COLUMN + 1.9, -1.0), linewidth=1.4)
    panel.text(
        1.5 * COLUMN + 0.6, -1.27, "token axis: blocks in raster order", ha="center", va="center", color=INK, weight="bold"
    )


def corners(panel: Axes) -> None:
    """Blocks per image to the right, the share of layers that iterate upwards."""
    panel.set(xlim=(0.7, 420), ylim=(-0.06, 1.3), xscale="log", xticks=[1, 4, 16, 64, 256], yticks=[0, 0.25, 0.5, 0.75, 1])
    panel.set_xticklabels(["1", "4", "16", "64", "256"])
    panel.set_yticklabels(["0", "1/4", "1/2", "3/4", "1"])
    panel.minorticks_off()
    panel.set(xlabel="blocks per image (model.ar_length)", ylabel="share of layers that iterate (D / N)")
    panel.add_patch(Rectangle((0.88, 0.22), 80, 0.81, facecolor=ITERATES, alpha=0.1, linewidth=0))
    panel.text(76, 0.26, "the paper's tables", ha="right", color=ITERATES, style="italic")
    points = [
        (1, 1, "DiT\nTransfusion, MonoFormer\n(text first, shared parameters)", "left", (0, 9)),
        (16, 1, "ACDiT\n(clean blocks, no condition)", "left", (0, 9)),
        (16, 0.5, "MADFormer\n(condition and clean blocks)", "center", (0, 9)),
        (256, 0.12, "MAR\n(blocks denoised alone)", "right", (20, 9)),
    ]
    for x, y, label, where, offset in points:
        panel.plot([x], [y], "o", color=ITERATES if label.startswith("MADFormer") else INK, markersize=6)
        panel.annotate(label, (x, y), xytext=offset, textcoords="offset points", ha=where, color=INK, linespacing=1.25)
    panel.plot([0.88, 400], [0, 0], color=ONCE, linewidth=1.2, linestyle="--")
    panel.text(0.95, 0.03, "nothing iterates: plain autoregression", color=ONCE, style="italic")
    panel.spines[["top", "right"]].set_visible(False)


def draw(size: tuple[float, float], fill: Callable[[Axes], None], plain: bool) -> str:
    """A figure of one panel as SVG; a plain one has no axes of its own."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        fill(panel)
        if plain:
            panel.set_aspect("equal")
            panel.set_axis_off()
        file = io.StringIO()
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})
    return file.getvalue()


def figures() -> dict[str, str]:
    """Name of the file -> its contents."""
    return {
        "axes.svg": draw((10.2, 5.6), axes_of_the_model, plain=True),
        "corners.svg": draw((6.6, 4.0), corners, plain=False),
    }


def _block(panel: Axes, block: int, top: float) -> None:
    """One block's way through all layers, from the block before it to its own clean latents."""
    left = block * COLUMN
    middle, stage_top = left + WIDE / 2, (DEPTH - DIFFUSION_DEPTH) * LAYER
    for layer in range(DEPTH):
        iterates = layer >= DEPTH - DIFFUSION_DEPTH
        bottom = layer * LAYER + (CONDITION if iterates else 0)
        box = FancyBboxPatch((left, bottom), WIDE, LAYER - 0.09, boxstyle="round,pad=0,rounding_size=0.07", linewidth=0)
        box.set_facecolor(ITERATES if iterates else ONCE)
        panel.add_patch(box)
    panel.text(middle, -0.64, "learned BOI" if block == 0 else f"clean block {block - 1}", ha="center", va="center", color=INK)
    _arrow(panel, (middle, -0.48), (middle, -0.06))
    plus = stage_top + 0.52
    _arrow(panel, (middle, stage_top - 0.06), (middle, plus - 0.12))
    panel.text(middle - 0.1, stage_top + 0.16, "condition", ha="right", va="center", color=INK, style="italic")
    panel.add_patch(Circle((middle, plus), 0.12, facecolor="white", edgecolor=INK, linewidth=1))
    panel.text(middle, plus - 0.01, "+", ha="center", va="center", color=INK)
    _arrow(panel, (middle, plus + 0.12), (middle, stage_top + CONDITION - 0.04))
    panel.text(middle + 0.57, plus, f"noisy block {block}", ha="left", va="center", color=INK)
    _arrow(panel, (middle + 0.53, plus), (middle + 0.13, plus))
    loop = FancyArrowPatch((left + WIDE + 0.05, top - 0.2), (left + WIDE + 0.05, stage_top + CONDITION + 0.12))
    loop.set(arrowstyle="-|>", connectionstyle="arc3,rad=-0.75", mutation_scale=9, color=ITERATES, linewidth=1.3)
    panel.add_patch(loop)
    panel.text(left + WIDE + 0.42, (top + stage_top + CONDITION) / 2, "× steps", va="center", color=ITERATES)
    _arrow(panel, (middle, top - 0.05), (middle, top + 0.28))
    _image(panel, middle, top + 0.34, block)


def _image(panel: Axes, middle: float, bottom: float, newest: int) -> None:
    """The image so far: the blocks before, the one that has just been made, and those that are still to come."""
    side = 0.46
    for place in range(ROWS**2):
        row, column = divmod(place, ROWS)
        corner = (middle + (column - ROWS / 2) * side, bottom + (ROWS - 1 - row) * side)
        color = ITERATES if place == newest else CLEAN if place < newest else "white"
        panel.add_patch(Rectangle(corner, side, side, facecolor=color, edgecolor=INK, linewidth=0.8))
        if place <= newest:
            ink = "white" if place == newest else INK
            panel.text(corner[0] + side / 2, corner[1] + side / 2 - 0.01, str(place), ha="center", va="center", color=ink)


def _stage(panel: Axes, bottom: float, top: float, text: str, color: str) -> None:
    panel.plot([-0.3, -0.3], [bottom, top - 0.09], color=color, linewidth=2)
    panel.text(-0.45, (bottom + top) / 2, text, ha="right", va="center", color=color, linespacing=1.35)


def _arrow(panel: Axes, start: tuple[float, float], end: tuple[float, float], linewidth: float = 1.0) -> None:
    panel.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=linewidth, shrinkA=0, shrinkB=0)
    )


if __name__ == "__main__":
    for name, contents in figures().items():
        write_text(FOLDER / name, contents)
