"""A sweep as data, and a spec: a sweep with its model and its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from patchsweep.errors import BadInput
from patchsweep.inputs import DEVICES, check_data, check_name, check_placement, memory_limits
from patchsweep.sites import DIMENSIONS, DIRECTIONS, WINDOWED, Direction, component
from patchsweep.spec.data import Data, PathOrUrl, explain, in_order, list_of
from patchsweep.spec.edges import EdgeScores
from patchsweep.spec.estimates import Estimators, MaybePrefilter
from patchsweep.spec.metric import AnyMetric, Metric, parse_metric
from patchsweep.spec.paths import PatchedPath
from patchsweep.spec.positions import AnyPositions
from patchsweep.spec.prompts import Prompts
from patchsweep.spec.sets import Autoencoder, Circuit, Sites
from patchsweep.spec.source import Corruption, SourceOf, Sources

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
KINDS = ("_status", "_effect", "_estimate", "_noise_floor")  # of columns beside a metric's
S = TypeVar("S", bound="Sweep")


class Sweep(Data):
    """What to patch and measure, whatever the model and the prompts. What each key means, and may
    be, the guide says. Sequences are tuples; metrics are normalised; `model_dump` can be read
    again. BadInput, in one line, for what is not right, where it is read (`load_spec`, `sweep`)."""

    corrupt: Corruption = "pairs"
    source: Sources = (("other", None),)
    direction: Literal["denoise", "noise", "both"] = "denoise"
    components: tuple[StrictStr, ...] = ()
    positions: AnyPositions = "each"
    windows: tuple[Annotated[StrictInt, Field(ge=2)], ...] = ()
    sets: dict[StrictStr, Sites] = Field(default_factory=dict)
    circuit: Circuit | None = None
    sae: Autoencoder | None = None
    metrics: tuple[AnyMetric, ...] = (Metric("logit_diff"),)
    token_budget: Literal["auto"] | StrictInt = "auto"
    backend: Literal["auto", "wavefront", "nnsight"] = "auto"
    remote: bool = False
    fsync: bool = False  # what is marked done outlives a power cut too
    estimate: Estimators = False  # instead of running these components
    prefilter: MaybePrefilter = None
    edges: EdgeScores = None
    paths: dict[StrictStr, PatchedPath] = Field(default_factory=dict)
    provenance: Literal["short", "full"] = "short"  # full: with the host, and whole paths

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions that `direction` stands for."""
        return tuple(d for d in DIRECTIONS if self.direction in (d, "both"))

    @property
    def sources(self) -> tuple[SourceOf, ...]:
        """The sources with their options."""
        return self.source

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.components and not self.sets and not self.circuit and not self.paths:
            raise ValueError("components is missing: name what to patch, e.g. [head_z, mlp_out]")
        if self.windows and not set(self.components) & set(WINDOWED):
            raise ValueError(f"windows are over {', '.join(WINDOWED)}: add one to components")
        if self.estimate is not False and self.prefilter:
            raise ValueError("prefilter estimates what it names: leave estimate out")
        if self.remote and self.backend != "nnsight":
            raise ValueError("remote runs through nnsight: add backend: nnsight")
        uses = "sae_feature" in self.components or any(
            m.name == "sae_feature" for m in self.metrics
        )
        if uses and self.sae is None:
            raise ValueError("sae_feature needs an autoencoder: add sae: {file: ...}")
        return self

    @field_validator("paths")
    @classmethod
    def _paths(cls, value: dict[str, PatchedPath]) -> dict[str, PatchedPath]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
                raise ValueError(f"path {name!r}: use letters, digits, _ and -, at most 60")
        return value

    @field_validator("components", mode="before")
    @classmethod
    def _components(cls, value: object) -> tuple[Any, ...]:
        if value in ([], ()):
            return ()
        names = list_of(value, "component")
        for name in names:
            if isinstance(name, str):
                component(name)
        return names

    @field_validator("metrics", mode="before")
    @classmethod
    def _metrics(cls, value: object) -> tuple[Metric, ...]:
        metrics = tuple(parse_metric(v) for v in list_of(value, "metric"))
        columns = [metric.column for metric in metrics]
        for column in columns:
            check_name(column, "metric")
        list_of(columns, "metric")
        named = {
            *DIMENSIONS,
            "run",
            "component",
            "token",
            "label",
            "n_pairs",
            *(f"{c}{kind}" for c in columns for kind in KINDS),
        }
        for column in columns:
            if column in named:
                raise ValueError(f"'{column}' is the name of another column: rename the function")
        return metrics

    @field_validator("windows", mode="before")
    @classmethod
    def _windows(cls, value: object) -> object:
        return value if value in ([], ()) else list_of(value, "number of layers")

    @field_validator("token_budget", mode="before")
    @classmethod
    def _token_budget(cls, value: object) -> object:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError(f"{value!r} is no token budget: use auto or a whole number above 0")
        return value


class Spec(Sweep):
    """A sweep as a file says it: with its model, its prompts and where the results go."""

    model: Annotated[StrictStr, Field(min_length=1)]
    dtype: Dtype = "float32"
    device: StrictStr = "auto"
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: Path | None = None
    prompts: Prompts
    out: PathOrUrl | None = None

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|balanced", value):
            raise ValueError(f"'{value}' is no device: use {DEVICES}")
        return value

    @field_validator("max_memory", mode="before")
    @classmethod
    def _max_memory(cls, value: object) -> object:
        if value is not None:
            try:
                memory_limits(value)
            except BadInput as error:
                raise ValueError(str(error).removeprefix("max_memory: ")) from error
        return value

    @model_validator(mode="after")
    def _placement(self) -> Self:
        check_placement(self.device, self.max_memory, self.offload_folder)
        return self


def parse_spec(data: object, where: str = "spec") -> Spec:
    """A spec from its data; BadInput in one line that begins with `where`."""
    if not isinstance(data, Mapping):
        raise BadInput(f"{where}: not a mapping: write lines such as 'model: smollm2-135m'")
    return _validated(Spec, data, where)


def parse_settings(data: Mapping[str, Any]) -> Sweep:
    """The settings of a sweep that has its model and pairs already; BadInput in one line."""
    return _validated(Sweep, data, "sweep")


def _validated(kind: type[S], data: Mapping[str, Any], where: str) -> S:
    check_data(data, where)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = in_order(error)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BadInput(f"{where}: {explain(found[0], _owner(found[0]))}{more}") from error


def _owner(error: Any) -> type[BaseModel]:
    """Whose keys a misspelt one is compared with: those of the part of the spec that it is in."""
    kind: type[BaseModel] = Spec
    for key in error["loc"][:-1]:
        field = kind.model_fields.get(str(key))
        said = field.annotation if field else None
        parts = [p for p in (said, *get_args(said)) if isinstance(p, type)]
        kind = next((p for p in parts if issubclass(p, BaseModel)), kind)
    return kind
