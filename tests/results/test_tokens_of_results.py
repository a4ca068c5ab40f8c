"""The words at the positions of results, where prompts are aligned, labelled or noised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep.results
from patchsweep.pairs import Pair
from patchsweep.results import Results
from patchsweep.sites import Grid, Status, blocks
from patchsweep.store import Store

# The corrupt prompt has a token more in front; of position 1 it has none.
PAIRS = [
    Pair((5, 6, 7), (9, 4, 1, 7), (2,), (3,), {"S": 0, "END": 2}, align=(2, -1, 3)),
    Pair((5, 6, 7, 8), (9, 3, 1, 2, 8), (2,), (3,), {"S": 2, "END": 3}, align=(2, -1, 1, 4)),
]


def made(path: Path, positions: Any, **spec: Any) -> Results:
    grid = Grid("mlp_out", ("denoise", "noise"), 2, 1, 1, positions, 2, 1, len(positions), 3)
    attrs = {"spec": {"model": "tiny", **spec}, "sources": [{"name": "other", "normalised": True}]}
    store = Store.create(path, [grid], ["m"], PAIRS, lambda t: f"<{t}>", attrs, "float64")
    base = np.array([[2.0, 2.0], [0.0, 0.0]])
    store.write_baseline(0, 0, range(2), {"m": base}, {"m": base * 0})
    for block in blocks(grid):
        shape = (1, 1, 1, 2, 1, 1, len(positions))
        values = np.ones(shape) + np.arange(len(positions))
        status = np.full(shape, Status.EXACT, np.uint8)
        store.write_block(block, {"m": values}, {"m": status})
    return patchsweep.results.open(path)


def test_aligned(tmp_path: Path) -> None:
    """The corrupt prompt's word is that of the position that stands for the clean one."""
    found = made(tmp_path / "r", (0, 1, 2, 3))
    # Position 2 has other words in the two pairs, position 3 only one of them has.
    assert found.column_tokens("mlp_out", found.columns("mlp_out", "start")) == [
        "<5>/<1>",
        "<6>/",
        "",
        "<8>",
    ]
    words = found.to_frame().groupby(["direction", "pair"], observed=True)["token"].apply(list)
    assert words["noise", 0] == ["<5>", "<6>", "<7>", ""]
    assert words["noise", 1] == ["<5>", "<6>", "<7>", "<8>"]
    assert words["denoise", 0] == ["<1>", "", "<7>", ""]
    assert words["denoise", 1] == ["<1>", "", "<3>", "<8>"]


def test_labels_are_each_pairs_own(tmp_path: Path) -> None:
    found = made(tmp_path / "r", ("S", "END"))
    words = found.to_frame().groupby(["direction", "pair"], observed=True)["token"].apply(list)
    assert words["noise", 0] == ["<5>", "<7>"]
    assert words["noise", 1] == ["<7>", "<8>"]
    assert words["denoise", 1] == ["<3>", "<8>"]


@pytest.mark.parametrize(
    "spec", [{"corrupt": {"gaussian": {}}}, {"source": ["zero"]}, {"source": ["second"]}]
)
def test_noise_is_on_the_clean_prompt(spec: Any, tmp_path: Path) -> None:
    found = made(tmp_path / "r", (0, 1, -1), **spec)
    assert found.column_tokens("mlp_out", found.columns("mlp_out", "start")) == ["<5>", "<6>", ""]
    assert found.to_frame()["token"].tolist()[:2] == ["<5>", "<6>"]


def test_layers_count_from_the_first_there_is(tmp_path: Path) -> None:
    """An autoencoder reads in one layer."""
    [best] = made(tmp_path / "r", (0, 1)).top("mlp_out", "m", "denoise", 1).itertuples()
    assert (best.layer, best.position, best.effect) == (3, 1, 1.0)
