"""Results as a tidy table: a row per patching experiment, pair by pair, in memory or as Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.results.reader import Reader
from patchsweep.sites import Grid, Status, unit_name
from patchsweep.statistics import Array, change, ratio
from patchsweep.store import replacing

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def frames(results: Reader) -> Iterator[pd.DataFrame]:
    """The table in pieces: one per component and pair."""
    for name in results.components:
        grid = results.grid(name)
        ends = {metric: results.ends(metric, grid) for metric in results.metrics}
        for pairs in grid.pair_tiles():
            region = (slice(None),) * 3 + (slice(pairs.start, pairs.stop),)
            kinds = ["", "_status", *(["_estimate"] if name in results.store.estimators else [])]
            arrays = {
                f"{metric}{kind}": results.store.read(f"{name}/{metric}{kind}", region)
                for metric in results.metrics
                for kind in kinds
            }
            for i, pair in enumerate(pairs):
                cells = {array: data[:, :, :, i] for array, data in arrays.items()}
                yield _frame(results, grid, pair, cells, ends)


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, without formulas."""
    texts = table.select_dtypes(["object", "string", "category"]).columns
    guarded = {name: table[name].astype(str).map(no_formula) for name in texts}
    shown = table.assign(**guarded)
    return str(shown.to_csv(index=False, float_format="%.7g", lineterminator="\r\n"))


_NUMBER = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?\s?%?", re.IGNORECASE)


def no_formula(text: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula: with an apostrophe before what
    begins like one and is no number."""
    formula = text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def write_parquet(results: Reader, path: Path, *, overwrite: bool = False) -> None:
    """Write the table piece by piece; BadInput without pyarrow, if the disk refuses, for a path
    inside results, and without `overwrite` for one that is there."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise BadInput("Parquet needs pyarrow: pip install 'patchsweep[report]'") from exc
    schema = _schema(results)
    with (
        replacing(path, overwrite) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        for frame in frames(results):
            writer.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))


def _frame(
    results: Reader,
    grid: Grid,
    pair: int,
    cells: dict[str, NDArray[Any]],
    ends: dict[str, tuple[Array, Array]],
) -> pd.DataFrame:
    """The rows of one pair; `cells` are [direction, source, sample, layer, unit, position]."""
    import pandas as pd

    left_out = (Status.NOT_DONE, Status.OUTSIDE)
    status = np.stack([cells[f"{metric}_status"] for metric in results.metrics])
    keep = ~np.isin(status, left_out).all(axis=0)
    direction, source, sample, layer, unit, position = np.nonzero(keep)
    destinations = ["corrupt" if way == "denoise" else "clean" for way in grid.directions]
    tokens = np.array(
        [[token or "" for token in results.tokens(run, grid, pair)] for run in destinations],
        dtype=object,
    )
    has_units = unit_name(grid.component) != ""
    positions: Any = np.array(grid.positions, dtype=object)[position]
    rows = len(layer)
    columns: dict[str, Any] = {
        "component": _categories([0] * rows, (grid.component,), results.components),
        "direction": _categories(direction, grid.directions, ("denoise", "noise")),
        "source": _categories(source, grid.sources, grid.sources),
        "sample": sample.astype(np.int32),
        "pair": np.full(rows, pair, dtype=np.int32),
        "layer": (layer + grid.first_layer).astype(np.int32),
        "unit": pd.arrays.IntegerArray(unit.astype(np.int32), np.full(rows, not has_units)),
        "position": _strings(positions) if _labelled(results) else positions.astype(np.int32),
        "token": _strings(tokens[direction, position]),
    }
    names = [s.name.lower() for s in Status]
    for metric, (dst, src) in ends.items():
        raw = cells[metric][keep]
        state = cells[f"{metric}_status"][keep]
        at = (direction, source, sample, pair)
        columns[metric] = raw
        columns[f"{metric}_effect"] = ratio(change(raw, state, dst[at]), src[at] - dst[at])
        columns[f"{metric}_status"] = _categories(state, names, tuple(names))
        if results.store.estimators:
            estimate = cells.get(f"{metric}_estimate", np.full_like(cells[metric], np.nan))
            columns[f"{metric}_estimate"] = estimate[keep]
    return pd.DataFrame(columns)


def _labelled(results: Reader) -> bool:
    """Whether any grid has positions with names."""
    grids = map(results.grid, results.components)
    return any(isinstance(position, str) for grid in grids for position in grid.positions)


def _schema(results: Reader) -> pa.Schema:
    """The Parquet types of the table."""
    import pyarrow as pa

    sources = max(len(grid.sources) for grid in results.store.grids.values())
    names = pa.dictionary(pa.int8(), pa.string())
    value = pa.float64() if results.attrs["dtype"] == "float64" else pa.float32()
    fields = {
        "component": names,
        "direction": names,
        "source": names if sources < 127 else pa.dictionary(pa.int32(), pa.string()),
        "sample": pa.int32(),
        "pair": pa.int32(),
        "layer": pa.int32(),
        "unit": pa.int32(),
        "position": pa.string() if _labelled(results) else pa.int32(),
        "token": pa.string(),
    }
    for metric in results.metrics:
        fields |= {metric: value, f"{metric}_effect": pa.float64(), f"{metric}_status": names}
        fields |= {f"{metric}_estimate": value} if results.store.estimators else {}
    return pa.schema(list(fields.items()))


def _categories(codes: Any, names: Any, categories: tuple[str, ...]) -> pd.Categorical:
    """A column of names given by number, with the same categories in every piece of the table."""
    import pandas as pd

    place = np.array([categories.index(name) for name in names], dtype=np.intp)
    return pd.Categorical.from_codes(place[np.asarray(codes, dtype=np.intp)], list(categories))


def _strings(values: Any) -> Any:
    import pandas as pd

    return pd.array([str(value) for value in values], dtype="str")
