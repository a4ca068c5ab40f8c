"""Results as who has only xarray reads them: what the arrays and README.txt say, and compute."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import xarray as xr
import zarr

import patchsweep as ps
from patchsweep.sites import Status
from patchsweep.store import pack
from patchsweep.store.bucket import _objects
from patchsweep.store.manifest import packed, seal, unpacked
from patchsweep.store.summary import COPIES
from tiny import WORDS, arrays, build, pairs_of, rows, tokenizer

FEW = 2
SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out"],
    "metrics": ["logit_diff", {"kl": {"at": "END"}}],
    "direction": "both",
}
README = "README.txt"
BESIDE = ("token", "label", "n_pairs")


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(build(), tokenizer())


@pytest.fixture(scope="module")
def pairs(model: ps.Model) -> list[ps.Pair]:
    """Of unequal length, every one with a label S of its own place, END on S in the last."""
    made = rows(4)
    for i, row in enumerate(made):
        row["labels"] = {"S": i + 1, "END": -1}
    made[3]["labels"]["S"] = -1
    found = pairs_of(model, made)
    assert len({len(pair) for pair in found}) > 1
    return found


def alone(out: Path, group: str) -> xr.Dataset:
    return xr.open_zarr(out, group=group, consolidated=False)


def example(out: Path) -> list[str]:
    """The lines of the example in README.txt."""
    text = (out / README).read_text("utf-8")
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    return lines


def run(out: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What lines name, run in the results' folder."""
    found: dict[str, Any] = {}
    monkeypatch.chdir(out)
    exec("\n".join(lines), found)
    return found


WAYS: dict[str, dict[str, Any]] = {
    "denoise": {"direction": "denoise"},
    "noise": {"direction": "noise", "positions": [1, -1]},
    "samples": {"corrupt": {"gaussian": {"sigma": 1.0, "samples": 2}}},
    "differences": {"source": ["zero", {"mean": {"prompts": "clean"}}], "direction": "noise"},
    "several sources": {"source": ["other", "zero"], "direction": "noise"},
    "prefilter": {"prefilter": {"keep": "40%", "estimator": {"mlp_out": "atp"}}},
    "labels": {"positions": ["S", "END"], "components": ["mlp_out"]},
    "together": {"positions": "all", "sets": {"two": ["mlp_out.0@END", "mlp_out.1"]}},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_example_is_the_effect(
    model: ps.Model,
    pairs: list[ps.Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    out = tmp_path / "r"
    results = ps.sweep(model, pairs, out=out, **{**SETTINGS, "direction": "denoise", **WAYS[way]})
    lines = example(out)
    found = run(out, lines, monkeypatch)
    ds, effect = found["ds"], found["effect"]
    component = "mlp_out" if way == "labels" else "head_z"
    assert f'group="{component}"' in lines[1]
    expected = results.effect(component, "logit_diff", align="start", min_pairs=1)
    assert np.isfinite(expected.values).sum() > expected.size / 2
    assert np.abs(expected.values)[np.isfinite(expected.values)].max() > 0.01
    assert effect.dims == ("layer", "unit", "position")
    np.testing.assert_allclose(effect.values, expected.values, rtol=1e-12, atol=1e-15)
    there = found["moved"].notnull().any("sample").sum("pair")
    np.testing.assert_array_equal(there.values, expected.n_pairs.values)
    # Of a sweep that is finished and finite, pairs whose prompt has the position.
    np.testing.assert_array_equal(there.max(["layer", "unit"]).values, ds.n_pairs.values)


def test_the_example_by_label(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = example(whole)
    lines.insert(4, 'moved = moved.where(ds["label"].isin(["END", "S, END"]))')
    lines[5] = lines[5].replace('"pair"]', '"pair", "position"]')
    found = run(whole, lines, monkeypatch)["effect"]
    expected = ps.open(whole).effect("head_z", "logit_diff", align="labels").sel(position="END")
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12, atol=1e-15)


def test_without_patchsweep(whole: Path) -> None:
    """In a process that cannot import it."""
    blocked = "import sys, json; sys.modules['patchsweep'] = sys.modules['torch'] = None"
    said = "print(json.dumps(effect.fillna(9.0).values.tolist()))"
    code = "\n".join([blocked, *example(whole), said])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=whole, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = ps.open(whole).effect("head_z", "logit_diff", align="start", min_pairs=1)
    np.testing.assert_allclose(json.loads(done.stdout), expected.fillna(9.0).values, rtol=1e-12)


def words(pair: ps.Pair) -> list[str]:
    """The token of every position, clean/corrupt where they differ."""
    clean, corrupt = ([WORDS[token] for token in side] for side in (pair.clean, pair.corrupt))
    return [a if a == b else f"{a}/{b}" for a, b in zip(clean, corrupt, strict=True)]


@pytest.mark.parametrize("component", ["head_z", "mlp_out"])
def test_tokens_and_labels(whole: Path, pairs: list[ps.Pair], component: str) -> None:
    ds = alone(whole, component)
    assert {*BESIDE} <= set(ds.coords)
    assert all(ds[name].dims == ("pair", "position") for name in BESIDE[:2])
    width = max(map(len, pairs))
    tokens = [[*words(pair), *[""] * (width - len(pair))] for pair in pairs]
    assert ds.token.values.tolist() == tokens
    assert any("/" in token for row in tokens for token in row)
    labels = np.full((4, width), "", object)
    for i, pair in enumerate(pairs):
        labels[i, [i + 1, len(pair) - 1]] = ["S", "END"]
    labels[3, 4] = ""
    labels[3, len(pairs[3]) - 1] = "S, END"
    assert ds.label.values.tolist() == labels.tolist()
    lengths = np.array([len(pair) for pair in pairs])
    assert ds.n_pairs.values.tolist() == [int((lengths > p).sum()) for p in range(width)]
    assert min(ds.n_pairs.values) < 4


def test_positions_that_were_asked_for(model: ps.Model, tmp_path: Path) -> None:
    """Labels, indices from both ends before a continuation, groups, all."""
    made = [{**row, "continuation": " a b c"} for row in rows(3)]
    made[1]["labels"] = {"S": 2, "END": 3}
    pairs = pairs_of(model, made)

    def texts(positions: Any, **more: Any) -> tuple[Any, Any, Any]:
        name = f"{len([*tmp_path.iterdir()])}.zarr"
        asked = {"components": ["mlp_out"], "metrics": ["sequence_logprob"]}
        asked |= {"positions": positions, **more}
        results = ps.sweep(model, pairs, out=tmp_path / name, **asked)
        ds = alone(tmp_path / name, "mlp_out")
        status = ds.sequence_logprob_status.isel(direction=0, source=0, sample=0, layer=0, unit=0)
        outside = (status == Status.OUTSIDE).sum("pair").values
        assert (ds.n_pairs.values == 3 - outside).all()
        shown = results.tokens_of("mlp_out", results.columns("mlp_out"))
        joined = [["/".join(dict.fromkeys(t)) if t else "" for t in row] for row in shown]
        assert ds.token.values.tolist() == joined
        return ds.token.values.tolist(), ds.label.values.tolist(), ds.n_pairs.values.tolist()

    said = [words(pair) for pair in pairs]
    last = [len(pair) - 3 for pair in pairs]  # where the continuation begins
    ends = [row[n] for row, n in zip(said, last, strict=True)]
    place = [pair.labels["END"] for pair in pairs]
    assert place[0] == last[0] and place[1] == 3 != last[1]
    token, label, count = texts(["S", "END"])
    assert token == [["", said[0][place[0]]], [said[1][2], said[1][3]], ["", said[2][place[2]]]]
    assert label == [["", "END"], ["S", "END"], ["", "END"]]
    assert count == [1, 3]
    token, label, count = texts([0, -1])
    assert token == [[row[0], end] for row, end in zip(said, ends, strict=True)]
    assert label == [["", "END"], ["", ""], ["", "END"]]
    assert count == [3, 3]
    token, label, count = texts({"few": ["S"], "END": ["END"], "ends": [0, -1]})
    assert token == [["", row[n], ""] for row, n in zip(said, place, strict=True)]
    assert label == [["", "END", ""]] * 3
    assert count == [1, 3, 3]
    assert texts("all") == ([[""]] * 3, [[""]] * 3, [3])
    token, _, _ = texts([0, 1], source=["zero"], direction="noise")  # the corrupt prompt is not run
    assert token == [[WORDS[t] for t in pair.clean[:2]] for pair in pairs]


def test_flags_say_what_a_status_is(whole: Path, pairs: list[ps.Pair]) -> None:
    ds = alone(whole, "head_z").sel(source="other", sample=0, direction="denoise")
    status = ds.logit_diff_status
    said = status.attrs["flag_meanings"].split()
    meaning = dict(zip(status.attrs["flag_values"], said, strict=True))
    names = np.vectorize(meaning.__getitem__)(status.values)
    assert {*names.ravel()} == {"exact", "structural", "outside"}
    lengths = xr.DataArray([len(pair) for pair in pairs], dims="pair")
    outside = (ds.position >= lengths).broadcast_like(status).transpose(*status.dims)
    assert ((names == "outside") == outside.values).all()
    # Positions before the first one that differs change nothing.
    first = [min(np.flatnonzero(np.array(p.clean) != np.array(p.corrupt))) for p in pairs]
    before = (ds.position < xr.DataArray(first, dims="pair")).broadcast_like(status)
    assert (names == "structural")[before.transpose(*status.dims).values].all()
    assert {meaning[value]: value for value in meaning} == {s.name.lower(): s for s in Status}
    assert ds.logit_diff.attrs["ancillary_variables"] == "logit_diff_status"


def test_every_array_says_what_it_is(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def prob(logits, context):\n    return logits[:, 0]\n")
    metrics = ["logit_diff", "kl", "prob_diff", {"kl": {"at": "END"}}, {"attention": None}]
    metrics[-1] = {"attention": {"layer": 1, "head": 0, "query": "END", "key": 0}}
    metrics += [{"callable": {"path": "mine:prob"}}]
    metrics += [{"neuron": {"layer": 2, "neuron": 3, "position": "END"}}]
    ps.sweep(
        model,
        pairs,
        out="r",
        components=["head_k", "mlp_out"],
        metrics=metrics,
        sets={"two": ["mlp_out.0@END", "mlp_out.1"]},
        prefilter={"keep": "40%"},
        edges="eap",
    )
    units = {}
    for group in ("head_k", "mlp_out", "sets", "baseline", "edges"):
        ds = alone(Path("r"), group)
        assert all(ds[name].attrs["long_name"] for name in ds.variables if "site" not in name)
        for name, array in ds.data_vars.items():
            kind = name.rsplit("_", 1)[-1]
            assert ("flag_values" in array.attrs) == (kind == "status")
            units[name] = array.attrs.get("units")
        assert ({*BESIDE} <= set(ds.coords)) == (group in ("head_k", "mlp_out"))
    assert alone(Path("r"), "head_k").unit.attrs["long_name"] == "kv head"
    assert alone(Path("r"), "sets").position.attrs["long_name"].startswith("set of sites")
    choice = zarr.open_array("r/choice/head_k_status", mode="r")
    assert choice.attrs["flag_values"] == [int(status) for status in Status]
    measured = {
        "logit_diff": "logits",
        "kl": "nats",
        "prob_diff": "1",
        "kl_at_END": "nats",
        "attention_1_0_END_0": "1",
        "prob": None,  # a function of the user's
        "neuron_2_3_END": None,
    }
    for metric, unit in measured.items():
        assert units[f"{metric}_status"] is None
        for kind in ("", "_estimate", "_noise_floor"):
            assert units[f"{metric}{kind}"] == unit, (metric, kind)
    text = (Path("r") / README).read_text("utf-8")
    assert "edges: " in text and "head_k, mlp_out, sets" in text
    assert "  kl: KL(clean ‖ patched) [nats]\n  prob_diff: probability" in text
    assert "  prob: prob\n" in text


@pytest.mark.parametrize("component", ["head_z", "mlp_out"])
def test_to_xarray_says_the_same(whole: Path, component: str) -> None:
    ds, stored = ps.open(whole).to_xarray(component), alone(whole, component)
    names = {"head": "unit"}
    for name in ds.variables:
        if name.endswith("_effect"):
            assert ds[name].attrs["units"] == "1"
            continue
        assert ds[name].attrs == stored[names.get(name, name)].attrs, name
    for name in BESIDE:
        assert name in ds.coords
        assert ds[name].values.tolist() == stored[name].values.tolist()
    assert ds.token.dims == ("pair", "position")
    squeezed = ps.open(whole).to_xarray(component, squeeze=True)
    assert set(BESIDE) <= set(squeezed.coords)
    assert squeezed.load().logit_diff.where(squeezed.label == "END").notnull().any()


def test_effects_of_sources_without_a_run_have_the_metrics_unit(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path
) -> None:
    asked = {**SETTINGS, "components": ["mlp_out"], "direction": "noise"}
    for name, sources, unit in [("a", ["zero"], "logits"), ("b", ["other", "zero"], None)]:
        ds = ps.sweep(model, pairs, out=tmp_path / name, source=sources, **asked)
        said = ds.to_xarray("mlp_out").logit_diff_effect.attrs
        assert said.get("units") == unit
        assert "patched − destination" in said["long_name"]


LOSSES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "checksum": lambda path: path.write_bytes(path.read_bytes() + b"mine\n"),
}


@pytest.mark.parametrize("why", LOSSES)
def test_a_lost_readme_comes_back(
    model: ps.Model, pairs: list[ps.Pair], out: Path, whole: Path, why: str
) -> None:
    """No number hangs on it, so results open without it."""
    LOSSES[why](out / README)
    assert ps.open(out).to_frame().equals(ps.open(whole).to_frame())
    found = ps.check(out)
    assert [(d.key, d.why, d.where) for d in found.damages] == [(README, why, "once")]
    assert "run again with --resume" in str(found)
    ps.sweep(model, pairs, out=out, resume=True, **SETTINGS)
    assert (out / README).read_bytes() == (whole / README).read_bytes()
    assert not ps.check(out).damages


def test_a_link_in_its_place_is_refused(out: Path, tmp_path: Path) -> None:
    (out / README).rename(tmp_path / "elsewhere")
    (out / README).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ps.BadInput, match=r"README\.txt is a symbolic link: results hold none"):
        ps.open(out)


def test_a_lost_manifest_is_made_of_it_again(
    model: ps.Model, pairs: list[ps.Pair], out: Path, whole: Path
) -> None:
    manifest = Path("manifest", "zarr.json")
    (out / manifest).unlink()
    ps.sweep(model, pairs, out=out, resume=True, **SETTINGS)
    assert (out / manifest).read_bytes() == (whole / manifest).read_bytes()
    assert README in unpacked((out / manifest).read_bytes())


def test_append_has_the_further_pairs(
    model: ps.Model, pairs: list[ps.Pair], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.zarr"
    ps.sweep(model, pairs[:FEW], out=out, **SETTINGS)
    before = alone(out, "head_z").load()
    assert before.token.shape[0] == FEW
    ps.sweep(model, pairs, out=out, append=True, **SETTINGS)
    after = alone(out, "head_z").load()
    width = before.position.size
    assert (after.token[:FEW, :width].values == before.token.values).all()
    for name in BESIDE:
        assert after[name].values.tolist() == alone(whole, "head_z")[name].values.tolist()
    assert (out / README).read_bytes() == (whole / README).read_bytes()
    assert not ps.check(out).damages


def test_overwrite_takes_it_and_nothing_else(
    model: ps.Model, pairs: list[ps.Pair], out: Path
) -> None:
    asked = {**SETTINGS, "components": ["resid_pre"]}
    for name in ("readme.txt", "README.md", "README.txt.mine", "head_z/README.txt"):
        (out / name).write_text("mine")
        with pytest.raises(ps.BadInput, match=f"not of the results, e.g. {name}: it is left"):
            ps.sweep(model, pairs, out=out, overwrite=True, **asked)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    ps.sweep(model, pairs, out=out, overwrite=True, **asked)
    assert 'group="resid_pre"' in example(out)[1]
    assert {p.name for p in out.parent.iterdir()} == {"r.zarr", ".r.zarr.job"}


def as_before(out: Path) -> None:
    """Results of the same schema from before there were README.txt and what is beside positions."""
    files = unpacked((out / "manifest/zarr.json").read_bytes())
    gone = [key for key in files if key == README or key.split("/")[1:2] in [[n] for n in BESIDE]]
    assert len(gone) == 1 + 2 * 3 * 2  # of two components, metadata and a chunk of each
    for key in gone:
        del files[key]
        (out / key).unlink()
    for key, content in files.items():
        if key.endswith("zarr.json") and key != "zarr.json":
            said = json.loads(content)
            kept = {"unit_name", "approximation"} if not key.startswith("prompts/zarr") else None
            known = said.get("attributes", {})
            said["attributes"] = {k: v for k, v in known.items() if kept is None or k in kept}
            files[key] = json.dumps(said).encode()
    root = json.loads(files.pop("zarr.json"))
    del root["attributes"]["readme"]
    root["attributes"]["written_once"] = ""
    files["zarr.json"] = json.dumps(root).encode()
    root["attributes"]["written_once"] = seal(files)
    files["zarr.json"] = json.dumps(root).encode()
    for copy in COPIES:  # they did not say of which root they are
        said = json.loads((out / copy).read_bytes())
        del said["attributes"]["of"]
        (out / copy).write_text(json.dumps(said))
    for key, content in files.items():
        (out / key).write_bytes(content)
    (out / "manifest/zarr.json").write_bytes(packed(files))
    for folder in (out / c / name for c in SETTINGS["components"] for name in BESIDE):
        shutil.rmtree(folder)


def test_results_from_before(model: ps.Model, pairs: list[ps.Pair], out: Path, whole: Path) -> None:
    """They read the same, and go on as they are; a README.txt in there is the user's."""
    as_before(out)
    assert not {*BESIDE} & set(alone(out, "head_z").variables)
    assert not ps.check(out).damages
    xr.testing.assert_identical(
        ps.open(out).to_xarray("head_z"), ps.open(whole).to_xarray("head_z")
    )
    (out / "completion/head_z/c/0").unlink()
    ps.sweep(model, pairs, out=out, resume=True, **SETTINGS)
    assert not (out / README).exists()
    assert ps.open(out).to_frame().equals(ps.open(whole).to_frame())
    (out / README).write_text("mine")
    more = {**SETTINGS, "metrics": [*SETTINGS["metrics"], "prob"]}
    for how in ({"overwrite": True, **SETTINGS}, {"append": True, **more}):
        with pytest.raises(ps.BadInput, match=r"not of the results, e.g. README\.txt: it is left"):
            ps.sweep(model, pairs, out=out, **how)
    assert not ps.check(out).damages
    manifest = (out / "manifest/zarr.json").read_bytes()
    (out / "manifest/zarr.json").unlink()
    ps.sweep(model, pairs, out=out, resume=True, **SETTINGS)
    assert (out / "manifest/zarr.json").read_bytes() == manifest
    pack(out, out.with_name("t.zip"))
    assert README not in zipfile.ZipFile(out.with_name("t.zip")).namelist()
    assert (out / README).read_text() == "mine"
    (out / README).unlink()
    ps.sweep(model, pairs, out=out, append=True, **more)
    assert example(out)
    assert {*BESIDE} <= set(alone(out, "head_z").coords)


def test_results_of_the_schema_before(tmp_path: Path) -> None:
    """They open, in to_xarray with all that others say; a README.txt in there is the user's."""
    out = tmp_path / "older.zarr"
    zipfile.ZipFile(Path(__file__).parents[1] / "schema_2.zip").extractall(out)
    (out / README).write_text("mine")
    results = ps.open(out)
    ds = results.to_xarray("head_z")
    assert ds.logit_diff.attrs["units"] == "logits"
    joined = [
        ["/".join(dict.fromkeys(two)) if two else "" for two in row]
        for row in results.tokens_of("head_z", results.columns("head_z", "start"))
    ]
    assert ds.token.values.tolist() == joined
    assert set(ds.label.values.ravel()) == {"", "END"}
    pack(out, tmp_path / "t.zip")
    assert README not in zipfile.ZipFile(tmp_path / "t.zip").namelist()
    assert not results.check().damages


def test_in_a_zip_file_and_a_bucket(
    model: ps.Model, pairs: list[ps.Pair], whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pack(whole, tmp_path / "t.zip")
    text = (whole / README).read_bytes()
    assert zipfile.ZipFile(tmp_path / "t.zip").read(README) == text
    monkeypatch.chdir(tmp_path)
    url = "memory://alone/r.zarr"
    ps.sweep(model, pairs, out=url, **SETTINGS)
    objects = _objects(url)
    assert bytes(obstore.get(objects, README).bytes()) == text
    obstore.delete(objects, README)
    assert [d.key for d in ps.check(url).damages] == [README]
    ps.sweep(model, pairs, out=url, resume=True, **SETTINGS)
    assert bytes(obstore.get(objects, README).bytes()) == text
    obstore.put(objects, "README.md", b"mine")
    with pytest.raises(ps.BadInput, match=r"not of the results, e.g. README\.md"):
        ps.sweep(model, pairs, out=url, overwrite=True, **SETTINGS)
    obstore.delete(objects, "README.md")
    ps.sweep(model, pairs, out=url, overwrite=True, **SETTINGS)
    assert not ps.check(url).damages


def test_columns_that_are_coordinates_are_no_names_of_metrics(
    model: ps.Model, pairs: list[ps.Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.py").write_text("def label(logits, context):\n    return logits[:, 0]\n")
    with pytest.raises(ps.BadInput, match="'label' is the name of another column"):
        ps.sweep(model, pairs, out="r", metrics=[{"callable": {"path": "names:label"}}])


def test_older_arrays_are_as_they_were(whole: Path, out: Path) -> None:
    """What is new changes no array that was there."""
    as_before(out)
    now, before = arrays(whole), arrays(out)
    assert before == {k: v for k, v in now.items() if k.split("/")[1:] not in [[n] for n in BESIDE]}
