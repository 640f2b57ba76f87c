"""A report's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madformer.files import replacing, write_text
from madformer.report.costs import AGAINST
from madformer.report.table import Report


def write_report(report: Report, folder: Path, stem: str, against: Sequence[str] = AGAINST) -> list[Path]:
    """Write `stem`.md, .csv, .png and .svg in `folder`, and `stem`-diagnostics.png and .svg if there are diagnostics.

    Args:
        report: what to write.
        folder: former files of these names in it are replaced.
        stem: what the names begin with.
        against: panels of the figure, `nfe` and names in `COSTS`.

    Returns:
        The paths written, in this order.
    """
    from madformer.report.figure import draw, draw_diagnostics

    markdown, table = folder / f"{stem}.md", folder / f"{stem}.csv"
    pictures = {stem: draw(report, against)}
    if report.diagnostics is not None:
        pictures[f"{stem}-diagnostics"] = draw_diagnostics(report.diagnostics, report.title)
    links = "\n".join(f"![{report.title}]({name}.svg)\n" for name in pictures)
    write_text(markdown, f"{report.markdown()}\n{links}")
    write_text(table, report.csv())
    paths = [markdown, table]
    for name, kinds in pictures.items():
        for kind, content in kinds.items():
            paths.append(folder / f"{name}.{kind}")
            with replacing(paths[-1]) as temporary:
                temporary.write_bytes(content)
    return paths
