"""SIGKILL at any time of a run, an append, an overwrite and an export: `check` finds nothing
damaged, what goes on ends with the arrays of a run that nothing disturbed, byte by byte, and no
file of the user's is touched."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd

import patchsweep as ps
from attack.table import Outcomes, Until
from cli.commands import child
from patchsweep.cli import _status
from patchsweep.store import put_back, stored_pairs
from tiny import arrays, build, rows, save, write_pairs, write_spec

# What a kill left behind, before it was gone on with to the right arrays.
LEFT = BEFORE, HALFWAY, WHOLE = "as before", "halfway", "whole"
FEW = ["--set", "prompts.n=3"]
KINDS = ("run", "append", "overwrite", "export")
PRELOADED = [
    *("patchsweep.cli", "patchsweep.engine", "patchsweep.report.show", "patchsweep.table"),
    *("tokenizers", "transformers.models.llama.modeling_llama"),
]


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
        self._context.set_forkserver_preload(PRELOADED)
        write_pairs(folder / "pairs.jsonl", rows(5))
        model = save(folder / "model", build(2))
        settings = {"components": ["mlp_out"], "metrics": ["kl"], "direction": "denoise"}
        spec = str(write_spec(folder, model, **settings, token_budget=40, out=None))
        self._few, self._out = folder / "few.zarr", folder / "r.zarr"
        self._table = folder / "t.parquet"
        run = ["run", spec, "--out", str(self._out)]
        self._commands = {
            "run": run,
            "append": [*run, "--append"],
            "overwrite": [*run, "--overwrite"],
            "export": ["export", str(self._out), str(self._table)],
        }
        assert _done(["run", spec, "--out", str(self._few), *FEW])
        self._before, self._after = arrays(self._few), {}
        self._seconds: dict[str, float] = {}
        for kind in KINDS:
            self._start(kind)
            self._seconds[kind] = self._ended(kind, 600) or 0
            self._after[kind] = arrays(self._out)

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

    def _judged(self, kind: str) -> str:
        put_back(self._out)
        left = self._left(kind)
        if left in LEFT and not (left == WHOLE or self._goes_on(kind, left)):
            return "cannot go on"
        if left in LEFT and arrays(self._out) != self._after[kind]:
            return "wrong arrays"
        return left

    def _left(self, kind: str) -> str:
        """What a kill left behind."""
        if kind == "export":
            if not self._table.exists():
                return BEFORE
            whole = len(pd.read_parquet(self._table)) == len(ps.open(self._out).to_frame())
            return WHOLE if whole else "half a table"
        if not self._out.exists():  # what an overwrite was to replace may be gone
            return "results are gone" if kind == "append" else BEFORE
        found = ps.check(self._out)
        if found.damages:
            return "damaged"
        if len(stored_pairs(ps.open(self._out).store)) == 3:
            return BEFORE if arrays(self._out) == self._before else "what was there has changed"
        return WHOLE if found.done == found.blocks else HALFWAY

    def _goes_on(self, kind: str, left: str) -> bool:
        command = self._commands[kind]
        if kind == "export":
            return _done(command) and self._left(kind) == WHOLE
        return _done(command if left == BEFORE else [*self._commands["run"], "--resume"])

    def _ended(self, kind: str, after: float) -> float | None:
        """Kill a command after so many seconds: None; if it ended before, how many it took."""
        streams = self._out.with_name("out"), self._out.with_name("err")
        process = self._context.Process(target=child, args=(self._commands[kind], *streams))
        began = time.monotonic()
        process.start()
        process.join(after)
        took = time.monotonic() - began
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            return None
        assert process.exitcode == 0, streams[1].read_text()
        return took


def _done(arguments: list[str]) -> bool:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return _status(arguments) == 0
