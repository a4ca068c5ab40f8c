"""What a `zarr.json` of results may say: Zarr v3, of a few kinds of arrays, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

ZARR_JSON = "zarr.json"
# How nodes of Zarr v2 are named: none is read, wherever it lies.
OF_V2 = frozenset({".zarray", ".zgroup", ".zattrs", ".zmetadata"})
_DTYPES = ("bool", "uint8", "int32", "int64", "uint64", "float32", "float64", "string")
_CODECS = ({"bytes", "zstd"}, {"vlen-utf8", "zstd"})
_GROUP = {"attributes", "zarr_format", "node_type"}
_ARRAY = _GROUP | {
    *("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value"),
    *("codecs", "dimension_names", "storage_transformers"),
}


def node(content: bytes) -> dict[str, Any]:
    """The metadata of a group or an array; ValueError for anything that results do not have."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({_line(error)})") from error
    if not isinstance(found, dict) or not isinstance(found.get("attributes", {}), dict):
        raise ValueError("no metadata of Zarr")
    if found.get("zarr_format") != 3:
        raise ValueError(f"Zarr format {_line(found.get('zarr_format'))}, only 3 is read")
    kind = found.get("node_type")
    if kind not in ("group", "array"):
        raise ValueError(f"no group and no array but {_line(kind)}")
    if unknown := found.keys() - (_GROUP if kind == "group" else _ARRAY):
        raise ValueError(f"unknown entry {_line(min(unknown))}")
    if kind == "array":
        _check_array(found)
    return found


def first_of_v2(files: Iterable[str]) -> str | None:
    """The first of some files that makes a node of Zarr v2; None if none does."""
    return next((key for key in files if key.rpartition("/")[2] in OF_V2), None)


def _check_array(found: Mapping[str, Any]) -> None:
    if (dtype := found.get("data_type")) not in _DTYPES:
        raise ValueError(f"unknown data type {_line(dtype)}")
    codecs = found.get("codecs")
    names = [c.get("name") for c in codecs if isinstance(c, dict)] if codecs else []
    if not all(isinstance(name, str) for name in names) or {*names} not in _CODECS:
        raise ValueError(f"unknown codecs {_line(codecs)}")
    shape, chunks = found.get("shape"), _part(found, "chunk_grid", "regular").get("chunk_shape")
    if not _sizes(shape, 0) or not _sizes(chunks, 1) or len(shape) != len(chunks):
        raise ValueError(f"shape {_line(shape)} in chunks {_line(chunks)}")
    if _part(found, "chunk_key_encoding", "default").get("separator") != "/":
        raise ValueError("unknown names of chunks")
    if found.get("storage_transformers"):
        raise ValueError("unknown storage transformers")


def _part(found: Mapping[str, Any], name: str, kind: str) -> Mapping[str, Any]:
    part = found.get(name)
    inner = part.get("configuration") if isinstance(part, dict) else None
    if not isinstance(part, dict) or part.get("name") != kind or not isinstance(inner, dict):
        raise ValueError(f"unknown {name} {_line(part)}")
    return inner


def _sizes(found: Any, least: int) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(n) is int and n >= least for n in found)


def _line(value: object) -> str:
    """A value in one short line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
