"""What can be seen of a sweep while it runs: a bar, `progress.json`, and a log of every process."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from patchsweep.processes.distributed import Ended, Processes, restarted
from patchsweep.store import job_folder, locked, writing

log = logging.getLogger("patchsweep")
EVERY = 1.0  # seconds between two writes of progress.json, at least


@contextmanager
def job(out: Path | str, processes: Processes) -> Iterator[None]:
    """Inside, these processes alone write the results, and log what they do. BadInput if others
    write there."""
    lock = locked(out, again=restarted()) if processes.first else nullcontext()
    with lock, _logged(out, processes.rank):
        log.info("process %d of %d begins", processes.rank, processes.count)
        yield
        log.info("done")


@contextmanager
def _logged(out: Path | str, rank: int) -> Iterator[None]:
    """What this process does inside is in `rank-<rank>.log`, one line per unit of work."""
    folder = job_folder(out)
    with writing(folder, "run again"):
        folder.mkdir(parents=True, exist_ok=True)
        handler = _File(folder / f"rank-{rank}.log", encoding="utf-8")
    host = socket.gethostname().replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {host} {rank} %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written stops nothing."""


class Progress:
    """Cells settled by all processes: counted by each, shown by the first one.

    cells: of the sweep; before: those that were settled when this job began.
    """

    def __init__(self, processes: Processes, out: Path | str, cells: int, before: int) -> None:
        self._processes = processes
        self._file = job_folder(out) / "progress.json"
        self._cells, self._before = cells, before
        self._began = time.perf_counter()
        self._written = 0.0
        self._bar = tqdm(
            total=cells,
            initial=before,
            unit=" cells",
            unit_scale=True,
            disable=None if processes.first else True,
        )

    @property
    def seconds(self) -> float:
        """Since the job began to compute."""
        return time.perf_counter() - self._began

    def settled(self, cells: int) -> None:
        """This process has written so many cells more."""
        self._processes.add("cells", cells)
        self.show()

    def split(self) -> None:
        """This process has split a wave, or split it further."""
        self._processes.add("split", 1)

    def show(self) -> None:
        """Show what all processes have done; in the first one only, and once a second."""
        if self._processes.first and self.seconds - self._written >= EVERY:
            self._show()

    def __enter__(self) -> Self:
        if self._processes.first:
            self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception) and kind is not Ended:
            self._processes.add("failed", 1)
        if self._processes.first:
            self._show()
        self._bar.close()

    def _show(self) -> None:
        settled = self._processes.add("cells", 0)
        done = min(self._cells, self._before + settled)
        rate = settled / self.seconds
        split, failed = (self._processes.add(name, 0) for name in ("split", "failed"))
        trouble = {"split": split, "failed": failed}
        self._bar.set_postfix({k: n for k, n in trouble.items() if n}, refresh=False)
        self._bar.update(done - self._bar.n)
        self._written = self.seconds
        said = {
            "cells_done": done,
            "cells": self._cells,
            "cells_per_second": rate,
            "seconds_left": (self._cells - done) / rate if rate else None,
            "processes": self._processes.count,
            "waves_split": split,
            "waves_failed": failed,
        }
        unfinished = self._file.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is for those to say who write results
            unfinished.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self._file)
