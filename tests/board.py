"""TensorBoard as a user starts it, and its HTTP interface."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError


@dataclass(frozen=True)
class Board:
    """A server that runs."""

    url: str

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it answers, read as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/data/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def until(ready: Callable[[], bool | None], seconds: float = 120) -> None:
    """Wait until it returns anything but False; what it asserts may fail before, and so may the connection.

    Raises:
        Exception: the last failure, when the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if ready() is not False:
                return
            failure: Exception = TimeoutError()
        except (AssertionError, URLError, ConnectionError) as error:
            failure = error
        if time.monotonic() > end:
            raise failure
        time.sleep(0.2)


@contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[Board]:
    """A real server, once it answers; it reads the runs while it answers already."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port), *options]
    server = subprocess.Popen([*command, "--reload_interval", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    board = Board(f"http://127.0.0.1:{port}")
    try:
        until(lambda: "version" in board.ask("environment"))
        yield board
    finally:
        server.terminate()
        server.wait()
