"""Chunks of several blocks: few files, and what a sweep with a chunk per block finds."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks._models import SHAPES
from benchmarks.scaling import IDLE, schedule
from numpy.typing import NDArray

import patchsweep as ps
from patchsweep.engine import loop as engine
from patchsweep.model.model import dimensions_of, empty_model
from patchsweep.pairs import Pair
from patchsweep.passes.wave import WaveResult, launch_wave
from patchsweep.plan import Plan, Wave, chunks, make_plan
from patchsweep.plan.chunks import chunked
from patchsweep.sites import Grid, blocks
from patchsweep.spec import parse_settings
from patchsweep.store import Store
from started import TORCHRUN, launch, said
from tiny import arrays, build, rows, save, tokenizer, write_pairs, write_spec

METRICS = ("logit_diff", "prob")
PAIRS = 5
# (settings, the most files): a chunk is several blocks of a pair; those of several pairs; those of
# several pairs that are estimated first.
SWEEPS: dict[str, tuple[dict[str, Any], int]] = {
    "positions": ({"components": ["head_z", "mlp_out"], "token_budget": 60}, 250),
    "pairs": (
        {"components": ["mlp_out", "resid_pre"], "token_budget": 200, "direction": "both"},
        80,
    ),
    "estimates": (
        {
            "components": ["mlp_out", "attn_out"],
            "token_budget": 200,
            "prefilter": {"keep": "40%", "audit": 3},
            "windows": [2],
            "fsync": True,
        },
        60,
    ),
}


def settings_of(name: str) -> dict[str, Any]:
    return {**SWEEPS[name][0], "metrics": list(METRICS)}


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(build().double(), tokenizer())


def pairs_of(model: ps.Model) -> list[Pair]:
    return [ps.make_pair(model.tokenizer, **row) for row in rows(PAIRS)]


@pytest.fixture(scope="module", params=SWEEPS)
def whole(
    request: pytest.FixtureRequest, model: ps.Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A sweep of few files, that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "r.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MOST_FILES", SWEEPS[request.param][1])
        ps.sweep(model, pairs_of(model), out=out, **settings_of(request.param))
    return request.param, out


def grid(name: str, pairs: int, units: int, positions: int, *tiles: int) -> Grid:
    places = tuple(range(positions))
    return Grid(name, ("denoise", "noise"), pairs, 3, units, places, *tiles, samples=2)


def test_no_more_blocks_in_a_chunk_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the grids: chunks are whole numbers of blocks, and with one block less in a chunk
    there would be too many files."""
    rng, seen = np.random.default_rng(0), Counter[str]()
    for _ in range(80):
        pairs, tile = int(rng.integers(1, 16)), int(rng.integers(1, 4))
        grids = {}
        for name in ("head_z", "mlp_out")[: rng.integers(1, 3)]:
            units, positions = map(int, rng.integers(1, 6, 2))
            tiles = (min(tile, pairs), int(rng.integers(1, units + 1)))
            grids[name] = grid(
                name, pairs, units, positions, *tiles, int(rng.integers(1, positions + 1))
            )
        monkeypatch.setattr(chunks, "MOST_FILES", limit := int(rng.integers(1, 2000)))
        monkeypatch.setattr(chunks, "MOST_BYTES", most := int(rng.integers(100, 30000)))
        monkeypatch.setattr(chunks, "MOST_BLOCKS", 40)

        def cut(n: int | None, grids: dict[str, Grid] = grids) -> chunks.Chunks:
            return chunked(grids, arrays=4, baselines=4, value=8, blocks=n)

        found = cut(None)
        assert cut(found.blocks) == found
        assert found.files == _files(found.grids)
        fewer = [cut(n).files for n in range(1, found.blocks)]
        assert all(n > limit and n > found.files for n in fewer)
        assert found.files <= limit or found.files == cut(40).files
        for name, whole in found.grids.items():
            small = grids[name]
            holds = Counter(whole.number(block) for block in blocks(small))
            assert sorted(holds) == list(range(len(blocks(whole))))
            assert max(holds.values()) <= found.blocks
            cells = np.prod(whole.chunks)
            assert cells == np.prod(small.chunks) or cells * 8 <= most
            assert whole.pair_tile == found.grids["head_z"].pair_tile
            every = blocks(whole)
            for block in blocks(small):
                chunk = every[whole.number(block)]
                for inner, outer in zip(block.region(small), chunk.region(whole), strict=True):
                    assert outer.start <= inner.start < inner.stop <= outer.stop
            several_pairs = whole.pair_tile > small.pair_tile
            complete = whole.tiles[4:] == (1, 1)
            assert complete or not several_pairs
            if whole.unit_tile > small.unit_tile:
                assert whole.position_tile == len(whole.positions)
            seen["pairs"] += several_pairs
            seen["positions"] += whole.position_tile > small.position_tile
            seen["same"] += whole == small
    assert min(seen[k] for k in ("pairs", "positions", "same")) > 5


def _files(grids: Mapping[str, Grid]) -> int:
    """Counted one by one: four arrays and a record per chunk, four of baselines."""
    every = [chunk for g in grids.values() for chunk in blocks(g)]
    baselines = {(c.source, c.sample, c.pairs) for c in every}
    return 5 * len(every) + 4 * len(baselines)


def test_a_sweep_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of 1,000 pairs of 100 tokens on 512 GPUs, with a twentieth of the files."""
    share = 20
    monkeypatch.setattr(chunks, "MOST_FILES", chunks.MOST_FILES // share)
    rng, config = np.random.default_rng(0), SHAPES["llama-70b"]
    pairs = []
    for _ in range(1000 // share):
        clean, corrupt = rng.choice(config.vocab_size, (2, 100), replace=False).tolist()
        pairs.append(Pair(tuple(clean), (clean[0], *corrupt[1:]), (1,), (2,)))
    metrics = ["logit_diff", "logprob", "prob", "rank", "kl"]
    settings = parse_settings({"components": ["head_z"], "metrics": metrics})
    plan = make_plan(pairs, settings, dimensions_of(empty_model(config, "bfloat16")), 65536)
    counts = plan.counts()
    assert counts["blocks"] * 11 > 4 * chunks.MOST_FILES
    assert counts["files"] <= chunks.MOST_FILES
    costs = [float(sum(w.flops for w in unit)) for unit in plan.units]
    gpus = 512 // share
    assert 1 - sum(costs) / gpus / schedule(costs, gpus) < IDLE / 100
    cells = max(np.prod(g.chunks) for g in plan.chunks.grids.values())
    assert cells * 4 <= chunks.MOST_BYTES
    held = Counter((b.component, b.index) for w in plan.waves for b in w.blocks)
    assert set(held.values()) == {1}
    assert len(held) == counts["blocks"]


class Watched:
    """What a sweep writes: the keys of chunks, and the plan with what its waves found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: Counter[str] = Counter()
        self.found: list[tuple[Plan, Wave, WaveResult]] = []
        write, take = Store._put, engine.Assembly.take

        def writing(store: Store, files: Mapping[str, bytes]) -> None:
            self.keys.update(list(files))
            write(store, files)

        def taking(assembly: Any, wave: Wave, result: WaveResult) -> None:
            self.found.append((self.plan, wave, result))
            take(assembly, wave, result)

        def launching(forward: Any, plan: Plan, *args: Any, **kwargs: Any) -> Any:
            self.plan = plan
            return launch_wave(forward, plan, *args, **kwargs)

        monkeypatch.setattr(Store, "_put", writing)
        monkeypatch.setattr(engine.Assembly, "take", taking)
        monkeypatch.setattr(engine, "launch_wave", launching)


@pytest.mark.parametrize("name", SWEEPS)
def test_what_a_chunk_per_block_holds(
    model: ps.Model, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statuses are the same; values too, but for waves of another height. What each wave found is
    stored bit for bit, each chunk is written once."""
    pairs, settings = pairs_of(model), settings_of(name)
    expected = ps.sweep(model, pairs, out=tmp_path / "blocks", **settings)
    assert expected.attrs["blocks_per_chunk"] == 1
    monkeypatch.setattr(chunks, "MOST_FILES", SWEEPS[name][1])
    watched = Watched(monkeypatch)
    results = ps.sweep(model, pairs, out=tmp_path / "chunks", **settings)
    plan, grids = results.attrs["plan"], results.store.grids
    assert results.attrs["blocks_per_chunk"] > 1
    assert plan["blocks"] == expected.attrs["plan"]["blocks"]
    assert plan["files"] <= SWEEPS[name][1] < expected.attrs["plan"]["files"]
    assert (max(g.pair_tile for g in grids.values()) > 1) == (name != "positions")

    a, b = arrays(expected.path), arrays(results.path)
    assert a.keys() == b.keys()
    numbers = {f"{part}{kind}" for part in METRICS for kind in ("", "_estimate", "_noise_floor")}
    by_chunk = {"completion/waves_split", "records/baseline", "records/estimates"}
    by_chunk |= {f"completion/{g}" for g in grids}
    for array in a.keys() - by_chunk:
        if array.split("/")[-1] in numbers:
            x, y = np.frombuffer(a[array]), np.frombuffer(b[array])
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)
        else:
            assert a[array] == b[array], array
    cells = {f"{c}/{m}{kind}" for c in grids for m in METRICS for kind in ("", "_status")}
    written = {key: n for key, n in watched.keys.items() if key.split("/c/")[0] in cells}
    assert set(written.values()) == {1}
    assert len(written) == sum(len(blocks(g)) for g in grids.values()) * 4
    _check_stored(results, watched)


def _check_stored(results: ps.Results, watched: Watched) -> None:
    """What waves found is where it belongs; what nobody found is nowhere."""
    stored = {
        (c, m, k): results.store.read(f"{c}/{m}{k}")
        for c in results.store.grids
        for m in METRICS
        for k in ("", "_status")
    }
    seen = {of: np.zeros(a.shape, bool) for of, a in stored.items()}
    for plan, wave, result in watched.found:
        for block, values, status in result.blocks:
            region = block.region(plan.grids[block.component])
            for kind, found in (("", values), ("_status", status)):
                for m in METRICS:
                    of = (block.component, m, kind)
                    assert not seen[of][region].any()
                    seen[of][region] = True
                    assert _bits(stored[of][region]) == _bits(found[m])
        if wave.owner:
            for m in METRICS:
                at = (
                    slice(None),
                    wave.source,
                    wave.sample,
                    slice(wave.pairs.start, wave.pairs.stop),
                )
                for kind, floor in (("", result.baseline), ("_noise_floor", result.noise_floor)):
                    assert _bits(results.store.read(f"baseline/{m}{kind}", at)) == _bits(floor[m])
    assert all(each.all() for each in seen.values())
    owned = sorted(i for _, wave, _ in watched.found if wave.owner for i in wave.pairs)
    assert owned == list(range(PAIRS))


def _bits(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def test_stopped_and_continued(
    model: ps.Model, whole: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a unit, again and again, later with another limit. What is whole is kept."""
    name, expected = whole
    pairs, out, settings = pairs_of(model), tmp_path / "r.zarr", settings_of(name)
    monkeypatch.setattr(chunks, "MOST_FILES", SWEEPS[name][1])
    take, taken, done = engine.Assembly.take, 0, 0

    def stopping(assembly: Any, wave: Wave, result: WaveResult) -> None:
        nonlocal taken
        taken += 1
        if taken == (8 if name == "positions" else 3):
            raise KeyboardInterrupt
        take(assembly, wave, result)

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine.Assembly, "take", stopping)
            taken = 0
            ps.sweep(model, pairs, out=out, resume=True, **settings)
        store = Store.open(out)
        done, before = sum(int(store.done(c).sum()) for c in store.grids), done
        assert done >= before
        monkeypatch.setattr(chunks, "MOST_FILES", 1 << 40)
    assert done
    results = ps.sweep(model, pairs, out=out, resume=True, **settings)
    assert results.complete
    assert arrays(out) == arrays(expected)
    assert ps.verify(results, 5, model).cells == 5


@pytest.mark.parametrize("what", ["mlp_out/prob", "completion/mlp_out", "baseline/logit_diff"])
def test_what_is_damaged_is_done_again(
    model: ps.Model,
    whole: tuple[str, Path],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk, or all that are of its pairs."""
    name, expected = whole
    out = shutil.copytree(expected, tmp_path / "r.zarr")
    file = min(f for f in (out / what / "c").rglob("*") if f.is_file())
    file.write_bytes(file.read_bytes()[:-5])
    assert [d.key for d in ps.check(out).damages] == [str(file.relative_to(out))]
    watched = Watched(monkeypatch)
    results = ps.sweep(model, pairs_of(model), out=out, resume=True, **settings_of(name))
    assert arrays(out) == arrays(expected)
    records = {f"completion/{name}" for name in results.components}
    again = sum(n for key, n in watched.keys.items() if key.split("/c/")[0] in records)
    total = sum(len(blocks(g)) for g in results.store.grids.values())
    assert 0 < again < total if what.startswith("baseline") else again == 1
    assert not ps.check(out).damages


def test_further_pairs(model: ps.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of the pairs that were there gets others; their cells keep their bits."""
    pairs, settings, out = pairs_of(model), settings_of("pairs"), tmp_path / "r.zarr"
    pairs.sort(key=len, reverse=True)
    whole = ps.sweep(model, pairs, out=tmp_path / "whole", **settings)
    monkeypatch.setattr(chunks, "MOST_FILES", 30)
    few = ps.sweep(model, pairs[:3], out=out, **settings)
    assert few.attrs["blocks_per_chunk"] > 1
    before = {name: few.store.read(f"{name}/prob") for name in few.components}
    monkeypatch.setattr(chunks, "MOST_FILES", 60)
    more = ps.sweep(model, pairs, out=out, append=True, **settings)
    assert more.complete
    for name, old in before.items():
        tile = more.grid(name).pair_tile
        assert 1 < tile < PAIRS
        assert 3 % tile
        found, expected = (x.store.read(f"{name}/prob") for x in (more, whole))
        assert _bits(found[:, :, :, :3]) == _bits(old)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    assert not ps.check(out).damages


@pytest.mark.multiproc
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take over a sweep that was begun with a limit that they do not know."""
    write_pairs(tmp_path / "pairs.jsonl", rows(PAIRS))
    file = write_spec(tmp_path, save(tmp_path / "model"), **settings_of("pairs"), out=None)
    spec, out = ps.load_spec(file), tmp_path / "r.zarr"
    monkeypatch.setattr(chunks, "MOST_FILES", SWEEPS["pairs"][1])
    expected = ps.run(spec.model_copy(update={"out": tmp_path / "whole.zarr"}))
    monkeypatch.setattr(engine.Assembly, "take", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        ps.run(spec.model_copy(update={"out": out}))
    process = launch(TORCHRUN, 2, file, "--out", out, "--resume")
    assert said(process) == []
    assert process.returncode == 0
    assert ps.open(out).attrs["blocks_per_chunk"] > 1
    assert arrays(out) == arrays(expected.path)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
