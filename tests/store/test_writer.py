"""Writing in the background: in order, all of it or a clear failure, and never far behind."""

from __future__ import annotations

import threading
import time

import pytest

from patchsweep.store.writer import WAITING, background


def test_everything_in_order() -> None:
    done: list[int] = []

    def slow(n: int) -> None:
        time.sleep(0.002 * (5 - n % 5))
        done.append(n)

    with background(slow) as write:
        for n in range(20):
            write(n)
    assert done == list(range(20))


def test_no_more_than_a_few_are_kept() -> None:
    """One under way, `WAITING` behind it, and the caller waits with the next."""
    go, begun, handed = threading.Event(), threading.Event(), []

    def stuck(_: int) -> None:
        begun.set()
        go.wait(60)

    def hand() -> None:
        with background(stuck) as write:
            for n in range(10):
                write(n)
                handed.append(n)

    thread = threading.Thread(target=hand)
    thread.start()
    assert begun.wait(60)
    time.sleep(0.1)  # room for a mistake
    assert len(handed) <= 1 + WAITING
    go.set()
    thread.join(60)
    assert len(handed) == 10


@pytest.mark.parametrize("failing", [0, 3, 9])
def test_a_failure_is_raised_where_it_can_be_heard(failing: int) -> None:
    tried: list[int] = []
    error = OSError("no space")

    def fails(n: int) -> None:
        tried.append(n)
        if n == failing:
            raise error

    with pytest.raises(OSError, match="no space") as raised, background(fails) as write:
        for n in range(10):
            write(n)
    assert raised.value is error
    assert tried == list(range(failing + 1))  # nothing after it


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_was_handed_over_is_written_whatever_comes(error: type[BaseException]) -> None:
    done: list[int] = []

    def slow(n: int) -> None:
        time.sleep(0.01)
        done.append(n)

    with pytest.raises(error), background(slow) as write:
        write(0)
        write(1)
        raise error
    assert done == [0, 1]
    assert not any(thread.name == "writer" for thread in threading.enumerate())
