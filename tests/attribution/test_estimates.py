"""Estimates of a sweep: what is stored, refused, resumed and shown."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

import patchsweep as ps
from estimates import built, estimated, text
from inputs import Letters, three
from patchsweep import attribution
from patchsweep.backends import choice as backends
from patchsweep.errors import BadInput, NotOnWavefront
from patchsweep.pairs import Pair
from patchsweep.sites import Status
from patchsweep.spec import parse_settings, parse_spec
from patchsweep.statistics.uncertainty import agreement
from tiny import arrays

COMPONENTS = ["head_z", "head_k", "mlp_out"]
METRICS = ["logit_diff", "logprob"]
POSITIONS = [-1, -2, 3]


def sweep(out: Path, name: str = "llama", pairs: Sequence[Pair] = (), **settings: Any) -> Any:
    """A sweep whose pairs are estimated one by one."""
    given = {"components": COMPONENTS, "metrics": METRICS, "direction": "both"}
    given |= {"estimate": True, "positions": POSITIONS}
    model = ps.wrap(built(name)[0], Letters())
    return ps.sweep(model, pairs or three(), out=out, **{"token_budget": 60, **given, **settings})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_stored_is_what_was_estimated(name: str, tmp_path: Path) -> None:
    pairs = [*three(), *three(8)]
    given = {"source": ["other", {"resample": {"samples": 2}}], "direction": "noise"}
    given |= {"positions": POSITIONS}
    found = sweep(tmp_path / "r", name, pairs, **given)
    estimators = {c: attribution.DEFAULT[c] for c in COMPONENTS}
    assert found.attrs["estimators"] == estimators
    for number in range(2):
        want = estimated(built(name)[0], pairs, estimators, number=number, metrics=METRICS, **given)
        for component in COMPONENTS:
            for metric in METRICS:
                got = found.store.read(f"{component}/{metric}_estimate")
                assert got.shape == found.store.read(f"{component}/{metric}").shape
                np.testing.assert_allclose(
                    got[:, number, 0], want.values[component][metric][:, 0, 0], atol=1e-12
                )
    again = found.store.read("head_z/logit_diff_estimate")
    assert np.isnan(again[:, 0, 1]).all()  # the source has one sample
    assert np.isfinite(again[:, 1, 1]).any()
    assert not [line for line in found.warnings() if "estimates" in line]


def test_estimated_only(tmp_path: Path) -> None:
    """Nothing of an estimated component is run; the others are as they would be without it."""
    found = sweep(tmp_path / "with", estimate={"mlp_out": "atp"})
    exact = sweep(tmp_path / "without", estimate=False)
    for component in ("head_z", "head_k"):
        for kind in ("", "_status"):  # in other waves, so up to rounding
            both = [x.store.read(f"{component}/logprob{kind}") for x in (found, exact)]
            np.testing.assert_allclose(*both, rtol=0, atol=1e-12)
    before, now = (x.counts("mlp_out", "logprob") for x in (exact, found))
    assert now == {**before, Status.ESTIMATED: before[Status.EXACT], Status.EXACT: 0}
    status = found.store.read("mlp_out/logprob_status")
    assert np.isnan(found.store.read("mlp_out/logprob")[status == Status.ESTIMATED]).all()
    assert found.attrs["plan"]["estimated"] == now[Status.ESTIMATED]
    assert "mlp_out" not in found.attrs["joint"]
    # What is only estimated has no effect, and a reader is told so.
    effect = found.effect("mlp_out", "logit_diff", "denoise", align="start", min_pairs=1).values
    possible = (status == Status.ESTIMATED)[0].any((0, 1, 2))
    assert np.isnan(effect[possible]).all()
    assert (effect[~possible] == 0).all()
    assert "mlp_out, denoise: largest estimated effects on logit_diff" in text(found)
    size = np.abs(found.estimated_effect("mlp_out", "logit_diff", "denoise"))
    best = found.top("mlp_out", "logit_diff", "denoise", 1).effect.item()
    assert abs(best) == np.nanmax(size) > 0
    frame = found.to_frame()
    rows = frame[(frame.component == "mlp_out") & (frame.logit_diff_status == "estimated")]
    assert len(rows) == now[Status.ESTIMATED]
    assert rows.logit_diff.isna().all()
    assert rows.logit_diff_estimate.notna().all()
    assert frame[frame.component == "head_z"].logit_diff_estimate.isna().all()


def test_some_components_only(tmp_path: Path) -> None:
    found = sweep(tmp_path / "r", estimate={"mlp_out": "atp", "head_z": "ig"})
    assert found.attrs["estimators"] == {"mlp_out": "atp", "head_z": "ig"}
    ds = found.to_xarray("head_z")
    order = ["logit_diff", "logit_diff_effect", "logit_diff_status", "logit_diff_estimate"]
    assert list(ds.data_vars)[:4] == order
    assert ds.logit_diff_estimate.dims == ds.logit_diff.dims
    assert ds.logit_diff_estimate.attrs["approximation"] == "attribution patching (ig)"
    assert list(found.to_xarray("head_k").data_vars)[3:] == [
        f"logprob{kind}" for kind in ("", "_effect", "_status")
    ]
    with pytest.raises(BadInput, match="head_k has no estimates"):
        found.agreement("head_k", "logit_diff")


@pytest.mark.parametrize("how", ["atp", "atp_star"])
def test_agreement_is_over_the_cells_that_were_run(how: str, tmp_path: Path) -> None:
    prefilter = {"keep": "100%", "estimator": how}
    found = sweep(tmp_path / "r", components=["head_z"], estimate=False, prefilter=prefilter)
    exact, status, estimate = (
        found.store.read(f"head_z/logit_diff{kind}") for kind in ("", "_status", "_estimate")
    )
    clean, corrupt = found.baseline("logit_diff")
    at = np.stack([corrupt, clean])[..., None, None, None]
    ran = status == Status.EXACT
    x, y = (estimate - at)[ran], (exact - at)[ran]
    y = np.abs(y) if how == "atp_star" else y
    r = found.agreement("head_z", "logit_diff")
    assert r.cells == ran.sum() > 50
    np.testing.assert_allclose(r[:2], [pearsonr(x, y)[0], spearmanr(x, y)[0]], atol=1e-12)
    assert (
        f"{r.pearson:.3f}  {r.spearman:>8.3f}".split()
        == text(found).split(f"head_z     {how}", 1)[1].split()[1:3]
    )


def test_agreement_of_little() -> None:
    nan = np.nan
    assert agreement(np.arange(4.0), np.array([0, 2, 4, nan]))[2] == 3
    for x in ([1.0, 2.0, nan], [1.0, 1.0, 1.0]):
        r = agreement(np.array(x), np.array([1.0, 2.0, 3.0]))
        assert np.isnan(r[:2]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"estimate": 3}, "estimate: 3 names no estimates: use true"),
        ({"estimate": {}}, "names no estimates"),
        ({"estimate": {"head_z": 1}}, "names no estimates"),
        ({"estimate": "atpp"}, "estimate: unknown estimator 'atpp': use one of atp, "),
        ({"estimate": {"neuron": "atp"}}, "estimate: neuron is not patched: add it to components"),
        ({"estimate": {"head_k": "relp"}}, "estimate: relp cannot estimate head_k"),
        ({"metrics": ["rank"]}, "estimate: rank cannot be estimated: it is a count"),
        ({"metrics": [{"accuracy": {"k": 5}}]}, "estimate: accuracy_k5 cannot be estimated"),
        ({"metrics": ["kl"]}, "estimate: kl cannot be estimated in direction noise"),
        ({"components": [], "sets": {"a": ["head_z.1.0"]}}, "estimate: sets have no estimates"),
        ({"backend": "nnsight"}, r"estimates are not made through nnsight \(it is asked for\)"),
    ],
)
def test_what_cannot_be_estimated(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        sweep(tmp_path / "r", **change)
    assert list(tmp_path.iterdir()) == []


def test_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    spec = {"model": "not/there", "prompts": {"task": "ioi", "n": 1}, "out": str(tmp_path / "r")}
    given = {**spec, "components": ["head_z"], "metrics": ["rank"], "estimate": True}
    with pytest.raises(BadInput, match="estimate: rank cannot be estimated"):
        ps.run(parse_spec(given))


def test_a_model_that_the_wavefront_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise NotOnWavefront("its layers are not known")

    monkeypatch.setattr(backends, "take_apart", refuse)
    with pytest.raises(BadInput, match=r"not made through nnsight \(its layers are not known"):
        sweep(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def rounded(logits: Any, _: Any) -> Any:
    """A user's metric that has no gradient."""
    return logits.detach()[:, 0].round()


def test_a_function_without_gradient_replaces_nothing(tmp_path: Path) -> None:
    sweep(tmp_path / "r", estimate=False)
    before = arrays(tmp_path / "r")
    metrics = [{"callable": {"path": f"{__name__}:rounded"}}]
    with pytest.raises(BadInput, match="rounded cannot be estimated: its values have no gradient"):
        sweep(tmp_path / "r", metrics=metrics, overwrite=True)
    assert arrays(tmp_path / "r") == before


def test_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted sweep makes the estimates that are missing, and no others."""
    sweep(tmp_path / "whole")
    estimate, asked = attribution.estimate_pairs, list[range]()

    def one_pair(forward: Any, plan: Any, pairs: range, *args: Any, **more: Any) -> Any:
        if asked == [range(1)]:
            raise KeyboardInterrupt
        asked.append(pairs)
        return estimate(forward, plan, pairs, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attribution.sweep, "estimate_pairs", one_pair)
        sweep(tmp_path / "r")
    found = ps.open(tmp_path / "r")
    assert found.store.estimated().tolist() == [[[True, False, False]]]
    assert re.search("not done.*continue with --resume", found.warnings()[0])
    asked.clear()
    monkeypatch.setattr(attribution.sweep, "estimate_pairs", one_pair)
    asked.append(range(0))
    sweep(tmp_path / "r", resume=True)
    assert asked[1:] == [range(1, 2), range(2, 3)]
    assert arrays(tmp_path / "r") == arrays(tmp_path / "whole")
    for other in (False, "atp"):
        with pytest.raises(BadInput, match=r"another sweep .*other estimates"):
            sweep(tmp_path / "r", resume=True, estimate=other)


def test_results_without_any(tmp_path: Path) -> None:
    found = sweep(tmp_path / "r", estimate=False)
    assert found.store.estimators == {}
    assert "Pearson" not in text(found)
    assert "logit_diff_estimate" not in found.to_xarray("head_z")
    sweep(tmp_path / "r", estimate=False, resume=True)


def test_the_setting_survives_a_dump() -> None:
    for given in (False, True, "atp", {"head_z": "ig"}):
        said = parse_settings({"components": ["head_z"], "estimate": given})
        again = parse_settings(said.model_dump(mode="json"))
        assert again.estimate == given
        assert type(again.estimate) is type(given)


def test_a_pair_that_is_not_finite_leaves_the_others_alone() -> None:
    """Also a shorter one, which is padded beside it."""
    hf_model, pairs = copy.deepcopy(built("llama")[0]), three()[:2]
    used = {token for pair in pairs for token in (*pair.clean, *pair.corrupt)}
    bad = min(set(range(50)) - used)
    hf_model.get_input_embeddings().weight.data[bad] = torch.inf
    broken = replace(pairs[0], corrupt=(*pairs[0].corrupt[:-1], bad))
    how = {"head_z": "atp", "mlp_out": "relp"}
    whole, part = (
        estimated(hf_model, p, how, direction="denoise") for p in ([broken, pairs[1]], pairs[1:])
    )
    for name in how:
        both, one = (x.values[name]["logit_diff"] for x in (whole, part))
        assert not np.isfinite(both[0, ..., 0, :, :, :]).all()
        there = ~np.isnan(one[:, :, :, 0])
        wide = both[:, :, :, 1][..., : one.shape[-1]]
        np.testing.assert_allclose(wide[there], one[:, :, :, 0][there], atol=1e-9)
