"""`madformer report`: what is to be reported on, and where the report goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from madformer.config import InputError
from madformer.evaluation.record import read_points
from madformer.report.costs import parse_against
from madformer.report.rows import Curve, curves_of_runs
from madformer.report.table import build_report
from madformer.report.write import write_report
from madformer.sweep.loading import load_sweep
from madformer.sweep.spec import Sweep

_log = logging.getLogger(__name__)


def report_on(
    sources: Sequence[str], out: Path | None, metric: str | None = None, against: str | None = None, samples: int = 0
) -> None:
    """Print the tables of a sweep (a YAML file and overrides) or of runs (their folders), and write their files.

    Args:
        sources: what is reported on.
        out: folder of the files; None: the sweep's own, or `report`.
        metric: name of the metric; None: the first one recorded.
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


def curves_of_sweep(sweep: Sweep) -> list[Curve]:
    """All cells that were evaluated, at the sweep's own budgets, with a word on the others.

    Raises:
        InputError: none is evaluated; the message says how to do that.
    """
    if sweep.search is None:
        cells = sweep.cells()
        budgets = {cell.run: frozenset(cell.budgets) for cell in cells}
    else:
        from madformer.sweep.search import tried_cells

        cells = list({cell.run: cell for cell in tried_cells(sweep)}.values())  # of several budgets, one for each
        budgets = {cell.run: frozenset(sweep.search.nfe) for cell in cells}
    measured = [cell for cell in cells if any(point["nfe"] in budgets[cell.run] for point in read_points(cell.run))]
    remedy = "madformer sweep run does that, and goes on where it stopped"
    if not measured:
        raise InputError(f"{sweep.name}: none of {len(cells)} cells is evaluated: {remedy}")
    if missing := [cell.name for cell in cells if cell not in measured]:
        why = remedy if sweep.search is None else "they were ended early, have failed, or are not done yet"
        _log.warning("%d of %d cells are not evaluated (%s, ...): %s", len(missing), len(cells), missing[0], why)
    return [
        Curve(cell.name.removesuffix(f"-s{cell.seed}"), cell.run, cell.axes, cell.seed, budgets[cell.run]) for cell in measured
    ]


def _write(curves: Sequence[Curve], title: str, folder: Path, metric: str | None, against: Sequence[str], samples: int) -> None:
    report = build_report(curves, title, metric)
    paths = write_report(report, folder, "report", against, samples)
    print(report.markdown())
    print("\n".join(map(str, paths)))
