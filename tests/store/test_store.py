"""The results folder: what is written comes back, and what is not ours or not whole is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from zarr.storage import ZipStore

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.sites import Block, Grid, blocks
from patchsweep.store import Damaged, Store, job_folder, locked, pack, put_back, remove
from patchsweep.store.manifest import MANIFEST, packed, unpacked

HEADS = Grid("head_z", ("denoise", "noise"), 3, 2, 3, (0, 1, 2, 3, 4), 2, 2, 2)
MLP = Grid("mlp_out", ("denoise", "noise"), 3, 2, 1, ("S2", "END"), 3, 1, 2)
PAIRS = [
    Pair((5, 6, 7, 8, 9), (5, 1, 7, 8, 9), (2,), (3, 4), {"S2": 1, "END": 4}, "ABBA"),
    Pair((5, 6, 7), (5, 1, 7), (2,), (3,), {"S2": 1, "END": 2}),
    Pair((5, 6, 7, 8), (5, 1, 7, 8), (2,), (3,), {"S2": 1, "END": 3}),
]
METRICS = ("logit_diff", "prob")


def make(path: Path, grids: tuple[Grid, ...] = (HEADS, MLP), fsync: bool = False) -> Store:
    attrs = {"spec": {"model": "tiny"}, "plan_hash": "abc", "token_budget": 64}
    texts = " t{}".format
    return Store.create(path, grids, METRICS, PAIRS, texts, attrs, "float32", fsync=fsync)


def numbered(block: Block, grid: Grid, dtype: Any = np.float32) -> np.ndarray:
    """Values of a block that name their own place in the grid."""
    return np.arange(np.prod(grid.shape)).reshape(grid.shape)[block.region(grid)].astype(dtype)


def write(store: Store, block: Block, grid: Grid) -> None:
    values = numbered(block, grid)
    status = np.ones(values.shape, np.uint8)
    store.write_block(
        block, {"logit_diff": values, "prob": -values}, dict.fromkeys(METRICS, status)
    )


def test_blocks_come_back_where_they_belong(tmp_path: Path) -> None:
    make(tmp_path / "r.zarr")
    store = Store.open(tmp_path / "r.zarr", "r+")
    assert store.grids == {"head_z": HEADS, "mlp_out": MLP}
    assert store.metrics == METRICS
    todo = blocks(HEADS)
    for block in todo[::2]:
        write(store, block, HEADS)
    again = Store.open(tmp_path / "r.zarr")
    assert again.done("head_z").tolist() == [i % 2 == 0 for i in range(len(todo))]
    assert not again.done("mlp_out").any()
    values, status = again.read("head_z/logit_diff"), again.read("head_z/logit_diff_status")
    for block in todo:
        part = values[block.region(HEADS)]
        if block.index % 2 == 0:
            np.testing.assert_array_equal(part, numbered(block, HEADS))
            assert (status[block.region(HEADS)] == 1).all()
        else:
            assert np.isnan(part).all()
            assert (status[block.region(HEADS)] == 0).all()


def test_a_chunk_is_a_block_and_kept_even_if_empty(tmp_path: Path) -> None:
    make(tmp_path / "r.zarr")
    store = Store.open(tmp_path / "r.zarr", "r+")
    block = blocks(HEADS)[3]
    shape = numbered(block, HEADS).shape
    nan, zero = np.full(shape, np.nan, np.float32), np.zeros(shape, np.uint8)
    store.write_block(block, dict.fromkeys(METRICS, nan), dict.fromkeys(METRICS, zero))
    for name in ("logit_diff", "prob", "logit_diff_status", "prob_status"):
        folder = tmp_path / "r.zarr" / "head_z" / name / "c"
        assert len([file for file in folder.rglob("*") if file.is_file()]) == 1
    assert len(list((tmp_path / "r.zarr" / "completion" / "head_z" / "c").iterdir())) == 1


def test_marks_from_many_threads_are_all_kept(tmp_path: Path) -> None:
    make(tmp_path / "r.zarr")
    todo = blocks(HEADS)

    def work(part: list[Block]) -> None:
        own = Store.open(tmp_path / "r.zarr", "r+")
        for block in part:
            write(own, block, HEADS)

    threads = [threading.Thread(target=work, args=(todo[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store.open(tmp_path / "r.zarr")
    assert store.done("head_z").all()
    expected = np.arange(np.prod(HEADS.shape)).reshape(HEADS.shape)
    np.testing.assert_array_equal(store.read("head_z/logit_diff"), expected)


def test_prompts_and_baseline(tmp_path: Path) -> None:
    store = make(tmp_path / "r.zarr")
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    store.write_baseline(
        0, 0, range(1, 3), dict.fromkeys(METRICS, values), dict.fromkeys(METRICS, values / 1e6)
    )
    baseline = xr.open_zarr(tmp_path / "r.zarr", group="baseline", consolidated=False)
    assert baseline.logit_diff.dims == ("run", "source", "sample", "pair")
    assert baseline.logit_diff.sel(run="corrupt", pair=2).values.item() == 4.0
    assert np.isnan(baseline.logit_diff.sel(pair=0)).all()
    assert baseline.prob_noise_floor.sel(run="clean", pair=1).values.item() == np.float32(1e-6)
    prompts = xr.open_zarr(tmp_path / "r.zarr", group="prompts", consolidated=False)
    assert prompts.corrupt_tokens[1].values.tolist() == [5, 1, 7, -1, -1]
    assert prompts.clean_text[2].values.tolist() == [" t5", " t6", " t7", " t8", ""]
    assert prompts.length.values.tolist() == [5, 3, 4]
    assert prompts.group.values.tolist() == ["ABBA", "", ""]
    assert prompts.attrs["labels"][1] == {"S2": 1, "END": 2}
    assert prompts.attrs["wrong"][0] == [3, 4]
    assert prompts.attrs["wrong_text"][0] == [" t3", " t4"]


def test_xarray_opens_the_folder_by_itself(tmp_path: Path) -> None:
    store = make(tmp_path / "r.zarr")
    for block in blocks(HEADS):
        write(store, block, HEADS)
    root = xr.open_zarr(tmp_path / "r.zarr", consolidated=False)
    assert root.attrs["spec"] == {"model": "tiny"}
    assert root.attrs["patchsweep_schema"] == 3
    ds = xr.open_zarr(tmp_path / "r.zarr", group="head_z", consolidated=False)
    assert ds.attrs == {"unit_name": "head"}
    picked = ds.logit_diff.sel(direction="noise", pair=2, layer=1, unit=0, position=4)
    assert picked.values.item() == np.ravel_multi_index((1, 0, 0, 2, 1, 0, 4), HEADS.shape)
    assert ds.logit_diff_status.dtype == np.uint8
    mlp = xr.open_zarr(tmp_path / "r.zarr", group="mlp_out", consolidated=False)
    assert mlp.position.values.tolist() == ["S2", "END"]


def test_attributes_can_be_added(tmp_path: Path) -> None:
    make(tmp_path / "r.zarr").set_attrs(measured={"seconds": 2.5})
    attrs = Store.open(tmp_path / "r.zarr").attrs
    assert attrs["measured"] == {"seconds": 2.5}
    assert attrs["token_budget"] == 64


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.0])
def test_a_damaged_chunk_is_noticed_and_can_be_written_again(tmp_path: Path, keep: float) -> None:
    store = make(tmp_path / "r.zarr")
    for block in blocks(HEADS):
        write(store, block, HEADS)
    for file in (tmp_path / "r.zarr" / "head_z" / "logit_diff" / "c").rglob("*"):
        if file.is_file():
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.write_bytes(raw[: int(len(raw) * keep)])
    for block in blocks(HEADS):
        with pytest.raises(BadInput, match=r"cannot read .*logit_diff.*patchsweep check") as info:
            store.read("head_z/logit_diff", block.region(HEADS))
        assert "\n" not in str(info.value)
    for block in blocks(HEADS):
        write(store, block, HEADS)
    assert store.read("head_z/logit_diff").max() == np.prod(HEADS.shape) - 1


def test_create_refuses_what_exists(tmp_path: Path) -> None:
    make(tmp_path / "r.zarr")
    with pytest.raises(BadInput, match=r"--resume .* --overwrite"):
        make(tmp_path / "r.zarr")
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match="exists already: choose another --out"):
        make(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "r.zarr"]


def test_open_refuses_what_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no results at"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BadInput, match="not a results folder"):
        Store.open(tmp_path / "mine")
    xr.Dataset({"x": ("a", [1])}).to_zarr(
        tmp_path / "foreign.zarr", zarr_format=3, consolidated=False
    )
    with pytest.raises(BadInput, match="not a results folder"):
        Store.open(tmp_path / "foreign.zarr")


@pytest.mark.parametrize(("schema", "mend"), [(4, "update it"), (1, "--overwrite")])
def test_open_refuses_another_schema(tmp_path: Path, schema: int, mend: str) -> None:
    make(tmp_path / "r.zarr")
    root, manifest = (tmp_path / "r.zarr" / name for name in ("zarr.json", MANIFEST))
    said = f'"patchsweep_schema": {schema}'.encode()
    of_another = root.read_bytes().replace(b'"patchsweep_schema": 3', said)
    root.write_bytes(of_another)
    manifest.write_bytes(packed({**unpacked(manifest.read_bytes()), "zarr.json": of_another}))
    with pytest.raises(BadInput, match=f"schema {schema}, this patchsweep reads 3: .*{mend}"):
        Store.open(tmp_path / "r.zarr")


def test_a_half_created_folder_is_no_results(tmp_path: Path) -> None:
    """All of a folder but the last steps of creating it, the manifest and the root attributes."""
    make(tmp_path / "r.zarr")
    (tmp_path / "r.zarr" / "manifest" / "zarr.json").unlink()
    file = tmp_path / "r.zarr" / "zarr.json"
    meta = json.loads(file.read_text())
    meta["attributes"] = {}
    file.write_text(json.dumps(meta))
    with pytest.raises(BadInput, match="not a results folder"):
        Store.open(tmp_path / "r.zarr")
    with pytest.raises(BadInput, match="not a results folder"):
        remove(tmp_path / "r.zarr")
    assert file.exists()


def test_a_failure_while_creating_leaves_nothing(tmp_path: Path) -> None:
    def fails(token: int) -> str:
        raise RuntimeError(f"no text for {token}")

    with pytest.raises(RuntimeError, match="no text"):
        Store.create(tmp_path / "r.zarr", [HEADS], METRICS, PAIRS, fails, {}, "float32")
    assert list(tmp_path.iterdir()) == []


def test_remove_deletes_only_results(tmp_path: Path) -> None:
    make(tmp_path / "r.zarr")
    remove(tmp_path / "r.zarr")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(BadInput, match="not a results folder"):
        remove(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for path in (tmp_path / "file" / "r.zarr", tmp_path / "file" / "deep" / "r.zarr"):
        with pytest.raises(BadInput, match=r"cannot write .*r\.zarr: part of the path is a file"):
            make(path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        store = make(disk / "r.zarr")
        first, second = blocks(HEADS)[:2]
        write(store, first, HEADS)
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(b"x" * 4096)
        with pytest.raises(BadInput, match="no space left on the device; free space and continue"):
            write(store, second, HEADS)
        assert store.done("head_z")[:2].tolist() == [True, False]
        with pytest.raises(BadInput, match="no space left on the device; free space and run"):
            make(disk / "other.zarr")
        (disk / "filler").unlink()
        write(store, second, HEADS)
        assert store.done("head_z")[:2].tolist() == [True, True]
        assert [path.name for path in disk.iterdir()] == ["r.zarr"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("error", ["EIO", "EFBIG", "ESTALE"])
def test_any_refusal_of_the_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    store, number = make(tmp_path / "r.zarr"), getattr(errno, error)

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BadInput, match=r"^cannot write [^\n]*; [^\n]* continue with --resume$"):
        write(store, blocks(HEADS)[0], HEADS)
    assert not store.done("head_z").any()
    monkeypatch.undo()

    def refused(larger: Store) -> None:
        monkeypatch.setattr(os, "replace", refuse)
        write(larger, blocks(HEADS)[0], HEADS)

    with pytest.raises(BadInput, match=r" run again$"):  # nothing has begun yet
        Store.create(store.path, [HEADS], METRICS, PAIRS, str, {}, "float32", fill=refused)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    for length in (250, 300):  # the first one is too long only for what lies beside it
        with pytest.raises(BadInput, match="the name is too long"):
            put_back(tmp_path / ("n" * length))


def test_moved_while_it_is_written(tmp_path: Path) -> None:
    """What Zarr would write then are parts of results at the old place."""
    store = make(tmp_path / "r.zarr")
    first, second = blocks(HEADS)[:2]
    write(store, first, HEADS)
    (tmp_path / "r.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(BadInput, match=r"r\.zarr was moved or deleted while it was written"):
        write(store, second, HEADS)
    with pytest.raises(BadInput, match="was moved or deleted"):
        store.set_attrs(measured={})
    assert [path.name for path in tmp_path.iterdir()] == ["moved.zarr"]
    moved = Store.open(tmp_path / "moved.zarr", "r+")
    write(moved, second, HEADS)
    assert moved.done("head_z")[:2].all()


def test_what_killed_processes_left_goes_away(tmp_path: Path) -> None:
    """Killed while laying out, and while deleting."""
    script = """
import os, sys
from pathlib import Path
from patchsweep.store import folder, remove
import test_store
def die(*args, **kwargs): os._exit(9)
if sys.argv[2] == "create":
    Path.rename = die
test_store.make(Path(sys.argv[1]))
folder._cleared = die
remove(Path(sys.argv[1]))
"""
    out = tmp_path / "r.zarr"
    for what in ("create", "remove"):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        }
        command = [sys.executable, "-c", script, str(out), what]
        assert subprocess.run(command, check=False, env=env).returncode == 9
    assert [path.name.startswith(".r.zarr.") for path in tmp_path.iterdir()] == [True, True]
    other = tmp_path / ".r.zarr.mine.partial"
    other.mkdir()
    with locked(out):
        assert {*tmp_path.iterdir()} == {other, job_folder(out)}
        make(out)
        used = tmp_path / ".r.zarr.0123456789ab.partial"
        used.mkdir()
        with pytest.raises(BadInput, match="being written by another run"), locked(out):
            pass
        assert {*tmp_path.iterdir()} == {out, other, used, job_folder(out)}


@pytest.mark.parametrize("fsync", [False, True])
def test_data_reach_the_disk_before_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    """What a power cut may lose is what has not been synced: never data, once their record is."""
    seen: list[str] = []
    sync, rename = os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        assert path.exists()
        seen.append(f"sync {path.relative_to(tmp_path)}")
        sync(descriptor)

    def replacing(self: Path, target: Path) -> Path:
        seen.append(f"write {target.relative_to(tmp_path)}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)  # zarr's way to make a chunk appear
    store = make(tmp_path / "r.zarr", fsync=fsync)
    laid_out = [line for line in seen if line.startswith("sync")]
    assert bool(laid_out) == fsync
    assert not fsync or laid_out[-1] == "sync ."
    seen.clear()
    block = blocks(HEADS)[0]
    write(store, block, HEADS)
    record = "r.zarr/completion/head_z/c/0"
    at = seen.index(f"write {record}")
    names = [f"{metric}{kind}" for metric in METRICS for kind in ("", "_status")]
    files = [f"r.zarr/{store.keys(f'head_z/{name}', block.region(HEADS))[0]}" for name in names]
    assert {f"write {file}" for file in files} == {s for s in seen[:at] if s.startswith("write")}
    if not fsync:
        assert seen[at:] == [f"write {record}"]
        return
    folders = {str(f) for file in files for f in Path(file).parents if f != Path()}
    before = [s.removeprefix("sync ") for s in seen[:at] if s.startswith("sync")]
    assert set(before) == {*files, *folders}
    after = {s.removeprefix("sync ") for s in seen[at + 1 :]}
    assert {record, str(Path(record).parent)} <= after


def test_a_zip_file_of_results(tmp_path: Path) -> None:
    store = make(tmp_path / "r.zarr")
    for block in blocks(HEADS):
        write(store, block, HEADS)
    (tmp_path / "r.zarr" / "head_z" / "prob" / "0.abc.partial").touch()  # left by a kill
    pack(tmp_path / "r.zarr", tmp_path / "r.zip")
    packed = Store.open(tmp_path / "r.zip")
    assert packed.grids == store.grids
    assert packed.done("head_z").all()
    for name in store.arrays():
        np.testing.assert_array_equal(packed.read(name), store.read(name))
    ds = xr.open_zarr(ZipStore(tmp_path / "r.zip", mode="r"), group="head_z", consolidated=False)
    assert ds.logit_diff.max() == np.prod(HEADS.shape) - 1
    assert not any("partial" in name for name in zipfile.ZipFile(tmp_path / "r.zip").namelist())
    raw = bytearray((tmp_path / "r.zip").read_bytes())
    raw[raw.index(b"head_z/prob/c/0") + 80] ^= 1  # within the chunk
    (tmp_path / "r2.zip").write_bytes(raw)
    with pytest.raises(Damaged, match=r"^cannot read [^\n]*r2\.zip/head_z/prob/c/[^\n]*$"):
        Store.open(tmp_path / "r2.zip").read("head_z/prob")
    with pytest.raises(BadInput, match="zip file, only to be read: unpack it"):
        Store.open(tmp_path / "r.zip", "r+")
    with pytest.raises(BadInput, match=r"cannot write .*: "):
        pack(tmp_path / "r.zarr", tmp_path / "r.zip" / "deep.zip")
    (tmp_path / "other.zip").write_bytes(b"PK")
    with pytest.raises(BadInput, match="not a results folder"):
        Store.open(tmp_path / "other.zip")
