"""The sweep as data: validated, saved with the results."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from patchsweep.pairs import Bos
from patchsweep.sites import DIRECTIONS, Direction, component

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Reduce = Literal["mean", "sum"]
S = TypeVar("S", bound="Sweep")

# Metric -> its options and what they are when left out.
METRICS: dict[str, dict[str, Any]] = {
    "logit_diff": {"reduce": "mean"},
    "logit": {},
    "logprob": {},
    "prob": {},
    "rank": {},
    "accuracy": {"k": 1},
    "kl": {},
}


@dataclass(frozen=True)
class Metric:
    """One metric. `reduce` (over sets of tokens) is logit_diff's, `k` (rank < k) is accuracy's."""

    name: str
    reduce: Reduce = "mean"
    k: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from what they are when left out."""
        given = {option: getattr(self, option) for option in METRICS[self.name]}
        return {o: value for o, value in given.items() if value != METRICS[self.name][o]}

    @property
    def column(self) -> str:
        """Name of its arrays and of its column: "accuracy", with k = 5 "accuracy_k5", and
        "logit_diff_sum"."""
        suffixes = {"reduce": "_{}", "k": "_k{}"}
        return self.name + "".join(suffixes[o].format(v) for o, v in self.options.items())


def parse_metric(value: object) -> Metric:
    """A metric from "name" or {name: {option: value}}; BadInput for what is not known."""
    if isinstance(value, Metric):
        return value
    given: Mapping[Any, Any] = {value: {}} if isinstance(value, str) else {}
    if isinstance(value, Mapping):
        given = value
    if len(given) != 1:
        raise BadInput(f"{value!r} is not one metric: write a name or {{name: {{option: value}}}}")
    [(name, options)] = given.items()
    if name not in METRICS:
        raise BadInput(f"unknown metric '{name}': {_nearest(name, METRICS)}")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise BadInput(f"the options of {name} are {options!r}: write {{option: value}}")
    for option, chosen in options.items():
        if option not in METRICS[name]:
            hint = _nearest(option, METRICS[name]) if METRICS[name] else "it has none, leave it out"
            raise BadInput(f"unknown option '{option}' of {name}: {hint}")
        if option == "reduce" and chosen not in ("mean", "sum"):
            raise BadInput(f"reduce of {name} is {chosen!r}: use mean or sum")
        if option == "k" and (type(chosen) is not int or chosen < 1):
            raise BadInput(f"k of {name} is {chosen!r}: use a whole number, at least 1")
    return Metric(name, **options)


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


class Sweep(_Data):
    """What to patch and measure, whatever the model and the prompts. Sequences are tuples; metrics
    are normalised; `model_dump` can be read again."""

    corrupt: Literal["pairs"] = "pairs"
    source: Literal["other"] = "other"
    direction: Literal["denoise", "noise", "both"] = "denoise"
    components: tuple[StrictStr, ...]
    positions: Literal["each", "all"] | tuple[StrictInt | StrictStr, ...] = "each"
    metrics: tuple[
        Annotated[Metric, BeforeValidator(parse_metric), PlainSerializer(_metric_data)], ...
    ] = (Metric("logit_diff"),)
    token_budget: Literal["auto"] | StrictInt = "auto"

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions that `direction` stands for."""
        return tuple(d for d in DIRECTIONS if self.direction in (d, "both"))

    @field_validator("components", mode="before")
    @classmethod
    def _components(cls, value: object) -> tuple[Any, ...]:
        names = _list_of(value, "component")
        for name in names:
            if isinstance(name, str):
                component(name)
        return names

    @field_validator("positions", mode="before")
    @classmethod
    def _positions(cls, value: object) -> str | tuple[Any, ...]:
        if isinstance(value, str) and value in ("each", "all"):
            return value
        if isinstance(value, str):
            raise ValueError(f"'{value}' is not known: use each, all, or a list such as [{value}]")
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
    prompts: Prompts
    out: Path | None = None

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError(f"'{value}' is no device: use auto, cpu, cuda or cuda:N")
        return value


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


def _explain(error: Any) -> str:
    """One of pydantic's errors: the key's path, what is wrong, and what was given."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        owner = Prompts if error["loc"][0] == "prompts" and len(error["loc"]) > 1 else Spec
        return f"unknown key '{place}': {_nearest(error['loc'][-1], owner.model_fields)}"
    if error["type"] == "missing":
        return f"missing key '{place}': add it"
    if error["type"] == "value_error":
        return f"{place}: {error['ctx']['error']}"
    if error["type"] == "path_type":
        return f"{place}: should be a path, and is {error['input']!r}"
    message = error["msg"].replace("Input should be", "should be")
    return f"{place}: {message}, and is {error['input']!r}"
