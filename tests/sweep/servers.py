"""Servers that tests start themselves, where they are asked to: `make test-cluster`."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "servers"

needs_servers = pytest.mark.skipif("SERVERS" not in os.environ, reason="starts servers of its own: make test-cluster")


def script(name: str, *arguments: object) -> str:
    """Run one of the scripts; what it printed."""
    command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def database(name: str, port: int = 15437) -> Iterator[tuple[str, Path]]:
    """A `postgresql` or `mariadb`; its URL and folder."""
    # Not in pytest's own folder: its user may not look there.
    with tempfile.TemporaryDirectory(prefix=f"madformer-{name}-", ignore_cleanup_errors=True) as temporary:
        Path(temporary).chmod(0o755)
        folder = Path(temporary) / "server"
        os.environ["STUDY_PASSWORD"] = "word"  # the URL names it: no file may contain it
        url = script(f"{name}.sh", "start", folder, port).split()[-1]
        try:
            yield url, folder
        finally:
            script(f"{name}.sh", "stop", folder)


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """A Slurm with four pretend GPUs; the environment in which its commands find it."""
    with tempfile.TemporaryDirectory(prefix="madformer-slurm-", ignore_cleanup_errors=True) as folder:
        script("slurm.sh", "start", folder)
        try:
            yield {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        finally:
            script("slurm.sh", "stop", folder)
