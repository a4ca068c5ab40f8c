"""What a results folder says: its parts by name, its baselines, its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.sites import EDGES, Grid
from patchsweep.statistics import Array
from patchsweep.store import RUNS, Store, stored_pairs, texts_of, two_prompts


@dataclass(frozen=True)
class Reader:
    """A results folder; nothing is read before it is asked for."""

    store: Store

    @property
    def path(self) -> Path | str:
        """The results folder, or its URL."""
        return self.store.path

    @property
    def attrs(self) -> dict[str, Any]:
        """The root attributes: spec, model, versions and so on."""
        return self.store.attrs

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the patched components."""
        return tuple(name for name in self.store.grids if name != EDGES)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return self.store.metrics

    @property
    def complete(self) -> bool:
        """Whether every block is done."""
        return all(self.store.done(name).all() for name in self.store.grids)

    @property
    def model(self) -> str:
        """The model's name, and what its weights are where the name does not say it."""
        names = (str(self.attrs.get(key, "")) for key in ("model", "weights"))
        return ": ".join(filter(None, names))

    @property
    def origin(self) -> str:
        """The tasks or files of the prompts; empty where pairs were made by hand."""
        return " + ".join(self.attrs.get("prompts", []))

    @property
    def only_estimated(self) -> tuple[str, ...]:
        """The components that the sweep estimated and did not run."""
        prefiltered = self.attrs.get("spec", {}).get("prefilter") is not None
        return () if prefiltered else tuple(c for c in self.store.estimators if c != EDGES)

    @property
    def chosen_by_index(self) -> tuple[str, ...]:
        """The components whose cells a prefilter chose by index: in results of earlier versions."""
        by_meaning = {*self.attrs.get("chosen_columns", {}), *self.only_estimated, EDGES}
        return tuple(c for c in self.store.estimators if c not in by_meaning)

    @property
    def asked_by_index(self) -> bool:
        """Whether the sweep was asked for some indices from the start, over all pairs."""
        positions = self.attrs.get("spec", {}).get("positions", "each")
        entries = positions if isinstance(positions, list) else []
        return any(isinstance(entry, int) and entry >= 0 for entry in entries)

    def grid(self, component: str) -> Grid:
        """The grid of a component; BadInput if it was not patched."""
        return self.store.grids[one_of("component", component, tuple(self.store.grids))]

    def baseline(self, metric: str) -> Array:
        """The metric of the unpatched runs, [run = clean, corrupt; source; sample; pair]."""
        return self._unpatched(one_of("metric", metric, self.metrics))

    def noise_floor(self, metric: str) -> Array:
        """Distance of a null patch from the baseline, [run, source, sample, pair]."""
        return self._unpatched(f"{one_of('metric', metric, self.metrics)}_noise_floor")

    @cached_property
    def _whole(self) -> dict[str, Array]:
        """What `_unpatched` has read, and will not change any more."""
        return {}

    def _unpatched(self, name: str) -> Array:
        if name in self._whole:
            return self._whole[name].copy()
        found = self.store.read(f"baseline/{name}").astype(np.float64)
        if np.isfinite(found).all():
            self._whole[name] = found.copy()
        return found

    @cached_property
    def _text(self) -> dict[str, NDArray[Any]]:
        return {run: self.store.read(f"prompts/{run}_text") for run in RUNS}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every clean prompt, [pair]."""
        lengths: list[int] = self.store.read("prompts/length").tolist()
        return lengths

    @cached_property
    def _reads(self) -> list[int]:
        """Where the answer of every pair is read."""
        after = [max(1, len(c)) for c in self.store.node_attrs("prompts")["continuation"]]
        return [length - n for length, n in zip(self.lengths, after, strict=True)]

    @cached_property
    def labels(self) -> list[dict[str, int]]:
        """Where the labels of every pair are, [pair]."""
        labels: list[dict[str, int]] = self.store.node_attrs("prompts")["labels"]
        return labels

    @cached_property
    def _known_labels(self) -> set[str]:
        return {name for labels in self.labels for name in labels}

    @cached_property
    def _has_corrupt_prompt(self) -> bool:
        return two_prompts(self.attrs)

    @cached_property
    def _align(self) -> NDArray[Any]:
        return self.store.read("prompts/align")

    def texts(self, component: str) -> dict[str, NDArray[Any]]:
        """`token` and `label` [pair, position] and `n_pairs` [position] of a component."""
        positions, pairs = self.grid(component).positions, stored_pairs(self.store)
        return texts_of(pairs, positions, self.attrs, self._text["clean"], self._text["corrupt"])

    def tokens(self, run: str, grid: Grid, pair: int) -> list[str | None]:
        """Token texts of a `pair`'s prompt, of the `run` clean or corrupt, at the positions of the
        grid; None outside, "" for `all`, for groups of positions and for sets."""
        return [self._token(run, position, pair) for position in grid.positions]

    def _token(self, run: str, position: int | str, pair: int) -> str | None:
        if isinstance(position, str) and position not in self._known_labels:
            return ""
        at = self.labels[pair].get(position) if isinstance(position, str) else position
        if at is None:
            return None
        at = at + self._reads[pair] + 1 if at < 0 else at
        if not 0 <= at < self.lengths[pair]:
            return None
        if not self._has_corrupt_prompt:
            run = "clean"
        if run == "corrupt":
            at = int(self._align[pair, at])
        return str(self._text[run][pair, at]) if at >= 0 else ""

    def normalised(self, source: int) -> bool:
        """Whether effects of a source are shares of the way to a source run: it has one."""
        said: list[dict[str, Any]] = self.attrs["sources"]
        return bool(said[source]["normalised"])

    def samples(self, source: int) -> int:
        """How many samples a source has; the arrays have as many as the source with the most."""
        said: list[dict[str, Any]] = self.attrs["sources"]
        return int(said[source]["samples"])

    def ends(self, metric: str, grid: Grid) -> tuple[Array, Array]:
        """The metric of the destination and of the source run, [direction, source, sample, pair].

        Where a source has no run of its own the second is the destination plus 1: effects are then
        differences, in the metric's unit.
        """
        clean, corrupt = self.baseline(metric)
        denoise = [direction == "denoise" for direction in grid.directions]
        destination = np.stack([corrupt if d else clean for d in denoise])
        source = np.stack([clean if d else corrupt for d in denoise])
        for number in range(len(grid.sources)):
            if not self.normalised(number):
                source[:, number] = destination[:, number] + 1
        return destination, source


def one_of(what: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise BadInput(f"no {what} '{name}' in these results: use one of {', '.join(known)}")
    return name


def one_of_each(what: str, names: Sequence[str] | None, known: tuple[str, ...]) -> None:
    """BadInput for the first of some names that is not known."""
    for name in names or ():
        one_of(what, name, known)
