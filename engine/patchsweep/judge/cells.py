"""A cell of results again: which prompt runs, what is replaced in it, and what its metrics are.

Told from the results' own coordinates and the pairs, in single positions of single runs: neither
rows nor schedules, as the backends have them, come into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchsweep.judge.forwards import Edit, Key, Prompt, Unseen
from patchsweep.judge.judge import Judge
from patchsweep.judge.paths import asked, place_of, put, reads
from patchsweep.judge.values import logit_metric
from patchsweep.pairs import Pair
from patchsweep.passes import Values
from patchsweep.plan.layout import NAMES, OWN, Layouts
from patchsweep.sites import EDGES, SETS, Node
from patchsweep.spec import INNER, Metric

# A user's own metric of logits [1, vocab] of one pair.
Called = Callable[[Metric, Tensor, Pair], float]


@dataclass(frozen=True)
class Cell:
    """One value of results, by its coordinates there; `entry` counts positions, or sets."""

    component: str
    direction: str
    source: int
    sample: int
    pair: int
    layer: int
    unit: int
    entry: int


@dataclass(frozen=True)
class _Run:
    """An unpatched run: of a pair the clean one (source OWN), or that of a source."""

    pair: int
    source: int
    sample: int


@dataclass(eq=False)
class Cells:
    """Runs cells of a sweep again; `called` is what a user's own metric says."""

    judge: Judge
    layouts: Layouts
    values: Values
    metrics: Sequence[Metric]
    called: Called
    _plain: dict[_Run, Tensor] = field(default_factory=dict)
    _seen: dict[tuple[_Run, Key], Tensor] = field(default_factory=dict)

    def again(self, cell: Cell) -> dict[str, float]:
        """The metrics of a cell, by column."""
        if cell.sample >= self.layouts.sources[cell.source].samples:
            return {m.column: float("nan") for m in self.metrics}
        own = _Run(cell.pair, cell.source, cell.sample)
        clean = _Run(cell.pair, OWN, 0)
        destination, source = (clean, own) if cell.direction == "noise" else (own, clean)
        inner = [_place(m, self.judge) for m in self.metrics if m.name in INNER]
        prompt = self._prompt(destination)
        if cell.component == EDGES or cell.component in self.layouts.paths:
            logits, seen = self._path(cell, destination, source, inner)
        else:
            edits = self._edits(cell, destination, source)
            logits, seen = self.judge.run([prompt], [edits], record=inner)
        read = {m.column: self._read(m, cell.pair) for m in self.metrics}
        at = {c: [self._position(destination, int(p)) for p in ps] for c, ps in read.items()}
        return {
            m.column: self._value(m, cell, logits[0], seen, at[m.column], read[m.column])
            for m in self.metrics
        }

    def _edits(self, cell: Cell, destination: _Run, source: _Run) -> list[Edit]:
        """What is replaced: of a set site after site, of a component at the entry's positions."""
        layouts = self.layouts
        if cell.component != SETS:
            at = np.flatnonzero(layouts.positions.members[cell.pair, cell.entry])
            layer = cell.layer + layouts.layers(cell.component).start
            there = (cell.component, layer, cell.unit)
            return self._replaced(*there, at.tolist(), destination, source)
        table, edits = layouts.table, []
        assert table is not None
        for i in np.flatnonzero(table.set == cell.entry):
            at = np.flatnonzero(table.members[cell.pair, table.entry[i]])
            number = int(table.source[i])
            given = source if number == OWN else _Run(cell.pair, number, cell.sample)
            there = (NAMES[table.component[i]], int(table.layer[i]), int(table.unit[i]))
            edits += self._replaced(*there, at.tolist(), destination, given)
        return edits

    def _path(
        self, cell: Cell, destination: _Run, source: _Run, inner: Sequence[Key]
    ) -> tuple[Tensor, dict[Key, Tensor]]:
        """Logits and activations of a run with an edge or a path patched."""
        place, prompt = (cell.layer, cell.unit, cell.entry), self._prompt(destination)
        path = asked(self.layouts, cell.component, cell.pair, place)
        both = [(self._position(destination, p), self._position(source, p)) for p in path.positions]
        at = {to: start for to, start in both if to >= 0 and start >= 0}
        edits: list[Edit] = []
        for receiver in path.receivers:
            parallel = self.layouts.dimensions.parallel
            senders = [s for s in path.senders if reads(s, receiver, parallel)]
            if not senders or not at:
                continue
            first = self._frozen(destination, receiver, path.through_mlps)
            for sender in senders:
                value = self._activation(source, place_of(sender))
                here = torch.zeros(len(prompt.tokens), *value.shape[1:], dtype=value.dtype)
                here[list(at)] = value[list(at.values())].cpu()
                first.append(put(place_of(sender), here, list(at), sender.unit or 0))
            if receiver.component == "logits":
                _, seen = self.judge.run([prompt], record=inner)
                return self.judge.run([prompt], [first])[0], seen
            key = place_of(receiver)
            found = self.judge.run([prompt], [first], record=[key], reads=[-1])[1][key][0]
            edits.append(put(key, found, list(at), receiver.unit or 0))
        return self.judge.run([prompt], [edits], record=inner)

    def _frozen(self, run: _Run, receiver: Node, through_mlps: bool) -> list[Edit]:
        """What keeps a run's heads, and its MLPs if nothing leads through them, as they are; but
        for the MLP that is the receiver."""
        places = [("head_z", layer) for layer in self.layouts.layers("head_z")]
        if not through_mlps:
            places += [("mlp_out", layer) for layer in self.layouts.layers("mlp_out")]
        own = [place for place in places if place != place_of(receiver)]
        every = range(len(self._prompt(run).tokens))
        return [put(place, self._activation(run, place), every) for place in own]

    def _replaced(
        self,
        component: str,
        layer: int,
        unit: int,
        clean: Sequence[int],
        destination: _Run,
        source: _Run,
    ) -> list[Edit]:
        """One activation at some clean positions, where both runs have them."""
        edits = []
        kind = "run" if source.source == OWN else self.values.sources[source.source].kind
        for position in clean:
            to = self._position(destination, position)
            if to < 0:
                continue
            if kind == "run":
                start = self._position(source, position)
                if start < 0:
                    continue
                value = self._from_run(component, layer, unit, destination, to, source, start)
            else:
                value = self._constant(component, layer, unit, to, source.source)
            where = torch.tensor([unit]), torch.tensor([to])
            how = "add" if kind == "vector" else "put"
            edits.append(Edit(component, layer, *where, value, how))  # type: ignore[arg-type]
        return edits

    def _constant(
        self, component: str, layer: int, unit: int, position: int, source: int
    ) -> Tensor:
        """[1, width]; zero where there is no table of values."""
        table = self.values.constants.get((source, component))
        if table is None:
            return torch.zeros(1, 1, dtype=torch.float64)
        index = (layer - self.layouts.layers(component).start, position, unit)
        picked = [i if n > 1 else 0 for i, n in zip(index, table.shape, strict=False)]
        return table[tuple(picked)][None]

    def _from_run(
        self,
        component: str,
        layer: int,
        unit: int,
        destination: _Run,
        to: int,
        source: _Run,
        start: int,
    ) -> Tensor:
        """What a source run has at its position `start`, [1, width]. A query or key that comes from
        another position is that of the source's residual stream at the destination's."""
        if component in ("head_q", "head_k") and start != to:
            key = ("resid_pre", layer)
            hidden = self._activation(source, key)[start, 0]
            where = torch.tensor([0]), torch.tensor([to])
            edit = Edit(*key, *where, hidden[None])
            prompt = self._prompt(destination)
            _, seen = self.judge.run([prompt], [[edit]], [(component, layer)], reads=[-1])
            return seen[component, layer][0, to, unit][None]
        return self._activation(source, (component, layer))[start, unit][None]

    # Unpatched runs.

    def _prompt(self, run: _Run) -> Prompt:
        if run.source == OWN:
            return Prompt(self.layouts.pairs[run.pair].clean)
        other = self.layouts.other(run.source, run.sample, run.pair)
        if other is None:  # of values that take no run
            return Prompt(self.layouts.pairs[run.pair].clean)
        if not other.noised:
            return Prompt(other.tokens)
        width = self.judge.hf_model.get_input_embeddings().weight.shape[1]
        slots = list(range(len(other.noised)))
        many = [[run.pair] * len(slots), slots, [run.source] * len(slots)]
        noise = torch.zeros(len(other.tokens), width, dtype=torch.float64)
        found = self.values.noise(many[0], many[1], many[2], run.sample, width)
        noise[list(other.noised)] = torch.from_numpy(found)
        return Prompt(other.tokens, noise)

    def _position(self, run: _Run, clean: int) -> int:
        """Where a run has what stands at a position of the clean prompt, −1 for nowhere."""
        if clean < 0 or run.source == OWN:
            return clean
        other = self.layouts.other(run.source, run.sample, run.pair)
        return clean if other is None else int(other.align[clean])

    def _logits(self, run: _Run) -> Tensor:
        if run not in self._plain:
            self._plain[run] = self.judge.run([self._prompt(run)])[0][0].cpu()
        return self._plain[run]

    def _activation(self, run: _Run, key: Key) -> Tensor:
        """[position, unit, width]"""
        if (run, key) not in self._seen:
            seen = self.judge.run([self._prompt(run)], record=[key], reads=[-1])[1]
            self._seen[run, key] = seen[key][0]
        return self._seen[run, key]

    # Metrics.

    def _read(self, m: Metric, pair: int) -> Sequence[int]:
        """Clean positions that a metric reads: one of logits or several of a continuation, −1
        padded; of an activation its own, of attention the query's and the key's."""
        reads = self.layouts.reads
        if m.name in INNER:
            [inner] = [r for r in reads.inner if r.metric == m]
            return [int(inner.position[pair]), int(inner.key[pair])]
        slots = reads.of[m.column][pair]
        return [int(reads.positions[pair, s]) if s >= 0 else -1 for s in slots]

    def _value(
        self,
        m: Metric,
        cell: Cell,
        logits: Tensor,
        seen: dict[Key, Tensor],
        at: Sequence[int],
        clean_at: Sequence[int],
    ) -> float:
        """A metric of a patched run: logits [position, vocab], read at its positions `at`."""
        pair = self.layouts.pairs[cell.pair]
        if m.name in INNER:
            return self._inner(m, seen, at)
        if m.name == "sequence_logprob":
            parts = zip(at, pair.continuation, strict=False)
            logp = {p: logits[p].double().log_softmax(-1) for p in at if p >= 0}
            return float(sum(logp[p][token] for p, token in parts))
        [position], [clean_position] = at, clean_at
        if m.name == "callable":
            return self.called(m, logits[position][None], pair)
        corrupt = None
        if m.name == "relative_prob":
            own = _Run(cell.pair, cell.source, cell.sample)
            corrupt = self._logits(own)[self._position(own, clean_position)]
        clean = self._logits(_Run(cell.pair, OWN, 0))[clean_position]
        return logit_metric(m, logits[position], pair.answer, pair.wrong, clean, corrupt)

    def _inner(self, m: Metric, seen: dict[Key, Tensor], at: Sequence[int]) -> float:
        position, key = at
        x = seen[_place(m, self.judge)][0, position]  # [unit, width]
        if m.name == "attention":
            return float(x[m.head, key])
        if m.name == "neuron":
            return float(x[m.neuron, 0])
        if m.name == "sae_feature":
            return float(x[m.feature, 0])
        direction = self.values.directions[m.column].to(x)
        of = x[m.unit] if m.component == "head_z" else x.flatten()
        return float(of @ direction)


def _place(m: Metric, judge: Judge) -> Key:
    """The activation that a metric reads."""
    if m.name == "sae_feature":
        assert judge.sae is not None
        return "sae_feature", judge.sae.layer
    return {"attention": "head_pattern", "probe": m.component}.get(m.name, m.name), m.layer


def unseen(judge: Judge, layouts: Layouts, components: Sequence[str]) -> tuple[str, ...]:
    """The components that the judge cannot see in every layer."""
    out = []
    for name in components:
        prompt = Prompt(layouts.pairs[0].clean)
        try:
            judge.run([prompt], record=[(name, layer) for layer in layouts.layers(name)], reads=[0])
        except Unseen:
            out.append(name)
    return tuple(out)


@torch.no_grad()
def averages(
    judge: Judge,
    layouts: Layouts,
    components: Sequence[str],
    prompts: Sequence[tuple[int, ...]],
    by: str,
) -> dict[str, Tensor]:
    """Mean activations of each component over prompts, [layer, position or 1, unit, width], in
    float64: by position (NaN where no prompt reaches), or over all of them."""
    found = {}
    longest = max(map(len, prompts))
    for name in components:
        layers = layouts.layers(name)
        total: list[Tensor | None] = [None] * len(layers)
        count = torch.zeros(longest if by == "position" else 1, dtype=torch.float64)
        for tokens in prompts:
            keys = [(name, layer) for layer in layers]
            seen = judge.run([Prompt(tokens)], record=keys, reads=[-1])[1]
            if by == "position":
                count[: len(tokens)] += 1
            else:
                count += len(tokens)
            for i, key in enumerate(keys):
                x = seen[key][0].double().cpu()
                kept = total[i]
                if kept is None:
                    total[i] = kept = x.new_zeros(len(count), *x.shape[1:])
                if by == "position":
                    kept[: len(tokens)] += x
                else:
                    kept[0] += x.sum(0)
        stacked = torch.stack([x for x in total if x is not None])
        found[name] = stacked / count[:, None, None]
    return found
