"""Sliding windows of layers: what they do together against the sum of their single layers (§5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.reproduce import mlps
from patchsweep.reproduce.experiment import (
    Experiment,
    Finding,
    Report,
    Setting,
    Table,
    baselines,
    saturated,
)
from patchsweep.reproduce.facts import (
    SHOWN,
    SIZES,
    WAYS,
    WINDOW,
    layers,
    lines,
    long_subjects,
    subject_sweeps,
)
from patchsweep.reproduce.heads import METRICS, NAMES, number
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Results

NAME = "best-practices-windows"


def run(setting: Setting) -> Report:
    """Joint effects and sums at the last subject token of facts, by metric and corruption.
    BadInput for a model of fewer layers than a window has."""
    depth = setting.model.dimensions.layers
    if depth < (least := min(size for size in SIZES if size > 1)):
        raise BadInput(
            f"windows have at least {least} layers, {setting.model.name} has {depth}: choose a "
            "larger model"
        )
    low, high = mlps.middle_half(depth)
    pairs, tried = long_subjects(setting)
    found = subject_sweeps(setting, pairs)
    title = "Windows of layers against the sum of their single layers"
    under = "facts, mlp_out restored at the last subject token"
    return Report(
        title,
        (
            *lines(setting, NAME, tried),
            "Middle layers: the largest effects are those of windows whose middle lies in the "
            f"second or third quarter of the layers (from {low:g} to {high:g}).",
            *saturated(found),
        ),
        (baselines(found, METRICS), _table(found, depth)),
        {
            "windows": mlps.figure(
                (title, *setting.caption, under), _curves(found), mlps.middle_half(depth)
            )
        },
        sure(lambda drawn, _: _findings(drawn, depth), found, setting.n, ways=WAYS),
    )


def _findings(found: Mapping[str, Results], depth: int) -> Iterator[Finding]:
    """What §5 says; depth: of the model, in layers."""
    for corruption, results in found.items():
        yield from _of(corruption, results, depth)
    yield _typical(found, depth)


def _typical(found: Mapping[str, Results], depth: int) -> Finding:
    """How far the largest joint effect lies above the largest sum, over everything that varies."""
    every = [
        times(peaks)
        for results in found.values()
        for metric in SHOWN
        for peaks in _peaks(results, metric, depth).values()
    ]
    known = [each for each in every if np.isfinite(each)]
    middle = float(np.median(known)) if known else float("nan")
    return Finding(
        "over sizes, metrics and corruptions the largest joint effect at the middle layers is "
        "typically some 20 % above the largest sum of single layers (here: the median of joint / "
        "sum is above 1)",
        "§5",
        f"joint / sum: median {middle:.2f}, {min(known):.2f} to {max(known):.2f}"
        if known
        else "no sum is above 0",
        middle > 1 if known else None,
    )


def times(peaks: tuple[mlps.Peak, mlps.Peak]) -> float:
    """Joint / sum of the largest effects; NaN where the sum is not above 0."""
    joint, total = (peak.height for peak in peaks)
    return joint / total if total > 0 else float("nan")


def _peaks(results: Results, metric: str, depth: int) -> dict[int, tuple[mlps.Peak, mlps.Peak]]:
    """Size of a window -> the peaks of joint effect and sum at the middle layers."""
    return {
        size: mlps.peaks(results, metric, size, mlps.middle(depth, size))
        for size in results.window_sizes("mlp_out")
    }


def _of(corruption: str, results: Results, depth: int) -> Iterator[Finding]:
    for metric in SHOWN:
        name = f"{corruption}, {NAMES[metric]}"
        peaks = _peaks(results, metric, depth)
        shown = (
            f"{layers(size)} {number(joint.height)} against {number(total.height)}"
            for size, (joint, total) in peaks.items()
        )
        yield Finding(
            f"{name}: at the middle layers a window's joint effect peaks above the sum of its "
            "single layers",
            "§5",
            "; ".join(shown),
            all(joint.height > total.height for joint, total in peaks.values()),
        )
        single = mlps.peaks(results, metric, 1, mlps.middle(depth, 1))[0]
        size = WINDOW if WINDOW in peaks else [*peaks][-1]
        yield Finding(
            f"{name}: single layers show no peak or a weak one (here, at the middle layers: below "
            f"half of the peak of windows of {size})",
            "§5",
            f"1 layer {single}; {layers(size)} {peaks[size][0]}",
            single.height < peaks[size][0].height / 2,
        )


def _table(found: Mapping[str, Results], depth: int) -> Table:
    rows = []
    for metric in METRICS:
        for corruption, results in found.items():
            for size, peaks in _peaks(results, metric, depth).items():
                joint, total = mlps.by_window(results, metric, size)
                more = f"{int((joint > total).sum())} of {len(joint)}"
                share = times(peaks)
                ends = (*map(str, peaks), f"{share:.2f}" if np.isfinite(share) else "none", more)
                rows.append((NAMES[metric], corruption, layers(size), *ends))
    columns = ("metric", "corruption", "window", "largest joint effect at layers")
    more_columns = ("largest sum at layers", "joint / sum", "of all windows joint is larger in")
    title = "Windows of the middle layers and the sum of their layers"
    return Table(title, (*columns, *more_columns), tuple(rows))


def _curves(found: Mapping[str, Results]) -> dict[tuple[str, str], list[mlps.Curve]]:
    curves: dict[tuple[str, str], list[mlps.Curve]] = {}
    for corruption, results in found.items():
        for metric in METRICS:
            own = curves.setdefault((corruption, metric), [])
            for size in results.window_sizes("mlp_out"):
                joint, total = mlps.by_window(results, metric, size)
                own.append(mlps.Curve(f"{layers(size)} together", joint, size))
                own.append(mlps.Curve(f"sum of {size}", total, size, broken=True))
    return curves


EXPERIMENT = Experiment(
    NAME,
    "windows of layers against the sum of their single layers",
    "Zhang & Nanda 2023, §5",
    16,
    run,
)
