"""Sweeps in processes of their own: started, disturbed, gone on with; and what holds meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from patchsweep.sites import Status
from patchsweep.store import job_folder
from tiny import arrays, rows, save, values, write_pairs, write_spec

PATIENCE = 600  # seconds: a guard against what hangs, far from what a busy machine takes
BEGINS = " begins\n"  # what a process logs first
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node"


@dataclass(frozen=True)
class Job:
    """A sweep, and the results of a run of one process that nothing disturbed."""

    spec: Path
    whole: Path


Process = subprocess.Popen[str]
Begin = Callable[..., Process]  # of the arguments of `patchsweep run`, and the environment
Ending = Callable[[Process, np.random.Generator, Job, Path], None]


def made(folder: Path, pairs: int = 9, **settings: Any) -> Job:
    """The job of some settings; its results are made by this very process."""
    folder.mkdir()
    write_pairs(folder / "pairs.jsonl", rows(pairs))
    model = save(folder / "model")
    given = {"metrics": ["logit_diff", "kl"], "token_budget": 60, "out": None, **settings}
    spec = write_spec(folder, model, **given)
    out = folder / "whole.zarr"
    ps.run(ps.load_spec(spec, [f"out={out}"]))
    return Job(spec, out)


def many_waves(folder: Path) -> Job:
    """A job that takes long enough to be disturbed."""
    job = made(folder, components=["head_z", "mlp_out"])
    assert ps.open(job.whole).attrs["plan"]["waves"] > 100
    return job


def start(*arguments: str | Path, **environment: str) -> Process:
    """Start a sweep in one process."""
    return _started(["patchsweep", "run", *map(str, arguments)], environment)


def launch(how: str, count: int, *arguments: str | Path, **environment: str) -> Process:
    """Start processes on a sweep through a launcher."""
    command = [*how.split(), str(count), "-m", "patchsweep", "run", *map(str, arguments)]
    return _started(command, {"CUDA_VISIBLE_DEVICES": "", **environment})


def _started(module: list[str], environment: dict[str, str]) -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tiny products: more threads only wait.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        # A shell that started the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def said(process: Process) -> list[str]:
    """What the processes themselves said until they ended; launchers say more."""
    _, err = process.communicate(timeout=PATIENCE)
    return [line for line in err.splitlines() if line.startswith("patchsweep: ")]


def still_from(blocks: float) -> dict[str, str]:
    """The environment of processes that do not get far beyond so many blocks until a signal comes:
    their disk stands still."""
    return _still(STILL_FROM=str(round(blocks)))


def still_for_both(out: Path) -> dict[str, str]:
    """The environment of two processes of which neither gets far before the other computes too."""
    return _still(STILL_FOR=str(job_folder(out)))


def _still(**how: str) -> dict[str, str]:
    path = [str(Path(__file__).with_name("still_disk")), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), **how}


def wait(process: Process, until: Callable[[], bool]) -> None:
    """Return once it is so; the process must be running until then."""
    give_up = time.monotonic() + PATIENCE
    while not until():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)


def blocks_done(out: Path) -> int:
    return sum(1 for _ in out.glob("completion/*/c/[0-9]*"))


def logged(out: Path, what: str, count: int) -> list[int]:
    """How often each of so many processes has logged that."""
    logs = [job_folder(out) / f"rank-{rank}.log" for rank in range(count)]
    return [log.read_text().count(what) if log.exists() else 0 for log in logs]


def disturb(
    job: Job,
    out: Path,
    begin: Begin,
    endings: Sequence[Ending],
    seed: int,
    *,
    count: int = 1,
    from_layout: bool = False,
) -> None:
    """Run `job` into `out` with so many processes, ended in every round in another way.

    Within the first two thirds of the blocks, after at least one of the round's own; the first time
    while the results are laid out, if `from_layout`.
    """
    rng = np.random.default_rng(seed)
    total = blocks_done(job.whole)
    command: list[str | Path] = [job.spec, "--out", out]
    for i, ending in enumerate(endings):
        goal = total * 2 / 3 * (i - from_layout + rng.uniform()) / len(endings)
        goal = max(goal, blocks_done(out) + 1)
        before = logged(out, BEGINS, count)
        process = begin(*command, **still_from(goal + 2))
        early = from_layout and i == 0
        wait(process, partial(_anything, out) if early else partial(_at_work, out, goal, before))
        time.sleep(rng.uniform(0, 0.02))  # somewhere within a wave
        ending(process, rng, job, out)
        check_what_is_left(out, job.whole)
        command = [job.spec, "--out", out, "--resume"]
    assert 0 < blocks_done(out) < total


def _anything(out: Path) -> bool:
    """Whether anything is there at all."""
    return any(out.parent.glob(f".{out.name}.*.partial")) or out.exists()


def _at_work(out: Path, goal: float, before: list[int]) -> bool:
    """Whether so many blocks are done, and each process has begun since: before it has, the
    launcher's signal would end it without a word."""
    now = logged(out, BEGINS, len(before))
    return all(n > m for n, m in zip(now, before, strict=True)) and blocks_done(out) >= goal


def check_what_is_left(out: Path, whole: Path) -> None:
    """Every cell that has a status has the value that it has in the end.

    What is half laid out is not taken for results.
    """
    if not out.exists():
        with pytest.raises(ps.BadInput, match="no results at"):
            ps.open(out)
        return
    assert not ps.open(out).complete
    expected = values(whole)
    for name, status in (found := values(out)).items():
        if name.endswith("_status"):
            metric = name.removesuffix("_status")
            settled = status != Status.NOT_DONE
            np.testing.assert_array_equal(status[settled], expected[name][settled])
            np.testing.assert_array_equal(found[metric][settled], expected[metric][settled])
            assert not np.isnan(found[metric][status == Status.EXACT]).any()


def check_equal(out: Path, job: Job) -> None:
    """The results are those of the run that nothing disturbed, bit by bit."""
    assert ps.open(out).complete
    assert arrays(out) == arrays(job.whole)
    now, before = (dict(ps.open(path).attrs) for path in (out, job.whole))
    assert now["joint"] == before["joint"]
    assert now["plan"] == before["plan"]
