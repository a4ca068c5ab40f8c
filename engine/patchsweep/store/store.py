"""The store of one sweep: created, opened, written to and read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.sites import SETS, Block, Grid
from patchsweep.store.array_store import ArrayStore
from patchsweep.store.arrays import (
    CHOSEN,
    EDGES,
    ESTIMATED,
    SCORED,
    WAVES_SPLIT,
    create_baseline,
    create_component,
    create_edges,
    create_estimates,
    create_splits,
    put,
)
from patchsweep.store.files import MARK, ROOT
from patchsweep.store.outside import replacing
from patchsweep.store.owned import owned
from patchsweep.store.place import check_free, place_of, schema_of
from patchsweep.store.prompts import create_prompts

SCHEMA = 2


class Store(ArrayStore):
    """The results of one sweep. Writing needs `create` or `open(..., "r+")`."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        grids: Sequence[Grid],
        metrics: Sequence[str],
        pairs: Sequence[Pair],
        token_strings: Callable[[int], str],
        attrs: Mapping[str, Any],
        dtype: Literal["float32", "float64"],
        sites: Mapping[str, NDArray[Any]] | None = None,
        nodes: tuple[Sequence[str], Sequence[str]] = ((), ()),
        fsync: bool = False,
        fill: Callable[[Store], None] | None = None,
    ) -> Store:
        """Lay out an empty results folder, whole or not at all: its attributes are the last thing.

        `token_strings` gives the text of a token id; `sites` are the columns of the sets' sites.
        The attribute `estimators`, by component, says which have estimates; the attribute `edges`
        whether there are any, between `nodes`, the senders and receivers. With `fill`, which writes
        what earlier results at `path` hold, these are replaced. BadInput if else `path` exists, or
        the disk refuses.
        """
        place = place_of(path)
        if not fill:
            check_free(path)
        names = {
            "metrics": [{"name": name} for name in metrics],
            "components": [grid.component for grid in grids],
        }
        with place.writing("run again"), place.laid_out(names, fsync, bool(fill)) as root:
            for grid in grids:
                create_component(root, grid, metrics, dtype)
            create_estimates(root, grids, metrics, dtype, attrs.get("estimators", {}))
            if attrs.get(EDGES):
                create_edges(root, grids[0], metrics, dtype, attrs[EDGES], nodes)
            create_baseline(root, grids, metrics, len(pairs), dtype)
            chunks = sum(math.prod(grid.tiles) for grid in grids)
            create_splits(root, chunks * attrs.get("blocks_per_chunk", 1))
            create_prompts(root, pairs, token_strings)
            for name, column in (sites or {}).items():
                put(root[SETS], f"site_{name}", ("site",), column)  # type: ignore[arg-type]
            root.update_attributes(
                {
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    **attrs,
                    **names,
                    "dtype": dtype,
                    MARK: SCHEMA,
                }
            )
            if fill:
                fill(cls(place, root, then="run again"))
        return cls.open(path, "r+", fsync)

    @classmethod
    def open(cls, path: str | Path, mode: Literal["r", "r+"] = "r", fsync: bool = False) -> Store:
        """Open a results folder; BadInput if it is missing, foreign, half-created or newer."""
        place = place_of(path)
        if not place.exists():
            raise BadInput(f"no results at {place.at}: check the path")
        schema = schema_of(place)
        if schema is None and not place.exists():
            raise changed(place.at)
        if schema is None:
            raise BadInput(f"{place.at} is not a results folder of patchsweep: check the path")
        if schema != SCHEMA:
            mend = "update it" if schema > SCHEMA else "run the sweep again with --overwrite"
            raise BadInput(
                f"{place.at} has schema {schema}, this patchsweep reads {SCHEMA}: {mend}"
            )
        try:
            return cls(place, place.group(mode), fsync)
        except FileNotFoundError as exc:  # it was there a moment ago
            raise changed(place.at) from exc

    def arrays(self) -> list[str]:
        """The names of the results' arrays that are there; of nothing else that is inside."""
        found = []
        for group, arrays in owned(self.attrs).arrays.items():
            if self.has(f"{group}/{ROOT}"):
                self._member(group)
            names = sorted(f"{group}/{array}" for array in arrays)
            found += [name for name in names if self.has(f"{name}/{ROOT}")]
        return found

    def listed(self) -> Store:
        """The same, but `has` answers as of now: to ask after every file one by one takes long
        where they are far away."""
        return Store(self._place, self._group, self._fsync, self._place.listed())

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the spec."""
        return tuple(metric["name"] for metric in self.attrs["metrics"])

    @cached_property
    def estimators(self) -> dict[str, str]:
        """The estimator of each component that has estimates."""
        return dict(self.attrs.get("estimators", {}))  # older results have none

    @property
    def blocks_per_chunk(self) -> int:
        """How many of the plan's blocks a chunk holds at most."""
        return int(self.attrs.get("blocks_per_chunk", 1))  # older results: a chunk is a block

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of each component, in chunks, rebuilt from its arrays."""
        return {name: self._grid(name) for name in self.attrs["components"]}

    def write_block(
        self,
        block: Block,
        values: Mapping[str, NDArray[Any]],
        status: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write one block of `grids`, a chunk, of every metric, then mark it done.

        The arrays have the 7-D shape of `block.region`. BadInput if the disk refuses.
        """
        assert {*values} >= {*self.metrics}
        self.write_cells(block, values, status)
        self._mark(f"completion/{block.component}", (slice(block.index, block.index + 1),))

    def write_cells(
        self,
        block: Block,
        values: Mapping[str, NDArray[Any]],
        status: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write one block of some metrics, as `write_block` does; it is not marked done."""
        region = block.region(self.grids[block.component])
        shape = tuple(part.stop - part.start for part in region)
        arrays: dict[str, NDArray[Any]] = {}
        for metric in values:
            arrays[f"{block.component}/{metric}"] = values[metric]
            arrays[f"{block.component}/{metric}_status"] = status[metric]
        for name, array in arrays.items():
            assert array.shape == shape, (name, array.shape, shape)
        self._write(arrays, region)

    def done(self, component: str) -> NDArray[np.bool_]:
        """Which chunks of a component are done, bool [block]."""
        return self.read(f"completion/{component}").astype(np.bool_)

    def write_split(self, what: str, index: tuple[int, ...], depth: int) -> None:
        """Record that what is computed together is halved so often from now on: in `what`, one of
        the arrays that end in `_split`. BadInput if the disk refuses."""
        if self._records(what):
            at = tuple(slice(i, i + 1) for i in index)
            self._write({what: np.full([1] * len(at), depth, np.uint8)}, at)

    def split(self, what: str, index: tuple[int, ...]) -> int:
        """How often it is halved."""
        if not self._records(what):
            return 0
        at = tuple(slice(i, i + 1) for i in index)
        [key] = self.keys(what, at)
        return int(self.read(what, at).item()) if self.has(key) else 0

    def splits(self) -> NDArray[np.uint8]:
        """How often every wave is, [wave]."""
        found = np.zeros(self.shape(WAVES_SPLIT) if self._records(WAVES_SPLIT) else 0, np.uint8)
        for region in self.written(WAVES_SPLIT):
            found[region] = self.read(WAVES_SPLIT, region)
        return found

    def _records(self, name: str) -> bool:
        """Whether there is such a record: older results lack some."""
        return self.has(f"{name}/zarr.json")

    def write_estimates(
        self,
        source: int,
        sample: int,
        pairs: range,
        values: Mapping[str, Mapping[str, NDArray[Any]]],
    ) -> None:
        """Write the estimates of some pairs, then mark them done. One process only: the pairs need
        not be whole chunks.

        values: by component and metric, [direction, 1, 1, pair, layer, unit, position]. BadInput if
        the disk refuses.
        """
        arrays = {
            f"{name}/{metric}_estimate": values[name][metric]
            for name in self.estimators
            for metric in self.metrics
        }
        self._write_pairs(arrays, ESTIMATED, source, sample, pairs)

    def estimated(self) -> NDArray[np.bool_]:
        """Whose estimates are written, bool [source, sample, pair]. Only where there are any."""
        return self.read(ESTIMATED).astype(np.bool_)

    def write_choice(self, component: str, **arrays: NDArray[np.uint8]) -> None:
        """Write what becomes of a component's cells, `status` and `stratum` [direction, source,
        layer, unit, position]. BadInput if the disk refuses."""
        named = {f"choice/{component}_{name}": array for name, array in arrays.items()}
        self._write(named, (slice(None),) * 5)

    def mark_chosen(self) -> None:
        """The choices of all components are written."""
        self._mark(CHOSEN, (slice(None),))

    def chosen(self) -> bool:
        """Whether the choices of all components are written."""
        return bool(self.estimators) and bool(self.read(CHOSEN).all())

    def write_edges(
        self, source: int, sample: int, pairs: range, scores: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write the edges' scores of some pairs, [direction, pair, sender, receiver] by metric,
        then mark them done. BadInput if the disk refuses."""
        arrays = {f"{EDGES}/{metric}": scores[metric][:, None, None] for metric in self.metrics}
        self._write_pairs(arrays, SCORED, source, sample, pairs)

    def scored(self) -> NDArray[np.bool_]:
        """Whose edges are scored, bool [source, sample, pair]. Only where there are any."""
        return self.read(SCORED).astype(np.bool_)

    def _write_pairs(
        self,
        arrays: Mapping[str, NDArray[Any]],
        mark: str,
        source: int,
        sample: int,
        pairs: range,
    ) -> None:
        """Write arrays [direction, 1, 1, pair, ...] by name, then mark them done."""
        at = (slice(source, source + 1), slice(sample, sample + 1), slice(pairs.start, pairs.stop))
        self._write(arrays, (slice(None), *at))
        self._mark(mark, at)

    def write_baseline(
        self,
        source: int,
        sample: int,
        pairs: range,
        values: Mapping[str, NDArray[Any]],
        noise_floor: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write unpatched metrics and the noise floor of some pairs, [run, pair] each.

        The noise floor is the distance of a null patch (the destination patched with its own
        activation) from that destination's baseline. `pairs` are those of whole blocks.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for metric in values:
            arrays[f"baseline/{metric}"] = values[metric][:, None, None]
            arrays[f"baseline/{metric}_noise_floor"] = noise_floor[metric][:, None, None]
        self._write(arrays, _baseline_of(source, sample, pairs))

    def baseline(
        self, source: int, sample: int, pairs: range, metrics: Iterable[str]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """What `write_baseline` has written of some metrics; NaN where nothing is."""
        region = _baseline_of(source, sample, pairs)
        values, floor = (
            {m: self.read(f"baseline/{m}{kind}", region)[:, 0, 0] for m in metrics}
            for kind in ("", "_noise_floor")
        )
        return values, floor

    def has_baseline(self, source: int, sample: int, pairs: range) -> bool:
        """Whether the baselines and noise floors of some pairs are there."""
        names = [f"baseline/{m}{kind}" for m in self.metrics for kind in ("", "_noise_floor")]
        region = _baseline_of(source, sample, pairs)
        return all(self.has(key) for name in names for key in self.keys(name, region))

    def _grid(self, name: str) -> Grid:
        array = self._array(f"{name}/{self.metrics[0]}")
        directions = self.read(f"{name}/direction").tolist()
        positions = self.read(f"{name}/position").tolist()
        return Grid(
            component=name,
            directions=tuple(directions),
            pairs=array.shape[3],
            layers=array.shape[4],
            units=array.shape[5],
            positions=tuple(positions),
            pair_tile=array.chunks[3],
            unit_tile=array.chunks[5],
            position_tile=array.chunks[6],
            first_layer=int(self.read(f"{name}/layer")[0]),
            sources=tuple(self.read(f"{name}/source").tolist()),
            samples=array.shape[2],
        )


def remove(path: str | Path) -> None:
    """Delete results; BadInput if `path` is anything else."""
    place = place_of(path)
    if not schema_of(place):
        Store.open(path)  # says what is wrong
    with place.writing("run again"):
        place.delete()


def changed(path: str | Path) -> BadInput:
    """Results are not what they were a moment ago."""
    return BadInput(f"{path} was just changed by another run: run again")


def pack(path: str | Path, target: Path, *, overwrite: bool = False) -> None:
    """Put results into one zip file, whole or not at all; BadInput if the disk refuses, for a
    `target` inside results, and without `overwrite` for one that is there.

    Chunks are compressed already; what is not of the results is left out.
    """
    store = Store.open(path)  # says what is wrong
    place, ours = place_of(path), owned(store.attrs)
    with replacing(target, overwrite) as partial, zipfile.ZipFile(partial, "w") as packed:
        for key in filter(ours.file, place.files()):
            packed.writestr(key, place.get(key))


def _baseline_of(source: int, sample: int, pairs: range) -> tuple[slice, ...]:
    """Where baselines lie, [run, source, sample, pair]."""
    at = (slice(source, source + 1), slice(sample, sample + 1))
    return (slice(None), *at, slice(pairs.start, pairs.stop))
