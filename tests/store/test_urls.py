"""Results at a URL are those of a folder, and end as well when something goes wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import xarray as xr
from obstore.exceptions import GenericError, PermissionDeniedError
from test_integrity import GRID, OF_A_PAIR, PAIRS, WRITES, fill
from torch.distributed import HashStore  # type: ignore[attr-defined]

import patchsweep as ps
from patchsweep.cli import _status
from patchsweep.engine.loop import carry_out
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.processes.distributed import Processes
from patchsweep.spec import parse_settings, parse_spec
from patchsweep.store import Store, job_folder, locked, remove
from patchsweep.store.bucket import Bucket, _objects
from patchsweep.store.integrity import withdraw
from started import TORCHRUN, launch, said
from tiny import build, rows, save, tokenizer, write_pairs, write_spec

SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out"],
    "metrics": ["logit_diff", "kl"],
    "token_budget": 200,
}


@dataclass(frozen=True)
class Whole:
    """A sweep into a folder, and what to make it of again."""

    model: Model
    pairs: list[Pair]
    out: Path

    def sweep(self, out: str | Path, **how: bool) -> ps.Results:
        return ps.sweep(self.model, self.pairs, out=out, **SETTINGS, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    model = ps.wrap(build(), tokenizer())
    pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(2)]
    made = Whole(model, pairs, tmp_path_factory.mktemp("whole") / "r.zarr")
    made.sweep(made.out)
    return made


@dataclass(frozen=True)
class Objects:
    """What lies at a URL, looked at and spoilt without patchsweep."""

    url: str
    folder: Path | None = None

    @property
    def store(self) -> Any:
        return (
            obstore.store.LocalStore(self.folder, mkdir=True) if self.folder else _objects(self.url)
        )

    def __call__(self) -> dict[str, bytes]:
        if self.folder:
            return in_folder(self.folder)
        found = [m["path"] for some in obstore.list(self.store) for m in some]
        return {key: bytes(obstore.get(self.store, key).bytes()) for key in found}

    def put(self, key: str, content: bytes) -> None:
        obstore.put(self.store, key, content)

    def delete(self, key: str) -> None:
        obstore.delete(self.store, key)


@pytest.fixture(params=["memory", "file"])
def at(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """A new URL; the working folder is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if request.param == "memory":
        return Objects(f"memory://{tmp_path.name}/r.zarr")
    folder = tmp_path / "a b" / "r.zarr"  # the URL says %20
    return Objects(folder.as_uri(), folder)


def chunks(found: dict[str, bytes]) -> dict[str, bytes]:
    return {key: content for key, content in found.items() if "/c" in key}


def in_folder(out: Path) -> dict[str, bytes]:
    files = [p for p in out.rglob("*") if p.is_file()]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def test_the_same_files_as_in_a_folder(whole: Whole, at: Objects, tmp_path: Path) -> None:
    results = whole.sweep(at.url)
    assert results.path == at.url
    found, expected = at(), in_folder(whole.out)
    assert found.keys() == expected.keys()
    assert len(chunks(expected)) > 20
    assert chunks(found) == chunks(expected)
    again, before = ps.open(at.url), ps.open(whole.out)
    assert again.attrs["joint"] == before.attrs["joint"]
    xr.testing.assert_identical(again.to_xarray("head_z"), before.to_xarray("head_z"))
    assert again.to_frame().equals(before.to_frame())
    assert str(again.check()) == f"{at.url}: nothing is damaged, 4 of 4 blocks are done"
    # Logs are here, the lock has gone.
    assert {p.name for p in Path.cwd().iterdir()} == {".r.zarr.job"}
    assert {p.name for p in job_folder(at.url).iterdir()} == {"progress.json", "rank-0.log"}
    if at.folder:
        assert {p.name for p in at.folder.parent.rglob("*") if p.is_file()} == {
            Path(key).name for key in expected
        }
        assert {p.name for p in at.folder.parent.iterdir()} == {"r.zarr", ".r.zarr.job"}
        assert {p.name for p in tmp_path.iterdir()} == {"here", "a b"}


def test_earlier_results(whole: Whole, at: Objects) -> None:
    whole.sweep(at.url)
    before = at()
    with locked(at.url), pytest.raises(ps.BadInput, match="is being written by another run"):
        whole.sweep(at.url, overwrite=True)
    with pytest.raises(ps.BadInput, match=r"exists already: use --resume .* or --overwrite"):
        whole.sweep(at.url)
    assert at() == before
    at.delete("completion/head_z/c/1")
    at.delete("head_z/kl/c/0/0/0/1/0/0/0")
    whole.sweep(at.url, resume=True)
    assert chunks(at()) == chunks(before)
    at.put("completion/head_z/c/99", b"of results with more blocks")
    whole.sweep(at.url, overwrite=True)
    assert chunks(at()) == chunks(before)


Arm = Callable[[int, BaseException | None], None]


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Arm, list[str]]]:
    """`arm(n, error)`: PUTs after the first n raise; and the keys of those that did not."""
    put, seen = Bucket.put, list[str]()
    most, error = 0, None

    def arm(n: int, raised: BaseException | None) -> None:
        nonlocal most, error
        seen.clear()
        most, error = n, raised

    def faulty(self: Bucket, key: str, content: bytes) -> None:
        if error is not None and len(seen) >= most:
            raise error
        seen.append(key)
        put(self, key, content)

    monkeypatch.setattr(Bucket, "put", faulty)
    yield arm, seen


@pytest.fixture(scope="module")
def filled() -> dict[str, bytes]:
    """The chunks of a store with all that `fill` writes."""
    store = Objects("memory://filled")
    fill(make(store.url))
    return chunks(store())


def make(url: str) -> Store:
    attrs = {"spec": {}, "sources": [{"normalised": True}]}
    return Store.create(url, [GRID], ["logit_diff"], PAIRS, str, attrs, "float32")


def test_a_refused_put_while_laying_out(at: Objects, puts: tuple[Arm, list[str]]) -> None:
    arm, seen = puts
    make(at.url)
    order = list(seen)
    assert order[-1] == "zarr.json"  # the mark is the last
    assert len(order) == len(set(order)) > 40
    for n in (0, 1, len(order) // 2, len(order) - 1):
        remove(at.url) if at() else None
        arm(n, PermissionDeniedError("403 Forbidden\n\nDebug source: ..."))
        with pytest.raises(ps.BadInput) as refused:
            make(at.url)
        mend = "check the URL and the credentials, and run again"
        assert str(refused.value) == f"cannot write {at.url}: 403 Forbidden; {mend}"
        assert at() == {}
    arm(0, None)
    make(at.url)
    assert not ps.check(at.url).damages


def test_a_refused_put_of_data(
    at: Objects, filled: dict[str, bytes], puts: tuple[Arm, list[str]]
) -> None:
    """A chunk is there before its record is, wherever it stops; what is missing is done again."""
    arm, seen = puts
    for n in range(WRITES):
        store = make(at.url)
        arm(n, GenericError("Generic S3 error: 503"))
        with pytest.raises(ps.BadInput, match=r"503; .* and continue with --resume"):
            fill(store)
        assert len(seen) == n
        arm(0, None)
        assert chunks(at()).items() <= filled.items()
        assert not ps.check(at.url).damages
        store = Store.open(at.url, "r+")
        assert store.done("head_z").sum() == n // OF_A_PAIR
        assert withdraw(store) == []
        fill(store)
        assert chunks(at()) == filled
        remove(at.url)


@pytest.mark.parametrize("what", ["laid out", "deleted"])
def test_half_of_it_is_nothing(
    at: Objects, puts: tuple[Arm, list[str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As a kill leaves it: nobody tidies up."""
    arm, _ = puts
    if what == "deleted":
        fill(make(at.url))
    with monkeypatch.context() as patch:
        patch.setattr(obstore, "delete", killed)
        arm(20, GenericError("killed"))
        with pytest.raises(ps.BadInput, match="killed"):
            remove(at.url) if what == "deleted" else make(at.url)
        arm(0, None)
    assert len(at()) >= 20
    for use in (ps.open, ps.check, remove):
        with pytest.raises(ps.BadInput, match="no results at"):
            use(at.url)
    make(at.url)
    assert Store.open(at.url).done("head_z").sum() == 0
    assert not ps.check(at.url).damages


def killed(*_: Any) -> None:
    raise GenericError("killed")


def test_damage_is_named_and_done_again(at: Objects, filled: dict[str, bytes]) -> None:
    store = make(at.url)
    fill(store)
    [first, second] = sorted(key for key in filled if key.startswith("head_z/logit_diff/c/"))
    at.put(first, filled[first][:-3])
    at.delete(second)
    with pytest.raises(ps.BadInput, match=f"missing.*patchsweep check {at.url}"):
        ps.open(at.url)
    found = {(damage.key, damage.why) for damage in ps.check(at.url).damages}
    assert found == {(first, "truncated"), (second, "missing")}
    assert len(withdraw(store)) == 2
    assert store.done("head_z").sum() == 0
    assert first not in at()
    fill(store)
    assert chunks(at()) == filled


def test_what_cannot_be_reached_is_not_damaged(
    at: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(at.url)
    fill(store)
    before = at()
    get = obstore.get
    reads, most = 0, 0

    def unreachable(objects: Any, key: str) -> Any:
        nonlocal reads
        reads += "/c/" in key
        if reads > most:
            raise GenericError("Generic S3 error: 503")
        return get(objects, key)

    monkeypatch.setattr(obstore, "get", unreachable)
    for limit in (0, 5, 10):
        most = limit
        for use in (lambda: ps.check(at.url), lambda: withdraw(store)):
            reads = 0
            with pytest.raises(ps.BadInput, match=r"^cannot read .*: Generic S3 error: 503; check"):
                use()
    monkeypatch.undo()
    assert at() == before


@pytest.mark.parametrize("foreign", ["notes.txt", "zarr.json"])
def test_what_is_not_ours_is_left_alone(at: Objects, foreign: str) -> None:
    at.put(foreign, b"{}")
    with pytest.raises(ps.BadInput, match="exists already: choose another --out"):
        make(at.url)
    for use in (ps.open, ps.check, remove):
        with pytest.raises(ps.BadInput, match="is not a results folder"):
            use(at.url)
    assert at() == {foreign: b"{}"}


def test_one_job_at_a_time(at: Objects) -> None:
    with locked(at.url), pytest.raises(ps.BadInput, match="written by another"), locked(at.url):
        pass
    with locked(at.url):
        pass
    left = [locked(at.url), locked(at.url)]
    left[0].__enter__()  # and killed
    with locked(at.url, again=True):  # by the launcher that is above both
        pass
    left[1].__enter__()
    with pytest.raises(ps.BadInput, match="is being written by another run") as refused:
        locked(at.url).__enter__()
    line = str(refused.value)
    assert f"(process {os.getpid()} on {socket.gethostname()} since 20" in line
    [url] = re.findall(r"if it was killed, delete the object (.+)$", line)
    folder, _, name = url.rpartition("/")
    obstore.delete(_objects(folder), name)
    with locked(at.url):
        pass


def test_a_folder_by_its_path_and_by_its_url(tmp_path: Path, monkeypatch: Any) -> None:
    """Each way has a lock of its own, and refuses what the other one has locked."""
    monkeypatch.chdir(tmp_path)
    out, url = tmp_path / "r.zarr", (tmp_path / "r.zarr").as_uri()
    with locked(url):
        out.mkdir()
        with pytest.raises(ps.BadInput, match=f"by a run that was given {url}"), locked(out):
            pass
    with locked(out), pytest.raises(ps.BadInput, match="was written by its path"), locked(url):
        pass
    with pytest.raises(ps.BadInput, match="was written by its path: give that"), locked(url):
        pass


def test_a_log_that_cannot_be_written(whole: Whole, at: Objects) -> None:
    (job_folder(at.url) / "rank-0.log").mkdir(parents=True)
    with pytest.raises(ps.BadInput, match=r"^cannot write [^\n]*job: is a directory; [^\n]*$"):
        whole.sweep(at.url)
    assert at() == {}


def test_each_process_has_a_memory_of_its_own(whole: Whole) -> None:
    two, settings = Processes(0, 2, 0, HashStore()), parse_settings(SETTINGS)
    out = "memory://shared/r.zarr"
    with pytest.raises(ps.BadInput, match="each of 2 processes has a memory of its own"):
        carry_out(
            whole.model, whole.pairs, settings, out, resume=False, overwrite=False, processes=two
        )


def test_a_launcher_takes_over_from_its_own_processes_only(at: Objects) -> None:
    left = locked(at.url)
    left.__enter__()
    job = _objects(at.url.replace("r.zarr", ".r.zarr.job"))
    held = json.loads(bytes(obstore.get(job, "lock").bytes()))
    for part, other in (("host", "another"), ("launcher", os.getppid() + 1)):
        obstore.put(job, "lock", json.dumps(held | {part: other}).encode())
        with pytest.raises(ps.BadInput, match="written by another"), locked(at.url, again=True):
            pass


def test_a_place_that_cannot_be_written(whole: Whole, tmp_path: Path) -> None:
    (tmp_path / ".r.zarr.job").touch()  # where the lock has to be
    url = (tmp_path / "r.zarr").as_uri()
    with pytest.raises(ps.BadInput, match=rf"^cannot write {url}: [^\n]*File exists[^\n]*$"):
        whole.sweep(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/r.zarr", "unknown kind of URL: use one of s3://, gs://"),
        ("file://results/r.zarr", "write file:///absolute/path"),
        ("s3://bucket", "names no results: write e.g. s3://bucket/ioi.zarr"),
        ("memory://", "names no results"),
        ("s3://bucket/../r.zarr", "names no results"),
        ("memory://nothing", "no results at memory://nothing: check the path"),
    ],
)
def test_wrong_urls(whole: Whole, url: str, words: str) -> None:
    with pytest.raises(ps.BadInput, match=words):
        ps.open(url)
    if "no results at" not in words:
        with pytest.raises(ps.BadInput, match=words):
            whole.sweep(url)
        with pytest.raises(ps.BadInput, match=f"^spec: out: .*{words}"):
            parse_spec(
                {"model": "m", "prompts": {"file": "p"}, "components": ["head_z"], "out": url}
            )


def test_a_url_that_became_a_path(whole: Whole) -> None:
    for use in (ps.open, whole.sweep):
        with pytest.raises(ps.BadInput, match=r"s3:/bucket/r\.zarr was a URL: give it as text"):
            use(Path("s3://bucket/r.zarr"))


def test_without_obstore(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("obstore")]:
        monkeypatch.setitem(sys.modules, name, None)
    for use in (ps.open, ps.check, whole.sweep):
        with pytest.raises(ps.BadInput, match=r"need the package obstore: pip install 'patchsweep"):
            use("memory://nothing")


def test_every_command_takes_a_url(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = (tmp_path / "far" / "ioi.zarr").as_uri()
    write_pairs(tmp_path / "pairs.jsonl", rows(2))
    spec = write_spec(tmp_path, save(tmp_path / "model"), **SETTINGS, out=url, direction="denoise")
    for command in (
        ["run", str(spec)],
        ["run", str(spec), "--out", url, "--resume"],
        ["check", url],
        ["show", url],
        ["plot", url],
        ["verify", url, "--cells", "2", "--trust"],
        ["export", url, "t.parquet"],
        ["export", url, "t.zip"],
        ["show", "t.zip"],
    ):
        assert _status(command) == 0, capfd.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {
        "far", "pairs.jsonl", "spec.yaml", "model", ".ioi.zarr.job", "ioi-figures",
        "t.parquet", "t.zip",
    }  # fmt: skip
    assert chunks(in_folder(tmp_path / "far" / "ioi.zarr")) == chunks(in_folder(whole.out))
    packed = zipfile.ZipFile("t.zip")
    assert {n: packed.read(n) for n in packed.namelist()} == in_folder(tmp_path / "far/ioi.zarr")
    assert ps.open(url).attrs["spec"] == {**ps.open("t.zip").attrs["spec"]}
    again = ps.open("t.zip").effect("head_z", "kl", "denoise")
    np.testing.assert_array_equal(again, ps.open(url).effect("head_z", "kl", "denoise"))
    assert _status(["check", "s4://x/y"]) == 2
    assert "unknown kind of URL" in capfd.readouterr().err


@pytest.mark.multiproc
def test_many_processes(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", rows(2))
    model = save(tmp_path / "model")
    spec = write_spec(tmp_path, model, **SETTINGS, out=None, direction="denoise")
    process = launch(TORCHRUN, 2, spec, "--out", (tmp_path / "r.zarr").as_uri())
    assert said(process) == []
    assert process.returncode == 0
    assert chunks(in_folder(tmp_path / "r.zarr")) == chunks(in_folder(whole.out))
    logs = {"progress.json", "rank-0.log", "rank-1.log"}
    assert {p.name for p in (tmp_path / ".r.zarr.job").iterdir()} == logs
