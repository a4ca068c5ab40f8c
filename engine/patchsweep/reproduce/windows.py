"""Sliding windows of layers: what they do together against the sum of their single layers (§5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
    WINDOW,
    layers,
    lines,
    long_subjects,
    subject_sweeps,
)
from patchsweep.reproduce.heads import METRICS, NAMES
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Results

NAME = "best-practices-windows"


def run(setting: Setting) -> Report:
    """Joint effects and sums at the last subject token of facts, by metric and corruption.
    BadInput for a model of fewer layers than a window has."""
    if setting.model.dimensions.layers < (least := min(size for size in SIZES if size > 1)):
        raise BadInput(
            f"windows have at least {least} layers, {setting.model.name} has "
            f"{setting.model.dimensions.layers}: choose a larger model"
        )
    pairs, tried = long_subjects(setting)
    found = subject_sweeps(setting, pairs)
    title = "Windows of layers against the sum of their single layers"
    under = "facts, mlp_out restored at the last subject token"
    return Report(
        title,
        (*lines(setting, NAME, tried), *saturated(found)),
        (baselines(found, METRICS), _table(found)),
        {"windows": mlps.figure((title, *setting.caption, under), _curves(found))},
        sure(_findings, found, setting.n),
    )


def _findings(found: Mapping[str, Results], _: Sequence[int]) -> Iterator[Finding]:
    for corruption, results in found.items():
        yield from _of(corruption, results)


def _of(corruption: str, results: Results) -> Iterator[Finding]:
    sizes = results.window_sizes("mlp_out")
    for metric in SHOWN:
        name = f"{corruption}, {NAMES[metric]}"
        peaks = {size: mlps.peaks(results, metric, size) for size in sizes}
        shown = (
            f"{layers(size)} {joint.height:+.3f} against {total.height:+.3f}"
            for size, (joint, total) in peaks.items()
        )
        yield Finding(
            f"{name}: a window's joint effect peaks above the sum of its single layers",
            "§5",
            "; ".join(shown),
            all(joint.height > total.height for joint, total in peaks.values()),
        )
        single = mlps.peaks(results, metric, 1)[0]
        size = WINDOW if WINDOW in sizes else sizes[-1]
        yield Finding(
            f"{name}: single layers show no peak or a weak one (here: below half of the peak of "
            f"windows of {size})",
            "§5",
            f"1 layer {single}; {layers(size)} {peaks[size][0]}",
            single.height < peaks[size][0].height / 2,
        )


def _table(found: Mapping[str, Results]) -> Table:
    rows = []
    for metric in METRICS:
        for corruption, results in found.items():
            for size in results.window_sizes("mlp_out"):
                joint, total = mlps.by_window(results, metric, size)
                peaks = (mlps.peak(joint, size), mlps.peak(total, size))
                more = f"{int((joint > total).sum())} of {len(joint)}"
                rows.append((NAMES[metric], corruption, layers(size), *map(str, peaks), more))
    columns = ("metric", "corruption", "window", "largest joint effect at layers")
    more_columns = ("largest sum at layers", "windows whose joint effect is larger")
    return Table("Windows and the sum of their layers", (*columns, *more_columns), tuple(rows))


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
    32,
    run,
)
