"""Further pairs and metrics for results that are there: old cells keep their bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import patchsweep as ps
from patchsweep.engine.assembly import Assembly
from patchsweep.passes.wave import WaveResult
from patchsweep.plan import Wave, chunks
from patchsweep.sites import Block, Status
from patchsweep.store import Store, job_folder, stored_pairs
from started import TORCHRUN, launch, said, still_for_both
from tiny import (
    arrays,
    build,
    pairs_of,
    rewrite,
    rows,
    save,
    tokenizer,
    values,
    write_pairs,
    write_spec,
)

FEW, ALL = 5, 9
SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out"],
    "metrics": ["logit_diff", "kl"],
    "sets": {"two": ["head_z.0.1@-1", "mlp_out.1"]},
    "token_budget": 100,
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(build(2), tokenizer(), "tiny")


@pytest.fixture(scope="module")
def pairs(model: ps.Model) -> list[ps.Pair]:
    """The longest prompt comes late, so that further pairs bring further positions."""
    found = sorted(pairs_of(model, rows(ALL, seed=1)), key=len)
    assert len(found[FEW - 1]) < len(found[-1])
    return found


@pytest.fixture
def waves(monkeypatch: pytest.MonkeyPatch) -> list[Wave]:
    """The waves that are computed and written from now on."""
    found: list[Wave] = []
    take = Assembly.take

    def seen(self: Assembly, wave: Wave, result: WaveResult) -> None:
        found.append(wave)
        take(self, wave, result)

    monkeypatch.setattr(Assembly, "take", seen)
    return found


def check_equal(out: Path, whole: Path) -> None:
    """As one sweep of everything, but for rounding."""
    assert ps.open(out).complete
    found, expected = values(out), values(whole)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        if name.endswith("_status"):
            np.testing.assert_array_equal(x, expected[name], name)
        np.testing.assert_allclose(x, expected[name], atol=TOLERANCE, err_msg=name)
    for metric in ps.open(out).metrics:
        for name in (f"baseline/{metric}", f"baseline/{metric}_noise_floor"):
            x, y = (zarr.open_array(path / name, mode="r")[...] for path in (out, whole))
            np.testing.assert_allclose(x, y, atol=TOLERANCE, err_msg=name)


def check_kept(out: Path, before: dict[str, np.ndarray[Any, Any]]) -> None:
    """Every cell that was measured has the bits that it had; what was outside is so."""
    found = values(out)
    for name, x in before.items():
        now = found[name][tuple(slice(0, n) for n in x.shape)]
        assert now.tobytes() == x.tobytes(), name
        beyond = found[name][:, :, :, : x.shape[3], :, :, x.shape[6] :]
        if name.endswith("_status"):
            assert (beyond == Status.OUTSIDE).all()


def test_more_pairs_in_chunks_of_several_blocks(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many in the larger results as it takes there; old chunks of one block or of several."""
    settings = {**SETTINGS, "components": ["mlp_out"], "token_budget": 60}
    ps.sweep(model, pairs, out=tmp_path / "whole", **settings)
    for before, after in ((chunks.MOST_FILES, 1), (1, 1)):
        monkeypatch.setattr(chunks, "MOST_FILES", before)
        out = tmp_path / f"{before}.zarr"
        ps.sweep(model, pairs[:FEW], out=out, **settings)
        old = values(out)
        monkeypatch.setattr(chunks, "MOST_FILES", after)
        results = ps.sweep(model, pairs, out=out, append=True, **settings)
        assert results.store.blocks_per_chunk > 1
        check_equal(out, tmp_path / "whole")
        check_kept(out, old)


@pytest.mark.parametrize("budget", ["auto", 100], ids=str)
def test_more_pairs(
    model: ps.Model, pairs: list[ps.Pair], waves: list[Wave], tmp_path: Path, budget: Any
) -> None:
    out, settings = tmp_path / "r.zarr", {**SETTINGS, "token_budget": budget}
    ps.sweep(model, pairs, out=tmp_path / "whole", **settings)
    ps.sweep(model, pairs[:FEW], out=out, **settings)
    before, made = values(out), ps.open(out).attrs["created"]
    waves.clear()
    results = ps.sweep(model, pairs, out=out, append=True, **settings)
    check_equal(out, tmp_path / "whole")
    check_kept(out, before)
    tile = next(iter(results.store.grids.values())).pair_tile
    old = FEW // tile * tile  # pairs that were there in whole blocks
    assert old > 0
    assert waves
    assert all(wave.pairs.stop > old for wave in waves)
    assert len(waves) < results.attrs["plan"]["waves"]
    [entry] = results.attrs["appended"]
    assert (entry["pairs"], entry["metrics"]) == (FEW, ["logit_diff", "kl"])
    assert results.attrs["created"] == made
    assert {*tmp_path.iterdir()} == {
        out,
        tmp_path / "whole",
        *map(job_folder, (out, tmp_path / "whole")),
    }


def test_more_metrics(
    model: ps.Model, pairs: list[ps.Pair], waves: list[Wave], tmp_path: Path
) -> None:
    out, small = tmp_path / "r.zarr", {**SETTINGS, "components": ["mlp_out"]}
    more = {**small, "metrics": ["prob", "logit_diff", "kl"]}
    ps.sweep(model, pairs, out=tmp_path / "whole", **more)
    ps.sweep(model, pairs, out=out, **small)
    before = values(out)
    waves.clear()
    results = ps.sweep(model, pairs, out=out, append=True, **more)
    check_equal(out, tmp_path / "whole")
    check_kept(out, before)
    assert len(waves) == results.attrs["plan"]["waves"]


@pytest.mark.parametrize(("count", "metrics"), [(ALL, ["kl"]), (FEW, ["kl", "prob"])], ids=str)
def test_what_was_measured_is_not_written_again(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, count: int, metrics: list[str]
) -> None:
    """Not even where its block is computed again: numbers that no sweep would find stay."""
    out, settings = tmp_path / "r.zarr", {"components": ["mlp_out"], "token_budget": 100}
    results = ps.sweep(model, pairs[:FEW], out=out, metrics=["kl"], **settings)
    tile = results.grid("mlp_out").pair_tile
    assert FEW % tile  # so that one holds old pairs and new ones
    rewrite(out, "mlp_out/kl", lambda values: values + 1)
    ends = (
        {"kl": found[:, 0, 0] + 1} for found in (results.baseline("kl"), results.noise_floor("kl"))
    )
    Store.open(out, "r+").write_baseline(0, 0, range(FEW), *ends)
    results = ps.open(out)
    before = values(out), results.baseline("kl"), results.noise_floor("kl")
    results = ps.sweep(model, pairs[:count], out=out, append=True, metrics=metrics, **settings)
    assert results.complete
    check_kept(out, before[0])
    np.testing.assert_array_equal(results.baseline("kl")[..., :FEW], before[1])
    np.testing.assert_array_equal(results.noise_floor("kl")[..., :FEW], before[2])
    assert np.nanmax(results.noise_floor("kl")[..., FEW:], initial=0) < 1e-3


def test_again_and_again(
    model: ps.Model, pairs: list[ps.Pair], waves: list[Wave], tmp_path: Path
) -> None:
    """Pairs, a metric, pairs; and what has nothing to add adds nothing."""
    out, both = tmp_path / "r.zarr", {**SETTINGS, "components": ["mlp_out"]}
    one = {**both, "metrics": ["logit_diff"]}
    ps.sweep(model, pairs, out=tmp_path / "whole", **both)
    ps.sweep(model, pairs[:4], out=out, append=True, **one)  # nothing to append to
    for count, settings in ((6, one), (6, both), (ALL, both)):
        before = values(out)
        results = ps.sweep(model, pairs[:count], out=out, append=True, **settings)
        check_kept(out, before)
    check_equal(out, tmp_path / "whole")
    assert [entry["pairs"] for entry in results.attrs["appended"]] == [4, 6, 6]
    whole = arrays(out)
    waves.clear()
    for how in ("append", "resume"):
        ps.sweep(model, pairs, out=out, **{how: True}, **both)
    assert waves == []
    assert arrays(out) == whole


def test_scores_of_edges(model: ps.Model, pairs: list[ps.Pair], tmp_path: Path) -> None:
    out, settings = tmp_path / "r.zarr", {**SETTINGS, "edges": "eap", "components": ["mlp_out"]}
    ps.sweep(model, pairs, out=tmp_path / "whole", **settings)
    ps.sweep(model, pairs[:FEW], out=out, **settings)
    before = zarr.open_array(out / "edges" / "kl", mode="r")[...]
    ps.sweep(model, pairs, out=out, append=True, **settings)
    found, whole = (
        zarr.open_array(path / "edges" / "kl", mode="r")[...] for path in (out, tmp_path / "whole")
    )
    assert found[:, :, :, :FEW].tobytes() == before.tobytes()
    np.testing.assert_allclose(found, whole, atol=TOLERANCE)


def test_what_was_not_done(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted results get further pairs too, and what they lack."""
    out = tmp_path / "r.zarr"
    ps.sweep(model, pairs, out=tmp_path / "whole", **SETTINGS)
    stop_at_write(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        ps.sweep(model, pairs[:FEW], out=out, **SETTINGS)
    monkeypatch.undo()
    ps.sweep(model, pairs, out=out, append=True, **SETTINGS)
    check_equal(out, tmp_path / "whole")


def stop_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """An interrupt in place of a block's writing."""
    write, written = Store.write_block, []

    def stopping(self: Store, block: Block, *args: Any) -> None:
        if len(written) == number:
            raise KeyboardInterrupt
        written.append(block)
        write(self, block, *args)

    monkeypatch.setattr(Store, "write_block", stopping)


def stop_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A kill in place of a folder's renaming: nothing is put in order after it."""
    rename, renamed = Path.rename, []

    def stopping(self: Path, target: Path) -> Path:
        if self.is_dir():
            if len(renamed) == number:
                monkeypatch.setattr("patchsweep.store.folder._cleared", lambda _: None)
                raise KeyboardInterrupt
            renamed.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopping)


def test_interrupted(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While old cells are copied, while the larger results take the place of the old ones, and
    after that: going on ends with the bits of an append that nothing disturbed."""
    out, part, whole = (tmp_path / name for name in ("r.zarr", "part.zarr", "whole.zarr"))
    settings = {"components": ["mlp_out"], "metrics": ["logit_diff"], "token_budget": 60}
    ps.sweep(model, pairs[:FEW], out=part, **settings)

    def append(path: Path, how: str = "append") -> None:
        ps.sweep(model, pairs, out=path, **{how: True}, **settings)

    write, written = Store.write_block, []
    monkeypatch.setattr(Store, "write_block", lambda *args: (written.append(args), write(*args)))
    copy(part, whole)
    append(whole)
    monkeypatch.undo()
    for stop, number, how in (
        (stop_at_write, 1, "append"),
        (stop_at_rename, 0, "append"),
        (stop_at_rename, 1, "append"),
        (stop_at_write, len(written) - 2, "resume"),
    ):
        copy(part, out)
        with pytest.MonkeyPatch.context() as patch:
            stop(patch, number)
            with pytest.raises(KeyboardInterrupt):
                append(out)
        append(out, how)
        assert ps.open(out).complete
        assert arrays(out) == arrays(whole)
        assert {path for path in tmp_path.iterdir() if ".r.zarr" in path.name} == {job_folder(out)}


def copy(path: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(path, target)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {"components": ["head_z"]}, ["components differs"]),
        ({}, {"direction": "noise"}, ["direction differs"]),
        ({}, {"metrics": ["logit_diff"]}, ["metric kl is missing"]),
        ({"prefilter": {"keep": "30%"}}, {}, ["estimated", "all pairs"]),
        ({"circuit": {"ranking": ["mlp_out.1"]}}, {}, ["circuit"]),
        ({"windows": [2]}, {}, ["windows", "longest"]),
        (
            {"source": {"mean": {"prompts": "clean"}}, "direction": "noise"},
            {},
            ["mean is over all pairs"],
        ),
        ({"corrupt": {"gaussian": {"tokens": [1]}}}, {}, ["noise", "std: table"]),
    ],
    ids=str,
)
def test_refused(
    model: ps.Model,
    pairs: list[ps.Pair],
    tmp_path: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    words: list[str],
) -> None:
    """Results that cannot be those of the larger sweep stay as they are."""
    out, settings = tmp_path / "r.zarr", {**SETTINGS, **before}
    ps.sweep(model, pairs[:FEW], out=out, **settings)
    whole = arrays(out)
    with pytest.raises(ps.BadInput) as error:
        ps.sweep(model, pairs, out=out, append=True, **{**settings, **after})
    for word in (*words, str(out), "--overwrite"):
        assert word in str(error.value)
    assert arrays(out) == whole


def test_other_pairs_or_model_are_refused(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path
) -> None:
    out = tmp_path / "r.zarr"
    ps.sweep(model, pairs[:FEW], out=out, **SETTINGS)
    other = ps.wrap(build(2, seed=1), tokenizer(), "tiny")
    for who, some, word in (
        (model, [*pairs[1:], pairs[0]], "pair 0 is another"),
        (model, pairs[: FEW - 1], f"it has {FEW} pairs"),
        (other, pairs, "another model"),
    ):
        with pytest.raises(ps.BadInput, match=word):
            ps.sweep(who, some, out=out, append=True, **SETTINGS)
    # Without being told to nothing is added, but it is said how.
    with pytest.raises(ps.BadInput, match="--append to add to it"):
        ps.sweep(model, pairs, out=out, resume=True, **SETTINGS)
    with pytest.raises(ps.BadInput) as error:
        ps.sweep(other, pairs, out=out, resume=True, **SETTINGS)
    assert "--append" not in str(error.value)


def test_not_at_a_url(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.chdir(tmp_path)  # where the logs of a URL go
    out, settings = "memory://append.zarr", {**SETTINGS, "components": ["mlp_out"]}
    ps.sweep(model, pairs[:FEW], out=out, **settings)
    with pytest.raises(ps.BadInput, match="at a URL nothing takes the place"):
        ps.sweep(model, pairs, out=out, append=True, **settings)
    assert len(stored_pairs(ps.open(out).store)) == FEW


@pytest.mark.multiproc
def test_two_processes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", rows(ALL))
    settings = {"components": ["head_z"], "metrics": ["logit_diff"], "token_budget": 150}
    spec = write_spec(tmp_path, save(tmp_path / "model"), out=None, **settings)
    for name, count in (("one.zarr", FEW), ("two.zarr", FEW), ("one.zarr", ALL)):
        given = ps.load_spec(spec, [f"out={tmp_path / name}", f"prompts.n={count}"])
        ps.run(given, append=True)
    out = tmp_path / "two.zarr"
    more = ["--out", out, "--set", f"prompts.n={ALL}"]
    process = launch(TORCHRUN, 2, spec, *more, "--append", **still_for_both(out))
    assert said(process) == []
    assert process.returncode == 0
    assert arrays(out) == arrays(tmp_path / "one.zarr")
    logs = [(job_folder(out) / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert all(": computed" in log for log in logs)
    assert not torch.distributed.is_initialized()
