"""The figures of a report: quality against what it costs, and diagnostics; one line for each label."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from madformer.report.costs import AGAINST, NFE
from madformer.report.diagnostics import Diagnosis, Diagnostics
from madformer.report.estimate import Estimate
from madformer.report.panels import Look, fit, highlight, line, log_ticks, looks, pictures
from madformer.report.table import Report


def draw(report: Report, against: Sequence[str] = AGAINST) -> dict[str, bytes]:
    """The report's metric against costs: kind of file (`png`, `svg`) -> its contents.

    Args:
        report: what to draw.
        against: a panel for each, `nfe` or a name in `COSTS`.
    """
    chosen = looks({group.label: (group.base, group.aside) for group in report.groups})

    def fill(panels: Sequence[Axes]) -> None:
        for panel, cost in zip(panels, against, strict=True):
            _against(panel, report, cost, chosen)
        panels[0].set_ylabel(f"{report.metric} ({report.better} is better)")

    labels = [*chosen, *(["Pareto front"] if len(chosen) > 1 else [])]
    return pictures(len(against), labels, report.title, fill, sharey=True)


def draw_diagnostics(diagnostics: Diagnostics, title: str) -> dict[str, bytes]:
    """Where models err, by timestep and by block: kind of file (`png`, `svg`) -> its contents."""
    diagnoses = diagnostics.diagnoses
    chosen = looks({diagnosis.label: (diagnosis.label, "") for diagnosis in diagnoses})

    def fill(panels: Sequence[Axes]) -> None:
        by_timestep, gap, condition = panels
        _series(by_timestep, diagnoses, chosen, lambda entry: entry.loss_by_timestep, lambda entry: entry.timesteps)
        _series(gap, diagnoses, chosen, lambda entry: entry.exposure_gap)
        _series(condition, diagnoses, chosen, lambda entry: entry.condition_explains)
        by_timestep.set(xlabel="timestep (noise level)", ylabel="denoising loss")
        gap.set(xlabel="block, in the order of generation", ylabel="exposure gap")
        condition.set(xlabel="block, in the order of generation", ylabel="variance that the condition explains")

    return pictures(3, list(chosen), f"{title}: diagnostics", fill)


def _against(panel: Axes, report: Report, cost: str, chosen: dict[str, Look]) -> None:
    """One line for each label at the costs of its rows, and the Pareto front of all of them below."""
    costs = _costs(report, cost)
    estimates = [row.quality[report.metric] for row in report.rows]
    fit(panel, estimates, log=True)
    for label, look in chosen.items():
        points = [
            (spent, estimated)
            for row, spent, estimated in zip(report.rows, costs, estimates, strict=True)
            if row.label == label and spent is not None
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        line(panel, label, look, x, y)
    if len(chosen) > 1:
        front = report.front(cost)
        cheapest_first = sorted(
            (spent, estimated.mean)
            for row, spent, estimated in zip(report.rows, costs, estimates, strict=True)
            if spent is not None and row in front
        )
        highlight(panel, "Pareto front", cheapest_first)
    known = [spent for spent in costs if spent is not None]
    if cost == NFE:
        panel.set_xlabel("layer evaluations per block (NFE)")
        _budget_ticks(panel, report.budgets)
    else:
        panel.set_xlabel(report.unit(cost).title)
        if known:
            panel.set_xscale("log")
            log_ticks(panel.xaxis, known)
        else:
            panel.set_xticks([])
    if len(known) < len(costs):
        _remark(panel, "not measured for all" if known else "not measured")


def _costs(report: Report, cost: str) -> list[float | None]:
    """What each row cost, in the unit of the report."""
    if cost == NFE:
        return [row.nfe for row in report.rows]
    factor, spent = report.unit(cost).factor, [row.costs[cost] for row in report.rows]
    return [None if value is None else value * factor for value in spent]


def _series(
    panel: Axes,
    diagnoses: Sequence[Diagnosis],
    chosen: dict[str, Look],
    values_of: Callable[[Diagnosis], Sequence[Estimate]],
    steps_of: Callable[[Diagnosis], Sequence[int]] | None = None,
) -> None:
    """One line for each label, by timestep or by block."""
    known = [value for diagnosis in diagnoses for value in values_of(diagnosis)]
    if not known:
        panel.set(xticks=[], yticks=[])
        _remark(panel, "no condition")
        return
    fit(panel, known, log=steps_of is not None)
    for diagnosis in diagnoses:
        values = values_of(diagnosis)
        steps = steps_of(diagnosis) if steps_of else range(len(values))
        line(panel, diagnosis.label, chosen[diagnosis.label], steps, values)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _budget_ticks(panel: Axes, budgets: Sequence[int]) -> None:
    """The budgets themselves as ticks, thinned where there are many."""
    panel.set_xscale("log", base=2)
    shown = budgets[:: math.ceil(len(budgets) / 8)]
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_minor_locator(NullLocator())


def _remark(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color="0.5")
