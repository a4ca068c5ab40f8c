"""The gradient of every metric, and the estimates that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from estimates import EXACT, built, changes, estimated, runs
from inputs import pair_of, three
from oracle import gradients, heads
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair


def spread(logits: torch.Tensor, _: ps.Context) -> torch.Tensor:
    """A user's metric that autograd can follow."""
    return logits.max(-1).values - logits.min(-1).values


def counted(logits: torch.Tensor, _: ps.Context) -> torch.Tensor:
    return (logits > 0).sum(-1)


def metrics_of(pair: Pair, clean: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Every metric that has a gradient, of logits [vocab] and activations; `clean` and `other` are
    those of the unpatched runs."""
    answer, wrong = list(pair.answer), list(pair.wrong)

    def prob(x: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        return x.softmax(-1)[tokens].sum()

    def relative(x: torch.Tensor, _: Any) -> torch.Tensor:
        gain = prob(x, answer) / prob(other, answer) - 1
        return (gain + prob(other, wrong) / prob(x, wrong) - 1) / 2

    log_p = clean.log_softmax(-1)
    return {
        "logit_diff": lambda x, _: x[answer].mean() - x[wrong].mean(),
        "logit_diff_sum": lambda x, _: x[answer].sum() - x[wrong].sum(),
        "logit": lambda x, _: x[answer].mean(),
        "logprob": lambda x, _: prob(x, answer).log(),
        "prob": lambda x, _: prob(x, answer),
        "prob_diff": lambda x, _: prob(x, answer) - prob(x, wrong),
        "relative_prob": relative,
        "kl": lambda x, _: (log_p.exp() * (log_p - x.log_softmax(-1))).sum(),
        "kl_reverse": lambda x, _: (x.softmax(-1) * (x.log_softmax(-1) - log_p)).sum(),
        "total_variation": lambda x, _: (x.softmax(-1) - log_p.exp()).abs().sum() / 2,
        "spread": lambda x, _: x.max() - x.min(),
        "attention_1_1_-1_1": lambda _, seen: seen["head_pattern", 1][pair.read, 1, 1],
        "neuron_1_3_-1": lambda _, seen: seen["neuron", 1][pair.read, 3, 0],
        "probe_resid_post_1_-1": lambda _, seen: (
            seen["resid_post", 1][pair.read, 0] @ torch.arange(48).double()
        ),
    }


@pytest.mark.parametrize("relevance", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_every_metric(name: str, relevance: bool, tmp_path: Path) -> None:
    """The gradient of every metric, also of a metric that is read inside the model."""
    hf_model, family = built(name)
    pairs = three()[:2]
    np.save(tmp_path / "probe.npy", np.arange(48.0))
    probe = {"component": "resid_post", "layer": 1, "position": -1}
    asked: list[Any] = [
        "logit_diff",
        {"logit_diff": {"reduce": "sum"}},
        *("logit", "logprob", "prob", "prob_diff", "relative_prob"),
        *("kl", "kl_reverse", "total_variation"),
        {"callable": {"path": "test_attribution_metrics:spread"}},
        {"attention": {"layer": 1, "head": 1, "query": -1, "key": 1}},
        {"neuron": {"layer": 1, "neuron": 3, "position": -1}},
        {"probe": {**probe, "file": str(tmp_path / "probe.npy")}},
    ]
    names = {"head_v": "relp", "resid_pre": "relp"} if relevance else {"head_v": "atp"}
    found = estimated(hf_model, pairs, names, metrics=asked, direction="denoise")
    for i, pair in enumerate(pairs):
        before, other = (
            heads.activations(hf_model, family, heads.Prompt(r)) for r in runs(pair, "denoise")
        )
        ends = [
            heads.logits(hf_model, family, heads.Prompt(r))[pair.read]
            for r in (pair.clean, pair.corrupt)
        ]
        of_pair = metrics_of(pair, *ends)
        assert {*found.baseline} == {*of_pair}
        for column, metric in of_pair.items():
            if relevance and column.startswith("attention"):
                continue  # the oracle's patterns are fixed where they are read, too

            def value(x: Any, seen: Any, metric: Any = metric, read: int = pair.read) -> Any:
                return metric(x[read], seen)

            if relevance:
                with gradients.relevance(hf_model):
                    g = gradients.gradients(
                        hf_model, family, pair.corrupt, value, after=gradients.fix_patterns
                    )
            else:
                g = gradients.gradients(hf_model, family, pair.corrupt, value)
            for component in names:
                want = torch.stack(
                    [
                        ((other[component, x] - before[component, x]) * g[component, x]).sum(-1).T
                        for x in range(3)
                    ]
                )
                got = changes(found, component, column)[0, i, ..., : want.shape[-1]]
                scale = EXACT * max(1.0, float(want.abs().max()))
                np.testing.assert_allclose(got, want, atol=scale, err_msg=column)


def test_sequences() -> None:
    """The log-probability of a continuation of several tokens."""
    hf_model, family = built("llama")
    rng = np.random.default_rng(3)
    one = pair_of(rng, 8, 2)
    pair = Pair((*one.clean, 5), (*one.corrupt, 5), (5,), (7,), continuation=(5, 9))

    def metric(logits: torch.Tensor, _: Any) -> torch.Tensor:
        logprobs = logits.log_softmax(-1)
        each = [logprobs[pair.read + i, t] for i, t in enumerate(pair.continuation)]
        return torch.stack(each).sum()

    found = estimated(hf_model, [pair], {"mlp_out": "atp"}, metrics=["sequence_logprob"])
    got = changes(found, "mlp_out", "sequence_logprob")
    for d, direction in enumerate(("denoise", "noise")):
        dst, src = runs(pair, direction)
        g = gradients.gradients(hf_model, family, dst, metric)
        seen = [heads.activations(hf_model, family, heads.Prompt(r)) for r in (dst, src)]
        for layer in range(3):
            place = "mlp_out", layer
            want = ((seen[1][place] - seen[0][place]) * g[place]).sum((1, 2))
            np.testing.assert_allclose(got[d, 0, layer, 0], want, atol=EXACT)


def test_what_is_refused() -> None:
    hf_model, _ = built("llama")
    pairs = three()[:1]

    def refused(what: str, how: dict[str, str], **settings: Any) -> None:
        with pytest.raises(BadInput, match=what):
            estimated(hf_model, pairs, how, **settings)

    refused("rank cannot be estimated.*no gradient", {"head_z": "atp"}, metrics=["rank"])
    refused("accuracy_k3.*no gradient", {"head_z": "atp"}, metrics=[{"accuracy": {"k": 3}}])
    refused("kl cannot be estimated in direction noise", {"head_z": "atp"}, metrics=["kl"])
    refused("relp cannot estimate head_q", {"head_q": "relp"})
    refused("unknown estimator 'best': use one of atp", {"head_z": "best"})
    metric = {"callable": {"path": "test_attribution_metrics:counted"}}
    refused("counted cannot be estimated", {"head_z": "atp"}, metrics=[metric])
    assert not any(p.requires_grad for p in hf_model.parameters())
