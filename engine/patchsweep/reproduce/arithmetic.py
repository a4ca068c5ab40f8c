"""Two-shot arithmetic: MLPs at the last token by corruption, and what dominates the metric of
Stolfo et al. (App. C)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchsweep.reproduce import mlps, published
from patchsweep.reproduce.experiment import (
    Experiment,
    Finding,
    Report,
    Setting,
    Table,
    baselines,
    saturated,
)
from patchsweep.reproduce.heads import METRICS, NAMES, SCALES
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Results
from patchsweep.tasks import OPERATIONS

NAME = "arithmetic"
RELATIVE = "relative_prob"
SHARPER = 1.1  # a peak is sharper that stands out so many times more
DOMINANT = 0.9  # of the metric
LITTLE = ", not decided: the corruption takes less than half of the logit difference"


def run(setting: Setting) -> Report:
    """MLPs at the last token, restored under STR and GN, for three operations."""
    found = {operation: _sweeps(setting, operation) for operation in OPERATIONS}
    flat = {(operation, c): results for operation, by in found.items() for c, results in by.items()}
    terms = {operation: _terms(by["STR"]) for operation, by in found.items()}
    title = "Arithmetic: MLPs at the last token by corruption"
    curves = {
        (corruption, metric): [
            mlps.Curve(operation, mlps.by_window(by[corruption], metric, 1)[0], 1)
            for operation, by in found.items()
        ]
        for corruption in ("STR", "GN")
        for metric in METRICS
    }
    by_name = {", ".join(names): results for names, results in flat.items()}
    under = "mlp_out restored at the last token"
    return Report(
        title,
        (
            f"Model: {setting.subject}, of each operation.",
            "Two-shot problems whose result the model puts above that of the corrupt problem.",
            "Single MLP outputs restored at the last token, clean into corrupt.",
            f"STR: another last problem. GN: the embeddings of its operands get {setting.noise}.",
            SCALES,
            "Sharpness of a peak: how many standard deviations it lies above the mean over layers.",
            published.applies(NAME, setting.model)[1],
            *saturated(by_name),
        ),
        (baselines(by_name, METRICS), _peak_table(found), _term_table(terms)),
        {"layers": mlps.figure((title, *setting.caption, under), curves)},
        sure(_findings, flat, setting.n),
    )


def _findings(flat: Mapping[tuple[str, str], Results], _: Sequence[int]) -> Iterator[Finding]:
    found = {operation: {c: flat[operation, c] for c in ("STR", "GN")} for operation in OPERATIONS}
    yield from _peak_findings(found)
    yield _term_finding({operation: _terms(by["STR"]) for operation, by in found.items()}, found)


def _broken(results: Results) -> bool:
    """Whether the corruption takes more than half of the clean run's logit difference."""
    clean, corrupt = results.baseline("logit_diff").mean((1, 2, 3))
    return bool(corrupt < clean / 2)


def _sweeps(setting: Setting, operation: str) -> dict[str, Results]:
    pairs = setting.pairs("arithmetic", only_correct=True, operation=operation)
    labels = dict.fromkeys(name for pair in pairs for name in pair.labels)
    return mlps.sweeps(
        setting,
        operation,
        pairs,
        [name for name in labels if name != "END"],
        positions=["END"],
        metrics=[*METRICS, RELATIVE],
    )


@dataclass(frozen=True)
class Terms:
    """The metric of Stolfo et al. at the layer of its largest mean effect, mean over pairs: half of
    P(answer) / P*(answer) − 1, half of P*(wrong) / P(wrong) − 1, the first term's share of both
    (sizes, mean over pairs), and the median of P*(answer), the corrupt run's."""

    layer: int
    answer: float
    wrong: float
    share: float
    corrupt: float


def _terms(results: Results) -> Terms:
    whole = results.changes("mlp_out", RELATIVE, "denoise")[0][:, :, 0, 0]  # [pair, layer]
    corrupt = results.baseline("prob")[1, 0, 0]
    gain = results.changes("mlp_out", "prob", "denoise")[0][:, :, 0, 0] / corrupt[:, None]
    layer = int(whole.mean(0).argmax())
    first = gain[:, layer] / 2
    second = whole[:, layer] - first
    sizes = [float(np.abs(term).mean()) for term in (first, second)]
    return Terms(
        layer,
        float(first.mean()),
        float(second.mean()),
        sizes[0] / sum(sizes),
        float(np.median(corrupt)),
    )


def _peak_table(found: Mapping[str, Mapping[str, Results]]) -> Table:
    rows = []
    for metric in METRICS:
        for operation, by in found.items():
            for corruption, results in by.items():
                peak = mlps.peaks(results, metric, 1)[0]
                sharp = f"{peak.deviations:.2f}"
                rows.append((NAMES[metric], operation, corruption, str(peak), sharp))
    columns = ("metric", "operation", "corruption", "peak at layer", "SD above the mean")
    return Table("Peaks at the last token", columns, tuple(rows))


def _peak_findings(found: Mapping[str, Mapping[str, Results]]) -> Iterator[Finding]:
    for operation, by in found.items():
        sharp = {c: mlps.peaks(r, "logit_diff", 1)[0].deviations for c, r in by.items()}
        times = sharp["STR"] / sharp["GN"] if sharp["GN"] else float("inf")
        equal = operation == "multiplication"
        holds = 1 / SHARPER <= times <= SHARPER if equal else times > SHARPER
        broken = all(map(_broken, by.values()))
        yield Finding(
            f"{operation}: STR is {'as sharp as' if equal else 'sharper than'} GN (here: the peak "
            f"stands out {'up to' if equal else 'more than'} {SHARPER:g} times as far)",
            "App. C",
            f"logit difference: STR {sharp['STR']:.2f} SD, GN {sharp['GN']:.2f} SD above the mean "
            f"over layers{'' if broken else LITTLE}",
            holds if broken else None,
        )


def _term_table(terms: Mapping[str, Terms]) -> Table:
    rows = tuple(
        (
            operation,
            str(t.layer),
            f"{t.answer:.4g}",
            f"{t.wrong:.4g}",
            f"{t.share:.1%}",
            f"{t.corrupt:.2g}",
        )
        for operation, t in terms.items()
    )
    columns = ("operation", "layer", "term of the answer", "term of the wrong result")
    more = ("share of the first", "median P*(answer)")
    return Table(
        "The metric of Stolfo et al. under STR, where it is largest", (*columns, *more), rows
    )


def _term_finding(
    terms: Mapping[str, Terms], found: Mapping[str, Mapping[str, Results]]
) -> Finding:
    broken = {op: _broken(by["STR"]) for op, by in found.items()}
    said = (
        f"{op} {t.share:.1%} (P* {t.corrupt:.2g}{'' if broken[op] else LITTLE})"
        for op, t in terms.items()
    )
    large = [t.share > DOMINANT for op, t in terms.items() if broken[op]]
    return Finding(
        "the metric of Stolfo et al. is dominated by its first term, as the corrupt run's "
        f"probability of the answer is tiny (here: more than {DOMINANT:.0%} of both)",
        "App. C, equation 2",
        "share of the first term, and the median probability: " + "; ".join(said),
        all(large) if large else None,
    )


EXPERIMENT = Experiment(
    NAME,
    "arithmetic: MLPs at the last token by corruption",
    "Zhang & Nanda 2023, App. C",
    16,
    run,
)
