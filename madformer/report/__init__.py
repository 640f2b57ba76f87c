"""Reports on trained runs: tables, CSV and figures of quality against cost."""

from __future__ import annotations

from madformer.report.points import Curve, Row, curves_of_runs, curves_of_sweep
from madformer.report.tables import Report, build_report
from madformer.report.write import document, load, write_report

__all__ = ["Curve", "Report", "Row", "build_report", "curves_of_runs", "curves_of_sweep", "document", "load", "write_report"]
