"""The classes of heads of the circuit for indirect object identification.

Those of GPT-2 small are known (Wang et al. 2022, arXiv 2211.00593); on other models the sweeps
assign them, by effect and by attention in the clean run, as RULES says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.reproduce import published
from patchsweep.reproduce.claims import one
from patchsweep.reproduce.experiment import Finding, Setting, Table
from patchsweep.reproduce.heads import METRICS, NAMES, Heads, text
from patchsweep.reproduce.published import List, ordered
from patchsweep.results import Results

MOVERS, NEGATIVE, INHIBITION = "name_movers", "negative_name_movers", "s_inhibition"
DUPLICATE, INDUCTION = "duplicate_token", "induction"
CLASSES = {
    MOVERS: "name movers",
    DUPLICATE: "duplicate token",
    INHIBITION: "S-inhibition",
    NEGATIVE: "negative name movers",
    INDUCTION: "induction",
}
MOST = 3  # name movers
ATTENDED = 0.2  # of the attention from S2
RULES = {
    MOVERS: "S1 and IO replaced, positive by logit difference in the later half of the layers; the "
    f"{MOST} largest",
    DUPLICATE: "others that are detected by any metric, S2 replaced or noised, in layers below the "
    f"name movers, and in the clean run have at least {ATTENDED:.0%} of their attention from S2 on "
    "S1, and more than on the token after S1",
    INHIBITION: "S2 replaced, positive by logit difference in layers below the name movers, and "
    "attending from END to S2 more than to IO and to S1 in the clean run",
    NEGATIVE: "S1 and IO replaced, negative by logit difference in the later half of the layers",
    INDUCTION: "as duplicate token heads, with more on the token after S1",
}
AFTER = "S1_NEXT"  # the label of the token after S1
# What is asked of every candidate: the attention from where to where.
LOOKS = (("END", "IO"), ("END", "S1"), ("END", "S2"), ("S2", "S1"), ("S2", AFTER))


@dataclass(frozen=True)
class Circuit:
    """Class -> its heads, as layer.head; `grouped` query heads share a value; `known`: they are
    published, not found here."""

    heads: Mapping[str, tuple[str, ...]]
    grouped: int
    known: bool = False

    @property
    def movers(self) -> tuple[str, ...]:
        """The name movers."""
        return self.heads[MOVERS]

    @property
    def inhibition(self) -> tuple[str, ...]:
        """The S-inhibition heads."""
        return self.heads[INHIBITION]

    @property
    def lines(self) -> tuple[str, ...]:
        """Which heads they are, and how they were chosen."""
        of = {kind: f"{CLASSES[kind]} {text(self.heads[kind])}" for kind in CLASSES}
        if self.known:
            return (f"Classes of heads, those of Wang et al. 2022: {'; '.join(of.values())}.",)
        shared = f"Values are those of key-value heads, shared by {self.grouped} query heads each."
        return (
            "Classes of heads, assigned here (no head has two):",
            *(f"{said} ({RULES[kind]})." for kind, said in of.items()),
            *([shared] if self.grouped > 1 else []),
        )


def circuit(setting: Setting, s2: Sequence[Heads], s1_io: Sequence[Heads]) -> Circuit:
    """The classes published for this model, or as RULES says of what was detected."""
    d = setting.model.dimensions
    grouped = d.heads // d.kv_heads
    if known := published.circuit(published.model_of(setting.model)):
        return Circuit(known, grouped, known=True)
    late = one(s1_io, "STR", "logit_diff")
    movers = [head for head in late.positive if _layer(head) >= d.layers // 2]
    movers = sorted(movers, key=late.of, reverse=True)[:MOST]
    negative = [head for head in late.negative if _layer(head) >= d.layers // 2]
    before = min(map(_layer, movers), default=0)
    detected = {head for h in s2 for head in (*h.positive, *h.negative) if _layer(head) < before}
    candidates = ordered([*detected - {*negative}])
    looks = looks_of(looked(setting, candidates), candidates) if candidates else {}
    helping = one(s2, "STR", "logit_diff").positive
    found: dict[str, tuple[str, ...]] = {
        MOVERS: tuple(movers),
        NEGATIVE: tuple(negative),
        INHIBITION: tuple(h for h in candidates if h in helping and inhibits(looks[h])),
    }
    left = [head for head in candidates if head not in found[INHIBITION]]
    for kind in (DUPLICATE, INDUCTION):
        found[kind] = tuple(head for head in left if repeats(looks[head]) == kind)
    return Circuit(found, grouped)


def inhibits(look: Mapping[tuple[str, str], float]) -> bool:
    """Whether a head attends from END to S2 more than to the other names."""
    return most(look) == "S2"


def most(look: Mapping[tuple[str, str], float]) -> str:
    """The name that a head attends to most from END."""
    return max(("IO", "S1", "S2"), key=lambda name: look["END", name])


def repeats(look: Mapping[tuple[str, str], float]) -> str | None:
    """Whether a head is a duplicate token or an induction head, by its attention from S2."""
    same, after = look["S2", "S1"], look["S2", AFTER]
    if max(same, after) < ATTENDED:
        return None
    return DUPLICATE if same > after else INDUCTION


def table(circuit: Circuit, found: Sequence[Heads], lists: Sequence[List], where: str) -> Table:
    """How many heads of each class are detected, and which, with their sign; and how many are in
    the published lists."""
    rows = []
    for here in found:
        rows.append((here.corruption, NAMES[here.metric], "here", *_counts(circuit, here)))
        rows += [
            (said.corruption, NAMES[said.metric], said.where, *_counts(circuit, said))
            for said in lists
            if (said.corruption, said.metric) == (here.corruption, here.metric)
        ]
    columns = ("corruption", "metric", "list", *CLASSES.values(), "of no class")
    return Table(f"Detected heads by class, {where}", columns, tuple(rows))


def findings(circuit: Circuit, found: Sequence[Heads]) -> list[Finding]:
    """What Table 1 says of two classes, S2 corrupted."""
    duplicate = "S2: GN detects duplicate token heads by every metric, STR by none"
    movers = "S2: STR detects a name mover by every metric, GN by logit difference alone"
    return [
        _of_class(circuit, found, DUPLICATE, duplicate, {"STR": (), "GN": METRICS}),
        _of_class(circuit, found, MOVERS, movers, {"STR": METRICS, "GN": ("logit_diff",)}),
    ]


def _of_class(
    circuit: Circuit,
    found: Sequence[Heads],
    kind: str,
    claim: str,
    wanted: Mapping[str, Sequence[str]],
) -> Finding:
    """Whether heads of a class are detected by these metrics of a corruption, and by no others; not
    decided where the class has no heads."""
    heads = circuit.heads[kind]
    here = {(h.corruption, h.metric): _among(h, heads) for h in found}
    return Finding(
        claim,
        "Table 1, counted from Table 5",
        "; ".join(f"{c}, {NAMES[m]}: {text(among)}" for (c, m), among in here.items()),
        all(bool(among) == (m in wanted[c]) for (c, m), among in here.items()) if heads else None,
    )


def _counts(circuit: Circuit, found: Heads | List) -> list[str]:
    cells = []
    for kind in CLASSES:
        among, heads = _among(found, circuit.heads[kind]), circuit.heads[kind]
        which = f": {text(among)}" if among else ""
        cells.append(f"{len(among)} of {len(heads)}{which}")
    classed = {head for heads in circuit.heads.values() for head in heads}
    others = [head for head in found.heads if head[1:] not in classed]
    return [*cells, f"{len(others)}: {text(others)}" if others else "0"]


def _among(found: Heads | List, heads: Sequence[str]) -> tuple[str, ...]:
    """The detected heads, with their sign, that are among these."""
    return ordered([head for head in found.heads if head[1:] in heads])


def metric(head: str, query: str, key: str) -> dict[str, Any]:
    """The attention of a head as a metric of a spec."""
    layer, number = map(int, head.split("."))
    return {"attention": {"layer": layer, "head": number, "query": query, "key": key}}


def column(head: str, query: str, key: str) -> str:
    """What that metric is called in results."""
    return f"attention_{head.replace('.', '_')}_{query}_{key}"


def marked(pair: Pair) -> Pair:
    """The pair with a label for the token after S1."""
    return replace(pair, labels={**pair.labels, AFTER: pair.labels["S1"] + 1})


def looked(setting: Setting, candidates: Sequence[str], name: str = "candidates") -> Results:
    """A sweep that reads the attention of these heads, LOOKS, in the clean run."""
    return setting.sweep(
        name,
        [marked(pair) for pair in setting.pairs("ioi", corruption="s2")],
        sets={"candidates": [f"head_z.{head}" for head in candidates]},
        metrics=[metric(head, *look) for head in candidates for look in LOOKS],
    )


def looks_of(
    results: Results, candidates: Sequence[str]
) -> dict[str, dict[tuple[str, str], float]]:
    """Head -> its attention in the clean run, LOOKS, mean over pairs."""
    return {
        head: {look: float(np.mean(results.baseline(column(head, *look))[0])) for look in LOOKS}
        for head in candidates
    }


def _layer(head: str) -> int:
    return int(head.split(".")[0])
