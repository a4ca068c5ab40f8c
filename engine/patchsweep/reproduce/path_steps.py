"""The steps of path patching indirect object identification: every head to some receivers, which
the step before has found (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.reproduce import roles
from patchsweep.reproduce.experiment import Setting
from patchsweep.reproduce.heads import Heads
from patchsweep.reproduce.published import ordered
from patchsweep.reproduce.roles import DUPLICATE, INDUCTION, INHIBITION, MOVERS, NEGATIVE
from patchsweep.results import Results
from patchsweep.statistics import Array

THROUGH = {"mlps": "through MLPs", "nothing": "through nothing"}
LAST = "last"  # the heads that the last step finds
CALLED = {MOVERS: "name movers", INHIBITION: "S-inhibition heads"}
Classes = Mapping[str, Sequence[str]]  # class -> its heads


@dataclass(frozen=True)
class Kind:
    """What a step asks: which receivers, of which class of heads (none: the logits), at which
    label; and the classes that Wang et al. find by it, with a positive and a negative effect."""

    name: str
    component: str
    of: str
    label: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


Looks = Mapping[str, Mapping[tuple[str, str], float]]  # head -> LOOKS of roles.py
# Class -> whether a head attends as Wang et al. say of it.
ATTENDS: dict[str, Callable[[Mapping[tuple[str, str], float]], bool]] = {
    MOVERS: lambda look: roles.most(look) == "IO",
    NEGATIVE: lambda look: roles.most(look) == "IO",
    INHIBITION: roles.inhibits,
    LAST: lambda look: roles.repeats(look) is not None,
}
LOGITS = Kind("logits", "logits", "", "END", (MOVERS,), (NEGATIVE,))
QUERIES = Kind("queries", "head_q", MOVERS, "END", (INHIBITION,))
VALUES = Kind("values", "head_v", INHIBITION, "S2", (DUPLICATE, INDUCTION))
# Every step, and what those of the heads that it detects are that attend so.
STEPS = {LOGITS: MOVERS, QUERIES: INHIBITION, VALUES: LAST}


@dataclass(frozen=True)
class Step:
    """A step as it was run: every head to `receivers` that go together. published: whether these
    are those of Wang et al., not found here; below: the layer of the last of them."""

    kind: Kind
    receivers: tuple[str, ...]
    published: bool
    below: int
    results: Results

    @property
    def title(self) -> str:
        """From what to what."""
        whose = "published " if self.published else ""
        of = f" of the {whose}{CALLED[self.kind.of]}" if self.kind.of else ""
        return f"heads to the {self.kind.name}{of} at {self.kind.label}"

    def heads(self, through: str) -> Heads:
        """The effects of all heads, NaN where they do not lie below a receiver."""
        path = _component(through, self.published)
        effect = self.results.effect(path, "logit_diff", "noise").values[..., 0].copy()
        effect[self.below :] = np.nan
        return Heads(THROUGH[through], "logit_diff", effect)

    def detected(self, sign: int) -> tuple[str, ...]:
        """The heads with an effect of this sign that is far from the mean, on either path."""
        by = [self.heads(through) for through in THROUGH]
        return ordered([*{h for one in by for h in (one.positive if sign > 0 else one.negative)}])

    def relative(self, through: str) -> Array:
        """What Wang et al. measure: the relative change of the clean run's logit difference, of its
        mean over pairs, [layer, head]."""
        path = _component(through, self.published)
        moved = self.results.changes(path, "logit_diff", "noise")[0].mean(0)[..., 0]
        return np.asarray(moved / self.results.baseline("logit_diff")[0].mean())


def steps_of(
    setting: Setting, pairs: Sequence[Pair], kind: Kind, found: Classes, known: Classes
) -> list[Step]:
    """A step from the heads that were found, and from the published ones; none where neither has a
    head above the first layer. Both are paths of one sweep."""
    d = setting.model.dimensions
    receivers: dict[bool, list[str]] = {}  # by whether they are published
    if kind.of:
        grouped = d.heads // d.kv_heads if kind.component == "head_v" else 1
        for theirs, heads in ((False, found[kind.of]), (True, known.get(kind.of, ()))):
            places = [(int(layer), int(n) // grouped) for layer, n in (h.split(".") for h in heads)]
            sites = [f"{kind.component}.{layer}.{n}" for layer, n in places if layer]
            if sites:
                receivers[theirs] = [*dict.fromkeys(sites)]
    else:
        receivers[False] = [kind.component]
    if not receivers:
        return []
    paths = {
        _component(through, theirs).removeprefix("head_z."): {
            "senders": "head_z",
            "receivers": sites,
            "through": through,
            "positions": [kind.label],
        }
        for theirs, sites in receivers.items()
        for through in THROUGH
    }
    results = setting.sweep(kind.name, pairs, paths=paths, direction="noise")
    below = {
        theirs: max(int(site.split(".")[1]) for site in sites) if kind.of else d.layers
        for theirs, sites in receivers.items()
    }
    return [
        Step(kind, tuple(to), theirs, below[theirs], results) for theirs, to in receivers.items()
    ]


def _component(through: str, published: bool) -> str:
    """What a path is called in the results."""
    return f"head_z.{'published_' if published else ''}{through}"
