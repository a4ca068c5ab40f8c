"""A command in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from patchsweep.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def child(arguments: list[str], out: Path, err: Path) -> None:
    """The whole of a `patchsweep` process: both streams go to files."""
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["patchsweep", *arguments]
    torch.set_num_threads(1)  # tiny products; more threads only wait
    main()


Command = Callable[..., Done]


def refused(done: Done, *words: str) -> None:
    """The command ended as wrong use: with one line that holds these words, and nothing else."""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("patchsweep: ")
    for word in words:
        assert word in done.err
    assert (done.status, done.out) == (2, "")


def listing(folder: Path) -> set[str]:
    """What is in a folder; what cannot be taken for results is hidden."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}
