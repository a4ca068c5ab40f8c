"""Which position of the corrupt prompt stands for each of the clean one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from patchsweep.errors import BadInput
from patchsweep.inputs import check_name

Align = Literal["end", "labels"] | Sequence[Sequence[int]] | Mapping[int, int]
Link = tuple[str, int, int]  # as it was said, clean position, corrupt position


def labelled(labels: Mapping[str, int], length: int, what: str) -> dict[str, int]:
    """Labels counted from the first token; BadInput if one is outside the prompt, or cannot be a
    part of a file's name, as that of a metric that is read there."""
    positions = {}
    for name, index in labels.items():
        check_name(name, what)
        if not -length <= index < length:
            raise BadInput(
                f"{what} '{name}' at {index} is outside the prompt: "
                f"it has {length} tokens, use {-length} to {length - 1}"
            )
        positions[name] = index % length
    return positions


def aligned_positions(
    align: Align | None,
    clean: int,
    corrupt: int,
    labels: Mapping[str, int],
    corrupt_labels: Mapping[str, int],
    at: str,
) -> tuple[int, ...] | None:
    """[clean position]: its corrupt position, −1 for none; None if all are the same."""
    if corrupt_labels and align != "labels":
        raise BadInput(
            f'{at}corrupt_labels only serve align: "labels": say so, or leave corrupt_labels out'
        )
    if align is None:
        return None
    if align == "end":
        links = [("end", clean - k, corrupt - k) for k in range(1, min(clean, corrupt) + 1)]
    elif align == "labels":
        links = _links_by_label(labels, corrupt_labels, at)
    else:
        links = _links_given(align, clean, corrupt, at)
    out = _linked(links, clean, corrupt, at)
    return None if out == tuple(range(corrupt)) else out


def _links_by_label(
    labels: Mapping[str, int], corrupt_labels: Mapping[str, int], at: str
) -> list[Link]:
    """The positions that share a label; two labels of the same two positions are one link."""
    links = {
        (labels[name], corrupt_labels[name]): f"label '{name}'"
        for name in labels
        if name in corrupt_labels
    }
    if not links:
        raise BadInput(f"{at}align: labels and corrupt_labels have no name in common: add one")
    return [(said, *link) for link, said in links.items()]


def _links_given(align: object, clean: int, corrupt: int, at: str) -> list[Link]:
    """The listed positions, counted from the first token."""
    items: object = tuple(align.items()) if isinstance(align, Mapping) else align
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise BadInput(f'{at}align is {align!r}: use "end", "labels" or [[clean, corrupt], ...]')
    links = []
    for item in items:
        pair = list(item) if isinstance(item, list | tuple) else []
        if len(pair) != 2 or any(type(n) is not int for n in pair):
            raise BadInput(
                f"{at}align: {item!r} is no [clean, corrupt] pair of token indices: "
                "write e.g. [3, 4]"
            )
        for n, length, run in zip(pair, (clean, corrupt), ("clean", "corrupt"), strict=True):
            if not -length <= n < length:
                raise BadInput(
                    f"{at}align: {pair} is outside the {run} prompt: "
                    f"it has {length} tokens, use {-length} to {length - 1}"
                )
        links.append((f"{pair}", pair[0] % clean, pair[1] % corrupt))
    return links


def _linked(links: Sequence[Link], clean: int, corrupt: int, at: str) -> tuple[int, ...]:
    """[clean position]: its corrupt position, −1 for none. The last positions, where the answer is
    read, always correspond."""
    forth: dict[int, int] = {}
    taken: set[int] = set()
    for said, i, j in links:
        if i in forth or j in taken:
            position = f"{i} of clean" if i in forth else f"{j} of corrupt"
            raise BadInput(f"{at}align: {said}: position {position} is there twice: keep one")
        if (i == clean - 1) != (j == corrupt - 1):
            raise BadInput(
                f"{at}align: {said}: the last tokens of both prompts, where the answer is read, "
                "correspond to each other: leave this one out"
            )
        forth[i] = j
        taken.add(j)
    forth[clean - 1] = corrupt - 1
    return tuple(forth.get(i, -1) for i in range(clean))
