"""Writing in the background: the next wave computes while the last one goes to disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

P = ParamSpec("P")
WAITING = 1  # calls; what they were given stays in memory


@contextmanager
def background(write: Callable[P, None]) -> Iterator[Callable[P, None]]:
    """`write` as a function that returns at once: one thread makes the calls, in order.

    In memory are at most WAITING calls, the one under way and the one that is being handed over,
    which waits. Leaving makes all calls that were handed over, after an exception too. Once a call
    has failed none follows, and its exception is raised by the next call, or on leaving.
    """
    calls: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
    failed: list[BaseException] = []

    def work() -> None:
        while (call := calls.get()) is not None:
            if failed:
                continue
            try:
                call()
            except BaseException as error:  # raised where it can be heard
                failed.append(error)

    def later(*args: P.args, **kwargs: P.kwargs) -> None:
        if failed:
            raise failed[0]
        calls.put(lambda: write(*args, **kwargs))

    # A second interrupt does not wait for a disk that hangs.
    thread = threading.Thread(target=work, name="writer", daemon=True)
    thread.start()
    try:
        yield later
    finally:
        calls.put(None)
        thread.join()
    if failed:
        raise failed[0]
