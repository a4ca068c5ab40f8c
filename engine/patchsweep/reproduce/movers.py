"""Name movers and S-inhibition heads as a sweep shows them: where they attend, what they recover.

Those of GPT-2 small are known (Wang et al. 2022, arXiv 2211.00593); on other models they are taken
from what was detected. Name movers: detected in the later half of the layers when S1 and IO are
corrupted. S-inhibition heads: detected in earlier layers than those when S2 is, and attending from
END to S2 more than to the other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.reproduce import published
from patchsweep.reproduce.claims import one
from patchsweep.reproduce.experiment import Setting, Table
from patchsweep.reproduce.heads import Heads, text
from patchsweep.results import Results
from patchsweep.statistics import standard_error

MOST = 3  # name movers
NAMES = ("IO", "S1", "S2")
VALUES, OUTPUTS = "values", "outputs"
SHARE = "logit difference recovered"


@dataclass(frozen=True)
class Gain:
    """The logit of IO in the unpatched runs and in the patched one, means over pairs; `error`: the
    standard error over pairs of what the corruption takes from it, NaN for one pair."""

    clean: float
    corrupt: float
    restored: float
    error: float

    @property
    def share(self) -> float:
        """How much of what the corruption takes from it is recovered; NaN where it takes no more
        than two standard errors."""
        lost = self.clean - self.corrupt
        return (self.restored - self.corrupt) / lost if lost > 2 * self.error else float("nan")

    def __str__(self) -> str:
        return f"{self.corrupt:.2f} to {self.restored:.2f} (clean {self.clean:.2f})"


@dataclass(frozen=True)
class Circuit:
    """Name movers and S-inhibition heads, as layer.head; `grouped` query heads share a value;
    `known`: they are published, not found here."""

    movers: tuple[str, ...]
    inhibition: tuple[str, ...]
    grouped: int
    known: bool = False

    @property
    def line(self) -> str:
        """Which heads they are."""
        shared = (
            f" Values are those of the key-value heads that they read, shared by {self.grouped} "
            "query heads each."
            if self.grouped > 1
            else ""
        )
        if self.known:
            return (
                f"Name movers {text(self.movers)} and S-inhibition heads {text(self.inhibition)}: "
                "those of Wang et al. 2022."
            )
        return (
            "Name movers (the largest positive ones by logit difference in the later half of the "
            f"layers, S1 and IO replaced): {text(self.movers)}. S-inhibition heads (positive in "
            "earlier layers, S2 replaced, and attending from END to S2 most): "
            f"{text(self.inhibition)}.{shared}"
        )

    def sweep(self, setting: Setting, name: str, pairs: Sequence[Pair], corrupt: Any) -> Results:
        """The S-inhibition heads restored at all positions: their values, of the key-value heads
        that they read, and their outputs."""
        sites = [tuple(map(int, head.split("."))) for head in self.inhibition]
        values = dict.fromkeys(f"head_v.{layer}.{n // self.grouped}" for layer, n in sites)
        sets = {VALUES: [*values], OUTPUTS: [f"head_z.{head}" for head in self.inhibition]}
        read = [_metric(head, key) for head in self.movers for key in NAMES]
        return setting.sweep(
            f"restored-{name.lower()}",
            pairs,
            sets=sets,
            metrics=["logit", "logit_diff", *read],
            corrupt=corrupt,
        )


def roles(setting: Setting, s2: Sequence[Heads], s1_io: Sequence[Heads]) -> Circuit:
    """The heads of the circuit: those published for this model, or from what token replacement
    detects by logit difference."""
    d = setting.model.dimensions
    if known := published.circuit(setting.model):
        return Circuit(*known, d.heads // d.kv_heads, known=True)
    late, early = one(s1_io, "STR", "logit_diff"), one(s2, "STR", "logit_diff")
    movers = [head for head in late.positive if _layer(head) >= d.layers // 2]
    movers = sorted(movers, key=late.of, reverse=True)[:MOST]
    before = min(map(_layer, movers), default=0)
    candidates = [head for head in early.positive if _layer(head) < before]
    inhibition = _attending_to_s2(setting, candidates) if candidates else []
    return Circuit(tuple(movers), tuple(inhibition), d.heads // d.kv_heads)


def attention(circuit: Circuit, results: Mapping[str, Results]) -> tuple[Table, dict[str, float]]:
    """What the name movers attend to from END in every run, and the share of IO in IO + S1 over
    all of them, by run."""
    runs = {"clean": _attended(circuit, results["STR"], 0)}
    runs |= {name: _attended(circuit, found, 1) for name, found in results.items()}
    rows = [
        (run, head, *(f"{x:.3f}" for x in row))
        for run, found in runs.items()
        for head, row in zip(circuit.movers, found, strict=True)
    ]
    shares = {run: float(x[:, 0].sum() / x[:, :2].sum()) for run, x in runs.items()}
    title = "Attention of the name movers from END, S2 corrupted"
    return Table(title, ("run", "head", *NAMES), tuple(rows)), shares


def recovered(results: Mapping[str, Results]) -> tuple[Table, dict[str, Gain]]:
    """What restoring the S-inhibition heads does, by corruption: all of it as a table, and what
    their values alone do to the logit of IO."""
    rows, gains = [], {}
    for name, found in results.items():
        ends = found.baseline("logit")[:, 0].mean(1)  # [run, pair]
        clean, corrupt = ends.mean(1)
        error = float(standard_error(ends[0] - ends[1], 0))
        moved = found.changes("sets", "logit", "denoise")[0].mean(0)[0, 0]
        shares = found.effect("sets", "logit_diff", "denoise")[0, 0]
        for which, change, share in zip(found.grid("sets").positions, moved, shares, strict=True):
            gain = Gain(float(clean), float(corrupt), float(corrupt + change), error)
            numbers = (f"{gain.clean:.3f}", f"{gain.corrupt:.3f}", f"{gain.restored:.3f}")
            rows.append((name, str(which), *numbers, f"{share:.3f}"))
            if which == VALUES:
                gains[name] = gain
    runs = ("clean", "corrupt", "restored")
    columns = ("corruption", "what", *(f"IO {run}" for run in runs), SHARE)
    return Table(
        "S-inhibition heads restored, S2 corrupted: the logit of IO", columns, tuple(rows)
    ), gains


def _attending_to_s2(setting: Setting, candidates: Sequence[str]) -> list[str]:
    """The heads that attend from END to S2 more than to IO and to S1 in the clean run."""
    results = setting.sweep(
        "candidates",
        setting.pairs("ioi", corruption="s2"),
        sets={"candidates": [f"head_z.{head}" for head in candidates]},
        metrics=[_metric(head, key) for head in candidates for key in NAMES],
    )
    means = [
        [results.baseline(_column(head, key))[0].mean() for key in NAMES] for head in candidates
    ]
    return [
        head
        for head, by_name in zip(candidates, means, strict=True)
        if np.argmax(by_name) == NAMES.index("S2")
    ]


def _attended(circuit: Circuit, results: Results, run: int) -> np.ndarray[Any, Any]:
    """Attention from END in an unpatched run, mean over pairs and samples, [mover, name]."""
    return np.array(
        [
            [results.baseline(_column(head, key))[run].mean() for key in NAMES]
            for head in circuit.movers
        ]
    )


def _metric(head: str, key: str) -> dict[str, Any]:
    layer, number = map(int, head.split("."))
    return {"attention": {"layer": layer, "head": number, "query": "END", "key": key}}


def _column(head: str, key: str) -> str:
    return f"attention_{head.replace('.', '_')}_END_{key}"


def _layer(head: str) -> int:
    return int(head.split(".")[0])
