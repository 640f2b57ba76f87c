"""Which process on which machine has something, so that another one of the machine can tell that it is gone."""

from __future__ import annotations

import json
import os
import platform
import secrets
from functools import cache
from pathlib import Path

import psutil

_CLOCK_SECONDS = 2.0
"""The time a process started at is told a little differently when the machine's clock is set."""


def new_owner() -> str:
    """An owner that lives as long as this process, in a form that `is_gone` reads; another one each time."""
    return json.dumps([_machine(), os.getpid(), round(psutil.Process().create_time(), 2), secrets.token_hex(4)])


def is_gone(owner: str) -> bool:
    """Whether a process of this machine has ended; of other machines nothing is known, and the answer is no."""
    machine, number, started, _ = json.loads(owner)
    if machine != _machine():
        return False
    try:
        process = psutil.Process(number)
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - started) > _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


@cache
def _machine() -> str:
    """The machine's name, and which of its containers sees this process."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()} {namespace.readlink() if namespace.exists() else ''}".strip()
