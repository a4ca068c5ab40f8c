"""How the corrupt run is made, and where the values that are patched in come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, StrictInt, StrictStr

from patchsweep.inputs import SAMPLES
from patchsweep.spec.data import Data, list_of, made, named


def _positive(value: object) -> object:
    """One number or a list of them, each above 0, as a tuple."""
    numbers = value if isinstance(value, list | tuple) else (value,)
    for n in list_of(numbers, "number"):
        if isinstance(n, bool) or not isinstance(n, int | float) or not 0 < n < float("inf"):
            raise ValueError(f"{n!r} is no number above 0: sigma counts standard deviations")
    return tuple(float(n) for n in numbers)


def _tokens(value: object) -> object:
    if value == "differ":
        return value
    for token in (tokens := list_of(value, "index or label")):
        if type(token) not in (int, str):
            raise ValueError(f"{token!r} is no token index and no label")
    return tokens


class Gaussian(Data):
    """Corrupt by Gaussian noise on token embeddings (Meng et al. 2022, ROME).

    sigma: standard deviations of the embeddings, one or several; the deviation is taken over the
    embeddings of the noised tokens of all pairs (std: tokens) or of the whole vocabulary (table).
    tokens: where the prompts differ, or indices and labels. The same noise is used for every sigma.
    It hangs on the seed and the prompt's own tokens: a prompt keeps its draws in any list.
    """

    sigma: Annotated[tuple[float, ...], BeforeValidator(_positive)] = (3.0,)
    tokens: Annotated[Literal["differ"] | tuple[int | str, ...], BeforeValidator(_tokens)] = (
        "differ"
    )
    samples: Annotated[StrictInt, Field(ge=1, le=SAMPLES)] = 1
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    std: Literal["tokens", "table"] = "tokens"


def _corrupt(value: object) -> object:
    if isinstance(value, str) and value not in ("pairs", "gaussian"):
        raise ValueError(f"'{value}' is not known: use pairs or gaussian")
    if value == "gaussian":
        return Gaussian()
    if isinstance(value, Mapping):
        name, options = named(value, "corruption")
        if name != "gaussian":
            raise ValueError(f"unknown corruption '{name}': use pairs or gaussian")
        return made(Gaussian, options, "gaussian: ")
    return value


def _corrupt_data(corrupt: str | Gaussian) -> Any:
    return corrupt if isinstance(corrupt, str) else {"gaussian": corrupt.model_dump(mode="json")}


Corruption = Annotated[
    Literal["pairs"] | Gaussian, BeforeValidator(_corrupt), PlainSerializer(_corrupt_data)
]


class Mean(Data):
    """The mean activation over prompts: the sweep's own (clean, corrupt) or those of a pairs file.

    by: position (the mean at the same position, prompts counted from their first token) or all.
    """

    prompts: Annotated[StrictStr, Field(min_length=1)]
    by: Literal["position", "all"] = "position"


class Resample(Data):
    """The activation in the clean run of another pair, drawn for every sample: by the seed and the
    two prompts' tokens, so that a pair keeps its draws in any list that has what it drew."""

    samples: Annotated[StrictInt, Field(ge=1, le=SAMPLES)] = 1
    seed: Annotated[StrictInt, Field(ge=0)] = 0


class Vector(Data):
    """A vector that is added to the activation (steering): the tensor in a .safetensors or .npy
    file, [width], [layer, width] or [layer, unit, width], times `scale`."""

    file: Path
    scale: float = 1.0


SOURCES: dict[str, type[Data]] = {"mean": Mean, "resample": Resample, "vector": Vector}
SourceOf = tuple[str, Mean | Resample | Vector | None]


def _sources(value: object) -> tuple[SourceOf, ...]:
    """Sources from a name, {name: options} or a list of them."""
    given = list(value) if isinstance(value, list | tuple) else [value]
    out: list[SourceOf] = []
    for item in list_of(given, "source"):
        if isinstance(item, tuple):  # parsed already
            out.append(item)
            continue
        name, options = named(item, "source")
        if name not in SOURCES and options:
            raise ValueError(f"source {name} has no options: write {name}")
        if name == "mean" and "prompts" not in options:
            raise ValueError(
                "source mean needs the prompts to average over: write "
                "{mean: {prompts: clean}}, corrupt, or a pairs file"
            )
        of: Any = made(SOURCES[name], options, f"source {name}: ") if name in SOURCES else None
        out.append((name, of))
    list_of([name for name, _ in out], "source")
    return tuple(out)


def _sources_data(sources: tuple[SourceOf, ...]) -> list[Any]:
    return [name if m is None else {name: m.model_dump(mode="json")} for name, m in sources]


Sources = Annotated[tuple[SourceOf, ...], BeforeValidator(_sources), PlainSerializer(_sources_data)]
