"""Points, means and diagnostics as a run records them."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from madformer.config.evaluation import SHIPPED_NETWORKS

INCEPTION = {"feature_networks": [{"name": "inception", "label": "inception", "width": 2048, "sha256": "1c"}]}
"""What other points than those of the digits' network have."""


def point(nfe: int, value: float, **changes: Any) -> dict[str, Any]:
    """A digits run's point: eight layers, all of which iterate, in 0.5 MFLOPs and 250 microseconds for each evaluation."""
    return {
        "kind": "point",
        "nfe": nfe,
        "nfe_actual": nfe // 8 * 8,
        "steps": nfe // 8,
        "metrics": {"fd_digits": value},
        "checkpoint": "step-00001000.ckpt",
        "step": 1000,
        "weights": "ema",
        "weights_sha256": "0a",
        "sampler": "ddim",
        "guidance": 1.0,
        "num_samples": 1024,
        "seed": 0,
        "prompts": None,
        "precision": "32-true",
        "codec": {"name": "pixels", "sha256": "0e", "dtype": "float32"},
        "feature_networks": [{"name": "digits", "label": "digits", "width": 64, "sha256": SHIPPED_NETWORKS["digits"]}],
        "references": [{"source": "digits", "images": 1797, "sha256": "0b"}],
        "bias": {"fd_digits": 0.02},
        "batch_size": 256,
        "tflops_per_image": nfe * 5e-7,
        "seconds_per_image": nfe * 2.5e-4,
        "seconds_per_block": [nfe * 5e-5, nfe * 7.5e-5],
        "seconds": nfe * 0.256,
        "peak_memory_gib": None,
        "config_hash": "0d",
        "device": "cpu",
        "threads": 1,
        "processes": 1,
        "versions": {"madformer": "0.1.0", "torch": "2.13.0"},
        "time": "2026-01-01T00:00:00+00:00",
        "command": "madformer evaluate runs/digits",
        **changes,
    }


def at(step: int, **changes: Any) -> dict[str, Any]:
    """Another checkpoint's point: what `point` is to be given."""
    return {"checkpoint": f"step-{step:08d}.ckpt", "step": step, "weights_sha256": f"{step:02x}", **changes}


def mean(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean line of points of one budget, of one curve."""
    first = points[0]
    names = ("nfe", "steps", "weights", "sampler", "guidance", "num_samples", "prompts", "precision", "codec")
    return {
        "kind": "mean",
        **{name: first[name] for name in (*names, "references", "feature_networks", "config_hash", "time")},
        "checkpoints": list(dict.fromkeys(point["checkpoint"] for point in points)),
        "seeds": list(dict.fromkeys(point["seed"] for point in points)),
        "metrics": {name: fmean(point["metrics"][name] for point in points) for name in first["metrics"]},
        "standard_deviations": {name: stdev(point["metrics"][name] for point in points) for name in first["metrics"]},
        "count": len(points),
    }


UNIFORM = {"sampler": "ddim", "spacing": "uniform", "guidance": 1.0, "guidance_interval": "all", "weights": "ema"}
"""How `point` is sampled, as a line of kind `tuning` says it."""


def tuned(nfe: int, value: float, default: float, spacing: str = "power:2", **changes: Any) -> list[dict[str, Any]]:
    """What tuning of a single run at a budget records: the tuned point, that of the default (if it is another), the choice.

    Args:
        value, default: measured with UniPC and this spacing, and with the default; equal values: the default is chosen.
    """
    sampling = UNIFORM if value == default else {**UNIFORM, "sampler": "unipc", "spacing": spacing}
    points = [point(nfe, value, seed=3999, tuned=True, tries=24, **sampling, **changes)]
    points += [] if value == default else [point(nfe, default, seed=3999, **changes)]
    found = {"sampling": sampling, "default": UNIFORM, "difference": value - default, "half_width": None}
    limits = {"nfe": nfe, "steps": nfe // 8, "step": points[0]["step"], "tries": 24, "most_tries": 24, "seeds": [3999]}
    return [*points, {"kind": "tuning", "metric": next(iter(points[0]["metrics"])), **limits, **found}]


def diagnostics(scale: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Diagnostics of two blocks at three timesteps; all losses and gaps grow with `scale`."""
    return {
        "kind": "diagnostics",
        "checkpoint": "step-00001000.ckpt",
        "step": 1000,
        "weights": "ema",
        "weights_sha256": "0a",
        "config_hash": "0d",
        "images": 256,
        "held_out": True,
        "source": "digits",
        "seed": 0,
        "steps": 4,
        "nfe": 32,
        "sampler": "ddim",
        "timesteps": [49, 499, 949],
        "loss_by_timestep": [0.125 * scale, 0.25 * scale, 0.5 * scale],
        "loss_by_block": [0.375 * scale, 0.25 * scale],
        "loss": [[0.125 * scale, 0.125 * scale], [0.25 * scale, 0.25 * scale], [0.75 * scale, 0.25 * scale]],
        "exposure": {
            "teacher_forced": [0.375 * scale, 0.25 * scale],
            "self_generated": [0.375 * scale, 0.5 * scale],
            "gap": [0.0, 0.25 * scale],
        },
        "condition_explains": [0.25, 0.75],
        "time": "2026-01-01T00:00:00+00:00",
        **changes,
    }


DENOISING: dict[str, Any] = {
    "denoising_timesteps": [0, 10, 999],
    "denoising_error": [0.5, 0.125, 0.25],
    "noisy_error": [0.25, 0.5, 2.0],
    "mean_error": 0.5,
    "denoising_worse_than": {"noisy": [0], "mean": [], "larger": [0]},
}
"""The denoising error, which diagnostics of earlier versions lack."""


def recorded(run: Path, *points: dict[str, Any]) -> Path:
    """A run's folder with these lines in its record."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "evaluations.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in points)
    return run
