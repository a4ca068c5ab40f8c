"""Estimates against a small implementation with plain hooks, brute force, and linear models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

import patchsweep as ps
from cells import Case, Letters, autoencoder
from oracle import gradients, heads
from oracle.families import FAMILIES, Family
from patchsweep import attribution
from patchsweep.attention import attention_is
from patchsweep.attribution import Estimates
from patchsweep.attribution.rules import Relevance
from patchsweep.engine import load_autoencoder, plan_sweep
from patchsweep.errors import BadInput
from patchsweep.forward import take_apart
from patchsweep.pairs import Pair
from patchsweep.prepare import prepare
from patchsweep.sites import Status
from patchsweep.spec import parse_settings
from test_exact import SOURCES, able, components_of, pair_of, three, unequal

EXACT = 1e-9
NAMES = ("llama", "gpt2", "gemma2", "qwen3", "mistral", "gpt_neox")
VIA = {"head_q", "head_k", "head_pattern"}  # components that act through patterns


def estimated(
    hf_model: Any,
    pairs: Sequence[Pair],
    estimators: Mapping[str, str],
    *,
    steps: int = 8,
    part: range | None = None,
    number: int = 0,
    counted: Any = None,
    **settings: Any,
) -> Estimates:
    given = parse_settings({"components": list(estimators), "direction": "both", **settings})
    model, sae = ps.wrap(hf_model, Letters()), load_autoencoder(given)
    plan = plan_sweep(model.dimensions, pairs, given, model.device, 4000, sae)
    with attention_is(hf_model):
        lengths = [len(tokens) for p in pairs for tokens in (p.clean, p.corrupt or p.clean)]
        forward = take_apart(hf_model, max(lengths), min(lengths))
        values = prepare(forward, plan, given, model.tokenizer, sae)
        part = part or range(len(pairs))
        with counted or nullcontext():
            return attribution.estimate_pairs(
                forward, plan, part, estimators, given.metrics, values, source=number, steps=steps
            )


@cache
def built(name: str) -> tuple[Any, Family]:
    """A model of three layers in float64 all the way."""
    family = FAMILIES[name]
    return gradients.in_float64(family.build(3, 1)), family


def logit_diff(pair: Pair) -> gradients.Metric:
    def metric(logits: torch.Tensor, _: Any) -> torch.Tensor:
        at = logits[pair.read]
        return at[list(pair.answer)].mean() - at[list(pair.wrong)].mean()

    return metric


def runs(pair: Pair, direction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The destination's and the source's tokens."""
    both = (pair.corrupt, pair.clean)
    return both if direction == "denoise" else both[::-1]


def changes(found: Estimates, name: str, column: str = "logit_diff") -> Any:
    """Estimated changes, [direction, pair, layer, unit, position]."""
    values = found.values[name][column][:, 0, 0]
    destination = found.baseline[column][::-1]  # denoise: the other run
    return values - destination[:, :, None, None, None]


# Of a pair by its number, a direction and a component: [layer, unit, position].
Expect = Callable[[int, str, str], torch.Tensor]


def compare(found: Estimates, pairs: Sequence[Pair], names: Sequence[str], expect: Expect) -> None:
    """Every cell of every pair, in both directions."""
    for name in names:
        got = changes(found, name)
        for d, direction in enumerate(("denoise", "noise")):
            for i in range(len(pairs)):
                want = expect(i, direction, name).detach().numpy()
                np.testing.assert_allclose(
                    got[d, i, ..., : want.shape[-1]], want, atol=EXACT, err_msg=f"{name} {i}"
                )


def first_order(
    hf_model: Any, family: Family, pair: Pair, direction: str, touch: Any = None, after: Any = None
) -> dict[str, torch.Tensor]:
    """δ·g of every component, [layer, unit, position]."""
    dst, src = runs(pair, direction)
    nothing = lambda *_: None  # noqa: E731
    before = heads.activations(hf_model, family, heads.Prompt(dst))
    other = heads.activations(hf_model, family, heads.Prompt(src))
    g = gradients.gradients(
        hf_model, family, dst, logit_diff(pair), touch or nothing, after or nothing
    )
    cells: dict[str, list[torch.Tensor]] = {}
    for (component, layer), slope in sorted(g.items(), key=lambda x: x[0][1]):
        delta = other[component, layer] - before[component, layer]
        cells.setdefault(component, []).append((delta * slope).sum(-1).T)
    return {component: torch.stack(by_layer) for component, by_layer in cells.items()}


@pytest.mark.parametrize("name", NAMES)
def test_atp(name: str) -> None:
    hf_model, family = built(name)
    pairs, names = three(), components_of(name)

    @cache
    def want(i: int, direction: str) -> dict[str, torch.Tensor]:
        return first_order(hf_model, family, pairs[i], direction)

    found = estimated(hf_model, pairs, dict.fromkeys(names, "atp"))
    compare(found, pairs, names, lambda i, d, n: want(i, d)[n])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "gpt_neox"])
def test_relp(name: str) -> None:
    """Norms, activations, gates and patterns by RelP's rules, module by module."""
    hf_model, family = built(name)
    pairs, names = three(), [c for c in components_of(name) if c not in VIA]

    @cache
    def want(i: int, direction: str) -> dict[str, torch.Tensor]:
        with gradients.relevance(hf_model):
            return first_order(hf_model, family, pairs[i], direction, after=gradients.fix_patterns)

    found = estimated(hf_model, pairs, dict.fromkeys(names, "relp"))
    compare(found, pairs, names, lambda i, d, n: want(i, d)[n])
    plain = estimated(hf_model, pairs, dict.fromkeys(names, "atp"))
    assert not np.allclose(changes(found, "mlp_out"), changes(plain, "mlp_out"))


@pytest.mark.parametrize("name", [*NAMES, "gpt_oss"])
def test_patterns_again(name: str) -> None:
    """Query, key and pattern fix, by full forwards that show the pattern a patch leads to."""
    hf_model, family = built(name)
    pairs = three()
    found = estimated(hf_model, pairs, dict.fromkeys(sorted(VIA), "atp_qk"))
    scale = EXACT if name != "gpt_oss" else family.tolerance
    rng = np.random.default_rng(0)
    seen = 0
    for component in VIA:
        got = changes(found, component)
        for _ in range(12):
            d, i, layer, unit = (int(rng.integers(n)) for n in got.shape[:-1])
            position = int(rng.integers(len(pairs[i])))
            dst, src = runs(pairs[i], ("denoise", "noise")[d])
            patch = heads.Patch(component, layer, unit, {position: position}, heads.Prompt(src))
            before, after = (
                heads.activations(hf_model, family, heads.Prompt(dst), patches)
                for patches in ((), (patch,))
            )
            g = gradients.gradients(hf_model, family, dst, logit_diff(pairs[i]))
            place = "head_pattern", layer
            want = float(((after[place] - before[place]) * g[place]).sum())
            assert abs(got[d, i, layer, unit, position] - want) < scale, (component, d, i, layer)
            seen += abs(want) > 1e-6
    assert seen > 10


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_gradients_dropped(name: str) -> None:
    """GradDrop by its definition: one layer's writes held fixed, the mean of magnitudes."""
    hf_model, family = built(name)
    pairs, names = three()[1:], ["head_z", "head_v", "mlp_out", "resid_pre", "neuron"]
    found = estimated(hf_model, pairs, dict.fromkeys(names, "atp_star"), positions="each")

    def dropped(closed: int) -> Any:
        def after(component: str, layer: int, x: torch.Tensor) -> None:
            if layer == closed and component in ("attn_out", "mlp_out"):
                x.copy_(x.detach().clone())

        return after

    @cache
    def want(i: int, direction: str) -> list[dict[str, torch.Tensor]]:
        args = (hf_model, family, pairs[i], direction)
        return [first_order(*args, after=dropped(layer)) for layer in range(3)]

    compare(found, pairs, names, lambda i, d, n: sum(w[n].abs() for w in want(i, d)) / 3)
    together = estimated(hf_model, pairs, dict.fromkeys(names, "atp_star"), positions="all")
    compare(
        together,
        pairs,
        names,
        lambda i, d, n: sum(w[n].sum(-1, keepdim=True).abs() for w in want(i, d)) / 3,
    )


def shifted(place: tuple[str, int], by: torch.Tensor) -> gradients.Touch:
    def touch(component: str, layer: int, x: torch.Tensor) -> None:
        if (component, layer) == place:
            x += by

    return touch


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_integrated_gradients(name: str) -> None:
    """By the same quadrature; and complete, with enough of it."""
    hf_model, family = built(name)
    pairs = three()[1:2]
    names = ["head_k", "head_pattern", "mlp_out", "embed", "resid_mid"]
    found = estimated(hf_model, pairs, dict.fromkeys(names, "ig"), steps=3)
    node, weight = np.polynomial.legendre.leggauss(3)

    @cache
    def want(i: int, direction: str, name: str) -> torch.Tensor:
        dst, src = runs(pairs[i], direction)
        before, other = (heads.activations(hf_model, family, heads.Prompt(r)) for r in (dst, src))
        out = []
        for layer in range(1 if name == "embed" else 3):
            delta, total = other[name, layer] - before[name, layer], torch.zeros(())
            for n, w in zip((node + 1) / 2, weight / 2, strict=True):
                moved = shifted((name, layer), n * delta)
                g = gradients.gradients(hf_model, family, dst, logit_diff(pairs[i]), moved)
                total = total + w * (delta * g[name, layer]).sum(-1).T
            out.append(total)
        return torch.stack(out)

    compare(found, pairs, names, want)
    more = estimated(hf_model, pairs, dict.fromkeys(names, "ig"), steps=16)
    for name in names:
        sums = np.nansum(changes(more, name), (3, 4))
        for (d, _, layer), value in np.ndenumerate(sums):
            dst, src = (heads.Prompt(r) for r in runs(pairs[0], ("denoise", "noise")[d]))
            units = heads.activations(hf_model, family, dst)[name, layer].shape[1]
            each = {i: i for i in range(len(dst.ids))}
            all_of_it = [heads.Patch(name, layer, u, each, src) for u in range(units)]
            ends = [
                logit_diff(pairs[0])(heads.logits(hf_model, family, dst, p), {})
                for p in ((), all_of_it)
            ]
            assert abs(value - float(ends[1] - ends[0])) < 1e-6, (name, d, layer)


def linear_model() -> Any:
    """No norms, no activation function, and attention that is the same for all queries and keys."""
    hf_model = FAMILIES["gpt2"].build(3, 1, activation_function="linear")
    for module in hf_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    for layer in hf_model.transformer.h:
        layer.attn.c_attn.weight[:, :48] = 0
        layer.attn.c_attn.bias[:48] = 0
    return hf_model


@pytest.mark.parametrize("kind", [*SOURCES, "vector", "unequal"])
def test_linear_models(kind: str, tmp_path: Path) -> None:
    """First order is exact there: every source, component and alignment, groups of positions."""
    rng = np.random.default_rng(2)
    pairs = [pair_of(rng, 6, 1), pair_of(rng, 6, 2), pair_of(rng, 5, 1), pair_of(rng, 5, 1)]
    if kind == "unequal":
        pairs = [unequal(rng, 6, 2), unequal(rng, 7, 1)]
    hf_model = linear_model()
    autoencoder(Case("gpt2", pairs, {}, sae_at="mlp_out"), hf_model, tmp_path)
    given: dict[str, Any] = {"direction": "both", **SOURCES.get(kind, {})}
    given["sae"] = {"file": tmp_path / "dictionary.safetensors", "layer": 2, "at": "mlp_out"}
    given |= {"positions": "all" if kind in ("many", "unequal") else "each"}
    names = [*(able("gpt2", kind) if kind in SOURCES else components_of("gpt2")), "sae_feature"]
    if kind == "unequal":
        names.remove("head_pattern")
    if kind == "vector":
        names = ["head_k", "head_v", "head_z"]
        np.save(tmp_path / "v.npy", rng.standard_normal(8))
        given |= {"source": {"vector": {"file": tmp_path / "v.npy"}}, "direction": "noise"}
    exact = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        components=names,
        out=tmp_path / "r.zarr",
        metrics=["logit_diff"],
        **given,
    )
    for estimator in ("atp", "atp_qk", "relp", "ig"):
        # RelP has nothing to say about patterns.
        some = [n for n in names if n not in VIA or estimator != "relp"]
        for number in range(exact.store.read(f"{names[0]}/logit_diff").shape[1]):
            if estimator == "ig" and number:
                continue  # as the others
            found = estimated(
                hf_model, pairs, dict.fromkeys(some, estimator), number=number, steps=1, **given
            )
            for name in some:
                want = exact.store.read(f"{name}/logit_diff")[:, [number], :1]
                got = found.values[name]["logit_diff"]
                np.testing.assert_allclose(got, want, atol=1e-8, err_msg=f"{name} {number}")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_moved_queries_and_keys(name: str) -> None:
    """Where an alignment moves a position they are rotated to where they are put."""
    hf_model, family = built(name)
    rng = np.random.default_rng(4)
    pair = unequal(rng, 7, 2)
    found = estimated(hf_model, [pair], {"head_q": "atp", "head_k": "atp"}, direction="both")
    align, checked = pair.alignment, 0
    for component in ("head_q", "head_k"):
        got = changes(found, component)
        for clean, other in enumerate(align):
            if other < 0:
                continue
            for d, (dst, src, at, from_) in enumerate(
                [
                    (pair.corrupt, pair.clean, int(other), clean),
                    (pair.clean, pair.corrupt, clean, int(other)),
                ]
            ):
                patch = heads.Patch(component, 1, 1, {at: from_}, heads.Prompt(src))
                before, after = (
                    heads.activations(hf_model, family, heads.Prompt(dst), p)[component, 1][at, 1]
                    for p in ((), (patch,))
                )
                g = gradients.gradients(hf_model, family, dst, read_last(pair))[component, 1]
                want = float(((after - before) * g[at, 1]).sum())
                assert abs(got[d, 0, 1, 1, clean] - want) < EXACT
                checked += abs(want) > 1e-8
    assert checked > 4


def read_last(pair: Pair) -> gradients.Metric:
    def metric(logits: torch.Tensor, _: Any) -> torch.Tensor:
        return logits[-1, list(pair.answer)].mean() - logits[-1, list(pair.wrong)].mean()

    return metric


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
        {"callable": {"path": "test_attribution:spread"}},
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


def test_shapes_and_statuses(tmp_path: Path) -> None:
    """As in exact results, with the same structural cells; a part of the pairs like all of them."""
    hf_model, _ = built("mistral")
    pairs, names = three(), ["head_z", "head_k", "embed", "neuron"]
    exact = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        components=names,
        direction="both",
        metrics=["logit_diff", "prob"],
        out=tmp_path / "r.zarr",
    )
    how = {name: attribution.DEFAULT[name] for name in names}
    found = estimated(hf_model, pairs, how, metrics=["logit_diff", "prob"])
    part = estimated(hf_model, pairs, how, metrics=["logit_diff", "prob"], part=range(1, 3))
    for name in names:
        for column in ("logit_diff", "prob"):
            values, status = found.values[name][column], found.status[name][column]
            known = exact.store.read(f"{name}/{column}_status")
            assert values.shape == status.shape == known.shape
            assert values.dtype == exact.store.read(f"{name}/{column}").dtype
            assert ((known == Status.EXACT) == (status == Status.ESTIMATED)).all()
            same = known != Status.EXACT
            assert (status[same] == known[same]).all()
            np.testing.assert_allclose(
                values[same], exact.store.read(f"{name}/{column}")[same], atol=EXACT
            )
            few = part.values[name][column]
            np.testing.assert_allclose(
                few[..., : values.shape[-1]], values[:, :, :, 1:], atol=EXACT
            )


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
    metric = {"callable": {"path": "test_attribution:counted"}}
    refused("counted cannot be estimated", {"head_z": "atp"}, metrics=[metric])
    assert not any(p.requires_grad for p in hf_model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("estimator", "most"), [("atp", 5), ("relp", 5), ("atp_qk", 6)])
def test_cost(name: str, estimator: str, most: float) -> None:
    """All cells of a pair cost a few forwards: both runs, then one and a backward of one."""
    hf_model, _ = built(name)
    pair = pair_of(np.random.default_rng(1), 40, 40)
    names = [c for c in components_of(name) if c not in VIA or estimator != "relp"]
    before = hf_model.config._attn_implementation
    with FlopCounterMode(display=False) as one:
        hf_model.set_attn_implementation("eager")
        hf_model(torch.tensor([pair.clean]), use_cache=False)
        hf_model.set_attn_implementation(before)
    count = FlopCounterMode(display=False)
    how = dict.fromkeys(names, estimator)
    estimated(hf_model, [pair], how, direction="denoise", counted=count)
    assert count.get_total_flops() < most * one.get_total_flops()


# Families without biases, and nothing non-linear behind the unembedding.
HOMOGENEOUS = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3_text",
    "olmo2",
    "phi3",
    "granite",
    "cohere",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_relevance_is_conserved(name: str) -> None:
    """Whatever the family: RelP shares a logit out among the activations of every layer, so that
    the estimate of taking all of them away is zero."""
    hf_model = gradients.in_float64(FAMILIES[name].build(3, 1))
    for module in hf_model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    for buffer, value in hf_model.named_buffers():
        if buffer.endswith("e_score_correction_bias"):
            value.zero_()
    names = {"embed": "relp", "resid_pre": "relp", "resid_post": "relp"}
    settings = {"source": "zero", "direction": "noise", "positions": "all"}
    found = estimated(hf_model, three(), names, **settings)
    for component in names:
        values = found.values[component]["logit_diff"]
        np.testing.assert_allclose(values, 0, atol=1e-6, err_msg=component)
    assert np.abs(found.baseline["logit_diff"][0]).min() > 1e-3


@pytest.mark.parametrize("at", ["resid_pre", "resid_post", "head_z"])
def test_features_elsewhere(at: str, tmp_path: Path) -> None:
    """Wherever an autoencoder reads, a feature's change is its decoder's direction."""
    pairs = three()[:1]
    hf_model = linear_model()
    autoencoder(Case("gpt2", pairs, {}, layers=2, sae_at=at), hf_model, tmp_path)
    given: dict[str, Any] = {"direction": "both", "metrics": ["logit_diff"]}
    given["sae"] = {"file": tmp_path / "dictionary.safetensors", "layer": 1, "at": at}
    exact = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        components=["sae_feature"],
        out=tmp_path / "r.zarr",
        **given,
    )
    for estimator in ("atp", "relp", "ig"):
        found = estimated(hf_model, pairs, {"sae_feature": estimator}, **given)
        np.testing.assert_allclose(
            found.values["sae_feature"]["logit_diff"],
            exact.store.read("sae_feature/logit_diff"),
            atol=1e-8,
        )


def test_parameters_that_learn() -> None:
    """Parameters that take gradients are left as they are, and change nothing."""
    hf_model, _ = built("llama")
    how = {"head_z": "atp", "mlp_out": "relp", "head_q": "atp_qk"}
    found = estimated(hf_model, three(), how)
    hf_model.requires_grad_(True)
    again = estimated(hf_model, three(), how)
    assert all(p.requires_grad and p.grad is None for p in hf_model.parameters())
    hf_model.requires_grad_(False)
    for name in how:
        np.testing.assert_array_equal(
            found.values[name]["logit_diff"], again.values[name]["logit_diff"]
        )


def test_pairs_are_cut_by_the_budget() -> None:
    """Activations of all layers are held: a pass has fewer pairs than a wave."""
    model = ps.wrap(built("llama")[0], Letters())
    pairs = [pair_of(np.random.default_rng(i), 10, 2) for i in range(7)]
    given = parse_settings({"components": ["head_z"], "direction": "denoise"})
    for budget, sizes in ((120, [2, 2, 2, 1]), (60, [1] * 7), (10_000, [7])):
        plan = plan_sweep(model.dimensions, pairs, given, model.device, budget)
        ranges = attribution.pair_ranges(plan)
        assert [len(r) for r in ranges] == sizes
        assert [i for r in ranges for i in r] == list(range(7))


def test_rules_in_place_and_by_division() -> None:
    """However a model writes them, products are halved and divisors fixed."""
    x = torch.linspace(1, 2, 5, dtype=torch.float64, requires_grad=True)
    y = torch.linspace(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def slopes(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        with Relevance():
            value = function(x + 0, y + 0)
        found = torch.autograd.grad(value.sum(), (x, y), allow_unused=True)
        return [torch.zeros(5) if g is None else g for g in found]

    def in_place(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a *= b
        return a

    for function in (lambda a, b: a * b, in_place):
        for got, want in zip(slopes(function), (y / 2, x / 2), strict=True):
            assert torch.allclose(got, want)
    for got, want in zip(slopes(lambda a, b: a / b), (1 / y, 0 * y), strict=True):
        assert torch.allclose(got, want.to(got))
    for function in (torch.square, lambda a: a**2, lambda a: a * a, torch.nn.functional.relu):
        [got, _] = slopes(lambda a, _, f=function: f(a))  # type: ignore[misc]
        assert torch.allclose(got * x, function(x))


def test_a_trained_model(tmp_path: Path) -> None:
    """On SmolLM2 the estimates order the heads nearly as exact patching does."""
    model = ps.load_model("smollm2-135m")
    texts = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
    pairs = [ps.make_pair(model.tokenizer, *texts)]
    out = tmp_path / "r.zarr"
    exact = ps.sweep(model, pairs, components=["head_z"], metrics=["logit_diff"], out=out)
    found = estimated(model.hf_model, pairs, {"head_z": "atp"}, direction="denoise")
    there = found.status["head_z"]["logit_diff"] == Status.ESTIMATED
    want = exact.store.read("head_z/logit_diff")[there]
    assert spearmanr(found.values["head_z"]["logit_diff"][there], want).statistic > 0.9


def test_models_larger_than_the_device(tmp_path: Path) -> None:
    """Weights that hooks bring in: the same estimates."""
    hf_model = FAMILIES["llama"].build(3, 1)
    how = {"head_z": "atp", "mlp_out": "relp", "head_k": "atp_qk", "neuron": "atp_star"}
    metrics = ["logit_diff", "prob"]
    whole = estimated(hf_model, three(), how, metrics=metrics)
    disk_offload(hf_model, str(tmp_path), torch.device("cpu"))
    found = estimated(hf_model, three(), how, metrics=metrics)
    for name in how:
        for column in metrics:
            np.testing.assert_array_equal(whole.values[name][column], found.values[name][column])
    assert all(p.is_meta for p in hf_model.parameters())
