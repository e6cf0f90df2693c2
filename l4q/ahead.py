"""What a loop goes over, made by other threads while the loop is busy with what came before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from queue import Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")

BATCH_BYTES = 1 << 20
"""Small items are handed over together: a change of threads costs as much as copying some hundred KiB."""
_PATIENCE = 0.05
"""Seconds between looks whether the loop was left."""


_WORKERS = max(1, min(os.cpu_count() or 1, 4))
"""Threads that make pieces; more would wait for memory, and each holds a piece and what it is made with."""


def spread(make: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`make(item)` of every item in order, by as many threads as there are cores, few items ahead of the loop.

    Args:
        make: Mostly work that leaves the interpreter's lock to others, such as NumPy's and torch's.
        items: What to make from.
    """
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(_pool().submit(make, item))
        if len(waiting) > _WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="l4q-spread")


@contextmanager
def made_ahead(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[Iterator[T]]:
    """Yield an iterator over `items`, whose making goes on in a thread of its own until the block is left.

    Besides the item at hand, one batch waits and one is being made; both have at least one item and end with the one
    that brings them to `BATCH_BYTES`.

    Args:
        items: Made in order, all in that thread; what its making raises comes up in the loop, behind what came before.
        nbytes: Size of an item.
    """
    maker = _Maker(items, nbytes)
    thread = Thread(target=maker.run, name="l4q-ahead", daemon=True)
    thread.start()
    try:
        yield maker.made()
    finally:
        maker.left.set()
        thread.join()


class _Maker(Generic[T]):
    """The batches between two threads; an empty one ends them."""

    def __init__(self, items: Iterable[T], nbytes: Callable[[T], int]) -> None:
        self._items = items
        self._nbytes = nbytes
        self._ready: Queue[list[T]] = Queue(1)
        self._error: BaseException | None = None
        self.left = Event()

    def run(self) -> None:
        """Make everything, unless the loop is left."""
        batch: list[T] = []
        size = 0
        try:
            for item in self._items:
                batch.append(item)
                size += self._nbytes(item)
                del item  # nothing but the batch keeps it
                if size >= BATCH_BYTES:
                    self._hand_over(batch)
                    batch, size = [], 0
                if self.left.is_set():
                    return
            if batch:
                self._hand_over(batch)
        except BaseException as error:  # it is the loop's
            if batch:
                self._hand_over(batch)
            self._error = error
        self._hand_over([])

    def made(self) -> Iterator[T]:
        """The items, in the loop's thread."""
        while batch := self._ready.get():
            batch.reverse()
            while batch:
                yield batch.pop()
        if self._error is not None:
            raise self._error

    def _hand_over(self, batch: list[T]) -> None:
        while not self.left.is_set():
            with suppress(Full):
                self._ready.put(batch, timeout=_PATIENCE)
                return
