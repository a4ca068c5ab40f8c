"""Results are data: nothing that they hold or name is run, and nothing outside them is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from numcodecs import Pickle

import patchsweep as ps
from patchsweep.report.figures import file_name, plot
from patchsweep.store import Store, pack
from patchsweep.store.digests import digest_of_all
from patchsweep.store.integrity import withdraw
from patchsweep.store.manifest import packed, unpacked
from patchsweep.store.nodes import node
from tiny import arrays, build, rows, tokenizer, values

SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out"],
    "metrics": ["logit_diff", "kl"],
    "token_budget": 60,
    "direction": "both",
}
OLDER = Path(__file__).parents[1] / "schema_2.zip"  # SETTINGS, by the version before
ROUNDING = 1e-4  # between the machine that made it and this one
DIGESTS = ("completion/", "records/", "baseline/")


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(build(), tokenizer())


@pytest.fixture(scope="module")
def pairs(model: ps.Model) -> list[ps.Pair]:
    return [ps.make_pair(model.tokenizer, **row) for row in rows(2)]


def used(out: Path) -> list[Callable[[], Any]]:
    """All that reads results."""
    return [
        lambda: ps.open(out),
        lambda: ps.check(out),
        lambda: pack(out, out.with_name("t.zip")),
    ]


class Runs:
    """A pickle that leaves a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("where", ["", "head_z"])
def test_an_array_of_zarr_v2_is_not_read(out: Path, tmp_path: Path, where: str) -> None:
    """xarray would unpickle it."""
    mark = tmp_path / "ran"
    array = out / where / "extra"
    array.mkdir()
    said = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "fill_value": None,
        "order": "C",
        "filters": [{"id": "pickle", "protocol": 5}],
        "compressor": None,
    }
    (array / ".zarray").write_text(json.dumps(said))
    (array / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["x"]}))
    (out / where / ".zgroup").write_text('{"zarr_format": 2}')
    payload = np.empty(1, object)
    payload[0] = Runs(mark)
    (array / "0").write_bytes(Pickle().encode(payload))
    with pytest.raises(ps.BadInput, match=r"is of Zarr v2, results are of v3: move it out"):
        ps.open(out)
    for component in Store.open(out).grids:
        ps.results.Results(Store.open(out)).to_xarray(component).load()
    pack_target = tmp_path / "t.zip"
    pack(out, pack_target)
    assert not any("extra" in name for name in zipfile.ZipFile(pack_target).namelist())
    assert not mark.exists()


def change_metadata(out: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """As one would who knows how results vouch for themselves."""
    manifest = out / "manifest" / "zarr.json"
    files = unpacked(manifest.read_bytes())
    said = json.loads(files[name])
    change(said)
    files[name] = json.dumps(said).encode()
    root = json.loads(files["zarr.json"])
    others = {key: content for key, content in files.items() if key != "zarr.json"}
    root["attributes"]["written_once"] = digest_of_all(others)
    files["zarr.json"] = json.dumps(root).encode()
    for key in (name, "zarr.json"):
        (out / key).write_bytes(files[key])
    manifest.write_bytes(packed(files))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said["codecs"].insert(0, {"name": "numcodecs.pickle"}), "unknown codecs"),
        (lambda said: said.update(codecs=[{"name": "bytes"}, {"name": "blosc"}]), "unknown codecs"),
        (lambda said: said.update(data_type="r16"), "unknown data type"),
        (lambda said: said.update(data_type={"name": "numpy.datetime64"}), "unknown data type"),
        (lambda said: said.update(zarr_format=2), "Zarr format 2, only 3 is read"),
        (lambda said: said.update(storage_transformers=[{"name": "x"}]), "storage transformers"),
        (lambda said: said.update(shape=[-1]), "shape"),
        (lambda said: said.update(must_understand=False), "unknown entry"),
    ],
)
def test_only_a_few_kinds_of_arrays_are_read(
    out: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    change_metadata(out, "head_z/logit_diff/zarr.json", change)
    for use in used(out):
        with pytest.raises(ps.BadInput, match=rf"head_z/logit_diff/zarr.json: .*{words}") as info:
            use()
        assert "\n" not in str(info.value)


def test_a_manifest_names_nothing_outside(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    files = unpacked((out / "manifest/zarr.json").read_bytes())
    for name in ("../mine/zarr.json", "/etc/zarr.json", "head_z/c/../../../mine", "prompts/c\\0"):
        (out / "manifest/zarr.json").write_bytes(packed({**files, name: b"{}"}))
        with pytest.raises(ps.BadInput, match=r"manifest/zarr\.json"):
            ps.open(out)
        withdraw(Store.open(out, "r+", mending=True))
        ps.open(out)
    assert (tmp_path / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    "key", ["head_z/logit_diff/c/0/0/0/0/0/0/0", "prompts/length/c/0", "head_z/kl", "zarr.json"]
)
def test_links_are_not_followed(out: Path, tmp_path: Path, key: str) -> None:
    (out / key).rename(tmp_path / "elsewhere")
    (out / key).symlink_to(tmp_path / "elsewhere")

    def table() -> Any:
        return ps.open(out).to_frame()

    for use in (table, *used(out)[1:]):
        with pytest.raises(ps.BadInput, match=r"is a symbolic link: results hold none"):
            use()
    assert not (tmp_path / "t.zip").exists()


def test_other_files_are_no_part_of_a_zip_file(out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (out / "notes.txt").symlink_to(tmp_path / "secret")
    (out / "head_z" / "mine.txt").write_text("mine")
    pack(out, tmp_path / "t.zip")
    names = zipfile.ZipFile(tmp_path / "t.zip").namelist()
    assert [name for name in names if name.endswith(".txt")] == ["README.txt"]
    assert ps.open(tmp_path / "t.zip").to_frame().equals(ps.open(out).to_frame())


def test_results_run_no_function_and_load_no_model(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from pathlib import Path\nPath('ran').touch()\ndef mine(logits, context):\n"
    Path("evil_metric.py").write_text(f"{code}    return logits[:, 0]\n")
    settings = {**SETTINGS, "components": ["mlp_out"]}
    settings["metrics"] = [{"callable": {"path": "evil_metric:mine"}}]
    ps.sweep(model, pairs, out="r.zarr", **settings)
    function = sys.modules.pop("evil_metric").mine
    Path("ran").unlink()
    for use in used(Path("r.zarr")):
        use()
    with pytest.raises(ps.BadInput, match=r"names the model .*own, add --trust"):
        ps.verify("r.zarr")
    with pytest.raises(ps.BadInput, match=r"names the function evil_metric:mine .*add --trust"):
        ps.verify("r.zarr", model=model)
    assert not Path("ran").exists()
    given = {"evil_metric:mine": function}
    assert ps.verify("r.zarr", 5, model=model, functions=given).holds
    assert not Path("ran").exists()
    assert ps.verify("r.zarr", 5, model=model, trust=True).holds
    assert Path("ran").exists()


@pytest.mark.parametrize("error", ["EIO", "EACCES", "ETIMEDOUT", "ESTALE"])
def test_what_cannot_be_read_is_not_damaged(
    out: Path,
    model: ps.Model,
    pairs: list[ps.Pair],
    monkeypatch: pytest.MonkeyPatch,
    error: str,
) -> None:
    """One line, and nothing is taken back."""
    number = getattr(errno, error)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if broken in path.as_posix():
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for broken in ("head_z/kl/c/0", "completion/mlp_out/c", "prompts/length/c", "r.zarr/zarr.json"):
        for use in (
            lambda: ps.open(out).to_frame(),
            lambda: ps.check(out),
            lambda: ps.sweep(model, pairs, out=out, resume=True, **SETTINGS),
        ):
            with pytest.raises(ps.BadInput, match=rf"^cannot read .*{broken}") as info:
                use()
            assert "\n" not in str(info.value)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_chunk_of_equal_size_from_another_place(out: Path) -> None:
    """Its own checksum is right."""
    chunks = sorted((out / "head_z" / "kl" / "c").rglob("*"))
    files = [chunk for chunk in chunks if chunk.is_file()]
    first, second = next(
        (x, y)
        for x in files
        for y in files
        if x.stat().st_size == y.stat().st_size and x.read_bytes() != y.read_bytes()
    )
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    keys = {chunk.relative_to(out).as_posix() for chunk in (first, second)}
    assert {damage.key for damage in ps.check(out).damages} == keys
    with pytest.raises(ps.BadInput, match=r"cannot read .*head_z/kl/c/"):
        _ = ps.open(out).to_xarray("head_z").kl.values


def test_a_chunk_without_a_record_is_not_there(out: Path) -> None:
    """As a kill leaves it, or as a copy of another looks."""
    (out / "completion/head_z/c/0").unlink()
    values = ps.results.Results(Store.open(out)).store.read("head_z/kl")
    raw = zarr.open_array(out / "head_z/kl", mode="r")[...]
    same = (values == raw) | (np.isnan(values) & np.isnan(raw))
    grid = Store.open(out).grids["head_z"]
    pair = slice(0, grid.pair_tile)
    first = (0, 0, 0, pair, slice(None), slice(0, grid.unit_tile), slice(0, grid.position_tile))
    assert np.isnan(values[first]).all() and not np.isnan(raw[first]).all()
    same[first] = True
    assert same.all()


def unzipped(tmp_path: Path) -> Path:
    out = tmp_path / "older.zarr"
    zipfile.ZipFile(OLDER).extractall(out)
    return out


def test_older_results_open_and_are_taken_over(
    model: ps.Model, pairs: list[ps.Pair], whole: Path, tmp_path: Path
) -> None:
    out = unzipped(tmp_path)
    root = json.loads((out / "zarr.json").read_text())
    root["attributes"]["model_fingerprint"] = model.fingerprint  # a model's identity was another
    (out / "zarr.json").write_text(json.dumps(root))
    older, now = ps.open(out), ps.open(whole)
    assert any("of an older version" in line for line in older.warnings())
    pd.testing.assert_frame_equal(older.to_frame(), now.to_frame(), rtol=0, atol=ROUNDING)
    mine, new = (results.to_xarray("head_z") for results in (older, now))
    xr.testing.assert_allclose(mine, new, rtol=0, atol=ROUNDING)
    assert [v.attrs for v in mine.variables.values()] == [v.attrs for v in new.variables.values()]
    assert mine.attrs == new.attrs
    assert not older.check().damages
    assert ps.verify(out, 5, model).holds
    for chunk in ("completion/head_z/c/1", "completion/mlp_out/c/0"):
        (out / chunk).unlink()
    assert not ps.open(out).complete
    created = older.attrs["created"]
    results = ps.sweep(model, pairs, out=out, resume=True, **SETTINGS)
    again, once = values(out), values(whole)
    for name, found in again.items():
        np.testing.assert_allclose(found, once[name], rtol=0, atol=ROUNDING, err_msg=name)
    unlike = {n for n, raw in arrays(out).items() if raw != arrays(whole)[n]}
    assert not {n for n in unlike - again.keys() if not n.startswith(DIGESTS)}
    assert (results.attrs["patchsweep_schema"], results.attrs["created"]) == (3, created)
    assert "appended" not in results.attrs
    assert not any("older" in line for line in results.warnings())


@pytest.mark.parametrize("key", ["head_z/unit/c/0", "prompts/clean_text/c/0/0", "head_z/pair"])
def test_what_older_results_lack_is_one_line(whole: Path, tmp_path: Path, key: str) -> None:
    """Or is not needed, and the figures are right."""
    out, lines = unzipped(tmp_path), 0
    shutil.rmtree(out / key) if (out / key).is_dir() else (out / key).unlink()
    for read in (lambda r: r.to_frame(), lambda r: r.to_xarray("head_z").to_dataframe()):
        try:
            found = read(ps.open(out))
        except ps.BadInput as error:
            assert "missing" in str(error) and "\n" not in str(error)
            lines += 1
        else:
            now = read(ps.open(whole))
            pd.testing.assert_frame_equal(found, now, rtol=0, atol=ROUNDING)
    assert lines == (2 if "text" in key else 1)  # both say the tokens
    if not key.endswith("pair"):
        assert "run again with --overwrite" in str(ps.check(out))


@pytest.mark.parametrize("schema", [1, 2, 4])
def test_results_of_another_schema_are_replaced(
    model: ps.Model, pairs: list[ps.Pair], whole: Path, tmp_path: Path, schema: int
) -> None:
    out = unzipped(tmp_path)
    root = json.loads((out / "zarr.json").read_text())
    root["attributes"]["patchsweep_schema"] = schema
    (out / "zarr.json").write_text(json.dumps(root))
    if schema == 1:
        with pytest.raises(ps.BadInput, match="run the sweep again with --overwrite"):
            ps.open(out)
    if schema == 4:
        with pytest.raises(ps.BadInput, match="this patchsweep reads 3: update it"):
            ps.sweep(model, pairs, out=out, overwrite=True, **SETTINGS)
        return
    ps.sweep(model, pairs, out=out, overwrite=True, **SETTINGS)
    assert arrays(out) == arrays(whole)


def test_damaged_results_are_replaced(
    out: Path, model: ps.Model, pairs: list[ps.Pair], whole: Path
) -> None:
    (out / "zarr.json").write_text("{")
    (out / "prompts/length/c/0").unlink()
    ps.sweep(model, pairs, out=out, overwrite=True, **SETTINGS)
    assert arrays(out) == arrays(whole)


@pytest.mark.parametrize("count", [126, 127, 128, 200])
def test_many_sources_are_exported(model: ps.Model, tmp_path: Path, count: int) -> None:
    [row] = rows(1)
    others = {f"s/{i}": row["corrupt"] for i in range(count)}
    given = [ps.make_pair(model.tokenizer, **row, others=others)]
    settings = {"components": ["mlp_out"], "metrics": ["kl"], "positions": [-1]}
    settings["source"] = [f"s/{i}" for i in range(count)]
    results = ps.sweep(model, given, out=tmp_path / "r.zarr", **settings)
    results.export(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    assert back.source.tolist() == results.to_frame().source.tolist()
    assert set(back.source) == {f"s/{i}" for i in range(count)}


def test_names_do_not_leave_the_folder(model: ps.Model, tmp_path: Path) -> None:
    names = ["a/b", "a_b", "../../c"]
    row = rows(1)[0]
    others = dict.fromkeys(names, row["corrupt"])
    row["labels"] = {"S": 0}
    given = [ps.make_pair(model.tokenizer, **row, others=others)]
    settings = {"components": ["mlp_out"], "metrics": [{"kl": {"at": "S"}}, "prob"]}
    sets = {"x/y": ["mlp_out.1@-1"]}
    results = ps.sweep(model, given, out=tmp_path / "r.zarr", source=names, sets=sets, **settings)
    assert results.metrics == ("kl_at_S", "prob")
    figures = plot(results, tmp_path / "figures", formats=("svg",))
    assert len({*figures}) == len(figures) == len([*(tmp_path / "figures").iterdir()])
    assert {path.parent for path in figures} == {tmp_path / "figures"}
    assert {path.name for path in tmp_path.iterdir()} == {"r.zarr", ".r.zarr.job", "figures"}
    taken = set[str]()
    long = [file_name("é" * 500, taken) for _ in range(3)]
    assert len({*long}) == 3 and max(len(name.encode()) for name in long) < 220


def test_metadata_is_a_closed_list(whole: Path) -> None:
    """Of everything that a sweep writes."""
    found = [*whole.rglob("zarr.json")]
    assert len(found) > 40
    for path in found:
        node(path.read_bytes())
    for wrong in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"1", b'{"zarr_format": 3}'):
        with pytest.raises(ValueError):
            node(wrong)
