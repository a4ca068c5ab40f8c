"""What every part of a spec is read with: names with options, lists, and errors in one line."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictStr, ValidationError

from patchsweep.errors import BadInput, shown
from patchsweep.store import path_or_url


def _path_or_url(value: object) -> object:
    if not isinstance(value, str | Path):
        raise ValueError(f"should be a path or a URL, and is {shown(value)}")
    return path_or_url(value)


PathOrUrl = Annotated[Path | StrictStr, BeforeValidator(_path_or_url)]  # text: a URL


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


D = TypeVar("D", bound=Data)


def made(kind: type[D], options: Mapping[str, Any], where: str = "") -> D:
    """A part of a spec from its options. ValueError, which begins with `where`, for the first that
    is wrong."""
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise ValueError(f"{where}{explain(in_order(error)[0], kind)}") from error


def in_order(error: ValidationError) -> list[Any]:
    """Errors, misspelt keys first: each also leaves the right one missing."""
    return sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")


def named(value: object, what: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the options of "name" or {name: {option: value}}."""
    given: Mapping[Any, Any] = {value: {}} if isinstance(value, str) else {}
    if isinstance(value, Mapping):
        given = value
    if len(given) != 1:
        raise BadInput(
            f"{shown(value)} is not one {what}: write a name or {{name: {{option: value}}}}"
        )
    [(name, options)] = given.items()
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise BadInput(f"the options of {name} are {shown(options)}: write {{option: value}}")
    return str(name), options


def list_of(value: object, what: str) -> tuple[Any, ...]:
    """`value` as a tuple; an error unless it is a list with something in it and no repeats."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{shown(value)} is not a list: write [{shown(value)}]")
    if not value:
        raise ValueError(f"the list is empty: name at least one {what}")
    seen: set[object] = set()
    for i, entry in enumerate(value):
        known = isinstance(entry, Hashable)
        if entry in (seen if known else value[:i]):
            raise ValueError(f"{shown(entry)} is there twice: keep one")
        if known:
            seen.add(entry)
    return tuple(value)


def nearest(key: object, known: Mapping[str, object]) -> str:
    """The mend for a misspelt key."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(known)}"


def explain(error: Any, kind: type[BaseModel]) -> str:
    """One of pydantic's errors: the key's path, what is wrong, and what was given.

    kind: whose keys an unknown one is compared with.
    """
    place = ".".join(str(part) for part in error["loc"])
    colon = f"{place}: " if place else ""
    if error["type"] == "extra_forbidden":
        return f"unknown key '{place}': {nearest(error['loc'][-1], kind.model_fields)}"
    if error["type"] == "missing":
        return f"missing key '{place}': add it"
    if error["type"] == "value_error":
        return f"{colon}{error['ctx']['error']}"
    if error["type"] == "path_type":
        return f"{colon}should be a path, and is {shown(error['input'])}"
    if error["type"] in ("model_type", "dict_type"):
        return f"{colon}should be a mapping, {{key: value}}, and is {shown(error['input'])}"
    if error["type"] == "tuple_type":
        return f"{colon}should be a list, and is {shown(error['input'])}"
    message = error["msg"].replace("Input should be", "should be")
    return f"{colon}{message}, and is {shown(error['input'])}"
