"""A report's files."""

from __future__ import annotations

from pathlib import Path

from madformer.files import replacing, write_text
from madformer.report.table import Report


def write_report(report: Report, folder: Path, stem: str) -> list[Path]:
    """Write `stem`.md, .csv, .png and .svg in `folder`; former ones are replaced.

    Returns:
        The paths written, in this order.
    """
    from madformer.report.figure import draw

    markdown, table = folder / f"{stem}.md", folder / f"{stem}.csv"
    pictures = {folder / f"{stem}.{kind}": content for kind, content in draw(report).items()}
    write_text(markdown, f"{report.markdown()}\n![{report.title}]({stem}.svg)\n")
    write_text(table, report.csv())
    for path, content in pictures.items():
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return [markdown, table, *pictures]
