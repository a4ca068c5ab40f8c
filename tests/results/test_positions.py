"""Positions by meaning: what is said over pairs of unequal length, held against loops in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair, make_pair
from patchsweep.results.columns import aligned, meaning
from patchsweep.sites import RUN, Status
from patchsweep.tasks.known_circuits import KNOWN, circuit_pairs, known_circuits

MODEL, TOKENIZER = known_circuits()
WRAPPED = ps.wrap(MODEL, TOKENIZER)
EXACT = 1e-12
# How many words stand before the prompt, and between its last two: lengths 3 to 6.
AROUND = ((0, 0), (2, 0), (1, 1), (0, 3))


def longer(pair: Pair, before: int, between: int) -> Pair:
    """The same pair with more words that no circuit reads."""
    the, stones = TOKENIZER("the stones")["input_ids"]
    more, middle = (the,) * before, (stones,) * between
    texts = ((*more, *ids[:2], *middle, ids[2]) for ids in (pair.clean, pair.corrupt))
    labels = {"WORD": before + 1, "END": before + between + 2}
    return Pair(*texts, pair.answer, pair.wrong, labels, pair.group)


def uneven(circuit: str) -> list[Pair]:
    pairs = circuit_pairs(TOKENIZER)[circuit]
    shapes = AROUND * (-(-len(pairs) // len(AROUND)))
    return [longer(pair, *shape) for pair, shape in zip(pairs, shapes, strict=False)]


@pytest.mark.parametrize("circuit", ["and", "and_first", "or", "negative"])
def test_what_is_planted_at_a_label_is_found_there(circuit: str, tmp_path: Path) -> None:
    pairs = uneven(circuit)
    components = ["embed", "head_z", "neuron", "mlp_out"]
    results = ps.sweep(
        WRAPPED, pairs, components=components, direction="both", out=tmp_path / "r.zarr"
    )
    for component in components:
        assert results.columns(component).align == "labels"
        for direction in ("denoise", "noise"):
            effect = results.effect(component, "logit_diff", direction, min_pairs=1)
            rest = effect.values.copy()
            for text, known in KNOWN[circuit].items():
                name, _, label = text.partition("@")
                kind, *place = name.split(".")
                if kind != component:
                    continue
                cell = dict(zip(effect.dims[:2], map(int, [*place, 0, 0]), strict=False))
                at = {**cell, "position": label}
                assert float(effect.sel(at)) == pytest.approx(getattr(known, direction), abs=EXACT)
                index = list(effect.position.values).index(label)
                rest[tuple(cell.values())][index] = 0
            assert np.nanmax(np.abs(rest)) <= EXACT
    lengths = [(pair.labels["WORD"], len(pair)) for pair in pairs]
    counts = dict(zip(effect.position.values, effect.n_pairs.values[0, 0], strict=True))
    assert counts["WORD"] == counts["END"] == len(pairs)
    assert counts["before WORD"] == sum(word > 0 for word, _ in lengths)
    between = sum(length > word + 2 for word, length in lengths)
    assert counts.get("WORD … END", 0) == between


def test_one_longer_pair_changes_no_detection(tmp_path: Path) -> None:
    few = uneven("and")[:3]
    more = [*few, longer(circuit_pairs(TOKENIZER)["and"][3], 4, 1)]
    found = []
    for name, pairs in (("few", few), ("more", more)):
        results = ps.sweep(WRAPPED, pairs, components=["head_z"], out=tmp_path / name)
        table = results.detections("head_z", "logit_diff")
        found.append(set(zip(table.layer, table["head"], table.position, strict=True)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("circuit", "direction"), [("or", "denoise"), ("negative", "noise")])
def test_a_prefilter_chooses_by_label(circuit: str, direction: str, tmp_path: Path) -> None:
    """What it keeps is run in every pair that has it: effects are those of a whole sweep."""
    given = {"components": ["head_z"], "direction": direction, "metrics": ["logit_diff", "prob"]}
    whole, found = (
        ps.sweep(WRAPPED, uneven(circuit), out=tmp_path / str(of), prefilter=of, **given)
        for of in (None, {"keep": 3, "audit": 2})
    )
    assert found.columns("head_z").align == "labels"
    chosen = found.store.read("choice/head_z_status")[0, 0]
    assert (chosen == Status.EXACT).sum() == 3
    effects = [r.effect("head_z", "logit_diff", min_pairs=1) for r in (whole, found)]
    run = np.isin(chosen, RUN)
    assert run.sum() > 3
    for kind in (lambda e: e.values, lambda e: e.n_pairs.values):
        exact, kept = (kind(effect)[run] for effect in effects)
        np.testing.assert_allclose(kept, exact, rtol=0, atol=EXACT)
    best = [r.top("head_z", "logit_diff", n=1) for r in (whole, found)]
    assert best[0].equals(best[1]) and best[1].position[0] == "END"
    assert abs(best[1].effect[0]) > 0.1
    theta = found.audit("head_z", "logit_diff").theta
    assert theta == pytest.approx(abs(effects[0].values[chosen == Status.EXACT]).max())
    del found.store._root["chosen_columns"]  # as of results that were chosen by index
    assert found.columns("head_z").align == "start"


def test_a_label_on_the_token_of_another_is_run_with_it(tmp_path: Path) -> None:
    """In two pairs NEXT is END: kept as END, it is run there although NEXT is not kept."""
    pairs = [
        replace(pair, labels={**pair.labels, "NEXT": pair.labels["WORD"] + 1})
        for pair in uneven("or")
    ]
    assert sum(pair.labels["NEXT"] == pair.labels["END"] for pair in pairs) == 2
    settings = {"components": ["head_z"], "prefilter": {"keep": 2, "audit": 1}}
    found = ps.sweep(WRAPPED, pairs, out=tmp_path / "r.zarr", **settings)
    chosen = found.store.read("choice/head_z_status")[0, 0]
    kept = {found.columns("head_z").names[c] for c in np.nonzero(chosen == Status.EXACT)[2]}
    assert kept == {"END"}
    at = np.argwhere(chosen == Status.EXACT)[0]
    status = found.store.read("head_z/logit_diff_status")[0, 0, 0]
    run = {i for i, pair in enumerate(pairs) if status[(i, *at[:2], pair.labels["END"])] in RUN}
    assert run == set(range(len(pairs)))
    assert np.isfinite(found.effect("head_z", "logit_diff").sel(position="END")).sum() >= 2


@pytest.fixture(scope="module")
def uneven_results(tmp_path_factory: pytest.TempPathFactory) -> ps.Results:
    """Both directions, windows."""
    return swept(tmp_path_factory.mktemp("uneven") / "r.zarr", direction="both", windows=[2])


@pytest.fixture(scope="module")
def of_zero(tmp_path_factory: pytest.TempPathFactory) -> ps.Results:
    """A source without a run."""
    return swept(tmp_path_factory.mktemp("zero") / "r.zarr", source="zero", direction="noise")


def swept(out: Path, **settings: Any) -> ps.Results:
    given = {"components": ["head_z", "mlp_out"], "metrics": ["logit_diff", "prob"], **settings}
    return ps.sweep(WRAPPED, uneven("or"), out=out, **given)


def columns_by_hand(pairs: list[Pair], align: str) -> dict[Any, list[list[int]]]:
    """Column -> the positions that it stands for in every pair."""
    if align == "start":
        return {i: [[i] * (i < len(p)) for p in pairs] for i in range(max(map(len, pairs)))}
    if align == "end":
        return {
            -i: [[len(p) - i] * (i <= len(p)) for p in pairs]
            for i in range(max(map(len, pairs)), 0, -1)
        }
    word, end = ([p.labels[name] for p in pairs] for name in ("WORD", "END"))
    return {
        "before WORD": [list(range(w)) for w in word],
        "WORD": [[w] for w in word],
        "WORD … END": [list(range(w + 1, e)) for w, e in zip(word, end, strict=True)],
        "END": [[e] for e in end],
    }


@pytest.mark.parametrize("align", ["labels", "end", "start"])
@pytest.mark.parametrize("source", ["other", "zero"])
def test_effects_equal_loops_over_the_stored_arrays(
    uneven_results: ps.Results, of_zero: ps.Results, align: str, source: str
) -> None:
    results, pairs = (of_zero if source == "zero" else uneven_results), uneven("or")
    raw = results.store.read("head_z/prob")[-1, 0, 0]  # of noise, the last direction
    base = results.store.read("baseline/prob")[:, 0, 0]  # [run, pair]
    found = results.effect("head_z", "prob", "noise", align=align, min_pairs=1)
    columns = columns_by_hand(pairs, align)
    assert list(found.position.values) == list(columns)
    for layer, head in np.ndindex(2, 4):
        for name, places in columns.items():
            moved = span = 0.0
            for i, at in enumerate(places):
                if at:
                    clean, corrupt = base[:, i]
                    moved += np.mean([raw[i, layer, head, p] - clean for p in at])
                    span += corrupt - clean if source == "other" else 1
            got = float(found.sel(layer=layer, head=head, position=name))
            assert got == pytest.approx(moved / span, abs=1e-9)
            count = int(found.n_pairs.sel(layer=layer, head=head, position=name))
            assert count == sum(map(bool, places))


@pytest.mark.parametrize("align", ["labels", "end"])
def test_changes_intervals_and_windows_go_the_same_way(
    uneven_results: ps.Results, align: str
) -> None:
    asked = "mlp_out", "logit_diff", "denoise"
    moved, span = uneven_results.changes(*asked, align=align)
    effect = uneven_results.effect(*asked, align=align, min_pairs=1).values
    assert span is not None
    there = np.isfinite(moved)
    below = (there * span[:, None, None, None]).sum(0)
    np.testing.assert_allclose(np.nansum(moved, 0) / below, effect, atol=1e-12)
    low, high = uneven_results.interval(*asked, samples=50, align=align)
    known = np.isfinite(low)
    assert (low[known] <= effect[known] + 1e-12).all()
    assert (effect[known] <= high[known] + 1e-12).all()
    joint, total = uneven_results.windows("mlp_out", 2, *asked[1:], align=align, min_pairs=1)
    np.testing.assert_allclose(total[0], effect[:2, 0].sum(0), atol=1e-12)
    raw = uneven_results.store.read("sets/logit_diff")[0, 0, 0, :, 0, 0]  # [pair, set]
    names = list(uneven_results.grid("sets").positions)
    base = uneven_results.store.read("baseline/logit_diff")[:, 0, 0]  # [run, pair]
    for column, (name, places) in enumerate(columns_by_hand(uneven("or"), align).items()):
        cells = [
            np.mean([raw[i, names.index(f"mlp_out.0-1@{p}")] - base[1, i] for p in at])
            for i, at in enumerate(places)
            if at
        ]
        below = sum(base[0, i] - base[1, i] for i, at in enumerate(places) if at)
        assert joint[0, column] == pytest.approx(sum(cells) / below, abs=1e-9), name


@pytest.mark.parametrize("align", ["labels", "end"])
def test_arrays_by_meaning(uneven_results: ps.Results, align: str) -> None:
    """Per pair; their sums over pairs make the effect."""
    ds = uneven_results.to_xarray("head_z", by=align).sel(direction="noise")
    stored = uneven_results.to_xarray("head_z").sel(direction="noise")
    assert ds.prob.dims == ("pair", "layer", "head", "position")
    for name, places in columns_by_hand(uneven("or"), align).items():
        column = ds.sel(position=name)
        assert int(column.n_pairs) == sum(map(bool, places))
        for i, at in enumerate(places):
            for kind in ("prob", "prob_effect"):
                wanted = stored[kind][i].isel(position=at)
                mean = wanted.mean("position") if at else wanted.sum("position") * np.nan
                np.testing.assert_allclose(column[kind][i], mean, atol=1e-12)
            if len(at) == 1:
                status = stored.prob_status[i].isel(position=at[0])
                np.testing.assert_array_equal(column.prob_status[i], status)
    longest = max(range(4), key=lambda i: len(uneven("or")[i]))
    assert ds.token[longest].values[-1] == "speak"


def test_cells_of_few_pairs_are_left_out(uneven_results: ps.Results) -> None:
    """Half of the pairs at least, if nothing else is asked for."""
    asked = "head_z", "logit_diff", "denoise"
    by_index = uneven_results.effect(*asked, align="start")
    lengths = np.array([len(pair) for pair in uneven("or")])
    for p in range(lengths.max()):
        enough = (lengths > p).sum() >= 2
        assert np.isfinite(by_index.sel(position=p).values).all() == enough
    every = uneven_results.effect(*asked, align="start", min_pairs=1)
    assert np.isfinite(every.values).all()
    shown = uneven_results.top(*asked, n=100, align="start")
    assert shown.n_pairs.min() >= 2


def test_the_joint_check_patches_labels(uneven_results: ps.Results) -> None:
    joint = uneven_results.attrs["joint"]["head_z"]["denoise"]
    assert {site.partition("@")[2] for site in joint["sites"]} <= {"WORD", "END"}
    assert joint["joint"] == pytest.approx(1, abs=1e-9)  # heads 0.1 and 0.2 are among them


def test_top_by_head_has_each_head_once(uneven_results: ps.Results) -> None:
    table = uneven_results.top("head_z", "logit_diff", "denoise", 100, by="head")
    assert len(table) == len(set(zip(table.layer, table["head"], strict=True))) == 8
    effect = uneven_results.effect("head_z", "logit_diff", "denoise")
    for row in table.itertuples():
        of_head = effect.sel(layer=row.layer, head=row.head)
        assert abs(row.effect) == float(np.abs(of_head).max())
        assert float(of_head.sel(position=row.position)) == row.effect


def test_a_single_direction_is_the_default(uneven_results: ps.Results) -> None:
    first = uneven_results.effect("head_z", "logit_diff")
    np.testing.assert_array_equal(first, uneven_results.effect("head_z", "logit_diff", "denoise"))


def test_what_is_chosen_without_being_asked() -> None:
    shared = [{"S": 1, "END": 3}, {"S": 2, "END": 4}]
    assert meaning([4, 5], shared) == "labels"
    assert meaning([4, 4], [{"S": 1, "END": 3}] * 2) == "start"
    assert meaning([4, 4], [{"S": 1, "END": 3}, {"S": 2, "END": 3}]) == "labels"
    assert meaning([4, 5], [{"END": 3}, {"END": 4}]) == "end"
    assert meaning([4, 5], [{}, {}]) == "end"
    assert meaning([4, 5], [{"S": 1}, {"T": 1}]) == "end"
    assert meaning([4, 4], [{}, {}]) == "start"


def test_labels_whose_order_differs_stand_side_by_side() -> None:
    """IO and S1 change places: what lies between them is one segment."""
    labels = [{"IO": 1, "S1": 3, "S2": 6, "END": 7}, {"IO": 4, "S1": 2, "S2": 5, "END": 8}]
    found = aligned("labels", [8, 9], [7, 8], labels)
    assert found.names == (
        "before IO, S1",
        "IO",
        "S1",
        "among IO, S1",
        "IO, S1 … S2",
        "S2",
        "S2 … END",
        "END",
    )
    assert [list(at) for at in found.places(0)] == [[0], [1], [3], [2], [4, 5], [6], [], [7]]
    assert [list(at) for at in found.places(1)] == [[0, 1], [4], [2], [3], [], [5], [6, 7], [8]]
    assert found.single.tolist() == [False, True, True, False, False, True, False, True]


def test_labels_on_one_token_and_those_that_not_all_have() -> None:
    """As subjects of one token and of several: first, middle and last."""
    labels = [
        {"SUBJECT_1": 1, "SUBJECT_LAST": 1, "END": 3},
        {"SUBJECT_1": 1, "SUBJECT_2": 2, "SUBJECT_3": 3, "SUBJECT_LAST": 3, "END": 5},
    ]
    found = aligned("labels", [4, 6], [3, 5], labels)
    assert found.names == (
        "before SUBJECT_1",
        "SUBJECT_1",
        "SUBJECT_1 … SUBJECT_LAST",
        "SUBJECT_LAST",
        "SUBJECT_LAST … END",
        "END",
    )
    assert [list(at) for at in found.places(0)] == [[0], [1], [], [1], [2], [3]]
    assert [list(at) for at in found.places(1)] == [[0], [1], [2], [3], [4], [5]]


def test_from_the_end_counts_from_where_the_answer_is_read() -> None:
    """A continuation of three tokens: two of them are in the prompt, after the read position."""
    found = aligned("end", [5, 6], [2, 5], [{}, {}])
    assert found.names == ("-6", "-5", "-4", "-3", "-2", "-1", "+1", "+2")
    assert [list(at) for at in found.places(0)] == [[], [], [], [0], [1], [2], [3], [4]]
    assert [list(at) for at in found.places(1)] == [[0], [1], [2], [3], [4], [5], [], []]
    assert found.single.tolist() == [True] * 6 + [False] * 2


def test_ways_that_there_are_not() -> None:
    with pytest.raises(BadInput, match="align is 'middle': use one of labels, end, start"):
        aligned("middle", [3], [2], [{}])
    with pytest.raises(BadInput, match="the pairs have no label in common: use end or start"):
        aligned("labels", [3, 4], [2, 3], [{"S": 1}, {"T": 1}])


def test_positions_that_were_asked_for_stay(tmp_path: Path) -> None:
    pairs = uneven("and")
    results = ps.sweep(
        WRAPPED, pairs, components=["mlp_out"], positions=[1, 2], out=tmp_path / "r.zarr"
    )
    assert results.columns("mlp_out", "labels").names == (1, 2)
    [line] = [w for w in results.warnings() if "positions are indices" in w]
    assert "3 to 6 tokens" in line
    by_label = ps.sweep(
        WRAPPED, pairs, components=["mlp_out"], positions=["WORD"], out=tmp_path / "l.zarr"
    )
    assert not [w for w in by_label.warnings() if "positions are indices" in w]


def test_warnings_of_the_pairs(tmp_path: Path) -> None:
    """Two labels on one token, answers that are wrong, few pairs."""
    pairs = [
        make_pair(TOKENIZER, "the Nobel Peace", "the stones lamps", " Prize", " Medal", labels=at)
        for at in ({"A": 1, "B": 1}, {"A": 0, "B": 1})
    ]
    swapped = Pair(
        pairs[0].clean, pairs[0].corrupt, pairs[0].wrong, pairs[0].answer, {"A": 0, "B": 2}
    )
    results = ps.sweep(
        WRAPPED,
        [*pairs, swapped],
        components=["mlp_out"],
        metrics=["logit_diff", "rank"],
        out=tmp_path / "r.zarr",
    )
    said = "\n".join(results.warnings())
    assert "A and B are one token in 1 of 3 pairs" in said
    assert "the clean run prefers the wrong answer in 1 of 3 pairs" in said
    assert "3 pairs: intervals over them are wide" in said
    assert len(said.splitlines()) <= 10
