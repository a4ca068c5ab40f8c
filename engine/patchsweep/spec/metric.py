"""The metrics of a spec: their names, their options, and what is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer

from patchsweep.errors import BadInput, shown
from patchsweep.spec.data import named, nearest

Reduce = Literal["mean", "sum"]
Place = int | str  # a token index or a label

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
    name, options = named(value, "metric")
    if name not in METRICS:
        raise BadInput(f"unknown metric '{name}': {nearest(name, METRICS)}")
    for option, chosen in options.items():
        if option not in METRICS[name]:
            hint = nearest(option, METRICS[name]) if METRICS[name] else "it has none, leave it out"
            raise BadInput(f"unknown option '{option}' of {name}: {hint}")
        if wrong := _wrong_option(option, chosen):
            raise BadInput(f"{option} of {name} is {shown(chosen)}: use {wrong}")
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


def _metric_data(metric: Metric) -> str | dict[str, Any]:
    return {metric.name: metric.options} if metric.options else metric.name


AnyMetric = Annotated[Metric, BeforeValidator(parse_metric), PlainSerializer(_metric_data)]
