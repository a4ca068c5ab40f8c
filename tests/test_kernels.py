"""The two operations against plain definitions, in float64."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, rel_entr, softmax

from patchsweep_kernels import Reference, Rows, metric_head, packed_attention


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


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("finish", [None, lambda z: 3 * torch.tanh(z / 3)])
def test_metric_head(tile, bias, finish):
    rng = np.random.default_rng(tile)
    rows, d, vocab = 9, 16, 100
    hidden, weight = rng.normal(size=(rows, d)), rng.normal(size=(vocab, d)) * 2
    offset = rng.normal(size=vocab) if bias else np.zeros(vocab)
    wanted = rng.integers(0, vocab, (rows, 3))
    of = rng.integers(0, 2, rows)
    references = np.array([4, 0])
    of[references] = [0, 1]

    found = metric_head(
        torch.from_numpy(hidden),
        torch.from_numpy(weight),
        torch.from_numpy(offset) if bias else None,
        torch.from_numpy(wanted),
        finish=finish,
        logsumexp=True,
        ranked=2,
        reference=Reference(torch.from_numpy(references), torch.from_numpy(of)),
        tile=tile,
    )
    logits = hidden @ weight.T + offset
    logits = logits if finish is None else 3 * np.tanh(logits / 3)
    chosen = np.take_along_axis(logits, wanted, 1)
    assert np.allclose(found.logits, chosen, atol=1e-12)
    assert np.allclose(found.logsumexp, logsumexp(logits, 1), atol=1e-12)
    assert np.array_equal(found.kl[references], [0, 0])
    above = (logits[:, None] > chosen[:, :2, None]).sum(-1)
    assert np.array_equal(found.rank, above)
    p = softmax(logits[references[of]], 1)
    assert np.allclose(found.kl, rel_entr(p, softmax(logits, 1)).sum(1), atol=1e-10)


def test_metric_head_of_logits_alone_reads_only_their_rows():
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    weight[5:] = float("nan")
    found = metric_head(hidden, weight, None, torch.tensor([[1, 4]] * 3))
    assert found.logits.isfinite().all()
    assert found.logsumexp is None
    assert found.rank is None
    assert found.kl is None


def test_kl_of_confident_distributions_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(2, 5000) * 3
    logits[0, 7], logits[1, 9] = 40.0, 40.0
    hidden = torch.eye(2)
    found = metric_head(
        hidden,
        logits.T.contiguous(),
        None,
        torch.zeros(2, 1, dtype=torch.long),
        logsumexp=True,
        reference=Reference(torch.tensor([0]), torch.tensor([0, 0])),
        tile=512,
    )
    z = logits.double().numpy()
    expected = rel_entr(softmax(z[0]), softmax(z[1])).sum()
    assert abs(float(found.kl[0])) < 1e-5
    assert abs(float(found.kl[1]) - expected) < 1e-4
