"""`madformer report`: choose the runs, and write the report's files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from madformer.report.formatting import AGAINST, csv_text, parse_against
from madformer.report.points import Curve, curves_of_runs, curves_of_sweep
from madformer.report.tables import Report, build_report
from madformer.runs.files import atomic_write
from madformer.sweep.load_sweep import load_sweep

_TYPES = {"svg": "image/svg+xml", "png": "image/png"}

_FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; }}
h2 {{ margin-top: 0; }}
h3 {{ margin: 2.5rem 0 0.5rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.8rem; border-bottom: 1px solid #8884; white-space: nowrap; }}
tbody tr:hover {{ background: #8882; }}
img {{ max-width: 100%; background: white; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, markdown: str, pictures: Mapping[str, bytes]) -> str:
    """A page of Markdown in which links to pictures have become the pictures.

    Args:
        title: of the window.
        markdown: with tables; what looks like HTML in it is shown as it is.
        pictures: file name, as the links have it -> contents.
    """
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = renderer.render(markdown)
    for name, content in pictures.items():
        kind = _TYPES[name.rpartition(".")[2]]
        body = body.replace(f'src="{name}"', f'src="data:{kind};base64,{base64.b64encode(content).decode()}"')
    return _FRAME.format(title=html.escape(title), body=body)


_SOMETIMES = ("-paper.csv", "-diagnostics.png", "-diagnostics.svg", "-samples.png")
"""Files that not every report has."""


def write_report(report: Report, folder: Path, stem: str, against: Sequence[str] = AGAINST, samples: int = 0) -> list[Path]:
    """Write a report in all forms, in `folder`: `stem`.md, .html (which needs no other file), .csv, .png and .svg.

    Further files: `stem`-paper.csv if the paper has models of these designs, `stem`-diagnostics.png and .svg if runs were
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
    from madformer.report.figures import draw, draw_diagnostics

    pictures = {stem: draw(report, against)}
    if report.diagnostics is not None:
        pictures[f"{stem}-diagnostics"] = draw_diagnostics(report.diagnostics, report.title)
    if samples:
        from madformer.report.figures import draw_samples

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
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    for ending in _SOMETIMES:
        if (name := stem + ending) not in contents:
            (folder / name).unlink(missing_ok=True)  # of a former report: it is not of these numbers
    return [folder / name for name in contents]


def report_on(
    sources: Sequence[str], out: Path | None, metric: str | None = None, against: str | None = None, samples: int = 0
) -> None:
    """Print the tables of a sweep (a YAML file and overrides) or of runs (their folders), and write their files.

    Args:
        sources: what is reported on.
        out: folder of the files; None: the sweep's own, or `report`.
        metric: name of the metric; None: the first one that all runs have.
        against: panels of the figure with commas between them; None: NFE, FLOPs and seconds.
        samples: images of each label that are shown side by side; 0: none.

    Raises:
        InputError: nothing named, no such sweep, run, metric, panel or samples, or a run that was not evaluated.
    """
    first, panels = Path(sources[0]), parse_against(against)
    if first.suffix in (".yaml", ".yml"):
        sweep = load_sweep(first, sources[1:])
        _write(curves_of_sweep(sweep), sweep.name, out or sweep.folder, metric, panels, samples)
    else:
        curves = curves_of_runs([Path(source) for source in sources])
        _write(curves, "Runs side by side", out or Path("report"), metric, panels, samples)


def _write(curves: Sequence[Curve], title: str, folder: Path, metric: str | None, against: Sequence[str], samples: int) -> None:
    report = build_report(curves, title, metric)
    paths = write_report(report, folder, "report", against, samples)
    print(report.markdown())
    print("\n".join(map(str, paths)))
