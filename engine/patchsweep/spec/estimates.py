"""What is estimated instead of run, and what is run after all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, field_validator

from patchsweep.spec.data import Data, made


def _estimators(value: object) -> object:
    names = [*value, *value.values()] if isinstance(value, Mapping) else [value]
    if not isinstance(value, bool) and not (names and all(isinstance(n, str) for n in names)):
        raise ValueError(
            f"{value!r} names no estimates: use true, an estimator, or {{component: estimator}}"
        )
    return value


# True: the default estimator of every component; else one for all, or {component: estimator}.
Estimators = Annotated[bool | StrictStr | dict[StrictStr, StrictStr], BeforeValidator(_estimators)]


def _keep(value: object) -> object:
    share = re.fullmatch(r"(\d+(\.\d+)?)\s*%", value) if isinstance(value, str) else None
    if share and 0 < float(share[1]) <= 100:
        return value
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, Mapping) and set(value) == {"threshold"}:
        size = value["threshold"]
        if type(size) in (int, float) and size > 0:
            return {"threshold": float(size)}
    raise ValueError(
        f"{value!r} says nothing to keep: use a share such as 5%, a number of cells, or "
        "{threshold: size of the estimated effect}"
    )


def _theta(value: object) -> object:
    if value == "auto" or (type(value) in (int, float) and value >= 0):  # type: ignore[operator]
        return value
    raise ValueError(f"{value!r} is no size of an effect: use auto or a number, at least 0")


class Prefilter(Data):
    """Estimate every cell, run those of largest estimated effect over pairs, audit the others.

    keep: of each component, direction and source a share of the cells that could matter ("5%"), a
    number of them, or all whose estimated effect is as large as {threshold: size}. audit: how many
    of the others are run, drawn at random from each of two strata. theta: the effect that the
    audit counts as missed; auto: the smallest of the highest fifth of the kept cells.
    """

    estimator: Estimators = True
    keep: Annotated[
        StrictStr | StrictInt | dict[Literal["threshold"], float], BeforeValidator(_keep)
    ] = "5%"
    audit: Annotated[StrictInt, Field(ge=1)] = 300
    theta: Annotated[Literal["auto"] | float, BeforeValidator(_theta)] = "auto"
    seed: Annotated[StrictInt, Field(ge=0)] = 0

    @field_validator("estimator")
    @classmethod
    def _some(cls, value: object) -> object:
        if value is False:
            raise ValueError("false estimates nothing: name an estimator, or leave prefilter out")
        return value


def _prefilter(value: object) -> object:
    return made(Prefilter, value) if isinstance(value, Mapping) else value


MaybePrefilter = Annotated[Prefilter | None, BeforeValidator(_prefilter)]
