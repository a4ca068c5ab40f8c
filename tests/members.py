"""The sites of every set of a sweep, worked out from its spec."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# component, layer, unit (None: it has none), position as it is written, source (None: the sweep's)
Member = tuple[str, int, int | None, int | str, str | None]
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
NO_UNITS = (*STREAMS, "embed")
SITE = re.compile(r"([a-z_]+)\.?([\d.]*)@?([^<]*)<?(.*)")


def members(
    given: Mapping[str, Any],
    layers: int,
    units: Mapping[str, int],
    longest: int,
    sae_layer: int = 0,
) -> dict[str, list[Member]]:
    """By the names of the sets. `units` of a layer by component, where it has several; `longest`:
    tokens of the longest clean prompt."""
    positions = given.get("positions", "each")
    entries: Sequence[int | str] = ["all"] if positions == "all" else list(positions)
    if positions == "each":
        entries = range(longest)
    found: dict[str, list[Member]] = {}
    for component in given.get("components", ()):
        if component not in STREAMS:
            continue
        for size in given.get("windows", ()):
            for first in range(layers - size + 1):
                for entry in entries:
                    name = f"{component}.{first}-{first + size - 1}@{entry}"
                    window = range(first, first + size)
                    found[name] = [(component, layer, None, entry, None) for layer in window]
    for name, said in given.get("sets", {}).items():
        if isinstance(said, Mapping):
            found[name] = besides(said, entries, layers, units, sae_layer)
        else:
            found[name] = [site(text, sae_layer) for text in said]
    circuit = given.get("circuit")
    if circuit is not None:
        ranking = circuit["ranking"]
        within = circuit.get("within") or [site(text, sae_layer)[0] for text in ranking]
        for size in circuit["sizes"]:
            said = {"within": list(dict.fromkeys(within)), "besides": ranking[:size]}
            found[f"circuit top {size}"] = [site(text, sae_layer) for text in ranking[:size]]
            found[f"circuit outside {size}"] = besides(said, entries, layers, units, sae_layer)
    return found


def site(text: str, sae_layer: int = 0) -> Member:
    """`head_z.9.6@END`, `mlp_out.5`, `embed@3`, `resid_pre.2@S2<zero`."""
    match = SITE.fullmatch(text)
    assert match, text
    component, numbers, at, source = match.groups()
    layer_unit = [int(n) for n in numbers.split(".") if n]
    if component in ("embed", "sae_feature"):  # in the one layer that there is
        layer_unit.insert(0, 0 if component == "embed" else sae_layer)
    layer, *unit = layer_unit
    position = int(at) if re.fullmatch(r"-?\d+", at) else at or "all"
    return component, layer, unit[0] if unit else None, position, source or None


def besides(
    said: Mapping[str, Any],
    entries: Sequence[int | str],
    layers: int,
    units: Mapping[str, int],
    sae_layer: int,
) -> list[Member]:
    """Every site of the components `within` but those that are to be spared."""
    spared = [site(text, sae_layer)[:4] for text in said["besides"]]
    out: list[Member] = []
    for component in said["within"]:
        where = {"embed": [0], "sae_feature": [sae_layer]}.get(component, range(layers))
        several: Sequence[int | None] = range(units.get(component, 1))
        if component in NO_UNITS:
            several = [None]
        for layer in where:
            for unit in several:
                for entry in entries:
                    place = (component, layer, unit)
                    if (*place, entry) not in spared and (*place, "all") not in spared:
                        out.append((*place, entry, None))
    return out
