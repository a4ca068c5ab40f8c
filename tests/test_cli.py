"""The command line: every command in a process of its own, its exit status and what it says."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

import patchsweep as ps
from patchsweep.cli import _status, app, main
from patchsweep.families import FAMILIES
from patchsweep.sites import Status
from tiny import BROKEN, arrays, broken, rows, save, values, write_pairs, write_spec

COMMANDS = ("demo", "run", "plan", "show", "plot", "export", "tasks", "models", "verify", "check")
COMMANDS += ("reproduce",)


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


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes of their own that need not import torch again."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["patchsweep.engine", "patchsweep.report.show", "test_cli"])
    return made


@pytest.fixture
def command(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Command:
    def call(*arguments: str | Path) -> Done:
        folder = tmp_path_factory.mktemp("streams")
        out, err = folder / "out", folder / "err"
        process = context.Process(target=child, args=([*map(str, arguments)], out, err))
        process.start()
        process.join(60)
        assert process.exitcode is not None, "the command hangs"
        return Done(process.exitcode, out.read_text(), err.read_text())

    return call


def refused(done: Done, *words: str) -> None:
    """The command ended as wrong use: with one line that holds these words, and nothing else."""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("patchsweep: ")
    for word in words:
        assert word in done.err
    assert (done.status, done.out) == (2, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> Path:
    """A spec of three pairs; the results would be `r.zarr` beside it."""
    write_pairs(tmp_path / "pairs.jsonl", rows(3))
    return write_spec(tmp_path, model)


def listing(folder: Path) -> set[str]:
    """What is in a folder; what cannot be taken for results is hidden."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep"], ['Unknown command "sweep"', "run, plan, show"]),
        (["run"], ["SPEC", "patchsweep run --help"]),
        (["run", "a.yaml", "b.yaml"], ["b.yaml", "patchsweep run --help"]),
        (["run", "a.yaml", "--jobs", "2"], ["--jobs", "patchsweep run --help"]),
        (["run", "a.yaml", "--set"], ["--set requires an argument"]),
        (["run", "a.yaml", "--resume", "--overwrite"], ["exclude each other"]),
        (["run", "no/such.yaml"], ["no/such.yaml", "No such file"]),
        (["plan", "no/such.toml"], ["no/such.toml", "No such file"]),
        (["run", "spec.json"], ["spec.json", "use .yaml or .toml"]),
        (["show", "no/such.zarr"], ["no/such.zarr", "check the path"]),
        (["plot", "no/such.zarr"], ["no/such.zarr", "check the path"]),
        (["export", "no/such.zarr", "t.parquet"], ["no/such.zarr", "check the path"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_wrong_use(command: Command, arguments: list[str], words: list[str]) -> None:
    refused(command(*arguments), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("components=[head_x]", ["unknown component 'head_x'", "use one of embed, resid_pre"]),
        ("metrics=[logit_dif]", ["unknown metric 'logit_dif'", "did you mean 'logit_diff'"]),
        ("metric=kl", ["unknown key 'metric'", "did you mean 'metrics'"]),
        ("prompts.tasks=ioi", ["unknown key 'prompts.tasks'", "did you mean 'task'"]),
        ("prompts={task: io, n: 2}", ["unknown task 'io'", "ioi"]),
        ("prompts={task: ioi}", ["n is missing", "n: 8"]),
        ("direction=sideways", ["direction", "sideways", "denoise"]),
        ("positions=[8]", ["8 is outside every prompt", "use -8 to 7"]),
        ("positions=[S2]", ["unknown label 'S2'", "use one of END"]),
        ("token_budget=3", ["token_budget 3 is too small", "it needs", "raise it"]),
        ("token_budget=many", ["'many'", "use auto or a whole number"]),
        ("prompts.file=gone.jsonl", ["gone.jsonl", "No such file"]),
        ("model=./nowhere", ["./nowhere", "no such folder"]),
        ("dtype=int8", ["dtype", "float32", "int8"]),
        ("device=tpu", ["device", "'tpu'", "auto, cpu, cuda"]),
        ("out=", ["no out", "results/ioi.zarr"]),
        ("components", ["override 'components'", "key.key=value"]),
        ("=3", ["override '=3'", "key.key=value"]),
        ("model.name=3", ["model holds no keys", "set model itself"]),
        ("positions=[1", ["override 'positions=[1'", "not YAML"]),
    ],
)
def test_wrong_settings(
    command: Command, spec: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    refused(command("run", spec, "--set", override), *words)
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(command: Command, spec: Path, tmp_path: Path) -> None:
    refused(command("run", spec, "--set", "device=cuda"), "'cuda'", "use auto or cpu")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


GOOD = {"clean": "a b c", "corrupt": "a d c", "answer": " e", "wrong": " f"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps({**GOOD, "answer": " e g"}), ["answer ' e g' is 2 tokens", "not one"]),
        (json.dumps({**GOOD, "answer": " E9"}), ["answer ' E9' is not in the vocabulary"]),
        (json.dumps({**GOOD, "wrong": " e"}), ["'e' is in both answer and wrong"]),
        (json.dumps({**GOOD, "clean": "a b c d"}), ["4 tokens, corrupt has 3", "the same number"]),
        (json.dumps({**GOOD, "clean": "a d c"}), ["no differing token", "change one"]),
        (json.dumps({**GOOD, "anwser": " e"}), ["unknown key 'anwser'", "did you mean 'answer'"]),
        (json.dumps({"clean": "a", "corrupt": "b"}), ["missing key 'answer'"]),
        (json.dumps({**GOOD, "labels": {"END": 3}}), ["'END' at 3 is outside", "use -3 to 2"]),
        ('{"clean": "a b", ', ["not a JSON object on one line"]),
        ("[1]", ["not a JSON object"]),
    ],
)
def test_bad_pairs(
    command: Command, spec: Path, tmp_path: Path, line: str, words: list[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    refused(command("run", spec), f"{tmp_path / 'pairs.jsonl'}:3: ", *words)
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


def test_no_pairs(command: Command, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n")
    refused(command("run", spec), "pairs.jsonl", "no pairs in the file", "at least one")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


def test_a_model_without_weights(command: Command, spec: Path, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    done = command("run", spec, "--set", f"model={copy}")
    refused(done, str(copy), "no weights", ".safetensors")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "model"}


def test_a_prompt_longer_than_the_model_takes(command: Command, spec: Path, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=53,
        n_positions=6,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = save(tmp_path / "gpt2", GPT2LMHeadModel(config))
    done = command("run", spec, "--set", f"model={folder}")
    refused(done, "a prompt has 8 tokens", "takes 6", "shorten it")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "gpt2"}


def test_a_family_without_the_attention_interface(spec: Path, tmp_path: Path) -> None:
    """In a process that has not imported transformers yet, which has its say about it too."""
    config = BloomConfig(vocab_size=53, hidden_size=16, n_layer=1, n_head=2)
    folder = save(tmp_path / "bloom", BloomForCausalLM(config))

    def run(backend: str) -> Done:
        settings = ("--set", f"model={folder}", "--set", f"backend={backend}")
        command = [sys.executable, "-m", "patchsweep", "run", spec, *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    refused(run("wavefront"), "BloomForCausalLM", "attention interface", "cannot run on the wave")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "bloom"}
    done = run("auto")
    assert (done.status, done.err) == (0, "")
    assert "nnsight (BloomForCausalLM does not call" in done.out


@pytest.mark.parametrize("name", ["run", "plan"])
def test_what_neither_backend_can_run(
    command: Command, spec: Path, tmp_path: Path, name: str
) -> None:
    recurrent = MambaConfig(vocab_size=53, hidden_size=16, num_hidden_layers=2)
    folder = save(tmp_path / "mamba", MambaForCausalLM(recurrent))
    done = command(name, spec, "--set", f"model={folder}")
    refused(done, "MambaForCausalLM", "no causal language model with attention", "neither backend")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "mamba"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["device=balanced", "max_memory={cpu: 1KB}"], ["cpu cannot hold model.", "give it more"]),
        (
            ["device=balanced", "max_memory={cpu: 20KB}", "offload_folder=/dev/null/x"],
            ["cannot keep weights in /dev/null/x", "set offload_folder"],
        ),
        (["remote=true"], ["remote runs through nnsight", "add backend: nnsight"]),
    ],
)
def test_places_that_cannot_be_used(
    command: Command, spec: Path, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    refused(command("run", spec, *sets), *words)
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


def test_verify(command: Command, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    assert command("run", spec).status == 0
    done = command("verify", out, "--cells", "10")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("10 cells again as full forwards through nnsight\n")
    assert done.out.count(" holds") == len(ps.open(out).metrics)
    array = zarr.open_group(out, mode="r+")["head_z/kl"]
    array[...] = array[...] + 1
    done = command("verify", out, "--cells", "10")
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
        assert done.err == (f"patchsweep: {out}: 1 chunk is damaged: run again with --resume\n")
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


def test_results_that_are_there(command: Command, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    assert command("run", spec).status == 0
    before = arrays(out)
    refused(command("run", spec), str(out), "exists already", "--resume", "--overwrite")
    for other in ("positions=all", "prompts.n=2", "metrics=[kl]", "direction=noise"):
        done = command("run", spec, "--resume", "--set", other)
        refused(done, str(out), "another sweep", "--overwrite to replace it")
    assert arrays(out) == before
    again = command("run", spec, "--resume")  # nothing is left to do
    assert (again.status, again.err) == (0, "")
    assert arrays(out) == before
    replaced = command("run", spec, "--overwrite", "--set", "prompts.n=2")
    assert (replaced.status, replaced.err) == (0, "")
    assert values(out)["head_z/kl"].shape[3] == 2
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "r.zarr"}


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=str)
def test_a_folder_that_holds_no_results(
    command: Command, spec: Path, tmp_path: Path, more: list[str]
) -> None:
    out = tmp_path / "r.zarr"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(command("run", spec, *more), str(out))
    refused(command("show", out), str(out), "not a results folder")
    assert listing(out) == {"thesis.txt"}


def test_a_path_below_a_file(command: Command, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl" / "r.zarr"
    refused(command("run", spec, "--out", out), str(out), "is a file, not a folder")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts, or mounts again, a file system in memory with these options."""
    place = tmp_path / "mounted"
    place.mkdir()

    def call(options: str) -> Path:
        again = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no command mount")
        if done.returncode:
            pytest.skip(f"not allowed to mount: {done.stderr.strip()}")
        return place

    yield call
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_disk(command: Command, spec: Path, mount: Callable[[str], Path]) -> None:
    out = mount("ro") / "r.zarr"
    refused(command("run", spec, "--out", out), str(out), "read-only", "make it writable")


def test_a_full_disk(
    command: Command, spec: Path, tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    """Full at once: nothing is left. Full on the way: what is there can be gone on with."""
    disk = mount("size=64k")
    out = disk / "r.zarr"
    small = ("--set", "token_budget=100", "--set", "prompts.n=1")
    refused(command("run", spec, *small, "--out", out), str(out), "no space left", "run again")
    assert listing(disk) == set()

    whole = tmp_path / "whole.zarr"
    assert command("run", spec, *small, "--out", whole).status == 0
    files = sum(path.is_file() for path in whole.rglob("*"))
    mount(f"size={(files - 20) * mmap.PAGESIZE}")  # room for all but the last blocks
    refused(command("run", spec, *small, "--out", out), str(out), "no space left", "--resume")
    assert listing(disk) == {"r.zarr"}
    shown = command("show", out)
    assert (shown.status, shown.err) == (0, "")
    mount("size=64m")
    assert command("run", spec, *small, "--out", out, "--resume").status == 0
    assert arrays(out) == arrays(whole)


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
    refused(command("export", tmp_path / "r.zarr", tmp_path / "no" / "t"), "cannot write")
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
import os, signal, sys, tempfile, time
import zarr
import zarr.storage._local as local
from patchsweep import cli

write, written = local._put, []

def slow(*args, **kwargs):
    written.append(args)
    if len(written) == 8:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1 if len(written) >= 8 else 0)
    return write(*args, **kwargs)

@cli.app.command
def busy() -> None:
    array = zarr.create_array(tempfile.mkdtemp(), shape=(200,), chunks=(1,), dtype="f4")
    local._put = slow
    array[:] = 1.0

sys.argv = ["patchsweep", "busy"]
cli.main()
"""


def test_a_signal_ends_with_one_line() -> None:
    """Whatever is under way in other threads."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (143, "patchsweep: terminated\n")
