"""What the name movers attend to, and what restoring the S-inhibition heads recovers (§3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.reproduce.experiment import Setting, Table
from patchsweep.reproduce.roles import Circuit, column, metric
from patchsweep.results import Results
from patchsweep.statistics import standard_error

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


def restored(
    setting: Setting, circuit: Circuit, name: str, pairs: Sequence[Pair], corrupt: Any
) -> Results:
    """The S-inhibition heads restored at all positions: their values, of the key-value heads that
    they read, and their outputs."""
    sites = [tuple(map(int, head.split("."))) for head in circuit.inhibition]
    values = dict.fromkeys(f"head_v.{layer}.{n // circuit.grouped}" for layer, n in sites)
    sets = {VALUES: [*values], OUTPUTS: [f"head_z.{head}" for head in circuit.inhibition]}
    read = [metric(head, "END", key) for head in circuit.movers for key in NAMES]
    return setting.sweep(
        f"restored-{name.lower()}",
        pairs,
        sets=sets,
        metrics=["logit", "logit_diff", *read],
        corrupt=corrupt,
    )


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
        shares = found.effect("sets", "logit_diff", "denoise").values[0, 0]
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


def _attended(circuit: Circuit, results: Results, run: int) -> np.ndarray[Any, Any]:
    """Attention from END in an unpatched run, mean over pairs and samples, [mover, name]."""
    return np.array(
        [
            [results.baseline(column(head, "END", key))[run].mean() for key in NAMES]
            for head in circuit.movers
        ]
    )
