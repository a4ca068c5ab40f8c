"""What arrays say of themselves: attributes of the CF conventions, which xarray shows and plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchsweep.sites import EDGES, SETS, Status, unit_name

# What a metric is, and what it counts in: "1" for pure numbers, None where only its user knows.
_METRICS: dict[str, tuple[str, str | None]] = {
    "logit_diff": ("logit of the answers minus that of the wrongs", "logits"),
    "logit": ("logit of the answers", "logits"),
    "logprob": ("log of the summed probability of the answers", "nats"),
    "prob": ("summed probability of the answers", "1"),
    "prob_diff": ("probability of the answers minus that of the wrongs", "1"),
    "rank": ("tokens above the best answer", "1"),
    "accuracy": ("whether the best answer is among the first k tokens", "1"),
    "kl": ("KL(clean ‖ patched)", "nats"),
    "kl_reverse": ("KL(patched ‖ clean)", "nats"),
    "total_variation": ("total variation between clean and patched", "1"),
    "relative_prob": ("relative probability of answers and wrongs", "1"),
    "sequence_logprob": ("log of the probability of the continuation", "nats"),
    "attention": ("attention probability", "1"),
    "neuron": ("activation of a neuron", None),
    "sae_feature": ("activation of a feature", None),
    "probe": ("projection on a direction", None),
}
_COORDINATES = {
    "direction": "denoise: the corrupt run is patched; noise: the clean run is",
    "source": "where patched-in values come from",
    "sender": "what an edge leads from",
    "receiver": "what it leads to",
    "sample": "sample of the noise or of the source",
    "pair": "pair of prompts",
    "layer": "layer",
    "unit": "place in the layer",
    "position": "token index in the clean prompt, or what the sweep was asked for",
    "run": "unpatched run",
    "token": "text of the token, clean/corrupt where the two prompts differ",
    "label": "labels of the token",
    "n_pairs": "pairs whose prompt has the position",
}
# Of every pair and position, beside the coordinates of dimensions.
TEXTS = ("token", "label", "n_pairs")
FLAGS = {
    "flag_values": [int(status) for status in Status],
    "flag_meanings": " ".join(status.name.lower() for status in Status),
}

# What becomes of the cells of estimated components.
CHOICE: dict[str, dict[str, Any]] = {
    "status": {"long_name": "what the values of a cell are to be", **FLAGS},
    "stratum": {"long_name": "stratum that the audit draws from", "comment": "255: of none"},
}


def coordinate(name: str, component: str = "") -> dict[str, Any]:
    """The attributes of a coordinate."""
    if component == SETS and name == "position":
        return {"long_name": "set of sites that are patched together"}
    unit = unit_name(component) if component else ""
    return {"long_name": unit.replace("_", " ") if name == "unit" and unit else _COORDINATES[name]}


def values(attrs: Mapping[str, Any], metric: str, kind: str) -> dict[str, Any]:
    """The attributes of a metric's array, `attrs` being those of the root. `kind`: "" for the
    patched run, _status, _estimate, _effect; of baselines `unpatched` and _noise_floor; `edge`."""
    what, units = metric_of(attrs, metric)
    if kind == "_status":
        found: dict[str, Any] = {"long_name": f"what the values of {metric} are", **FLAGS}
    elif kind == "_effect":
        found = _effect(attrs, metric, units)
    else:
        of = {
            "": "patched run",
            "_estimate": "patched run, estimated",
            "edge": "what patching the edge changes, estimated",
            "unpatched": "unpatched run",
            "_noise_floor": "what patching a run with its own activation changes",
        }
        found = {"long_name": f"{what}, {of[kind]}", **({"units": units} if units else {})}
    if kind == "":
        found["ancillary_variables"] = f"{metric}_status"
    return found


def stored(attrs: Mapping[str, Any], metric: str, kind: str, component: str) -> dict[str, Any]:
    """The same for an array of a component, in the files: with the coordinates that belong to it,
    which xarray takes from there."""
    found = values(attrs, metric, kind)
    return found if component in (SETS, EDGES) else {**found, "coordinates": " ".join(TEXTS)}


def metric_of(attrs: Mapping[str, Any], column: str) -> tuple[str, str | None]:
    """What a metric is and counts in: by the spec, as columns have names of their own."""
    asked = attrs.get("spec", {}).get("metrics") or ()
    columns = [metric["name"] for metric in attrs["metrics"]]
    for name, entry in zip(columns, asked, strict=False):
        if name == column:
            kind = entry if isinstance(entry, str) else next(iter(entry))
            what, units = _METRICS.get(kind, (column, None))
            return (what if kind in (column, "callable") else f"{column}, {what}"), units
    return column, None


def _effect(attrs: Mapping[str, Any], metric: str, units: str | None) -> dict[str, Any]:
    """Of a source without a run of its own an effect is a difference, in the metric's unit."""
    shares = {bool(source["normalised"]) for source in attrs["sources"]}
    if shares == {True}:
        name = f"effect on {metric} (0 = destination, 1 = source)"
        return {"long_name": name, "units": "1"}
    if shares == {False}:
        name = f"effect on {metric} (patched − destination)"
        return {"long_name": name, **({"units": units} if units else {})}
    name = f"effect on {metric} (0 = destination, 1 = source; patched − destination without one)"
    return {"long_name": name}
