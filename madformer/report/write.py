"""`madformer report`: choose the runs, and write the report's files."""

from __future__ import annotations

import base64
import errno
import html
import itertools
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markdown_it import MarkdownIt

from madformer.config import load_run, trained_fields
from madformer.config.identity import is_run
from madformer.config.validation import typed_path
from madformer.errors import InputError, printable
from madformer.evaluation.measurement import DISTANCE, Point, Sampling
from madformer.evaluation.record import read_points, record_path
from madformer.evaluation.tensorboard import write_pictures
from madformer.progress import print_markdown
from madformer.report.contrasts import Choice, Verdict
from madformer.report.diagnostics_report import draw_diagnostics
from madformer.report.formatting import AGAINST, COSTS, NOTHING, csv_of, csv_text, distinct, html_table, page, parse_against
from madformer.report.points import Curve, Row, common_columns, curves_of_runs, curves_of_sweep, gather
from madformer.report.statistics import Estimate
from madformer.report.tables import Report, build_report
from madformer.runs.files import atomic_write, to_json
from madformer.sweep.adaptive import assess
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.spec import Sweep

_log = logging.getLogger(__name__)

_TYPES = {"svg": "image/svg+xml", "png": "image/png"}


def _page(report: Report, folder: Path, pictures: Mapping[str, bytes], against: Sequence[str]) -> str:
    """The page of a report in `folder`: curves to explore, tables, figures, and where each run's record lies."""
    from madformer.report.figures import view

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink", "reference"])
    figure, *others = (
        f'<p><img alt="{name}" src="data:{_TYPES[name[-3:]]};base64,{base64.b64encode(content).decode()}"></p>\n'
        for name, content in pictures.items()
    )
    runs, facts = _runs(report, folder)
    tables = [renderer.render("\n\n".join(parts)) for parts in ([report.quality(), report.measured()], report.details())]
    answer = renderer.render("\n\n".join(report.answer()))
    answer += f'<div class="caution">{renderer.render(report.caution)}</div>\n' if report.caution else ""
    places = {"title": html.escape(report.title), "answer": answer, "facts": facts, "figure": figure}
    places["body"] = "".join([tables[0], *others, tables[1], "<h3>Runs</h3>\n", runs])
    return page(places, {"report": to_json(document(report)), "view": to_json(view(report, against))})


def _runs(report: Report, folder: Path) -> tuple[str, str]:
    """HTML: a table of the runs with what differs between them and links to their records, and the facts above all curves."""
    fields: dict[Path, dict[str, list[str]]] = {}
    points: dict[Path, list[Point]] = {}
    for group in report.groups:
        for run, seed, curve in zip(group.runs, group.seeds, group.curves, strict=True):
            own = trained_fields(load_run(run)) if report.sweep is None and is_run(run) else group.axes
            for name, value in {**own, "seed": seed}.items():
                fields.setdefault(run, {}).setdefault(name, []).append(str(value))
            points.setdefault(run, []).extend(itertools.chain.from_iterable(curve.points.values()))
    # An elastic run stands in several groups, each of another depth.
    texts = {run: {name: ", ".join(dict.fromkeys(values)) for name, values in own.items()} for run, own in fields.items()}
    names = [
        name for name in dict.fromkeys(itertools.chain(*texts.values())) if len({own.get(name) for own in texts.values()}) > 1
    ]
    lines = [["run (its record)", *names, "training steps", "measured (UTC)"]]
    for run, own in texts.items():
        steps, times = distinct(point["step"] for point in points[run]), [str(point["time"]) for point in points[run]]
        lines.append([run.name, *(own.get(name, NOTHING) for name in names), steps, max(times)[:16].replace("T", " ")])
    links = [quote(os.path.relpath(record_path(run), folder)) for run in texts]
    days = sorted({str(point["time"])[:10] for each in points.values() for point in each})
    found = [f"{name}: {', '.join(dict.fromkeys(own.get(name, NOTHING) for own in texts.values()))}" for name in names]
    facts = {"Measured": " to ".join(dict.fromkeys([days[0], days[-1]])), "Command": report.command}
    facts |= {"Runs": str(len(texts)), "They differ in": "; ".join(found)}
    shown = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>\n" for name, text in facts.items() if text)
    return html_table(lines, links), shown


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
    said |= {"caution": report.caution.replace("*", "")} if report.caution else {}
    said |= {"command": report.command} if report.command else {}
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
    texts = {f"{stem}.md": markdown, f"{stem}.html": _page(report, folder, shown, against), f"{stem}.csv": report.csv()}
    texts[f"{stem}.json"] = to_json(document(report), indent=1, ensure_ascii=False) + "\n"
    for ending, records in (("contrasts", _contrast_records(verdict)), ("best", _choice_records(verdict.choices))):
        if records:
            texts[f"{stem}-{ending}.csv"] = csv_of(records)
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


def draw_samples(report: Report, count: int) -> dict[str, bytes]:
    """Images of each label's first run, at the least and the greatest budget of all: kind of file (`png`) -> its contents.

    Image i of every row grew from the same noise, drawn for the whole image, and has the same prompt. The files are kept in
    RUN/samples/compared and not made again.

    Raises:
        InputError: no budget that all labels have, images of several sizes, a run without the checkpoint that was evaluated,
            or files there that were made in another way.
    """
    from madformer.data.codec import to_tiles
    from madformer.evaluation.write_samples import compared_samples
    from madformer.report.figures import contact_sheet

    columns = common_columns(report.rows)
    if not columns:
        raise InputError("--samples: there is no budget that all labels were evaluated at")
    sheets = []
    for column in dict.fromkeys([columns[0], columns[-1]]):
        rows = [row for row in report.rows if column.holds(row)]
        images = [compared_samples(*_newest(row), row.samplings[0], count) for row in rows]
        if len(sizes := {" x ".join(map(str, each.shape[1:3])) for each in images}) > 1:
            raise InputError(f"--samples: images of {' and '.join(sorted(sizes))} pixels have no noise in common")
        tiles_YX3 = to_tiles(np.concatenate(images), columns=count)
        sheets.append((str(column), [row.label for row in rows], tiles_YX3))
    return {"png": contact_sheet(f"{report.title}: samples from the same noise", sheets)}


def _newest(row: Row) -> tuple[Path, int]:
    """A row's first run, and the newest step at which it was measured."""
    first = row.group.seeds.index(row.seeds[0])
    return row.group.runs[first], max(point["step"] for point in row.group.curves[first].points[row.nfe])


def curves_of(sources: Sequence[str | Path]) -> tuple[list[Curve], str, Path, Sweep | None]:
    """The runs of a sweep (a YAML file and overrides), or runs (their folders).

    Returns:
        The runs, the report's title and usual folder, and the sweep if it is one.
    """
    first = Path(sources[0])
    if first.suffix in (".yaml", ".yml"):
        sweep = load_sweep(first, list(map(str, sources[1:])))
        return curves_of_sweep(sweep), sweep.name, sweep.folder, sweep
    runs = list(map(typed_path, sources))
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
    options = {"--out": out, "--metric": metric, "--against": against, "--samples": samples or None, "--reference": reference}
    given = [str(word) for option in options.items() if option[1] is not None for word in option]
    report = build_report(curves, title, metric, reference, decided)
    report = replace(report, command=shlex.join(["madformer", "report", *map(str, sources), *given]))
    if sweep is not None:
        report = replace(report, sweep=Path(sources[0]).resolve())
        if out is None:
            _require_own_place(folder, Path(sources[0]).resolve())
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            paths = write_report(report, out or folder, "report", panels, samples)
            if sweep is not None and out is None:
                pictures = {path.stem: path.read_bytes() for path in paths if path.suffix == ".png"}
                write_pictures(folder, pictures, max(point["time"] for group in report.groups for point in group.points))
    except OSError as error:
        if out is None and error.errno in (errno.EACCES, errno.EROFS):
            raise InputError(f"{folder} cannot be written ({error.strerror}): name another folder with --out") from error
        raise
    if as_json:
        print(printable(to_json(document(report), indent=1, ensure_ascii=False)))
        return
    print_markdown(report.markdown())
    print(printable("\n".join(map(str, paths))))
