"""The judge against the tests' own oracle, which finds activations by tables of module names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import patchsweep as ps
from oracle import heads, oracle
from oracle.cases import CLEAN, CORRUPT, LAST, build
from oracle.families import EVERY
from oracle.heads import HAS_UNITS, Patch
from patchsweep.judge import Edit, Judge, Prompt, Unseen
from patchsweep.judge.values import logit_metric
from patchsweep.spec import Metric

LAYER = 1
COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "neuron", "embed")
HEADS = ("head_q", "head_k", "head_v", "head_z", "head_pattern")


def tensors(*columns: int) -> list[torch.Tensor]:
    return [torch.tensor([n]) for n in columns]


@pytest.mark.parametrize("name", EVERY)
def test_patched_forwards(name: str) -> None:
    """Each component at one place, a whole logit vector at every position; recorded activations."""
    family = EVERY[name]
    model = family.build(3, seed=1)
    judge = Judge(model, CLEAN.ids, 3)
    clean, corrupt = Prompt(CLEAN.ids), Prompt(CORRUPT.ids)
    base = judge.plain(CORRUPT.ids)
    assert torch.equal(base, model(input_ids=torch.tensor([CORRUPT.ids])).logits[0])
    told = heads.activations(model, family, CLEAN)
    compared = 0
    for component in (*COMPONENTS, *HEADS):
        layer = 0 if component == "embed" else LAYER
        if (component, layer) not in told:  # the family has no such thing, or the oracle no way
            continue
        source = judge.run([clean], record=[(component, layer)])[1][component, layer][0]
        expected = told[component, layer].view(source.shape)
        if component in ("attn_out", "mlp_out"):  # the oracle has what the module returns
            expected = expected * family.residual_multiplier
        assert float((source - expected).abs().max()) <= family.tolerance, component
        for at, unit in ((LAST, 0), (LAST - 2, source.shape[1] - 1)):
            edit = Edit(component, layer, *tensors(unit, at), source[at, unit][None])
            got, _ = judge.run([corrupt, corrupt], [[edit], []])
            assert float((got[1] - base).abs().max()) <= family.tolerance
            patch = Patch(
                component, layer, unit if component in HAS_UNITS else None, {at: at}, CLEAN
            )
            want = heads.logits(model, family, CORRUPT, [patch])
            assert float((got[0] - want).abs().max()) <= family.tolerance, (component, at)
            compared += 1
    assert compared >= 12


def test_rows_and_edits_do_not_meet() -> None:
    """Of rows that go together each has its own edits, and is what it is alone."""
    case = build("llama")
    judge = Judge(case.model, CLEAN.ids, 3)
    edits = [
        [Edit("mlp_out", layer, *tensors(0, LAST), torch.ones(1, 48, dtype=torch.float64))]
        for layer in range(3)
    ]
    edits.append([e for some in edits for e in some])
    together, _ = judge.run([Prompt(CORRUPT.ids)] * 4, edits)
    judge.stackable = False
    alone, _ = judge.run([Prompt(CORRUPT.ids)] * 4, edits)
    assert float((together - alone).abs().max()) < 1e-12
    assert float((alone[0] - alone[3]).abs().max()) > 1e-3


def test_the_model_is_left_as_it_was() -> None:
    case = build("gemma2")
    before = {m: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in case.model.modules()}
    base = case.model(torch.tensor([CLEAN.ids])).logits
    judge = Judge(case.model, CLEAN.ids, 3)
    keys = [(c, 1) for c in (*COMPONENTS, *HEADS) if c != "embed"]
    judge.run([Prompt(CLEAN.ids)], record=keys)
    for module, (after, ahead) in before.items():
        assert dict(module._forward_hooks) == after
        assert dict(module._forward_pre_hooks) == ahead
    assert torch.equal(case.model(torch.tensor([CLEAN.ids])).logits, base)


@pytest.mark.parametrize("kind", ["bert", "granitemoeshared", "openai-gpt"])
def test_what_is_added_to_the_residual_stream(kind: str) -> None:
    """Behind norms, with shared experts: what is added makes up what is there."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
    more = {"n_embd": 32, "n_head": 4, "n_layer": 2, "num_local_experts": 4, "is_decoder": True}
    config = AutoConfig.for_model(kind, **sizes, **more, intermediate_size=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    judge = Judge(model, CLEAN.ids, 2)
    keys = [(c, 1) for c in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post")]
    pre, mid, attn, mlp, post = judge.run([Prompt(CLEAN.ids)], record=keys)[1].values()
    assert torch.allclose(pre + attn, mid, atol=1e-6)
    layer = judge.layers[1].module
    if kind == "granitemoeshared":
        assert torch.allclose(mid + mlp, post, atol=1e-5)
    else:
        first, last = (
            (layer.attention.output.LayerNorm, layer.output.LayerNorm)
            if kind == "bert"
            else (layer.ln_1, layer.ln_2)
        )
        assert torch.allclose(last(first(mid) + mlp), post, atol=1e-5)


def test_what_it_cannot_see_is_said() -> None:
    case = build("llama")
    case.model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out * out.cos())
    own = case.model.model.layers[1].forward
    case.model.model.layers[1].forward = lambda x, **kwargs: own(x, **kwargs).tanh()
    judge = Judge(case.model, CLEAN.ids, 3)
    with pytest.raises(Unseen, match=r"mlp_out of layer 1 of .* was not found"):
        judge.run([Prompt(CLEAN.ids)], record=[("mlp_out", 1)])
    with pytest.raises(ps.BadInput, match="no list of 7 layers"):
        Judge(case.model, CLEAN.ids, 7)


def _kl(reference: np.ndarray, logits: np.ndarray) -> float:
    """A token that the reference rules out adds nothing."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (reference, logits))
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


def test_metrics() -> None:
    """Against the oracle's, on random logits and with what has no probability."""
    rng = np.random.default_rng(0)
    logits, clean, corrupt = rng.standard_normal((3, 30)) * 3
    for low in (None, 20):
        if low is not None:
            clean[low] = -np.inf
        x, c, d = (torch.from_numpy(a.copy()) for a in (logits, clean, corrupt))
        expected = {
            "logit": oracle.logit(logits, [3, 4]),
            "logit_diff": oracle.logit_diff(logits, [3, 4], [5]),
            "logprob": oracle.logprob(logits, [3, 4]),
            "prob": oracle.prob(logits, [3, 4]),
            "prob_diff": oracle.prob_diff(logits, [3, 4], [5]),
            "rank": oracle.rank(logits, [3, 4]),
            "accuracy": oracle.accuracy(logits, [3, 4]),
            "kl": _kl(clean, logits),
            "kl_reverse": _kl(logits, clean) if low is None else np.inf,
            "total_variation": oracle.total_variation(clean, logits),
            "relative_prob": oracle.relative_prob(logits, corrupt, [3, 4], [5]),
        }
        for name, value in expected.items():
            found = logit_metric(Metric(name), x, (3, 4), (5,), c, d)
            assert found == pytest.approx(float(value), abs=1e-12), name
    bad = torch.from_numpy(logits.copy())
    bad[4] = float("nan")
    for name in ("rank", "accuracy", "logit", "kl", "prob"):
        assert np.isnan(logit_metric(Metric(name), bad, (3, 4), (5,), bad, bad))
