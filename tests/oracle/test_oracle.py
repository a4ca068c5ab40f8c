"""The oracle against what must hold whatever the model computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oracle import oracle
from oracle.families import FAMILIES, SOFTCAP_ATTENTION, Family, prompts

LAYERS = 3
LENGTH = 9
FIRST = 3  # where the prompts first differ: `two_prompts` sees to it
LAST = LENGTH - 1

Case = tuple[PreTrainedModel, Family]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    family = FAMILIES[request.param]
    return family.build(LAYERS, seed=1), family


def two_prompts() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Clean and corrupt; they differ at FIRST and at two later positions."""
    head, _ = prompts(np.random.default_rng(0), 50, FIRST, 0)
    clean, corrupt = prompts(np.random.default_rng(1), 50, LENGTH - FIRST, 2)
    clean, corrupt = (head + tail for tail in (clean, corrupt))
    if clean[FIRST] == corrupt[FIRST]:
        corrupt = (*corrupt[:FIRST], 3 + (corrupt[FIRST] - 2) % 47, *corrupt[FIRST + 1 :])
    return clean, corrupt


CLEAN, CORRUPT = two_prompts()


def components(family: Family) -> list[str]:
    return [c for c in oracle.COMPONENTS if not (family.parallel and c == "resid_mid")]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_prompts_differ_where_they_should() -> None:
    for n_differ in (0, 1, 5, 12):
        clean, corrupt = prompts(np.random.default_rng(n_differ), 50, 12, n_differ)
        assert sum(a != b for a, b in zip(clean, corrupt, strict=True)) == n_differ
        assert all(3 <= token < 50 for token in clean + corrupt)
    assert CLEAN[:FIRST] == CORRUPT[:FIRST]
    assert CLEAN[FIRST] != CORRUPT[FIRST]


def test_build(case: Case) -> None:
    model, family = case
    clean, corrupt = (oracle.baseline(model, ids) for ids in (CLEAN, CORRUPT))
    assert clean.shape == (50,)
    assert clean.isfinite().all()
    assert distance(clean, corrupt) > 0.1
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    # The same weights again, in another dtype.
    again = oracle.baseline(family.build(LAYERS, seed=1, dtype=torch.float32), CLEAN)
    assert distance(again, clean) < 1e-4
    other = oracle.baseline(family.build(LAYERS, seed=2), CLEAN)
    assert distance(other, clean) > 0.1


def test_recorded_activations_add_up(case: Case) -> None:
    """attn_out and mlp_out are exactly what the residual stream receives."""
    model, family = case
    seen = oracle.record(model, family, CLEAN)
    by = family.residual_multiplier
    for i in range(LAYERS):
        pre, post = seen["resid_pre", i], seen["resid_post", i]
        attn, mlp = seen["attn_out", i] * by, seen["mlp_out", i] * by
        assert attn.abs().max() > 1e-2
        assert mlp.abs().max() > 1e-2
        torch.testing.assert_close(pre + attn + mlp, post, rtol=0, atol=1e-12)
        if not family.parallel:
            torch.testing.assert_close(pre + attn, seen["resid_mid", i], rtol=0, atol=1e-12)
        if i + 1 < LAYERS:
            assert torch.equal(post, seen["resid_pre", i + 1])


def test_a_run_patched_with_itself_does_not_change(case: Case) -> None:
    model, family = case
    base = oracle.baseline(model, CLEAN)
    for component in components(family):
        got = oracle.grid(model, family, CLEAN, CLEAN, component, "all")
        # resid_mid is set through a difference, so it rounds.
        assert distance(got, base) <= (family.tolerance if component == "resid_mid" else 0)


def test_the_whole_residual_stream_carries_the_whole_run(case: Case) -> None:
    model, family = case
    source = oracle.baseline(model, CLEAN)
    everywhere = range(LENGTH)
    got = oracle.run(model, family, CORRUPT, CLEAN, "resid_pre", 0, None, everywhere)
    assert torch.equal(got, source)
    got = oracle.run(model, family, CORRUPT, CLEAN, "resid_post", LAYERS - 1, None, [LAST])
    assert torch.equal(got, source)
    got = oracle.run(model, family, CORRUPT, CLEAN, "resid_pre", 1, None, everywhere)
    assert torch.equal(got, source)


def test_what_cannot_and_what_does_change(case: Case) -> None:
    model, family = case
    base = oracle.baseline(model, CORRUPT)
    for component in components(family):
        grid = oracle.grid(model, family, CORRUPT, CLEAN, component)
        heads = model.config.num_attention_heads if component == "head_z" else 1
        assert grid.shape == (LAYERS, heads, LENGTH, 50)
        effect = (grid - base).abs().amax(-1)
        rounding = family.tolerance if component == "resid_mid" else 0
        assert effect[:, :, :FIRST].max() <= rounding, component
        if component != "resid_pre":  # above the last layer's keys and values
            assert effect[-1, :, FIRST:LAST].max() <= rounding, component
        # Every layer and unit has an effect that no tolerance could hide.
        assert effect.amax(-1).min() > 100 * family.tolerance, component
        assert effect.max() > 1e-2, component


def test_the_parts_make_up_the_whole(case: Case) -> None:
    """All heads make attn_out; residual and both blocks make resid_post; each at one token."""
    model, family = case
    heads = range(model.config.num_attention_heads)
    for at in ([LAST], [FIRST], [FIRST, LAST]):
        together = oracle.run_set(
            model, family, CORRUPT, CLEAN, [("head_z", 1, head, at) for head in heads]
        )
        attn = oracle.run(model, family, CORRUPT, CLEAN, "attn_out", 1, None, at)
        assert distance(together, attn) <= family.tolerance
        # The MLP acts on each token alone.
        post = oracle.run(model, family, CORRUPT, CLEAN, "resid_post", 1, None, at)
        if not family.parallel:
            mid = oracle.run(model, family, CORRUPT, CLEAN, "resid_mid", 1, None, at)
            assert distance(mid, post) <= family.tolerance
        later = oracle.run(model, family, CORRUPT, CLEAN, "resid_pre", 2, None, at)
        assert torch.equal(later, post)
    # In the last layer a residual patched at the last token reaches no other token.
    last = LAYERS - 1
    parts = [(c, last, None, [LAST]) for c in ("resid_pre", "attn_out", "mlp_out")]
    got = oracle.run_set(model, family, CORRUPT, CLEAN, parts)
    assert distance(got, oracle.baseline(model, CLEAN)) <= family.tolerance
    if not family.parallel:
        got = oracle.run_set(model, family, CORRUPT, CLEAN, parts[:2])
        mid = oracle.run(model, family, CORRUPT, CLEAN, "resid_mid", last, None, [LAST])
        assert distance(got, mid) <= family.tolerance
        # Where two patches meet, the later one in the forward wins, in whatever order they come.
        both = [("resid_mid", last, None, [LAST]), ("attn_out", last, None, [LAST])]
        got = oracle.run_set(model, family, CORRUPT, CLEAN, both)
        assert distance(got, mid) <= family.tolerance
    assert torch.equal(
        oracle.run_set(model, family, CORRUPT, CLEAN, []), oracle.baseline(model, CORRUPT)
    )


def test_one_head_is_one_head(case: Case) -> None:
    """What a head's patch adds to the attention block's output, worked out from the weights."""
    model, family = case
    layer, head = 1, 4
    source, own = (oracle.record(model, family, ids) for ids in (CLEAN, CORRUPT))
    difference = source["head_z", layer][LAST] - own["head_z", layer][LAST]
    width = len(difference) // model.config.num_attention_heads
    others = torch.arange(len(difference)) // width != head
    o_proj = model.get_submodule(family.layer.format(layer)).get_submodule(family.o_proj)
    weight = o_proj.weight.T if isinstance(o_proj, Conv1D) else o_proj.weight
    added = weight @ difference.masked_fill(others, 0)

    def add(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, LAST] += added
        return out

    handle = o_proj.register_forward_hook(add)
    by_hand = oracle.baseline(model, CORRUPT)
    handle.remove()
    got = oracle.run(model, family, CORRUPT, CLEAN, "head_z", layer, head, [LAST])
    assert distance(got, by_hand) <= family.tolerance


def test_a_grid_is_its_runs(case: Case) -> None:
    model, family = case
    cells = oracle.grid(model, family, CORRUPT, CLEAN, "head_z")
    for layer, head, at in ((0, 5, FIRST), (1, 2, LAST), (2, 0, LAST)):
        alone = oracle.run(model, family, CORRUPT, CLEAN, "head_z", layer, head, [at])
        assert torch.equal(cells[layer, head, at], alone)
    everywhere = oracle.grid(model, family, CORRUPT, CLEAN, "mlp_out", "all")
    assert everywhere.shape == (LAYERS, 1, 1, 50)
    alone = oracle.run(model, family, CORRUPT, CLEAN, "mlp_out", 1, None, range(LENGTH))
    assert torch.equal(everywhere[1, 0, 0], alone)


def test_windows_bite() -> None:
    """The families that are here for their window do not compute what they would without."""
    for name in ("mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen2"):
        narrow, wide = (
            FAMILIES[name].build(LAYERS, seed=1, sliding_window=window) for window in (4, 32)
        )
        assert distance(oracle.baseline(narrow, CLEAN), oracle.baseline(wide, CLEAN)) > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_own_attention_equals_the_familys(name: str) -> None:
    model = FAMILIES[name].build(LAYERS, seed=1)
    model.set_attn_implementation(SOFTCAP_ATTENTION)
    own = oracle.baseline(model, CLEAN)
    for theirs, tolerance in (("eager", 1e-6), ("sdpa", 1e-12)):
        if (name, theirs) == ("gemma2", "sdpa"):  # leaves the soft cap out
            continue
        model.set_attn_implementation(theirs)
        assert distance(oracle.baseline(model, CLEAN), own) <= tolerance


def test_soft_caps_bite() -> None:
    capped, free = (
        FAMILIES["gemma2"].build(LAYERS, seed=1, attn_logit_softcapping=cap) for cap in (1.0, 50.0)
    )
    assert distance(oracle.baseline(capped, CLEAN), oracle.baseline(free, CLEAN)) > 1e-3


def test_the_models_attention_is_left_as_it_was() -> None:
    family = FAMILIES["llama"]
    model = family.build(LAYERS)
    before = oracle.baseline(model, CLEAN)
    model.set_attn_implementation("eager")
    oracle.run(model, family, CORRUPT, CLEAN, "resid_mid", 1, None, [LAST])
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert torch.equal(oracle.baseline(model, CLEAN), before)


def test_wrong_use() -> None:
    family = FAMILIES["phi"]
    model = family.build(LAYERS)
    with pytest.raises(ValueError, match="parallel"):
        oracle.run(model, family, CORRUPT, CLEAN, "resid_mid", 0, None, [LAST])
    with pytest.raises(ValueError, match="head"):
        oracle.run(model, family, CORRUPT, CLEAN, "head_z", 0, None, [LAST])
    with pytest.raises(ValueError, match="none"):
        oracle.run(model, family, CORRUPT, CLEAN, "mlp_out", 0, 1, [LAST])


def test_metrics_by_hand() -> None:
    """Probabilities 0.1, 0.2, 0.3, 0.4 and the same, reversed."""
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    logits = np.log(p) + np.array([[7.0], [-900.0]])
    close = np.testing.assert_allclose
    close(oracle.logit(logits, [3]), logits[:, 3])
    close(oracle.logit_diff(logits, [3], [0]), [math.log(4), -math.log(4)])
    two = math.log(0.3 * 0.4 / (0.1 * 0.2))
    close(oracle.logit_diff(logits, [2, 3], [0, 1]), [two / 2, -two / 2])
    close(oracle.logit_diff(logits, [2, 3], [0, 1], "sum"), [two, -two])
    close(oracle.prob(logits, [0, 3]), [0.5, 0.5])
    close(oracle.prob(logits, [3]), [0.4, 0.1])
    close(oracle.logprob(logits, [1, 2, 3]), np.log([0.9, 0.6]))
    assert oracle.rank(logits, [1]).tolist() == [2, 1]
    assert oracle.rank(logits, [0, 1]).tolist() == [2, 0]
    assert oracle.rank(np.zeros(5), [4]) == 0  # ties do not count
    assert oracle.accuracy(logits, [0, 1]).tolist() == [0.0, 1.0]
    assert oracle.accuracy(logits, [0, 1], k=3).tolist() == [1.0, 1.0]
    close(oracle.kl(logits[0], logits[0]), 0, atol=1e-15)
    close(oracle.kl(logits[0], logits), [0, 0.3 * math.log(4) + 0.1 * math.log(1.5)], atol=1e-12)
    # Directed: the reference comes first.
    q = np.log([0.25, 0.25, 0.25, 0.25])
    close(oracle.kl(logits[0], q), sum(x * math.log(4 * x) for x in p[0]))
    close(oracle.kl(q, logits[0]), sum(-0.25 * math.log(4 * x) for x in p[0]))
    # Far apart: no overflow, no NaN.
    assert oracle.logprob(np.array([0.0, 2000.0]), [0]) == -2000


def test_probability_metrics_by_hand() -> None:
    p, c = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.log(np.stack([p, c])) + np.array([[7.0], [-900.0]])
    close = np.testing.assert_allclose
    close(oracle.prob_diff(logits, [3], [0, 1]), [0.4 - 0.3, 0.1 - 0.7])
    close(oracle.total_variation(logits[0], logits[0]), 0, atol=1e-15)
    close(oracle.total_variation(logits[0], logits), [0, 0.4], atol=1e-15)
    # All of one against all of the other: the largest there is.
    close(oracle.total_variation(np.array([0.0, 2000.0]), np.array([2000.0, 0.0])), 1)
    gain, loss = (0.4 - 0.1) / 0.1, (0.4 - 0.1) / 0.1
    close(oracle.relative_prob(logits[0], logits[1], [3], [0]), (gain + loss) / 2)
    gain, loss = (0.7 - 0.3) / 0.3, (0.3 - 0.2) / 0.2
    close(oracle.relative_prob(logits[0], logits[1], [2, 3], [1]), (gain + loss) / 2)
    close(oracle.relative_prob(logits[1], logits[1], [3], [0]), 0, atol=1e-15)
    close(oracle.sequence_logprob(logits, [2, 0], 0), math.log(0.3) + math.log(0.4))
    close(oracle.sequence_logprob(logits, [1], 1), math.log(0.3))
    assert oracle.sequence_logprob(logits, [], 0) == 0
