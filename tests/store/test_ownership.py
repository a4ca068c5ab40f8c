"""Only what is of the results is ever deleted, moved or replaced, whatever else is in there.

The judge knows by himself what may be touched: names of a sweep's arrays and chunks, hidden names
that nobody would choose, and the files of a job.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from rich.console import Console
from test_urls import make

import patchsweep as ps
from made_tokenizers import byte_level
from patchsweep import demo
from patchsweep.cli import _status
from patchsweep.reproduce import reproduce
from patchsweep.store import Store, job_folder, locked, pack, remove
from patchsweep.store.bucket import _objects
from patchsweep.store.folder import Folder
from recorded import Event, recorded, tree
from tiny import arrays, build, rows, save, tokenizer, write_pairs, write_spec

# Names below the results of the sweeps here: groups, arrays, chunks.
GROUP = r"(head_z|mlp_out|sets|baseline|prompts|completion|choice|edges|manifest|summary|records)"
ARRAY = (
    r"((logit_diff(_sum)?|kl|prob)(_status|_estimate|_noise_floor)?|direction|source|sample|pair|layer|unit"
    r"|position|run|second|baseline|estimates|(clean|corrupt)_(tokens|text)|length|align|group|head_z|mlp_out|sets|choice"
    r"|token|label|n_pairs|waves_split|(estimates|edges)(_split)?|site_\w+|sender|receiver|(head_z|mlp_out)_(status|stratum))"
)
HALF = r"(\.[0-9a-f]{32}\.partial)?"
OURS = re.compile(
    rf"(README(\.txt|{HALF})|zarr(\.json|{HALF})|{GROUP}(/zarr(\.json|{HALF}))?"
    rf"|{GROUP}/{ARRAY}(/(zarr(\.json|{HALF})|c(/\d+)*{HALF}))?)?"
)
HIDDEN = r"\.{name}\.[0-9a-f]{{12}}\.(partial|replaced)"
JOB = re.compile(r"(lock|progress\.(json|tmp)|rank-\d+\.log)?")
SMALL: dict[str, Any] = {"components": ["head_z", "mlp_out"], "metrics": ["logit_diff", "kl"]}


def may_touch(path: Path, out: Path) -> bool:
    """Whether a path is of the results in `out`, of their hidden doubles, or of their jobs."""
    for above in (path, *path.parents):
        rest = path.relative_to(above).as_posix().removeprefix(".")
        if above == out or (
            above.parent == out.parent
            and re.fullmatch(HIDDEN.format(name=re.escape(out.name)), above.name)
        ):
            return OURS.fullmatch(rest) is not None
        if above == out.with_name(f".{out.name}.job"):
            return JOB.fullmatch(rest) is not None
    return False


def check(record: list[Event], folder: Path, out: Path, *others: Path) -> None:
    """Nothing in `folder` was touched but results and jobs, and these other files."""
    assert record
    for what, path in record:
        if not path.is_relative_to(folder) or path in others:
            continue
        known = any(
            path.parent == other.parent
            and re.fullmatch(rf"\.{re.escape(other.name)}\.[0-9a-f]{{12}}\.partial", path.name)
            for other in others
        )
        assert known or may_touch(path, out), f"{what} {path}"


def bystanders(out: Path) -> list[Path]:
    """Files that a user may keep in and beside the results."""
    names = [
        out / "notes" / "mine.txt",
        out / "mlp_out" / "note.txt",
        out / "mlp_out" / "kl" / "c" / "note.txt",
        out / "x.partial",
        out / "mine" / "zarr.json",
        out / "nested.zarr" / "zarr.json",
        out / "nested.zarr" / "head_z" / "kl" / "c" / "0",
        *beside(out),
    ]
    return [write(name) for name in names]


def beside(out: Path) -> list[Path]:
    name = out.name
    return [
        out.with_name(f".{name}.replaced") / "mine.txt",
        out.with_name(f".{name}.mine.partial") / "mine.txt",
        out.with_name(f".{name}.0123456789ab.partial") / "mine.txt",
        out.with_name(f".{name}.0123456789ac.partial"),
        out.with_name(f".{name}.0123456789ad.replaced") / "mine.txt",
        out.with_name(f".{name}.job") / "mine.txt",
        out.with_name(".t.parquet.partial"),
        out.with_name(".t.zip.partial"),
    ]


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), build(2))


@pytest.fixture
def spec(model: Path, tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", rows(4))
    return write_spec(tmp_path, model, **SMALL, token_budget=100, direction="denoise")


Run = Callable[..., int]


@pytest.fixture
def run(spec: Path) -> Run:
    return lambda *more: _status(["run", str(spec), *map(str, more)])


FEW = ("--set", "prompts.n=2")


@pytest.mark.parametrize("more", [["--append"], ["--overwrite"], ["--append", *FEW]], ids=str)
def test_what_else_is_inside_is_refused(
    run: Run, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.zarr"
    assert run(*FEW) == 0
    for theirs in [
        out / "notes" / "mine.txt",
        out / "mlp_out" / "note.txt",
        out / "nested.zarr" / "zarr.json",
        out / "mine" / "zarr.json",
        out / "head_z" / "kl" / "c" / "0" / "x",
    ]:
        before, made = arrays(out), [p for p in theirs.parents if not p.exists()]
        write(theirs)
        capsys.readouterr()
        with recorded() as record:
            assert run(*more) == 2
        assert not [e for e in record if e[0] != "written" and e[1].is_relative_to(out)]
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"holds what is not of the results, e.g. {theirs.relative_to(out)}" in line
        assert theirs.exists()
        theirs.unlink()
        for folder in made:
            folder.rmdir()
        assert arrays(out) == before
    for nothing in ("empty", "mlp_out/empty"):
        (out / nothing).mkdir()
        assert run(*more) == 2
        (out / nothing).rmdir()
    (out / "link").symlink_to(tmp_path / "pairs.jsonl")
    assert run(*more) == 2
    (out / "link").unlink()
    assert run(*more) == 0


def test_every_command(run: Run, spec: Path, model: Path, tmp_path: Path) -> None:
    """With a user's files everywhere: none is touched, nothing is taken for damage."""
    out, table, packed = (tmp_path / name for name in ("r.zarr", "t.parquet", "t.zip"))
    theirs = beside(out)
    for path in theirs:
        write(path)
    figures = tmp_path / "r-figures"
    kept = write(figures / "mine.png")
    calls: list[tuple[Callable[[], int], int]] = [
        (lambda: run(*FEW), 0),
        (lambda: run("--append"), 0),
        (lambda: run("--overwrite"), 0),
    ]
    commands = [
        ["check", out],
        ["show", out],
        ["plan", spec],
        ["plot", out],
        ["plot", out],
        ["export", out, table],
        ["export", out, packed, "--overwrite"],
        ["export", out, table, "--overwrite"],
        ["verify", out, "--cells", "2", "--model", model],
    ]
    calls += [(lambda c=c: _status([*map(str, c)]), 0) for c in commands]
    calls += [(lambda: run("--resume"), 0)]
    known = {str(path): path.read_bytes() for path in (*theirs, kept)}
    for number, (call, status) in enumerate(calls):
        if number == 3:  # from here on inside, too
            known |= {str(path): path.read_bytes() for path in bystanders(out)}
        before = tree(tmp_path)
        with recorded() as record:
            assert call() == status, number
        drawn = {path for _, path in record if path.parent == figures}
        assert kept not in drawn
        if record:
            check(record, tmp_path, out, table, packed, *drawn)
        after = tree(tmp_path)
        for name, (inode, time, content) in before.items():
            if str(tmp_path / name) in known:
                assert after[name] == (inode, time, content), name
    (out / "head_z" / "kl" / "c").rename(tmp_path / "elsewhere")  # damage
    with recorded() as record:
        assert run("--resume") == 0
    check(record, tmp_path, out)
    assert {str(p): p.read_bytes() for p in map(Path, known)} == known
    assert run("--overwrite") == 2
    for path in bystanders(out):
        if path.is_relative_to(out):
            path.unlink()
    for folder in ("notes", "mine", "nested.zarr"):
        shutil.rmtree(out / folder)
    assert run("--overwrite") == 0


def test_a_refused_sweep_leaves_the_job_folder_of_others(run: Run, tmp_path: Path) -> None:
    mine = write(job_folder(tmp_path / "r.zarr") / "mine.txt")
    assert run("--set", "positions=[S9]") == 2
    with locked(tmp_path / "r.zarr"):
        pass
    assert [*mine.parent.iterdir()] == [mine]


def test_demo_and_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = byte_level()
    tiny = ps.wrap(build(2, vocab=len(words)), words, "tiny")
    for module in ("patchsweep.demo", "patchsweep.reproduce"):
        monkeypatch.setattr(f"{module}.load_model", lambda *_: tiny)
    monkeypatch.setattr(demo, "PAIRS", 2)
    monkeypatch.setattr(demo, "METRICS", ("logit_diff", "kl"))
    monkeypatch.setattr(demo, "COMPONENTS", ("head_z", "mlp_out"))
    out = tmp_path / "demo"
    for path in beside(out / "ioi.zarr"):
        write(path)
    kept = write(out / "ioi-figures" / "mine.txt")
    for again in (False, True):
        before = tree(tmp_path)
        with recorded() as record:
            demo.demo(out, Console(quiet=True))
        for task in ("ioi", "facts"):
            figures = {p for _, p in record if p.parent == out / f"{task}-figures"} - {kept}
            part = [e for e in record if task in str(e[1])]
            check(part, tmp_path, out / f"{task}.zarr", *figures)
        after = tree(tmp_path)
        for path in (kept, *beside(out / "ioi.zarr")):
            name = path.relative_to(tmp_path).as_posix()
            assert before[name] == after[name]
        assert again or (out / "ioi-figures" / "report.html").exists()
    write(out / "ioi.zarr" / "notes.txt")
    with pytest.raises(ps.BadInput, match=r"not of the results, e.g. notes"):
        demo.demo(out, Console(quiet=True))

    folder = tmp_path / "reproduced"
    kept = write(folder / "notes.txt")
    for overwrite in (False, True):
        before = tree(folder)
        with recorded() as record:
            reproduce("greater-than", "tiny", folder, 2, overwrite=overwrite)
        results = {
            folder / found[1]
            for _, path in record
            if (found := re.search(r"/\.?(\w+\.zarr)[./]", str(path)))
        }
        assert {p for p in folder.iterdir() if p.suffix == ".zarr"} <= results
        for what, path in record:
            if path.is_relative_to(folder) and not any(may_touch(path, r) for r in results):
                assert path.parent == folder, f"{what} {path}"
                assert path.suffix in (".png", ".svg", ".csv", ".md")
        assert tree(folder)["notes.txt"] == before["notes.txt"]
    (folder / "report.md").write_text("# My thesis\n")
    with pytest.raises(ps.BadInput, match=r"report\.md exists and was not made by patchsweep"):
        reproduce("greater-than", "tiny", folder, 2)
    assert (folder / "report.md").read_text() == "# My thesis\n"


def test_nothing_goes_inside_results(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.zarr"
    assert run(*FEW) == 0
    before = tree(out)
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    off = ["--set", "device=balanced", "--set", f"offload_folder={out}"]
    for arguments in (
        ["run", tmp_path / "spec.yaml", "--out", out / "deep" / "s.zarr"],
        ["run", tmp_path / "spec.yaml", "--out", tmp_path / "link" / "s.zarr"],
        ["run", tmp_path / "spec.yaml", "--out", (out / "s.zarr").as_uri()],
        ["run", tmp_path / "spec.yaml", "--out", "s.zarr", "--overwrite"],
        ["plot", out, "--out", out / "figures"],
        ["plot", out, "--out", out],
        ["export", out, out / "t.parquet"],
        ["export", out, "t.zip"],
        ["reproduce", "greater-than", "--out", "reproduced"],
        ["run", tmp_path / "spec.yaml", *off],
        ["demo", "--out", out / "demo"],
    ):
        capsys.readouterr()
        assert _status([*map(str, arguments)]) == 2, arguments
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert re.search(rf"is inside the results (file://)?{out}: choose", line)
    assert tree(out) == before


def test_files_of_others_are_not_replaced(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.zarr"
    assert run(*FEW) == 0
    figures = tmp_path / "figures"
    command = ["plot", str(out), "--out", str(figures), "--format", "png,svg,pdf"]
    assert _status(command) == 0
    assert _status(command) == 0
    for pattern in ("*.png", "*.svg", "*.pdf", "report.html"):
        path = next(figures.glob(pattern))
        made = path.read_bytes()
        path.write_bytes(b"mine")
        capsys.readouterr()
        assert _status(command) == 2
        assert f"{path} exists and was not made by patchsweep" in capsys.readouterr().err
        assert path.read_bytes() == b"mine"
        path.write_bytes(made)
    for name in ("t.parquet", "t.zip"):
        path = write(tmp_path / name)
        assert _status(["export", str(out), str(path)]) == 2
        assert "exists already: use --overwrite" in capsys.readouterr().err
        assert path.read_text().startswith("{")
        assert _status(["export", str(out), str(path), "--overwrite"]) == 0
        assert not path.read_bytes().startswith(b"{")
    with pytest.raises(ps.BadInput, match="exists already"):
        ps.open(out).export(tmp_path / "t.parquet")
    with pytest.raises(ps.BadInput, match="exists already"):
        pack(out, tmp_path / "t.zip")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_in_a_bucket(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Every key that is deleted is of the results or the lock."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    url = "memory://owned/r.zarr" if scheme == "memory" else (tmp_path / "r.zarr").as_uri()
    deleted: list[str] = []
    delete = obstore.delete

    def heard(store: Any, keys: Any) -> None:
        deleted.extend([keys] if isinstance(keys, str) else keys)
        delete(store, keys)

    monkeypatch.setattr(obstore, "delete", heard)
    loaded = ps.load_model(str(model))
    pairs = [ps.make_pair(loaded.tokenizer, **row) for row in rows(2)]
    ps.sweep(loaded, pairs, out=url, **SMALL)
    objects = _objects(url)
    for key in ("notes/mine.txt", "mlp_out/note.txt", "nested.zarr/zarr.json"):
        obstore.put(objects, key, b"{}")
        with pytest.raises(ps.BadInput, match=f"not of the results, e.g. {key}"):
            ps.sweep(loaded, pairs, out=url, overwrite=True, **SMALL)
        assert not ps.check(url).damages
        ps.sweep(loaded, pairs, out=url, resume=True, **SMALL)
        assert bytes(obstore.get(objects, key).bytes()) == b"{}"
        delete(objects, key)
    with pytest.raises(ps.BadInput, match="is inside the results"):
        ps.sweep(loaded, pairs, out=f"{url}/deep/s.zarr", **SMALL)
    ps.sweep(loaded, pairs, out=url, overwrite=True, **SMALL)
    assert len(deleted) > 50
    for key in deleted:
        assert key == "lock" or OURS.fullmatch(key), key


def test_half_laid_out_with_a_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill has left in a bucket goes away, but for what is not ours."""
    from patchsweep.store.bucket import _objects

    monkeypatch.chdir(tmp_path)
    url = "memory://half/r.zarr"
    make(url)
    objects = _objects(url)
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(obstore, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(url)
    obstore.put(objects, "notes.txt", b"keep")
    with pytest.raises(ps.BadInput, match=r"not of the results, e.g. notes\.txt"):
        make(url)
    assert bytes(obstore.get(objects, "notes.txt").bytes()) == b"keep"
    obstore.delete(objects, "notes.txt")
    make(url)


def test_a_lock_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    obstore.put(_objects("memory://locks/.r.zarr.job", make=True), "lock", b"mine")
    with (
        pytest.raises(ps.BadInput, match="is no lock of patchsweep: move it away"),
        locked("memory://locks/r.zarr"),
    ):
        pass


def test_all_that_a_sweep_writes_is_of_its_results(tmp_path: Path) -> None:
    """With every feature that has arrays of its own."""
    loaded = ps.wrap(build(2), tokenizer(), "tiny")
    pairs = [ps.make_pair(loaded.tokenizer, **row) for row in rows(3)]
    settings: dict[str, Any] = {
        **SMALL,
        "sets": {"two": ["head_z.0.1@-1", "mlp_out.1"]},
        "prefilter": {"keep": "30%", "audit": 5},
        "edges": "eap",
        "direction": "denoise",
        "metrics": ["logit_diff", {"logit_diff": {"at": "END"}}],
    }
    out = tmp_path / "r.zarr"
    ps.sweep(loaded, pairs, out=out, **settings)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    known = {f"{name}/zarr.json" for name in Store.open(out).arrays()}
    known |= {"summary/second/zarr.json"}
    assert {k for k in found if k.count("/") == 2 and k.endswith("zarr.json")} == known
    ps.sweep(loaded, pairs, out=out, overwrite=True, **settings)
    assert {p.name for p in tmp_path.iterdir()} == {"r.zarr", ".r.zarr.job"}


@pytest.mark.parametrize("when", ["exists", "gets"])
def test_replaced_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Another job deletes, or replaces, what a run was about to overwrite: one line, wherever."""
    loaded = ps.load_model(str(model))
    pairs = [ps.make_pair(loaded.tokenizer, **row) for row in rows(2)]
    out, calls = tmp_path / "r.zarr", 0
    ps.sweep(loaded, pairs, out=out, **SMALL)
    exists, gets = Folder.exists, Folder.gets

    def gone() -> None:
        nonlocal calls
        calls += 1
        shutil.rmtree(out, ignore_errors=True)

    def looked(self: Folder) -> bool:
        found = exists(self)
        gone()
        return found

    def got(self: Folder, keys: Any) -> Any:
        gone()
        return gets(self, keys)

    # Not at the first look, which only asks whether something was moved aside.
    looks = iter([exists])
    first = {"exists": lambda self: next(looks, looked)(self), "gets": got}
    monkeypatch.setattr(Folder, when, first[when])
    with pytest.raises(ps.BadInput, match=r"was just changed by another run: run again"):
        ps.sweep(loaded, pairs, out=out, overwrite=True, **SMALL)
    assert calls
