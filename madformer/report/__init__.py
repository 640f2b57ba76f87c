"""Curves of trained runs side by side: tables, CSV and a figure of quality against NFE, FLOPs and seconds."""

from __future__ import annotations

from madformer.report.table import Curve, Report, Row, build_report, curves_of_runs
from madformer.report.write import write_report

__all__ = ["Curve", "Report", "Row", "build_report", "curves_of_runs", "write_report"]
