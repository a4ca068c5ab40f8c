"""Sources of the patches of `heads.py`: other runs, constants, steering; and several at once."""

from __future__ import annotations

import torch

from oracle import heads
from oracle.cases import (
    CLEAN,
    CORRUPT,
    EVERYWHERE,
    LAST,
    LAYER,
    OTHER,
    Case,
    build,
    distance,
    layer_of,
)
from oracle.heads import Add, Patch

# Sources.


def test_a_run_patched_with_itself_does_not_change(case: Case) -> None:
    base = case.logits()
    for component in case.components():
        patches = case.whole(component, CORRUPT, layer_of(component))
        assert torch.equal(case.logits(*patches), base), component


def test_every_unit_has_an_effect_and_none_before_its_position(few: Case) -> None:
    base = few.logits()
    for component in few.components():
        for unit in few.units(component)[:6]:
            patch = Patch(component, layer_of(component), unit, {5: 5}, CLEAN)
            effect = (few.logits(patch) - base).abs().amax(-1)
            assert effect[:5].max() <= (few.family.tolerance if component == "resid_mid" else 0)
            if component != "neuron":  # some are closed in both runs
                assert effect[5:].max() > 100 * few.family.tolerance, component


def test_constants_and_steering(few: Case) -> None:
    """The source's value as a constant, and what it has more than the destination as a vector."""
    for component in few.components():
        if component == "head_pattern":
            continue
        layer = layer_of(component)
        source, own = (few.seen(of, component, layer=layer) for of in (CLEAN, CORRUPT))
        if component in heads.PROJECTED:
            source, own = (
                heads.activations(few.model, few.family, of)[component, layer]
                for of in (CLEAN, CORRUPT)
            )
        for unit in few.units(component)[:2]:
            value, vector = (x[4] if unit is None else x[4, unit] for x in (source, source - own))
            expected = few.logits(Patch(component, layer, unit, {4: 4}, CLEAN))
            for given in (value, Add(vector)):
                patched = few.logits(Patch(component, layer, unit, {4: 4}, given))
                assert distance(patched, expected) <= few.family.tolerance, component


def test_steering_adds_to_the_destination() -> None:
    case = build("llama")
    vector = torch.linspace(-1, 1, 48, dtype=torch.float64)
    patch = Patch("mlp_out", LAYER, None, {2: 2, 5: 5}, Add(vector))
    before, after = (case.seen(CORRUPT, "mlp_out", *p) for p in ((), (patch,)))
    assert torch.equal(after[[2, 5]], before[[2, 5]] + vector)
    assert torch.equal(after[[0, 1, 3, 4, 6, 7, 8]], before[[0, 1, 3, 4, 6, 7, 8]])


def test_zero_is_zero() -> None:
    case = build("gpt2")
    patch = Patch("head_z", LAYER, 2, EVERYWHERE, torch.zeros(()))
    assert case.seen(CORRUPT, "head_z", patch)[:, 2].abs().max() == 0
    assert case.seen(CORRUPT, "head_z", patch)[:, 3].abs().max() > 0


# Several patches.


def test_the_later_in_the_list_counts_in_one_place(few: Case) -> None:
    for component in few.components():
        unit, layer = few.units(component)[-1], layer_of(component)
        one, other = (Patch(component, layer, unit, {5: 5}, s) for s in (CLEAN, OTHER))
        assert torch.equal(few.logits(one, other), few.logits(other)), component
        assert torch.equal(few.logits(other, one), few.logits(one)), component


def test_in_the_order_of_the_forward(few: Case) -> None:
    """Whatever the order of the list: what comes later in the forward sees what came before."""
    parts = [
        Patch("embed", 0, None, {1: 1}, CLEAN),
        Patch("head_k", 0, 0, {2: 2}, CLEAN),
        Patch("head_z", 1, 3, {4: 4}, CLEAN),
        Patch("resid_post", 1, None, {3: 3}, OTHER),
        Patch("head_pattern", 2, 5, {LAST: LAST}, CLEAN),
    ]
    expected = few.logits(*parts)
    assert torch.equal(few.logits(*reversed(parts)), expected)
    alone = [few.logits(part) for part in parts]
    assert min(distance(expected, x) for x in alone) > 100 * few.family.tolerance
    stream = Patch("resid_pre", 2, None, EVERYWHERE, CLEAN)
    assert torch.equal(few.logits(stream, *parts[:4]), few.logits(stream))


def test_sources_are_unpatched_runs(few: Case) -> None:
    """What is patched below, from another run or by a constant, does not reach the source."""
    at_5 = few.seen(CLEAN, "head_z")[5, 2]
    z = Patch("head_z", LAYER, 2, {5: 5}, CLEAN)
    for source in (OTHER, torch.ones(())):
        stream = Patch("resid_pre", LAYER, None, EVERYWHERE, source)
        after = few.seen(CORRUPT, "head_z", stream, z)
        assert torch.equal(after[5, 2], at_5)
        assert distance(few.seen(CORRUPT, "head_z", stream)[5, 2], at_5) > 1e-2
