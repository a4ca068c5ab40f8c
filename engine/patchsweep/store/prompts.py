"""The prompt pairs of a sweep: how they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import zarr
from numpy.typing import NDArray

from patchsweep.pairs import Pair
from patchsweep.store.array_store import ArrayStore
from patchsweep.store.arrays import RUNS, put


def prompt_texts(
    pairs: Sequence[Pair], token_strings: Callable[[int], str]
) -> dict[str, NDArray[np.object_]]:
    """The texts of the tokens of the clean and the corrupt prompts, [pair, position] each, empty
    behind a prompt's end."""
    width = _width(pairs)
    found = {}
    for run in RUNS:
        rows = [[token_strings(token) for token in getattr(pair, run)] for pair in pairs]
        padded = [[*row, *[""] * (width - len(row))] for row in rows]
        found[run] = np.array(padded, dtype=object).reshape(len(pairs), width)
    return found


def create_prompts(
    root: zarr.Group,
    pairs: Sequence[Pair],
    token_strings: Callable[[int], str],
    strings: Mapping[str, NDArray[np.object_]],
) -> None:
    """The group of the prompts; `strings` are their `prompt_texts`."""

    def texts(sets: Sequence[tuple[int, ...]]) -> list[list[str]]:
        return [[token_strings(token) for token in tokens] for tokens in sets]

    answer, wrong = [pair.answer for pair in pairs], [pair.wrong for pair in pairs]
    group = root.create_group(
        "prompts",
        attributes={
            "labels": [dict(pair.labels) for pair in pairs],
            "answer": [list(tokens) for tokens in answer],
            "wrong": [list(tokens) for tokens in wrong],
            "answer_text": texts(answer),
            "wrong_text": texts(wrong),
            "aligned": [pair.align is not None for pair in pairs],
            "others": [dict(pair.others) for pair in pairs],
            "continuation": [list(pair.continuation) for pair in pairs],
        },
    )
    width = _width(pairs)
    dims = ("pair", "position")
    for run in RUNS:
        rows = [getattr(pair, run) for pair in pairs]
        tokens = [[*row, *[-1] * (width - len(row))] for row in rows]
        put(group, f"{run}_tokens", dims, np.array(tokens, dtype=np.int32))
        put(group, f"{run}_text", dims, strings[run])
    put(group, "length", ("pair",), np.array([len(pair) for pair in pairs], dtype=np.int32))
    align = [[*pair.alignment.tolist(), *[-1] * (width - len(pair))] for pair in pairs]
    put(group, "align", dims, np.array(align, dtype=np.int32))
    put(group, "group", ("pair",), np.array([pair.group for pair in pairs], dtype=object))
    put(group, "pair", ("pair",), np.arange(len(pairs)))
    put(group, "position", ("position",), np.arange(width))


def _width(pairs: Sequence[Pair]) -> int:
    return max(len(tokens) for pair in pairs for tokens in (pair.clean, pair.corrupt))


def stored_pairs(store: ArrayStore) -> list[Pair]:
    """The prompt pairs of the sweep."""
    said = store.node_attrs("prompts")
    clean, corrupt, align = (
        store.read(f"prompts/{name}").tolist()
        for name in ("clean_tokens", "corrupt_tokens", "align")
    )
    length, group = (store.read(f"prompts/{name}").tolist() for name in ("length", "group"))
    return [
        Pair(
            clean=tuple(clean[i][:n]),
            corrupt=tuple(t for t in corrupt[i] if t >= 0),
            answer=tuple(said["answer"][i]),
            wrong=tuple(said["wrong"][i]),
            labels=said["labels"][i],
            group=group[i],
            align=tuple(align[i][:n]) if said["aligned"][i] else None,
            others={k: tuple(v) for k, v in said["others"][i].items()},
            continuation=tuple(said["continuation"][i]),
        )
        for i, n in enumerate(length)
    ]
