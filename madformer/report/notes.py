"""The notes above a report's tables: how the numbers were made, and their limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from madformer.evaluation.measurement import DEFAULTS, DEPTH, HELD_OUT, Measurement, Point, differing, higher_is_better
from madformer.report.formatting import counted, distinct, number
from madformer.report.points import TUNED, Group, Row, columns_of
from madformer.report.statistics import Estimate, Over, differ, over_training

_SPREADS: dict[Over, str] = {
    "training seeds": "± is the 95 % confidence interval of the mean over training seeds (Student's t).",
    "evaluation seeds": "± … † is the 95 % confidence interval of the mean over evaluation seeds (Student's t): "
    "it is about sampling and says nothing about training again.",
    "checkpoints": "± … ‡ is the standard deviation over checkpoints of one run, no confidence interval.",
}

_NOTEWORTHY = 0.05
"""Share of a value from which its bias is mentioned."""


def notes(groups: Sequence[Group], rows: Sequence[Row], metric: str) -> list[str]:
    """How a report's numbers were measured, a sentence or two each."""
    points = [point for group in groups for point in group.points]
    used = {estimated.over for row in rows for estimated in row.quality.values()}
    return [
        *_gaps(rows, metric),
        f"Metric {metric}, {'higher' if higher_is_better(metric) else 'lower'} is better; {_repeated(groups)}.",
        *(text for over, text in _SPREADS.items() if over in used),
        _sampled(groups, points),
        measured(points),
        *incomparable([Measurement.of_point(point).conditions for point in points], "points"),
        *_biases(rows),
    ]


def incomparable(conditions: Sequence[Mapping[str, Any]], noun: str) -> list[str]:
    """A warning if lines of the record were made under conditions that differ."""
    names = differing(conditions)
    return [f"**Not all {noun} are comparable**: they differ in {', '.join(names)}."] if names else []


def trained_for(entries: Sequence[Mapping[str, Any]]) -> str:
    """Such as `training step 1,000`."""
    return f"training step {distinct(entry['step'] for entry in entries)}"


def _repeated(groups: Sequence[Group]) -> str:
    """How many seeds and checkpoints are behind the numbers."""
    runs = [curve for group in groups for curve in group.curves]
    texts = [counted((len(group.curves) for group in groups), "training seed")]
    for key, noun in (("seed", "evaluation seed"), ("checkpoint", "checkpoint")):
        counts = {len({point[key] for point in points}) for curve in runs for points in curve.points.values()}
        if counts != {1}:
            texts.append(counted(counts, noun))
    return f"{', '.join(texts)} each"


def _sampled(groups: Sequence[Group], points: Sequence[Point]) -> str:
    main = next(group.sampling for group in groups if not group.difference)
    otherwise = " unless a label says otherwise" if any(group.difference for group in groups) else ""
    otherwise += " (tuned: see *Sampling chosen*)" if any(group.is_tuned for group in groups) else ""
    texts = {**main.texts, "sampler": f"{main.sampler} sampler"}
    for name in ("spacing", "guidance_interval", DEPTH):
        if name == DEPTH or main.curve_fields[name] == DEFAULTS[name]:
            del texts[name]
    samples = distinct(point["num_samples"] for point in points)
    return f"{samples} samples a point; {', '.join(texts.values())}{otherwise}; {trained_for(points)}."


@dataclass(frozen=True)
class _Design:
    """A design at a budget, fixed and tuned, over the training seeds that have both."""

    name: str
    seeds: tuple[int, ...]
    fixed: Estimate
    tuned: Estimate


def _gaps(rows: Sequence[Row], metric: str) -> Iterator[str]:
    """What tuning leaves of the gap between designs, at the first and the last budget at which two or more were tuned."""
    found: dict[str, list[_Design]] = {}
    for column in columns_of(rows):
        at = {(row.group.base, row.group.difference): row for row in rows if column.holds(row)}
        pairs = [(at[base, ""], row) for (base, difference), row in at.items() if difference == TUNED and (base, "") in at]
        designs = [design for fixed, tuned in pairs if (design := _design(fixed, tuned, metric)).seeds]
        if len(designs) > 1:
            found[str(column)] = designs
    for name in dict.fromkeys([*list(found)[:1], *list(found)[-1:]]):
        yield f"At {name}, {_gap(found[name], higher_is_better(metric))}"


def _design(fixed: Row, tuned: Row, metric: str) -> _Design:
    of_fixed, of_tuned = (
        dict(zip(row.seeds, quality.values if quality.over == "training seeds" else (quality.mean,), strict=True))
        for row, quality in ((row, row.quality[metric]) for row in (fixed, tuned))
    )
    seeds = tuple(seed for seed in of_fixed if seed in of_tuned)
    estimates = (over_training([values[seed] for seed in seeds]) for values in (of_fixed, of_tuned))
    return _Design(fixed.group.base, seeds, *estimates)


def _gap(designs: Sequence[_Design], higher: bool) -> str:
    """The best and the worst at the fixed sampler, there and tuned."""
    sign = -1 if higher else 1
    best, *_, worst = sorted(designs, key=lambda design: sign * design.fixed.mean)
    best_tuned = min(designs, key=lambda design: sign * design.tuned.mean)
    before, after = sign * (worst.fixed.mean - best.fixed.mean), sign * (worst.tuned.mean - best.tuned.mean)
    paired, seeds = best.seeds == worst.seeds, counted([len(best.seeds), len(worst.seeds)], "seed")
    clear = [differ(best.fixed, worst.fixed, paired), differ(best.tuned, worst.tuned, paired)]
    doubt_before, doubt_after = (f" (not clear over {seeds})" if is_clear is False else "" for is_clear in clear)
    names = best.name, worst.name
    if len(designs) > 2 and before > 0:
        names = f"{best.name}, the best of {len(designs)},", f"{worst.name}, the worst,"
    text = f"{_lead(*names, before)} at the fixed sampler{doubt_before}"
    if before > 0 and after > 0:
        percent = round(100 * after / before)
        share = f"{percent} % of the gap is left" if percent <= 100 else f"the gap grows by {percent - 100} %"
        text += f" and by {number(after)} tuned{doubt_after}" + ("" if doubt_before else f": {share}")
    else:
        text += f"; tuned, {_lead(best.name, worst.name, after)}{doubt_after}"
    if best_tuned.tuned.mean not in (best.tuned.mean, worst.tuned.mean):
        text += f"; the best tuned is {best_tuned.name}"
    return text + (" (one seed, not tested)." if None in clear else ".")


def _lead(better: str, worse: str, gap: float) -> str:
    if gap == 0:
        return f"{better} and {worse} tie"
    return f"{better} leads {worse} by {number(gap)}" if gap > 0 else f"{worse} leads {better} by {number(-gap)}"


def measured(points: Sequence[Point]) -> str:
    """Where seconds come from."""
    timed = [point for point in points if point.get("seconds_per_image") is not None]
    if not timed:
        return "FLOPs are counted from the configuration; seconds were not measured."
    where = sorted({f"{point.get('device', 'unknown')}" + _shared(point) for point in timed})
    some = "" if len(timed) == len(points) else f" for {len(timed)} of {len(points)} points"
    apart = " and cannot be compared" if len(where) > 1 else ""
    return f"FLOPs are counted from the configuration; seconds were measured{some} on {', '.join(where)}{apart}."


def _shared(point: Point) -> str:
    """The threads of a processor, and processes where several shared the work."""
    texts = [] if point.get("threads") is None else [counted([point["threads"]], "thread")]
    if point.get("processes", 1) > 1:
        texts.append(f"{point['processes']} processes")
    return f" ({', '.join(texts)})" if texts else ""


def _biases(rows: Sequence[Row]) -> Iterator[str]:
    """Where a good part of a distance is there for the number of samples alone."""
    for metric in dict.fromkeys(name for row in rows for name in row.bias):
        having = [row for row in rows if metric in row.bias and row.quality[metric].mean > 0]
        shares = [row.bias[metric] / row.quality[metric].mean for row in having]
        high = [row for row, share in zip(having, shares, strict=True) if share > _NOTEWORTHY]
        if not high:
            continue
        worst = having[shares.index(max(shares))]
        biases = [row.bias[metric] for row in high]
        about = " – ".join(dict.fromkeys(f"{value:.2g}" for value in (min(biases), max(biases))))
        samples = distinct(point["num_samples"] for row in high for point in row.group.points)
        images = " and of the held-out images" if metric.endswith(HELD_OUT) else ""
        yield (
            f"Of {metric}, about {about} are the bias of {samples} samples{images}, which perfect ones would have too: "
            f"more than 5 % of {len(high)} of {len(having)} values, up to {100 * max(shares):.0f} % "
            f"({worst.label} at NFE {worst.nfe})."
        )
