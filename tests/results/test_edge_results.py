"""Exact edges in results: stored as they were run, read by name, gone on with, refused."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import patchsweep as ps
from edge_runs import ran
from inputs import Letters, three
from oracle.families import FAMILIES
from patchsweep.report import show, write_page
from patchsweep.sites import MEASURED, RUN, Status
from patchsweep.spec import parse_settings
from tiny import arrays

EACH = {"exact": {"positions": "each"}}


def model() -> Any:
    return FAMILIES["llama"].build(2)


def sweep(out: Path, edges: Any = "exact", pairs: int = 2, **settings: Any) -> ps.Results:
    given = {"components": ["mlp_out"], "positions": "all", "direction": "both", "edges": edges}
    given |= {"token_budget": 300, **settings}
    return ps.sweep(ps.wrap(model(), Letters()), three()[:pairs], out=out, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ps.Results:
    return sweep(tmp_path_factory.mktemp("edges") / "r", EACH)


def test_what_is_stored_is_what_was_run(whole: ps.Results) -> None:
    found = ran(model(), three()[:2], EACH, token_budget=300)
    ds = xr.open_zarr(whole.path, group="edges", consolidated=False)
    dims = ("direction", "source", "sample", "pair", "position", "receiver", "sender")
    assert ds.logit_diff.dims == ds.logit_diff_status.dims == dims
    np.testing.assert_array_equal(ds.logit_diff.values, found.values["logit_diff"])
    np.testing.assert_array_equal(ds.logit_diff_status.values, found.status["logit_diff"])
    assert ds.sender.values.tolist() == list(map(str, found.senders))
    assert ds.receiver.values.tolist() == list(map(str, found.receivers))
    changes = whole.edges("logit_diff", "noise")
    by_pair = np.ma.masked_invalid(found.changes()[1, 0, 0])
    want = by_pair.mean(0).filled(np.nan).swapaxes(1, 2)
    assert changes.dims == ("position", "sender", "receiver")
    np.testing.assert_allclose(changes.values, want, rtol=0, atol=1e-12)
    assert whole.check().damages == ()


def test_by_name(whole: ps.Results) -> None:
    changes = whole.edges("logit_diff", "noise")
    best = whole.top_edges("logit_diff", "noise", 9999)
    assert len(best) == len(dict(best)) == int(changes.notnull().sum())
    one = float(changes.sel(sender="head_z.0.3", receiver="head_k.1.1", position=4))
    assert dict(best)["head_z.0.3->head_k.1.1@4"] == one
    assert abs(best[0][1]) == float(abs(changes).max()) > 0
    assert np.isnan(changes.sel(sender="mlp_out.1", receiver="head_q.1.0")).all()  # no edge
    assert whole.components == ("mlp_out",)


def test_what_is_shown(whole: ps.Results, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=80)
    show(whole, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Edges, noise: largest changes of logit_diff" in " ".join(shown.split())
    best = whole.top_edges("logit_diff", "noise", 1)[0][0]
    assert best in shown
    page = write_page(whole, tmp_path / "page.html").read_text()
    assert best.replace(">", "&gt;") in page


def test_further_pairs(tmp_path: Path) -> None:
    """What is there keeps its bits."""
    given = {"positions": "all", "direction": "noise"}
    before = arrays(sweep(tmp_path / "r", pairs=1, **given).path)
    more = sweep(tmp_path / "r", pairs=3, append=True, **given)
    once = sweep(tmp_path / "once", pairs=3, **given)
    assert more.complete
    values = more.store.read("edges/logit_diff")
    np.testing.assert_allclose(values, once.store.read("edges/logit_diff"), rtol=0, atol=1e-12)
    first = values[:, :, :, :1]
    assert first.tobytes() == before["edges/logit_diff"]


def test_a_prefilter(tmp_path: Path) -> None:
    """The edges of highest scores are run, and some of the others, as if all were."""
    given = {"estimator": {"eap_ig": {"steps": 2}}, "keep": "10%", "audit": 9}
    some, all_of, scored = (
        sweep(tmp_path / str(i), edges)
        for i, edges in enumerate((given, "exact", given["estimator"]))
    )
    status, values = (
        some.store.read(f"edges/logit_diff{kind}")[:, 0, 0] for kind in ("_status", "")
    )
    ran, exact = np.isin(status, RUN), all_of.store.read("edges/logit_diff")[:, 0, 0]
    np.testing.assert_allclose(values[ran], exact[ran], rtol=0, atol=1e-12)
    whole = all_of.store.read("edges/logit_diff_status")[:, 0, 0]
    np.testing.assert_array_equal(whole == Status.EXACT, ran | (status == Status.ESTIMATED))
    np.testing.assert_array_equal(np.isnan(values), ~np.isin(status, MEASURED))
    assert int(ran.sum()) == some.attrs["plan"]["runs"] - 4 * 2  # but for those of mlp_out

    scores = scored.store.read("edges/logit_diff")[:, 0, 0]
    ends = some.baseline("logit_diff")[::-1, 0, 0][..., None, None]  # [direction, pair, ...]
    estimates = some.store.read("edges/logit_diff_estimate")[:, 0, 0, :, 0]
    np.testing.assert_allclose(estimates, scores.swapaxes(2, 3) + ends, rtol=0, atol=1e-12)
    possible = (whole[:, :, 0] == Status.EXACT).any(1)
    size = np.where(possible, np.abs(scores.sum(1)).swapaxes(1, 2), -1)
    for d, direction in enumerate(("denoise", "noise")):
        kept = some.store.read("choice/edges_status", (d, 0))[0] == Status.EXACT
        count = int(np.ceil(possible[d].sum() / 10))
        assert kept.sum() == count
        assert size[d][kept].min() == np.sort(size[d], None)[-count]
        verdict = some.audit("edges", "logit_diff", direction)
        assert verdict is not None
        assert [s.drawn for s in verdict.audit.strata] == [9, 9]
    assert some.agreement("edges", "logit_diff").cells == ran.sum()
    console = Console(file=StringIO(), width=400)
    show(some, console)
    assert "Edges, denoise: Prefilter, logit_diff: " in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edges": {"exact": {"through": "heads"}}}, "exact: through: should be 'nothing' or"),
        ({"edges": {"exact": {"positions": "END"}}}, r"write \[END\]|a list such as"),
        ({"edges": {"exact": {"positions": ["END"]}}}, "unknown label 'END'"),
        ({"edges": {"keep": "2%", "estimator": "acdc"}}, "unknown scores 'acdc'"),
        ({"edges": {"keep": "2%", "estimator": "exact"}}, "'exact' scores no edges: use eap"),
        ({"edges": {"keep": "0%"}}, "edges: keep: '0%' says nothing to keep"),
        ({"edges": {"keep": "2%"}, "metrics": ["rank"]}, "rank cannot be estimated"),
        ({"source": "zero", "direction": "noise"}, "edges: source zero has no run"),
        ({"backend": "nnsight"}, r"edges are not run through nnsight \(it is asked"),
        (
            {"metrics": [{"neuron": {"layer": 1, "neuron": 3, "position": -1}}]},
            "edges: neuron_1_3_-1 is read inside an MLP, where no edge ends",
        ),
        (
            {
                "metrics": [
                    {
                        "probe": {
                            "component": "resid_post",
                            "layer": 1,
                            "position": -1,
                            "file": "p.npy",
                        }
                    }
                ]
            },
            "edges: probe_resid_post_1_-1 is read in the residual stream, where no edge ends",
        ),
    ],
)
def test_what_cannot_be_run(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ps.BadInput, match=words):
        sweep(tmp_path / "r", **change)
    assert list(tmp_path.iterdir()) == []


def test_the_setting_survives_a_dump() -> None:
    chosen = {"estimator": {"eap_ig": {"steps": 3}}, "keep": "2%", "audit": 30}
    for given in ("exact", EACH, chosen, {"exact": {"positions": ["S2", -1], "through": "mlps"}}):
        said = parse_settings({"components": ["head_z"], "edges": given})
        assert parse_settings(said.model_dump(mode="json")) == said
    plain = parse_settings({"components": ["head_z"], "edges": "exact"})
    assert plain.model_dump(mode="json")["edges"] == "exact"
