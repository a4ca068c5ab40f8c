"""The runs that a sweep asks for: its windows and sets as a table of sites, its edges and
paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair, resolve_positions
from patchsweep.plan.cone import Map
from patchsweep.plan.dimensions import Dimensions
from patchsweep.plan.layout.columns import CODES, OWN, Features, SiteTable
from patchsweep.plan.layout.edges import EdgeTable
from patchsweep.plan.layout.grids import Layouts
from patchsweep.plan.layout.paths import PathTable
from patchsweep.plan.reads import Reads
from patchsweep.plan.sources import Source
from patchsweep.sites import WINDOWED, Site, component, path_grid, window_name
from patchsweep.spec import Complement, Metric, Place, Sweep

# A site as numbers: component, layer, unit, position entry (as the spec writes it), source.
_Numbers = tuple[int, int, int, Place, int]


def make_layouts(
    pairs: Sequence[Pair],
    settings: Sweep,
    sources: tuple[Source, ...],
    reads: Reads,
    dimensions: Dimensions,
    features: Features | None,
) -> Layouts:
    """BadInput for sets and windows that the model or the pairs do not have."""
    out = Layouts(
        pairs=pairs,
        directions=settings.directions,
        sources=sources,
        positions=resolve_positions(pairs, settings.positions),
        reads=reads,
        dimensions=dimensions,
        table=None,
        features=features,
        edges=_edges(pairs, settings, dimensions),
    )
    for read in reads.inner:
        _check_read(out, read.metric)
    out = replace(out, paths=_paths(pairs, settings, out))
    sets = _windows(out, settings)
    for name, given in settings.sets.items():
        if name in sets:
            raise BadInput(f"set '{name}' has the name of a window: choose another")
        if isinstance(given, Complement):
            sets[name] = _complement(out, given)
        else:
            sets[name] = [_site(out, site, name) for site in given]
    return replace(out, table=_table(out, sets)) if sets else out


def _edges(pairs: Sequence[Pair], settings: Sweep, dimensions: Dimensions) -> EdgeTable | None:
    asked = settings.edges
    if asked is None or not asked.exact:
        return None
    return EdgeTable(asked, resolve_positions(pairs, asked.positions), dimensions)


def _paths(pairs: Sequence[Pair], settings: Sweep, layouts: Layouts) -> dict[str, PathTable]:
    """A sweep's paths by grid. BadInput for nodes that the model does not have, and for ends that
    no path joins."""
    found, d = {}, layouts.dimensions
    for name, asked in settings.paths.items():
        begins = "" if asked.begins == "set" else asked.begins
        table = PathTable(
            asked=asked,
            positions=resolve_positions(pairs, asked.positions),
            dimensions=d,
            layers=len(layouts.layers(begins)) if begins else 1,
            units=layouts.units(begins) if begins else 1,
        )
        _check_path(name, table, layouts)
        found[path_grid(asked.begins, name)] = table
    return found


def _check_path(name: str, table: PathTable, layouts: Layouts) -> None:
    asked = table.asked
    senders = () if isinstance(asked.senders, str) else asked.senders
    for node in (*senders, *asked.receivers):
        if (node.layer or 0) >= layouts.dimensions.layers:
            most = layouts.dimensions.layers - 1
            raise BadInput(f"path '{name}': {node}: no layer {node.layer}: use 0 to {most}")
        if node.unit is not None and node.unit >= (count := layouts.units(node.component)):
            raise BadInput(f"path '{name}': {node}: no unit {node.unit}: use 0 to {count - 1}")
    for node, below in zip(asked.receivers, table.below.T, strict=True):
        if not below.any():
            what = asked.senders if isinstance(asked.senders, str) else "sender"
            raise BadInput(
                f"path '{name}': no {what} lies below {node}: name a receiver further on"
            )
    for number, node in enumerate(senders):
        if not table.below[number].any():
            raise BadInput(f"path '{name}': {node} lies below no receiver: leave it out")
    for read_at in layouts.reads.inner:
        at = layouts.inner_layer(read_at)
        lowest = min(table.receivers[1])
        if at < lowest:
            raise BadInput(
                f"path '{name}': {read_at.metric.column} is read in layer {at}, below all of its "
                f"receivers (layer {lowest} and on): leave it out"
            )


def _check_read(of: Layouts, m: Metric) -> None:
    """BadInput for a layer, head, neuron or feature that is not there."""
    limits = {"layer": of.dimensions.layers, "head": of.dimensions.heads}
    if m.name == "attention":
        of.units("head_pattern")
    if m.name == "neuron":
        limits["neuron"] = of.units("neuron")
    if m.name == "sae_feature":
        limits["feature"] = of.units("sae_feature")
    if m.name == "probe":
        limits["unit"] = of.units(m.component)
    for option, limit in limits.items():
        if getattr(m, option) >= limit:
            raise BadInput(f"{m.column}: no {option} {getattr(m, option)}: use 0 to {limit - 1}")


def _windows(of: Layouts, settings: Sweep) -> dict[str, list[_Numbers]]:
    """Sliding windows of adjacent layers (Meng et al. 2022; Zhang & Nanda 2023, section 5)."""
    sets: dict[str, list[_Numbers]] = {}
    for name in (c for c in WINDOWED if c in settings.components):
        for size in settings.windows:
            layers = of.dimensions.layers
            if size > layers:
                raise BadInput(f"windows: {size} layers, but the model has {layers}: use fewer")
            for entry in of.positions.names:
                for first in range(layers - size + 1):
                    window = range(first, first + size)
                    sets[window_name(name, window, entry)] = [
                        (CODES[name], layer, 0, entry, OWN) for layer in window
                    ]
    return sets


def _site(of: Layouts, site: Site, name: str) -> _Numbers:
    """BadInput, naming the set, for a layer, unit or source that is not there."""
    where, layers, units = (
        f"set '{name}': {site}",
        of.layers(site.component),
        of.units(site.component),
    )
    layer = layers.start if site.layer is None else site.layer
    if layer not in layers:
        raise BadInput(f"{where}: no layer {layer}: use {layers.start} to {layers.stop - 1}")
    unit = site.unit or 0
    if unit >= units:
        kind = component(site.component).unit
        raise BadInput(f"{where}: no {kind} {unit}: use 0 to {units - 1}")
    names = [s.name for s in of.sources]
    if site.source is not None and site.source not in names:
        raise BadInput(
            f"{where}: no source '{site.source}' in this sweep: it has {', '.join(names)}"
        )
    source = OWN if site.source is None else names.index(site.source)
    return CODES[site.component], layer, unit, site.position, source


def _complement(of: Layouts, given: Complement) -> list[_Numbers]:
    besides = {_site(of, site, "besides")[:4] for site in given.besides}
    for *_, entry in besides:
        if entry != "all" and entry not in of.positions.names:
            names = ", ".join(map(str, of.positions.names))
            raise BadInput(
                f"besides: position {entry} is none of this sweep's ({names}): "
                "name the sites by the positions that the sweep has"
            )
    out = []
    for name in given.within:
        code = CODES[component(name).name]
        for layer in of.layers(name):
            for unit in range(of.units(name)):
                if (code, layer, unit, "all") in besides:
                    continue
                out += [
                    (code, layer, unit, entry, OWN)
                    for entry in of.positions.names
                    if (code, layer, unit, entry) not in besides
                ]
    return out


def _table(of: Layouts, sets: Mapping[str, Sequence[_Numbers]]) -> SiteTable:
    entries = list(dict.fromkeys(site[3] for sites in sets.values() for site in sites))
    rows = [
        (i, code, layer, unit, entries.index(entry), source)
        for i, sites in enumerate(sets.values())
        for code, layer, unit, entry, source in sites
    ]
    columns = np.array(rows, np.int64).reshape(-1, 6).T
    return SiteTable(
        names=tuple(sets),
        entries=tuple(map(str, entries)),
        set=columns[0],
        component=columns[1],
        layer=columns[2],
        unit=columns[3],
        entry=columns[4],
        source=columns[5],
        members=np.stack([_members(of, entry) for entry in entries], 1),
    )


def _members(of: Layouts, entry: Place) -> Map:
    """[pair, position]: what a site's position means: a group or label of the sweep, "all", or any
    index or label of the pairs."""
    if isinstance(entry, str) and entry in of.positions.names:
        return of.positions.members[:, of.positions.names.index(entry)]
    which = "all" if entry == "all" else (entry,)
    return resolve_positions(of.pairs, which).members[:, 0]
