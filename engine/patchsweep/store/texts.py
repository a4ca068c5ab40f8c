"""What is at positions: the texts and labels of tokens, and how many pairs have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.pairs import Pair

Texts = NDArray[np.object_]
Entries = Sequence[int] | Sequence[str]


def two_prompts(attrs: Mapping[str, Any]) -> bool:
    """Whether the corrupt run of results that say `attrs` is that of the corrupt prompt; noise is
    on the clean one's embeddings, and zero, means and vectors are patched into the clean run."""
    spec = attrs.get("spec", {})
    return spec.get("corrupt", "pairs") == "pairs" and "other" in spec.get("source", ["other"])


def texts_of(
    pairs: Sequence[Pair],
    entries: Entries,
    attrs: Mapping[str, Any],
    clean: Texts,
    corrupt: Texts,
) -> dict[str, NDArray[Any]]:
    """The arrays `token` and `label` [pair, position], of str, and `n_pairs` [position] of a
    component with these entries of its positions, in results that say `attrs`.

    clean, corrupt: the texts of the prompts' tokens, [pair, token]. `token` is clean/corrupt where
    the two prompts differ; both are empty outside the prompt and for entries of several tokens.
    Labels of one token are joined by ", ".
    """
    groups = attrs.get("spec", {}).get("positions")
    groups = groups if isinstance(groups, Mapping) else {}
    known = {name for pair in pairs for name in pair.labels}
    lengths = np.array([len(pair) for pair in pairs])
    ends = np.array([pair.read + 1 for pair in pairs])  # before a continuation

    def places(entry: int | str) -> NDArray[np.int64]:
        """The token [pair] that a label or an index is, −1 where a pair has none."""
        if isinstance(entry, str):
            return np.array([pair.labels.get(entry, -1) for pair in pairs])
        found = entry + (ends if entry < 0 else 0 * ends)
        return np.where((found >= 0) & (found < lengths), found, -1)

    at = np.full((len(pairs), len(entries)), -1)
    count = np.full(len(entries), len(pairs))  # "all"
    for column, entry in enumerate(entries):
        members = groups.get(entry, [entry])
        if all(isinstance(member, int) or member in known for member in members):
            found = np.stack([places(member) for member in members])
            count[column] = (found >= 0).any(0).sum()
            if list(members) == [entry]:
                at[:, column] = found[0]
    token = _taken(clean, at)
    if two_prompts(attrs):
        other = _taken(corrupt, _counterparts(pairs, at))
        token = np.where(token == other, token, token + "/" + other)
        token[at < 0] = ""
    return {"token": token, "label": _labels(pairs, at), "n_pairs": count}


def _counterparts(pairs: Sequence[Pair], at: NDArray[np.int64]) -> NDArray[np.int64]:
    """The corrupt token that stands for a clean one, −1 for none."""
    return np.stack(
        [np.where(row >= 0, pair.alignment[row], -1) for pair, row in zip(pairs, at, strict=True)]
    )


def _taken(texts: Texts, at: NDArray[np.int64]) -> Texts:
    """[pair, position]: the texts of these tokens, empty for −1."""
    found = np.take_along_axis(texts.astype(object), np.maximum(at, 0), axis=1)
    return np.where(at >= 0, found, "").astype(object)


def _labels(pairs: Sequence[Pair], at: NDArray[np.int64]) -> Texts:
    found = np.full(at.shape, "", dtype=object)
    for row, places, pair in zip(found, at, pairs, strict=True):
        for name, place in pair.labels.items():
            for column in np.flatnonzero(places == place):
                row[column] = f"{row[column]}, {name}" if row[column] else name
    return found
