"""Runs that are killed or interrupted, again and again, end with the bits of an undisturbed one."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from patchsweep.sites import Block
from patchsweep.store import Store, job_folder
from patchsweep.store.folder import Folder
from started import (
    PATIENCE,
    Job,
    Process,
    check_equal,
    check_what_is_left,
    disturb,
    many_waves,
    start,
)
from tiny import arrays, build, rows, tokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return many_waves(tmp_path_factory.mktemp("resume") / "job")


def signalled(
    what: signal.Signals, process: Process, _: np.random.Generator, job: Job, out: Path
) -> None:
    process.send_signal(what)
    _, err = process.communicate(timeout=PATIENCE)
    check_what_is_said(what, process.returncode, err, [job.spec, "--out", out, "--resume"])


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


def stopped_and_gone_on_with(job: Job, out: Path, signals: list[signal.Signals], seed: int) -> None:
    endings = [partial(signalled, what) for what in signals]
    disturb(job, out, start, endings, seed, from_layout=True)
    last = start(job.spec, "--out", out, "--resume")
    assert last.wait(PATIENCE) == 0, last.communicate()
    check_equal(out, job)
    assert {*out.parent.iterdir()} == {out, job_folder(out)}  # nothing that was half laid out


@pytest.mark.multiproc
def test_kills_and_signals(job: Job, tmp_path: Path) -> None:
    kill, term, interrupt = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
    stopped_and_gone_on_with(job, tmp_path / "r.zarr", [kill, term, interrupt], seed=0)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("seed", [1])
def test_thirty_kills(job: Job, tmp_path: Path, seed: int) -> None:
    stopped_and_gone_on_with(job, tmp_path / "r.zarr", [signal.SIGKILL] * 30, seed)


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
        ps.sweep(model, pairs, out=out, fsync=True, provenance="full", **settings)
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
    """What a kill rarely hits: moments from the layout's last to the second block."""
    model = ps.wrap(build(), tokenizer())
    pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(3)]
    settings = {"components": ["head_z"], "metrics": ["logit_diff", "kl"], "token_budget": 60}
    write = Folder.put
    written: list[str] = []

    def stopping(after: int) -> Callable[[Folder, str, bytes], None]:
        def put(place: Folder, key: str, content: bytes) -> None:
            if len(written) == after:
                raise KeyboardInterrupt
            write(place, key, content)
            written.append(key)

        return put

    whole = tmp_path / "whole"
    monkeypatch.setattr(Folder, "put", stopping(-1))
    ps.sweep(model, pairs, out=whole, **settings)
    laid_out = written.index("zarr.json", 1)  # the first one says that it is half laid out
    assert written[laid_out - 1] == "manifest/zarr.json"
    for after in range(laid_out - 2, laid_out + 14, 3):
        out = tmp_path / str(after)
        written.clear()
        monkeypatch.setattr(Folder, "put", stopping(after))
        with pytest.raises(KeyboardInterrupt):
            ps.sweep(model, pairs, out=out, **settings)
        check_what_is_left(out, whole)
        monkeypatch.setattr(Folder, "put", write)
        ps.sweep(model, pairs, out=out, resume=True, **settings)
        assert arrays(out) == arrays(whole)
