"""Sweeps against the oracle: every kind of cell, of many families, one full forward each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchsweep as ps
from oracle import oracle
from oracle.families import FAMILIES, Family, prompts
from patchsweep import families
from patchsweep.pairs import Pair
from patchsweep.sites import COMPONENTS, Status

METRICS: list[Any] = [
    "logit_diff",
    {"logit_diff": {"reduce": "sum"}},
    "logit",
    "logprob",
    "prob",
    "rank",
    {"accuracy": {"k": 5}},
    "kl",
]


class Letters:
    """A tokenizer as far as a sweep needs one."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"<{t}>" for t in tokens)


def pair_of(rng: np.random.Generator, vocab: int, length: int, n_differ: int) -> Pair:
    clean, corrupt = prompts(rng, vocab, length, n_differ)
    sets = rng.permutation(np.arange(3, vocab))
    a, b = rng.integers(1, 3, 2)
    answer, wrong = (tuple(map(int, s)) for s in (sets[:a], sets[a : a + b]))
    return Pair(clean, corrupt, answer, wrong)


def values(pair: Pair, logits: Any, clean: Any) -> dict[str, Any]:
    """The oracle's metrics of logits [..., vocab], by column."""
    return {
        "logit_diff": oracle.logit_diff(logits, pair.answer, pair.wrong),
        "logit_diff_sum": oracle.logit_diff(logits, pair.answer, pair.wrong, "sum"),
        "logit": oracle.logit(logits, pair.answer),
        "logprob": oracle.logprob(logits, pair.answer),
        "prob": oracle.prob(logits, pair.answer),
        "rank": oracle.rank(logits, pair.answer),
        "accuracy_k5": oracle.accuracy(logits, pair.answer, 5),
        "kl": oracle.kl(clean, logits),
    }


@dataclass(frozen=True)
class Case:
    """A sweep and how many of its cells are checked."""

    family: str
    pairs: list[Pair]
    components: list[str]
    positions: Any
    direction: str
    budget: int
    layers: int
    seed: int


def check(case: Case, cells: int | None) -> int:
    """Sweep, then compare `cells` random cells (all if None) with the oracle; how many were run."""
    family = FAMILIES[case.family]
    hf_model = family.build(case.layers, case.seed)
    with TemporaryDirectory() as folder:
        results = ps.sweep(
            ps.wrap(hf_model, Letters()),
            case.pairs,
            components=case.components,
            positions=case.positions,
            direction=case.direction,
            metrics=METRICS,
            token_budget=case.budget,
            out=Path(folder, "r.zarr"),
        )
        assert results.complete
        grids = {c: load(results, c) for c in case.components}
        floor = max(float(np.nanmax(results.noise_floor(m))) for m in results.metrics)
    assert floor <= family.tolerance

    candidates = [
        (c, *index)
        for c in case.components
        for index in np.ndindex(*grids[c]["logit_status"].shape)
    ]
    rng = np.random.default_rng(case.seed)
    if cells is not None:
        chosen = rng.permutation(len(candidates))[:cells]
        candidates = [candidates[i] for i in chosen]
    run = 0
    for component, *index in candidates:
        run += compare(case, family, hf_model, grids[component], component, *index)
    return run


def load(results: ps.Results, component: str) -> dict[str, Any]:
    """Values and statuses [direction, pair, layer, unit, position] of a component."""
    arrays = {}
    for metric in results.metrics:
        for name in (metric, f"{metric}_status"):
            arrays[name] = results.store.read(f"{component}/{name}")[:, 0, 0]
    arrays["directions"] = results.grid(component).directions
    return arrays


def compare(
    case: Case,
    family: Family,
    hf_model: Any,
    found: dict[str, Any],
    component: str,
    d: int,
    p: int,
    layer: int,
    unit: int,
    entry: int,
) -> bool:
    """One cell: its status, and every metric against a full forward. Whether it was run."""
    pair = case.pairs[p]
    at = (d, p, layer, unit, entry)
    positions = range(len(pair))
    if case.positions != "all":
        position = entry if case.positions == "each" else case.positions[entry]
        position = position + len(pair) if position < 0 else position
        if position >= len(pair):
            assert all(found[f"{m}_status"][at] == Status.OUTSIDE for m in COLUMNS)
            assert all(np.isnan(found[m][at]) for m in COLUMNS)
            return False
        positions = range(position, position + 1)
    denoise = found["directions"][d] == "denoise"
    ids = (pair.corrupt, pair.clean) if denoise else (pair.clean, pair.corrupt)
    logits = oracle.run(
        hf_model,
        family,
        *ids,
        component,
        layer,
        unit if component == "head_z" else None,
        positions,
    )
    clean = oracle.run_set(hf_model, family, pair.clean, pair.clean, [])
    for column, expected in values(pair, logits, clean).items():
        difference = abs(found[column][at] - expected)
        assert difference <= family.tolerance, (case, component, at, column, difference)
        assert found[f"{column}_status"][at] in (Status.EXACT, Status.STRUCTURAL)
    return bool(found["logit_status"][at] == Status.EXACT)


COLUMNS = list(values(Pair((1,), (2,), (3,), (4,)), np.zeros(50), np.zeros(50)))


def components_of(name: str) -> list[str]:
    """All components, without resid_mid where blocks are parallel."""
    return [c for c in COMPONENTS if c != "resid_mid" or not FAMILIES[name].parallel]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    """Every component and both directions, three prompts of different lengths, several waves."""
    rng = np.random.default_rng(7)
    pairs = [pair_of(rng, 50, length, n) for length, n in ((9, 1), (6, 2), (7, 1))]
    case = Case(name, pairs, components_of(name), "each", "both", 900, 3, 1)
    assert check(case, 70) > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_float32(name: str, tmp_path: Path) -> None:
    """In float32 a conversion to float32 is no copy: every write to the stream, still found."""
    pair = pair_of(np.random.default_rng(5), 50, 6, 1)
    family, hf_model = FAMILIES[name], FAMILIES[name].build(3, dtype=torch.float32)
    components = [c for c in components_of(name) if c != "head_z"]
    results = ps.sweep(
        ps.wrap(hf_model, Letters()),
        [pair],
        components=components,
        metrics=["logit"],
        out=tmp_path / "r.zarr",
    )
    for component in components:
        found = results.store.read(f"{component}/logit")[0, 0, 0, 0, :, 0]
        for layer, position in ((0, 5), (1, 4), (2, 5)):
            logits = oracle.run(
                hf_model, family, pair.corrupt, pair.clean, component, layer, None, [position]
            )
            assert abs(found[layer, position] - oracle.logit(logits, pair.answer)) < 2e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_whole_grids(name: str) -> None:
    """Every single cell, the structural ones among them."""
    rng = np.random.default_rng(3)
    pairs = [pair_of(rng, 50, 7, 1), pair_of(rng, 50, 6, 1)]
    case = Case(name, pairs, components_of(name), "each", "both", 100_000, 2, 2)
    assert check(case, None) > 100


@settings(max_examples=40)
@given(st.data())
def test_any_sweep(data: st.DataObject) -> None:
    """Family, sizes, lengths, differing tokens, components, positions, direction, budget: drawn."""
    name = data.draw(st.sampled_from(sorted(FAMILIES)))
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=4))
    pairs = [pair_of(rng, 50, n, int(rng.integers(1, n + 1))) for n in lengths]
    components = data.draw(
        st.lists(st.sampled_from(components_of(name)), min_size=1, max_size=3, unique=True)
    )
    shortest = min(lengths)
    chosen = st.lists(st.integers(-shortest, shortest - 1), min_size=1, max_size=3, unique=True)
    positions = data.draw(st.sampled_from(["each", "all"]) | chosen)
    case = Case(
        name,
        pairs,
        components,
        positions,
        data.draw(st.sampled_from(["denoise", "noise", "both"])),
        data.draw(st.sampled_from([350, 700, 5000])),
        data.draw(st.integers(1, 4)),
        seed,
    )
    check(case, 12)


def test_parallel_blocks_have_no_resid_mid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (n for n in FAMILIES if FAMILIES[n].parallel):
        model = ps.wrap(FAMILIES[name].build(2), Letters())
        with pytest.raises(ps.BadInput, match=r"resid_mid cannot be patched.*parallel"):
            ps.sweep(model, [pair_of(rng, 50, 5, 1)], components=["resid_mid"], out=tmp_path / name)
        assert not (tmp_path / name).exists()


def test_the_models_table_is_the_one_checked_here() -> None:
    assert {f.name: (f.parallel, f.tolerance) for f in families.FAMILIES} == {
        name: (f.parallel, f.tolerance) for name, f in FAMILIES.items()
    }


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    hf_model = FAMILIES["llama"].build(2)
    rng = np.random.default_rng(0)
    before = {k: v.clone() for k, v in hf_model.state_dict().items()}
    ps.sweep(
        ps.wrap(hf_model, Letters()),
        [pair_of(rng, 50, 5, 1)],
        components=["head_z", "mlp_out"],
        out=tmp_path / "r.zarr",
    )
    assert hf_model.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, before[k]) for k, v in hf_model.state_dict().items())
    assert not any("forward" in vars(m) for m in hf_model.modules())
