"""Which cells can change anything, against a search through the graph of a small transformer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from patchsweep.plan.cone import cone, reach

# A node: what it is, its layer, its position.
Node = tuple[str, int, int]
PLACES = {
    "embed": "in",
    "resid_pre": "in",
    "head_q": "query",
    "head_k": "key",
    "head_v": "value",
    "head_pattern": "pattern",
    "head_z": "z",
    "attn_out": "attention",
    "resid_mid": "mid",
    "neuron": "hidden",
    "mlp_out": "mlp",
    "resid_post": "out",
}


def edges(layers: int, length: int, windows: tuple[int | None, ...]) -> dict[Node, list[Node]]:
    """What every node is computed from."""
    found: dict[Node, list[Node]] = {}
    for i in range(layers):
        for p in range(length):
            seen = [k for k in range(p + 1) if windows[i] is None or p - k < windows[i]]
            found["in", i, p] = [("out", i - 1, p)] if i else []
            for part in ("query", "key", "value"):
                found[part, i, p] = [("in", i, p)]
            found["pattern", i, p] = [("query", i, p), *(("key", i, k) for k in seen)]
            found["z", i, p] = [("pattern", i, p), *(("value", i, k) for k in seen)]
            found["attention", i, p] = [("z", i, p)]
            found["mid", i, p] = [("in", i, p), ("attention", i, p)]
            found["hidden", i, p] = [("mid", i, p)]
            found["mlp", i, p] = [("hidden", i, p)]
            found["out", i, p] = [("mid", i, p), ("mlp", i, p)]
    return found


def behind(starts: Iterable[Node], graph: dict[Node, list[Node]]) -> set[Node]:
    """The starts and all that can be come to from them."""
    found, open_ = set(starts), list(starts)
    while open_:
        for node in graph[open_.pop()]:
            if node not in found:
                found.add(node)
                open_.append(node)
    return found


def expected(
    differs: np.ndarray, windows: tuple[int | None, ...], reads: np.ndarray, inner: np.ndarray
) -> dict[str, np.ndarray]:
    layers, length = len(windows), len(differs)
    back = edges(layers, length, windows)
    forth: dict[Node, list[Node]] = {node: [] for node in back}
    for node, sources in back.items():
        for source in sources:
            forth[source].append(node)
    other = behind([("in", 0, p) for p in range(length) if differs[p]], forth)
    read = [("out", layers - 1, p) for p in range(length) if reads[p]]
    # What is read inside a layer may be anywhere in it.
    read += [("out", i, p) for i in range(layers) for p in range(length) if inner[i, p]]
    needed = behind(read, back)
    return {
        name: np.array(
            [
                [(kind, i, p) in other and (kind, i, p) in needed for p in range(length)]
                for i in range(1 if name == "embed" else layers)
            ]
        )
        for name, kind in PLACES.items()
    }


def check(
    differs: np.ndarray, windows: tuple[int | None, ...], reads: np.ndarray, inner: np.ndarray
) -> None:
    found = cone(differs, windows, reads, inner)
    for name, there in expected(differs, windows, reads, inner).items():
        np.testing.assert_array_equal(found.exists(name), there, name)


def at(length: int, *positions: int) -> np.ndarray:
    out = np.zeros(length, bool)
    out[list(positions)] = True
    return out


@pytest.mark.parametrize("windows", [(None,) * 3, (3, 3, 3), (2, None, 1), (4, 2, None), (9, 5, 6)])
@pytest.mark.parametrize("first", range(6))
def test_one_token_and_the_last_read(windows: tuple[int | None, ...], first: int) -> None:
    nothing = np.zeros((3, 6), bool)
    check(at(6, first), windows, at(6, 5), nothing)
    check(at(6, first), windows, at(6, 3), nothing)
    inner = nothing.copy()
    inner[1, 4] = inner[0, 2] = True
    check(at(6, first), windows, at(6, 3, 5), inner)


def test_any() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        layers, length = rng.integers(1, 5), rng.integers(1, 9)
        windows = tuple(int(w) or None for w in rng.choice([0, 1, 2, 3, 5, 8, 9], layers))
        differs, reads = rng.random((2, length)) < rng.choice([0.1, 0.4, 0.8], (2, 1))
        check(differs, windows, reads, rng.random((layers, length)) < rng.choice([0, 0.1]))


def test_what_is_seen_by_hand() -> None:
    marked = at(6, 1, 4)
    assert reach(marked, None).tolist() == [False, True, True, True, True, True]
    assert reach(marked, 1).tolist() == marked.tolist()
    assert reach(marked, 2).tolist() == [False, True, True, False, True, True]
    assert reach(marked, 3).tolist() == [False, True, True, True, True, True]
    assert reach(at(6, 0), 5).tolist() == [True] * 5 + [False]
    assert reach(at(6, 0), 6).tolist() == [True] * 6
