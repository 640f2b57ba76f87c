"""Errors that a user can meet; `cli` turns each into one line and an exit status."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """What was asked for cannot be done; the message says what is wrong, where, and what would be right."""


class DataError(InputError):
    """Data that cannot be learnt: broken images, files that are not what was written; the message says where and what to do."""


class ConfigError(InputError):
    """A configuration that cannot be run; the message names the field, its value and the legal ones."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the weights have not been touched by it."""


class Interrupted(RuntimeError):  # noqa: N818 - no error: it was asked for
    """The run was asked to stop, and has saved its state."""

    def __init__(self, run: Path, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}, state saved; to go on: madformer train --resume {run}")
        self.signal_number = signal_number
