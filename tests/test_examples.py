"""The examples: the command and the library give the same numbers, and the demo its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

import patchsweep as ps
from patchsweep import demo

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_command_and_library_give_equal_numbers(tmp_path: Path) -> None:
    command, library = tmp_path / "command.zarr", tmp_path / "library.zarr"
    spec = [str(EXAMPLES / "ioi.yaml"), "--set", "prompts.n=1", "--out", str(command)]
    shown = subprocess.run(
        [sys.executable, "-m", "patchsweep", "run", *spec],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    subprocess.run([sys.executable, EXAMPLES / "ioi.py", library, "1"], check=True)
    a, b = ps.open(command), ps.open(library)
    assert "23.3" in shown
    assert a.components == b.components == ("head_z", "mlp_out", "resid_pre")
    for component in a.components:
        for metric in a.metrics:
            name = f"{component}/{metric}"
            assert np.array_equal(a.store.read(name), b.store.read(name), equal_nan=True), name


def test_notebook(tmp_path: Path) -> None:
    """All its cells, from top to bottom."""
    command = [sys.executable, str(EXAMPLES / "notebook.py")]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "head 23.3 at position" in done.stdout
    results = ps.open(tmp_path / "results" / "notebook.zarr")
    assert results.complete
    best = results.top("head_z", "logit_diff", "denoise", n=1)[0]
    assert f"effect {best.effect:+.3f}" in done.stdout


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
        assert len(figures) == len(demo.METRICS)
        report = tmp_path / "demo" / f"{task}-figures" / "report.html"
        assert 30_000 < report.stat().st_size < 5_000_000
