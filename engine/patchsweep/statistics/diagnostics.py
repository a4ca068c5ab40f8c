"""What a reader of results should be told before believing them, one line each. Plain numpy.

Functions take arrays over cells of one component, metric and direction, and `name`, which says how
a cell is called. They return lines, none where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from patchsweep.statistics.uncertainty import agreement, beyond_sd

Floats = NDArray[np.float64]
Map = NDArray[np.bool_]
Name = Callable[[Sequence[int]], str]

SMALL_DENOMINATOR = 0.05  # of the largest
TOP = 10  # cells that are compared
AGREE = 0.5  # rank correlation below which metrics disagree
SATURATED = 0.01  # distance from 0 or 1 at which a probability can go no further
FAR_APART = 4.0  # times that an effect in one direction exceeds the other
SHARE = 0.25  # of the sizes of singles, by which a joint effect has to differ from their sum
LISTED = 5


def wrong_answers(clean: Floats) -> list[str]:
    """Pairs whose clean run does not prefer the answer: clean [pair] is its logit difference."""
    wrong = int((clean <= 0).sum())
    if not wrong:
        return []
    return [f"the clean run prefers the wrong answer in {wrong} of {len(clean)} pairs"]


def unlikely_answers(rank: Floats) -> list[str]:
    """Pairs whose clean run does not have the answer on top: rank [pair], 0 is the top."""
    known = rank[np.isfinite(rank)]
    below = int((known > 0).sum())
    if not below:
        return []
    return [
        f"the answer is not the clean run's likeliest token in {below} of {len(rank)} pairs "
        f"(mean rank {known.mean():.0f})"
    ]


def by_index(asked: bool, lengths: Sequence[int]) -> list[str]:
    """Positions that were asked for by index, over prompts [pair] of unequal length."""
    if not asked or len(set(lengths)) == 1:
        return []
    return [
        f"positions are indices, and the prompts have {min(lengths)} to {max(lengths)} tokens: an "
        "index is another token in each"
    ]


def few_pairs(pairs: int, enough: int) -> list[str]:
    """So few pairs that intervals over them say little."""
    if pairs >= enough:
        return []
    if pairs == 1:
        return ["1 pair: how effects vary over prompts is not known"]
    return [f"{pairs} pairs: intervals over them are wide"]


def small_denominators(span: Floats) -> list[str]:
    """Pairs whose runs hardly differ: span [pair] is clean − corrupt."""
    size = np.abs(span)
    known = np.isfinite(size)
    largest = size[known].max(initial=0.0)
    small = np.flatnonzero(known & ((size < SMALL_DENOMINATOR * largest) | (size == 0)))
    if not small.size:
        return []
    return [
        f"|clean − corrupt| is below {SMALL_DENOMINATOR:.0%} of the largest in pair "
        f"{_listed([str(i) for i in small], 10)}, whose own effects are unreliable"
    ]


def disagreement(effects: Mapping[str, Floats], run: Map, name: Name) -> list[str]:
    """Metrics that rank the cells that were run differently; effects [...cells] by metric.

    Two with the same top cells agree: the rest may be in any order.
    """
    lines = []
    metrics = list(effects)
    for i, one in enumerate(metrics):
        for other in metrics[i + 1 :]:
            both = run & np.isfinite(effects[one]) & np.isfinite(effects[other])
            a, b = np.abs(effects[one][both]), np.abs(effects[other][both])
            rank = agreement(a, b).spearman
            if not rank < AGREE:
                continue
            cells = np.argwhere(both)
            top = [{tuple(cells[j]) for j in np.argsort(-x, kind="stable")[:TOP]} for x in (a, b)]
            if top[0] == top[1] and len(cells) > TOP:
                continue
            only = [_cells(sorted(top[k] - top[1 - k]), name) or "none" for k in (0, 1)]
            line = f"{one} and {other} disagree (rank correlation {rank:.2f})"
            if top[0] != top[1]:
                line += f"; in the top {TOP} of {one} alone: {only[0]}; of {other} alone: {only[1]}"
            lines.append(line)
    return lines


def saturated(metric: str, destination: Floats, direction: str) -> list[str]:
    """A probability that has nowhere to go: destination [pair] is its baseline.

    Near 0 a probability cannot fall, so that negative components do not show (Zhang & Nanda 2023);
    its logarithm can, without end. Near 1 neither can rise. Says nothing of any other metric.
    """
    kind = metric.partition("_at_")[0]
    known = destination[np.isfinite(destination)]
    if kind not in ("prob", "logprob") or not known.size:
        return []
    mean = float((np.exp(known) if kind == "logprob" else known).mean())
    if mean < SATURATED and kind == "prob":
        return [
            f"{metric} is {mean:.1e} before anything is patched ({direction}): it cannot show what "
            "pushes against the answer; negative components stay hidden"
        ]
    if mean > 1 - SATURATED:
        of = "the probability" if kind == "logprob" else metric
        return [
            f"{of} is {mean:.3f} before anything is patched ({direction}): {metric} cannot show "
            "what adds to the answer"
        ]
    return []


def never_changed(metric: str, changed: int, runs: int) -> list[str]:
    """A discrete metric that none of the runs has moved."""
    if changed or not runs:
        return []
    return [f"{metric} changed in none of the {runs:,} cells that were run: it says nothing"]


def below_noise(runs: Mapping[str, tuple[int, int, float]]) -> list[str]:
    """How many runs, of how many, are no further from the baseline than a null patch is, and how
    far that is at most, by metric."""
    some = {metric: one for metric, one in runs.items() if one[0]}
    if not some:
        return []
    said = ", ".join(f"{metric} {under:,}" for metric, (under, _, _) in some.items())
    total = max(count for _, count, _ in some.values())
    floor = max(floor for _, _, floor in some.values())
    return [
        f"of {total:,} cells that were run some changed no more than a null patch does (at most "
        f"{floor:.1e}), by {said}: that is rounding"
    ]


def and_or(denoise: Floats, noise: Floats, name: Name) -> list[str]:
    """Cells that matter in one direction only (Heimersheim & Nanda 2024, on AND and OR)."""
    lines = []
    for big, small, text in (
        (noise, denoise, "matter when noised, not when denoised (parts of an AND)"),
        (denoise, noise, "matter when denoised, not when noised (parts of an OR, or backed up)"),
    ):
        size = np.where(np.isfinite(big), np.abs(big), 0.0)
        order = np.argsort(-size, axis=None, kind="stable")[:TOP]
        top = [tuple(np.unravel_index(i, size.shape)) for i in order]
        detected = beyond_sd(big)
        apart = [c for c in top if detected[c] and size[c] > FAR_APART * abs(small[c])]
        if apart:
            lines.append(f"{text}: {_cells(apart, name)}")
    return lines


def negative(effect: Floats, name: Name) -> list[str]:
    """Cells that stand out against the source's behaviour."""
    cells = np.argwhere(beyond_sd(effect) & (effect < 0))
    if not len(cells):
        return []
    order = np.argsort([effect[tuple(c)] for c in cells], kind="stable")
    return [f"negative: {_cells([tuple(cells[i]) for i in order], name)}"]


def backup(joint: float, singles: Sequence[float], direction: str) -> list[str]:
    """Several cells patched together against the sum of each alone."""
    total, sizes = float(np.sum(singles)), float(np.abs(singles).sum())
    if not np.isfinite([joint, total]).all() or abs(joint - total) <= SHARE * sizes:
        return []
    weaker = joint * total >= 0 and abs(joint) < abs(total)
    if weaker:
        reading = "they may overlap, or lie behind one another"
    elif direction == "noise" and joint * total >= 0:
        reading = "something may stand in for single ones (backup)"
    else:
        reading = "they may act on one another"
    return [
        f"the top {len(singles)} together have {joint:+.2f}, each alone sums to {total:+.2f}: "
        f"{reading}"
    ]


def _cells(cells: Sequence[Sequence[int]], name: Name) -> str:
    return _listed([name(cell) for cell in cells], LISTED)


def _listed(items: Sequence[str], most: int) -> str:
    text = ", ".join(items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
