"""`madformer report`: what is to be reported on, and where the report goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madformer.config import InputError
from madformer.report.table import Curve, build_report, curves_of_runs
from madformer.report.write import write_report
from madformer.sweep.spec import Sweep, load_sweep


def report_on(sources: Sequence[str], out: Path | None) -> None:
    """Print the table of a sweep (a YAML file and overrides) or of runs (their folders), and write its files.

    Raises:
        InputError: nothing named, no such sweep or run, or a run that was not evaluated.
    """
    first = Path(sources[0])
    if first.suffix in (".yaml", ".yml"):
        sweep = load_sweep(first, sources[1:])
        write_sweep_report(sweep, out)
    else:
        _write(curves_of_runs([Path(source) for source in sources]), "Runs side by side", out or Path("report"))


def write_sweep_report(sweep: Sweep, out: Path | None = None) -> None:
    """Print and write the report of a sweep.

    Raises:
        InputError: cells that were not evaluated; the message says how to do that.
    """
    cells = sweep.cells()
    if missing := [cell.name for cell in cells if not (cell.run / "evaluations.jsonl").exists()]:
        remedy = "madformer sweep run does that, and goes on where it stopped"
        raise InputError(f"{sweep.name}: {len(missing)} of {len(cells)} cells are not evaluated ({missing[0]}, ...): {remedy}")
    curves = [Curve(cell.name.removesuffix(f"-s{cell.seed}"), cell.run, cell.axes, cell.seed) for cell in cells]
    _write(curves, sweep.name, out or sweep.folder)


def _write(curves: Sequence[Curve], title: str, folder: Path) -> None:
    report = build_report(curves, title)
    paths = write_report(report, folder, "report")
    print(report.markdown())
    print("\n".join(map(str, paths)))
