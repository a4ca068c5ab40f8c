"""The processes that work on one sweep, and how they share it: by counters in the launcher's store.

No collectives: nobody waits for a process that is slow, but where the next step needs all. Counters
begin anew when a launcher starts the processes again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count as counting
from typing import TypeVar

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    HashStore,
    PrefixStore,
    Store,
    rendezvous,
)
from torch.distributed.constants import default_pg_timeout

from patchsweep.errors import BadInput, Lost

T = TypeVar("T")
POLL = 0.05  # seconds between two looks at the store; asleep, so that a signal gets through
LAST = 5  # seconds that a process which ends tries to join the others, to say so
ENDED = "ended"
_runs = counting()


class Ended(Exception):
    """Another process has ended the sweep with this exit status, and said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another process of the sweep ended with status {status}")
        self.status = status


@dataclass(frozen=True)
class Processes:
    """This process among those of one sweep. Names are said once per sweep, by all alike.

    claim, wait and told raise Ended once another process has ended the sweep.
    """

    rank: int
    count: int
    local_rank: int
    store: Store
    run: int = field(default_factory=lambda: next(_runs))  # all processes make the same sweeps

    @property
    def first(self) -> bool:
        """Whether this is the one that creates the results and finishes them."""
        return self.rank == 0

    def claim(self, name: str, items: Sequence[T]) -> Iterator[T]:
        """Those of `items`, the same in all processes, that this one is to do: the next that nobody
        has, as often as it is ready for one."""
        while (number := self.add(name, 1) - 1) < len(items):
            self._go_on()
            yield items[number]

    def add(self, name: str, amount: int) -> int:
        """Add to a counter; what all processes together have added."""
        return int(self.store.add(self._key(name), amount))

    def wait(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when all processes have come here, however long that takes."""
        self.add(name, 1)
        self._until(lambda: self.add(name, 0) == self.count, meanwhile)

    def tell(self, name: str, value: int) -> None:
        """Tell the others a number; they have no say in it."""
        if self.first:
            self.store.set(self._key(name), str(value))

    def told(self, name: str) -> int:
        """The number that the first process tells, sooner or later."""
        key = self._key(name)
        self._until(lambda: self.store.check([key]))
        return int(self.store.get(key))

    @contextmanager
    def after_first(self, name: str) -> Iterator[None]:
        """What is inside is done by the first process before any other does it."""
        if not self.first:
            self.told(name)
        yield
        self.tell(name, 1)

    def leave(self) -> None:
        """The last thing: the first process, which may keep the store, goes after all others."""
        left = self.add("left", 1)
        if self.first and left < self.count:
            self._until(lambda: self.add("left", 0) == self.count)

    def device(self, said: str) -> str:
        """What a spec's device means here: of several processes each has a GPU of its own.
        BadInput for balanced, which is for one process."""
        if self.count > 1 and said == "balanced":
            raise BadInput(
                f"device balanced spreads one model over all devices, and {self.count} processes "
                "were started: use device auto, or start one"
            )
        if self.count > 1 and said in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return said

    def _key(self, name: str) -> str:
        return f"{self.run}/{name}"

    def _until(self, so: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        while not so():
            self._go_on()
            meanwhile()
            time.sleep(POLL)

    def _go_on(self) -> None:
        if self.store.check([ENDED]):
            raise Ended(int(self.store.get(ENDED).split()[1]))


@contextmanager
def together() -> Iterator[None]:
    """Inside, the store that processes share is needed: Lost if it goes away."""
    try:
        yield
    except DistError as error:
        raise Lost("the launcher or the first process has ended") from error


def alone() -> Processes:
    """One process, whatever was launched."""
    return Processes(0, 1, 0, HashStore())


def launched() -> Processes:
    """The processes that accelerate launch or torchrun has started. BadInput if it went wrong."""
    if several():
        rank, count, store = _joined()
        return Processes(rank, count, int(os.environ["LOCAL_RANK"]), store)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        # With --cpu it starts one process, however many it is told to, and says nothing.
        raise BadInput(
            "accelerate launch was told to start several processes and has started one: on CPUs "
            "add --multi_gpu in place of --cpu"
        )
    return alone()


def several() -> bool:
    """Whether a launcher has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end(status: int) -> tuple[int, bool]:
    """The status to exit with, where something went wrong, and whether to say what: of several
    processes the first to end says it, and the others end as it did."""
    if not several():
        return status, True
    first = os.environ.get("RANK") == "0"
    joined = _joined.cache_info().currsize > 0
    # Where the launcher does not keep the store, the first process does, which may be dead.
    with_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not joined and not with_launcher:
        return status, first
    try:
        rank, _, store = _joined() if joined else _joined(timedelta(seconds=LAST))
        by, found = store.compare_set(ENDED, "", f"{rank} {status}").split()
    except RuntimeError:  # the store has gone, with who kept it
        return status, os.environ.get("RANK") == ("0" if with_launcher else "1")
    return int(found), int(by) == rank


@cache
def _joined(patience: timedelta = default_pg_timeout) -> tuple[int, int, Store]:
    """Rank, number of processes, and the store of the launcher.

    There is no process group: nothing would use it, every process would have to connect to every
    other, and where a launcher keeps its store the addresses of a group that died are still in it.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return rank, size, PrefixStore(f"patchsweep/{restarts}", store)


def restarted() -> bool:
    """Whether a launcher has started the processes again, after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
