"""Reading ahead: what comes next is prepared by threads while the device computes.

Threads, not processes: decoding images, reading files and copying latents let go of Python's lock, nothing has to be copied
from one process to another, and nothing is forked beside a GPU.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import Full, Queue
from threading import Event, Thread, current_thread
from typing import Generic, TypeVar

SECONDS_TO_END = 10
"""How long the end of the program waits for a thread that is stuck, in a file system for instance."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`map(prepare, items)`, in order, with at most `ahead` results waiting; without workers it is just that.

    One thread goes through the items and `workers` threads prepare them. An error shows at the place of the item that met it.
    """
    if workers == 0:
        yield from map(prepare, items)
        return
    crew = _Crew(prepare, items, workers, ahead)
    try:
        while (result := crew.results.get()) is not None:
            yield result.result()
    finally:
        crew.dismiss()


class _Crew(Generic[Item, Result]):
    """Threads that can be sent home at any time: an endless stream has no end of its own."""

    def __init__(self, prepare: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> None:
        self.results: Queue[Future[Result] | None] = Queue(ahead)
        """In the order of the items; None: there are no more."""
        self.abandoned = Event()
        """Set when nobody wants the rest."""
        self._tasks: Queue[tuple[Future[Result], Item] | None] = Queue()
        self._threads = [Thread(target=self._read, args=(items, workers), daemon=True)]
        self._threads += [Thread(target=self._prepare, args=(prepare,), daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        # A thread that is inside of torch or Pillow when the interpreter ends would abort the program.
        atexit.register(self.dismiss)

    def dismiss(self) -> None:
        """Nobody wants the rest: wait until what has begun has ended."""
        atexit.unregister(self.dismiss)
        self.abandoned.set()
        for thread in self._threads:
            if thread is not current_thread():
                thread.join(timeout=SECONDS_TO_END)

    def _read(self, items: Iterable[Item], workers: int) -> None:
        try:
            for item in items:
                result: Future[Result] = Future()
                if not self._put(result):
                    break
                self._tasks.put((result, item))
            self._put(None)
        except BaseException as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            self._put(failed)
        finally:
            for _ in range(workers):
                self._tasks.put(None)

    def _prepare(self, prepare: Callable[[Item], Result]) -> None:
        while (task := self._tasks.get()) is not None:
            result, item = task
            if self.abandoned.is_set():
                continue
            try:
                result.set_result(prepare(item))
            except BaseException as error:
                result.set_exception(error)

    def _put(self, result: Future[Result] | None) -> bool:
        """Wait for a place among the results; whether somebody wants it."""
        while not self.abandoned.is_set():
            try:
                self.results.put(result, timeout=0.1)
                return True
            except Full:
                continue
        return False
