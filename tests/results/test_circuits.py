"""A circuit's curve: sizes in one unit, areas over what was measured. What runs should give comes
from plain hooks on the output projections."""

from __future__ import annotations

from collections.abc import Collection
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import patchsweep as ps
from inputs import Letters
from oracle.families import FAMILIES
from patchsweep.pairs import Pair
from patchsweep.report.figures import plot
from patchsweep.report.terminal import show
from patchsweep.results.circuits import curve

LAYERS, HEADS, D_HEAD = 3, 6, 8
Head = tuple[int, int]
RANKING: list[Head] = [(2, 1), (0, 3), (1, 1), (2, 5), (0, 0), (1, 4), (2, 2), (1, 0)]
EVERY: list[Head] = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(FAMILIES["llama"].build(LAYERS), Letters())


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    made = [rng.integers(3, 50, (2, n)).tolist() for n in (7, 7, 6)]
    return [Pair(tuple(clean), tuple(corrupt), (5,), (7,)) for clean, corrupt in made]


def sites(heads: Collection[Head], at: str = "") -> list[str]:
    return [f"head_z.{layer}.{head}{at}" for layer, head in heads]


def difference(model: ps.Model, tokens: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model.hf_model(input_ids=torch.tensor([tokens])).logits[0, -1]
    return float(logits[5] - logits[7])


def patched(
    model: ps.Model,
    into: tuple[int, ...],
    source: tuple[int, ...] | None,
    heads: Collection[Head],
    places: Collection[int] | None = None,
) -> float:
    """The logit difference of a run with some heads' z, [position], from another run, or zero."""
    layers: Any = model.hf_model.model.layers
    projections = [layer.self_attn.o_proj for layer in layers]
    seen: dict[int, torch.Tensor] = {}
    handles = [
        p.register_forward_pre_hook(lambda _, x, i=i: seen.__setitem__(i, x[0].clone()))
        for i, p in enumerate(projections)
    ]
    difference(model, source or into)
    for handle in handles:
        handle.remove()

    def hook(layer: int) -> Any:
        def put(_: Any, x: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            new = x[0].clone()
            at = list(range(new.shape[1]) if places is None else places)
            for of, head in heads:
                if of == layer:
                    part = slice(head * D_HEAD, (head + 1) * D_HEAD)
                    new[:, at, part] = seen[layer][:, at, part] if source else 0.0
            return (new,)

        return put

    handles = [p.register_forward_pre_hook(hook(i)) for i, p in enumerate(projections)]
    found = difference(model, into)
    for handle in handles:
        handle.remove()
    return found


def faithful(model: ps.Model, pairs: list[Pair], kept: Collection[Head]) -> float:
    """With all other heads noised."""
    others = [head for head in EVERY if head not in kept]
    ends = [(difference(model, p.clean), difference(model, p.corrupt)) for p in pairs]
    moved = [
        patched(model, p.clean, p.corrupt, others) - clean
        for p, (clean, _) in zip(pairs, ends, strict=True)
    ]
    return 1 - sum(moved) / sum(corrupt - clean for clean, corrupt in ends)


@pytest.mark.parametrize("positions", ["all", "each", {"first": [0, 1], "rest": [2, 3, 4, 5, 6]}])
def test_whole_heads_count_alike_inside_and_outside(
    model: ps.Model, pairs: list[Pair], tmp_path: Path, positions: Any
) -> None:
    """In whatever positions the others are taken."""
    sizes = [1, 3, 8]
    results = ps.sweep(
        model,
        pairs,
        positions=positions,
        direction="both",
        circuit={"ranking": sites(RANKING), "sizes": sizes},
        out=tmp_path / "r",
    )
    found = results.circuit("logit_diff")
    assert found.sizes == tuple(sizes)
    np.testing.assert_allclose(found.fraction, np.array(sizes) / len(EVERY))
    expected = [faithful(model, pairs, RANKING[:k]) for k in sizes]
    np.testing.assert_allclose(found.faithfulness, expected, atol=1e-9)
    empty = faithful(model, pairs, [])
    assert found.empty == pytest.approx(empty, abs=1e-9)
    assert abs(empty) > 1e-3  # the embedding of the last token is not noised
    ends = [(difference(model, p.clean), difference(model, p.corrupt)) for p in pairs]
    for k, recovered in zip(sizes, found.recovered, strict=True):
        back = sum(
            patched(model, p.corrupt, p.clean, RANKING[:k]) - corrupt
            for p, (_, corrupt) in zip(pairs, ends, strict=True)
        )
        assert recovered == pytest.approx(back / sum(a - b for a, b in ends), abs=1e-9)
    y, x = np.array([empty, *expected]), np.array([0, *sizes]) / len(EVERY)
    assert found.span == pytest.approx(8 / 18)
    area = sum((y[1:] + y[:-1]) / 2 * np.diff(x))
    assert found.cpr == pytest.approx(area, abs=1e-9)


def test_single_positions_and_whole_heads_mixed(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    """A head at two of seven positions, a whole one, and one of its own positions again."""
    ranking = [*sites([(0, 1)], "@3"), *sites([(2, 2)]), *sites([(2, 2)], "@4")]
    ranking += sites([(0, 1)], "@6")
    results = ps.sweep(
        model, pairs[:2], direction="noise", circuit={"ranking": ranking}, out=tmp_path / "r"
    )
    found = results.circuit("logit_diff")
    assert found.sizes == (1, 2, 4)
    np.testing.assert_allclose(found.fraction, np.array([1, 8, 9]) / (18 * 7))


def test_only_components_within_count(model: ps.Model, pairs: list[Pair], tmp_path: Path) -> None:
    results = ps.sweep(
        model,
        pairs,
        direction="noise",
        positions="all",
        circuit={"ranking": ["mlp_out.1", *sites(RANKING)], "within": ["head_z", "mlp_out"]},
        out=tmp_path / "r",
    )
    found = results.circuit("logit_diff")
    np.testing.assert_allclose(found.fraction, np.array(found.sizes) / 21)


def test_the_whole_ends_in_the_clean_run(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    order = RANKING + [head for head in EVERY if head not in RANKING]
    results = ps.sweep(
        model,
        pairs,
        direction="noise",
        circuit={"ranking": sites(order), "sizes": [9, 18]},
        out=tmp_path / "r",
    )
    found = results.circuit("logit_diff")
    assert found.span == 1
    assert found.faithfulness[-1] == 1
    assert found.areas == f"CPR {found.cpr:.3f}, CMD {found.cmd:.3f}"


def test_a_source_without_a_run(model: ps.Model, pairs: list[Pair], tmp_path: Path) -> None:
    """Shares of what zeroing everything does, as in MIB."""
    results = ps.sweep(
        model,
        pairs,
        source="zero",
        direction="noise",
        circuit={"ranking": sites(RANKING), "sizes": [2, 8]},
        out=tmp_path / "r",
    )
    found = results.circuit("logit_diff")

    def mean(kept: Collection[Head]) -> float:
        others = [head for head in EVERY if head not in kept]
        return float(np.mean([patched(model, p.clean, None, others) for p in pairs]))

    clean, none = mean(EVERY), mean([])
    expected = [(mean(RANKING[:k]) - none) / (clean - none) for k in (2, 8)]
    np.testing.assert_allclose(found.faithfulness, expected, atol=1e-9)
    assert found.empty == pytest.approx(0, abs=1e-9)
    assert plot(results, tmp_path / "figures", ["svg"])


def test_the_span_is_said_wherever_the_areas_are(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    results = ps.sweep(
        model,
        pairs,
        direction="noise",
        circuit={"ranking": sites(RANKING), "sizes": [1, 8]},
        out=tmp_path / "r",
    )
    found = results.circuit("logit_diff")
    said = f"CPR {found.cpr:.3f}, CMD {found.cmd:.3f}, over the first 44.4% of the sites"
    assert found.areas == said
    text = StringIO()
    show(results, Console(file=text, width=100))
    assert said in " ".join(text.getvalue().split())


def test_cpr_and_cmd_by_hand() -> None:
    names = [f"circuit {kind} {k}" for k in (1, 5) for kind in ("top", "outside")]
    names.append("circuit outside 0")
    noised, denoised = np.array([0.0, 0.5, 0.0, -0.2, 0.9]), np.array([0.3, 0.0, 0.9, 0.0, 0.0])
    found = curve(names, noised, denoised, np.array([1, 9, 5, 5, 10]))
    assert found.faithfulness.tolist() == [0.5, 1.2]
    assert found.recovered.tolist() == [0.3, 0.9]
    assert found.empty == pytest.approx(0.1)
    assert found.span == 0.5
    area = (0.1 + 0.5) / 2 * 0.1 + (0.5 + 1.2) / 2 * 0.4
    assert found.cpr == pytest.approx(area)
    gap = (0.9 + 0.5) / 2 * 0.1 + (0.5 + 0.2) / 2 * 0.4
    assert found.cmd == pytest.approx(gap)


def test_only_denoised(model: ps.Model, pairs: list[Pair], tmp_path: Path) -> None:
    results = ps.sweep(model, pairs, circuit={"ranking": sites(RANKING)}, out=tmp_path / "r")
    found = results.circuit("logit_diff")
    assert np.isnan([found.cpr, found.cmd, found.empty, *found.faithfulness]).all()
    assert np.isfinite(found.recovered).all()
