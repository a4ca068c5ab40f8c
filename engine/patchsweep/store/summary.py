"""What a sweep says of itself while it runs: attributes that change, kept twice.

`summary` and `summary/second` are groups with the same attributes, each with a digest, the number
of the change, and a digest of the root of these results. The second is written after the first: of
two that differ the one with the higher number counts, and of one that is damaged the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from patchsweep.store.damage import Why
from patchsweep.store.digests import digest
from patchsweep.store.files import ROOT
from patchsweep.store.nodes import ZARR_JSON, node
from patchsweep.store.place import Place

COPIES = (f"summary/{ZARR_JSON}", f"summary/second/{ZARR_JSON}")


def read(place: Place, root: bytes) -> tuple[dict[str, Any], int, dict[str, Why]]:
    """The attributes, how often they were changed, and what is wrong with a copy, by name; no
    attributes if both are damaged."""
    there = place.gets(COPIES)
    good: dict[str, tuple[int, dict[str, Any]]] = {}
    bad: dict[str, Why] = {}
    for key in COPIES:
        try:
            good[key] = _opened(there[key], root)
        except KeyError:
            bad[key] = "missing"
        except ValueError:
            bad[key] = "checksum"
    if not there:
        return {}, 0, {}
    if not good:
        return {}, 0, bad
    number, said = max(good.values(), key=lambda found: found[0])
    bad |= {key: "another version" for key, (n, _) in good.items() if n != number}
    return said, number, bad


def write(place: Place, root: bytes, said: Mapping[str, Any], number: int) -> None:
    """Write both, as the change of this number."""
    content = json.dumps(said)
    sha256, of = _digest(content, number), digest(ROOT, root)
    attributes = {"said": content, "change": number, "sha256": sha256, "of": of}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    for key in COPIES:
        place.put(key, json.dumps(group).encode())


def _opened(content: bytes, root: bytes) -> tuple[int, dict[str, Any]]:
    """The number and the attributes of one copy; ValueError if it is not as it was written, or of
    other results."""
    try:
        said = node(content)["attributes"]
        text, number = said["said"], said["change"]
        of = said.pop("of", digest(ROOT, root))  # results made before it was said lack it
        if len(said) != 3 or said["sha256"] != _digest(text, number) or of != digest(ROOT, root):
            raise ValueError("not as it was written")
        return int(number), dict(json.loads(text))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not as it was written") from error


def _digest(content: str, number: int) -> str:
    return sha256(f"{number} {content}".encode()).hexdigest()
