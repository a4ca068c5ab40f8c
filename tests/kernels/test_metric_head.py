"""The metric head against plain definitions, in float64."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from patchsweep_kernels import Reference, metric_head

DIVERGENCES = ("kl", "kl_reverse", "tv")


def definitions(logits, source):
    """kl, kl_reverse [row] in nats and tv [row] of rows of logits, in float64."""
    logits = np.asarray(logits, np.float64)
    log_q = log_softmax(logits, 1)
    log_p = log_q[source]
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        return {
            "kl": np.where(p > 0, p * (log_p - log_q), 0).sum(1),
            "kl_reverse": np.where(q > 0, q * (log_q - log_p), 0).sum(1),
            "tv": np.abs(p - q).sum(1) / 2,
        }


def test_the_definitions_are_scipys():
    logits = np.random.default_rng(0).normal(size=(2, 50))
    logits[0, 3], logits[:, 9] = -np.inf, -np.inf
    q = softmax(logits, 1)
    found = definitions(logits, [0, 0])
    assert np.allclose(found["kl"], rel_entr(q[0], q).sum(1), atol=1e-14)
    assert np.allclose(found["kl_reverse"], rel_entr(q, q[0]).sum(1), atol=1e-14)
    assert found["kl_reverse"][1] == np.inf


SPECIAL = {-1e30: float("-inf"), 1e30: float("inf"), 2e30: float("nan")}


def restored(z):
    """Logits with the stand-ins of what no product gives put right."""
    for stand_in, value in SPECIAL.items():
        z = z.masked_fill(z == torch.tensor(stand_in, dtype=z.dtype), value)
    return z


def heads_of(logits, references, of, divergences=DIVERGENCES, **options):
    """metric_head of given logits [row, token], as the product with a unit matrix. Keys of SPECIAL
    stand for values that are not finite."""
    return metric_head(
        torch.eye(len(logits), dtype=logits.dtype),
        logits.T.contiguous(),
        options.pop("bias", None),
        torch.zeros(len(logits), 1, dtype=torch.long),
        finish=restored,
        reference=Reference(torch.as_tensor(references), torch.as_tensor(of)),
        divergences=frozenset(divergences),
        **options,
    )


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
        divergences=frozenset(DIVERGENCES),
        tile=tile,
    )
    logits = hidden @ weight.T + offset
    logits = logits if finish is None else 3 * np.tanh(logits / 3)
    chosen = np.take_along_axis(logits, wanted, 1)
    assert np.allclose(found.logits, chosen, atol=1e-12)
    assert np.allclose(found.logsumexp, logsumexp(logits, 1), atol=1e-12)
    above = (logits[:, None] > chosen[:, :2, None]).sum(-1)
    assert np.array_equal(found.rank, above)
    for name, expected in definitions(logits, references[of]).items():
        assert np.array_equal(getattr(found, name)[references], [0, 0]), name
        assert np.allclose(getattr(found, name), expected, rtol=1e-12, atol=1e-13), name


def test_metric_head_of_logits_alone_reads_only_their_rows():
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    weight[5:] = float("nan")
    found = metric_head(hidden, weight, None, torch.tensor([[1, 4]] * 3))
    assert found.logits.isfinite().all()
    assert found.logsumexp is None
    assert found.rank is None
    assert found.kl is None


@pytest.mark.parametrize("asked", [set(), {"kl"}, {"kl_reverse"}, {"tv"}, {"kl", "tv"}])
def test_metric_head_returns_what_is_asked(asked):
    torch.manual_seed(0)
    logits = torch.randn(4, 30)
    every = heads_of(logits, [0, 2], [0, 0, 1, 1], logsumexp=True, ranked=1)
    found = heads_of(logits, [0, 2], [0, 0, 1, 1], asked)
    for name in DIVERGENCES:
        if name in asked:
            assert torch.equal(getattr(found, name), getattr(every, name)), name
        else:
            assert getattr(found, name) is None, name
    assert found.logsumexp is None
    assert found.rank is None


def test_a_reference_alone_means_kl():
    logits = torch.randn(2, 30)
    reference = Reference(torch.tensor([0]), torch.tensor([0, 0]))
    wanted = torch.zeros(2, 1, dtype=torch.long)
    found = metric_head(torch.eye(2), logits.T.contiguous(), None, wanted, reference=reference)
    expected = definitions(logits, [0, 0])["kl"]
    assert np.allclose(found.kl, expected, rtol=1e-6)
    assert found.kl_reverse is None
    assert found.tv is None


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 12),
    vocab=st.integers(2, 90),
    tile=st.integers(1, 100),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1000.0]),
    shift=st.sampled_from([0.0, 40.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_divergences(seed, rows, vocab, tile, scale, shift, dtype):
    """Of nearly equal, ordinary and one-hot distributions; one or many rows per reference."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, vocab)) * scale + shift * rng.normal(size=(rows, 1))
    logits = torch.from_numpy(logits).to(dtype)
    references = rng.permutation(rows)[: rng.integers(1, rows + 1)]
    of = rng.integers(0, len(references), rows)
    of[references] = np.arange(len(references))
    found = heads_of(logits, references, of, tile=tile)
    rtol = 2e-7 if dtype == torch.float32 else 1e-12
    for name, expected in definitions(logits.numpy(), references[of]).items():
        value = getattr(found, name)
        assert value.dtype == dtype
        assert (value[references] == 0).all(), name
        assert (value >= 0).all(), name
        assert np.allclose(value, expected, rtol=rtol, atol=1e-12 * max(1, scale)), name


@pytest.mark.parametrize("common", [0.0, 7.3])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("peaked", [False, True])
def test_divergences_of_nearly_equal_rows_in_float32(size, common, peaked):
    """KL of 1e-4 down to 1e-10 nats between rows that may also differ by a constant: a millionth of
    it, or what float64 keeps of logits of some 20."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=5000) * 3
    if peaked:
        base[17] = 18.0
    logits = np.stack([base, base + size * rng.normal(size=5000) + common]).astype(np.float32)
    found = heads_of(torch.from_numpy(logits), [0], [0, 0], tile=512)
    for name, expected in definitions(logits, [0, 0]).items():
        assert np.allclose(getattr(found, name), expected, rtol=1e-6, atol=2e-14), name


def test_small_kl_through_the_unembedding_in_float32():
    """With the rounding of the product itself: some 1e-6 nats to a per cent."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(1, 64)), rng.normal(size=(3000, 64)) * 0.3
    hidden = np.concatenate([hidden, hidden + 6e-4 * rng.normal(size=(5, 64))]).astype(np.float32)
    weight = weight.astype(np.float32)
    found = metric_head(
        torch.from_numpy(hidden),
        torch.from_numpy(weight),
        None,
        torch.zeros(6, 1, dtype=torch.long),
        reference=Reference(torch.tensor([0]), torch.zeros(6, dtype=torch.long)),
        divergences=frozenset(DIVERGENCES),
        tile=700,
    )
    logits = hidden.astype(np.float64) @ weight.T.astype(np.float64)
    for name, expected in definitions(logits, [0] * 6).items():
        if name != "tv":
            assert 1e-7 < expected[1:].min() < expected[1:].max() < 1e-5
        assert np.allclose(getattr(found, name)[1:], expected[1:], rtol=0.01, atol=0), name


def test_rounding_makes_no_divergence_negative():
    """Rows that differ by less than their KL can tell in float64."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(1, 300, dtype=torch.float64)
    logits = logits + 1e-11 * torch.randn(60, 300, dtype=torch.float64)
    logits[1:] += 20 * torch.randn(59, 1, dtype=torch.float64)
    found = heads_of(logits, [0], [0] * 60, tile=90)
    assert (found.tv[1:] > 0).all()
    for name in ("kl", "kl_reverse"):
        assert (getattr(found, name) >= 0).all(), name
        assert (getattr(found, name) < 1e-13).all(), name


def test_divergences_of_equal_rows_are_nothing():
    row = torch.randn(1, 1003) * 4
    found = heads_of(row.expand(40, -1), [3], [0] * 40, tile=100)
    for name in DIVERGENCES:
        assert (getattr(found, name) == 0).all(), name


@pytest.mark.parametrize("tile", [1, 5, 8, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_without_probability(tile, dtype):
    """A vocabulary masked by −inf, whole tiles of it at either end, is a smaller vocabulary."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5, 40)) * 2).to(dtype)
    masked = torch.zeros(40, dtype=torch.bool)
    masked[[*range(11), 17, 23, *range(33, 40)]] = True
    of = [0, 0, 1, 1, 0]
    bias = torch.zeros(40, dtype=dtype).masked_fill(masked, float("-inf"))
    found = heads_of(logits, [0, 2], of, tile=tile, bias=bias, logsumexp=True)
    left = logits[:, ~masked].double().numpy()
    tolerance = {"rtol": 1e-6, "atol": 0} if dtype == torch.float32 else {"atol": 1e-13}
    assert np.allclose(found.logsumexp, logsumexp(left, 1), **tolerance)
    for name, expected in definitions(left, [0, 0, 2, 2, 0]).items():
        assert (getattr(found, name)[[0, 2]] == 0).all(), name
        assert np.allclose(getattr(found, name), expected, **tolerance), name


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_a_token_that_one_distribution_lacks(tile):
    logits = torch.randn(3, 20, dtype=torch.float64)
    logits[1, 6], logits[2, [4, 9]] = -1e30, -1e30
    for reference in range(3):
        found = heads_of(logits, [reference], [0] * 3, tile=tile)
        for name, expected in definitions(restored(logits), [reference] * 3).items():
            assert np.allclose(getattr(found, name), expected, atol=1e-13), name
        infinite = {0: (found.kl, [1, 2]), 1: (found.kl_reverse, [0, 2])}
        if reference in infinite:
            value, rows = infinite[reference]
            assert value.isinf().nonzero()[:, 0].tolist() == rows


@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [1e30, 2e30])
@pytest.mark.parametrize("token", [0, 7, 19])
def test_what_is_not_finite_gives_nothing_finite(bad, token, tile, dtype):
    """Bad logits in row 1, which is compared to 0, and in row 3, which 2 is compared to; row 5 is
    masked as a whole."""
    torch.manual_seed(0)
    logits = torch.randn(6, 20, dtype=dtype)
    logits[[1, 3], token] = bad
    logits[5] = -1e30
    found = heads_of(logits, [0, 3], [0, 0, 1, 1, 0, 0], tile=tile, logsumexp=True)
    for name in DIVERGENCES:
        finite = getattr(found, name).isfinite().tolist()
        assert finite == [True, False, False, False, True, False], name
    assert found.logsumexp.isfinite().tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_metric_head_of_bfloat16(tile):
    """Small integers, which bfloat16 holds: the sums are those of float64 and ties are many."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.integers(-2, 3, (7, 8)), rng.integers(-4, 5, (50, 8))
    wanted = rng.integers(0, 50, (7, 2))
    of = [0, 0, 1, 1, 0, 1, 0]
    found = metric_head(
        torch.from_numpy(hidden).bfloat16(),
        torch.from_numpy(weight).bfloat16(),
        None,
        torch.from_numpy(wanted),
        finish=lambda z: z / 4,
        logsumexp=True,
        ranked=2,
        reference=Reference(torch.tensor([0, 3]), torch.tensor(of)),
        divergences=frozenset(DIVERGENCES),
        tile=tile,
    )
    logits = hidden @ weight.T / 4
    chosen = np.take_along_axis(logits, wanted, 1)
    assert found.logits.dtype == found.kl.dtype == torch.float32
    assert np.array_equal(found.logits, chosen)
    assert np.array_equal(found.rank, (logits[:, None] > chosen[:, :, None]).sum(-1))
    assert np.allclose(found.logsumexp, logsumexp(logits, 1), rtol=2e-7)
    for name, expected in definitions(logits, np.array([0, 3])[of]).items():
        assert (getattr(found, name)[[0, 3]] == 0).all(), name
        assert np.allclose(getattr(found, name), expected, rtol=2e-7, atol=1e-13), name


def test_metric_head_takes_rows_in_steps(monkeypatch):
    """However few rows are worked on at once, the same comes out, to the last bit of the ranks."""
    module = import_module("patchsweep_kernels.metric_head")
    torch.manual_seed(0)
    logits = torch.randn(11, 30, dtype=torch.float64)
    arguments = (logits, [2, 5], [0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0])
    whole = heads_of(*arguments, tile=8, logsumexp=True, ranked=1)
    monkeypatch.setattr(
        module, "_steps", lambda z: (slice(i, i + 3) for i in range(0, z.shape[0], 3))
    )
    parts = heads_of(*arguments, tile=8, logsumexp=True, ranked=1)
    assert torch.equal(whole.rank, parts.rank)
    for name in ("logsumexp", *DIVERGENCES):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), rtol=0, atol=1e-14), name


def test_an_unknown_divergence_is_refused():
    with pytest.raises(AssertionError, match="js"):
        heads_of(torch.randn(1, 4), [0], [0], {"js"})


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
    assert float(found.kl[0]) == 0
    assert abs(float(found.kl[1]) / expected - 1) < 1e-6
