"""Waves that run out of memory: computed in parts, recorded, and the same when done again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from patchsweep.attribution import sweep
from patchsweep.device.memory import OutOfMemory, within_memory
from patchsweep.engine import loop as engine
from patchsweep.engine.planning import plan_sweep
from patchsweep.passes.forward import Forward
from patchsweep.passes.wave import Launched, WaveResult
from patchsweep.sites import Block
from patchsweep.spec import parse_settings
from patchsweep.store import ESTIMATED, ESTIMATED_SPLIT, SCORED, SCORED_SPLIT, WAVES_SPLIT, Store
from tiny import arrays, build, rows, tokenizer, values

SETTINGS: dict[str, Any] = {
    "components": ["head_z", "head_k", "mlp_out", "embed"],
    "metrics": ["logit_diff"],
    "direction": "both",
    "windows": [2],
    "token_budget": 400,
}
LIMIT = 200  # tokens in a layer call


def model(dtype: torch.dtype = torch.float64) -> ps.Model:
    return ps.wrap(build().to(dtype), tokenizer())


def pairs(count: int) -> list[ps.Pair]:
    return [ps.make_pair(tokenizer(), **row) for row in rows(count)]


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


@contextmanager
def at_most(tokens: int, model: ps.Model) -> Iterator[list[int]]:
    """Waves run out of memory in a layer with more; the tokens of the calls that did."""
    out: list[int] = []
    launch = engine.launch_wave

    def allocates(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        count = args[0].shape[0] * args[0].shape[1]
        if count > tokens:
            out.append(count)
            raise no_memory()

    def launching(*args: Any, **kwargs: Any) -> Launched:
        handle = model.hf_model.model.layers[1].register_forward_pre_hook(allocates)
        try:
            return launch(*args, **kwargs)
        finally:
            handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "launch_wave", launching)
        yield out


def undone(path: Path, target: Path) -> Path:
    """Results as they are before any wave is done, but with what is recorded of splits."""
    shutil.copytree(path, target)
    store = Store.open(target, "r+")
    for component in store.grids:
        names = [f"{component}/{m}{kind}" for m in store.metrics for kind in ("", "_status")]
        for name in (f"completion/{component}", *names):
            store.remove(key for region in store.chunks(name) for key in store.keys(name, region))
    return target


def check_alike(found: Path, expected: Path) -> None:
    """Equal but for the rounding of sums of another order."""
    alike = values(expected) | baselines(expected)
    for name, found_values in (values(found) | baselines(found)).items():
        np.testing.assert_allclose(found_values, alike[name], rtol=1e-9, atol=1e-12)


def baselines(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    store = Store.open(path)
    return {name: store.read(f"baseline/{name}") for name in store.metrics}


def cells(block: Block) -> set[tuple[int, int, int]]:
    return {(i, u, p) for i in block.pairs for u in block.units for p in block.positions}


def test_parts_hold_every_cell_once_and_fit() -> None:
    plan = plan_sweep(model().dimensions, pairs(2), parse_settings(SETTINGS), torch.device("cpu"))
    assert len(plan.waves) > 1
    for wave in plan.waves:
        sizes = []
        for depth in range(1, wave.tokens.bit_length() + 1):
            parts = plan.split(wave, depth)
            for part in parts:
                single = [len(cells(b)) for b in part.blocks] == [1]
                assert single or part.tokens <= wave.tokens / 2**depth
                assert (part.source, part.sample) == (wave.source, wave.sample)
            for block in wave.blocks:
                mine = [
                    cells(b)
                    for part in parts
                    for b in part.blocks
                    if (b.component, b.index) == (block.component, block.index)
                ]
                assert sum(map(len, mine)) == len(cells(block))
                assert set().union(*mine) == cells(block)
            sizes.append(len(parts))
        assert sizes[0] > 1
        assert sizes == sorted(sizes)
        assert sizes[-1] == sum(len(cells(b)) for b in wave.blocks)  # cut as far as can be


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "r.zarr"
    ps.sweep(model(), pairs(2), out=out, **SETTINGS)
    return out


def check_done_again(out: Path, given: ps.Model, settings: dict[str, Any]) -> None:
    """Who does it again takes the same parts at once, and finds the same bits."""
    again = undone(out, out.with_name("again.zarr"))
    ps.sweep(given, pairs(2), out=again, resume=True, **settings)
    assert arrays(again) == arrays(out)


@pytest.mark.parametrize(
    ("limit", "in_flight", "splits"), [(200, 3, [1, 1, 0]), (120, 1, [2, 2, 1])]
)
def test_out_of_memory_at_launch(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    in_flight: int,
    splits: list[int],
) -> None:
    monkeypatch.setattr(Forward, "waves_in_flight", in_flight)
    out, given = tmp_path / "r.zarr", model()
    with at_most(limit, given) as failed:
        ps.sweep(given, pairs(2), out=out, **SETTINGS)
    assert len(failed) == sum(splits)
    assert ps.open(out).attrs["plan"]["waves"] == len(splits)
    assert Store.open(out).splits()[: len(splits)].tolist() == splits
    assert not Store.open(out).splits()[len(splits) :].any()
    check_alike(out, whole)
    assert arrays(out) != arrays(whole)  # so that it says something that these are equal
    check_done_again(out, given, SETTINGS)


def test_out_of_memory_when_waited_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While others are in flight behind it."""
    result, failed = Launched.result, []

    def arriving(self: Launched) -> WaveResult:
        if self.wave.tokens > LIMIT:
            failed.append(self.wave.index)
            raise no_memory()
        return result(self)

    monkeypatch.setattr(Forward, "waves_in_flight", 3)
    monkeypatch.setattr(Launched, "result", arriving)
    out, given = tmp_path / "r.zarr", model()
    ps.sweep(given, pairs(2), out=out, **SETTINGS)
    assert {0, 1} <= set(failed)
    monkeypatch.setattr(Launched, "result", result)
    check_alike(out, whole)
    check_done_again(out, given, SETTINGS)


@pytest.mark.parametrize(
    "more",
    [
        {"backend": "nnsight", "components": ["head_z", "mlp_out"]},
        {"prefilter": {"keep": "60%", "audit": 3}, "windows": []},
        {"components": ["mlp_out"], "direction": "noise", "edges": "exact"},
    ],
    ids=["nnsight", "prefilter", "edges"],
)
def test_other_ways_of_running(tmp_path: Path, more: dict[str, Any]) -> None:
    settings, given = {**SETTINGS, **more}, model()
    undisturbed, out = tmp_path / "whole.zarr", tmp_path / "r.zarr"
    ps.sweep(given, pairs(2), out=undisturbed, **settings)
    with at_most(LIMIT, given) as failed:
        ps.sweep(given, pairs(2), out=out, **settings)
    assert failed
    assert Store.open(out).splits().any()
    check_alike(out, undisturbed)
    check_done_again(out, given, settings)


@pytest.mark.parametrize("name", ["estimate_pairs", "score_edges"])
def test_estimates_and_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings: dict[str, Any] = {"components": ["head_z"], "metrics": ["logit_diff"]}
    settings |= {"estimate": True} if name == "estimate_pairs" else {"edges": "eap"}
    settings["token_budget"] = 10_000
    undisturbed, out, again = (tmp_path / f"{n}.zarr" for n in ("whole", "r", "again"))
    ps.sweep(model(), pairs(5), out=undisturbed, **settings)
    own, failed = getattr(sweep, name), []

    def compute(forward: Any, plan: Any, pairs: range, *args: Any, **kwargs: Any) -> Any:
        if len(pairs) > most:
            failed.append(pairs)
            raise no_memory()
        return own(forward, plan, pairs, *args, **kwargs)

    most = 2
    monkeypatch.setattr(sweep, name, compute)
    ps.sweep(model(), pairs(5), out=out, **settings)
    assert failed == [range(5), range(3)]
    store = Store.open(out)
    array, done, record = (
        ("head_z/logit_diff_estimate", ESTIMATED, ESTIMATED_SPLIT)
        if name == "estimate_pairs"
        else ("edges/logit_diff", SCORED, SCORED_SPLIT)
    )
    assert store.numbers(record).ravel().tolist() == [2, 0, 0, 0, 0]
    expected = Store.open(undisturbed).read(array)
    np.testing.assert_allclose(store.read(array), expected, rtol=1e-9, atol=1e-12)
    if name == "estimate_pairs":  # the bits tell which split; those of edges here do not
        assert not np.array_equal(store.read(array), expected, equal_nan=True)

    emptied = Store.open(undone(out, again), "r+")
    for each in (done, array):
        emptied.remove(k for r in emptied.chunks(each) for k in emptied.keys(each, r))
    most = 5
    ps.sweep(model(), pairs(5), out=again, resume=True, **settings)
    assert arrays(again) == arrays(out)

    most = 0
    with pytest.raises(ps.BadInput, match=r"^out of memory on the GPU \(2.00 GiB more wanted\)"):
        ps.sweep(model(), pairs(5), out=tmp_path / "none.zarr", **settings)


def test_one_cell_that_does_not_fit(tmp_path: Path) -> None:
    given = model()
    with at_most(10, given), pytest.raises(ps.BadInput) as raised:
        ps.sweep(given, pairs(2), out=tmp_path / "r.zarr", **SETTINGS)
    said = str(raised.value)
    assert said.startswith("out of memory on the GPU (2.00 GiB more wanted), with one cell of ")
    assert "\n" not in said


def test_other_failures_are_not_taken_for_it() -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        within_memory(fails)


def test_what_the_host_says() -> None:
    for ask, wanted in (
        (lambda: torch.empty(10**15), "4000000000000000 bytes"),
        (lambda: np.empty(10**15), "7.11 PiB"),
        (lambda: bytearray(2**62), None),
    ):
        assert within_memory(ask) == OutOfMemory("host", wanted)  # type: ignore[arg-type]


def test_a_record_that_is_lost_or_of_another_wave(whole: Path, tmp_path: Path) -> None:
    """Damage is seen, and done again in whatever parts."""
    out = tmp_path / "r.zarr"
    shutil.copytree(whole, out)
    store = Store.open(out, "r+")
    store.write_split(WAVES_SPLIT, (3,), 2)
    assert [store.split(WAVES_SPLIT, (wave,)) for wave in (2, 3)] == [0, 2]
    [key] = store.keys(WAVES_SPLIT, (slice(3, 4),))
    (out / key).write_bytes(b"?")
    [damage] = ps.check(out).damages
    assert (damage.what, damage.key) == ("split", key)
    ps.sweep(model(), pairs(2), out=out, resume=True, **SETTINGS)
    assert arrays(out) == arrays(whole)
    store.write_split(WAVES_SPLIT, (3,), 2)
    (out / key).rename(out / WAVES_SPLIT / "c" / "4")  # of another wave
    [damage] = ps.check(out).damages
    assert (damage.what, damage.key) == ("split", f"{WAVES_SPLIT}/c/4")
    shutil.rmtree(out / WAVES_SPLIT)
    [damage] = ps.check(out).damages
    assert (damage.where, damage.key) == ("once", f"{WAVES_SPLIT}/zarr.json")
    ps.sweep(model(), pairs(2), out=out, resume=True, **SETTINGS)
    assert arrays(out) == arrays(whole)


# A token takes about a MiB in the MLP. The first sweep loads and starts what stays.
PROCESS = """
import gc
import resource
import psutil
import patchsweep as ps
from tiny import build, rows, tokenizer

model = ps.wrap(build(layers=2, intermediate_size=2**16), tokenizer())
pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(4)]

def sweep(out, token_budget):
    settings = {"components": ["head_z"], "metrics": ["logit_diff"]}
    ps.sweep(model, pairs, out=out, token_budget=token_budget, **settings)

def leave(mib):
    gc.collect()  # what it frees later would be more room
    limit = psutil.Process().memory_info().vms + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

sweep("first.zarr", 100)
leave(200)
sweep("bold.zarr", 100_000)
"""


@pytest.mark.multiproc
def test_a_process_with_little_memory(tmp_path: Path) -> None:
    more = {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is let go is not kept for later
        "MALLOC_ARENA_MAX": "1",  # nor reserved for threads, of which a busy machine starts more
        "XDG_CACHE_HOME": str(tmp_path),  # the model is tested once
    }
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        cwd=tmp_path,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "bold.zarr"
    [depth] = Store.open(out).splits()  # one block of all
    assert depth > 0
    found, expected = values(out), values(tmp_path / "first.zarr")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
    given = ps.wrap(build(layers=2, intermediate_size=2**16), tokenizer())
    again, settings = undone(out, tmp_path / "again.zarr"), {"components": ["head_z"]}
    settings |= {"metrics": ["logit_diff"], "token_budget": 100_000}  # type: ignore[dict-item]
    ps.sweep(given, pairs(4), out=again, resume=True, **settings)
    assert arrays(again) == arrays(out)


@pytest.mark.gpu
def test_a_gpu_with_little_memory(tmp_path: Path) -> None:
    given = ps.wrap(build(layers=2, intermediate_size=2**16).cuda(), tokenizer())
    settings = {"components": ["head_z"], "metrics": ["logit_diff"]}
    ps.sweep(given, pairs(4), out=tmp_path / "first.zarr", token_budget=100, **settings)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = (torch.cuda.memory_allocated() + 300 * 2**20) / total
    torch.cuda.set_per_process_memory_fraction(allowed)
    try:
        out = tmp_path / "bold.zarr"
        ps.sweep(given, pairs(4), out=out, token_budget=100_000, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert Store.open(out).splits().max() > 0
    found, expected = values(out), values(tmp_path / "first.zarr")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-3)
    again = undone(out, tmp_path / "again.zarr")
    ps.sweep(given, pairs(4), out=again, resume=True, token_budget=100_000, **settings)
    assert arrays(again) == arrays(out)
