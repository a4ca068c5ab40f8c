"""Effects, tables and warnings, against numbers worked out by hand."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import patchsweep as ps
import patchsweep.results
from inputs import Letters
from oracle.families import FAMILIES
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.results import Results, lazy
from patchsweep.sites import Grid, Status, blocks
from patchsweep.store import Store

README = Path(__file__).resolve().parents[2] / "README.md"

# Two pairs of 3 and 2 tokens, both directions, two layers of two heads.
# logit_diff: clean 4, corrupt 0 in pair 0; clean 2, corrupt 1 in pair 1.
GRID = Grid("head_z", ("denoise", "noise"), 2, 2, 2, (0, 1, 2), 1, 2, 2)
PAIRS = [
    Pair((5, 6, 7), (5, 1, 7), (2,), (3,), {"END": 2}),
    Pair((5, 6), (5, 1), (2,), (3,), {"END": 1}),
]
SOURCES = [{"name": "other", "normalised": True}]
CLEAN, CORRUPT = (4.0, 2.0), (0.0, 1.0)


def hand_made() -> tuple[np.ndarray, np.ndarray]:
    """Values and statuses of GRID: everything structural but what is set below."""
    values = np.full(GRID.shape, np.nan, np.float32)
    status = np.full(GRID.shape, Status.STRUCTURAL, np.uint8)
    for d, destination in enumerate((CORRUPT, CLEAN)):
        for pair in range(2):
            values[d, 0, 0, pair] = destination[pair]
    values[:, 0, 0, 1, :, :, 2] = np.nan  # pair 1 has two tokens
    status[:, 0, 0, 1, :, :, 2] = Status.OUTSIDE

    def exact(d: int, pair: int, layer: int, head: int, position: int, value: float) -> None:
        values[d, 0, 0, pair, layer, head, position] = value
        status[d, 0, 0, pair, layer, head, position] = Status.EXACT

    exact(0, 0, 1, 0, 1, 3.0)  # effect 3/4 in pair 0, 1 in pair 1; ratio of means (3+1)/(4+1)
    exact(0, 1, 1, 0, 1, 2.0)
    exact(0, 0, 1, 1, 2, 1.0)  # outside in pair 1: 1/4
    exact(0, 0, 0, 0, 1, np.inf)  # not finite in pair 0, structural in pair 1: 0/1
    status[0, 0, 0, 0, 0, 0, 1] = Status.NOT_FINITE
    exact(1, 0, 1, 0, 1, 1.0)  # noise: (1-4)/(0-4), and pair 1 structural: -3/(-4-1)
    return values, status


def make(
    path: Path,
    skip: tuple[int, ...] = (),
    clean: tuple[float, float] = CLEAN,
) -> Results:
    attrs = {"spec": {"model": "tiny"}, "model": "tiny", "sources": SOURCES}
    store = Store.create(path, [GRID], ["logit_diff"], PAIRS, lambda t: f" t{t}", attrs, "float32")
    values, status = hand_made()
    base = np.array([clean, CORRUPT])
    store.write_baseline(0, 0, range(2), {"logit_diff": base}, {"logit_diff": np.zeros((2, 2))})
    for block in blocks(GRID):
        if block.index not in skip:
            region = block.region(GRID)
            store.write_block(block, {"logit_diff": values[region]}, {"logit_diff": status[region]})
    return patchsweep.results.open(path)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return make(tmp_path / "r.zarr")


def test_effect_is_the_ratio_of_means(results: Results) -> None:
    effect = results.effect("head_z", "logit_diff", "denoise", align="start")
    expected = np.zeros((2, 2, 3))
    expected[1, 0, 1] = 0.8  # the mean of the ratios would be 0.875
    expected[1, 1, 2] = 0.25
    np.testing.assert_allclose(effect, expected, rtol=1e-15)
    noise = results.effect("head_z", "logit_diff", "noise", align="start")
    expected = np.zeros((2, 2, 3))
    expected[1, 0, 1] = 0.6
    np.testing.assert_allclose(noise, expected, rtol=1e-15)


def test_effect_is_nan_where_nothing_was_run(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", skip=(0, 2))  # denoise, positions 0 and 1 of both pairs
    effect = results.effect("head_z", "logit_diff", "denoise", align="start")
    assert np.isnan(effect[:, :, :2]).all()
    assert effect[1, 1, 2] == 0.25


def test_estimates_do_not_count_as_measured(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr")
    store = Store.open(tmp_path / "r.zarr", "r+")
    values, status = hand_made()
    status[status == Status.EXACT] = Status.ESTIMATED
    for block in blocks(GRID):
        region = block.region(GRID)
        store.write_block(block, {"logit_diff": values[region]}, {"logit_diff": status[region]})
    assert np.isnan(results.effect("head_z", "logit_diff", align="start")[1, 0, 1])


def test_to_xarray_renames_and_computes_effects(results: Results) -> None:
    ds = results.to_xarray("head_z")
    assert set(ds.data_vars) == {"logit_diff", "logit_diff_status", "logit_diff_effect"}
    assert ds.logit_diff.dims == ("direction", "pair", "layer", "head", "position")
    at = {"layer": 1, "head": 0, "position": 1}
    assert float(ds.logit_diff.sel(direction="denoise", pair=0, **at)) == 3.0
    effect = ds.logit_diff_effect.sel(**at)
    assert effect.sel(direction="denoise").values.tolist() == [0.75, 1.0]
    assert effect.sel(direction="noise").values.tolist() == [0.75, 0.0]
    whole = ds.logit_diff_effect.values
    assert whole.shape == (2, 2, 2, 2, 3)
    picked = ds.logit_diff_effect[::-1, 1, [1, 0], :, [2, 1]].values
    np.testing.assert_array_equal(picked, whole[::-1, 1][:, [1, 0]][:, :, :, [2, 1]])


@pytest.mark.parametrize("name", ["head_z", "mlp_out", "embed", "sets"])
def test_named_dimensions_stay(tmp_path: Path, name: str) -> None:
    """With one pair, layer, head and position, too, so that nothing has to ask how many it has."""
    hf_model = FAMILIES["llama"].build(1, num_attention_heads=1, num_key_value_heads=1)
    results = ps.sweep(
        ps.wrap(hf_model, Letters()),
        [Pair((5, 6, 7), (5, 1, 7), (2,), (3,))],
        components=["head_z", "mlp_out", "embed"],
        sets={"one": ["mlp_out.0@1"]},
        positions=[1],
        out=tmp_path / "r",
    )
    ds = results.to_xarray(name)
    unit = ["head"] if name == "head_z" else []
    named = ["pair", "set"] if name == "sets" else ["pair", "layer", *unit, "position"]
    for array in ds.data_vars.values():
        assert list(array.dims) == named
        assert set(array.shape) == {1}
    assert set(ds.coords) >= set(named)
    assert "unit" not in ds.coords
    effect = results.effect(name, "logit_diff", "denoise")
    assert ds.logit_diff_effect.mean("pair").values.ravel() == pytest.approx(effect.values.ravel())
    squeezed = results.to_xarray(name, squeeze=True)
    assert all(array.dims == () for array in squeezed.data_vars.values())
    assert squeezed.pair == 0
    frame = results.to_frame().query("component == @name")
    assert {"pair", "layer", "unit", "position"} <= set(frame.columns)
    assert len(frame) == 1


def test_what_the_sweep_asked_several_of_stays(tmp_path: Path) -> None:
    results = ps.sweep(
        ps.wrap(FAMILIES["llama"].build(1), Letters()),
        [Pair((5, 6, 7), (5, 1, 7), (2,), (3,))],
        components=["mlp_out"],
        corrupt={"gaussian": {"sigma": [1, 2], "samples": 2}},
        direction="both",
        out=tmp_path / "r",
    )
    dims = ("direction", "source", "sample", "pair", "layer", "position")
    assert results.to_xarray("mlp_out").logit_diff.dims == dims
    squeezed = results.to_xarray("mlp_out", squeeze=True)
    assert squeezed.logit_diff.dims == ("direction", "source", "sample", "position")


def test_to_xarray_reads_only_what_is_used(results: Results) -> None:
    """Damage in pair 1 does not hinder opening, nor the effects of pair 0."""
    for file in (results.path / "head_z" / "logit_diff" / "c").rglob("*"):
        if file.is_file() and file.relative_to(results.path).parts[6] == "1":
            file.write_bytes(file.read_bytes()[:-3])
    ds = results.to_xarray("head_z")
    effect = ds.logit_diff_effect.sel(direction="denoise", layer=1, head=0, position=1)
    assert float(effect.sel(pair=0)) == 0.75
    with pytest.raises(BadInput, match="cannot read"):
        _ = effect.sel(pair=1).values
    with pytest.raises(BadInput, match="cannot read"):
        results.to_frame()


@pytest.fixture
def without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "find_spec", lambda _: None)


@pytest.mark.usefixtures("without_dask")
def test_to_xarray_without_dask(results: Results) -> None:
    ds = results.to_xarray("head_z")
    assert ds.chunks == {}
    test_to_xarray_renames_and_computes_effects(results)
    test_to_xarray_reads_only_what_is_used(results)


def test_to_xarray_with_dask_has_the_chunks_of_the_store(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task reads one chunk, of which there are as many as on the disk; workers get copies."""
    pytest.importorskip("dask")
    ds = results.to_xarray("head_z")
    chunks = {"direction": (1, 1), "pair": (1, 1), "layer": (2,), "head": (2,), "position": (2, 1)}
    assert dict(ds.chunks) == chunks
    whole = {name: found.values for name, found in ds.items()}
    read: list[tuple[str, tuple[slice, ...]]] = []
    of_store = Store.read

    def seen(self: Store, name: str, region: tuple[slice, ...]) -> np.ndarray:
        read.append((name, region))
        return of_store(self, name, region)

    monkeypatch.setattr(Store, "read", seen)
    copy = pickle.loads(pickle.dumps(ds))
    again = copy.isel(direction=0, pair=1, position=[0, 1])
    assert read == []
    np.testing.assert_array_equal(
        again.logit_diff_effect, whole["logit_diff_effect"][0, 1, ..., :2]
    )
    assert sorted(name for name, _ in read) == ["head_z/logit_diff", "head_z/logit_diff_status"]
    for _, region in read:
        touched = np.zeros(GRID.shape, bool)
        touched[region] = True
        assert touched[0, 0, 0, 1, :, :, :2].all()
        assert touched.sum() == 8


def test_to_frame_is_tidy(results: Results) -> None:
    frame = results.to_frame()
    assert list(frame.columns) == [
        "component", "direction", "source", "sample", "pair", "layer", "unit", "position", "token",
        "logit_diff", "logit_diff_effect", "logit_diff_status",
    ]  # fmt: skip
    assert len(frame) == 2 * (12 + 8)
    row = frame.query("pair == 0 and layer == 1 and unit == 0 and position == 1")
    row = row.set_index("direction")
    assert row.loc["denoise", "token"] == " t1"  # the destination run is the corrupt one
    assert row.loc["noise", "token"] == " t6"
    assert row.loc["denoise", "logit_diff"] == 3.0
    assert row.loc["denoise", "logit_diff_effect"] == 0.75
    assert row.loc["noise", "logit_diff_effect"] == 0.75
    assert row.loc["denoise", "logit_diff_status"] == "exact"
    counts = frame.logit_diff_status.value_counts()
    assert (counts["exact"], counts["not_finite"], counts["structural"]) == (4, 1, 35)


def test_parquet_round_trip(results: Results, tmp_path: Path) -> None:
    results.export(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    frame = results.to_frame()
    pd.testing.assert_frame_equal(back, frame, check_dtype=False, check_categorical=False)
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert [str(schema.field(n).type) for n in ("pair", "unit", "position")] == ["int32"] * 3
    assert str(schema.field("logit_diff").type) == "float"
    assert str(schema.field("logit_diff_effect").type) == "double"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.zarr", "t.parquet"]
    with pytest.raises(BadInput, match=r"cannot write .*there is no such folder; make it"):
        results.export(tmp_path / "nowhere" / "t.parquet")


def test_tables_have_types(results: Results, tmp_path: Path) -> None:
    """Names are categories, numbers have few bytes, text is text: nothing is a Python object."""
    results.export(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    expected = {
        **dict.fromkeys(("component", "direction", "source"), "category"),
        **dict.fromkeys(("sample", "pair", "layer", "unit", "position"), "int32"),
        "token": "str",
        "logit_diff": "float32",
        "logit_diff_effect": "float64",
        "logit_diff_status": "category",
    }
    assert {name: str(dtype) for name, dtype in back.dtypes.items()} == expected
    table = results.to_frame()
    said = {
        name: str(dtype).lower() for name, dtype in table.dtypes.items()
    }  # Int32: may be missing
    assert said == expected
    cells = ["direction", "source", "sample", "pair", "layer", "unit", "position"]
    assert not back.duplicated(["component", *cells]).any()


def test_the_arrays_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines run, on results with a head 9 in layer 9."""
    grid = Grid("head_z", ("denoise",), 2, 10, 10, (0, 1, 2), 2, 10, 3)
    attrs = {"spec": {"model": "tiny"}, "model": "tiny", "sources": SOURCES}
    path = tmp_path / "ioi.zarr"
    pairs = [replace(pair, labels={"S": 0, "END": len(pair) - 1}) for pair in PAIRS]
    store = Store.create(path, [grid], ["logit_diff"], pairs, str, attrs, "float32")
    base = np.array([CLEAN, CORRUPT])
    store.write_baseline(0, 0, range(2), {"logit_diff": base}, {"logit_diff": base * 0})
    values = np.broadcast_to(base[1][:, None, None, None], grid.shape).copy()
    values[0, 0, 0, 0, 9, 9, 2] += 1
    status = np.full(grid.shape, Status.EXACT, np.uint8)
    store.write_block(blocks(grid)[0], {"logit_diff": values}, {"logit_diff": status})
    patchsweep.results.open(path).export(tmp_path / "ioi.parquet")
    section = README.read_text("utf-8").partition("### Use the arrays")[2].partition("\n[")[0]
    lines = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in lines:
        exec(block, names)
    assert names["found"].tolist() == [0.25, 0.0]
    assert names["table"]["logit_diff_effect"].max() == 0.25
    first = names["best"].iloc[0]
    assert (first.layer, first["head"], first.position) == (9, 9, "END")
    assert names["at_the_end"][9, 9] == first.effect > 0


def test_labels_no_units_and_nothing_done(tmp_path: Path) -> None:
    grid = Grid("mlp_out", ("denoise",), 2, 2, 1, ("END",), 2, 1, 1)
    store = Store.create(
        tmp_path / "r.zarr",
        [grid],
        ["prob"],
        PAIRS,
        lambda t: f" t{t}",
        {"sources": SOURCES},
        "float64",
    )
    results = patchsweep.results.open(str(tmp_path / "r.zarr"))
    assert len(results.to_frame()) == 0
    results.export(tmp_path / "empty.parquet")
    assert len(pd.read_parquet(tmp_path / "empty.parquet")) == 0
    assert results.top("mlp_out", "prob", "denoise").empty
    assert results.detections("mlp_out", "prob", "denoise").empty
    base = np.array([[1.0, 1.0], [0.0, 0.0]])
    store.write_baseline(0, 0, range(2), {"prob": base}, {"prob": base * 0})
    shape = (1, 1, 1, 2, 2, 1, 1)
    store.write_block(
        blocks(grid)[0], {"prob": np.full(shape, 0.5)}, {"prob": np.ones(shape, np.uint8)}
    )
    frame = results.to_frame()
    assert frame["unit"].isna().all()
    assert frame["position"].tolist() == ["END"] * 4
    assert frame["token"].tolist() == [" t7", " t7", " t1", " t1"]  # each pair's own END
    assert frame["prob_effect"].tolist() == [0.5] * 4
    ds = results.to_xarray("mlp_out")
    assert ds.prob.dims == ("pair", "layer", "position")
    assert "unit" not in ds.coords
    results.export(tmp_path / "t.parquet")
    assert str(pq.read_schema(tmp_path / "t.parquet").field("position").type) == "string"


def test_top_and_detections(results: Results) -> None:
    top = results.top("head_z", "logit_diff", "denoise", 2, align="start")
    best, second = top.itertuples(index=False)
    assert (best.layer, best.head, best.position, best.token) == (1, 0, 1, " t6/ t1")
    assert best.patched == 2.5  # mean of 3 and 2
    assert best.effect == pytest.approx(0.8, rel=1e-15)
    assert (second.layer, second.head, second.position, second.token) == (1, 1, 2, " t7")
    # Effects 0.8, 0.25 and ten zeros: mean 0.0875, SD 0.2257, so only 0.8 is beyond 2 SD.
    found = results.detections("head_z", "logit_diff", "denoise", align="start")
    assert list(found.itertuples(index=False)) == [best]
    # 0.25 is 0.72 SD from the mean.
    assert len(results.detections("head_z", "logit_diff", sd=0.7, align="start")) == 2
    assert len(results.detections("head_z", "logit_diff", sd=0.75, align="start")) == 1


def test_warnings_name_what_is_wrong(tmp_path: Path) -> None:
    results = make(tmp_path / "a.zarr", skip=(1, 5))
    assert not results.complete
    assert results.warnings() == [
        "head_z: 2 of 8 blocks not done; continue with --resume",
        "head_z: logit_diff is not finite in 1 cell; try dtype: float32, half precision overflows",
        "2 pairs: intervals over them are wide; 20 or more are usual",
        "head_z: matter when denoised, not when noised (parts of an OR, or backed up): 1.0@-1; "
        "do not judge them by one direction alone",
    ]
    small = make(tmp_path / "b.zarr", clean=(4.0, 1.1))  # 0.1 against 4
    assert small.complete
    assert small.warnings()[1] == (
        "logit_diff: |clean − corrupt| is below 5% of the largest in pair 1, whose own effects are "
        "unreliable; leave those pairs out, or read effects over pairs only"
    )


def test_a_zero_denominator_is_nan_not_infinite(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", clean=(0.0, 1.0))
    assert np.isnan(results.effect("head_z", "logit_diff", "denoise")).all()
    assert results.to_frame()["logit_diff_effect"].isna().all()
    assert any("in pair 0, 1" in line for line in results.warnings())


def test_unknown_names_list_the_known(results: Results) -> None:
    with pytest.raises(BadInput, match="no component 'mlp' in these results: use one of head_z"):
        results.to_xarray("mlp")
    with pytest.raises(BadInput, match=r"no metric 'prob' .* logit_diff"):
        results.effect("head_z", "prob", "denoise")
    with pytest.raises(BadInput, match=r"no direction 'both' .* denoise, noise"):
        results.top("head_z", "logit_diff", "both")
