"""`madformer report`: what is to be reported on, and where the report goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madformer.report.costs import parse_against
from madformer.report.curves import Curve, curves_of_runs, curves_of_sweep
from madformer.report.table import build_report
from madformer.report.write import write_report
from madformer.sweep.loading import load_sweep


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
