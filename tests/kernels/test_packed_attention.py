"""Packed attention, and rows of it, against plain definitions in float64."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from patchsweep_kernels import Rows, attention_rows, packed_attention


def one_row(query, key, value, first, r, *, scaling, window, softcap, sinks):
    """z [token, head, d_head] of one row by loops: every query against every key it may see."""
    heads, kv = query.shape[0], key.shape[0]
    own = range(first, first + r.length)
    tokens = [*range(r.prefix_start, r.prefix_start + r.prefix_length), *own]
    out = np.zeros((r.length, heads, value.shape[-1]))
    for i, token in enumerate(own):
        at = r.prefix_length + i
        seen = [t for t in range(at + 1) if window is None or at - t < window]
        for h in range(heads):
            g = h // (heads // kv)
            score = np.array([query[h, token] @ key[g, tokens[t]] for t in seen]) * scaling
            if softcap is not None:
                score = softcap * np.tanh(score / softcap)
            extra = [] if sinks is None else [sinks[h]]
            weight = softmax(np.concatenate([score, extra]))[: len(seen)]
            out[i, h] = sum(w * value[g, tokens[t]] for w, t in zip(weight, seen, strict=True))
    return out


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(4, 4), (6, 2), (4, 1)]),
    rows=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4
    ),
    window=st.sampled_from([None, 1, 2, 3, 50]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
)
def test_packed_attention(seed, shape, rows, window, softcap, sinks):
    rng = np.random.default_rng(seed)
    heads, kv = shape
    base = 6  # tokens that prefixes are taken from
    layout, start = [Rows(0, 1, base)], base
    for count, length, prefix in rows:
        layout.append(Rows(start, count, length, base - prefix, prefix))
        start += count * length
    q, k, v = (rng.normal(size=(n, start, d)) for n, d in ((heads, 5), (kv, 5), (kv, 3)))
    sink = rng.normal(size=heads) if sinks else None
    options = {"scaling": 0.7, "window": window, "softcap": softcap}
    z = packed_attention(
        *map(torch.from_numpy, (q, k, v)),
        layout,
        **options,
        sinks=None if sink is None else torch.from_numpy(sink),
    )
    assert z.shape == (start, heads, 3)
    for r in layout:
        for row in range(r.count):
            first = r.start + row * r.length
            expected = one_row(q, k, v, first, r, **options, sinks=sink)
            assert np.abs(z[first : first + r.length].numpy() - expected).max() < 1e-12


def test_packed_attention_takes_many_rows_in_steps(monkeypatch):
    module = import_module("patchsweep_kernels.packed_attention")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4 + 60, 8, dtype=torch.float64) for _ in range(3))
    layout = [Rows(0, 1, 4), Rows(4, 20, 3, 0, 4)]
    whole = packed_attention(q, k, v, layout, 0.3)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2 * 3 * 7 * 6)
    assert torch.allclose(whole, packed_attention(q, k, v, layout, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bound", [1, 2 * 49, 4 * 49, 6 * 49, 20 * 49])
@pytest.mark.parametrize("sinks", [False, True])
def test_packed_attention_keeps_to_the_bound(monkeypatch, bound, sinks):
    module = import_module("patchsweep_kernels.packed_attention")
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 21, 5, dtype=torch.float64) for n in (6, 3, 3))
    layout = [Rows(0, 3, 7)]  # two query heads share a kv head: 2 · 49 scores are the least
    options = {"scaling": 0.3, "sinks": torch.randn(6, dtype=torch.float64) if sinks else None}
    whole = packed_attention(q, k, v, layout, **options)
    seen, softmax_of = [], module._pattern

    def spy(scores, sink):
        seen.append(scores.numel())
        return softmax_of(scores, sink)

    monkeypatch.setattr(module, "_pattern", spy)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", bound)
    split = packed_attention(q, k, v, layout, **options)
    assert torch.allclose(whole, split, rtol=0, atol=1e-14)
    assert max(seen) <= max(bound, 2 * 49)
    assert sum(seen) == 6 * 3 * 49


def patterns_by_packed_attention(q, k, layout, **options):
    """[token, head, token]: who attends to whom, as the z of values that tell tokens apart."""
    tokens = k.shape[1]
    value = torch.eye(tokens, dtype=k.dtype).expand(k.shape[0], tokens, tokens)
    return packed_attention(q, k, value, layout, **options)


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(4, 4), (6, 2), (4, 1)]),
    bound=st.sampled_from([1, 100, 1 << 22]),
    window=st.sampled_from([None, 1, 2, 3, 50]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
)
def test_attention_rows(seed, shape, bound, window, softcap, sinks):
    module = import_module("patchsweep_kernels.packed_attention")
    torch.manual_seed(seed)
    heads, kv = shape
    layout = [Rows(0, 1, 6), Rows(6, 2, 3, 1, 4), Rows(12, 1, 1, 0, 2)]
    q, k = (torch.randn(n, 13, 5, dtype=torch.float64) for n in shape)
    options = {
        "scaling": 0.7,
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(heads, dtype=torch.float64) if sinks else None,
    }
    whole = patterns_by_packed_attention(q, k, layout, **options)

    asked = [(t, h) for t in range(13) for h in range(heads)]
    keys = {}  # of a token: the tokens at the positions of its row up to itself
    for r in layout:
        for row in range(r.count):
            first = r.start + row * r.length
            for i in range(r.length):
                prefix = range(r.prefix_start, r.prefix_start + r.prefix_length)
                keys[first + i] = [*prefix, *range(first, first + i + 1)]
    padded = torch.tensor([keys[t] + [12] * (8 - len(keys[t])) for t, _ in asked])
    token, head = torch.tensor(asked).T
    count = torch.tensor([len(keys[t]) for t, _ in asked])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES_AT_ONCE", bound)
        rows = attention_rows(q, k, token, padded, count, head, **options)
    assert rows.shape == (len(asked), 8)
    for found, (t, h), n in zip(rows, asked, count, strict=True):
        assert (found[n:] == 0).all()
        assert (found[:n] - whole[t, h, keys[t]]).abs().max() < 1e-14
        scores = np.array([float(q[h, t] @ k[h // (heads // kv), s]) for s in keys[t]]) * 0.7
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        if window is not None:
            scores[: max(0, n - window)] = -np.inf
        extra = [float(options["sinks"][h])] if sinks else []
        expected = softmax(np.concatenate([scores, extra]))[:n]
        assert np.abs(found[:n].numpy() - expected).max() < 1e-14


def test_attention_rows_gathers_few_keys_at_once(monkeypatch):
    module = import_module("patchsweep_kernels.packed_attention")
    q, k = torch.randn(2, 9, 4), torch.randn(1, 9, 4)
    keys = torch.arange(9).expand(20, 9)
    seen, softmax_of = [], module._pattern

    def spy(scores, sink):
        seen.append(scores.numel() * k.shape[2])
        return softmax_of(scores, sink)

    monkeypatch.setattr(module, "_pattern", spy)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 100)
    ones = torch.ones(20, dtype=torch.long)
    attention_rows(q, k, ones * 8, keys, ones * 9, ones, 0.5)
    assert max(seen) <= 100
    assert sum(seen) == 20 * 9 * 4


def test_attention_rows_of_no_query():
    q, none = torch.randn(2, 9, 4), torch.zeros(0, dtype=torch.long)
    assert attention_rows(q, q, none, none.view(0, 3), none, none, 0.5).shape == (0, 3)
