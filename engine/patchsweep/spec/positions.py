"""Which positions are patched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StrictInt, StrictStr

from patchsweep.spec.data import list_of


def _positions(value: object) -> object:
    if isinstance(value, str) and value in ("each", "all"):
        return value
    if isinstance(value, str):
        raise ValueError(f"'{value}' is not known: use each, all, or a list such as [{value}]")
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("the mapping is empty: name at least one group of positions")
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"{wrong[0]!r} names a group of positions: quote it")
        return {name: _entries(entries) for name, entries in value.items()}
    return _entries(value)


def _entries(value: object) -> tuple[Any, ...]:
    entries = list_of(value, "index or label")
    for entry in entries:
        if type(entry) not in (int, str):
            raise ValueError(f"{entry!r} is no token index and no label: quote it if a label")
    return entries


AnyPositions = Annotated[
    Literal["each", "all"]
    | tuple[StrictInt | StrictStr, ...]
    | dict[StrictStr, tuple[StrictInt | StrictStr, ...]],
    BeforeValidator(_positions),
]
