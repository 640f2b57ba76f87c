"""Reading ahead: what comes next is prepared by threads while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`map(prepare, items)`, in order, with at most `ahead` results waiting.

    One thread goes through the items and `workers` threads prepare them: decoding images and reading files let go of Python's
    lock. An error shows at the place of the item that met it.
    """
    results: Queue[Future[Result] | None] = Queue(ahead)
    abandoned = Event()

    def put(result: Future[Result] | None) -> None:
        while not abandoned.is_set():
            try:
                return results.put(result, timeout=0.1)
            except Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(pool.submit(prepare, item))
                if abandoned.is_set():
                    return
        except BaseException as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            put(failed)
        put(None)

    with ThreadPoolExecutor(max(1, workers) + 1) as pool:
        try:
            pool.submit(read)
            while (result := results.get()) is not None:
                yield result.result()
        finally:
            abandoned.set()
