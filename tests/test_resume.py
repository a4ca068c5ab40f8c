"""Runs that are killed or interrupted, again and again, end with the bits of an undisturbed one."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import patchsweep as ps
from patchsweep.sites import Block, Status
from patchsweep.store import Store, job_folder
from tiny import arrays, build, rows, save, tokenizer, values, write_pairs, write_spec

PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Job:
    """A sweep of hundreds of waves, and the results of the run that nothing disturbed."""

    spec: Path
    whole: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    write_pairs(folder / "pairs.jsonl", rows(9))
    settings = {"components": ["head_z", "mlp_out"], "metrics": ["logit_diff", "kl"]}
    model = save(folder / "model")
    spec = write_spec(folder, model, **settings, token_budget=60, out=None)
    ps.run(ps.load_spec(spec, [f"out={folder / 'whole.zarr'}"]))
    assert ps.open(folder / "whole.zarr").attrs["plan"]["waves"] > 100
    return Job(spec, folder / "whole.zarr")


def slow_from(blocks: float) -> dict[str, str]:
    """The environment of processes whose disk gets slow once so many blocks are done."""
    folder = Path(__file__).with_name("slow_disk")
    return {"PYTHONPATH": str(folder), "SLOW_FROM": str(round(blocks))}


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "patchsweep", "run", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tiny products: more threads only wait.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        # A shell that started the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    """Return once it is so; the process must be running until then."""
    give_up = time.monotonic() + PATIENCE
    while not until():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)


def blocks_done(out: Path) -> int:
    return sum(1 for _ in out.glob("completion/*/c/[0-9]*"))


def arrived(out: Path, goal: float | None) -> bool:
    """Whether so many blocks are done; None: whether anything is there at all."""
    if goal is None:
        return any(out.parent.glob(f".{out.name}.*.partial")) or out.exists()
    return blocks_done(out) >= goal


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


def check_what_is_said(
    what: signal.Signals, status: int, err: str, command: list[str | Path]
) -> None:
    """The exit status of a run that got a signal; and how to go on, where it could still say so."""
    if what == signal.SIGKILL:
        assert (status, err) == (-signal.SIGKILL, "")
        return
    word, expected = {signal.SIGTERM: ("terminated", 143), signal.SIGINT: ("interrupted", 130)}[
        what
    ]
    assert status == expected, err
    said, _, mend = err.partition(": patchsweep run ")
    assert said == f"patchsweep: {word}; what was finished is kept, go on with"
    assert shlex.split(mend) == list(map(str, command))


def disturb(job: Job, out: Path, signals: list[signal.Signals], seed: int) -> None:
    """Run `job` into `out`, with a signal in every round.

    The first one comes while the results are laid out, the others within the first two thirds of
    the blocks, after at least a few of the round's own.
    """
    rng = np.random.default_rng(seed)
    total = blocks_done(job.whole)
    command: list[str | Path] = [job.spec, "--out", str(out)]
    for i, what in enumerate(signals):
        goal = max(blocks_done(out) + 1, total * 2 / 3 * (i - 1 + rng.uniform()) / len(signals))
        process = start(*command, **slow_from(goal + 2))
        wait(process, partial(arrived, out, goal if i else None))
        time.sleep(rng.uniform(0, 0.02))  # somewhere within a wave
        process.send_signal(what)
        _, err = process.communicate(timeout=PATIENCE)
        check_what_is_left(out, job.whole)
        command = [job.spec, "--out", str(out), "--resume"]
        check_what_is_said(what, process.returncode, err, command)
    assert 0 < blocks_done(out) < total
    last = start(*command)
    assert last.wait(PATIENCE) == 0, last.communicate()
    assert ps.open(out).complete
    assert arrays(out) == arrays(job.whole)
    assert {*out.parent.iterdir()} == {out, job_folder(out)}  # nothing that was half laid out


@pytest.mark.multiproc
def test_kills_and_signals(job: Job, tmp_path: Path) -> None:
    kill, term, interrupt = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
    disturb(job, tmp_path / "r.zarr", [kill, term, interrupt, kill], seed=0)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("seed", [1])
def test_thirty_kills(job: Job, tmp_path: Path, seed: int) -> None:
    disturb(job, tmp_path / "r.zarr", [signal.SIGKILL] * 30, seed)


def test_another_clock_and_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results go on wherever and whenever; how often they are synced does not matter either."""
    model = ps.wrap(build(), tokenizer())
    pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(2)]
    settings = {"components": ["head_z"], "metrics": ["logit_diff"], "token_budget": 60}
    ps.sweep(model, pairs, out=tmp_path / "whole", **settings)
    out, write = tmp_path / "r.zarr", Store.write_block

    def once(self: Store, block: Block, *args: Any) -> None:
        if block.index == 2:
            raise KeyboardInterrupt
        write(self, block, *args)

    monkeypatch.setattr(Store, "write_block", once)
    with pytest.raises(KeyboardInterrupt):
        ps.sweep(model, pairs, out=out, fsync=True, **settings)
    host, made = ps.open(out).attrs["host"], ps.open(out).attrs["created"]
    monkeypatch.setattr(Store, "write_block", write)
    for file in out.rglob("*"):
        os.utime(file, (4e9, 4e9))  # from the future
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    results = ps.sweep(model, pairs, out=out, resume=True, **settings)
    assert arrays(out) == arrays(tmp_path / "whole")
    assert (results.attrs["host"], results.attrs["created"]) == (host, made)


def test_stopped_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill rarely hits: each moment from the layout's last to the second block."""
    model = ps.wrap(build(), tokenizer())
    pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(3)]
    settings = {"components": ["head_z"], "metrics": ["logit_diff", "kl"], "token_budget": 60}
    write = zarr.Array.__setitem__
    written: list[str] = []

    def stopping(after: int) -> Callable[[Any, Any, Any], None]:
        def setitem(array: Any, key: Any, value: Any) -> None:
            if len(written) == after:
                raise KeyboardInterrupt
            write(array, key, value)
            written.append(array.path)

        return setitem

    whole = tmp_path / "whole"
    monkeypatch.setattr(zarr.Array, "__setitem__", stopping(-1))
    ps.sweep(model, pairs, out=whole, **settings)
    laid_out = written.index("baseline/logit_diff")
    for after in range(laid_out - 1, laid_out + 10):
        out = tmp_path / str(after)
        written.clear()
        monkeypatch.setattr(zarr.Array, "__setitem__", stopping(after))
        with pytest.raises(KeyboardInterrupt):
            ps.sweep(model, pairs, out=out, **settings)
        check_what_is_left(out, whole)
        monkeypatch.setattr(zarr.Array, "__setitem__", write)
        ps.sweep(model, pairs, out=out, resume=True, **settings)
        assert arrays(out) == arrays(whole)
