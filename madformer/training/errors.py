"""How a run can end before its last step."""

from __future__ import annotations

from pathlib import Path


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the weights have not been touched by it."""


class Interrupted(RuntimeError):  # noqa: N818 - no error: it was asked for
    """The run was asked to stop, and has saved its state."""

    def __init__(self, run: Path, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}, state saved; to go on: madformer train --resume {run}")
        self.signal_number = signal_number
