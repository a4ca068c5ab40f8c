"""Several processes on one sweep end with the bits of one, whoever of them is killed meanwhile."""

from __future__ import annotations

import json
import shlex
import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
import zarr

import patchsweep as ps
from patchsweep.errors import Lost
from patchsweep.processes import distributed
from patchsweep.processes.distributed import Processes, alone, end, launched, together
from patchsweep.store import job_folder
from started import (
    TORCHRUN,
    Job,
    Process,
    blocks_done,
    check_equal,
    disturb,
    launch,
    logged,
    made,
    many_waves,
    said,
    still_from,
    wait,
)
from tiny import arrays

pytestmark = pytest.mark.multiproc
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no"
ACCELERATE += " --dynamo_backend no --main_process_port 0 --num_processes"
TWO = partial(launch, TORCHRUN, 2)  # starts in half the time
RESTARTS = "torch.distributed.run --standalone --max-restarts 1 --nproc-per-node"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return many_waves(tmp_path_factory.mktemp("many") / "job")


def workers(launcher: Process) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher.pid).children() if "patchsweep" in p.cmdline()]


def test_as_many_as_there_are_end_alike(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    process = launch(ACCELERATE, 4, job.spec, "--out", out)
    assert said(process) == []
    assert process.returncode == 0
    check_equal(out, job)
    logs = [(job_folder(out) / f"rank-{rank}.log").read_text() for rank in range(4)]
    waves = ps.open(out).attrs["plan"]["waves"]
    assert sum(log.count(": computed") for log in logs) == waves
    progress = json.loads((job_folder(out) / "progress.json").read_text())
    assert progress["processes"] == 4
    assert progress["cells_done"] == progress["cells"] == ps.open(out).attrs["plan"]["cells"]
    assert progress["waves_failed"] == 0
    # What Zarr says about files it does not know.
    with pytest.warns(UserWarning) as known:
        zarr.open_group(out, mode="r").members(max_depth=None)
    assert [str(warning.message).split()[2] for warning in known] == ["README.txt"]


def test_what_is_estimated_and_chosen_ends_alike(tmp_path: Path) -> None:
    """Every step that all processes have to finish before the next one."""
    estimated = {"components": ["head_z", "mlp_out"], "metrics": ["logit_diff"], "edges": "eap"}
    job = made(tmp_path / "job", **estimated, prefilter={"keep": "30%", "audit": 4})
    out = tmp_path / "r.zarr"
    process = launch(ACCELERATE, 2, job.spec, "--out", out)
    assert said(process) == []
    assert process.returncode == 0
    check_equal(out, job)
    whole = arrays(job.whole)
    assert {"head_z/logit_diff_estimate", "edges/logit_diff", "choice/head_z_status"} <= set(whole)


def test_edges_end_alike(tmp_path: Path) -> None:
    """Two processes, one of them killed, then three."""
    edges = {"edges": {"exact": {"positions": "each"}}, "components": ["mlp_out"]}
    job = made(tmp_path / "job", pairs=1, **edges, token_budget=120, metrics=["logit_diff"])
    out = tmp_path / "r.zarr"
    disturb(job, out, TWO, [kill_one], seed=0, count=2)
    process = launch(TORCHRUN, 3, job.spec, "--out", out, "--resume")
    assert said(process) == []
    check_equal(out, job)
    assert {"edges/logit_diff", "edges/logit_diff_status"} <= set(arrays(out))


def kill_one(process: Process, rng: np.random.Generator, *_: Any) -> None:
    """The launcher ends the other one."""
    workers(process)[rng.integers(2)].kill()
    check_go_on(said(process), "terminated")
    assert process.returncode != 0


def kill_all(process: Process, *_: Any) -> None:
    """At once: nobody sees another one die, and speaks of it."""
    all_of_them = [psutil.Process(process.pid), *workers(process)]
    for each in all_of_them:
        each.suspend()
    for each in all_of_them:
        each.kill()
    assert said(process) == []


def terminate(process: Process, _: Any, job: Job, out: Path) -> None:
    """First, nobody else may write there, the same sweep or another one."""
    for direction in ("denoise", "noise"):
        spec = ps.load_spec(job.spec, [f"out={out}", f"direction={direction}"])
        with pytest.raises(ps.BadInput, match=r"is being written by another run: wait"):
            ps.run(spec, resume=True)
    process.send_signal(signal.SIGTERM)
    check_go_on(said(process), "terminated")
    assert process.returncode != 0


def check_go_on(lines: list[str], word: str) -> None:
    """Said once: how the sweep was launched, to go on."""
    [line] = lines
    what, _, mend = line.partition(" with: ")
    assert what == f"patchsweep: {word}; what was finished is kept, go on"
    command = shlex.split(mend)
    assert command[1:7] == ["-m", *TORCHRUN.split(), "2", "-m"]
    assert command[-1] == "--resume"
    assert command.count("--resume") == 1


def test_killed_and_terminated(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    disturb(job, out, TWO, [kill_all, terminate], seed=0, count=2)
    # A launcher that may starts the group again, which goes on with what is there.
    out.rename(tmp_path / "s.zarr")
    still = still_from(blocks_done(tmp_path / "s.zarr") + 2)
    process = launch(RESTARTS, 2, job.spec, "--out", tmp_path / "s.zarr", "--resume", **still)
    wait(process, lambda: all(logged(tmp_path / "s.zarr", ": computed", 2)))
    workers(process)[0].kill()
    ended, again = said(process)
    assert ended.startswith("patchsweep: terminated; what was finished is kept; unless the ")
    assert again == "patchsweep: started again; the sweep goes on with what was finished"
    assert process.returncode == 0
    check_equal(tmp_path / "s.zarr", job)


@pytest.mark.slow
def test_thirty_kills(tmp_path: Path) -> None:
    job = made(tmp_path / "job", pairs=20, components=["head_z", "mlp_out"])
    disturb(job, tmp_path / "r.zarr", TWO, [kill_one, kill_all] * 15, seed=1, count=2)
    assert launch(TORCHRUN, 2, job.spec, "--out", tmp_path / "r.zarr", "--resume").wait() == 0
    check_equal(tmp_path / "r.zarr", job)


@pytest.mark.slow
def test_three_kills_of_a_real_model(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    said = {
        "model": "smollm2-135m",
        "device": "cpu",
        "prompts": {"task": "ioi", "n": 4},
        "components": ["head_z", "mlp_out"],
        "token_budget": 512,
    }
    spec.write_text(yaml.safe_dump(said))
    job = Job(spec, tmp_path / "whole.zarr")
    assert launch(TORCHRUN, 1, spec, "--out", job.whole).wait() == 0
    disturb(job, tmp_path / "r.zarr", TWO, [kill_one, kill_all, kill_one], seed=2, count=2)
    assert launch(TORCHRUN, 2, spec, "--out", tmp_path / "r.zarr", "--resume").wait() == 0
    check_equal(tmp_path / "r.zarr", job)


def test_what_is_wrong_is_said_once(job: Job) -> None:
    process = TWO(job.spec, "--out", job.whole)
    mend = "use --resume to continue it or --overwrite to replace it"
    assert said(process) == [f"patchsweep: {job.whole} exists already: {mend}"]
    assert process.returncode != 0


def test_a_launcher_that_starts_one_process(job: Job, tmp_path: Path) -> None:
    process = launch(ACCELERATE.replace("--multi_gpu", "--cpu"), 2, job.spec, "--out", tmp_path)
    [line] = said(process)
    assert "was told to start several processes and has started one" in line
    assert process.returncode != 0


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for processes in (alone(), launched()):
        assert processes.first
        assert list(processes.claim("letters", "abc")) == ["a", "b", "c"]
        assert list(processes.claim("letters", "abc")) == []
        assert [processes.add("n", 2), processes.add("n", 3)] == [2, 5]
        processes.wait("there")
        processes.leave()
        assert processes.device("balanced") == "balanced"


def test_the_store_that_all_share_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    reached = torch.distributed.TCPStore("localhost", kept.port, is_master=False)
    second = Processes(rank=1, count=2, local_rank=1, store=reached)
    assert second.add("waves", 1) == 1
    del kept
    with pytest.raises(Lost, match="the launcher or the first process has ended"), together():
        second.add("waves", 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for store, speaks in (("True", "0"), ("False", "1")):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", store)
        monkeypatch.setattr(distributed, "_joined", cached((1, 3, reached)))
        for rank in "012":
            monkeypatch.setenv("RANK", rank)
            assert end(1) == (1, rank == speaks)


def cached(found: Any) -> Any:
    joined = cache(lambda: found)
    joined()
    return joined


def test_the_device_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    third = type(alone())(rank=6, count=8, local_rank=2, store=alone().store)
    assert [third.device(d) for d in ("auto", "cuda", "cpu", "cuda:1")] == [
        *("cuda:2", "cuda:2", "cpu", "cuda:1"),
    ]
    with pytest.raises(ps.BadInput, match="8 processes were started: use device auto"):
        third.device("balanced")
