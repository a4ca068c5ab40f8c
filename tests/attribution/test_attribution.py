"""Estimates against a small implementation with plain hooks, brute force, and linear models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from cells import autoencoder
from estimates import (
    EXACT,
    NAMES,
    VIA,
    built,
    changes,
    compare,
    estimated,
    first_order,
    linear_model,
    logit_diff,
    runs,
)
from expected import Case
from inputs import SOURCES, Letters, able, components_of, pair_of, three, unequal
from oracle import gradients, heads
from oracle.families import FAMILIES
from patchsweep.attribution.rules import Relevance
from patchsweep.pairs import Pair


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


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
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


@pytest.mark.parametrize("kind", ["pairs", "noise", "ablations", "many", "vector", "unequal"])
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
