"""Edge attribution against its definition edge by edge, and against attribution of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from accelerate import disk_offload
from rich.console import Console

import patchsweep as ps
from estimates import built, changes, estimated, linear_model, logit_diff, runs
from inputs import Letters, three, unequal
from oracle import edges as oracle
from oracle.families import FAMILIES
from patchsweep import attribution
from patchsweep.engine.planning import plan_sweep
from patchsweep.engine.prepare import prepare
from patchsweep.errors import BadInput
from patchsweep.model.model import dimensions_of
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import take_apart
from patchsweep.plan import edges
from patchsweep.report.terminal import show
from patchsweep.sites import Node
from patchsweep.spec import parse_settings
from tiny import arrays

EXACT = 1e-9


def scored(
    hf_model: Any,
    pairs: Sequence[Pair],
    steps: int = 1,
    *,
    part: range | None = None,
    budget: int = 4000,
    number: int = 0,
    **settings: Any,
) -> Any:
    """Scores by metric column, [direction, pair, sender, receiver]."""
    given = parse_settings({"components": ["head_z"], "direction": "both", **settings})
    model = ps.wrap(hf_model, Letters())
    plan = plan_sweep(model.dimensions, pairs, given, model.device, budget)
    part = part or range(len(pairs))
    with attention_is(hf_model):
        lengths = [len(tokens) for p in pairs for tokens in (p.clean, p.corrupt or p.clean)]
        forward = take_apart(hf_model, max(lengths), min(lengths))
        values = prepare(forward, plan, given, model.tokenizer, None)
        return attribution.score_edges(
            forward, plan, part, given.metrics, values, steps, source=number
        )


def key(node: Node) -> oracle.Node:
    return node.component, node.layer or 0, node.unit or 0


EVERY = [(name, 1) for name in ("llama", "gpt2", "gemma2", "qwen3", "gpt_neox")]


@pytest.mark.parametrize(("name", "steps"), [*EVERY, ("gemma2", 2), ("gpt_neox", 3)])
def test_every_edge(name: str, steps: int) -> None:
    """Of grouped queries, post-norms and soft caps, query norms, and parallel blocks."""
    hf_model, family = built(name)
    pairs = three()[2:]
    got = scored(hf_model, pairs, steps)["logit_diff"]
    d = dimensions_of(hf_model)
    senders, receivers = edges.senders(d), edges.receivers(d)
    assert got.shape == (2, 1, len(senders), len(receivers))
    for number, direction in enumerate(("denoise", "noise")):
        if steps > 1 and direction == "noise":
            continue  # as the other
        dst, src = runs(pairs[0], direction)
        out = oracle.outputs(hf_model, family, dst, src)
        assert {*map(key, senders)} == out.keys()
        for column, receiver in enumerate(receivers):
            slope = sum(
                oracle.slope(
                    hf_model,
                    family,
                    dst,
                    logit_diff(pairs[0]),
                    key(receiver),
                    step / steps * out["embed", 0, 0],
                )
                for step in range(steps)
            )
            for row, sender in enumerate(senders):
                want = float((out[key(sender)] * slope).sum() / steps)
                if not oracle.exists(key(sender), key(receiver), family.parallel):
                    want = np.nan
                edge = f"{sender}->{receiver}"
                np.testing.assert_allclose(
                    got[number, 0, row, column], want, rtol=0, atol=EXACT, err_msg=edge
                )
    assert np.nanmax(np.abs(got)) > 1e-3


def senders_summed(found: Any) -> Any:
    """[direction, pair, sender]"""
    return np.nansum(found, -1)


def attribution_of_nodes(
    hf_model: Any, pairs: Sequence[Pair], column: str = "logit_diff", **given: Any
) -> Any:
    """Attribution patching of every sender over all positions, [direction, pair, sender]."""
    names = ("resid_pre", "head_z", "mlp_out")
    nodes = estimated(hf_model, pairs, dict.fromkeys(names, "atp"), **given)
    stream, z, mlp = (np.nansum(changes(nodes, name, column), -1) for name in names)
    by_layer = np.concatenate([z, mlp], -1)
    found = np.concatenate([stream[:, :, 0], by_layer.reshape(*z.shape[:2], -1)], -1)
    which = {"denoise": slice(0, 1), "noise": slice(1, 2)}
    return found[which.get(given.get("direction", "both"), slice(None))]


SUMMED = ("llama", "gpt_neox_sequential", "olmo2", "granite", "cohere", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("name", SUMMED)
def test_the_edges_of_a_sender_add_up_to_the_node(name: str) -> None:
    """Whatever the family: the residual stream is all that passes on what a sender writes."""
    hf_model, family = built(name)
    pairs = three()
    got = senders_summed(scored(hf_model, pairs)["logit_diff"])
    want = attribution_of_nodes(hf_model, pairs)
    # Some families compute in float32 inside.
    np.testing.assert_allclose(got, want, rtol=0, atol=max(EXACT, family.tolerance / 10))


def test_other_sources_and_alignments() -> None:
    """Noise, other pairs' prompts, and positions that an alignment moves or leaves out."""
    hf_model = built("llama")[0]
    rng = np.random.default_rng(3)
    for pairs, given in (
        ([*three(), *three(8)], {"source": ["second", "resample"], "direction": "noise"}),
        (three(), {"corrupt": {"gaussian": {"sigma": [1, 3], "tokens": [1, -2]}}}),
        ([unequal(rng, 6, 2), unequal(rng, 7, 1)], {}),
    ):
        number = 1 if given else 0
        got = scored(hf_model, pairs, number=number, **given)["logit_diff"]
        want = attribution_of_nodes(hf_model, pairs, number=number, **given)
        np.testing.assert_allclose(senders_summed(got), want, rtol=0, atol=EXACT)
        assert np.abs(want).max() > 1e-3


def spread(logits: torch.Tensor, _: Any) -> torch.Tensor:
    """A user's metric."""
    return logits.max(-1).values - logits.min(-1).values


def test_every_metric() -> None:
    hf_model = built("gemma2")[0]
    pairs = three()[:2]
    given: dict[str, Any] = {
        "direction": "denoise",
        "metrics": [
            "logprob",
            "prob",
            "kl",
            {"callable": {"path": "test_edges:spread"}},
            {"attention": {"layer": 1, "head": 1, "query": -1, "key": 1}},
            {"neuron": {"layer": 1, "neuron": 3, "position": -1}},
        ],
    }
    found = scored(hf_model, pairs, **given)
    assert len(found) == 6
    for column, scores in found.items():
        want = attribution_of_nodes(hf_model, pairs, column, **given)
        np.testing.assert_allclose(senders_summed(scores), want, rtol=0, atol=EXACT, err_msg=column)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_linear_tail(steps: int) -> None:
    """Where logits are linear in the residual stream, what all senders together change in them is
    the whole change of the metric, wherever the gradient is taken."""
    hf_model = FAMILIES["gpt2"].build(3, 1)
    hf_model.transformer.ln_f.forward = lambda x: x  # type: ignore[method-assign]
    pairs = three()
    scores = scored(hf_model, pairs, steps)["logit_diff"]
    how = {"resid_post": "atp"}
    nodes = estimated(hf_model, pairs, how, positions="all")
    clean, other = nodes.baseline["logit_diff"]
    into_logits = scores[..., -1].sum(-1)
    np.testing.assert_allclose(into_logits, [clean - other, other - clean], rtol=0, atol=EXACT)
    last = changes(nodes, "resid_post")[:, :, -1, 0, 0]
    np.testing.assert_allclose(into_logits, last, rtol=0, atol=EXACT)


def test_a_linear_model() -> None:
    """There the gradient is the same everywhere, so that more steps change nothing; and the edges
    from the embedding add up to the change of the metric."""
    hf_model, pairs = linear_model(), three()
    one, many = (scored(hf_model, pairs, steps)["logit_diff"] for steps in (1, 4))
    np.testing.assert_allclose(one, many, rtol=0, atol=EXACT)
    clean, other = estimated(hf_model, pairs, {"embed": "atp"}).baseline["logit_diff"]
    embedding = senders_summed(one)[:, :, 0]
    np.testing.assert_allclose(embedding, [clean - other, other - clean], rtol=0, atol=EXACT)


def test_neither_tiles_nor_ranges_of_pairs_matter() -> None:
    hf_model, pairs = built("qwen3")[0], three()
    whole = scored(hf_model, pairs, 2)["logit_diff"]
    small = scored(hf_model, pairs, 2, budget=60)["logit_diff"]
    np.testing.assert_allclose(small, whole, rtol=0, atol=EXACT)
    part = scored(hf_model, pairs, 2, part=range(1, 3))["logit_diff"]
    np.testing.assert_allclose(part, whole[:, 1:], rtol=0, atol=EXACT)


def test_divergences_need_steps(tmp_path: Path) -> None:
    """KL from the clean run has no gradient there, but on the way from it."""
    hf_model, pairs = built("llama")[0], three()[:1]
    given: dict[str, Any] = {"metrics": ["kl"], "direction": "noise"}
    with pytest.raises(BadInput, match="kl cannot be estimated in direction noise"):
        scored(hf_model, pairs, **given)
    assert np.nanmax(np.abs(scored(hf_model, pairs, 2, **given)["kl"])) > 1e-3
    found = sweep(tmp_path / "r", edges={"eap_ig": {"steps": 2}}, **given)
    assert np.isfinite(found.edges("kl", "noise")).any()


def test_what_edges_do_not_tell(tmp_path: Path) -> None:
    """A metric that reads the residual stream itself would go unnoticed: it is refused."""
    np.save(tmp_path / "probe.npy", np.arange(48.0))
    where = {"layer": 1, "position": -1, "file": str(tmp_path / "probe.npy")}
    hf_model = built("llama")[0]
    metrics = [{"probe": {"component": "resid_post", **where}}]
    with pytest.raises(BadInput, match="edges: probe_resid_post_1_-1 depends on the residual"):
        scored(hf_model, three()[:1], metrics=metrics)
    scored(hf_model, three()[:1], metrics=[{"probe": {"component": "mlp_out", **where}}])


def test_models_larger_than_the_device(tmp_path: Path) -> None:
    """Weights that hooks bring in, and put away again: the same scores."""
    hf_model = FAMILIES["gemma2"].build(3, 1)
    whole = scored(hf_model, three())["logit_diff"]
    disk_offload(hf_model, str(tmp_path), torch.device("cpu"))
    found = scored(hf_model, three())["logit_diff"]
    np.testing.assert_array_equal(whole, found)
    assert all(p.is_meta for p in hf_model.parameters())


def test_half_precision() -> None:
    """numpy has no bfloat16: scores are float32."""
    hf_model = FAMILIES["gemma2"].build(3, 1, dtype=torch.bfloat16)
    scores = scored(hf_model, three())["logit_diff"]
    assert scores.dtype == np.float32
    want = attribution_of_nodes(hf_model, three())
    assert np.corrcoef(senders_summed(scores).ravel(), want.ravel())[0, 1] > 0.99


def test_nodes_are_written_as_sites_are() -> None:
    d = dimensions_of(built("llama")[0])
    texts = [str(node) for node in (*edges.senders(d)[:8], *edges.receivers(d)[5:12])]
    assert " ".join(texts) == (
        "embed head_z.0.0 head_z.0.1 head_z.0.2 head_z.0.3 head_z.0.4 head_z.0.5 mlp_out.0 "
        "head_q.0.5 head_k.0.0 head_k.0.1 head_v.0.0 head_v.0.1 mlp_in.0 head_q.1.0"
    )


# Beside the results of a sweep.


def sweep(out: Path, name: str = "llama", **settings: Any) -> Any:
    given = {"components": ["mlp_out"], "positions": "all", "direction": "both", "edges": "eap"}
    given |= {"token_budget": 60, **settings}
    return ps.sweep(ps.wrap(built(name)[0], Letters()), three(), out=out, **given)


@pytest.mark.parametrize("how", ["eap", {"eap_ig": {"steps": 2}}])
def test_what_is_stored_is_what_was_scored(how: Any, tmp_path: Path) -> None:
    found = sweep(tmp_path / "r", edges=how)
    want = scored(built("llama")[0], three(), 1 if how == "eap" else 2)["logit_diff"]
    ds = xr.open_zarr(tmp_path / "r", group="edges", consolidated=False)
    dims = ("direction", "source", "sample", "pair", "sender", "receiver")
    assert ds.logit_diff.dims == dims
    np.testing.assert_allclose(ds.logit_diff.values[:, 0, 0], want, rtol=0, atol=1e-12)
    text = "eap" if how == "eap" else "eap_ig, 2 steps"
    assert ds.logit_diff.attrs["approximation"] == f"edge attribution patching ({text})"
    mean = found.edges("logit_diff", "noise")
    assert mean.attrs == ds.logit_diff.attrs
    np.testing.assert_allclose(mean.values, want[1].mean(0), rtol=0, atol=1e-12)
    one = float(mean.sel(sender="head_z.0.3", receiver="head_k.2.1"))
    best = found.top_edges("logit_diff", "noise", 3000)
    assert dict(best)["head_z.0.3->head_k.2.1"] == one
    assert len(best) == np.isfinite(want[1, 0]).sum() == len(dict(best))
    assert best[0][1] in (np.nanmax(mean), np.nanmin(mean))
    console = Console(file=StringIO(), width=80)
    show(found, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"by edge attribution patching ({text})" in " ".join(shown.split())
    assert shown.count("->") == 10
    assert best[0][0] in shown


def test_exact_results_stay_the_same(tmp_path: Path) -> None:
    sweep(tmp_path / "with")
    without = sweep(tmp_path / "without", edges=None)
    both, exact = arrays(tmp_path / "with"), arrays(tmp_path / "without")
    assert {name: both[name] for name in exact} == exact
    added = {n for n in both.keys() - exact.keys() if not n.startswith("edges/")}
    assert added == {"completion/edges", "completion/edges_split"}
    with pytest.raises(BadInput, match="these results have no edges: add edges: eap"):
        without.edges("logit_diff", "noise")


def test_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted sweep scores the pairs that are missing, and no others."""
    sweep(tmp_path / "whole")
    score, asked = attribution.score_edges, list[range]()

    def one_pair(forward: Any, plan: Any, pairs: range, *args: Any, **more: Any) -> Any:
        if asked == [range(1)] * 2:  # tried, then scored
            raise KeyboardInterrupt
        asked.append(pairs)
        return score(forward, plan, pairs, *args, **more)

    monkeypatch.setattr("patchsweep.attribution.sweep.score_edges", one_pair)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "r")
    found = ps.open(tmp_path / "r")
    assert found.store.scored().tolist() == [[[True, False, False]]]
    assert found.warnings()[0].endswith("edges of 2 pairs not scored; continue with --resume")
    assert np.isfinite(found.edges("logit_diff", "noise")).any()
    asked.append(range(0))
    sweep(tmp_path / "r", resume=True)
    assert asked[3:] == [range(1, 2), range(2, 3)]
    assert arrays(tmp_path / "r") == arrays(tmp_path / "whole")
    for other in (None, "eap_ig"):
        with pytest.raises(BadInput, match=r"another sweep .*other scores of edges"):
            sweep(tmp_path / "r", resume=True, edges=other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edges": 3}, "edges: 3 is not one way to score edges"),
        ({"edges": "acdc"}, "edges: unknown scores 'acdc': use eap, eap_ig or exact"),
        ({"edges": {"eap": {"steps": 3}}}, "edges: eap has no options: write eap"),
        ({"edges": {"eap_ig": {"steps": 0}}}, "edges: eap_ig: steps: should be greater"),
        ({"metrics": ["rank"]}, "edges: rank cannot be estimated: it is a count"),
        ({"metrics": ["kl"]}, "edges: kl cannot be estimated in direction noise"),
        ({"source": "zero", "direction": "noise"}, "edges: source zero has no run"),
        (
            {"source": ["other", {"mean": {"prompts": "clean"}}], "direction": "noise"},
            "edges: source mean has no run",
        ),
        ({"backend": "nnsight"}, r"scores of edges are not made through nnsight \(it is asked"),
    ],
)
def test_what_cannot_be_scored(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        sweep(tmp_path / "r", **change)
    assert list(tmp_path.iterdir()) == []


def test_the_setting_survives_a_dump() -> None:
    for given in (None, "eap", {"eap_ig": {"steps": 7}}):
        said = parse_settings({"components": ["head_z"], "edges": given})
        assert said.model_dump(mode="json")["edges"] == given
        assert parse_settings(said.model_dump(mode="json")) == said
    assert parse_settings({"components": ["head_z"], "edges": "eap_ig"}).edges.steps == 5


def test_a_trained_model(smollm2: ps.Model) -> None:
    """On SmolLM2 edges add up to their nodes in float32 as well."""
    texts = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
    pairs = [ps.make_pair(smollm2.tokenizer, *texts)]
    scores = scored(smollm2.hf_model, pairs, direction="denoise")["logit_diff"]
    want = attribution_of_nodes(smollm2.hf_model, pairs, direction="denoise")
    got = senders_summed(scores)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
