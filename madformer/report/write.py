"""A report's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madformer.files import replacing
from madformer.report.costs import AGAINST
from madformer.report.page import page
from madformer.report.table import Report
from madformer.report.text import csv_text

_SOMETIMES = ("-paper.csv", "-diagnostics.png", "-diagnostics.svg", "-samples.png")
"""Files that not every report has."""


def write_report(report: Report, folder: Path, stem: str, against: Sequence[str] = AGAINST, samples: int = 0) -> list[Path]:
    """Write a report in all forms, in `folder`: `stem`.md, .html (which needs no other file), .csv, .png and .svg.

    Beside them: `stem`-paper.csv if the paper has models of these designs, `stem`-diagnostics.png and .svg if runs were
    diagnosed, `stem`-samples.png if samples are asked for.

    Args:
        report: what to write.
        folder: former files of these names in it are replaced.
        stem: what the names begin with.
        against: panels of the figure, `nfe` and names in `COSTS`.
        samples: images of each label, sampled where they are not there yet; 0: none.

    Returns:
        The paths written.

    Raises:
        InputError: samples are asked for that cannot be had.
    """
    from madformer.report.figure import draw, draw_diagnostics

    pictures = {stem: draw(report, against)}
    if report.diagnostics is not None:
        pictures[f"{stem}-diagnostics"] = draw_diagnostics(report.diagnostics, report.title)
    if samples:
        from madformer.report.samples import draw_samples

        pictures[f"{stem}-samples"] = draw_samples(report, samples)
    drawn = {f"{name}.{kind}": content for name, kinds in pictures.items() for kind, content in kinds.items()}
    links = [f"{name}.{'svg' if 'svg' in kinds else 'png'}" for name, kinds in pictures.items()]
    markdown = report.markdown(links)
    shown = {link: drawn[link] for link in links}
    texts = {f"{stem}.md": markdown, f"{stem}.html": page(report.title, markdown, shown), f"{stem}.csv": report.csv()}
    if report.comparison is not None and (lines := report.comparison.rows()):
        texts[f"{stem}-paper.csv"] = csv_text(lines)
    contents = {**{name: text.encode() for name, text in texts.items()}, **drawn}
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    for ending in _SOMETIMES:
        if (name := stem + ending) not in contents:
            (folder / name).unlink(missing_ok=True)  # of a former report: it is not of these numbers
    return [folder / name for name in contents]
