"""Reading ahead: in order, not too far, and at any end without harm."""

import itertools
import os
import subprocess
import sys
import threading
import time

import pytest

from madformer.data.loader import prefetch
from tests.conftest import ROOT
from tests.tiny_runs import environment


def uneven(number):
    time.sleep(0.002 * (number % 3))
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order(workers):
    assert list(prefetch(uneven, range(50), workers, queue_size=5)) == [number * number for number in range(50)]


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_shows_at_its_place(workers):
    def fail(number):
        if number == 3:
            raise KeyError(number)
        return number

    results = prefetch(fail, itertools.count(), workers, queue_size=4)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)


def test_an_error_of_the_items_shows_behind_those_before_it():
    def items():
        yield from range(2)
        raise OSError("gone")

    results = prefetch(uneven, items(), workers=2, queue_size=4)
    assert list(itertools.islice(results, 2)) == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_no_more_is_read_than_asked_for_and_threads_end():
    begun, before = [], threading.active_count()
    results = prefetch(begun.append, itertools.count(), workers=2, queue_size=4)
    next(results)
    time.sleep(0.2)
    assert 1 <= len(begun) <= 1 + 4 + 1
    results.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("ending", ["", "results.close()", "raise SystemExit(0)"])
def test_a_program_ends_in_peace_whatever_the_threads_are_at(ending):
    """Threads inside of Pillow or torch when the interpreter ends would abort it."""
    program = f"""
import io, itertools
import numpy as np
import torch
from PIL import Image
from madformer.data.image_files import load_square
from madformer.data.loader import prefetch

buffer = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)).save(buffer, "JPEG")
results = prefetch(lambda number: load_square(buffer.getvalue(), 64), itertools.count(), 4, 8)
next(results)
{ending}
"""
    for _ in range(3 if os.environ.get("SLOW") else 1):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr
