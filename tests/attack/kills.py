"""SIGKILL at any time of a run, an append, an overwrite and an export: `check` finds nothing
damaged, what goes on ends with the arrays of a run that nothing disturbed, byte by byte, and no
file of the user's is touched."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import patchsweep as ps
from attack.table import Outcomes, Until
from patchsweep.engine import loop as engine
from patchsweep.store import put_back, stored_pairs
from tiny import arrays, build, pairs_of, rows, tokenizer

# What a kill left behind, before what goes on ended with the right arrays.
LEFT = BEFORE, HALFWAY, WHOLE = "as before", "halfway", "whole"
MODEL = ps.wrap(build(2), tokenizer())
PAIRS = pairs_of(MODEL, rows(5))
FEW = 3


def sweep(out: Path, pairs: list[ps.Pair] = PAIRS, **how: bool) -> None:
    settings: dict[str, Any] = {"components": ["mlp_out"], "metrics": ["kl"], "token_budget": 40}
    engine.sweep(MODEL, pairs, out=out, direction="denoise", **settings, **how)


def export(out: Path) -> None:
    ps.open(out).export(out.with_name("t.parquet"), overwrite=True)


KINDS: dict[str, Callable[[Path], None]] = {
    "run": sweep,
    "append": lambda out: sweep(out, append=True),
    "overwrite": lambda out: sweep(out, overwrite=True),
    "export": export,
}


def _child(kind: str, out: Path) -> None:
    os.dup2(os.open(out.with_name("said"), os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    KINDS[kind](out)


def attack(folder: Path, seed: int, until: Until) -> Outcomes:
    """Kill until it is enough."""
    work = _Work(folder, random.Random(seed))
    found = Outcomes(LEFT)
    while True:
        for kind in KINDS:
            ending, after = work.killed(kind)
            found.add(kind, ending, f"killed after {after:.3f} s")
        if until():
            return found


class _Work:
    """A small sweep, its results, and those of its first pairs."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._rng = rng
        self._context: Any = multiprocessing.get_context("forkserver")
        # A child begins with the sweep, not with imports.
        self._context.set_forkserver_preload([__name__, "pyarrow.parquet"])
        self._few, self._out = folder / "few.zarr", folder / "r.zarr"
        self._table = folder / "t.parquet"
        sweep(self._few, PAIRS[:FEW])
        self._before, self._after = arrays(self._few), dict[str, Any]()
        self._seconds = dict[str, float]()
        for kind in KINDS:
            self._start(kind)
            self._seconds[kind] = self._ended(kind, 600) or 0
            self._after[kind] = arrays(self._out)
        self._exported = self._table.read_bytes()

    def killed(self, kind: str) -> tuple[str, float]:
        """How it ended, and after how many seconds it was killed."""
        while True:  # until it is killed, and has not ended before
            theirs = self._start(kind)
            after = self._rng.uniform(0, self._seconds[kind])
            took = self._ended(kind, after)
            if took is None:
                break
            self._seconds[kind] = took
        ending = self._judged(kind)
        if any((path / "mine.txt").read_text() != "mine" for path in theirs):
            ending = "a user's file is gone"
        return ending, after

    def _start(self, kind: str) -> list[Path]:
        """Make what there is before a command; folders of a user's beside it."""
        for left in self._out.parent.glob("*r.zarr*"):
            shutil.rmtree(left)
        self._table.unlink(missing_ok=True)
        if kind != "run":
            shutil.copytree(self._few, self._out)
        theirs = [self._out.with_name(f".r.zarr.{name}") for name in ("replaced", "job")]
        for path in theirs:
            path.mkdir()
            (path / "mine.txt").write_text("mine")
        return theirs

    def _ended(self, kind: str, after: float) -> float | None:
        """Kill it after so many seconds: None; if it ended before, how many it took."""
        process = self._context.Process(target=_child, args=(kind, self._out))
        began = time.monotonic()
        process.start()
        process.join(after)
        took = time.monotonic() - began
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            return None
        assert process.exitcode == 0, self._out.with_name("said").read_text()
        return took

    def _judged(self, kind: str) -> str:
        put_back(self._out)
        left = self._left(kind)
        if left not in LEFT:
            return left
        if left == BEFORE:
            KINDS[kind](self._out)
        elif left == HALFWAY:
            sweep(self._out, resume=True)
        right = self._left(kind) == WHOLE and arrays(self._out) == self._after[kind]
        return left if right else "wrong arrays"

    def _left(self, kind: str) -> str:
        """What is there now."""
        if kind == "export":
            if not self._table.exists():
                return BEFORE
            return WHOLE if self._table.read_bytes() == self._exported else "half a table"
        if not self._out.exists():  # what an overwrite was to replace may be gone
            return "results are gone" if kind == "append" else BEFORE
        found = ps.check(self._out)
        if found.damages:
            return "damaged"
        if len(stored_pairs(ps.open(self._out).store)) == FEW:
            return BEFORE if arrays(self._out) == self._before else "what was there has changed"
        return WHOLE if found.done == found.blocks else HALFWAY
