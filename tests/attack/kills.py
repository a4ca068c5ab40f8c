"""SIGKILL at any time of a run, an append, an overwrite and an export: `check` finds nothing
damaged, what goes on ends with the arrays of a run that nothing disturbed, byte by byte, and no
file of the user's is touched."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd

import patchsweep as ps
from attack.table import Outcomes, Until
from cli.commands import child
from patchsweep.store import put_back, stored_pairs
from tiny import arrays, build, rows, save, write_pairs, write_spec

RIGHT = "right arrays"
FEW = ["--set", "prompts.n=3"]
KINDS = ("run", "append", "overwrite", "export")


def attack(folder: Path, seed: int, until: Until) -> Outcomes:
    """Kill until it is enough."""
    work = _Work(folder, random.Random(seed))
    found = Outcomes((RIGHT,))
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
        self._context.set_forkserver_preload(["patchsweep.engine", "patchsweep.report.show"])
        write_pairs(folder / "pairs.jsonl", rows(5))
        model = save(folder / "model", build(2))
        settings = {"components": ["mlp_out"], "metrics": ["kl"], "direction": "denoise"}
        self._spec = str(write_spec(folder, model, **settings, token_budget=40, out=None))
        self._folder = folder
        self._few, self._whole, self._appended = (
            folder / f"{name}.zarr" for name in ("few", "whole", "appended")
        )

        def run(out: Path, *more: str) -> float:
            began = time.monotonic()
            assert self._ended(["run", self._spec, "--out", str(out), *more]) == 0
            return time.monotonic() - began

        run(self._few, *FEW)
        shutil.copytree(self._few, self._appended)
        took = run(self._whole)
        self._seconds = {"run": took, "overwrite": took, "export": took / 2}
        self._seconds["append"] = run(self._appended, "--append")
        self._arrays = {
            kind: arrays(out)
            for kind, out in (
                ("few", self._few),
                ("run", self._whole),
                ("append", self._appended),
                ("overwrite", self._whole),
                ("export", self._few),
            )
        }

    def killed(self, kind: str) -> tuple[str, float]:
        """How it ended, and after how many seconds it was killed."""
        out = self._folder / "r.zarr"
        for left in self._folder.glob("*r.zarr*"):
            shutil.rmtree(left)
        if kind != "run":
            shutil.copytree(self._few, out)
        theirs = [out.with_name(".r.zarr.replaced"), out.with_name(".r.zarr.job")]
        for path in theirs:
            path.mkdir()
            (path / "mine.txt").write_text("mine")
        after = self._rng.uniform(0, 1.2 * self._seconds[kind])
        table = self._folder / "t.parquet"
        table.unlink(missing_ok=True)
        run = ["run", self._spec, "--out", str(out)]
        command = {
            "run": run,
            "append": [*run, "--append"],
            "overwrite": [*run, "--overwrite"],
            "export": ["export", str(out), str(table)],
        }[kind]
        self._ended(command, after)
        ending = self._judged(kind, out, run, command, table)
        if any((path / "mine.txt").read_text() != "mine" for path in theirs):
            ending = "a user's file is gone"
        return ending, after

    def _judged(self, kind: str, out: Path, run: list[str], command: list[str], table: Path) -> str:
        put_back(out)
        if kind == "export":
            if table.exists() and len(pd.read_parquet(table)) != len(ps.open(out).to_frame()):
                return "half a table"
            if self._ended([*command, "--overwrite"]) or not table.exists():
                return "cannot go on"
        elif out.exists():
            if self._ended(["check", str(out)]):
                return "damaged"
            before = len(stored_pairs(ps.open(out).store)) == 3
            if before and arrays(out) != self._arrays["few"]:
                return "what was there has changed"
            again = command if before else [*run, "--resume"]
            if self._ended(again):
                return "cannot go on"
        elif kind == "run":
            if self._ended([*run, "--resume"]):
                return "cannot go on"
        elif kind == "append":
            return "results are gone"
        elif self._ended(command):
            return "cannot go on"
        return RIGHT if arrays(out) == self._arrays[kind] else "wrong arrays"

    def _ended(self, arguments: list[str], after: float | None = None) -> int | None:
        """The status of a command; killed after so many seconds, if it has not ended."""
        streams = self._folder / "out", self._folder / "err"
        process = self._context.Process(target=child, args=(arguments, *streams))
        process.start()
        process.join(600 if after is None else after)
        if process.exitcode is None:
            process.kill()
            process.join()
        status: int | None = process.exitcode
        return status
