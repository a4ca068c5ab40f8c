"""What is written once when results are laid out is kept twice: as files, and in the manifest.

The manifest is the group `manifest`; its attributes hold the contents of all those files: the
metadata of every group and array, the chunks of coordinates, prompts and sites, README.txt, and the
root, whose own attribute `written_once` is a digest of all of them. So it says what should be
there, and what was there; one that is lost can be made of the files again.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256

from numcodecs.zstd import Zstd

from patchsweep.store.damage import Why, decoded
from patchsweep.store.described import TEXTS
from patchsweep.store.digests import digest_of_all
from patchsweep.store.files import MARK, README, ROOT, SCHEMA, attributes, marked
from patchsweep.store.nodes import ZARR_JSON, node

MANIFEST = f"manifest/{ZARR_JSON}"
SEAL = "written_once"
_NAME = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*")


@dataclass(frozen=True)
class Layout:
    """files: what is written once, by name. damaged: the names of those, the manifest among them,
    that are not there as they were written."""

    files: Mapping[str, bytes]
    damaged: Mapping[str, Why]


def packed(files: Mapping[str, bytes]) -> bytes:
    """The manifest of some files."""
    listed = {key: b64encode(files[key]).decode() for key in sorted(files)}
    content = json.dumps(listed).encode()
    said = {
        "sha256": sha256(content).hexdigest(),
        "files": b64encode(Zstd(level=3, checksum=True).encode(content)).decode(),
    }
    group = {"zarr_format": 3, "node_type": "group", "attributes": said}
    return json.dumps(group).encode()


def unpacked(manifest: bytes) -> dict[str, bytes]:
    """The files of a manifest; ValueError for one that is not as it was written."""
    try:
        said = node(manifest)["attributes"]
        content = decoded(b64decode(said["files"], validate=True))
        files = {
            _checked(key): b64decode(text, validate=True)
            for key, text in json.loads(content).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("the manifest cannot be read") from error
    if {*said} != {"sha256", "files"} or sha256(content).hexdigest() != said["sha256"]:
        raise ValueError("the manifest is not as it was written")
    return files


def seal(files: Mapping[str, bytes]) -> str:
    """The digest of all files; of the root without the place where it says that digest."""
    root = files[ROOT]
    said = str(attributes(root).get(SEAL, "")).encode()
    return digest_of_all({**files, ROOT: root.replace(said, b"") if said else root})


def once_of(files: Iterable[str], readme: bool) -> list[str]:
    """Those of the files of results that are written once, told by their names: the manifest and
    what is filled later are not. `readme`: README.txt is one of them."""
    listed = {*files}
    nodes = {key for key in listed if key == ROOT or _is_node(key)}
    chunks = {key for key in listed if "/c/" in key and _is_coordinate(key.split("/c/")[0])}
    chunks = {key for key in chunks if f"{key.split('/c/')[0]}/{ZARR_JSON}" in nodes}
    return sorted(nodes | chunks | ({README} & listed if readme else set()))


def root_of(root: bytes, manifest: bytes) -> bytes:
    """The root of results; where it is lost or damaged, what their manifest has of it. Not of
    results that are half laid out or half deleted, whose root says nothing more."""
    said = attributes(root)
    half = said.get(MARK) == 0 and SEAL not in said
    if marked(root) != SCHEMA and manifest and not half:
        with suppress(ValueError):
            return unpacked(manifest).get(ROOT, root)
    return root


def _checked(key: str) -> str:
    """A name that stays below the results; ValueError for any other."""
    if (
        key != README
        and not _is_node(key)
        and ("/c/" not in key or not _NAME.fullmatch(key) or "/../" in f"/{key}/")
    ):
        raise ValueError(f"{key!r} is no name of a file of results")
    return key


def _is_node(key: str) -> bool:
    if not _NAME.fullmatch(key) or "/../" in f"/{key}/":
        return False
    above, _, name = key.rpartition("/")
    apart = above.split("/")[0] in ("manifest", "summary")
    return name == ZARR_JSON and above.count("/") < 2 and not apart


_ONCE = frozenset(
    {
        *("direction", "source", "sample", "pair", "layer", "unit", "position", "run"),
        *("sender", "receiver", *TEXTS),
    }
)


def _is_coordinate(array: str) -> bool:
    group, _, name = array.partition("/")
    if group in ("completion", "records", "choice"):
        return False
    return group == "prompts" or name in _ONCE or (group == "sets" and name.startswith("site_"))
