"""Which files and folders results consist of: nothing else is ever moved or deleted with them.

They are told by their names, from what the root attributes say: the groups and arrays that a sweep
has of these components and metrics, their `zarr.json` and their chunks; README.txt, if they say so;
and what a kill leaves of one of these half written. Everything else inside is the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from patchsweep.sites import DIMENSIONS, EDGE_DIMENSIONS, EDGES, SETS, Site
from patchsweep.store.arrays import RUNS
from patchsweep.store.described import TEXTS
from patchsweep.store.files import README, ROOT

_CHUNK = re.compile(r"c(/\d+)*")
# What Zarr, and obstore in files, write before they rename it.
_HALF = re.compile(r"(?P<key>.+)(\.[0-9a-f]{32}\.partial|#\d+)", re.DOTALL)
_PROMPTS = {f"{run}_{what}" for run in RUNS for what in ("tokens", "text")}
_PROMPTS |= {"length", "align", "group", "pair", "position"}
_MARKS = {f"{what}{kind}" for what in ("estimates", "edges") for kind in ("", "_split")}
_MARKS |= {"choice", "waves_split"}


@dataclass(frozen=True)
class Owned:
    """The arrays of results, by group, and whether README.txt is theirs."""

    arrays: Mapping[str, frozenset[str]]
    readme: bool = False

    def file(self, key: str) -> bool:
        """Whether a file, named with slashes from the results on, is of them."""
        if found := _HALF.fullmatch(key):
            half = found["key"]
            return any(map(self._file, (half, f"{half}.json", f"{half}.txt")))
        return self._file(key)

    def folder(self, key: str) -> bool:
        """Whether a folder is."""
        group, _, rest = key.partition("/")
        array, _, chunk = rest.partition("/")
        known = self.arrays.get(group)
        if known is None or not rest:
            return known is not None
        return array in known and (not chunk or _CHUNK.fullmatch(chunk) is not None)

    def array(self, name: str) -> bool:
        """Whether an array, <group>/<array>, is."""
        group, _, rest = name.partition("/")
        return rest in self.arrays.get(group, ())

    def _file(self, key: str) -> bool:
        above, _, name = key.rpartition("/")
        if key == README:
            return self.readme
        if name == ROOT:
            return not above or (above.count("/") < 2 and self.folder(above))
        return "/c" in key and key.count("/") >= 2 and self.folder(key)


def owned(attrs: Mapping[str, Any]) -> Owned:
    """What results of these root attributes consist of; nothing but the root, of others."""
    components = _texts(attrs.get("components"))
    said = attrs.get("metrics")
    metrics = _texts([m.get("name") for m in said if isinstance(m, dict)] if said else ())
    if not components:
        return Owned({})
    kinds = ("", "_status", "_estimate")
    of_cells = {f"{m}{kind}" for m in metrics for kind in kinds} | {*DIMENSIONS, *TEXTS}
    sites = {f"site_{part}" for part in ("set", *Site.__dataclass_fields__)}
    groups: dict[str, set[str]] = {name: {*of_cells} for name in components}
    groups[SETS] = of_cells | sites
    groups["completion"] = {*components, SETS} | _MARKS
    groups["choice"] = {f"{c}_{kind}" for c in components for kind in ("status", "stratum")}
    groups[EDGES] = of_cells | {*EDGE_DIMENSIONS}
    groups["baseline"] = {f"{m}{kind}" for m in metrics for kind in ("", "_noise_floor")}
    groups["baseline"] |= {"run", *DIMENSIONS[1:4]}
    groups["prompts"] = _PROMPTS
    groups |= {"manifest": set(), "summary": {"second"}, "records": {"baseline", "estimates"}}
    known = {name: frozenset(arrays) for name, arrays in groups.items()}
    return Owned(known, attrs.get("readme") == README)


def not_ours(place: object, key: str) -> str:
    """The line that refuses to delete or move results with something else in them."""
    return (
        f"{place} holds what is not of the results, e.g. {key}: it is left where it is; move it "
        "elsewhere, or choose another --out"
    )


def _texts(found: object) -> list[str]:
    return [x for x in found if isinstance(x, str)] if isinstance(found, Iterable) else []
