"""Facts by place in the prompt: which tokens matter to which metric (§4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.effect import Array
from patchsweep.pairs import Pair
from patchsweep.reproduce import pictures
from patchsweep.reproduce.experiment import Finding, Table
from patchsweep.reproduce.heads import NAMES, UNITS
from patchsweep.reproduce.pictures import Picture
from patchsweep.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# As in Meng et al. 2022, from the subject on.
PLACES = ("first subject", "middle subject", "last subject", "next", "further", "last")
Found = Mapping[tuple[str, str], Array]  # (corruption, metric) -> [layer, place]


def tokens(pair: Pair) -> dict[str, list[int]]:
    """Place -> its positions in a fact."""
    last = pair.labels["SUBJECT_LAST"]
    subject = list(range(pair.labels["SUBJECT_1"], last + 1))
    between = list(range(last + 1, len(pair) - 1))
    end = [len(pair) - 1] if last < len(pair) - 1 else []
    parts = (subject[:1], subject[1:-1], subject[-1:], between[:1], between[1:], end)
    return dict(zip(PLACES, parts, strict=True))


def effects(results: Results, metric: str, pairs: Sequence[Pair]) -> Array:
    """The effect of single MLPs at every place, [layer, place], as in `heads`: the mean over the
    tokens of a place, then over the pairs that have it; NaN where none has."""
    moved, span = results.changes(
        "mlp_out", metric, "denoise"
    )  # [pair, layer, 1, position], [pair]
    assert span is not None
    out = np.full((moved.shape[1], len(PLACES)), np.nan)
    for column, place in enumerate(PLACES):
        where = {i: at for i, pair in enumerate(pairs) if (at := tokens(pair)[place])}
        if where:
            found = np.mean([moved[i][:, 0, at].mean(-1) for i, at in where.items()], axis=0)
            scale = float(span[[*where]].mean()) if metric == "logit_diff" else 1.0
            out[:, column] = found / scale
    return out


def peaks(values: Array) -> dict[str, float]:
    """Place -> the largest effect over layers; NaN where there is none."""
    return dict(zip(PLACES, np.fmax.reduce(values, axis=0).tolist(), strict=True))


def weight(values: Array) -> float:
    """The last subject token's peak / that of the middle ones; NaN where these have none."""
    found = peaks(values)
    middle = found["middle subject"]
    return found["last subject"] / middle if middle > 0 else float("nan")


def table(found: Found) -> Table:
    """The peak of every place, by corruption and metric."""
    rows = []
    for (corruption, metric), values in found.items():
        shown = [f"{x:+.3f}" if np.isfinite(x) else "" for x in peaks(values).values()]
        rows.append((corruption, NAMES[metric], *shown, _times(weight(values))))
    columns = ("corruption", "metric", *PLACES, "last / middle subject")
    return Table("Largest effect over layers by place", columns, tuple(rows))


def _times(weight: float) -> str:
    return f"{weight:.2f}" if np.isfinite(weight) else "none"


def findings(found: Found) -> Iterator[Finding]:
    """Probability gives the last subject token more weight than the logit difference does."""
    for corruption in dict.fromkeys(corruption for corruption, _ in found):
        by = {m: weight(found[corruption, m]) for m in ("prob", "logit_diff")}
        yield Finding(
            f"{corruption}: probability gives the last subject token more weight relative to the "
            "middle ones than logit difference does",
            "§4.1; here single layers",
            "last / middle: " + ", ".join(f"{NAMES[m]} {_times(x)}" for m, x in by.items()),
            None if np.isnan([*by.values()]).any() else by["prob"] > by["logit_diff"],
        )


def figure(title: Sequence[str], found: Found) -> Figure:
    """Layer × place for every corruption and metric."""
    shown = [
        Picture(f"{corruption}, {NAMES[metric]}", values, UNITS[metric], PLACES)
        for (corruption, metric), values in found.items()
    ]
    return pictures.figure([*title, "single MLPs, one position at a time"], [shown])
