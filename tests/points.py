"""Points of evaluations as a run records them."""

import json
from pathlib import Path
from typing import Any


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
        "batch_size": 256,
        "tflops_per_image": nfe * 5e-7,
        "seconds_per_image": nfe * 2.5e-4,
        "seconds": nfe * 0.256,
        "codec": "identity",
        "reference": {"name": "digits", "images": 1797, "sha256": "0b"},
        "feature_network": {"name": "digits", "sha256": "0c"},
        "config_hash": "0d",
        "device": "cpu",
        "threads": 1,
        "versions": {"madformer": "0.1.0", "torch": "2.13.0"},
        "time": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def recorded(run: Path, *points: dict[str, Any]) -> Path:
    """A run's folder with these points in its record."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "evaluations.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in points)
    return run
