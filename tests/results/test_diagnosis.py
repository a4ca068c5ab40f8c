"""Warnings of results made by hand: which run, direction, pair and cell they speak of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep.results
from patchsweep.pairs import Pair
from patchsweep.sites import Grid, Status, blocks
from patchsweep.store import Store

GRID = Grid("head_z", ("denoise", "noise"), 2, 2, 3, (0, 1), 2, 3, 2)
PAIRS = [Pair((5, 6), (5, 1), (2,), (3,)), Pair((5, 7), (5, 1), (2,), (3,))]
CLEAN, CORRUPT = 0, 1
Ends = tuple[tuple[float, float], tuple[float, float]]  # clean, corrupt; of both pairs


def warnings(
    path: Path,
    ends: dict[str, Ends],
    changes: dict[str, Any],
    floors: dict[str, Ends] | None = None,
    **attrs: Any,
) -> list[str]:
    """`changes`: patched − destination, broadcast to [direction, pair, layer, unit, position]; NaN
    where a cell is structural."""
    spec = {"model": "tiny", "metrics": [*ends], **attrs.pop("spec", {})}
    said = {"spec": spec, "sources": [{"name": "other", "normalised": True, "samples": 1}]}
    store = Store.create(path, [GRID], [*ends], PAIRS, str, {**said, **attrs}, "float64")
    base = {m: np.array(x) for m, x in ends.items()}
    floor = {m: np.array((floors or {}).get(m, np.zeros((2, 2)))) for m in ends}
    store.write_baseline(0, 0, range(2), base, floor)
    values, status = {}, {}
    for m in ends:
        moved = np.broadcast_to(changes[m], (2, 2, 2, 3, 2))[:, None, None]
        destination = base[m][::-1][:, None, None, :, None, None, None]
        values[m] = destination + np.nan_to_num(moved)
        status[m] = np.where(np.isnan(moved), Status.STRUCTURAL, Status.EXACT).astype(np.uint8)
    for block in blocks(GRID):
        region = block.region(GRID)
        store.write_block(block, *({m: x[m][region] for m in ends} for x in (values, status)))
    return patchsweep.results.open(path).warnings()


EVERY = np.linspace(0.2, 0.4, 2 * 2 * 2 * 3 * 2).reshape(2, 2, 2, 3, 2)
FAR = ((4.0, 3.0), (1.0, 0.5))


def about(lines: list[str], words: str) -> list[str]:
    return [line for line in lines if words in line]


@pytest.mark.parametrize(
    ("prob", "direction"),
    [
        (((0.5, 0.6), (0.001, 0.002)), "denoise"),
        (((0.001, 0.002), (0.5, 0.6)), "noise"),
        (((0.5, 0.6), (0.999, 0.998)), "denoise"),
        (((0.999, 0.998), (0.5, 0.6)), "noise"),
    ],
)
def test_a_probability_is_saturated_in_the_run_that_is_patched(
    prob: Ends, direction: str, tmp_path: Path
) -> None:
    lines = warnings(tmp_path / "r", {"prob": prob}, {"prob": EVERY / 10})
    [line] = about(lines, "before anything is patched")
    assert f"({direction})" in line
    assert f"is {np.mean(prob[CORRUPT if direction == 'denoise' else CLEAN]):.3f}" in line or (
        "e-03" in line
    )


def test_the_noise_floor_is_that_of_the_run_that_is_patched(tmp_path: Path) -> None:
    """Of each pair by itself, and in its direction."""
    moved = np.ones((2, 2, 2, 3, 2))
    moved[:, :, 1] = -1  # by magnitude: in either layer
    moved[:, :, 0, 0, 0] = np.nan
    for number, (floor, under) in enumerate(
        (
            (((2.0, 0.0), (0.0, 0.0)), 11),
            (((0.0, 1.0), (0.0, 0.0)), 11),
            (((0.0, 0.0), (2.0, 2.0)), 22),
            (((0.0, 0.0), (0.0, 0.875)), 0),
        )
    ):
        folder = tmp_path / str(number)
        lines = warnings(folder, {"logit_diff": FAR}, {"logit_diff": moved}, {"logit_diff": floor})
        found = about(lines, "null patch")
        assert len(found) == bool(under)
        for line in found:
            assert line.startswith("of 44 cells that were run some changed no more")
            assert f"by logit_diff {under}: that is rounding" in line
            assert f"at most {np.max(floor):.1e}" in line


def test_what_never_changed(tmp_path: Path) -> None:
    nothing = np.zeros((2, 2, 2, 3, 2))
    once = nothing.copy()
    once[1, 1, 1, 2, 1] = -1
    once[:, :, 0, 0] = np.nan
    ends = {"logit_diff": FAR, "rank": ((0.0, 1.0), (4.0, 6.0))}
    lines = warnings(tmp_path / "a", ends, {"logit_diff": EVERY, "rank": nothing})
    [line] = about(lines, "rank changed in none of the 24 cells")
    assert line.startswith("head_z, denoise, head_z, noise: ")
    lines = warnings(tmp_path / "b", ends, {"logit_diff": EVERY, "rank": once})
    [line] = about(lines, "rank changed in none of the 20 cells")
    assert line.startswith("head_z, denoise")


def test_small_denominators_of_each_metric(tmp_path: Path) -> None:
    ends = {"logit_diff": ((4.0, 1.0), (0.0, 0.9)), "kl": ((0.0, 0.0), (3.0, 2.9))}
    lines = warnings(tmp_path / "r", ends, {"logit_diff": EVERY, "kl": EVERY})
    [line] = about(lines, "is below 5%")
    assert line.startswith("logit_diff")
    assert "in pair 1, whose" in line


def test_what_metrics_inside_say_is_not_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moved = {"logit_diff": EVERY, "neuron_0_1_-1": rng.normal(size=(2, 2, 2, 3, 2))}
    ends = {"logit_diff": FAR, "neuron_0_1_-1": FAR}
    inner = {"neuron": {"layer": 0, "neuron": 1, "position": -1}}
    said = {"spec": {"metrics": ["logit_diff", inner]}}
    assert about(warnings(tmp_path / "a", ends, moved, **said), "disagree") == []
    moved = {"logit_diff": EVERY, "prob_diff": moved["neuron_0_1_-1"]}
    lines = warnings(tmp_path / "b", {"logit_diff": FAR, "prob_diff": FAR}, moved)
    assert about(lines, "disagree") != []


def test_of_cells_that_were_run_in_any_pair(tmp_path: Path) -> None:
    """The others are equal in all metrics, and prove no agreement."""
    moved = {m: np.full((2, 2, 2, 3, 2), np.nan) for m in ("logit_diff", "prob_diff")}
    moved["logit_diff"][:, 0, 1] = [[3, 2], [1, 4], [5, 6]]
    moved["prob_diff"][:, 0, 1] = [[3, 4], [6, 2], [1, 1.5]]
    ends = {"logit_diff": FAR, "prob_diff": FAR}
    [line] = about(warnings(tmp_path / "r", ends, moved), "disagree")
    assert line.startswith("head_z, denoise, head_z, noise: ")


def test_cells_together_against_each_alone(tmp_path: Path) -> None:
    joint = {"head_z": {"noise": {"sites": [], "joint": 0.9, "singles": [0.1, 0.2]}}}
    lines = warnings(tmp_path / "r", {"logit_diff": FAR}, {"logit_diff": EVERY}, joint=joint)
    [line] = about(lines, "together have")
    assert line.startswith("head_z, noise: the top 2 together have +0.90")


def test_one_direction_only(tmp_path: Path) -> None:
    """Which cell matters in which direction, and which goes the other way."""
    moved = np.random.default_rng(0).uniform(-0.01, 0.01, (2, 2, 2, 3, 2))
    moved[0, :, 1, 2, 1] = 2.5  # denoise, from corrupt up
    moved[1, :, 0, 1, 0] = -2.5  # noise, from clean down
    moved[0, :, 0, 0, 1] = -1.5
    lines = warnings(tmp_path / "r", {"logit_diff": FAR}, {"logit_diff": moved})
    [line] = about(lines, "matter when noised, not when denoised")
    one, other, advice = line.split("; ")
    assert one.endswith("not when denoised (parts of an AND): 0.1@0")
    assert "matter when denoised, not when noised" in other
    assert "1.2@1" in other
    assert "0.1@0" not in other
    assert advice == "do not judge them by one direction alone"
