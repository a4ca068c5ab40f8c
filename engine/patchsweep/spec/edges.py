"""How the edges of a model are scored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, StrictInt

from patchsweep.spec.data import Data, made, named


class Edges(Data):
    """`eap`, edge attribution patching, or `eap_ig`, with the gradient's mean over `steps`."""

    name: Literal["eap", "eap_ig"]
    steps: Annotated[StrictInt, Field(ge=1)]


class Options(Data):
    """Those of eap_ig."""

    steps: Annotated[StrictInt, Field(ge=1)] = 5  # as in the paper


def _edges(value: object) -> object:
    if value is None or isinstance(value, Edges):
        return value
    name, options = named(value, "way to score edges")
    if name not in ("eap", "eap_ig"):
        raise ValueError(f"unknown scores '{name}': use eap or eap_ig")
    if name == "eap":
        if options:
            raise ValueError("eap has no options: write eap")
        return Edges(name="eap", steps=1)
    return Edges(name="eap_ig", steps=made(Options, options, "eap_ig: ").steps)


def _edges_data(edges: Edges | None) -> Any:
    if edges is None or edges.name == "eap":
        return edges and edges.name
    return {"eap_ig": {"steps": edges.steps}}


EdgeScores = Annotated[Edges | None, BeforeValidator(_edges), PlainSerializer(_edges_data)]
