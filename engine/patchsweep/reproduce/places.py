"""Facts by place in the prompt: which tokens matter to which metric (§4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.reproduce import pictures
from patchsweep.reproduce.experiment import Finding, Table
from patchsweep.reproduce.heads import NAMES, NORMALISED, UNITS, number
from patchsweep.reproduce.pictures import Picture
from patchsweep.results import Results
from patchsweep.sites import SETS
from patchsweep.statistics import Array, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# As in Meng et al. 2022, from the subject on.
PLACES = ("first subject", "middle subject", "last subject", "next", "further", "last")
# (corruption, metric, layers of a window) -> [first layer, place]
Found = Mapping[tuple[str, str, int], Array]


def tokens(pair: Pair) -> dict[str, list[int]]:
    """Place -> its positions in a fact."""
    last = pair.labels["SUBJECT_LAST"]
    subject = list(range(pair.labels["SUBJECT_1"], last + 1))
    between = list(range(last + 1, len(pair) - 1))
    end = [len(pair) - 1] if last < len(pair) - 1 else []
    parts = (subject[:1], subject[1:-1], subject[-1:], between[:1], between[1:], end)
    return dict(zip(PLACES, parts, strict=True))


def effects(results: Results, metric: str, size: int, pairs: Sequence[Pair]) -> Array:
    """The joint effect of every window of `size` MLPs at every place, [first layer, place], as in
    `heads`: the mean over the tokens of a place, then over the pairs that have it; NaN where none
    has."""
    moved, span = _changes(results, metric, size)
    share = np.zeros((len(pairs), moved.shape[2], len(PLACES)))  # of a token in its place
    for i, pair in enumerate(pairs):
        for column, at in enumerate(tokens(pair).values()):
            share[i, at, column] = 1 / max(1, len(at))
    # What lies outside a prompt has no value, and no share.
    inside = np.asarray(share.any(2))
    moved = np.where(inside[:, None], moved, 0.0)
    total = np.einsum("plt,ptc->lc", moved, share)
    there = share.any(1)  # [pair, place]
    return ratio(total, (span @ there if metric in NORMALISED else there.sum(0)).astype(float))


def _changes(results: Results, metric: str, size: int) -> tuple[Array, Array]:
    """patched − corrupt of windows, [pair, first layer, position], and clean − corrupt [pair]."""
    moved, span = results.changes("mlp_out" if size == 1 else SETS, metric, "denoise")
    assert span is not None
    if size == 1:
        return moved[:, :, 0], span
    return moved[:, 0, 0][:, results.window_sets("mlp_out", size)], span


def weight(values: Array) -> float:
    """The sum of effects over layers at the last subject token / that at the middle ones; NaN where
    these have none above 0."""
    sums = dict(zip(PLACES, values.sum(0), strict=True))
    middle = float(sums["middle subject"])
    return float(sums["last subject"]) / middle if middle > 0 else float("nan")


def table(found: Found) -> Table:
    """The sum over layers at every place, by corruption, metric and size of window."""
    rows = []
    for (corruption, metric, size), values in found.items():
        shown = [number(x) if np.isfinite(x) else "" for x in values.sum(0)]
        rows.append((corruption, NAMES[metric], str(size), *shown, _times(weight(values))))
    columns = ("corruption", "metric", "layers of a window", *PLACES, "last / middle subject")
    return Table("Sum of effects over layers by place", columns, tuple(rows))


def _times(weight: float) -> str:
    return f"{weight:.2f}" if np.isfinite(weight) else "none"


def findings(found: Found, shown: int) -> Iterator[Finding]:
    """Probability gives the last subject token more weight than the logit difference does, in
    windows of `shown` layers as the paper's figure has them, and in others."""
    for corruption in dict.fromkeys(corruption for corruption, _, _ in found):
        sizes = list(dict.fromkeys(size for c, _, size in found if c == corruption))
        claim = (
            f"{corruption}: probability gives the last subject token more weight relative to the "
            "middle ones than logit difference does (here: sums of effects over layers, last / "
            "middle)"
        )
        where = f"§4.1, windows of {shown}"
        yield _weighs_more(found, corruption, [shown], claim, where)
        others = [size for size in sizes if size != shown]
        if others:
            yield _weighs_more(
                found,
                corruption,
                others,
                f"{corruption}: the same in windows of other sizes",
                "§4.1, App. G.2",
            )


def _weighs_more(
    found: Found, corruption: str, sizes: Sequence[int], claim: str, where: str
) -> Finding:
    """Whether it holds for windows of all these sizes; not decided where a ratio is none."""
    by = {
        size: {m: weight(found[corruption, m, size]) for m in ("prob", "logit_diff")}
        for size in sizes
    }
    ratios = np.array([[*of.values()] for of in by.values()])
    said = (
        f"{size}: " + ", ".join(f"{NAMES[m]} {_times(x)}" for m, x in of.items())
        for size, of in by.items()
    )
    holds = None if np.isnan(ratios).any() else bool((ratios[:, 0] > ratios[:, 1]).all())
    return Finding(claim, where, "last / middle by layers of a window: " + "; ".join(said), holds)


def figure(title: Sequence[str], found: Found, size: int) -> Figure:
    """First layer of a window × place, for every corruption and metric."""
    shown = [
        Picture(f"{corruption}, {NAMES[metric]}", values, UNITS[metric], PLACES)
        for (corruption, metric, layers), values in found.items()
        if layers == size
    ]
    said = f"windows of {size} MLPs, by their first layer, one position at a time; grey: no value"
    return pictures.figure([*title, said], [shown])
