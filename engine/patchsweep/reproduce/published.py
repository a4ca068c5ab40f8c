"""The heads that the paper lists, by experiment and model, against those found."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from patchsweep.model import Model


@dataclass(frozen=True)
class List:
    """The heads that a table of the paper lists for one corruption and metric, as layer.head.

    corrupted: the tokens that were replaced or noised. position: where heads were patched. signed:
    whether the table tells positive from negative heads. reading: whether which position the list
    is for is our reading of the table.
    """

    where: str
    corrupted: str
    corruption: str
    metric: str
    positive: frozenset[str]
    negative: frozenset[str]
    position: str = "all"
    signed: bool = True
    reading: bool = False

    @property
    def heads(self) -> frozenset[str]:
        """All of them, a sign before each where the table tells it."""
        return signed(self.positive, self.negative) if self.signed else self.positive


def signed(positive: Collection[str], negative: Collection[str]) -> frozenset[str]:
    """Detected heads with the sign of their effect: "+9.9", "−10.7"."""
    return frozenset({f"+{head}" for head in positive} | {f"−{head}" for head in negative})


def model_of(model: Model) -> str | None:
    """Which of the paper's models this is, by its architecture and size; None if it is none."""
    d = model.dimensions
    size = {
        "model_type": model.hf_model.config.model_type,
        "layers": d.layers,
        "heads": d.heads,
        "d_model": d.d_model,
        "vocab": d.vocab,
    }
    known = _file()["models"]
    return next((name for name, said in known.items() if said.get("size") == size), None)


def title(name: str) -> str:
    """What a model is called in the paper."""
    said: str = _file()["models"][name]["title"]
    return said


def lists(experiment: str, model: str | None = None) -> list[List]:
    """The published lists of an experiment: all of them, or those for one model."""
    return [
        _list(table, row)
        for table in _file()["tables"]
        if table["experiment"] == experiment and model in (None, table["model"])
        for row in table["lists"]
    ]


def applies(experiment: str, model: Model) -> tuple[list[List], str]:
    """The published lists for this very model, and a line that says whether there are any."""
    name = model_of(model)
    found = lists(experiment, name) if name else []
    if found and name:
        line = f"Published lists: those of {title(name)}, whose architecture and size this is."
        return found, line
    held = {table["model"] for table in _file()["tables"] if table["experiment"] == experiment}
    if held:
        known = ", ".join(title(each) for each in sorted(held))
        return [], f"No published list applies to this model (they hold for {known})."
    of = _file()["claims"][experiment]
    known = ", ".join(map(title, of)) or "no model in particular"
    this = ", whose architecture and size this is" if name in of else ""
    return [], f"No published list applies: there is none; the claims are of {known}{this}."


def circuit(name: str | None) -> dict[str, tuple[str, ...]] | None:
    """Class -> its heads, in the circuit that is known of a model; None if none is."""
    said = _file()["circuits"].get(name)
    return said and {kind: tuple(heads.split()) for kind, heads in said.items()}


@dataclass(frozen=True)
class Comparison:
    """The heads of a published list that were found here, those that were not, and others that
    were; as layer.head, in this order, with their sign where the list has it."""

    found: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def compare(published: List, positive: Collection[str], negative: Collection[str]) -> Comparison:
    """A published list against the heads detected here."""
    here = signed(positive, negative) if published.signed else {*positive, *negative}
    heads = published.heads
    return Comparison(ordered([*heads & here]), ordered([*heads - here]), ordered([*here - heads]))


def ordered(heads: Sequence[str]) -> tuple[str, ...]:
    """Heads by layer, then number."""
    return tuple(sorted(heads, key=lambda h: tuple(map(int, h.lstrip("+−").split(".")))))


def _list(table: dict[str, Any], row: dict[str, Any]) -> List:
    return List(
        table["where"],
        table["corrupted"],
        row["corruption"],
        row["metric"],
        frozenset(row.get("positive", "").split()),
        frozenset(row.get("negative", "").split()),
        row.get("position", "all"),
        table.get("signed", True),
        row.get("reading", False),
    )


@cache
def _file() -> dict[str, Any]:
    text = files("patchsweep.reproduce").joinpath("published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
