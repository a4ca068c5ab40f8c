"""How the edges of a model are scored, or that they are run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, StrictInt

from patchsweep.spec.data import Data, made, named
from patchsweep.spec.estimates import Prefilter
from patchsweep.spec.positions import AnyPositions

Through = Literal["nothing", "mlps"]


class Edges(Data):
    """`eap`, edge attribution patching; `eap_ig`, with the gradient's mean over `steps`; or
    `exact`: every edge is run, from a sender at `positions`, `through` nothing but the residual
    stream, or through the MLPs that lie between. With a `prefilter` only those that it chooses are,
    by scores of its estimator (eap, or eap_ig of these `steps`)."""

    name: Literal["eap", "eap_ig", "exact"]
    steps: Annotated[StrictInt, Field(ge=1)] = 1
    positions: AnyPositions = "all"
    through: Through = "nothing"
    prefilter: Prefilter | None = None

    @property
    def exact(self) -> bool:
        """Whether edges are run."""
        return self.name == "exact"

    @property
    def estimator(self) -> str | None:
        """What scores are made by; None if there are none."""
        by = self.prefilter.estimator if self.prefilter else self.name
        return None if by == "exact" else str(by)


class Steps(Data):
    """The options of eap_ig."""

    steps: Annotated[StrictInt, Field(ge=1)] = 5  # as in the paper


class Exact(Data):
    """Those of exact."""

    positions: AnyPositions = "all"
    through: Through = "nothing"


OPTIONS: dict[str, type[Steps] | type[Exact]] = {"eap_ig": Steps, "exact": Exact}
PREFILTER = {*Prefilter.model_fields}


def _edges(value: object) -> object:
    if value is None or isinstance(value, Edges):
        return value
    if isinstance(value, Mapping) and PREFILTER & {*value}:
        return _prefiltered(value)
    name, options = named(value, "way to score edges")
    if name not in ("eap", *OPTIONS):
        raise ValueError(f"unknown scores '{name}': use eap, eap_ig or exact")
    if name == "eap":
        if options:
            raise ValueError("eap has no options: write eap")
        return Edges(name="eap")
    return Edges(name=name, **dict(made(OPTIONS[name], options, f"{name}: ")))  # type: ignore[arg-type]


def _prefiltered(value: Mapping[str, Any]) -> Edges:
    """Those of {estimator: eap, keep: 2%, audit: 300}."""
    by = _edges(value.get("estimator", "eap"))
    if not isinstance(by, Edges) or by.exact or by.prefilter:
        raise ValueError(f"estimator: {value['estimator']!r} scores no edges: use eap or eap_ig")
    return Edges(
        name="exact", steps=by.steps, prefilter=made(Prefilter, {**value, "estimator": by.name})
    )


def _edges_data(edges: Edges | None) -> Any:
    if edges is None or edges.name == "eap":
        return edges and edges.name
    if edges.prefilter:
        by = {"eap_ig": {"steps": edges.steps}} if edges.estimator == "eap_ig" else "eap"
        return {**edges.prefilter.model_dump(mode="json"), "estimator": by}
    said = edges.model_dump(mode="json", include={*OPTIONS[edges.name].model_fields})
    usual = Exact().model_dump(mode="json")
    return edges.name if said == usual else {edges.name: said}


EdgeScores = Annotated[Edges | None, BeforeValidator(_edges), PlainSerializer(_edges_data)]
