"""A laboratory for mixed autoregressive/diffusion image generators.

The names below are imported on first use, so that `import madformer` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madformer.config import load_experiment
    from madformer.data.datamodule import LatentDataModule
    from madformer.evaluation.evaluate import evaluate
    from madformer.model import MADFormer, generate
    from madformer.sweep.spec import Sweep
    from madformer.training.module import LitMADFormer

__version__ = "0.1.0"

_MODULES = {
    "LatentDataModule": "data.datamodule",
    "LitMADFormer": "training.module",
    "MADFormer": "model",
    "Sweep": "sweep.spec",
    "evaluate": "evaluation.evaluate",
    "generate": "model",
    "load_experiment": "config",
}
"""Public name -> where it is defined."""

__all__ = [
    "LatentDataModule",
    "LitMADFormer",
    "MADFormer",
    "Sweep",
    "__version__",
    "evaluate",
    "generate",
    "load_experiment",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
