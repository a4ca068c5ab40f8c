"""patchsweep: exact activation-patching sweeps of language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchsweep import tasks
    from patchsweep.engine import run, sweep, verify
    from patchsweep.errors import BadInput
    from patchsweep.model import Model, load_model, wrap
    from patchsweep.pairs import Pair, make_pair, read_pairs
    from patchsweep.passes import Context
    from patchsweep.results import Results, open
    from patchsweep.sites import Site, parse_site
    from patchsweep.spec import Spec, load_spec
    from patchsweep.store import check

__all__ = [
    "BadInput",
    "Context",
    "Model",
    "Pair",
    "Results",
    "Site",
    "Spec",
    "check",
    "load_model",
    "load_spec",
    "make_pair",
    "open",
    "parse_site",
    "read_pairs",
    "run",
    "sweep",
    "tasks",
    "verify",
    "wrap",
]

_HOME = {
    "BadInput": "errors",
    "Context": "passes",
    "Model": "model",
    "Pair": "pairs",
    "Results": "results",
    "Site": "sites",
    "Spec": "spec",
    "check": "store",
    "load_model": "model",
    "load_spec": "spec",
    "make_pair": "pairs",
    "open": "results",
    "parse_site": "sites",
    "read_pairs": "pairs",
    "run": "engine",
    "sweep": "engine",
    "verify": "engine",
    "wrap": "model",
}


def __getattr__(name: str) -> Any:
    """Names are imported when first used: `patchsweep --help` does not wait for torch."""
    if name == "tasks":
        return import_module("patchsweep.tasks")
    if name in _HOME:
        return getattr(import_module(f"patchsweep.{_HOME[name]}"), name)
    raise AttributeError(f"module 'patchsweep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
