"""What is overwritten and read while a layer runs: a schedule's edits and metrics as taps.

A tap sees one activation of all tokens of a call, [token, unit, width], and may overwrite it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.device import to_device
from patchsweep.passes.attention import Attend, PatternEdit, PatternRead
from patchsweep.passes.stream import Tap
from patchsweep.passes.values import Values
from patchsweep.plan import Inner, Kind
from patchsweep.plan.layout import OWN, Layouts
from patchsweep.plan.schedule import Edit, Step
from patchsweep.sae import SAE

# Places of the stream at the border between two layers, in the order of the forward.
BORDER = ("resid_post", "resid_pre")


@dataclass(frozen=True)
class Seen:
    """What happens in one layer call: taps by place, rows of attention replaced and read, and what
    computes attention."""

    taps: Mapping[str, Tap]
    patterns: Sequence[PatternEdit] = ()
    pattern_reads: Sequence[PatternRead] = ()
    attend: Attend | None = None


@dataclass(frozen=True)
class Editor:
    """Turns the edits of a wave, and the inner metrics, into taps. `source` is the wave's own;
    `inner` receives what metrics read [row]."""

    layouts: Layouts
    values: Values
    source: int
    positions: NDArray[np.int64]  # [row, inner metric], −1 where there is none
    keys: NDArray[np.int64]
    inner: dict[str, Tensor]
    device: torch.device

    def on(self, device: torch.device) -> Editor:
        """For tensors on another device."""
        return self if device == self.device else replace(self, device=device)

    def seen(self, layer: int, step: Step) -> Seen:
        """What happens in layer call `layer`; the last is what the tail reads."""
        taps: dict[str, list[Tap]] = {}
        for edit in step.edits:
            if edit.component not in ("head_pattern", "sae_feature"):
                place = self.layouts.place(edit.component)
                taps.setdefault(place, []).append(
                    self._write(edit, layer - (place == "resid_post"))
                )
        features = [e for e in step.edits if e.component == "sae_feature"]
        if features:
            taps.setdefault(self.layouts.place("sae_feature"), []).append(
                self._write_features(features, step.base)
            )
        pattern_edits = [e for e in step.edits if e.component == "head_pattern"]
        reads = []
        for column, inner in enumerate(self.layouts.reads.inner):
            at = self.layouts.inner_layer(inner)
            place = self._place_of(inner)
            if layer != at + (place == "resid_post"):
                continue
            if inner.metric.name == "attention":
                reads.append(self._pattern_read(column, inner, step, pattern_edits))
            else:
                taps.setdefault(place, []).append(self._read(column, inner, step))
        patterns = [self._pattern(e, step) for e in pattern_edits]
        return Seen({place: in_turn(some) for place, some in taps.items()}, patterns, reads)

    def embedding(self, edits: Iterable[Edit]) -> list[Tap]:
        """What replaces embeddings by constants."""
        return [self._write(edit, 0) for edit in edits]

    def _write(self, edit: Edit, layer: int) -> Tap:
        """The tap that makes a replacement."""
        kind, given = self._value(edit, layer)
        target, donor, unit = map(self._to, (edit.target, edit.donor, edit.unit))

        def overwrite(x: Tensor) -> None:
            if kind == "run":
                x[target, unit] = x[donor, unit]
            elif kind == "vector":
                assert given is not None
                x[target, unit] += given.to(x)
            else:
                x[target, unit] = 0 if given is None else given.to(x).expand(-1, x.shape[-1])

        return overwrite

    def _write_features(self, edits: Sequence[Edit], base: int) -> Tap:
        """The tap that replaces features, in a call whose first `base` tokens are unpatched."""
        assert self.values.sae is not None
        features = [
            _Features(
                *self._value(e, 0),
                *map(self._to, (e.target, e.donor, np.where(e.own < base, e.own, 0), e.unit)),
                *map(self._to, (changed := np.flatnonzero(e.own >= base), e.own[changed])),
            )
            for e in edits
        ]
        return _overwrite(self.values.sae, base, features)

    def _value(self, edit: Edit, layer: int) -> tuple[Kind, Tensor | None]:
        """What kind of value is put in place, and the values [edit, width] that take no run."""
        source = self.source if edit.source == OWN else edit.source
        kind = self.values.sources[source].kind
        if kind == "run":
            return kind, None
        unit, position = self._to(edit.unit), self._to(edit.position)
        return kind, self.values.constant(source, edit.component, layer, unit, position)

    def _pattern(self, edit: Edit, step: Step) -> PatternEdit:
        count = edit.position + 1
        slots = np.arange(count.max())
        source = self.source if edit.source == OWN else edit.source
        zero = self.values.sources[source].kind == "zero"
        return PatternEdit(
            target=self._to(edit.target),
            head=self._to(edit.unit),
            donor=self._to(edit.donor),
            keys=self._to(edit.donor[:, None] + np.minimum(slots - edit.position[:, None], 0)),
            values=self._to(_tokens(step, edit.row, slots, count)),
            count=self._to(count),
            given=torch.zeros(len(count), len(slots), device=self.device) if zero else None,
        )

    def _pattern_read(
        self, column: int, inner: Inner, step: Step, edits: Sequence[Edit]
    ) -> PatternRead:
        row = step.reading
        position, key = self.positions[row, column], self.keys[row, column]
        count = np.maximum(position, 0) + 1
        slots = np.arange(count.max())
        edited = (
            np.concatenate([np.stack([e.row, e.position, e.unit]) for e in edits], 1)
            if edits
            else np.zeros((3, 0), np.int64)
        )
        edited[0] = np.searchsorted(row, edited[0])  # among those read
        same = (edited[1] == position[edited[0]]) & (edited[2] == inner.metric.head)
        return PatternRead(
            tokens=self._to(step.row_tokens.token(row, np.maximum(position, 0))),
            keys=self._to(_tokens(step, row, slots, count)),
            count=self._to(count),
            head=inner.metric.head,
            key=self._to(np.maximum(key, 0)),
            edited=self._to(np.stack([edited[0][same], np.flatnonzero(same)])),
            out=lambda value: self._keep(column, inner, value, row),
        )

    def _read(self, column: int, inner: Inner, step: Step) -> Tap:
        """The tap that reads an activation of every row."""
        m, row = inner.metric, step.reading
        token = self._to(step.row_tokens.token(row, np.maximum(self.positions[row, column], 0)))

        def read(x: Tensor) -> None:
            if m.name == "neuron":
                value = x[token, m.neuron, 0]
            elif m.name == "sae_feature":
                sae = self.values.sae
                assert sae is not None
                sized = sae.to(x.device, x.dtype)
                value = sized.encode(x[token].flatten(1))[:, m.feature]
            else:
                direction = self.values.directions[m.column].to(x)
                activation = x[token, m.unit] if m.component == "head_z" else x[token].flatten(1)
                value = activation @ direction
            self._keep(column, inner, value, row)

        return read

    def _keep(self, column: int, inner: Inner, value: Tensor, row: NDArray[np.int64]) -> None:
        missing = self._to(self.positions[row, column] < 0)
        exact = torch.float64 if value.dtype == torch.float64 else torch.float32
        if inner.metric.column not in self.inner:
            self.inner[inner.metric.column] = value.new_empty(len(self.positions), dtype=exact)
        kept = self.inner[inner.metric.column]
        kept[self._to(row)] = value.to(exact).masked_fill(missing, float("nan"))

    def _place_of(self, inner: Inner) -> str:
        if inner.metric.name == "probe":
            return inner.metric.component
        return self.layouts.place(inner.metric.name)

    def _to(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self.device)


def _tokens(
    step: Step, row: NDArray[np.int64], slots: NDArray[np.int64], count: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[row, slot]: the tokens of rows at the first positions; beyond `count` the first again."""
    position = np.where(slots < count[:, None], slots, 0)
    return step.row_tokens.token(row[:, None], position)


def in_turn(taps: Sequence[Tap]) -> Tap:
    """Several taps at one place, one after another."""

    def tap(x: Tensor) -> None:
        for each in taps:
            each(x)

    return tap


@dataclass(frozen=True)
class _Features:
    """What an edit does to features, in columns [edit]: those of the tokens `target` become those
    of the tokens `donor`, or `given` (`kind` as of sources). `own`: a token with the activation
    that the target has before; the edits `changed`, whose row has been changed before, find it
    nowhere else than in the tokens `here`."""

    kind: Kind
    given: Tensor | None
    target: Tensor
    donor: Tensor
    own: Tensor
    unit: Tensor
    changed: Tensor
    here: Tensor

    def change(self, flat: Tensor, known: Tensor, sae: SAE) -> Tensor:
        """By how much each feature changes; `known` are those of the first tokens."""
        given = 0 if self.given is None else self.given.to(flat).expand(len(self.unit), -1)[:, 0]
        if self.kind == "vector":
            assert isinstance(given, Tensor)
            return given
        before = known[self.own, self.unit]
        if len(self.changed):
            before[self.changed] = sae.one_each(flat[self.here], self.unit[self.changed])
        return (known[self.donor, self.unit] if self.kind == "run" else given) - before


def _overwrite(sae: SAE, base: int, edits: Sequence[_Features]) -> Tap:
    """x + Σ (f′ − f)·decoder[feature]: the rest of x, the autoencoder's error among it, is kept."""

    def overwrite(x: Tensor) -> None:
        flat, sized = x.view(x.shape[0], -1), sae.to(x.device, x.dtype)
        known = sized.encode(flat[:base])
        changes = [edit.change(flat, known, sized) for edit in edits]  # all before any of them
        for edit, change in zip(edits, changes, strict=True):
            flat.index_add_(0, edit.target, change[:, None] * sized.decoder[edit.unit])

    return overwrite
