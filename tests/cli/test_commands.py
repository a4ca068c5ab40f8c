"""Every command: its exit status and what it says."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import patchsweep as ps
from cli.commands import Command, listing, refused
from patchsweep.cli import _status, app
from patchsweep.report.families import FAMILIES
from patchsweep.sites import Status
from started import PATIENCE
from tiny import BROKEN, arrays, broken, rewrite, rows, save, values, write_pairs, write_spec

COMMANDS = ("demo", "run", "plan", "show", "plot", "export", "tasks", "models", "verify", "check")
COMMANDS += ("reproduce",)


def test_help(command: Command) -> None:
    overview = command("--help")
    assert (overview.status, overview.err) == (0, "")
    assert command().out == overview.out
    for name in COMMANDS:
        assert re.search(rf"^│ {name} +\w", overview.out, re.MULTILINE)
        done = command(name, "--help")
        assert (done.status, done.err) == (0, "")
        assert f"Example: patchsweep {name}" in done.out
        assert "--traceback" in done.out
        assert max(map(len, done.out.splitlines())) <= 80
    assert set(COMMANDS) == {name for name in app if not name.startswith("-")}


def test_reproduce(command: Command, model: Path, tmp_path: Path) -> None:
    listed = command("reproduce")
    assert (listed.status, listed.err) == (0, "")
    assert "best-practices-ioi" in listed.out
    known = "did you mean 'best-practices-ioi'?"
    refused(command("reproduce", "best-practice-ioi"), "'best-practice-ioi'", known)
    asked = ("reproduce", "best-practices-ioi", "--model", model, "--out", tmp_path / "out")
    refused(command(*asked), "task 'ioi'", "this tokenizer")
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_torch() -> None:
    script = """
import sys
from patchsweep import cli
assert cli._status(["--help"]) == 0
assert cli._status(["run", "--help"]) == 0
heavy = {"torch", "transformers", "zarr", "numpy", "pandas", "xarray", "pydantic"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(command: Command) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", command("--version").out)


def test_verify(command: Command, spec: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "r.zarr", yaml.safe_load(spec.read_text())["model"]
    assert command("run", spec).status == 0
    refused(command("verify", out), "names the model", "if these results are your own, add --trust")
    done = command("verify", out, "--cells", "10", "--trust", "--model", model)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("10 cells, and ")
    assert done.out.count(" holds") == len(ps.open(out).metrics)
    rewrite(out, "head_z/kl", lambda values: values + 1)
    done = command("verify", out, "--cells", "10", "--trust", "--model", model)
    assert done.status == 1
    assert "DOES NOT HOLD" in done.out
    assert done.err == f"patchsweep: {out}: cells differ from full forwards by more than rounding\n"
    refused(command("verify", tmp_path / "none"), "no results at", "check the path")


def test_check(command: Command, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    small = ("--set", "prompts.n=1")
    assert command("run", spec, *small).status == 0
    before = arrays(out)
    done = command("check", out)
    assert (done.status, done.err, done.out.count("\n")) == (0, "", 1)
    assert done.out.startswith(f"{out}: nothing is damaged")
    for name, why in (("head_z/kl", "checksum"), ("mlp_out/rank_status", "missing")):
        [chunk, *_] = sorted(f for f in (out / name / "c").rglob("*") if f.is_file())
        raw = bytearray(chunk.read_bytes())
        raw[-3] ^= 1
        chunk.unlink()
        if why == "checksum":
            chunk.write_bytes(raw)
        done = command("check", out)
        component = name.split("/")[0]
        key = chunk.relative_to(out)
        assert (done.status, done.out) == (1, f"{component} block 0: {why} ({key})\n")
        assert done.err == (f"patchsweep: {out}: 1 file is damaged: run again with --resume\n")
        for reader in (("show", out), ("export", out, tmp_path / "t.parquet"), ("plot", out)):
            said = command(*reader)  # what was printed before it was met is right
            assert (said.status, said.err.count("\n")) == (2, 1)
            assert all(word in said.err for word in (name, "patchsweep check"))
        assert not (tmp_path / "t.parquet").exists()
        assert command("run", spec, *small, "--resume").status == 0
        assert arrays(out) == before
    packed = tmp_path / "r.zip"
    assert command("export", out, packed).out == f"{packed}\n"
    assert (
        command("show", packed).out.split("created")[0]
        == command("show", out).out.split("created")[0]
    )
    assert command("check", packed).out.startswith(f"{packed}: nothing is damaged")
    refused(command("run", spec, *small, "--resume", "--out", packed), "zip file", "unpack it")
    refused(command("check", tmp_path / "none"), "no results at", "check the path")


def test_the_main_job(command: Command, spec: Path, model: Path, tmp_path: Path) -> None:
    """plan, run, show, plot and export; and the library finds the same numbers."""
    write_spec(tmp_path, model, metrics=["logit_diff"], direction="denoise")
    planned = command("plan", spec)
    assert (planned.status, planned.err) == (0, "")
    assert not (tmp_path / "r.zarr").exists()
    ran = command("run", spec)
    assert (ran.status, ran.err) == (0, "")
    shown = command("show", tmp_path / "r.zarr")
    assert (shown.status, shown.err) == (0, "")
    assert shown.out == ran.out
    results = ps.open(tmp_path / "r.zarr")
    assert f"cells       {results.attrs['plan']['cells']:,}" in planned.out

    drawn = command("plot", tmp_path / "r.zarr", "--out", tmp_path / "figures")
    assert (drawn.status, drawn.err) == (0, "")
    assert {Path(line).name for line in drawn.out.splitlines()} == listing(tmp_path / "figures")
    table = tmp_path / "t.parquet"
    exported = command("export", tmp_path / "r.zarr", table)
    assert (exported.status, exported.out, exported.err) == (0, f"{table}\n", "")
    refused(command("export", tmp_path / "r.zarr", tmp_path / "no" / "t.parquet"), "cannot write")
    refused(command("export", tmp_path / "r.zarr", tmp_path / "t.csv"), "use .parquet, or .zip")
    refused(command("plot", tmp_path / "r.zarr", "--out", table), "cannot write figures")

    loaded = ps.load_model(str(model), device="cpu")
    pairs = ps.read_pairs(tmp_path / "pairs.jsonl", loaded.tokenizer)
    settings = yaml.safe_load(spec.read_text())
    keys = ("components", "metrics", "direction")
    ps.sweep(loaded, pairs, out=tmp_path / "l.zarr", **{k: settings[k] for k in keys})
    library = values(tmp_path / "l.zarr")
    for name, numbers in values(tmp_path / "r.zarr").items():
        np.testing.assert_allclose(numbers, library[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_values_that_are_not_finite(command: Command, spec: Path, tmp_path: Path) -> None:
    """The run goes on, and `show` says how many there are."""
    folder = save(tmp_path / "broken", broken())
    made = rows(3)
    made[1]["clean"] = f"{BROKEN}{made[1]['clean'][1:]}"
    for some in (made, made[1:2]):  # the second time nothing is finite
        write_pairs(tmp_path / "pairs.jsonl", some)
        ran = command("run", spec, "--set", f"model={folder}", "--overwrite")
        assert (ran.status, ran.err) == (0, "")
        shown = command("show", tmp_path / "r.zarr")
        assert (shown.status, shown.err) == (0, "")
        found = values(tmp_path / "r.zarr")["head_z/logit_diff_status"]
        count = int((found == Status.NOT_FINITE).sum())
        assert count > 0
        assert f"{count:,} not finite" in shown.out


def test_an_unexpected_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 and one line; where it came from if that is asked for."""

    def break_down(_: Path) -> None:
        raise RuntimeError("one\nand another")

    monkeypatch.setattr("patchsweep.results.open", break_down)
    line = "patchsweep: RuntimeError: one and another (--traceback says where)\n"
    assert _status(["show", "r.zarr"]) == 1
    assert capsys.readouterr() == ("", line)
    assert _status(["show", "--traceback", "r.zarr"]) == 1
    err = capsys.readouterr().err
    assert "in break_down" in err
    assert err.endswith(line)


def test_models_and_tasks(command: Command) -> None:
    done = command("models")
    assert (done.status, done.err) == (0, "")
    for family in FAMILIES:
        assert re.search(rf"^{family.name} ", done.out, re.MULTILINE)
    done = command("tasks")
    assert (done.status, done.err) == (0, "")
    for task in ps.tasks.TASKS:
        example = rf"^{task}\n  clean: .*\n(    .*\n|\n)*  corrupt: "
        assert re.search(example, done.out, re.MULTILINE)
    assert re.search(r"^  templates: +all \| abba \| baba$", done.out, re.MULTILINE)


# The signal comes while Zarr's thread has many chunks to write, which it cannot end with in time.
INTERRUPTED = """
import itertools, os, signal, sys, time
import zarr
import zarr.storage._local as local
from patchsweep import cli

write, calls = local._put, itertools.count(1)

def slow(*args, **kwargs):
    if (call := next(calls)) == 8:
        os.kill(os.getpid(), what)
    time.sleep(0.1 if call >= 8 else 0)
    return write(*args, **kwargs)

@cli.app.command
def busy() -> None:
    array = zarr.create_array("busy.zarr", shape=(5000,), chunks=(1,), dtype="f4")
    local._put = slow
    array[:] = 1.0

what, sys.argv = int(sys.argv[1]), ["patchsweep", "busy"]
cli.main()
"""


@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_one_line(what: signal.Signals, tmp_path: Path) -> None:
    """Whatever is under way in other threads."""
    command = [sys.executable, "-c", INTERRUPTED, str(int(what))]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        preexec_fn=lambda: signal.signal(what, signal.SIG_DFL),  # nohup has told all to ignore it
    )
    assert (done.returncode, done.stderr) == (143, "patchsweep: terminated\n")
