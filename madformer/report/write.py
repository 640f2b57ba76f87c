"""`madformer report`: choose the runs, and write the report's files."""

from __future__ import annotations

import base64
import errno
import html
import itertools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from PIL import Image

from madformer.config import load_run
from madformer.errors import InputError, printable
from madformer.evaluation.measurement import DISTANCE, Sampling
from madformer.evaluation.record import read_points
from madformer.evaluation.request import SamplingRequest
from madformer.report.contrasts import Choice, Verdict
from madformer.report.diagnostics_report import draw_diagnostics
from madformer.report.formatting import AGAINST, COSTS, csv_text, parse_against
from madformer.report.points import Curve, Row, common_columns, curves_of_runs, curves_of_sweep, gather
from madformer.report.statistics import Estimate
from madformer.report.tables import Report, build_report
from madformer.runs.checkpoints import checkpoint_path
from madformer.runs.files import atomic_write, to_json
from madformer.runs.folder import is_run
from madformer.sweep.adaptive import assess
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.spec import Sweep

_log = logging.getLogger(__name__)

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


def document(report: Report) -> dict[str, Any]:
    """The report as one JSON object: what it says, its designs and points, and their comparisons."""
    verdict = report.verdict
    designs = [
        {
            "label": group.label,
            "design": group.design,
            "tuned": group.is_tuned,
            "axes": dict(group.axes),
            "seeds": group.seeds,
            "runs": list(map(str, group.runs)),
        }
        for group in report.groups
    ]
    points = [
        {
            "label": row.label,
            "design": row.group.design,
            "tuned": row.group.is_tuned,
            "nfe": row.nfe,
            "steps": row.steps,
            "seeds": row.seeds,
            "metrics": {name: _estimated(estimated) for name, estimated in row.quality.items()},
            "bias": dict(row.bias),
            "costs": {cost.column: row.costs[name] for name, cost in COSTS.items()},
        }
        for row in report.rows
    ]
    said: dict[str, Any] = {"title": report.title, "answer": verdict.answer.replace("*", ""), "notes": report.notes}
    said |= {} if report.sweep is None else {"sweep": str(report.sweep)}
    said |= {} if report.decided is None else {"decisions": report.decided.records}
    measured = {"metric": report.metric, "better": report.better, "reference": verdict.reference}
    comparisons = {"contrasts": _contrast_records(verdict), "best": _choice_records(verdict.choices)}
    comparisons |= {"crossings": _crossing_records(verdict), "training": _training_records(verdict)}
    return {**said, **measured, "designs": designs, "points": points, **comparisons}


def _estimated(estimated: Estimate) -> dict[str, Any]:
    return {"mean": estimated.mean, "interval": estimated.interval, "over": estimated.over, "values": estimated.values}


def _contrast_records(verdict: Verdict) -> list[dict[str, Any]]:
    """The contrasts as records, for CSV and JSON."""
    return [
        {
            "design": contrast.design,
            "reference": verdict.reference,
            "sampling": contrast.sampling,
            "at": str(contrast.column),
            "difference": found.mean,
            "ci_low": None if found.half_width is None else found.mean - found.half_width,
            "ci_high": None if found.half_width is None else found.mean + found.half_width,
            "effect": found.effect,
            "p": found.p,
            "p_holm": contrast.p,
            "paired": found.is_paired,
            "seeds": found.seeds,
        }
        for contrast in verdict.contrasts
        for found in [contrast.difference]
    ]


def _choice_records(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """The best design at each cost, as records."""
    return [
        {
            "sampling": choice.sampling,
            "axis": choice.axis,
            "cost": choice.cost,
            "best": choice.winner.name,
            "mean": choice.mean,
            "probability": choice.winner.probability,
            "decided": choice.winner.is_decided,
            "level": None if choice.winner.probability is None else list(choice.winner.level),
            "designs": list(choice.values),
        }
        for choice in choices
    ]


def _crossing_records(verdict: Verdict) -> list[dict[str, Any]]:
    """Where neighbours cross, as records."""
    return [
        {"sampling": pair.sampling, "axis": pair.axis, "designs": list(pair.designs), **asdict(pair.crossing)}
        for pair in verdict.neighbours
    ]


def _training_records(verdict: Verdict) -> list[dict[str, Any]]:
    """The best designs for each training budget, as records."""
    return [
        {"steps": training.steps, "flops": list(training.flops), "best": _choice_records(training.choices)}
        for training in verdict.trainings
    ]


def load(*sources: str | Path) -> list[dict[str, Any]]:
    """The points behind a report as a table, one row a point and training seed: `pandas.DataFrame(load("sweep.yaml"))`.

    Columns: `run`, `label`, `design`, `tuned`, the axes that set designs apart, `seed` (of training), `step`, `num_samples`,
    the fields of `Sampling` (its seed as `evaluation_seed`), costs with their units, and metrics. What a point lacks is None. A
    point that tuning chose and that is the default's stands in two rows, fixed and tuned.

    Args:
        sources: a sweep's YAML file and overrides, or folders of runs.

    Raises:
        InputError: as of `madformer report`.
    """
    rows: list[dict[str, Any]] = []
    for group in gather(curves_of(sources)[0])[1]:
        for run, seed, measured in zip(group.runs, group.seeds, group.curves, strict=True):
            named = {"run": str(run), "label": group.label, "design": group.design, "tuned": group.is_tuned, **group.axes}
            for point in itertools.chain.from_iterable(measured.points.values()):
                sampling = asdict(Sampling.of_point(point))
                sampling = {"evaluation_seed" if name == "seed" else name: value for name, value in sampling.items()}
                trained = {"seed": seed, "step": point["step"], "num_samples": point["num_samples"]}
                costs = {cost.column: cost.of(point) for cost in COSTS.values()}
                rows.append({**named, **trained, **sampling, **costs, **point["metrics"]})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


_SOMETIMES = (
    *(f"-{name}.csv" for name in ("paper", "contrasts", "best")),
    *(f"-{name}.{kind}" for name in ("contrasts", "training", "diagnostics") for kind in _TYPES),
    "-samples.png",
)
"""Files that not every report has."""


def write_report(report: Report, folder: Path, stem: str, against: Sequence[str] = AGAINST, samples: int = 0) -> list[Path]:
    """Write a report in all forms, in `folder`: `stem`.md, .html (which needs no other file), .csv, .json, .png and .svg.

    Further files: `stem`-contrasts.csv, .png and .svg and `stem`-best.csv if there are two designs or more,
    `stem`-training.png and .svg if a sweep varies `trainer.max_steps`, `stem`-paper.csv if the paper has models of these
    designs, `stem`-diagnostics.png and .svg if runs were diagnosed, `stem`-samples.png if samples are asked for.

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
    from madformer.report.figures import draw, draw_contrasts, draw_training

    verdict, pictures = report.verdict, {stem: draw(report, against)}
    if verdict.contrasts:
        pictures[f"{stem}-contrasts"] = draw_contrasts(report)
    if verdict.trainings:
        pictures[f"{stem}-training"] = draw_training(report)
    if report.diagnostics is not None:
        pictures[f"{stem}-diagnostics"] = draw_diagnostics(report.diagnostics, report.title)
    if samples:
        pictures[f"{stem}-samples"] = draw_samples(report, samples)
    drawn = {f"{name}.{kind}": content for name, kinds in pictures.items() for kind, content in kinds.items()}
    links = [f"{name}.{'svg' if 'svg' in kinds else 'png'}" for name, kinds in pictures.items()]
    markdown = report.markdown(links)
    shown = {link: drawn[link] for link in links}
    texts = {f"{stem}.md": markdown, f"{stem}.html": page(report.title, markdown, shown), f"{stem}.csv": report.csv()}
    texts[f"{stem}.json"] = to_json(document(report), indent=1, ensure_ascii=False) + "\n"
    for ending, records in (("contrasts", _contrast_records(verdict)), ("best", _choice_records(verdict.choices))):
        if records:
            texts[f"{stem}-{ending}.csv"] = _csv_of(records)
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


def _csv_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Records with the same keys as CSV; lists with semicolons between their entries."""
    lines = [["; ".join(value) if isinstance(value, list) else value for value in record.values()] for record in records]
    return csv_text([list(records[0]), *lines])


def draw_samples(report: Report, count: int) -> dict[str, bytes]:
    """Images of each label's first run, at the least and the greatest budget of all: kind of file (`png`) -> its contents.

    Image i of every row grew from the same noise, drawn for the whole image, and has the same prompt. The files are kept in
    RUN/samples/compared and not made again.

    Raises:
        InputError: no budget that all labels have, images of several sizes, a run without the checkpoint that was evaluated,
            or files there that were made in another way.
    """
    from madformer.data.image_files import to_tiles
    from madformer.report.figures import contact_sheet

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
    return {"png": contact_sheet(f"{report.title}: samples from the same noise", sheets)}


def _samples(row: Row, count: int) -> np.ndarray:
    """Images [B, Y, X, 3] of a row's first run, sampled as its points were, from the newest of their checkpoints."""
    from madformer.evaluation.write_samples import sample_path, write_samples

    first, sampling = row.group.seeds.index(row.seeds[0]), row.samplings[0]
    run, points = row.group.runs[first], row.group.curves[first].points[row.nfe]
    path = checkpoint_path(run, max(point["step"] for point in points))
    if not path.is_file():
        raise InputError(f"--samples: {path} was evaluated and is gone; evaluate one that is there: madformer evaluate {run}")
    named = [str(value) for value in sampling.curve_fields.values() if value is not None]
    folder = run / "samples/compared" / "-".join([path.stem, *named, f"{row.steps}steps"])
    write_samples(SamplingRequest(load_run(run), path, sampling, count), folder)
    return np.stack([_read(sample_path(folder, index)) for index in range(count)])


def _read(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def curves_of(sources: Sequence[str | Path]) -> tuple[list[Curve], str, Path, Sweep | None]:
    """The runs of a sweep (a YAML file and overrides), or runs (their folders).

    Returns:
        The runs, the report's title and usual folder, and the sweep if it is one.
    """
    first = Path(sources[0])
    if first.suffix in (".yaml", ".yml"):
        sweep = load_sweep(first, list(map(str, sources[1:])))
        return curves_of_sweep(sweep), sweep.name, sweep.folder, sweep
    runs = list(map(Path, sources))
    for reason, is_usable in (("no runs", is_run), ("not evaluated", lambda run: bool(read_points(run)))):
        usable = [run for run in runs if is_usable(run)]
        if 0 < len(usable) < len(runs):  # of a pattern such as runs/*
            _log.warning("%s: %s, left out", ", ".join(str(run) for run in runs if run not in usable), reason)
            runs = usable
    return curves_of_runs(runs), "Runs side by side", Path("report"), None


def _require_own_place(folder: Path, sweep: Path) -> None:
    """Refuse to overwrite the report of another sweep of the same name.

    Raises:
        InputError: there is one, and its file is still there.
    """
    path = folder / "report.json"
    try:
        other = Path(json.loads(path.read_text(encoding="utf-8"))["sweep"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other != sweep and other.is_file():
        remedy = "give one of them another name, or name a folder with --out"
        raise InputError(f"{path} is the report of another sweep of this name, {other}: {remedy}")


def report_on(
    sources: Sequence[str],
    out: Path | None,
    metric: str | None = None,
    against: str | None = None,
    samples: int = 0,
    reference: str | None = None,
    as_json: bool = False,
) -> None:
    """Print the tables of a sweep (a YAML file and overrides) or of runs (their folders), and write their files.

    Args:
        sources: what is reported on.
        out: folder of the files; None: the sweep's own, or `report`.
        metric: name of the metric; None: the first one that all runs have.
        against: panels of the figure with commas between them; None: NFE, FLOPs and seconds.
        samples: images of each label that are shown side by side; 0: none.
        reference: label of the design that others are compared with; None: the first.
        as_json: print the JSON document, and nothing else.

    Raises:
        InputError: nothing named, no such sweep, run, metric, panel, reference or samples, or a run that was not evaluated.
    """
    panels = parse_against(against)
    curves, title, folder, sweep = curves_of(sources)
    decided = assess(sweep) if sweep is not None and sweep.decide is not None else None
    if sweep is not None and sweep.decide is not None and sweep.decide.metric != DISTANCE:
        metric = metric or sweep.decide.metric
    report = build_report(curves, title, metric, reference, decided)
    if sweep is not None:
        report = replace(report, sweep=Path(sources[0]).resolve())
        if out is None:
            _require_own_place(folder, Path(sources[0]).resolve())
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            paths = write_report(report, out or folder, "report", panels, samples)
    except OSError as error:
        if out is None and error.errno in (errno.EACCES, errno.EROFS):
            raise InputError(f"{folder} cannot be written ({error.strerror}): name another folder with --out") from error
        raise
    if as_json:
        print(printable(to_json(document(report), indent=1, ensure_ascii=False)))
        return
    print(report.markdown())
    print(printable("\n".join(map(str, paths))))
