"""The cells that a sweep needs now. A sweep that decides adds seeds to designs with undecided contrasts. Needs no torch.

The cells follow from the runs' records alone. So a driver can take over from one that was killed, and several agree.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from madformer.config.evaluation import SHIPPED_NETWORKS
from madformer.config.validation import require
from madformer.errors import InputError
from madformer.evaluation.measurement import DISTANCE, HELD_OUT, INCEPTION, METRICS, Point
from madformer.runs.checkpoints import list_checkpoints
from madformer.sweep.cells import Cell, related, sweep_cells
from madformer.sweep.decisions import DEPTH_AXIS, Decide, Decision, decide, expected_seeds
from madformer.sweep.forecast import Estimates, assumed_device
from madformer.sweep.needs import cell_points, is_trained, tuned_points
from madformer.sweep.spec import Sweep

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Design:
    """Cells that differ only in their seed; elastic cells also at one diffusion depth."""

    cells: tuple[Cell, ...]
    """The cells by rising seed."""
    depth: int | None

    @property
    def axes(self) -> dict[str, Any]:
        """Axis -> value. For elastic cells, the depth is an axis too."""
        return {**self.cells[0].axes, **({} if self.depth is None else {DEPTH_AXIS: self.depth})}

    @property
    def label(self) -> str:
        """The design's name, such as d4, or elastic · D = 4."""
        return " · ".join(filter(None, [self.cells[0].design, "" if self.depth is None else f"D = {self.depth}"]))


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two designs at a budget, which a sweep compares seed by seed."""

    one: Design
    reference: Design
    nfe: int

    @property
    def label(self) -> str:
        """The contrast's name, such as d2 minus d4 at NFE 16."""
        return f"{self.one.label} minus {self.reference.label} at NFE {self.nfe}"

    @property
    def designs(self) -> tuple[Design, Design]:
        """Both designs, the reference last."""
        return self.one, self.reference


@dataclass(frozen=True)
class Assessment:
    """The decisions of a sweep so far, and the cells that it needs now."""

    cells: tuple[Cell, ...]
    """The cells that are needed now; all, if the sweep does not decide."""
    decisions: Mapping[Contrast, Decision] = field(default_factory=dict)
    expected: Mapping[Contrast, int] = field(default_factory=dict)
    """Estimated number of seeds that each contrast still needs."""
    is_too_long: bool = False
    """Whether `decide.hours` kept the sweep from adding seeds."""

    @property
    def lines(self) -> list[str]:
        """A line of text for each contrast."""
        lines = [self._line(contrast) for contrast in self.decisions]
        return [*lines, *(["No seeds are added: the sweep would take more than decide.hours."] if self.is_too_long else [])]

    @property
    def records(self) -> list[dict[str, Any]]:
        """A JSON record for each contrast."""
        return [
            {
                "one": contrast.one.label,
                "reference": contrast.reference.label,
                "nfe": contrast.nfe,
                "state": decision.state,
                "seeds": decision.seeds,
                "difference": decision.difference if decision.seeds else None,
                "interval": decision.interval if math.isfinite(decision.interval[0]) else None,
                "expected_seeds": self.expected[contrast],
            }
            for contrast, decision in self.decisions.items()
        ]

    @property
    def expected_runs(self) -> int:
        """Expected number of trainings in all, including those that are done."""
        counts = {id(cell): cell for cell in self.cells}
        for contrast, more in self.expected.items():
            seeds = self.decisions[contrast].seeds + more
            counts |= {id(cell): cell for design in contrast.designs for cell in design.cells[:seeds]}
        return len({cell.key for cell in counts.values()})

    def _line(self, contrast: Contrast) -> str:
        decision = self.decisions[contrast]
        low, high = decision.interval
        more = self.expected[contrast]
        if not math.isfinite(low):
            return f"{contrast.label}: {decision.seeds or 'no'} seeds yet, {more} to come"
        found = f"{decision.difference:+.3g} ({low:+.3g} to {high:+.3g}) after {decision.seeds} seeds"
        ahead = "" if decision.state != "undecided" else f", some {more} more expected" if more else ", at the limit"
        return f"{contrast.label}: {decision.state}, {found}{ahead}"


def contrasts_of(sweep: Sweep, designs: Sequence[Design] | None = None) -> list[Contrast]:
    """All contrasts of a sweep that decides. Those without data count too, as their number sets the level of each.

    Args:
        designs: the sweep's designs; None: they are made here.

    Raises:
        ConfigError: an axis lacks a value, an axis or a budget leaves nothing to compare, or no network has the metric.
    """
    assert sweep.decide is not None
    settings, contrasts = sweep.decide, list[Contrast]()
    for where, pairs in _pairs(sweep, settings, _designs(sweep) if designs is None else designs):
        found = [
            Contrast(one, other, nfe)
            for one, other in pairs
            for nfe in one.cells[0].budgets_at(one.depth)
            if nfe in other.cells[0].budgets_at(other.depth) and nfe in (settings.nfe or one.cells[0].budgets)
        ]
        require(len(found) > 0, where, settings.contrasts, "leaves no two designs to compare at one budget (decide.nfe)")
        contrasts += found
    for nfe in settings.nfe:
        legal = any(contrast.nfe == nfe for contrast in contrasts)
        require(legal, "decide.nfe", nfe, "no two designs are evaluated at it: set evaluate.nfe")
    _check_metric(settings.metric, contrasts[0].one.cells[0])
    return contrasts


def _designs(sweep: Sweep) -> list[Design]:
    by_design: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in sweep_cells(sweep):
        for depth in cell.depths:
            by_design.setdefault((repr(cell.axes), depth), []).append(cell)
    return [Design(tuple(cells), depth) for (_, depth), cells in by_design.items()]


def _pairs(sweep: Sweep, settings: Decide, designs: Sequence[Design]) -> Iterator[tuple[str, list[tuple[Design, Design]]]]:
    """Yield each key in the YAML file, and the pairs of designs that it names."""
    if settings.contrasts == "all":
        yield "decide.contrasts", list(itertools.combinations(designs, 2))
        return
    for axis, reference in settings.contrasts.items():
        values = list({repr(value): value for design in designs if (value := design.axes.get(axis)) is not None}.values())
        require(reference in values, f"decide.contrasts.{axis}", reference, f"must be one of {values}")
        tied = set(sweep.zip) if axis in sweep.zip else {axis}  # tied axes go together
        others = {design: [item for item in design.axes.items() if item[0] not in tied] for design in designs}
        yield (
            f"decide.contrasts.{axis}",
            [
                (one, other)
                for one, other in itertools.permutations(designs, 2)
                if others[one] == others[other] and one.axes.get(axis) != reference == other.axes.get(axis)
            ],
        )


def _check_metric(metric: str, cell: Cell) -> None:
    """Refuse the metric of a known network that the experiment does not name, before anything is trained."""
    networks, key = cell.config.evaluation.feature_networks, metric.removesuffix(HELD_OUT)
    shipped = [name for name in SHIPPED_NETWORKS if key.endswith(f"_{name}")]
    needed = shipped[0] if shipped else INCEPTION if key in ("fid", *METRICS) else ""
    legal = any(name.partition(":")[0] == needed for name in networks) or not needed
    require(legal, "decide.metric", metric, f"needs the network {needed} in evaluation.feature_networks = {list(networks)}")


def wanted_cells(sweep: Sweep) -> tuple[Cell, ...]:
    """The cells that a sweep needs now: all, or those of the seeds that its contrasts need."""
    return assess(sweep).cells


def assess(sweep: Sweep) -> Assessment:
    """Decide contrasts from the records, and add seeds to the designs of undecided ones.

    Raises:
        InputError: `decide.metric` was not measured.
    """
    cells = tuple(sweep_cells(sweep))
    if sweep.decide is None:
        return Assessment(cells)
    designs, values, rule = _designs(sweep), _Values(sweep.decide), sweep.decide.rule
    contrasts, counts = contrasts_of(sweep, designs), dict.fromkeys(designs, rule.first)
    while True:
        differences = {contrast: values.differences(contrast, counts) for contrast in contrasts}
        decisions, grown = decide(differences, rule), dict(counts)
        for contrast in contrasts:
            seeds = min(counts[design] for design in contrast.designs)
            if decisions[contrast].state == "undecided" and len(differences[contrast]) == seeds < rule.most:
                grown |= {design: max(grown[design], seeds + 1) for design in contrast.designs}
        wanted, more = _chosen(sweep, cells, counts), _chosen(sweep, cells, grown)
        is_too_long = _takes_too_long(sweep, sweep.decide, wanted, more)
        if grown == counts or is_too_long:
            return Assessment(wanted, decisions, expected_seeds(differences, rule), is_too_long)
        counts = grown


def trained_designs(sweep: Sweep) -> list[tuple[Cell, ...]]:
    """The trained cells of a sweep, grouped by design: cells of a group differ only in the seed.

    Raises:
        InputError: the sweep is a search, or no cell is trained.
    """
    if sweep.search is not None:
        raise InputError(f"{sweep.name} is a search, without designs: name its runs instead")
    designs: dict[str, list[Cell]] = {}
    for cell in wanted_cells(sweep):
        if is_trained(cell):
            designs.setdefault(repr(cell.axes), []).append(cell)
        else:
            _log.warning("%s is not trained: left out", cell.name)
    if not designs:
        raise InputError(f"{sweep.name}: none of its cells is trained; madformer sweep run does that")
    return [tuple(cells) for cells in designs.values()]


def _chosen(sweep: Sweep, cells: Sequence[Cell], counts: Mapping[Design, int]) -> tuple[Cell, ...]:
    """The cells of the first seeds of each design."""
    keys = {cell.key for design, count in counts.items() for cell in design.cells[:count]}
    return related(sweep, [cell for cell in cells if cell.key in keys])


def _takes_too_long(sweep: Sweep, settings: Decide, wanted: Sequence[Cell], more: Sequence[Cell]) -> bool:
    """Whether `more` cells would take the sweep beyond `decide.hours`; False if none of them is yet to begin."""
    known = {cell.key for cell in wanted}
    added = [cell for cell in more if cell.key not in known and not list_checkpoints(cell.run)]
    if settings.hours is None or not added:
        return False
    estimates = Estimates(more, assumed_device(sweep, None, None))
    return sum(estimates.cell_time(cell).total for cell in more) > 3600 * settings.hours


class _Values:
    """The measured values of the contrasts' cells."""

    def __init__(self, settings: Decide) -> None:
        self._settings = settings
        self._known: dict[tuple[str, int | None, int], float | None] = {}

    def differences(self, contrast: Contrast, counts: Mapping[Design, int]) -> list[float]:
        """The contrast's differences seed by seed, up to the first seed that one of the designs lacks."""
        found, seeds = list[float](), min(counts[design] for design in contrast.designs)
        for pair in itertools.islice(zip(*(design.cells for design in contrast.designs), strict=True), seeds):
            one, other = (
                self._value(cell, design.depth, contrast.nfe) for cell, design in zip(pair, contrast.designs, strict=True)
            )
            if one is None or other is None:
                break
            found.append(one - other)
        return found

    def _value(self, cell: Cell, depth: int | None, nfe: int) -> float | None:
        key = cell.key, depth, nfe
        if key not in self._known:
            try:
                measured = self._measured(cell, depth, nfe) if is_trained(cell) else None
            except (InputError, OSError):  # reported when the cell itself is read
                measured = None
            self._known[key] = None if measured is None else fmean(map(self._metric, measured))
        return self._known[key]

    def _measured(self, cell: Cell, depth: int | None, nfe: int) -> Sequence[Point] | None:
        """A cell's points at a depth and budget, one for each evaluation seed; None: some are missing."""
        [default] = [sampling for sampling in cell.defaults(nfe) if sampling.diffusion_depth == depth]
        if self._settings.sampling == "tuned":
            return tuned_points(cell, default)
        wanted = [each for each in cell.main_samplings if (each.nfe, each.diffusion_depth) == (nfe, depth)]
        points = cell_points(cell)
        found = [points.get((cell.max_steps, sampling)) for sampling in wanted]
        return [point for point in found if point is not None] if None not in found else None

    def _metric(self, point: Point) -> float:
        metrics, name = point["metrics"], self._settings.metric
        if name != DISTANCE and name not in metrics:
            raise InputError(f"decide.metric = {name}: not measured; there are {', '.join(metrics)}")
        return float(next(iter(metrics.values())) if name == DISTANCE else metrics[name])
