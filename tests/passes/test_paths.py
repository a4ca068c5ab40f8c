"""Path patching against two full forwards per cell, with plain hooks; its cost; what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from test_exact_edges import aligned, place, two_pairs

import patchsweep as ps
from estimates import built, logit_diff, runs
from inputs import Letters
from oracle import paths as oracle
from oracle.families import EXACT
from patchsweep.engine.planning import plan_sweep
from patchsweep.report import plot, write_page
from patchsweep.sites import SENDERS, Status, parse_node
from patchsweep.spec import parse_settings
from tiny import arrays

READ = ["head_q.2.1", "head_k.1.0", "head_v.2.1", "mlp_in.2"]
PATHS: dict[str, dict[str, Any]] = {
    "logits": {"senders": "head_z", "receivers": ["logits"], "positions": ["END", -2]},
    "heads": {"senders": "head_z", "receivers": READ, "positions": "each"},
    "mlps": {"senders": "mlp_out", "receivers": ["mlp_in.1", "resid_pre.2"]},
    "stream": {"senders": "embed", "receivers": ["resid_pre.1", "head_q.2.0"]},
    "several": {
        "senders": ["head_z.0.1", "head_z.0.2", "mlp_out.0", "head_z.1.0", "mlp_out.1"],
        "receivers": ["mlp_in.1", *READ],
        "positions": {"both": ["S", -1]},
    },
}


def nodes_of(asked: Mapping[str, Any], layer: int, unit: int) -> list[tuple[str, int, int]]:
    given = asked["senders"]
    if isinstance(given, str):
        return [(given, layer, unit)]
    return [place(parse_node(text, SENDERS)) for text in given]


def sweep(name: str, through: str, out: Path, **more: Any) -> ps.Results:
    asked = {k: {**path, "through": through} for k, path in PATHS.items()}
    model = ps.wrap(built(name)[0], Letters())
    given = {"paths": asked, "direction": "both", "token_budget": 900, **more}
    return ps.sweep(model, two_pairs(), out=out, **given)


@pytest.mark.parametrize("through", ["nothing", "mlps"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "mistral", "granite", "qwen3_moe"])
def test_every_path(name: str, through: str, tmp_path: Path) -> None:
    hf_model, family = built(name)
    found, rng = sweep(name, through, tmp_path / "r"), np.random.default_rng(0)
    plan = plan_of(name, through)
    tolerance = max(family.tolerance, EXACT)
    for grid in found.components:
        asked = PATHS[grid.partition(".")[2]]
        read = [place(node) for node in plan.layouts.paths[grid].asked.receivers]
        table = plan.layouts.paths[grid].positions
        values, status = (
            found.store.read(f"{grid}/logit_diff{kind}")[:, 0, 0] for kind in ("", "_status")
        )
        cells = np.argwhere(status == Status.EXACT)
        still = np.argwhere(status == Status.STRUCTURAL)
        assert len(cells) > 2
        for d, i, layer, unit, entry in (*rng.permutation(cells)[:8], *rng.permutation(still)[:2]):
            pair, direction = plan.pairs[i], plan.directions[d]
            two = oracle.two(hf_model, family, *runs(pair, direction))
            positions = aligned(pair, direction, np.flatnonzero(table.members[i, entry]))
            senders = nodes_of(asked, layer, unit)
            logits, would_be = two.first(senders, positions, through)
            if read[0][0] != "logits":
                above = [r for r in read if any(two.below(s, r) for s in senders)]
                logits = two.second(above, list(positions), would_be)
            if direction == "denoise":
                logits = logits.roll(int(pair.read - pair.alignment[pair.read]), 0)
            want = float(logit_diff(pair)(logits, {}))
            got = values[d, i, layer, unit, entry]
            assert abs(got - want) <= tolerance, (grid, direction, i, layer, unit, entry, got, want)


def plan_of(name: str, through: str) -> Any:
    asked = {k: {**path, "through": through} for k, path in PATHS.items()}
    parsed = parse_settings({"paths": asked, "direction": "both", "token_budget": 900})
    dimensions = ps.wrap(built(name)[0], Letters()).dimensions
    return plan_sweep(dimensions, two_pairs(), parsed, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"senders": "head_q"}, "'head_q' is no component that sends: use embed, head_z, mlp_out"),
        ({"senders": ["head_z.1"]}, "sender 'head_z.1': write head_z.layer.head"),
        ({"receivers": ["head_z.1.1"]}, "'head_z.1.1' is no receiver: use one of head_q"),
        ({"receivers": ["logits", "mlp_in.1"]}, "logits is read behind all others: make it a"),
        ({"receivers": []}, "receivers: the list is empty: name at least one receiver"),
        ({"receivers": ["head_q.3.0"]}, "path 'a': head_q.3.0: no layer 3: use 0 to 2"),
        ({"receivers": ["head_k.1.2"]}, "path 'a': head_k.1.2: no unit 2: use 0 to 1"),
        ({"receivers": ["head_q.0.1"]}, "path 'a': no head_z lies below head_q.0.1: name a"),
        (
            {"senders": ["head_z.2.1", "head_z.0.1"], "receivers": ["head_q.1.1"]},
            "path 'a': head_z.2.1 lies below no receiver: leave it out",
        ),
        ({"through": "heads"}, "through: should be 'nothing' or 'mlps', and is 'heads'"),
        ({"positions": ["S2"]}, "unknown label 'S2': use one of END, S"),
    ],
)
def test_what_is_no_path(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"senders": "head_z", "receivers": ["mlp_in.1"], **change}
    model = ps.wrap(built("llama")[0], Letters())
    with pytest.raises(ps.BadInput, match=words):
        ps.sweep(model, two_pairs(), out=tmp_path / "r", paths={"a": given})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"source": "zero", "direction": "noise"}, "paths: source zero has no run"),
        ({"backend": "nnsight"}, r"paths are not run through nnsight \(it is asked for\)"),
        (
            {"metrics": [{"attention": {"layer": 0, "head": 1, "query": -1, "key": 0}}]},
            "path 'a': attention_0_1_-1_0 is read in layer 0, below all of its receivers",
        ),
        (
            {"metrics": [{"neuron": {"layer": 2, "neuron": 1, "position": -1}}]},
            "paths: neuron_2_1_-1 is read inside an MLP, where no path ends",
        ),
    ],
)
def test_what_paths_cannot_have(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"senders": "head_z", "receivers": ["mlp_in.1"]}
    model = ps.wrap(built("llama")[0], Letters())
    with pytest.raises(ps.BadInput, match=words):
        ps.sweep(model, two_pairs()[:1], out=tmp_path / "r", paths={"a": given}, **more)
    assert list(tmp_path.iterdir()) == []


def test_names_of_paths() -> None:
    for name in ("a.b", "a/b", "", "x" * 61):
        with pytest.raises(ps.BadInput, match=f"path '{name}': use letters, digits"):
            parse_settings({"paths": {name: PATHS["logits"]}})


def test_as_components_are_read(tmp_path: Path) -> None:
    """Shown, drawn and exported like these; beside them, and gone on with."""
    found = sweep("llama", "nothing", tmp_path / "r", components=["mlp_out"])
    names = ("mlp_out", "head_z.logits", "head_z.heads", "mlp_out.mlps", "embed.stream")
    assert found.components == (*names, "set.several")
    effect = found.effect("head_z.logits", "logit_diff", "noise")
    assert effect.dims == ("layer", "head", "position")
    assert effect.position.values.tolist() == ["END", "-2"]
    ds = xr.open_zarr(tmp_path / "r", group="head_z.heads", consolidated=False)
    assert ds.logit_diff.sizes["unit"] == 6
    assert set(found.to_frame().component) == {*found.components}
    assert "head_z.heads" in write_page(found, tmp_path / "page.html").read_text()
    assert len(plot(found, tmp_path / "figures")) > 5
    assert found.check().damages == ()
    before = arrays(tmp_path / "r")
    next((tmp_path / "r" / "completion" / "set.several" / "c").iterdir()).unlink()
    sweep("llama", "nothing", tmp_path / "r", components=["mlp_out"], resume=True)
    assert arrays(tmp_path / "r") == before
