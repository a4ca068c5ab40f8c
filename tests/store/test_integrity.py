"""Nothing damaged is taken for a result: whatever is broken, and whenever a write fails."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from patchsweep.pairs import Pair
from patchsweep.sites import Grid, blocks
from patchsweep.store import WAVES_SPLIT, Store, job_folder
from patchsweep.store.folder import Folder
from patchsweep.store.integrity import check, refuse_missing, withdraw
from tiny import arrays, build, rows, tokenizer

GRID = Grid("head_z", ("denoise",), 2, 2, 2, (0, 1, 2), 1, 2, 3)
PAIRS = [Pair((5, 6, 7), (5, 1, 7), (2,), (3,), {})] * 2
OF_A_PAIR = 2 + 1 + 2 + 1  # baseline and noise floor, their record; values and status, theirs
WRITES = 2 * OF_A_PAIR

Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store of two blocks, one per pair."""
    out = tmp_path_factory.mktemp("store") / "r.zarr"
    attrs = {"spec": {}, "sources": [{"normalised": True}]}
    Store.create(out, [GRID], ["logit_diff"], PAIRS, str, attrs, "float32")
    return out


@pytest.fixture
def out(laid_out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(laid_out, tmp_path / "r.zarr")


def fill(store: Store) -> None:
    """Write what is not done, as a sweep does."""
    done = store.done("head_z")
    for block in blocks(GRID):
        pairs = block.pairs
        if done[block.index] and store.has_baseline(0, 0, pairs):
            continue
        ends = {"logit_diff": np.array([[1.0], [2.0]]) + block.index}
        store.write_baseline(0, 0, pairs, ends, {"logit_diff": np.zeros((2, 1))})
        values, status = data(block.index)
        store.write_block(block, {"logit_diff": values}, {"logit_diff": status})


def data(number: int) -> tuple[Any, Any]:
    """Values and status of a block, with a cell outside the prompt and one that is not finite."""
    values = (np.arange(12, dtype=np.float32) + 100 * number).reshape(GRID.chunks)
    status = np.ones(GRID.chunks, np.uint8)
    values.ravel()[:2], status.ravel()[:2] = (np.nan, np.inf), (4, 6)
    return values, status


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


BREAKS: dict[str, Break] = {"missing": Path.unlink, "truncated": cut, "checksum": flip}


@pytest.mark.parametrize("why", BREAKS)
def test_every_damaged_chunk_is_found_and_done_again(out: Path, why: str) -> None:
    store = Store.open(out, "r+")
    fill(store)
    whole = arrays(out)
    assert str(ps.check(out)) == f"{out}: nothing is damaged, 2 of 2 blocks are done"
    chunks = [f for part in ("head_z/logit_diff*", "baseline/logit*") for f in out.glob(part)]
    files = [f for chunk in chunks for f in (chunk / "c").rglob("*") if f.is_file()]
    assert len(files) == 8
    for file in files:
        BREAKS[why](file)
        [damage] = ps.check(out).damages
        assert (damage.key, damage.why) == (str(file.relative_to(out)), why)
        assert damage.what == damage.key.split("/")[0]
        with pytest.raises(ps.BadInput, match="patchsweep check"):
            refuse_missing(store)
            store.read(str(file.relative_to(out)).split("/c/")[0])
        assert withdraw(store) == [damage]
        assert store.done("head_z").sum() == 1
        assert not file.exists()
        fill(store)
        assert arrays(out) == whole
    for record in (out / "completion" / "head_z" / "c").iterdir():
        BREAKS[why](record)
        expected = [] if why == "missing" else [(f"completion/head_z/c/{record.name}", why)]
        assert [(d.key, d.why) for d in ps.check(out).damages] == expected
        withdraw(store)
        assert store.done("head_z").sum() == 1
        fill(store)
        assert arrays(out) == whole


@pytest.mark.filterwarnings("error")  # Zarr's, of files that it does not know
def test_what_a_kill_has_left_half_written_goes_away(out: Path) -> None:
    fill(Store.open(out, "r+"))
    half = f"{'0a1b' * 8}.partial"  # as Zarr names it
    for name in ("README", "zarr", "head_z/logit_diff/zarr", "completion/head_z/c/0"):
        (out / f"{name}.{half}").touch()
    assert check(out).damages == ()
    assert withdraw(Store.open(out, "r+")) == []
    assert not [*out.rglob("*.partial")]


ONCE = (
    "prompts/clean_tokens/c/0/0",
    "prompts/group/c/0",
    "head_z/unit/c/0",
    "head_z/pair/zarr.json",
    "head_z/logit_diff/zarr.json",
    "completion/head_z/zarr.json",
    "baseline/zarr.json",
    "zarr.json",
    "manifest/zarr.json",
)


@pytest.mark.parametrize("why", BREAKS)
def test_what_is_written_once_is_written_again(out: Path, why: str) -> None:
    """None of it reads as zeros, or as nothing: results open as they were, or not at all."""
    store = Store.open(out, "r+")
    fill(store)
    store.set_attrs(joint={})
    whole = files(out)
    for name in ONCE:
        BREAKS[why](out / name)
        found = ps.check(out)
        assert [d.key for d in found.damages] == [name]
        assert "run again with --resume" in str(found)
        with pytest.raises(ps.BadInput, match=f"cannot read .*{name}: .*patchsweep check"):
            ps.open(out)
        assert len(withdraw(Store.open(out, "r+", mending=True))) == 1
        assert files(out) == whole
    assert Store.open(out).done("head_z").all()


@pytest.mark.parametrize("why", BREAKS)
def test_what_changes_is_kept_twice(out: Path, why: str) -> None:
    store = Store.open(out, "r+")
    for seconds in (1, 2):
        store.set_attrs(measured={"seconds": seconds})
    whole = files(out)
    for name in ("summary/zarr.json", "summary/second/zarr.json"):
        BREAKS[why](out / name)
        assert Store.open(out).attrs["measured"] == {"seconds": 2}
        assert [d.key for d in ps.check(out).damages] == [name]
        withdraw(Store.open(out, "r+", mending=True))
        assert files(out) == whole
    for name in ("summary/zarr.json", "summary/second/zarr.json"):
        BREAKS[why](out / name)
    if why != "missing":
        with pytest.raises(ps.BadInput, match=r"cannot read .*summary.*patchsweep check"):
            _ = Store.open(out).attrs
        withdraw(Store.open(out, "r+", mending=True))
    assert "measured" not in Store.open(out).attrs


ROOTS = [(b'"patchsweep_schema": 3', b'"patchsweep_schema": %d' % n) for n in (0, 1, 2, 4, 33)]
ROOTS += [(b'"normalised": true', b'"normalised": null'), (b'"name": "logit', b'"name": "logiu')]


@pytest.mark.parametrize(("right", "wrong"), ROOTS, ids=str)
def test_a_root_that_says_something_else_is_damage(out: Path, right: bytes, wrong: bytes) -> None:
    """It is not taken for right because all else is as the root says: the manifest knows better."""
    fill(Store.open(out, "r+"))
    root, whole = out / "zarr.json", (out / "zarr.json").read_bytes()
    assert right in whole
    root.write_bytes(whole.replace(right, wrong))
    with pytest.raises(ps.BadInput, match=r"cannot read .*zarr.json: .*patchsweep check"):
        ps.open(out)
    assert [d.key for d in ps.check(out).damages] == ["zarr.json"]
    withdraw(Store.open(out, "r+", mending=True))
    assert root.read_bytes() == whole


def test_what_other_results_say_is_damage(out: Path, tmp_path: Path) -> None:
    """Whole as it is, and of the same change."""
    attrs = {"spec": {"n": 2}, "sources": [{"normalised": True}]}
    other = Store.create(tmp_path / "other", [GRID], ["logit_diff"], PAIRS, str, attrs, "float32")
    Store.open(out, "r+").set_attrs(measured={"seconds": 1})
    other.set_attrs(measured={"seconds": 2})
    whole = files(out)
    for name in ("summary/zarr.json", "summary/second/zarr.json"):
        (out / name).write_bytes((tmp_path / "other" / name).read_bytes())
        assert Store.open(out).attrs["measured"] == {"seconds": 1}
        assert [d.key for d in ps.check(out).damages] == [name]
        withdraw(Store.open(out, "r+", mending=True))
        assert files(out) == whole


def test_files_of_others_beside_small_numbers(out: Path) -> None:
    store = Store.open(out, "r+")
    store.write_split(WAVES_SPLIT, (1,), 2)
    chunks = out / WAVES_SPLIT / "c"
    for name in ("1 copy", "01", "notes.txt", "99999", "1.5", "²"):
        (chunks / name).write_bytes((chunks / "1").read_bytes())
    (chunks / "0").mkdir()
    (chunks / "0" / "1").write_bytes(b"")
    found = Store.open(out)
    assert found.splits().tolist() == [0, 2, *[0] * (len(found.splits()) - 2)]
    assert not ps.check(out).damages


def files(out: Path) -> dict[str, bytes]:
    found = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    return {key: path.read_bytes() for key, path in found.items()}


def test_a_status_that_does_not_fit(out: Path) -> None:
    """Bits that are as they were written, but do not agree."""
    store = Store.open(out, "r+")
    fill(store)
    block = blocks(GRID)[1]
    values, good = data(1)
    for cell, status in ((5, 0), (5, 4), (0, 1), (5, 200)):
        wrong = good.copy()
        wrong.ravel()[cell] = status
        store.write_block(block, {"logit_diff": values}, {"logit_diff": wrong})
        [damage] = ps.check(out).damages
        assert str(damage).startswith("head_z block 1: inconsistent (head_z/logit_diff_status/c/")
    withdraw(store)
    assert store.done("head_z").tolist() == [True, False]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Arms one write, counted from 0, to go wrong; below 0: none."""
    write = Folder.put
    armed, count = ("", -1), 0

    def arm(kind: str, at: int) -> None:
        nonlocal armed, count
        armed, count = (kind, at), 0

    def faulty(self: Folder, key: str, content: bytes) -> None:
        nonlocal count
        kind, at = armed
        count += 1
        if count - 1 != at:
            write(self, key, content)
        elif kind in ("ENOSPC", "EACCES"):
            raise OSError(getattr(errno, kind), "refused")
        elif kind != "lost":
            raw = bytearray(content)
            raw[-3] ^= kind == "flip"
            write(self, key, bytes(raw[: len(raw) // 2] if kind == "cut" else raw))

    monkeypatch.setattr(Folder, "put", faulty)
    yield arm
    arm("", -1)


@pytest.mark.parametrize("kind", ["ENOSPC", "EACCES", "lost", "cut", "flip"])
def test_a_fault_at_any_write_ends_in_an_error_or_a_redo(
    laid_out: Path, tmp_path: Path, fault: Callable[[str, int], None], kind: str
) -> None:
    whole = shutil.copytree(laid_out, tmp_path / "whole")
    fill(Store.open(whole, "r+"))
    for at in range(WRITES + 1):
        out = shutil.copytree(laid_out, tmp_path / str(at))
        store = Store.open(out, "r+")
        fault(kind, at)
        refused = False
        try:
            fill(store)
        except ps.BadInput as error:
            refused = True
            assert str(error).endswith("continue with --resume")
        assert refused == (kind in ("ENOSPC", "EACCES") and at < WRITES)
        fault("", -1)
        believe(out)
        silent = kind in ("lost", "cut", "flip") and at < WRITES
        record = at % OF_A_PAIR == OF_A_PAIR - 1  # of a block: one that is lost says nothing
        assert bool(ps.check(out).damages) == (silent and not (record and kind == "lost"))
        withdraw(store)
        fill(store)
        assert arrays(out) == arrays(whole)


def believe(out: Path) -> None:
    """What can be read of the blocks that are done is right."""
    store = Store.open(out)
    try:
        refuse_missing(store)
        done = store.done("head_z")
    except ps.BadInput:
        return
    for block in blocks(GRID):
        if done[block.index]:
            region = block.region(GRID)
            names = ("head_z/logit_diff", "head_z/logit_diff_status")
            for name, expected in zip(names, data(block.index), strict=True):
                try:
                    np.testing.assert_array_equal(store.read(name, region), expected)
                except ps.BadInput as error:
                    assert "patchsweep check" in str(error)


def test_a_sweep_does_again_what_is_damaged(tmp_path: Path) -> None:
    """And only that; what goes with what is said in `integrity`."""
    model = ps.wrap(build(), tokenizer())
    pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(3)]
    settings: dict[str, Any] = {
        "components": ["head_z", "mlp_out"],
        "metrics": ["logit_diff"],
        "token_budget": 60,
        "prefilter": {"keep": "20%", "audit": 2},
        "edges": "eap",
    }
    out = tmp_path / "r.zarr"
    ps.sweep(model, pairs, out=out, **settings)
    whole = arrays(out)
    assert ps.open(out).check().damages == ()
    for part, break_it in (
        ("head_z/logit_diff_status", flip),
        ("baseline/logit_diff_noise_floor", Path.unlink),
        ("head_z/logit_diff_estimate", cut),
        ("choice/mlp_out_stratum", flip),
        ("edges/logit_diff", Path.unlink),
        ("completion/estimates", cut),
    ):
        [file, *_] = sorted(f for f in (out / part / "c").rglob("*") if f.is_file())
        records = out.glob("completion/*_*/c/*")  # of blocks
        before = {record: record.stat().st_mtime_ns for record in records}
        break_it(file)
        ps.sweep(model, pairs, out=out, resume=True, **settings)
        assert arrays(out) == whole, part
        log = (job_folder(out) / "rank-0.log").read_text()
        assert f"({part}/c/" in log
        assert ps.check(out).damages == ()
        again = sum(record.stat().st_mtime_ns != at for record, at in before.items())
        assert (again == 0) == part.startswith("edges")
        assert (again == len(before)) == part.startswith("choice")
