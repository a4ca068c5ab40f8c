"""Where a sweep's results go: what is there already, gone on with, made larger or created."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchsweep.engine import append as appending
from patchsweep.engine.provenance import check_append, check_same, difference
from patchsweep.errors import BadInput
from patchsweep.model import Model
from patchsweep.passes import Values
from patchsweep.plan import Plan, receivers, senders
from patchsweep.plan.layout import NAMES
from patchsweep.processes import Processes
from patchsweep.spec import Sweep
from patchsweep.store import (
    Nodes,
    Store,
    changed,
    check_free,
    check_outside,
    check_own,
    exists,
    known_by,
    private,
    put_back,
)

Fill = Callable[[Store], None]


def check_seen(out: str | Path, processes: Processes) -> None:
    """BadInput if not all processes can see what one of them writes."""
    if processes.count > 1 and private(out):
        raise BadInput(
            f"{out}: each of {processes.count} processes has a memory of its own: choose a folder, "
            "or start one process"
        )


def found(out: str | Path, settings: Sweep, wanted: bool, moved: bool) -> Store | None:
    """The results that are there already, damaged or not. BadInput if there are some, and none are
    wanted; if `out` is inside others; and if they will be `moved` and something else is inside."""
    check_outside(out)
    put_back(out)
    if not wanted:
        check_free(out)
    if not exists(out):
        return None
    try:
        there = Store.open(out, "r+", settings.fsync, mending=True)
    except BadInput:
        if exists(out):
            raise
        raise changed(out) from None
    if moved:
        check_own(out)
    return there


def to_replace(out: str | Path) -> bytes | None:
    """What the results that are there already are known by; None if there are none. BadInput for
    anything else that is there, or inside; and if `out` is inside others."""
    check_outside(out)
    put_back(out)
    if not exists(out):
        return None
    known = known_by(out)
    check_own(out)
    return known


def check_same_there(out: str | Path, before: bytes | None) -> None:
    """BadInput if another run, which held the lock until now, has changed what is replaced."""
    if to_replace(out) != before:
        raise changed(out)


def check_unchanged(found: Store) -> None:
    """BadInput if another run, which held the lock until now, has changed the results meanwhile."""
    if not exists(found.path):
        raise changed(found.path)
    if json.dumps(Store.open(found.path, mending=True).attrs) != json.dumps(found.attrs):
        raise changed(found.path)


def further(
    existing: Store,
    append: bool,
    plan: Plan,
    settings: Sweep,
    attrs: dict[str, Any],
    values: Values,
    tokenizer: Any,
) -> Fill | None:
    """What fills larger results with those that are there, if something is appended to them, or
    newer ones if they are older; None if they are only gone on with. BadInput if they are of
    another sweep."""
    what = difference(existing, attrs)
    if not what and existing.vouched:
        return None
    refused = appending.refusal(existing, plan, settings, attrs, values, tokenizer)
    if what:
        check_append(existing, what, refused, append)
    elif refused:
        raise BadInput(
            f"{existing.path} is of an older version, and what it holds cannot be taken over: "
            f"{refused}: choose another --out, or --overwrite to replace it"
        )
    return partial(appending.copy, existing)


def shared(
    out: str | Path,
    goes_on: Store | None,
    plan: Plan,
    settings: Sweep,
    model: Model,
    attrs: dict[str, Any],
    fill: Fill | None,
    processes: Processes,
) -> Store:
    """The results that all processes write to: created by the first of them where it does not go on
    with what is there. BadInput in the others if they were not started on the same sweep."""
    if processes.first:
        return goes_on or _created(out, plan, settings, model, attrs, fill)
    processes.told("created")
    store = Store.open(out, "r+", settings.fsync)
    check_same(store, attrs)
    return store


def _created(
    out: str | Path,
    plan: Plan,
    settings: Sweep,
    model: Model,
    attrs: dict[str, Any],
    fill: Fill | None,
) -> Store:
    double = model.hf_model.dtype == torch.float64
    return Store.create(
        out,
        list(plan.chunks.grids.values()),
        [m.column for m in settings.metrics],
        plan.pairs,
        lambda token: model.tokenizer.decode([token]),
        attrs,
        "float64" if double else "float32",
        _site_columns(plan),
        _nodes(plan),
        settings.fsync,
        fill,
    )


def _nodes(plan: Plan) -> Nodes:
    d, table = plan.dimensions, plan.layouts.edges
    positions = table.positions.names if table else ()
    return Nodes([*map(str, senders(d))], [*map(str, receivers(d))], positions)


def _site_columns(plan: Plan) -> dict[str, Any]:
    """The sites of the sets, as the results keep them, [site]."""
    table = plan.layouts.table
    if table is None:
        return {}
    sources = ["", *(s.name for s in plan.sources)]
    return {
        "set": table.set,
        "component": [NAMES[code] for code in table.component],
        "layer": table.layer,
        "unit": table.unit,
        "position": [table.entries[entry] for entry in table.entry],
        "source": [sources[number + 1] for number in table.source],
    }
