"""Errors that a user can meet. `cli.main` prints each as one line and exits with the status that the class names."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType

_REFERENCES = r"(?:\$\w+|\$\{[^{}]*\}|\*\*\*)+"
"""What stands for a secret: variables of the environment, or a mask."""

_SECRETS = (
    re.compile(rf"(:/{{1,2}}[^\s/?#@:\[]*:)(?!\d{{1,5}}(?:/|$)|:[\w.+-]+:|{_REFERENCES}@)[^\s'\"]+(?=@)"),
    re.compile(
        r"([?&#;](?:[\w.-]*(?:token|secret|passw|passphrase|signature|credential|api[-_]?key|access[-_]?key)[\w.-]*|sig|key|pwd|pass|auth)=)"
        rf"(?!{_REFERENCES}(?:[&#;'\"\s]|$))[^\s&#;'\"]+",
        re.IGNORECASE,
    ),
)
"""The password of a URL, and the value of a parameter that grants access, after the part that is no secret.

`zip://x::hf://...` is a chain of addresses, without a password.
"""


def mask_secrets(text: str) -> str:
    """A text with `***` in place of passwords, tokens and signatures in URLs; users, hosts and `$NAME` stay."""
    if "=" in text or ":/" in text:  # a path has one slash
        for pattern in _SECRETS:
            text = pattern.sub(r"\1***", text)
    return text


def printable(text: str) -> str:
    """A text for a terminal: without secrets, and with escapes in place of the characters that steer it."""
    text = mask_secrets(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t\xa0" else json.dumps(char)[1:-1] for char in text)


class InputError(ValueError):
    """A request that cannot be carried out. The message says what is wrong, where, and what to do. Exit status 2.

    Secrets in the message are masked.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(mask_secrets(str(message)))


class ConfigError(InputError):
    """A configuration that cannot be run. The message names the field, its value and the legal ones. Exit status 2."""


class DataError(InputError):
    """Data that cannot be used: too many broken images, or files that were changed. Exit status 2."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite. It is raised before the weights are changed. Exit status 1."""


class ProcessKilledError(RuntimeError):
    """A process ended without an error of its own, as when the system kills it for want of memory. Exit status 1."""


class Interrupted(RuntimeError):  # noqa: N818 - a request, not an error
    """A signal stopped the run, which has saved its state. Exit status 128 + the number of the signal."""

    def __init__(self, run: Path, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}, state saved; to go on: madformer train --resume {run}")
        self.signal_number = signal_number


class StoppedError(RuntimeError):
    """Nobody needs the rest of the work: another process failed, or the program that shares it was interrupted.

    It ends a process of shared work, never the program: no exit status.
    """


class BadImage(ValueError):  # noqa: N818 - the state of a row, not an error of the program
    """A row without a readable image. The message is the reason. Readers skip the row and count it: no exit status."""

    def __init__(self, message: object) -> None:
        super().__init__(mask_secrets(str(message)))


def describe(error: Exception) -> str:
    """An error in one line; of the system's, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def explain(error: RuntimeError) -> tuple[str, int]:
    """Message and exit status of a command that ended as it must: interrupted, diverged, killed, or something is missing here.

    Raises:
        RuntimeError: anything else is a defect and shows where.
    """
    if isinstance(error, Interrupted):
        return str(error), 128 + error.signal_number
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        remedy = "lower data.batch_size_per_device, data.codec_batch_size or evaluation.batch_size"
        return f"out of memory: {str(error).splitlines()[0]}; {remedy}, or set model.activation_checkpointing=true", 1
    if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):  # torch's
        remedy = "install gcc and Python's headers, or set model.compile=false and model.attention_backend=sdpa"
        return f"the model cannot be compiled here: {str(error).splitlines()[0]}; {remedy}", 1
    if isinstance(error, (NonFiniteError, ProcessKilledError)):
        return str(error), 1
    if str(error).startswith("Symlink loop from "):  # pathlib's, before Python 3.13
        return f"{str(error).removeprefix('Symlink loop from ')[1:-1]}: a link that leads to itself", 2
    if "torchvision::" in str(error):  # every import of Lightning or torchmetrics ends so, whatever was asked for
        remedy = "install the one that was, or uninstall it"
        return f"the installed torchvision was not built for this torch ({error}): {remedy}", 1
    raise error


class PlainLines(logging.Formatter):
    """Log lines without secrets and control characters: warnings name files and runs of other people, and addresses."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record))


def show_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without secrets: `sys.excepthook`."""
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
