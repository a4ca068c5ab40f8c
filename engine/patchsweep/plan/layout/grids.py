"""The runs of every component and of the sets, variant by variant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair, Positions
from patchsweep.plan.cone import Map, cone
from patchsweep.plan.dimensions import Dimensions
from patchsweep.plan.layout.columns import (
    CODES,
    NAMES,
    OWN,
    Features,
    Frame,
    Ints,
    Layout,
    Places,
    SiteTable,
    Variant,
    injected_tokens,
)
from patchsweep.plan.layout.edges import EdgeTable, Reached, reached
from patchsweep.plan.layout.paths import Climbs, PathTable, path
from patchsweep.plan.reads import Inner, Reads
from patchsweep.plan.sources import Other, Source
from patchsweep.sites import COMPONENTS, EDGES, SETS, Direction, Enters, Grid, component

# What of a layer's sizes says how many units it has.
SIZE_OF = {"head": ("heads",), "kv_head": ("kv_heads",), "neuron": ("neurons",)}


@dataclass(frozen=True, eq=False)
class Layouts:
    """The runs of a sweep before they are cut into blocks."""

    pairs: Sequence[Pair]
    directions: tuple[Direction, ...]
    sources: tuple[Source, ...]
    positions: Positions
    reads: Reads
    dimensions: Dimensions
    table: SiteTable | None
    features: Features | None
    edges: EdgeTable | None = None
    paths: Mapping[str, PathTable] = field(default_factory=dict)  # by grid

    @property
    def samples(self) -> int:
        return max(s.samples for s in self.sources)

    @cached_property
    def _cache(self) -> dict[tuple[object, ...], object]:
        return {}

    def place(self, name: str) -> str:
        """The component whose activation is overwritten: an autoencoder's is where it reads."""
        return self.features.at if name == "sae_feature" and self.features else name

    def enters(self, name: str) -> Enters:
        """How a patch of a component enters the forward."""
        return COMPONENTS[self.place(name)].enters

    def units(self, name: str) -> int:
        """How many units every layer has. BadInput where layers differ, and for neurons of
        experts."""
        d, unit = self.dimensions, component(name).unit
        if name == "neuron" and d.neurons is None:
            raise BadInput(
                "neuron cannot be patched in this model: its MLPs are experts, a token's neurons "
                "depend on the expert that it is sent to, or do not end in one linear map"
            )
        d.check_even(f"{name} cannot be swept", *SIZE_OF.get(unit, ()))
        features = self.features.features if self.features else 1
        by_unit = {"": 1, "head": d.heads, "kv_head": d.kv_heads, "feature": features}
        return {**by_unit, "neuron": d.neurons or 1}[unit]

    def layers(self, name: str) -> range:
        """The layers that a component has."""
        if name == "embed":
            return range(1)
        if name == "sae_feature" and self.features:
            return range(self.features.layer, self.features.layer + 1)
        return range(self.dimensions.layers)

    def grid(self, name: str) -> Grid:
        """The result arrays of a component or of the sets, as one block per variant."""
        if name == SETS:
            assert self.table is not None
            layers, units, names = range(1), 1, self.table.names
        elif name == EDGES:
            assert self.edges is not None
            layers = range(len(self.edges.positions.names))
            units, names = len(self.edges.receivers), tuple(map(str, self.edges.senders))
        elif name in self.paths:
            table = self.paths[name]
            layers, units, names = range(table.layers), table.units, table.positions.names  # type: ignore[assignment]
        else:
            layers, units = self.layers(name), self.units(name)
            names = self.positions.names  # type: ignore[assignment]
        return Grid(
            component=name,
            directions=self.directions,
            pairs=len(self.pairs),
            layers=len(layers),
            units=units,
            positions=names,
            pair_tile=len(self.pairs),
            unit_tile=units,
            position_tile=len(names),
            first_layer=layers.start,
            sources=tuple(s.name for s in self.sources),
            samples=self.samples,
        )

    def layout(self, name: str, variant: Variant) -> Layout:
        """The runs of a component, or of the sets, in a variant."""
        key = ("layout", name, *self._kind(variant))
        if key not in self._cache:
            self._cache[key] = self._layout(name, variant)
        return self._cache[key]  # type: ignore[return-value]

    def patched(self, components: Iterable[str]) -> list[str]:
        """Of these components and grids the components, with those of the sets' sites, and what
        edges begin and end in."""
        codes = [] if self.table is None else np.unique(self.table.component).tolist()
        both = ["head_z", "head_q", "head_k", "head_v", "mlp_out"]
        ends = both if self.edges or self.paths else []
        own = [name for name in components if name not in (SETS, EDGES, *self.paths)]
        return list(dict.fromkeys([*own, *(NAMES[code] for code in codes), *ends]))

    def reached(self, variant: Variant, pair: int) -> Reached:
        """The edges of one pair; pairs that are alike have the same."""
        assert self.edges is not None
        frame, members = self.frames(variant)[pair], self.edges.positions.members[pair]
        arrays = (frame.to_dst, frame.to_src, frame.differs, frame.reads, frame.inner, members)
        key = ("reached", frame.length, *(x.tobytes() for x in arrays))
        if key not in self._cache:
            self._cache[key] = reached(self.edges, frame, members)
        return self._cache[key]  # type: ignore[return-value]

    def exists_at_all(self, variant: Variant) -> bool:
        """Whether the variant's source has that sample."""
        return variant.sample < self.sources[variant.source].samples

    def other(self, source: int, sample: int, pair: int) -> Other | None:
        """The run that a pair is set against; None where values take no run."""
        s = self.sources[source]
        return s.others[min(sample, s.samples - 1)][pair] if s.kind == "run" else None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self._lengths)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return min(self._lengths)

    @property
    def padded(self) -> set[tuple[int, int]]:
        """Lengths of prompts, each with that of a longer one of the same pair."""
        found = set()
        for i, pair in enumerate(self.pairs):
            runs = {len(pair), *(len(row[i].tokens) for s in self.sources for row in s.others)}
            found |= {(n, max(runs)) for n in runs if n < max(runs)}
        return found

    @cached_property
    def _lengths(self) -> list[int]:
        others = [len(o.tokens) for s in self.sources for row in s.others for o in row]
        return [*map(len, self.pairs), *others]

    def frames(self, variant: Variant) -> list[Frame]:
        """Every pair in a variant."""
        key = ("frames", *self._kind(variant))
        if key not in self._cache:
            self._cache[key] = [self._frame(variant, i) for i in range(len(self.pairs))]
        return self._cache[key]  # type: ignore[return-value]

    def places(self, name: str, variant: Variant, pair: int) -> Places:
        """What the runs of one pair replace."""
        if not self.exists_at_all(variant):
            nothing = np.zeros(0, np.int64)
            return Places(*(nothing,) * 6)
        if name == SETS:
            return self._places_of_sets(variant, pair)
        there = self._there(name, variant, OWN)[pair]
        layer, entry, position = np.nonzero(there[:, None] & self.positions.members[pair])
        return Places(
            cell=layer * len(self.positions.names) + entry,
            component=np.full_like(layer, CODES[name]),
            layer=layer + self.layers(name).start,
            unit=np.zeros_like(layer),
            position=position,
            source=np.full_like(layer, OWN),
        )

    def path(self, name: str, variant: Variant, pair: int) -> tuple[Places, Climbs]:
        """What the runs of a path replace in one pair, and their climbers."""
        table, frame = self.paths[name], self.frames(variant)[pair]
        component, layer, unit = table.receivers
        own = np.full_like(unit, OWN)
        call, _ = self.calls(Places(unit, component, layer, unit, unit, own))
        return path(table, frame, table.positions.members[pair], call)

    def _places_of_sets(self, variant: Variant, pair: int) -> Places:
        t = self.table
        assert t is not None
        there = np.zeros((len(t.set), t.members.shape[2]), bool)
        for code, source in {(int(c), int(s)) for c, s in zip(t.component, t.source, strict=True)}:
            mine = (t.component == code) & (t.source == source)
            maps = self._there(NAMES[code], variant, source, in_set=True)[pair]
            there[mine] = maps[t.layer[mine] - self.layers(NAMES[code]).start]
        site, position = np.nonzero(there & t.members[pair, t.entry])
        columns = (t.set[site], t.component[site], t.layer[site], t.unit[site])
        return Places(*columns, position, t.source[site])

    def moved(self, variant: Variant, pair: int, places: Places) -> Map:
        """[place]: whether a query or key comes from another position, and has to be rotated."""
        frame = self.frames(variant)[pair]
        out = np.isin(places.component, (CODES["head_q"], CODES["head_k"]))
        for source in np.unique(places.source):
            to_src = self.to_src(variant, int(source), pair)
            mine = places.source == source
            same = to_src[places.position] == frame.to_dst[places.position]
            out &= ~(mine & same)
        return out

    def to_src(self, variant: Variant, source: int, pair: int) -> Ints:
        """[clean position]: where a source has its value; the destination's own place for values
        that take no run."""
        frame = self.frames(variant)[pair]
        if source == OWN:
            own = self.other(variant.source, variant.sample, pair)
            return frame.to_dst if own is None else frame.to_src
        other = self.other(source, variant.sample, pair)
        return frame.to_dst if other is None else other.align

    def calls(self, places: Places) -> tuple[Ints, Ints]:
        """[place]: the layer call in which something is replaced (that of the tail is last), and
        the call from which a row must be carried for it."""
        enters = np.array([self.enters(n) for n in NAMES])[places.component]
        after = np.array([self.place(n) == "resid_post" for n in NAMES])[places.component]
        call = places.layer + after
        seen = np.isin(places.layer, [self.inner_layer(r) for r in self.reads.inner])
        # Nothing else in its layer reads an injected token; where a metric does, the row is whole.
        return call, call + ((enters == "token") & ~seen)

    def inner_layer(self, read: Inner) -> int:
        """The layer in which an inner metric reads."""
        if read.metric.name == "sae_feature" and self.features:
            return self.features.layer
        return read.metric.layer

    @property
    def _mixed(self) -> bool:
        """Whether some sites have sources of their own."""
        return self.table is not None and bool((self.table.source != OWN).any())

    def _kind(self, variant: Variant) -> tuple[object, ...]:
        """Variants of one kind have the same runs."""
        if ("kind", variant) not in self._cache:
            self._cache["kind", variant] = self._kind_of(variant)
        return self._cache["kind", variant]  # type: ignore[return-value]

    def _kind_of(self, variant: Variant) -> tuple[object, ...]:
        if not self.exists_at_all(variant):
            return ("absent",)
        if self._mixed:
            return ("exactly", variant)
        others = [self.other(variant.source, variant.sample, i) for i in range(len(self.pairs))]
        if any(o is None for o in others):
            return ("no run",)
        if all(o is not None and o.parallel for o in others):
            said = b"".join(np.packbits(o.differs).tobytes() for o in others if o is not None)
            return ("parallel", said)
        return ("exactly", variant)

    def _frame(self, variant: Variant, pair: int) -> Frame:
        p, clean = self.pairs[pair], np.arange(len(self.pairs[pair]))
        other = self.other(variant.source, variant.sample, pair)
        if other is None:
            length, to_dst, to_src = len(p), clean, clean
            differs = np.ones(length, bool)
        elif self.directions[variant.direction] == "noise":
            there = other.align >= 0
            length, to_dst, to_src = len(p), np.where(there, clean, -1), other.align
            differs = other.differs
        else:
            there = other.align >= 0
            length, to_dst, to_src = len(other.tokens), other.align, np.where(there, clean, -1)
            differs = other.differs if other.parallel else np.ones(length, bool)
        by_clean = (
            clean if other is None or self.directions[variant.direction] == "noise" else to_dst
        )
        read = self.reads.positions[pair]
        reads = _marked(length, by_clean[read[read >= 0]], p, "where a metric is read")
        inner = np.zeros((self.dimensions.layers, length), bool)
        for r in self.reads.inner:
            layer = self.inner_layer(r)
            for position in (r.position[pair], r.key[pair]):
                inner[layer] |= _marked(length, by_clean[[position]], p, r.metric.column)
        return Frame(length, to_dst, to_src, differs, reads, inner)

    def _there(self, name: str, variant: Variant, source: int, in_set: bool = False) -> Map:
        """[pair, layer, clean position]: where patching from a source can change what is read."""
        place = self.place(name)
        # Where sites have different sources, a value that equals the destination's can undo
        # what another site has changed.
        anywhere = in_set and self._mixed
        key = ("there", name, source, anywhere, *self._kind(variant))
        if key not in self._cache:
            layers = self.layers(name)
            there = np.zeros((len(self.pairs), len(layers), max(map(len, self.pairs))), bool)
            for i, frame in enumerate(self.frames(variant)):
                to_src = self.to_src(variant, source, i)
                if name == "head_pattern" and (to_src != frame.to_dst).any():
                    raise BadInput(
                        "head_pattern needs prompts of equal length, position by position: a row "
                        "of attention has no meaning over other keys"
                    )
                differs = frame.differs | anywhere
                maps = cone(differs, self.dimensions.windows, frame.reads, frame.inner)
                by_dst = maps.exists(place)[layers.start : layers.stop]
                valid = np.flatnonzero((frame.to_dst >= 0) & (to_src >= 0))
                there[i, :, valid] = by_dst[:, frame.to_dst[valid]].T
            self._cache[key] = there
        return self._cache[key]  # type: ignore[return-value]

    def _layout(self, name: str, variant: Variant) -> Layout:
        """Pair by pair, so that memory does not grow with places."""
        grid, calls = self.grid(name), self.dimensions.layers
        shape = (len(self.pairs), grid.layers, len(grid.positions))
        by_entry = (len(self.pairs), len(grid.positions))
        by_call = (len(self.pairs), calls, len(grid.positions))
        out = Layout(
            exists=np.zeros(shape, bool),
            start=np.zeros(shape, np.int64),
            joins=np.zeros(shape, np.int64),
            extra=np.zeros(by_call, np.int64),
            extra_reads=np.zeros(shape, np.int64),
            head_reads=np.zeros(shape, np.int64),
            encoded=np.zeros(by_entry, np.int64),
            inside=self._inside(name, variant),
        )
        if not self.exists_at_all(variant):
            return out
        for i in range(len(self.pairs)):
            if name in self.paths:
                places, climbs = self.path(name, variant, i)
                call = np.arange(calls)
                within = (climbs.first[:, None] <= call) & (call <= climbs.last[:, None])
                climber, at = np.nonzero(within)
                np.add.at(out.extra[i], (at, climbs.cell[climber] % shape[2]), 1)
            else:
                places = self.places(name, variant, i)
            self._lay_out(out, i, variant, name, places)
        return out

    def _lay_out(self, out: Layout, pair: int, variant: Variant, name: str, places: Places) -> None:
        """Fill in one pair."""
        position = self.frames(variant)[pair].to_dst[places.position]
        call, joins = self.calls(places)
        by_cell = ("exists", "start", "joins", "extra_reads", "head_reads")
        flat = {name: getattr(out, name)[pair].reshape(-1) for name in by_cell}
        flat["exists"][places.cell] = True
        for lowest, values in (("start", position), ("joins", joins)):
            flat[lowest][places.cell] = values.max(initial=0)
            np.minimum.at(flat[lowest], places.cell, values)
        entry = places.cell % out.inside.shape[1]
        injected = injected_tokens(places, position, call, flat["joins"])
        np.add.at(out.extra[pair], (call[injected], entry[injected]), 1)
        if name not in self.paths:  # a climber stands where its receivers do
            moved = np.flatnonzero(self.moved(variant, pair, places))
            np.add.at(out.extra[pair], (call[moved], entry[moved]), 1)

        windows = np.array([w or position.max(initial=0) + 1 for w in self.dimensions.windows])
        keys = np.minimum(position + 1, windows[np.minimum(places.layer, len(windows) - 1)])
        queried = injected[np.isin(places.component, CODES["head_q"])[injected]]
        np.add.at(flat["extra_reads"], places.cell[queried], keys[queried])
        patterns = np.flatnonzero(places.component == CODES["head_pattern"])
        np.add.at(flat["head_reads"], places.cell[patterns], keys[patterns])
        if name == SETS:
            features = places.component == CODES["sae_feature"]
            np.add.at(out.encoded[pair], entry[features], 1)

    def _inside(self, name: str, variant: Variant) -> Map:
        """[pair, entry]: whether a pair has the entry, in both runs."""
        if not self.exists_at_all(variant):
            return np.zeros((len(self.pairs), len(self.grid(name).positions)), bool)
        if name == SETS:
            return np.ones((len(self.pairs), len(self.grid(name).positions)), bool)
        members = (self.paths.get(name) or self).positions.members
        inside = np.zeros(members.shape[:2], bool)
        for i, frame in enumerate(self.frames(variant)):
            known = (frame.to_dst >= 0) & (frame.to_src >= 0)
            inside[i] = members[i, :, : len(known)][:, known].any(1)
        return inside


def _marked(length: int, positions: Ints, pair: Pair, what: str) -> Map:
    """[position]: True at these; BadInput if one of them is not in the run."""
    if (positions < 0).any():
        raise BadInput(
            f"{what}: a position of the clean prompt has no counterpart in the corrupt one "
            f"(prompts of {len(pair)} and {length} tokens): align it"
        )
    out = np.zeros(length, bool)
    out[positions] = True
    return out
