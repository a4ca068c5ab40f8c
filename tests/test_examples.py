"""The examples: the command and the library give the same numbers, and the demo its report."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from rich.console import Console
from traitlets.config import Config

import patchsweep as ps
from patchsweep import demo

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def test_command_and_library_give_equal_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, library = tmp_path / "command.zarr", tmp_path / "library.zarr"
    only = ["--set", "prompts.n=1", "--set", "positions=[S2, END]"]  # at two tokens
    spec = [str(EXAMPLES / "ioi.yaml"), *only, "--out", str(command)]
    shown = subprocess.run(
        [sys.executable, "-m", "patchsweep", "run", *spec],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as this process has
    ).stdout
    monkeypatch.setattr(sys, "argv", ["ioi.py", str(library), "1"])
    monkeypatch.setattr(ps, "sweep", partial(ps.sweep, positions=["S2", "END"]))
    runpy.run_path(str(EXAMPLES / "ioi.py"))
    a, b = ps.open(command), ps.open(library)
    assert "23.3" in shown
    assert a.components == b.components == ("head_z", "mlp_out", "resid_pre")
    for component in a.components:
        for metric in a.metrics:
            name = f"{component}/{metric}"
            assert np.array_equal(a.store.read(name), b.store.read(name), equal_nan=True), name


def test_notebook(tmp_path: Path) -> None:
    """Executed from top to bottom, it shows the numbers that it was committed with."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    committed = shown(notebook)
    resources = {"metadata": {"path": tmp_path}}
    # By files, not by ports that are free now and may be taken when the kernel has started.
    files = {"transport": "ipc", "connection_file": str(tmp_path / "kernel.json")}
    config, patient = Config(KernelManager=files), {"startup_timeout": 600, "iopub_timeout": 600}
    NotebookClient(notebook, config=config, resources=resources, **patient).execute()
    again = shown(notebook)
    assert len(committed) == len(again) == 8
    assert sum("image/png" in text for text in again) == 2
    for old, new in zip(committed, again, strict=True):
        words = [NUMBER.sub("", text).split() for text in (old, new)]
        assert words[0] == words[1]
        numbers = [[float(x) for x in NUMBER.findall(text)] for text in (old, new)]
        np.testing.assert_allclose(*numbers, atol=0.011)  # of which the second decimal is shown
    for name in ("where", "heads", "circuit"):
        assert ps.open(tmp_path / "results" / "notebook" / f"{name}.zarr").complete


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells printed or displayed, as text: a figure as its kinds and size; without what
    libraries log, and the warnings that count rounding, which no two machines do alike."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    outputs = [output for output in outputs if output.get("name") != "stderr"]
    texts = [
        output.text
        if output.output_type == "stream"
        else "\n".join([*sorted(output.data), output.data["text/plain"]])
        for output in outputs
    ]
    return ["\n".join(x for x in t.splitlines() if "null patch" not in x) for t in texts]


def test_demo(tmp_path: Path, monkeypatch) -> None:
    """The demo with one pair and one component: what it prints and draws."""
    monkeypatch.setattr(demo, "PAIRS", 1)
    monkeypatch.setattr(demo, "COMPONENTS", ("mlp_out",))
    console = Console(width=100, record=True)
    demo.demo(tmp_path / "demo", console)
    text = console.export_text()
    for word in ("exact", "structural", "noise floor", "measured", "times faster", "layer"):
        assert word in text
    for task in ("ioi", "facts"):
        assert ps.open(tmp_path / "demo" / f"{task}.zarr").complete
        figures = list((tmp_path / "demo" / f"{task}-figures").glob("*.png"))
        assert len(figures) == 1  # one component, by the first metric
        report = tmp_path / "demo" / f"{task}-figures" / "report.html"
        assert 30_000 < report.stat().st_size < 5_000_000
        assert f"<title>smollm2-135m, {task}, 1 pair</title>" in report.read_text(encoding="utf-8")
