"""What results say about where they come from, and whether a sweep may go on with them."""

from __future__ import annotations

import platform
import socket
from importlib.metadata import version
from typing import Any

import torch

from patchsweep import attribution
from patchsweep.errors import BadInput
from patchsweep.inputs import by_name, short, shortened
from patchsweep.model import Model
from patchsweep.plan import Plan
from patchsweep.spec import Sweep
from patchsweep.store import Store

# What must be equal for a sweep to go on where another one stopped.
IDENTITY = {
    "plan_hash": "other prompts, components, positions or directions",
    "model_fingerprint": "another model",
    "metrics": "other metrics",
    "estimators": "other estimates",
    "prefilter": "another prefilter",
    "edges": "other scores of edges",
    "backend": "another backend",
    "values": "other means, vectors, draws, probes or autoencoder",
}


def provenance(model: Model, plan: Plan, settings: Sweep, fingerprint: str) -> dict[str, Any]:
    """What the results say about where they come from: with `provenance: short` without the host,
    and with paths from the working directory on, or names."""
    full = settings.provenance == "full"
    spec = settings.model_dump(mode="json")
    spec = spec if full else shortened(spec)
    packages = ("patchsweep", "torch", "transformers", "accelerate", "nnsight", "numpy", "zarr")
    device = model.device
    return {
        "spec": spec,
        "prompts": list(dict.fromkeys(p.origin for p in plan.pairs if p.origin)),
        "estimators": attribution.chosen_with_edges(settings),
        "chosen_columns": attribution.chosen_columns(plan, settings),
        "edges": spec["edges"],
        "plan_hash": plan.hash,
        "token_budget": plan.token_budget,
        "blocks_per_chunk": plan.chunks.blocks,
        "pairs_per_block": plan.pairs_per_block,
        "model": model.name if full else short(model.name),
        "weights": model.weights,
        "heads": plan.dimensions.heads,
        "model_class": type(model.hf_model).__name__,
        "model_fingerprint": fingerprint,
        "model_dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "sources": [
            {"name": s.name, "normalised": s.kind == "run", "samples": s.samples}
            for s in plan.sources
        ],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        **({"host": socket.gethostname()} if full else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def check_same(store: Store, attrs: dict[str, Any]) -> None:
    """BadInput unless the results in `store` are those of this very sweep."""
    if what := difference(store, attrs):
        raise _another(store, what)


def difference(store: Store, attrs: dict[str, Any]) -> str | None:
    """What makes the results in `store` those of another sweep; None if they are of this one."""
    spec = store.attrs["spec"]
    said = {key: spec.get(key) for key in ("metrics", "prefilter", "edges")}
    before = {**store.attrs, **said, "estimators": store.estimators}
    now = {**attrs, **{key: attrs["spec"][key] for key in said}}
    for key, what in IDENTITY.items():
        if by_name(before.get(key)) != by_name(now[key]):
            return what
    return None


def check_append(store: Store, what: str, refusal: str | None, append: bool) -> None:
    """BadInput where results of another sweep cannot be appended to, or were not asked to be."""
    if append and refusal:
        raise BadInput(
            f"{store.path}: pairs and metrics can be added, nothing else, and {refusal}: "
            "choose another --out, or --overwrite to replace it"
        )
    if not append:
        raise _another(store, what, "" if refusal else "--append to add to it, ")


def _another(store: Store, what: str, mend: str = "") -> BadInput:
    return BadInput(
        f"{store.path} holds the results of another sweep ({what}): "
        f"{mend}choose another --out, or --overwrite to replace it"
    )
