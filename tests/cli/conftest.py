"""A way to give commands, and a spec to give them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from cli.commands import Command, Done, child
from started import PATIENCE
from tiny import rows, save, write_pairs, write_spec


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes of their own that need not import torch again."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["patchsweep.engine", "patchsweep.report.terminal", "cli.commands"])
    return made


@pytest.fixture
def command(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Command:
    def call(*arguments: str | Path) -> Done:
        folder = tmp_path_factory.mktemp("streams")
        out, err = folder / "out", folder / "err"
        process = context.Process(target=child, args=([*map(str, arguments)], out, err))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode is not None, "the command hangs"
        return Done(process.exitcode, out.read_text(), err.read_text())

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> Path:
    """A spec of three pairs; the results would be `r.zarr` beside it."""
    write_pairs(tmp_path / "pairs.jsonl", rows(3))
    return write_spec(tmp_path, model)
