"""Results on disk: a Zarr v3 group that xarray opens, one chunk per block.

Layout under the results folder:

- `<component>/<metric>`, `<component>/<metric>_status`: `sites.DIMENSIONS`, with 1-D coordinates.
- `<component>/<metric>_estimate`, where the sweep estimates the component: the same dimensions and
  chunks, without a status; its attribute `approximation` says how it was made.
- `edges/<metric>`, where the sweep scores edges: [direction, source, sample, pair, sender,
  receiver], NaN where there is no edge, with the nodes' texts as coordinates; its attribute
  `approximation` says how it was made.
- `completion/estimates`, `completion/edges` uint8 [source, sample, pair], chunks of one: whose
  estimates, whose edges' scores are written.
- `choice/<component>_status`, `choice/<component>_stratum` uint8 [direction, source, layer, unit,
  position]: what becomes of an estimated component's cells (`prefilter.Choice`);
  `completion/choice` uint8 [1]: whether that is written.
- `completion/<component>` uint8 [block], chunks of one: no two processes write the same file.
- `sets/`: runs that patch several sites at once, a grid whose positions are the sets' names; beside
  it the sites in columns [site]: `site_set`, `site_component`, `site_layer`, `site_unit`,
  `site_position`, `site_source`.
- `baseline/<metric>`, `baseline/<metric>_noise_floor`: [run, source, sample, pair], the runs
  being clean and corrupt.
- `prompts/`: `clean_tokens`, `corrupt_tokens` int32 [pair, position] (-1 = outside), their strings
  in `clean_text`, `corrupt_text`; `align` [pair, position], the corrupt position of a clean one;
  `length`, `group` [pair]; attributes `labels`, `answer`, `wrong`,
  `answer_text`, `wrong_text`: one entry per pair.
- Root attributes: `patchsweep_schema`, `components`, `metrics`, `dtype`, `created`, and those that
  the caller gives (spec, estimators, edges, plan_hash, token_budget, model, model_fingerprint,
  versions, host, device, threads, measured).

Beside it, in `.<name>.job/`: `lock`, `progress.json`, `rank-<n>.log` (`job.py`).

A chunk is written to a temporary file and renamed, data before its record: what is marked done
outlives a killed process. With `fsync` files and folders reach the disk in that order too, and it
outlives a power cut. A zip file of such a folder (`pack`) can be read.
"""

from __future__ import annotations

import errno
import glob
import itertools
import json
import math
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import ZipStore

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.sites import DIMENSIONS, SETS, Block, Grid, unit_name

SCHEMA = 2
RUNS = ("clean", "corrupt")
ESTIMATED = "completion/estimates"
CHOSEN = "completion/choice"
EDGES, SCORED = "edges", "completion/edges"
_MARK = "patchsweep_schema"

# Causes that a user can mend: what is wrong, and the mend.
_CAUSES = {
    errno.ENOSPC: ("no space left on the device", "free space"),
    errno.EDQUOT: ("disk quota exceeded", "free space"),
    errno.EROFS: ("read-only file system", "make it writable"),
    errno.EACCES: ("permission denied", "make it writable"),
    errno.EPERM: ("permission denied", "make it writable"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "move that file away"),
    errno.EEXIST: ("part of the path is a file, not a folder", "move that file away"),
    errno.ENOLCK: ("the file system has no locks", "choose another --out"),
    errno.ENOTEMPTY: ("another process has just created it", "choose another --out"),
}


class Store:
    """The arrays of one sweep in a folder. Writing needs `create` or `open(..., "r+")`."""

    def __init__(self, path: Path, group: zarr.Group, fsync: bool = False) -> None:
        self.path = path
        self._group = group
        self._fsync = fsync
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        grids: Sequence[Grid],
        metrics: Sequence[str],
        pairs: Sequence[Pair],
        token_strings: Callable[[int], str],
        attrs: Mapping[str, Any],
        dtype: Literal["float32", "float64"],
        sites: Mapping[str, NDArray[Any]] | None = None,
        nodes: tuple[Sequence[str], Sequence[str]] = ((), ()),
        fsync: bool = False,
    ) -> Store:
        """Lay out an empty results folder, whole or not at all.

        It is built beside `path` and renamed when its attributes, the last thing, are written.
        `token_strings` gives the text of a token id; `sites` are the columns of the sets' sites.
        The attribute `estimators`, by component, says which have estimates; the attribute `edges`
        whether there are any, between `nodes`, the senders and receivers. BadInput if `path` exists
        or the disk refuses.
        """
        if path.exists():
            mend = "choose another --out"
            if _schema(path) is not None:
                mend = "use --resume to continue it or --overwrite to replace it"
            raise BadInput(f"{path} exists already: {mend}")
        target = path.resolve()
        partial = _hidden(target)
        try:
            with _writing(path, "run again"):
                partial.parent.mkdir(parents=True, exist_ok=True)
                root = zarr.create_group(partial, zarr_format=3)
                for grid in grids:
                    _create_component(root, grid, metrics, dtype)
                _create_estimates(root, grids, metrics, dtype, attrs.get("estimators", {}))
                if attrs.get(EDGES):
                    _create_edges(root, grids[0], metrics, dtype, attrs[EDGES], nodes)
                _create_baseline(root, grids, metrics, len(pairs), dtype)
                _create_prompts(root, pairs, token_strings)
                for name, column in (sites or {}).items():
                    _put(root[SETS], f"site_{name}", ("site",), column)  # type: ignore[arg-type]
                root.update_attributes(
                    {
                        "metrics": [{"name": name} for name in metrics],
                        "created": datetime.now(UTC).isoformat(timespec="seconds"),
                        **attrs,
                        "components": [grid.component for grid in grids],
                        "dtype": dtype,
                        _MARK: SCHEMA,
                    }
                )
                if fsync:
                    _settle((p for p in partial.rglob("*") if p.is_file()), partial)
                partial.rename(target)
                if fsync:
                    _settle((), target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return cls.open(path, "r+", fsync)

    @classmethod
    def open(cls, path: Path, mode: Literal["r", "r+"] = "r", fsync: bool = False) -> Store:
        """Open a results folder; BadInput if it is missing, foreign, half-created or newer."""
        if not path.exists():
            raise BadInput(f"no results at {path}: check the path")
        schema = _schema(path)
        if schema is None:
            raise BadInput(f"{path} is not a results folder of patchsweep: check the path")
        if schema != SCHEMA:
            mend = "update it" if schema > SCHEMA else "run the sweep again with --overwrite"
            raise BadInput(f"{path} has schema {schema}, this patchsweep reads {SCHEMA}: {mend}")
        packed = isinstance(_files(path), zipfile.Path)
        if packed and mode == "r+":
            raise BadInput(f"{path} is a zip file, only to be read: unpack it")
        place = ZipStore(path, mode="r") if packed else path
        group = zarr.open_group(place, mode=mode, zarr_format=3, use_consolidated=False)
        return cls(path, group, fsync)

    @property
    def attrs(self) -> dict[str, Any]:
        """The root attributes."""
        return dict(self._group.attrs)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the spec."""
        return tuple(metric["name"] for metric in self.attrs["metrics"])

    @cached_property
    def estimators(self) -> dict[str, str]:
        """The estimator of each component that has estimates."""
        return dict(self.attrs.get("estimators", {}))  # older results have none

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of each component, rebuilt from its arrays."""
        return {name: self._grid(name) for name in self.attrs["components"]}

    def write_block(
        self,
        block: Block,
        values: Mapping[str, NDArray[Any]],
        status: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write one block of every metric, then mark it done.

        The arrays have the 7-D shape of `block.region`. BadInput if the disk refuses.
        """
        region = block.region(self.grids[block.component])
        shape = tuple(part.stop - part.start for part in region)
        arrays: dict[str, NDArray[Any]] = {}
        for metric in self.metrics:
            arrays[f"{block.component}/{metric}"] = values[metric]
            arrays[f"{block.component}/{metric}_status"] = status[metric]
        for name, array in arrays.items():
            assert array.shape == shape, (name, array.shape, shape)
        self._write(arrays, region)
        self._mark(f"completion/{block.component}", (slice(block.index, block.index + 1),))

    def done(self, component: str) -> NDArray[np.bool_]:
        """Which blocks of a component are done, bool [block]."""
        return self.read(f"completion/{component}").astype(np.bool_)

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
        """Write the unpatched metrics and the noise floor of some pairs, [run, pair] each.

        The noise floor is the distance of a null patch (the destination patched with its own
        activation) from that destination's baseline. `pairs` are those of whole blocks.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for metric in self.metrics:
            arrays[f"baseline/{metric}"] = values[metric][:, None, None]
            arrays[f"baseline/{metric}_noise_floor"] = noise_floor[metric][:, None, None]
        self._write(arrays, _baseline_of(source, sample, pairs))

    def has_baseline(self, source: int, sample: int, pairs: range) -> bool:
        """Whether the baselines and noise floors of some pairs are there."""
        names = [f"baseline/{m}{kind}" for m in self.metrics for kind in ("", "_noise_floor")]
        region = _baseline_of(source, sample, pairs)
        return all(self.has(key) for name in names for key in self.keys(name, region))

    def _write(self, arrays: Mapping[str, NDArray[Any]], region: tuple[slice, ...]) -> None:
        """Write one region of some arrays; on the disk when this returns, if so asked."""
        with _writing(self.path, "continue with --resume"):
            for name, found in arrays.items():
                self._array(name)[region] = found
            if self._fsync:
                keys = [key for name in arrays for key in self.keys(name, region)]
                _settle((self.path / key for key in keys), self.path)

    def _mark(self, name: str, region: tuple[slice, ...]) -> None:
        """Record that what was written before is done."""
        shape = [len(range(n)[part]) for n, part in zip(self.shape(name), region, strict=True)]
        self._write({name: np.ones(shape, np.uint8)}, region)

    def set_attrs(self, **attrs: Any) -> None:
        """Add or replace root attributes. One process only."""
        with _writing(self.path, "continue with --resume"):
            self._group.update_attributes(attrs)
            if self._fsync:
                _settle([self.path / "zarr.json"], self.path)

    def remove(self, keys: Iterable[str]) -> None:
        """Delete chunks, in order: what they held is not done any more."""
        with _writing(self.path, "continue with --resume"):
            for key in keys:
                file = self.path / key
                file.unlink(missing_ok=True)
                if self._fsync and file.parent.exists():
                    _settle((), file.parent)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of an array."""
        return self._array(name).shape

    def chunks(self, name: str) -> Iterator[tuple[slice, ...]]:
        """The regions of an array's chunks."""
        array = self._array(name)
        starts = (range(0, n, c) for n, c in zip(array.shape, array.chunks, strict=True))
        for at in itertools.product(*starts):
            yield tuple(slice(i, i + c) for i, c in zip(at, array.chunks, strict=True))

    def keys(self, name: str, region: tuple[slice, ...]) -> list[str]:
        """The files of the chunks that a region of an array lies in, whether or not they exist."""
        array = self._array(name)
        tiles = []
        for part, size, chunk in zip(region, array.shape, array.chunks, strict=True):
            start, stop, _ = part.indices(size)
            tiles.append(range(start // chunk, -(-stop // chunk)))
        assert isinstance(array.metadata, ArrayV3Metadata)
        encode = array.metadata.encode_chunk_key
        return [f"{name}/{encode(at)}" for at in itertools.product(*tiles)]

    def has(self, key: str) -> bool:
        """Whether a file is there."""
        return (self._files / key).exists()

    @cached_property
    def _files(self) -> Path | zipfile.Path:
        return _files(self.path)

    @property
    def storage(self) -> Any:
        """What zarr and xarray open."""
        return self._group.store

    def arrays(self) -> list[str]:
        """The names of all arrays."""
        try:
            members = self._group.members(max_depth=None)
        except (ValueError, KeyError, TypeError) as exc:
            raise self._unreadable("zarr.json", exc) from exc
        return [name for name, member in members if isinstance(member, zarr.Array)]

    def _unreadable(self, name: str, exc: Exception) -> BadInput:
        cause = " ".join(str(exc).split())
        return BadInput(f"{self.path} is damaged, {name}: {cause}: run with --overwrite")

    def read(self, name: str, region: Any = ...) -> NDArray[Any]:
        """The array `<group>/<array>`, or a region of it; BadInput if a chunk of it is damaged."""
        array = self._array(name)
        try:
            return np.asarray(array[region])
        except (RuntimeError, ValueError, OSError) as exc:
            cause = " ".join(str(exc).split())
            raise BadInput(
                f"cannot read {self.path / name}: {cause}; "
                f"'patchsweep check {self.path}' says what must be redone"
            ) from exc

    def group_attrs(self, name: str) -> dict[str, Any]:
        """The attributes of a group, for example `prompts`."""
        return dict(self._group[name].attrs)

    def array_attrs(self, name: str) -> dict[str, Any]:
        """The attributes of the array `<group>/<array>`."""
        return dict(self._array(name).attrs)

    def pairs(self) -> list[Pair]:
        """The prompt pairs of the sweep."""
        said = self.group_attrs("prompts")
        clean, corrupt, align = (
            self.read(f"prompts/{name}").tolist()
            for name in ("clean_tokens", "corrupt_tokens", "align")
        )
        length, group = (self.read(f"prompts/{name}").tolist() for name in ("length", "group"))
        return [
            Pair(
                clean=tuple(clean[i][:n]),
                corrupt=tuple(t for t in corrupt[i] if t >= 0),
                answer=tuple(said["answer"][i]),
                wrong=tuple(said["wrong"][i]),
                labels=said["labels"][i],
                group=group[i],
                align=tuple(align[i][:n]) if said["aligned"][i] else None,
                others={k: tuple(v) for k, v in said["others"][i].items()},
                continuation=tuple(said["continuation"][i]),
            )
            for i, n in enumerate(length)
        ]

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            try:
                array = self._group.get(name)
            except (ValueError, KeyError, TypeError) as exc:
                raise self._unreadable(name, exc) from exc
            if not isinstance(array, zarr.Array):
                raise BadInput(f"{self.path} is damaged, {name} is missing: run with --overwrite")
            # Zarr keeps this setting in memory only; without it a chunk of fill values is deleted.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

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


def remove(path: Path) -> None:
    """Delete a results folder; BadInput if `path` is anything else."""
    if _schema(path) is None:
        Store.open(path)  # says what is wrong
    target = path.resolve()
    doomed = _hidden(target)
    with _writing(path, "run again"):
        target.rename(doomed)  # a kill halfway then leaves no half-deleted results
        shutil.rmtree(doomed)


def job_folder(path: Path) -> Path:
    """Where the lock, the logs and the progress of what writes these results are: beside them, as
    Zarr takes every file within for an array and warns."""
    target = path.resolve()
    return target.with_name(f".{target.name}.job")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes these results inside. BadInput if somebody does; who is killed lets go.

    Results are laid out and deleted inside, so hidden folders that are there before are what killed
    processes have left: they are deleted.
    """
    with _writing(path, "run again"):
        job_folder(path).mkdir(parents=True, exist_ok=True)
        lock = FileLock(job_folder(path) / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(
                f"{path} is being written by another run: wait until that ends, or choose "
                "another --out"
            ) from None
    try:
        target = path.resolve()
        for left in target.parent.glob(_hidden_name(glob.escape(target.name), _ANY)):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        if not path.exists():  # a sweep that was refused leaves nothing
            shutil.rmtree(job_folder(path), ignore_errors=True)
        lock.release()


_ANY = "[0-9a-f]" * 12


def _hidden(path: Path) -> Path:
    """A new hidden name beside `path`."""
    return path.with_name(_hidden_name(path.name, uuid.uuid4().hex[:12]))


def _hidden_name(name: str, number: str) -> str:
    return f".{name}.{number}.partial"


def _schema(path: Path) -> int | None:
    """The schema version of a results folder, None for anything else."""
    try:
        schema = json.loads((_files(path) / "zarr.json").read_text())["attributes"][_MARK]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return schema if isinstance(schema, int) else None


def _files(path: Path) -> Path | zipfile.Path:
    """Where the files of results are."""
    return zipfile.Path(path) if path.is_file() and zipfile.is_zipfile(path) else path


def pack(path: Path, target: Path) -> None:
    """Put a results folder into one zip file, whole or not at all; BadInput if the disk refuses.

    Chunks are compressed already. `target` is replaced.
    """
    Store.open(path)  # says what is wrong
    if isinstance(_files(path), zipfile.Path):
        raise BadInput(f"{path} is a zip file already: copy it")
    partial = target.with_name(f".{target.name}.partial")
    with _writing(target, "run again"):
        try:
            with zipfile.ZipFile(partial, "w") as packed:
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    if file.suffix != ".partial":  # left by a kill
                        packed.write(file, file.relative_to(path))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _baseline_of(source: int, sample: int, pairs: range) -> tuple[slice, ...]:
    """Where baselines lie, [run, source, sample, pair]."""
    at = (slice(source, source + 1), slice(sample, sample + 1))
    return (slice(None), *at, slice(pairs.start, pairs.stop))


def _settle(files: Iterable[Path], root: Path) -> None:
    """Wait until files, and the folders above them up to `root`, are on the disk (fsync)."""
    wait = {root}
    for file in files:
        wait |= {file, *(p for p in file.parents if p.is_relative_to(root))}
    for path in wait:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path, then: str) -> Iterator[None]:
    """Turn a refusal of the file system into BadInput; `then` is what to do after the mend."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _CAUSES:
            raise
        cause, mend = _CAUSES[exc.errno]
        raise BadInput(f"cannot write {path}: {cause}; {mend} and {then}") from exc


def _create_array(
    group: zarr.Group,
    name: str,
    dims: Sequence[str],
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    fill: Any,
) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        compressors=ZstdCodec(level=3, checksum=True),
        dimension_names=list(dims),
        config={"write_empty_chunks": True},
    )


def _put(group: zarr.Group, name: str, dims: Sequence[str], data: Any) -> None:
    """Create and fill a small array in one chunk; strings become Zarr's variable-length strings."""
    data = np.asarray(data)
    text = data.dtype.kind in "UO"
    chunks = tuple(max(1, n) for n in data.shape)
    array = _create_array(
        group, name, dims, data.shape, chunks, str if text else data.dtype, "" if text else 0
    )
    array[...] = data.astype(object) if text else data


def _create_component(root: zarr.Group, grid: Grid, metrics: Sequence[str], dtype: str) -> None:
    group = root.create_group(grid.component, attributes={"unit_name": unit_name(grid.component)})
    for metric in metrics:
        _create_array(group, metric, DIMENSIONS, grid.shape, grid.chunks, dtype, math.nan)
        name = f"{metric}_status"
        _create_array(group, name, DIMENSIONS, grid.shape, grid.chunks, "uint8", 0)
    coordinates = {
        "direction": grid.directions,
        "source": grid.sources,
        "sample": np.arange(grid.samples),
        "pair": np.arange(grid.pairs),
        "layer": np.arange(grid.first_layer, grid.first_layer + grid.layers),
        "unit": np.arange(grid.units),
        "position": grid.positions,
    }
    for name, data in coordinates.items():
        _put(group, name, (name,), data)
    completion = root.require_group("completion")
    blocks = math.prod(grid.tiles)
    _create_array(completion, grid.component, ("block",), (blocks,), (1,), "uint8", 0)


def _create_estimates(
    root: zarr.Group,
    grids: Sequence[Grid],
    metrics: Sequence[str],
    dtype: str,
    estimators: Mapping[str, str],
) -> None:
    if not estimators:
        return
    for grid in (g for g in grids if g.component in estimators):
        how = f"attribution patching ({estimators[grid.component]})"
        for metric in metrics:
            name = f"{grid.component}/{metric}_estimate"
            array = _create_array(root, name, DIMENSIONS, grid.shape, grid.chunks, dtype, math.nan)
            array.update_attributes({"approximation": how})
        for what in ("status", "stratum"):
            name, cells = f"choice/{grid.component}_{what}", grid.shape[4:]
            dims = ("direction", "source", "layer", "unit", "position")
            shape = (len(grid.directions), len(grid.sources), *cells)
            _create_array(root, name, dims, shape, (1, 1, *cells), "uint8", 0)
    _create_marks(root, ESTIMATED, grids[0])
    _create_array(root, CHOSEN, ("choice",), (1,), (1,), "uint8", 0)


def _create_marks(root: zarr.Group, name: str, grid: Grid) -> None:
    shape = (len(grid.sources), grid.samples, grid.pairs)
    _create_array(root, name, ("source", "sample", "pair"), shape, (1, 1, 1), "uint8", 0)


def _create_edges(
    root: zarr.Group,
    grid: Grid,
    metrics: Sequence[str],
    dtype: str,
    how: str | Mapping[str, Mapping[str, int]],
    nodes: tuple[Sequence[str], Sequence[str]],
) -> None:
    group = root.create_group(EDGES)
    coordinates: dict[str, Any] = {
        "direction": grid.directions,
        "source": grid.sources,
        "sample": np.arange(grid.samples),
        "pair": np.arange(grid.pairs),
        "sender": nodes[0],
        "receiver": nodes[1],
    }
    sizes = tuple(map(len, coordinates.values()))
    text = how if isinstance(how, str) else f"eap_ig, {how['eap_ig']['steps']} steps"
    for metric in metrics:
        chunks = (1, 1, 1, 1, *sizes[4:])
        array = _create_array(group, metric, tuple(coordinates), sizes, chunks, dtype, math.nan)
        array.update_attributes({"approximation": f"edge attribution patching ({text})"})
    for name, data in coordinates.items():
        _put(group, name, (name,), data)
    _create_marks(root, SCORED, grid)


def _create_baseline(
    root: zarr.Group, grids: Sequence[Grid], metrics: Sequence[str], pairs: int, dtype: str
) -> None:
    group = root.create_group("baseline")
    # The pairs of any block are then whole chunks.
    chunks = (len(RUNS), 1, 1, math.gcd(*(grid.pair_tile for grid in grids)))
    sources, samples = grids[0].sources, grids[0].samples
    dims = ("run", "source", "sample", "pair")
    for metric in metrics:
        for name in (metric, f"{metric}_noise_floor"):
            shape = (len(RUNS), len(sources), samples, pairs)
            _create_array(group, name, dims, shape, chunks, dtype, math.nan)
    _put(group, "run", ("run",), RUNS)
    _put(group, "source", ("source",), sources)
    _put(group, "sample", ("sample",), np.arange(samples))
    _put(group, "pair", ("pair",), np.arange(pairs))


def _create_prompts(
    root: zarr.Group, pairs: Sequence[Pair], token_strings: Callable[[int], str]
) -> None:
    def texts(sets: Sequence[tuple[int, ...]]) -> list[list[str]]:
        return [[token_strings(token) for token in tokens] for tokens in sets]

    answer, wrong = [pair.answer for pair in pairs], [pair.wrong for pair in pairs]
    group = root.create_group(
        "prompts",
        attributes={
            "labels": [dict(pair.labels) for pair in pairs],
            "answer": [list(tokens) for tokens in answer],
            "wrong": [list(tokens) for tokens in wrong],
            "answer_text": texts(answer),
            "wrong_text": texts(wrong),
            "aligned": [pair.align is not None for pair in pairs],
            "others": [dict(pair.others) for pair in pairs],
            "continuation": [list(pair.continuation) for pair in pairs],
        },
    )
    width = max(len(tokens) for pair in pairs for tokens in (pair.clean, pair.corrupt))
    dims = ("pair", "position")
    for run in RUNS:
        rows = [getattr(pair, run) for pair in pairs]
        tokens = [[*row, *[-1] * (width - len(row))] for row in rows]
        strings = [[*row, *[""] * (width - len(row))] for row in texts(rows)]
        _put(group, f"{run}_tokens", dims, np.array(tokens, dtype=np.int32))
        _put(group, f"{run}_text", dims, np.array(strings, dtype=object))
    _put(group, "length", ("pair",), np.array([len(pair) for pair in pairs], dtype=np.int32))
    align = [[*pair.alignment.tolist(), *[-1] * (width - len(pair))] for pair in pairs]
    _put(group, "align", dims, np.array(align, dtype=np.int32))
    _put(group, "group", ("pair",), np.array([pair.group for pair in pairs], dtype=object))
    _put(group, "pair", ("pair",), np.arange(len(pairs)))
    _put(group, "position", ("position",), np.arange(width))
