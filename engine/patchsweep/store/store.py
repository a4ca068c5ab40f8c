"""The store of one sweep: created, opened, written to and read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.sites import EDGES, Block, Grid, dimensions
from patchsweep.store import summary
from patchsweep.store.array_store import ArrayStore, Region, number_key
from patchsweep.store.arrays import ESTIMATED, WAVES_SPLIT, Nodes
from patchsweep.store.damage import Damaged, Why, damaged
from patchsweep.store.files import MARK, OLDER, README, ROOT, SCHEMA
from patchsweep.store.lay_out import books_of, layout_of, made, older_layout
from patchsweep.store.ledger import (
    BASELINES,
    CHOSEN,
    DONE,
    ESTIMATES,
    PARTLY,
    SCORED,
    Ledger,
)
from patchsweep.store.manifest import MANIFEST, packed
from patchsweep.store.nodes import ZARR_JSON, first_of_v2
from patchsweep.store.place import another_schema, changed, check_free, place_of, schema_of


class Store(ArrayStore):
    """The results of one sweep. Writing needs `create` or `open(..., "r+")`.

    damage: what is written once and is not as it was; None: nothing may be.
    """

    def __init__(self, *args: Any, damage: Mapping[str, Why] | None = None, **how: Any) -> None:
        super().__init__(*args, **how)
        self.damage = damage

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
        nodes: Nodes = Nodes(),  # noqa: B008 (a constant)
        fsync: bool = False,
        fill: Callable[[Store], None] | None = None,
    ) -> Store:
        """Lay out an empty results folder, whole or not at all: its attributes are the last thing.

        `token_strings` gives the text of a token id; `sites` are the columns of the sets' sites.
        The attribute `estimators`, by component, says which have estimates; the attribute `edges`
        whether there are any, between `nodes`. With `fill`, which writes
        what earlier results at `path` hold, these are replaced. BadInput if else `path` exists, or
        the disk refuses.
        """
        place = place_of(path)
        if not fill:
            check_free(path)
        with place.writing("run again"):
            known = {
                "metrics": [{"name": name} for name in metrics],
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                **attrs,
                "components": [grid.component for grid in grids],
                "dtype": dtype,
                "readme": README,
                MARK: SCHEMA,
            }
            files = made(grids, pairs, token_strings, known, sites or {}, nodes)
            with place.laid_out(known, fsync, instead=bool(fill)) as here:
                for key in (*sorted(files.keys() - {ROOT}), MANIFEST):
                    here.put(key, files[key] if key in files else packed(files))
                if fill:
                    fill(cls(here, files, books_of(here, files), then="run again"))
                here.put(ROOT, files[ROOT])
        return cls.open(path, "r+", fsync)

    @classmethod
    def open(
        cls,
        path: str | Path,
        mode: Literal["r", "r+"] = "r",
        fsync: bool = False,
        mending: bool = False,
    ) -> Store:
        """Open a results folder; BadInput if it is missing, foreign, half-created or newer, and,
        but for who is `mending` it, if anything that is written once, README.txt apart, is not as
        it was."""
        place = place_of(path)
        if not place.exists():
            raise BadInput(f"no results at {place.at}: check the path")
        schema = schema_of(place)
        if schema is None and not place.exists():
            raise changed(place.at)
        if not schema:
            raise BadInput(f"{place.at} is not a results folder of patchsweep: check the path")
        if schema not in (OLDER, SCHEMA):
            raise BadInput(another_schema(place, schema))
        if mode == "r+":
            place.check_writable()
        layout = layout_of(place) if schema == SCHEMA else older_layout(place)
        needed = {key: why for key, why in layout.damaged.items() if key != README}
        if needed and not mending:
            raise damaged(place.at, *next(iter(needed.items())))
        damage = layout.damaged if mending else None
        return cls(place, layout.files, books_of(place, layout.files), fsync, damage=damage)

    def listed(self) -> Store:
        """The same, but `has` answers as of now: to ask after every file one by one takes long
        where they are far away."""
        here = self._place.listed()
        return Store(self._place, self._once, self._books, self._fsync, here, damage=self.damage)

    @cached_property
    def _root(self) -> dict[str, Any]:
        return self.node_attrs("")

    @property
    def attrs(self) -> dict[str, Any]:
        """The root attributes, and those that have come since (`set_attrs`)."""
        return self._root | self._said

    @cached_property
    def _said(self) -> dict[str, Any]:
        if not self.vouched:
            return {}
        said, _, bad = summary.read(self._place, self._once[ROOT])
        if self.damage is None and len(bad) == len(summary.COPIES):
            raise damaged(self.path, *bad.popitem())
        return said

    def set_attrs(self, **attrs: Any) -> None:
        """Add attributes to those of the root, or say others. One process only."""
        with self._place.changing(self._then):
            said, number, _ = summary.read(self._place, self._once[ROOT])
            summary.write(self._place, self._once[ROOT], said | attrs, number + 1)
            self._said = said | attrs
            if self._fsync:
                self._place.settle(summary.COPIES)

    def owns(self, key: str) -> bool:
        """Whether a file is of these results, by its name."""
        if key in self._once or key in (MANIFEST, *summary.COPIES):
            return True
        array, _, chunk = key.partition("/c/")
        known = f"{array}/{ZARR_JSON}" in self._once and self.is_filled(array)
        return known and all(part.isdecimal() for part in chunk.split("/"))

    def of_v2(self) -> str | None:
        """The name of a file of Zarr v2 among these results; None if there is none."""
        if isinstance(self._here, frozenset):
            return first_of_v2(self._here)
        groups = {"", *(name.partition("/")[0] for name in self.arrays())}
        return self._place.of_v2(sorted(groups))

    @property
    def vouched(self) -> bool:
        """Whether records say what should be there: older results have only marks."""
        return self._books.vouching

    def ledger(self, name: str) -> Ledger:
        """The ledger of this name."""
        return self._books.ledgers[name]

    def damaged_once(self) -> dict[str, Why]:
        """What is kept twice and of which one is not as it was written, by name."""
        changed = summary.read(self._place, self._once[ROOT])[2] if self.vouched else {}
        return {**(self.damage or {}), **changed}

    def restore(self) -> None:
        """Write again what is written once and is damaged. BadInput if the disk refuses."""
        with self._place.writing("run again"):
            for key in sorted(self.damage or (), key=lambda key: key == ROOT):
                content = packed(self._once) if key == MANIFEST else self._once[key]
                self._place.put(key, content)
            said, number, bad = summary.read(self._place, self._once[ROOT])
            if bad:
                summary.write(self._place, self._once[ROOT], said, max(1, number))
        self.damage = None

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the spec."""
        return tuple(metric["name"] for metric in self._root["metrics"])

    @cached_property
    def estimators(self) -> dict[str, str]:
        """The estimator of each component that has estimates."""
        return dict(self._root.get("estimators", {}))  # older results have none

    @property
    def blocks_per_chunk(self) -> int:
        """How many of the plan's blocks a chunk holds at most."""
        return int(self._root.get("blocks_per_chunk", 1))  # older results: a chunk is a block

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of each component, in chunks, rebuilt from its arrays."""
        return {name: self._grid(name) for name in self._root["components"]}

    def write_block(
        self,
        block: Block,
        values: Mapping[str, NDArray[Any]],
        status: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write one block of `grids`, a chunk, of every metric, then record that it is done.

        The arrays have the 7-D shape of `block.region`. BadInput if the disk refuses.
        """
        assert {*values} >= {*self.metrics}
        self._write_cells(block, values, status, DONE)

    def write_cells(
        self,
        block: Block,
        values: Mapping[str, NDArray[Any]],
        status: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write one block of some metrics, as `write_block` does; it is not done."""
        self._write_cells(block, values, status, PARTLY)

    def _write_cells(
        self,
        block: Block,
        values: Mapping[str, NDArray[Any]],
        status: Mapping[str, NDArray[Any]],
        state: int,
    ) -> None:
        region = block.region(self.grids[block.component])
        shape = tuple(part.stop - part.start for part in region)
        arrays: dict[str, NDArray[Any]] = {}
        for metric in values:
            arrays[f"{block.component}/{metric}"] = values[metric]
            arrays[f"{block.component}/{metric}_status"] = status[metric]
        for name, array in arrays.items():
            assert array.shape == shape, (name, array.shape, shape)
        self._write_recorded(self.ledger(f"completion/{block.component}"), arrays, region, state)

    def done(self, component: str) -> NDArray[np.bool_]:
        """Which chunks of a component are done, bool [block]."""
        return self._done(f"completion/{component}").ravel()

    def _done(self, name: str) -> NDArray[np.bool_]:
        """Which records of a ledger say that all is there, in the shape of its counts. Damaged if
        one is."""
        if not self.vouched:
            return self.read(name).astype(np.bool_)
        ledger = self.ledger(name)
        numbers, bad = self._books.read(ledger)
        for number, why in bad.items():
            raise damaged(self.path, ledger.key(number), why)
        return np.asarray(ledger.states(numbers) == DONE)

    def records(self, name: str) -> tuple[NDArray[np.bool_], dict[int, tuple[Why, str]]]:
        """Which records of a ledger, or marks, say that all is there, in the shape of its counts;
        and of those that are damaged, by number, why, and their files."""
        try:
            return self._done(name) if name in self._books.ledgers else self._marks(name), {}
        except Damaged:
            pass
        bad: dict[int, tuple[Why, str]] = {}
        if self.vouched and name in self._books.ledgers:
            ledger = self.ledger(name)
            numbers, why = self._books.read(ledger)
            bad = {number: (why[number], ledger.key(number)) for number in why}
            return np.asarray(ledger.states(numbers) == DONE), bad
        marks = np.zeros(self.shape(name), bool)
        for index, region in enumerate(self.chunks(name)):
            try:
                marks[region] = self.numbers(name, region)
            except Damaged as error:
                bad[index] = (error.why, self.keys(name, region)[0])
        return marks, bad

    def vouches(self, key: str, fresh: bool = False) -> bool | None:
        """Whether a record says that a chunk is there; None of one that none speaks of. `fresh`:
        as it is now."""
        array, _, chunk = key.partition("/c/")
        if not self.vouched or (ledger := self._books.of(array)) is None:
            return None
        number, slot = ledger.place(array, tuple(map(int, chunk.split("/"))))
        return self._books.record(ledger, number, fresh).vouches(slot)

    def record_of(self, key: str) -> str:
        """The file of the record that speaks of a chunk."""
        array, _, chunk = key.partition("/c/")
        ledger = self._books.of(array)
        assert ledger is not None
        return ledger.key(ledger.place(array, tuple(map(int, chunk.split("/"))))[0])

    def record_key(self, name: str, index: tuple[int, ...]) -> str:
        """The file of a record, or of a mark, by its place in the array of that name."""
        if self.vouched and name in self._books.ledgers:
            ledger = self.ledger(name)
            number = index if len(index) == 1 else [np.ravel_multi_index(index, ledger.counts)]
            return ledger.key(int(number[0]))
        return number_key(name, index)

    def write_split(self, what: str, index: tuple[int, ...], depth: int) -> None:
        """Record that what is computed together is halved so often from now on: in `what`, one of
        the arrays that end in `_split`. BadInput if the disk refuses."""
        with self._place.changing(self._then):
            self._put_numbers(what, [index], depth)

    def split(self, what: str, index: tuple[int, ...]) -> int:
        """How often it is halved."""
        if not self._keeps(what):
            return 0
        at = tuple(slice(i, i + 1) for i in index)
        [key] = self.keys(what, at)
        return int(self.numbers(what, at).item()) if self.has(key) else 0

    def splits(self) -> NDArray[np.uint8]:
        """How often every wave is, [wave]."""
        found = np.zeros(self.shape(WAVES_SPLIT) if self._keeps(WAVES_SPLIT) else 0, np.uint8)
        for region in self.written(WAVES_SPLIT):
            found[region] = self.numbers(WAVES_SPLIT, region)
        return found

    def _keeps(self, name: str) -> bool:
        """Whether there is such an array: older results lack some."""
        return f"{name}/zarr.json" in self._once

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
        self._write_recorded(self.ledger(ESTIMATES), arrays, _of_pairs(source, sample, pairs), DONE)
        with self._place.changing(self._then):
            self._put_numbers(ESTIMATED, [(source, sample, pair) for pair in pairs], 1)

    def estimated(self) -> NDArray[np.bool_]:
        """Whose estimates are written, bool [source, sample, pair]. Only where there are any."""
        return self._marks(ESTIMATED)

    def _marks(self, name: str) -> NDArray[np.bool_]:
        return self.numbers(name).astype(np.bool_)

    def write_choice(self, choices: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> None:
        """Write what becomes of the cells of all estimated components: by component `status` and
        `stratum`, [direction, source, layer, unit, column]. BadInput if the disk refuses."""
        named = {
            f"choice/{component}_{name}": array
            for component, arrays in choices.items()
            for name, array in arrays.items()
        }
        self._write_recorded(self.ledger(CHOSEN), named, (slice(None),) * 5, DONE)

    def chosen(self) -> bool:
        """Whether the choices of all components are written."""
        return bool(self.estimators) and bool(self._done(CHOSEN).all())

    def write_edges(
        self, source: int, sample: int, pairs: range, scores: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write the edges' scores of some pairs, [direction, pair, sender, receiver] by metric,
        then record that they are done. BadInput if the disk refuses."""
        arrays = {f"{EDGES}/{metric}": scores[metric][:, None, None] for metric in self.metrics}
        self._write_recorded(self.ledger(SCORED), arrays, _of_pairs(source, sample, pairs), DONE)

    def scored(self) -> NDArray[np.bool_]:
        """Whose edges are scored, bool [source, sample, pair]. Only where there are any."""
        return self._done(SCORED)

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
        self._write_recorded(self.ledger(BASELINES), arrays, _of_pairs(source, sample, pairs), DONE)

    def baseline(
        self, source: int, sample: int, pairs: range, metrics: Iterable[str]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """What `write_baseline` has written of some metrics; NaN where nothing is."""
        region = _of_pairs(source, sample, pairs)
        values, floor = (
            {m: self.read(f"baseline/{m}{kind}", region)[:, 0, 0] for m in metrics}
            for kind in ("", "_noise_floor")
        )
        return values, floor

    def has_baseline(self, source: int, sample: int, pairs: range) -> bool:
        """Whether the baselines and noise floors of some pairs are there."""
        names = [f"baseline/{m}{kind}" for m in self.metrics for kind in ("", "_noise_floor")]
        region = _of_pairs(source, sample, pairs)
        keys = [key for name in names for key in self.keys(name, region)]
        if not self.vouched:
            return all(map(self.has, keys))
        return all(self.vouches(key, fresh=True) for key in keys)

    def _grid(self, name: str) -> Grid:
        array = self._array(f"{name}/{self.metrics[0]}")
        directions = self.read(f"{name}/direction").tolist()
        positions = self.read(f"{name}/{dimensions(name)[-1]}").tolist()
        first = 0 if name == EDGES else int(self.read(f"{name}/layer")[0])
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
            first_layer=first,
            sources=tuple(self.read(f"{name}/source").tolist()),
            samples=array.shape[2],
        )


def _of_pairs(source: int, sample: int, pairs: range) -> Region:
    """Where what is of some pairs lies, [run or direction, source, sample, pair, ...]."""
    at = (slice(source, source + 1), slice(sample, sample + 1))
    return (slice(None), *at, slice(pairs.start, pairs.stop))
