"""The sweep as data: validated, saved with the results."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from patchsweep import tasks
from patchsweep.errors import BadInput
from patchsweep.loading import DEVICES, check_placement, memory_limits
from patchsweep.pairs import Bos
from patchsweep.sites import DIRECTIONS, WINDOWED, Direction, Site, component, parse_site

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Reduce = Literal["mean", "sum"]
Place = int | str  # a token index or a label
S = TypeVar("S", bound="Sweep")

REQUIRED = object()
# Metric -> its options and what they are when left out.
METRICS: dict[str, dict[str, Any]] = {
    "logit_diff": {"reduce": "mean", "at": None},
    "logit": {"at": None},
    "logprob": {"at": None},
    "prob": {"at": None},
    "prob_diff": {"at": None},
    "rank": {"at": None},
    "accuracy": {"k": 1, "at": None},
    "kl": {"at": None},
    "kl_reverse": {"at": None},
    "total_variation": {"at": None},
    "relative_prob": {"at": None},
    "sequence_logprob": {},
    "callable": {"path": REQUIRED, "at": None},
    "attention": {"layer": REQUIRED, "head": REQUIRED, "query": REQUIRED, "key": REQUIRED},
    "neuron": {"layer": REQUIRED, "neuron": REQUIRED, "position": REQUIRED},
    "sae_feature": {"feature": REQUIRED, "position": REQUIRED},
    "probe": {
        "component": REQUIRED,
        "layer": REQUIRED,
        "unit": 0,
        "position": REQUIRED,
        "file": REQUIRED,
    },
}
# The metrics that read activations inside the model, not logits.
INNER = frozenset({"attention", "neuron", "sae_feature", "probe"})
_COUNTS = frozenset({"layer", "head", "neuron", "feature", "unit"})
_POSITIONS = frozenset({"at", "query", "key", "position"})


@dataclass(frozen=True)
class Metric:
    """One metric; METRICS says which options it has.

    `reduce` is over sets of tokens, `k` means rank < k. Positions (`at`, where logits are read,
    None: where the answer is; `query`, `key`, `position`) are indices or labels of clean prompts.
    `file` holds a probe's direction, `path` names a function as package.module:name.
    """

    name: str
    reduce: Reduce = "mean"
    k: int = 1
    at: Place | None = None
    layer: int = 0
    head: int = 0
    neuron: int = 0
    feature: int = 0
    unit: int = 0
    component: str = ""
    query: Place = 0
    key: Place = 0
    position: Place = 0
    file: str = ""
    path: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from what they are when left out."""
        given = {option: getattr(self, option) for option in METRICS[self.name]}
        return {o: value for o, value in given.items() if value != METRICS[self.name][o]}

    @property
    def column(self) -> str:
        """Name of its arrays and of its column: "accuracy", with k = 5 "accuracy_k5",
        "logit_diff_sum", "kl_at_S2", "attention_9_6_END_IO", a callable's own name."""
        if self.name == "callable":
            parts = [self.path.rpartition(":")[2]]
        elif self.name in INNER:
            said = {o: v for o, v in self.options.items() if o != "file"}
            parts = [self.name, *(str(v) for v in said.values())]
        else:
            parts = [self.name]
        affixes = {"reduce": "{}", "k": "k{}", "at": "at_{}"}
        parts += [affixes[o].format(v) for o, v in self.options.items() if o in affixes]
        return "_".join(parts)


def parse_metric(value: object) -> Metric:
    """A metric from "name" or {name: {option: value}}; BadInput for what is not known."""
    if isinstance(value, Metric):
        return value
    name, options = _named(value, "metric")
    if name not in METRICS:
        raise BadInput(f"unknown metric '{name}': {_nearest(name, METRICS)}")
    for option, chosen in options.items():
        if option not in METRICS[name]:
            hint = _nearest(option, METRICS[name]) if METRICS[name] else "it has none, leave it out"
            raise BadInput(f"unknown option '{option}' of {name}: {hint}")
        if wrong := _wrong_option(option, chosen):
            raise BadInput(f"{option} of {name} is {chosen!r}: use {wrong}")
    for option, default in METRICS[name].items():
        if default is REQUIRED and option not in options:
            raise BadInput(f"{name} needs {option}: write {{{name}: {{{option}: ...}}}}")
    return Metric(name, **options)


def _wrong_option(option: str, chosen: object) -> str:
    """What an option should be; empty if it is that."""
    if option == "reduce":
        return "" if chosen in ("mean", "sum") else "mean or sum"
    if option == "k":
        return "" if type(chosen) is int and chosen >= 1 else "a whole number, at least 1"
    if option in _COUNTS:
        return "" if type(chosen) is int and chosen >= 0 else "a whole number, at least 0"
    if option in _POSITIONS:
        return "" if type(chosen) in (int, str) else "a token index or a label"
    if option == "component":
        known = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_z")
        return "" if chosen in known else f"one of {', '.join(known)}"
    if option == "path":
        form = isinstance(chosen, str) and re.fullmatch(r"[\w.]+:\w+", chosen)
        return "" if form else "package.module:function"
    return "" if isinstance(chosen, str) and chosen else "a text"


def _named(value: object, what: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the options of "name" or {name: {option: value}}."""
    given: Mapping[Any, Any] = {value: {}} if isinstance(value, str) else {}
    if isinstance(value, Mapping):
        given = value
    if len(given) != 1:
        raise BadInput(f"{value!r} is not one {what}: write a name or {{name: {{option: value}}}}")
    [(name, options)] = given.items()
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise BadInput(f"the options of {name} are {options!r}: write {{option: value}}")
    return str(name), options


def _metric_data(metric: Metric) -> str | dict[str, Any]:
    return {metric.name: metric.options} if metric.options else metric.name


def _list_of(value: object, what: str) -> tuple[Any, ...]:
    """`value` as a tuple; an error unless it is a list with something in it and no repeats."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r} is not a list: write [{value}]")
    if not value:
        raise ValueError(f"the list is empty: name at least one {what}")
    if repeats := [v for i, v in enumerate(value) if v in value[:i]]:
        raise ValueError(f"{repeats[0]!r} is there twice: keep one")
    return tuple(value)


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompts(_Data):
    """Where the pairs come from: `n` of a built-in task, or a file (its first `n`, or all)."""

    task: StrictStr | None = None
    file: Path | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    bos: Bos = "auto"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.task is None) == (self.file is None):
            raise ValueError("give either task or file")
        if self.task is not None:
            tasks.check(self.task)
            if self.n is None:
                raise ValueError("n is missing: say how many pairs of the task, e.g. n: 8")
        return self


def _positive(value: object) -> object:
    """One number or a list of them, each above 0, as a tuple."""
    numbers = value if isinstance(value, list | tuple) else (value,)
    for n in _list_of(numbers, "number"):
        if isinstance(n, bool) or not isinstance(n, int | float) or not 0 < n < float("inf"):
            raise ValueError(f"{n!r} is no number above 0: sigma counts standard deviations")
    return tuple(float(n) for n in numbers)


class Gaussian(_Data):
    """Corrupt by Gaussian noise on token embeddings (Meng et al. 2022, ROME).

    sigma: standard deviations of the embeddings, one or several; the deviation is taken over the
    embeddings of the noised tokens of all pairs (std: tokens) or of the whole vocabulary (table).
    tokens: where the prompts differ, or indices and labels. The same noise is used for every sigma.
    """

    sigma: Annotated[tuple[float, ...], BeforeValidator(_positive)] = (3.0,)
    tokens: Literal["differ"] | tuple[StrictInt | StrictStr, ...] = "differ"
    samples: Annotated[StrictInt, Field(ge=1)] = 1
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    std: Literal["tokens", "table"] = "tokens"


class Mean(_Data):
    """The mean activation over prompts: the sweep's own (clean, corrupt) or those of a pairs file.

    by: position (the mean at the same position, prompts counted from their first token) or all.
    """

    prompts: Annotated[StrictStr, Field(min_length=1)]
    by: Literal["position", "all"] = "position"


class Resample(_Data):
    """The activation in the clean run of another pair, drawn for every sample."""

    samples: Annotated[StrictInt, Field(ge=1)] = 1
    seed: Annotated[StrictInt, Field(ge=0)] = 0


class Vector(_Data):
    """A vector that is added to the activation (steering): the tensor in a .safetensors or .npy
    file, [width], [layer, width] or [layer, unit, width], times `scale`."""

    file: Path
    scale: float = 1.0


SOURCES: dict[str, type[_Data]] = {"mean": Mean, "resample": Resample, "vector": Vector}
SourceOf = tuple[str, Mean | Resample | Vector | None]


def _sources(value: object) -> tuple[SourceOf, ...]:
    """Sources from a name, {name: options} or a list of them."""
    given = list(value) if isinstance(value, list | tuple) else [value]
    out: list[SourceOf] = []
    for item in _list_of(given, "source"):
        if isinstance(item, tuple):  # parsed already
            out.append(item)
            continue
        name, options = _named(item, "source")
        if name not in SOURCES and options:
            raise ValueError(f"source {name} has no options: write {name}")
        if name == "mean" and "prompts" not in options:
            raise ValueError(
                "source mean needs the prompts to average over: write "
                "{mean: {prompts: clean}}, corrupt, or a pairs file"
            )
        try:
            made: Any = SOURCES[name](**options) if name in SOURCES else None
        except ValidationError as error:
            raise ValueError(
                f"source {name}: {_explain(error.errors()[0], SOURCES[name])}"
            ) from error
        out.append((name, made))
    _list_of([name for name, _ in out], "source")
    return tuple(out)


def _sources_data(sources: tuple[SourceOf, ...]) -> list[Any]:
    return [name if m is None else {name: m.model_dump(mode="json")} for name, m in sources]


def _corrupt(value: object) -> object:
    if isinstance(value, str) and value not in ("pairs", "gaussian"):
        raise ValueError(f"'{value}' is not known: use pairs or gaussian")
    if value == "gaussian":
        return Gaussian()
    if isinstance(value, Mapping):
        name, options = _named(value, "corruption")
        if name != "gaussian":
            raise ValueError(f"unknown corruption '{name}': use pairs or gaussian")
        try:
            return Gaussian(**options)
        except ValidationError as error:
            raise ValueError(f"gaussian: {_explain(error.errors()[0], Gaussian)}") from error
    return value


def _corrupt_data(corrupt: str | Gaussian) -> Any:
    return corrupt if isinstance(corrupt, str) else {"gaussian": corrupt.model_dump(mode="json")}


class Autoencoder(_Data):
    """A sparse autoencoder: its file or folder, and where it reads if the file does not say."""

    file: Path
    layer: Annotated[StrictInt, Field(ge=0)] | None = None
    at: StrictStr | None = None


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


class Complement(_Data):
    """Every site of the components `within`, at the sweep's positions, but those in `besides`."""

    within: tuple[StrictStr, ...]
    besides: tuple[SiteText, ...]


def _set(value: object) -> object:
    """A set of sites, or a complement."""
    if isinstance(value, Complement):
        return value
    if isinstance(value, Mapping):
        try:
            return Complement(**value)
        except ValidationError as error:
            raise ValueError(_explain(error.errors()[0], Complement)) from error
    return tuple(_site(site) for site in _list_of(value, "site"))


def _set_data(sites: tuple[Site, ...] | Complement) -> Any:
    return sites.model_dump(mode="json") if isinstance(sites, Complement) else list(map(str, sites))


Sites = Annotated[tuple[Site, ...] | Complement, BeforeValidator(_set), PlainSerializer(_set_data)]


class FromResults(_Data):
    """A ranking of the cells of earlier results, largest absolute effect first."""

    results: Path
    component: StrictStr
    metric: StrictStr
    direction: Direction = "denoise"
    top: Annotated[StrictInt, Field(ge=1)] = 100


class Circuit(_Data):
    """A curve of performance against circuit size: the best k sites of a ranking, for k in `sizes`,
    and all other sites of the components `within` (those of the ranking if left out)."""

    ranking: tuple[SiteText, ...] | FromResults
    within: tuple[StrictStr, ...] = ()
    sizes: Literal["auto"] | tuple[Annotated[StrictInt, Field(ge=1)], ...] = "auto"


class Sweep(_Data):
    """What to patch and measure, whatever the model and the prompts. Sequences are tuples; metrics
    are normalised; `model_dump` can be read again."""

    corrupt: Annotated[
        Literal["pairs"] | Gaussian, BeforeValidator(_corrupt), PlainSerializer(_corrupt_data)
    ] = "pairs"
    source: Annotated[
        tuple[SourceOf, ...], BeforeValidator(_sources), PlainSerializer(_sources_data)
    ] = (("other", None),)
    direction: Literal["denoise", "noise", "both"] = "denoise"
    components: tuple[StrictStr, ...] = ()
    positions: (
        Literal["each", "all"]
        | tuple[StrictInt | StrictStr, ...]
        | dict[StrictStr, tuple[StrictInt | StrictStr, ...]]
    ) = "each"
    windows: tuple[Annotated[StrictInt, Field(ge=2)], ...] = ()
    sets: dict[StrictStr, Sites] = Field(default_factory=dict)
    circuit: Circuit | None = None
    sae: Autoencoder | None = None
    metrics: tuple[
        Annotated[Metric, BeforeValidator(parse_metric), PlainSerializer(_metric_data)], ...
    ] = (Metric("logit_diff"),)
    token_budget: Literal["auto"] | StrictInt = "auto"
    backend: Literal["auto", "wavefront", "nnsight"] = "auto"
    remote: bool = False
    # True: the default estimator of every component; else one for all, or {component: estimator}.
    estimate: bool | StrictStr | dict[StrictStr, StrictStr] = False

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
        if not self.components and not self.sets and not self.circuit:
            raise ValueError("components is missing: name what to patch, e.g. [head_z, mlp_out]")
        if self.windows and not set(self.components) & set(WINDOWED):
            raise ValueError(f"windows are over {', '.join(WINDOWED)}: add one to components")
        if self.remote and self.backend != "nnsight":
            raise ValueError("remote runs through nnsight: add backend: nnsight")
        uses = "sae_feature" in self.components or any(
            m.name == "sae_feature" for m in self.metrics
        )
        if uses and self.sae is None:
            raise ValueError("sae_feature needs an autoencoder: add sae: {file: ...}")
        return self

    @field_validator("components", mode="before")
    @classmethod
    def _components(cls, value: object) -> tuple[Any, ...]:
        if value in ([], ()):
            return ()
        names = _list_of(value, "component")
        for name in names:
            if isinstance(name, str):
                component(name)
        return names

    @field_validator("positions", mode="before")
    @classmethod
    def _positions(cls, value: object) -> object:
        if isinstance(value, str) and value in ("each", "all"):
            return value
        if isinstance(value, str):
            raise ValueError(f"'{value}' is not known: use each, all, or a list such as [{value}]")
        if isinstance(value, Mapping):
            if not value:
                raise ValueError("the mapping is empty: name at least one group of positions")
            return {name: cls._entries(entries) for name, entries in value.items()}
        return cls._entries(value)

    @classmethod
    def _entries(cls, value: object) -> tuple[Any, ...]:
        entries = _list_of(value, "index or label")
        for entry in entries:
            if type(entry) not in (int, str):
                raise ValueError(f"{entry!r} is no token index and no label: quote it if a label")
        return entries

    @field_validator("metrics", mode="before")
    @classmethod
    def _metrics(cls, value: object) -> tuple[Metric, ...]:
        metrics = tuple(parse_metric(v) for v in _list_of(value, "metric"))
        _list_of([metric.column for metric in metrics], "metric")
        return metrics

    @field_validator("windows", mode="before")
    @classmethod
    def _windows(cls, value: object) -> object:
        return value if value in ([], ()) else _list_of(value, "number of layers")

    @field_validator("estimate", mode="before")
    @classmethod
    def _estimate(cls, value: object) -> object:
        names = [*value, *value.values()] if isinstance(value, Mapping) else [value]
        if not isinstance(value, bool) and not (names and all(isinstance(n, str) for n in names)):
            raise ValueError(
                f"{value!r} names no estimates: use true, an estimator, or {{component: estimator}}"
            )
        return value

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
    out: Path | None = None

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
            memory_limits(value)
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
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # A misspelt key also leaves the right one missing: name the misspelt one.
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BadInput(f"{where}: {_explain(found[0])}{more}") from error


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The spec of a .yaml, .yml or .toml file.

    `overrides`: "key.key=value", the value as YAML, set before the whole is validated. A relative
    `prompts.file`, also in an override, is taken from the spec file's folder. BadInput, in one
    line, for a file that cannot be read and for everything in it that is not right.
    """
    path = Path(path)
    data = _parse(path)
    for override in overrides:
        _override(data, override)
    spec = parse_spec(data, str(path))
    if spec.prompts.file is None:
        return spec
    file = path.parent / spec.prompts.file.expanduser()
    return spec.model_copy(update={"prompts": spec.prompts.model_copy(update={"file": file})})


def _parse(path: Path) -> dict[str, Any]:
    """The content of a spec file."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise BadInput(f"{path}: unknown kind of spec file: use .yaml or .toml")
    try:
        text = _read(path, "spec").decode()
        data = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text: save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not TOML: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}{_yaml_reason(error)}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: not a mapping: write lines such as 'model: smollm2-135m'")
    return data


def _yaml(text: str) -> Any:
    """YAML in which a key that is there twice is an error, not the last one's victory."""
    todo, done = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode) and node not in done:
            done.add(node)  # an anchor may hold itself
            seen: set[str] = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    problem = f"key '{key.value}' is there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(str(key.value))
                todo.append(value)
    return yaml.safe_load(text)


def _yaml_reason(error: yaml.YAMLError) -> str:
    """ ":line: not YAML: why" """
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{f':{mark.line + 1}' if mark else ''}: not YAML: {reason}"


def _override(data: dict[str, Any], override: str) -> None:
    """Set one "key.key=value" in `data`."""
    keys, equals, text = override.partition("=")
    parts = [part.strip() for part in keys.split(".")]
    if not equals or not all(parts):
        raise BadInput(f"override '{override}': write key.key=value, e.g. prompts.n=16")
    try:
        value = _yaml(text)
    except yaml.YAMLError as error:
        raise BadInput(f"override '{override}'{_yaml_reason(error)}") from error
    for i, part in enumerate(parts[:-1]):
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            above = ".".join(parts[: i + 1])
            raise BadInput(f"override '{override}': {above} holds no keys: set {above} itself")
    data[parts[-1]] = value


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot read the {what}: {error.strerror}") from error


def _nearest(key: object, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(known)}"


def _explain(error: Any, kind: type[BaseModel] | None = None) -> str:
    """One of pydantic's errors: the key's path, what is wrong, and what was given."""
    place = ".".join(str(part) for part in error["loc"])
    colon = f"{place}: " if place else ""
    if error["type"] == "extra_forbidden":
        owner = kind or (
            Prompts if error["loc"][0] == "prompts" and len(error["loc"]) > 1 else Spec
        )
        return f"unknown key '{place}': {_nearest(error['loc'][-1], owner.model_fields)}"
    if error["type"] == "missing":
        return f"missing key '{place}': add it"
    if error["type"] == "value_error":
        return f"{colon}{error['ctx']['error']}"
    if error["type"] == "path_type":
        return f"{colon}should be a path, and is {error['input']!r}"
    message = error["msg"].replace("Input should be", "should be")
    return f"{colon}{message}, and is {error['input']!r}"
