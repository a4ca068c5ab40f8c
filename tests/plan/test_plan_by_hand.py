"""What a plan and its sources say, against what can be counted on fingers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from inputs import Letters
from oracle.families import FAMILIES
from patchsweep.backends.choice import taken
from patchsweep.engine.planning import plan_sweep
from patchsweep.pairs import Pair
from patchsweep.plan import Chosen, Plan, make_plan, narrowed
from patchsweep.plan.dimensions import Dimensions
from patchsweep.plan.layout import Features
from patchsweep.plan.sources import Other, resolve
from patchsweep.sites import Status
from patchsweep.spec import parse_settings


def small() -> Dimensions:
    return ps.wrap(FAMILIES["llama"].build(2), Letters()).dimensions


def planned(pairs: list[Pair], dimensions: Dimensions | None = None, **settings: Any) -> Plan:
    given = parse_settings({"metrics": ["logit_diff"], **settings})
    return plan_sweep(dimensions or small(), pairs, given, torch.device("cpu"), 4000)


def test_attention_scores_need_memory() -> None:
    """Of a long prompt through full forwards they are most of it: scores and their softmax."""
    length = 6000
    long = Pair((5,) * length, (6,) * length, (7,), (8,))
    d = replace(small(), max_positions=None)
    plan = taken(planned([long], d, components=["mlp_out"], positions=[-1]), "nnsight")
    rows = max(w.tokens for w in plan.waves) // length
    scores = rows * d.heads * length * length
    assert plan.peak_bytes > 2 * scores * d.bytes_per_value


def test_the_largest_wave_needs_memory() -> None:
    """Whatever smaller ones there are beside it."""
    plan = planned(LABELLED, components=["mlp_out", "head_z"], source=["other", "b"])
    largest = max(plan.waves, key=lambda w: w.tokens)
    assert min(w.tokens for w in plan.waves) < largest.tokens
    assert replace(plan, units=((largest,),)).peak_bytes == plan.peak_bytes


def test_features_need_memory() -> None:
    """All features of all tokens that the runs start from, before and after the encoder's rule."""
    pair, width = Pair((5,) * 40, (6,) * 40, (7,), (8,)), 1 << 20
    given = parse_settings({"components": ["sae_feature"], "positions": [-1], "sae": {"file": "x"}})
    features = Features(1, "mlp_out", width, small().d_model)
    plan = make_plan([pair], given, small(), 4000, features)
    assert plan.peak_bytes > 2 * 2 * 40 * width * small().bytes_per_value


def test_a_rank_is_over_the_whole_vocabulary() -> None:
    """Two logits make a difference; the others take the whole unembedding."""
    flops = {
        name: planned(LABELLED[:1], components=["mlp_out"], metrics=[name]).counts()["flops"]
        for name in ("logit_diff", "rank", "prob")
    }
    assert flops["rank"] == flops["prob"] > flops["logit_diff"]


def test_which_runs_differ_where() -> None:
    clean = (5, 6, 7, 8)
    same = np.arange(4)
    alike = Other(clean, (5, 9, 7, 9), same)
    assert alike.parallel
    assert alike.differs.tolist() == [False, True, False, True]
    assert Other(clean, clean, same, (2,)).differs.tolist() == [False, False, True, False]
    moved = Other(clean, (6, 5, 7, 8), np.array([1, 0, 2, 3]))
    assert not moved.parallel
    assert moved.differs.all()
    longer = Other(clean, (5, 6, 7, 8, 9), np.array([0, 1, 2, 4]))
    assert not longer.parallel
    assert not Other(clean, (5, 6, 7, 8, 9), same).parallel


def test_what_there_is_to_restore() -> None:
    pairs = [Pair((5, 6), (5, 1), (2,), (3,)), Pair((5, 7), (5, 1), (2,), (3,))]
    for source in ("zero", {"resample": {}}, {"mean": {"prompts": "clean"}}):
        given = parse_settings({"components": ["mlp_out"], "source": source})
        with pytest.raises(ps.BadInput, match="there is nothing to restore: set direction: noise"):
            resolve(given, pairs)
    given = parse_settings({"components": ["mlp_out"], "corrupt": {"gaussian": {"tokens": [1]}}})
    assert len(resolve(given, pairs)) == 1


def test_samples_draw_other_prompts() -> None:
    pairs = [Pair((5, i), (6, i), (2,), (3,)) for i in range(7, 15)]
    given = {"components": ["mlp_out"], "source": {"resample": {"samples": 3}}}
    [source] = resolve(parse_settings({**given, "direction": "noise"}), pairs)
    drawn = [[other.tokens for other in row] for row in source.others]
    assert len(drawn) == 3
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


LABELLED = [
    Pair((5, 6, 7, 8), (5, 9, 7, 8), (2,), (3,), {"S": 1, "END": 3}, others={"b": (5, 6, 9, 8)}),
    Pair((5, 6, 7), (9, 6, 7), (2,), (3,), {"S": 0, "END": 2}, others={"b": (5, 9, 7)}),
]


def test_what_positions_of_sites_mean() -> None:
    """Labels and groups of the sweep, indices, all; of each pair its own."""
    sites = ["mlp_out.0@ends", "mlp_out.1@S", "mlp_out.0@-2", "mlp_out.1@all", "mlp_out.0@2"]
    plan = planned(LABELLED, positions={"middle": [1], "ends": [0, "END"]}, sets={"a": sites})
    table = plan.layouts.table
    assert table is not None
    wanted = [[{0, 3}, {1}, {2}, {0, 1, 2, 3}, {2}], [{0, 2}, {0}, {1}, {0, 1, 2}, {2}]]
    found = [
        [set(np.flatnonzero(row).tolist()) for row in of_pair[table.entry]]
        for of_pair in table.members
    ]
    assert found == wanted


def test_sites_of_other_sources_run_no_cells_of_grids() -> None:
    """In a set they may undo what another site has done; a cell by itself may not."""
    given: dict[str, Any] = {"components": ["mlp_out", "head_z"], "source": ["other", "b"]}
    alone = planned(LABELLED, **given)
    mixed = planned(LABELLED, **given, sets={"a": ["mlp_out.0@0<b", "mlp_out.1@-1"]})
    sets = 2 * len(LABELLED)  # of two sources
    assert mixed.counts()["runs"] == alone.counts()["runs"] + sets


def test_how_many_cells_can_change_anything() -> None:
    """mlp_out of two layers: from the first token that differs on, in the last layer where it is
    read."""
    plan = planned(LABELLED, components=["mlp_out"])
    found = plan.counts()
    assert found["cells"] == 2 * (4 + 3)
    assert found["runs"] == (3 + 1) + (3 + 1)
    assert found["structural"] == found["cells"] - found["runs"]
    assert found["estimated"] == 0
    # Where only one is run, the others are estimated, and as many are structural.
    grid = plan.grids["mlp_out"]
    chosen = np.full((grid.layers, grid.units, len(grid.positions)), Status.ESTIMATED, np.uint8)
    chosen[0, 0, -1] = Status.EXACT
    kept = narrowed(plan, {("mlp_out", 0, 0): Chosen(chosen)}).counts()
    assert kept["runs"] == 1
    assert kept["structural"] == found["structural"]
    assert kept["estimated"] == found["runs"] - 1


def test_which_layers_are_in_a_window() -> None:
    three = ps.wrap(FAMILIES["llama"].build(3), Letters()).dimensions
    table = planned(
        LABELLED, three, components=["mlp_out"], windows=[2], positions=[-1]
    ).layouts.table
    assert table is not None
    assert table.names == ("mlp_out.0-1@-1", "mlp_out.1-2@-1")
    assert [table.layer[table.set == i].tolist() for i in range(2)] == [[0, 1], [1, 2]]


def test_a_site_of_a_set_matters_where_its_layer_says() -> None:
    """In the last layer nothing reads what the first token's MLP adds."""
    runs = [
        planned(LABELLED[1:], sets={"a": [f"mlp_out.{layer}@0"]}).counts()["runs"]
        for layer in range(2)
    ]
    assert runs == [1, 0]


def test_two_patches_of_a_token_pass_a_layer_once() -> None:
    """A head's z at one token and another head's at the same one."""
    sets = {"one": ["head_z.0.1@1"], "two": ["head_z.0.1@1", "head_z.0.2@1"]}
    each = [
        make_plan(LABELLED[:1], parse_settings({"sets": {k: v}}), small(), 4000).counts()["flops"]
        for k, v in sets.items()
    ]
    assert each[0] == each[1] > 0
    # A patched query attends, whatever else is patched there.
    sets = {"one": ["head_q.0.1@1"], "two": ["head_q.0.1@1", "head_z.0.2@1"]}
    query = [
        make_plan(LABELLED[:1], parse_settings({"sets": {k: v}}), small(), 4000).counts()["flops"]
        for k, v in sets.items()
    ]
    assert query[0] == query[1] > each[0]
