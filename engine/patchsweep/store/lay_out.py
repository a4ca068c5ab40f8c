"""What is written once: made in memory before it is written, and read again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.sites import EDGES, SETS, Grid
from patchsweep.store.arrays import (
    Nodes,
    chunk_counts,
    create_baseline,
    create_component,
    create_edges,
    create_estimates,
    create_records,
    create_splits,
    put,
)
from patchsweep.store.books import Books
from patchsweep.store.damage import Why
from patchsweep.store.files import MARK, README, ROOT, SCHEMA, attributes
from patchsweep.store.ledger import Ledger, ledgers_of, scored
from patchsweep.store.manifest import MANIFEST, SEAL, Layout, once_of, seal, unpacked
from patchsweep.store.nodes import ZARR_JSON, node
from patchsweep.store.place import Place
from patchsweep.store.prompts import create_prompts, prompt_texts
from patchsweep.store.readme import readme
from patchsweep.store.texts import texts_of


def made(
    grids: Sequence[Grid],
    pairs: Sequence[Pair],
    token_strings: Callable[[int], str],
    attrs: Mapping[str, Any],
    sites: Mapping[str, NDArray[Any]],
    nodes: Nodes,
) -> dict[str, bytes]:
    """The files of results that nothing was written to, by name; see `Store.create`."""
    metrics = [metric["name"] for metric in attrs["metrics"]]
    held: dict[str, Buffer] = {}
    root = zarr.create_group(MemoryStore(store_dict=held), zarr_format=3)
    strings = prompt_texts(pairs, token_strings)
    for grid in grids:
        texts = {}
        if grid.component not in (SETS, EDGES):
            texts = texts_of(pairs, grid.positions, attrs, strings["clean"], strings["corrupt"])
        create_component(root, grid, metrics, attrs, texts, nodes)
    create_estimates(root, grids, metrics, attrs)
    if scored(attrs):
        create_edges(root, grids[0], metrics, attrs, nodes)
    create_baseline(root, grids, metrics, len(pairs), attrs)
    chunks = sum(math.prod(grid.tiles) for grid in grids)
    create_splits(root, chunks * attrs.get("blocks_per_chunk", 1))
    create_prompts(root, pairs, token_strings, strings)
    for name, column in sites.items():
        put(root[SETS], f"site_{name}", ("site",), column)  # type: ignore[arg-type]
    for ledger in _ledgers(chunk_counts(root), attrs).values():
        create_records(root, ledger)
    root.update_attributes({**attrs, SEAL: ""})
    files = {key: buffer.to_bytes() for key, buffer in held.items()}
    files[README] = readme(grids, attrs).encode()
    root.update_attributes({SEAL: seal(files)})
    return files | {ROOT: held[ROOT].to_bytes()}


def books_of(place: Place, files: Mapping[str, bytes]) -> Books:
    """The records of results that consist of these files. BadInput for metadata that results do not
    have: nothing was read by it."""
    counts = {}
    for key in (key for key in files if key.rpartition("/")[2] == ZARR_JSON):
        try:
            found = node(files[key])
        except ValueError as exc:
            raise BadInput(f"{place.at} is damaged, {key}: {exc}: run with --overwrite") from exc
        if found["node_type"] == "array":
            sizes = zip(
                found["shape"], found["chunk_grid"]["configuration"]["chunk_shape"], strict=True
            )
            counts[key.removesuffix(f"/{ZARR_JSON}")] = tuple(-(-n // c) for n, c in sizes)
    attrs = node(files[ROOT])["attributes"]
    try:
        return Books(place, _ledgers(counts, attrs), vouching=attrs[MARK] == SCHEMA)
    except (KeyError, TypeError, AttributeError, IndexError) as exc:
        raise BadInput(f"{place.at} is damaged, {exc} is missing: run with --overwrite") from exc


def layout_of(place: Place) -> Layout:
    """What is written once in results that have a manifest; BadInput if too much is damaged to say
    what that was."""
    content = place.gets([MANIFEST])
    files: dict[str, bytes] | None = None
    if content:
        try:
            files = unpacked(content[MANIFEST])
        except ValueError:
            files = None
    there = place.gets(files or ())
    if files and there.get(ROOT) == files.get(ROOT):
        return Layout(files, _differences(files, there))
    said = attributes(place.gets([ROOT]).get(ROOT, b""))
    names = once_of(place.files(), said.get("readme") == README)
    for found in (there, place.gets(names)):
        if _sealed(found):
            why: Why = "another version" if files else "checksum" if content else "missing"
            return Layout(found, {MANIFEST: why})
    if files:
        return Layout(files, _differences(files, there))
    raise BadInput(
        f"{place.at} is damaged, {MANIFEST} and others of its files: run with --overwrite"
    )


def older_layout(place: Place) -> Layout:
    """What there is that is written once, in results without a manifest."""
    return Layout(place.gets(once_of(place.files(), readme=False)), {})


def _ledgers(counts: Mapping[str, tuple[int, ...]], attrs: Mapping[str, Any]) -> dict[str, Ledger]:
    metrics = [metric["name"] for metric in attrs["metrics"]]
    estimators = [*attrs.get("estimators", {})]
    return ledgers_of(counts, attrs["components"], metrics, estimators, scored(attrs))


def _sealed(there: Mapping[str, bytes]) -> bool:
    """Whether these are the files that their root speaks of."""
    try:
        said: Any = node(there[ROOT])["attributes"].get(SEAL)
    except (KeyError, ValueError):
        return False
    return isinstance(said, str) and said == seal(there)


def _differences(files: Mapping[str, bytes], there: Mapping[str, bytes]) -> dict[str, Why]:
    found: dict[str, Why] = {}
    for key, content in files.items():
        if key not in there:
            found[key] = "missing"
        elif there[key] != content:
            found[key] = "truncated" if len(there[key]) < len(content) else "checksum"
    return found
