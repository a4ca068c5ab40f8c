"""Facts: the MLPs that recall them, by corruption, window and metric (§4.1, §5)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from patchsweep.engine import answers_right
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.reproduce import mlps, places, published
from patchsweep.reproduce.experiment import (
    Experiment,
    Finding,
    Report,
    Setting,
    Table,
    baselines,
    saturated,
)
from patchsweep.reproduce.heads import METRICS, NAMES, SCALES, number
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Results
from patchsweep.tasks import facts

NAME = "best-practices-facts"
SIZES = (1, 3, 5, 10)  # adjacent layers
WINDOW = 5  # that of the paper's figure
SHOWN = ("logit_diff", "prob")  # the metrics of the paper's claims
WAYS = 2  # each prompt of a pair is clean once


def run(setting: Setting) -> Report:
    """Peaks at the last subject token under STR and GN, and the weight of positions by metric."""
    pairs, tried = long_subjects(setting)
    found = subject_sweeps(setting, pairs)
    sizes = (1, *found["STR"].window_sizes("mlp_out"))
    everywhere = mlps.sweeps(
        setting,
        "positions",
        pairs,
        subject_labels(pairs),
        metrics=SHOWN,
        windows=[size for size in sizes if size > 1],
    )
    by_place = _by_place(everywhere, pairs, sizes)
    shown = WINDOW if WINDOW in sizes else sizes[-1]
    title = "Facts: MLPs by corruption, window and metric"
    curves = {
        (corruption, metric): [
            mlps.Curve(layers(size), mlps.by_window(results, metric, size)[0], size)
            for size in sizes
        ]
        for corruption, results in found.items()
        for metric in METRICS
    }
    under = "mlp_out restored at the last subject token"
    return Report(
        title,
        (
            *lines(setting, NAME, tried),
            "Positions: single layers and windows, one position at a time; the mean over the "
            "tokens of a place, then over facts.",
            *saturated(found),
        ),
        (baselines(found, METRICS), _peak_table(found, sizes), places.table(by_place)),
        {
            "windows": mlps.figure((title, *setting.caption, under), curves),
            "positions": places.figure((title, *setting.caption), by_place, shown),
        },
        (
            *sure(lambda drawn, _: _peak_findings(drawn, shown), found, setting.n, ways=WAYS),
            *sure(
                lambda drawn, at: places.findings(
                    _by_place(drawn, [pairs[i] for i in at], sizes), shown
                ),
                everywhere,
                setting.n,
                ways=WAYS,
            ),
        ),
    )


def _by_place(
    found: Mapping[str, Results], pairs: Sequence[Pair], sizes: Sequence[int]
) -> places.Found:
    return {
        (corruption, metric, size): places.effects(results, metric, size, pairs)
        for corruption, results in found.items()
        for metric in SHOWN
        for size in sizes
    }


def long_subjects(setting: Setting) -> tuple[list[Pair], int]:
    """`n` pairs of facts, each both ways round, whose subjects have at least three tokens and of
    which the model puts the object above the other prompt's in both prompts; and how many were
    tried. BadInput if there are fewer."""
    pairs: list[Pair] = []
    seen: set[tuple[int, ...]] = set()  # the pairs that were tried, both ways
    for pair in facts.stream(setting.tokenizer, setting.seed):
        if len(pairs) == WAYS * setting.n:
            break
        if len(subject(pair)) > 2 and pair.clean + pair.corrupt not in seen:
            both = both_ways(pair)
            seen |= {one.clean + one.corrupt for one in both}
            pairs += both if all(answers_right(setting.model, one) for one in both) else ()
    known, tried = len(pairs) // WAYS, len(seen) // WAYS
    if known < setting.n:
        raise BadInput(
            f"{setting.model.name} knows {known} of {tried} pairs of facts with subjects of three "
            f"tokens or more, {setting.n} are asked for: ask for fewer"
        )
    return pairs, tried


def both_ways(pair: Pair) -> tuple[Pair, Pair]:
    """A pair of facts, and the same with its other prompt as the clean one: their subjects lie at
    the same positions."""
    other = replace(
        pair, clean=pair.corrupt, corrupt=pair.clean, answer=pair.wrong, wrong=pair.answer
    )
    return pair, other


def subject(pair: Pair) -> dict[str, int]:
    """Label -> position of the subject's tokens, in their order."""
    return {name: at for name, at in pair.labels.items() if re.fullmatch(r"SUBJECT_\d+", name)}


def subject_labels(pairs: Sequence[Pair]) -> list[str]:
    """All labels of subject tokens."""
    return list(dict.fromkeys(name for pair in pairs for name in subject(pair)))


def subject_sweeps(setting: Setting, pairs: Sequence[Pair]) -> dict[str, Results]:
    """The MLPs at the last subject token, alone and in windows; GN noises the whole subject."""
    return mlps.sweeps(
        setting,
        "subject",
        pairs,
        subject_labels(pairs),
        positions=["SUBJECT_LAST"],
        windows=[size for size in SIZES if 1 < size <= setting.model.dimensions.layers],
    )


def lines(setting: Setting, name: str, tried: int) -> tuple[str, ...]:
    """How the facts were chosen and patched, for the report of an experiment."""
    return (
        f"Model: {setting.subject}.",
        f"Pairs of facts with subjects of three tokens or more; of {tried} tried, {setting.n} of "
        "which the model puts the object above that of the other prompt in both prompts. Each "
        f"prompt of a pair is clean once: {WAYS * setting.n} pairs of runs.",
        "MLP outputs restored at the last subject token, clean into corrupt: single layers and "
        "windows of adjacent layers together.",
        "STR: another subject of as many tokens. "
        f"GN: the subject's embeddings get {setting.noise}.",
        SCALES,
        published.applies(name, setting.model)[1],
    )


def layers(size: int) -> str:
    """How many layers, in words."""
    return "1 layer" if size == 1 else f"{size} layers"


def _times(found: Mapping[str, Results], metric: str, size: int) -> float:
    """How many times higher the peak is under GN."""
    token, noise = (mlps.peaks(found[c], metric, size)[0].height for c in ("STR", "GN"))
    return noise / token if token else float("nan")


def _peak_table(found: Mapping[str, Results], sizes: Sequence[int]) -> Table:
    rows = []
    for metric in METRICS:
        for size in sizes:
            peaks = {c: mlps.peaks(results, metric, size)[0] for c, results in found.items()}
            rows += [
                (
                    NAMES[metric],
                    layers(size),
                    corruption,
                    str(peak),
                    f"{peak.deviations:.1f}",
                    number(peak.past_first),
                    f"{_times(found, metric, size):.2f}" if corruption == "GN" else "",
                )
                for corruption, peak in peaks.items()
            ]
    columns = ("metric", "window", "corruption", "peak at layers", "SD above the mean")
    more = ("peak without layer 0", "GN / STR")
    return Table("Peaks at the last subject token", (*columns, *more), tuple(rows))


def _peak_findings(found: Mapping[str, Results], size: int) -> Iterator[Finding]:
    said, alone = [], []
    for metric in SHOWN:
        peaks = {c: mlps.peaks(results, metric, size)[0] for c, results in found.items()}
        shown = (f"{c} {peak} ({peak.deviations:.1f} SD)" for c, peak in peaks.items())
        said.append(f"{NAMES[metric]}: {', '.join(shown)}")
        alone.append(peaks["GN"].deviations > 2 >= peaks["STR"].deviations)
    yield Finding(
        "GN shows a peak (in GPT-2 XL around layer 16) that STR does not show (here: 2 SD above "
        "the mean over layers)",
        f"facts, windows of {size}",
        "; ".join(said),
        all(alone),
    )
    times = {metric: _times(found, metric, size) for metric in SHOWN}
    yield Finding(
        "peaks under GN are 2 to 5 times higher than under STR",
        f"facts, windows of {size}",
        ", ".join(f"{NAMES[metric]} {value:.2f} times" for metric, value in times.items()),
        all(2 <= value <= 5 for value in times.values()),
    )


EXPERIMENT = Experiment(
    NAME,
    "facts: MLPs by corruption, window and metric",
    "Zhang & Nanda 2023, facts, §4.1",
    16,
    run,
)
