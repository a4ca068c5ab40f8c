"""What is patched beyond a grid of cells: sets of sites, circuits, features of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, StrictInt, StrictStr

from patchsweep.errors import BadInput
from patchsweep.sites import Direction, Site, parse_site
from patchsweep.spec.data import Data, PathOrUrl, list_of, made


def _site(value: object) -> Site:
    if isinstance(value, Site):
        return value
    if isinstance(value, str):
        return parse_site(value)
    if not isinstance(value, Mapping):
        raise BadInput(f"{value!r} is no site: write component.layer.unit@position")
    unknown = set(value) - {f.name for f in fields(Site)}
    if unknown or "component" not in value:
        raise BadInput(
            f"{dict(value)!r} is no site: it has component, layer, unit, position, source"
        )
    return parse_site(str(Site(**value)))


SiteText = Annotated[Site, BeforeValidator(_site), PlainSerializer(str)]


class Complement(Data):
    """Every site of the components `within`, at the sweep's positions, but those in `besides`."""

    within: tuple[StrictStr, ...]
    besides: tuple[SiteText, ...]


def _set(value: object) -> object:
    """A set of sites, or a complement."""
    if isinstance(value, Complement):
        return value
    if isinstance(value, Mapping):
        return made(Complement, value)
    return tuple(_site(site) for site in list_of(value, "site"))


def _set_data(sites: tuple[Site, ...] | Complement) -> Any:
    return sites.model_dump(mode="json") if isinstance(sites, Complement) else list(map(str, sites))


Sites = Annotated[tuple[Site, ...] | Complement, BeforeValidator(_set), PlainSerializer(_set_data)]


class FromResults(Data):
    """A ranking of the cells of earlier results, largest absolute effect first."""

    results: PathOrUrl
    component: StrictStr
    metric: StrictStr
    direction: Direction = "denoise"
    top: Annotated[StrictInt, Field(ge=1)] = 100


def _ranking(value: object) -> object:
    """A list of sites, or the cells of results."""
    if isinstance(value, FromResults):
        return value
    if isinstance(value, Mapping):
        return made(FromResults, value)
    return tuple(_site(site) for site in list_of(value, "site"))


def _sizes(value: object) -> object:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"'{value}' is not known: use auto or a list such as [1, 10, 100]")
        return value
    for n in (sizes := list_of(value, "number of sites")):
        if type(n) is not int or n < 1:
            raise ValueError(f"{n!r} is no number of sites: use whole numbers above 0")
    return sizes


class Circuit(Data):
    """A curve of performance against circuit size: the best k sites of a ranking, for k in `sizes`,
    and all other sites of the components `within` (those of the ranking if left out)."""

    ranking: Annotated[tuple[SiteText, ...] | FromResults, BeforeValidator(_ranking)]
    within: tuple[StrictStr, ...] = ()
    sizes: Annotated[Literal["auto"] | tuple[int, ...], BeforeValidator(_sizes)] = "auto"


class Autoencoder(Data):
    """A sparse autoencoder: its file or folder, and where it reads if the file does not say."""

    file: Path
    layer: Annotated[StrictInt, Field(ge=0)] | None = None
    at: StrictStr | None = None
