"""Samples of all labels side by side, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from madformer.checkpoints import checkpoint_path
from madformer.config import InputError, load_run
from madformer.evaluation.request import parse_sampling
from madformer.images import to_tiles
from madformer.report.columns import common_columns
from madformer.report.panels import PANEL, STYLE, save
from madformer.report.rows import Row
from madformer.report.table import Report


def draw_samples(report: Report, count: int) -> dict[str, bytes]:
    """Images of each label's first run, at the least and the greatest budget of all: kind of file (`png`) -> its contents.

    Image i of every row grew from the same noise, drawn for the whole image, and has the same prompt. The files are kept in
    RUN/samples/compared and not made again.

    Raises:
        InputError: no budget that all labels have, images of several sizes, a run without the checkpoint that was evaluated,
            or files there that were made in another way.
    """
    columns = common_columns(report.rows)
    if not columns:
        raise InputError("--samples: there is no budget that all labels were evaluated at")
    sheets = []
    for column in dict.fromkeys([columns[0], columns[-1]]):
        rows = [row for row in report.rows if column.holds(row)]
        images = [_samples(row, count) for row in rows]
        if len(sizes := {" x ".join(map(str, each.shape[1:3])) for each in images}) > 1:
            raise InputError(f"--samples: images of {' and '.join(sorted(sizes))} pixels have no noise in common")
        tiles_YX3 = to_tiles(np.concatenate(images), columns=count)
        sheets.append((str(column), [row.label for row in rows], tiles_YX3))
    return {"png": _contact_sheet(f"{report.title}: samples from the same noise", sheets)}


def _contact_sheet(title: str, sheets: Sequence[tuple[str, Sequence[str], np.ndarray]]) -> bytes:
    """Sheets below each other, each with a title, and a label for every row of images."""
    width = 3 * PANEL[0]
    heights = [0.4 + 0.85 * width * tiles_YX3.shape[0] / tiles_YX3.shape[1] for _, _, tiles_YX3 in sheets]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 0.4 + sum(heights)), layout="constrained")
        panels = figure.subplots(len(sheets), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, labels, tiles_YX3) in zip(panels, sheets, strict=True):
            panel.imshow(tiles_YX3)
            row = tiles_YX3.shape[0] / len(labels)
            panel.set_yticks([row * (index + 0.5) for index in range(len(labels))], labels)
            panel.set(xticks=[], title=name, frame_on=False)
            panel.tick_params(length=0)
            panel.grid(False)
        figure.suptitle(title, fontsize=11, color="0.1")
        return save(figure, "png")


def _samples(row: Row, count: int) -> np.ndarray:
    """Images [B, Y, X, 3] of a row's first run, sampled as its points were, from the newest of their checkpoints."""
    from madformer.evaluation.write_samples import sample_path, write_samples

    first, variant = row.group.seeds.index(row.seeds[0]), row.group.variant
    run, points = row.group.runs[first], row.group.curves[first].points[row.nfe]
    path = checkpoint_path(run, max(point["step"] for point in points))
    if not path.is_file():
        raise InputError(f"--samples: {path} was evaluated and is gone; evaluate one that is there: madformer evaluate {run}")
    ways: dict[str, Any] = {"weights": variant.weights, "sampler": variant.sampler, "guidance": variant.guidance}
    request = replace(parse_sampling(load_run(run), count, row.steps, None, **ways), checkpoint=path)
    folder = run / "samples/compared" / "-".join([request.checkpoint.stem, *map(str, variant), f"{row.steps}steps"])
    write_samples(request, folder)
    return np.stack([_read(sample_path(folder, index)) for index in range(count)])


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
