"""Small reports on runs that were never trained."""

from pathlib import Path
from typing import Any

from madformer.report import Curve, Report, build_report
from tests.points import point, recorded


def curve(root: Path, label: str, *points: dict[str, Any], seed: int = 0) -> Curve:
    run = recorded(root / f"{label}-s{seed}", *points)
    return Curve(label, run, {"model.diffusion_depth": int(label.removeprefix("d"))}, seed)


def small(root: Path) -> Report:
    return build_report(
        [
            curve(root, "d16", point(16, 1323.4), point(32, 30.04)),
            curve(root, "d2", point(16, 72.25), point(32, 30.06), point(128, 4.567)),
        ],
        "Digits",
    )


def seeds(root: Path) -> Report:
    """Two seeds of d2, of which one lacks a budget, and one of d4."""
    first = curve(root, "d2", point(16, 70.0), point(32, 30.0, seconds_per_image=0.001))
    second = curve(root, "d2", point(16, 75.0, seconds_per_image=0.006), seed=1)
    return build_report([second, curve(root, "d4", point(16, 72.0), point(32, 31.0)), first], "Seeds")
