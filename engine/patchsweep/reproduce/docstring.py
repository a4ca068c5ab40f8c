"""Docstrings: the heads that are detected, by corruption, metric and position (Table 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchsweep.reproduce import claims, heads, published
from patchsweep.reproduce.experiment import (
    Experiment,
    Finding,
    Report,
    Setting,
    answered,
    baselines,
    saturated,
)
from patchsweep.reproduce.heads import Heads
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Results

NAME = "docstring"
POSITIONS = {"C_def": "C_def", "END": "the last position"}
TABLE = "Table 2"


def run(setting: Setting) -> Report:
    """Heads at C_def and at the last position, C_def replaced or noised, by three metrics."""
    pairs = setting.pairs("docstring", corruption="c_def")
    results = {
        corruption: setting.sweep(
            corruption.lower(),
            pairs,
            components=["head_z"],
            positions=list(POSITIONS),
            metrics=list(heads.METRICS),
            corrupt=corrupt,
        )
        for corruption, corrupt in (("STR", "pairs"), ("GN", setting.gaussian(["C_def"])))
    }
    found = {at: heads.all_effects(results, i) for i, at in enumerate(POSITIONS)}
    lists, applies = published.applies(NAME, setting.model)
    title = "Docstrings: heads by corruption, metric and position"
    tables = [baselines(results, heads.METRICS)]
    for at, called in POSITIONS.items():
        tables.append(heads.detections(f"Detected heads at {called}", found[at]))
        if own := [said for said in lists if said.position == at]:
            tables.append(heads.against(own, found[at], f"Against {TABLE}, {called}"))
    return Report(
        title,
        (
            f"Model: {setting.subject}.",
            "Every head patched at C_def and at the last position, clean into corrupt.",
            "STR: the argument C in the definition becomes a random one. "
            f"GN: its embedding gets {setting.noise}.",
            f"{heads.SCALES} Mean and deviation are over the heads of both positions. {heads.RULE}",
            "Chosen here: the heads that mean and deviation are over; and that the wrong answers "
            "are all other arguments that either prompt names, the logit difference taking the "
            "mean over them.",
            answered(results["STR"]),
            applies,
            "That model is published only in the format of another library, which this one does "
            "not read.",
            *saturated(results),
        ),
        tuple(tables),
        {
            f"heads-{at}": heads.figure((f"{title}: {called}", *setting.caption), found[at])
            for at, called in POSITIONS.items()
        },
        sure(_findings, results, setting.n),
    )


def _findings(results: Mapping[str, Results], _: Sequence[int]) -> tuple[Finding, ...]:
    found = {at: heads.all_effects(results, i) for i, at in enumerate(POSITIONS)}
    paper = {at: [s for s in published.lists(NAME) if s.position == at] for at in POSITIONS}
    return (
        _no_head_by_probability(found["C_def"]),
        _fewer_by_noise(found["C_def"]),
        claims.only_by_noise(
            found["END"], paper["END"], "logit_diff", f"{TABLE}, the last position"
        ),
    )


def _no_head_by_probability(found: Sequence[Heads]) -> Finding:
    detected = {c: claims.one(found, c, "prob").heads for c in ("STR", "GN")}
    return Finding(
        "at C_def probability detects no head, under either corruption",
        f"{TABLE}, our reading",
        "; ".join(f"{c}: {heads.text([*h])}" for c, h in detected.items()),
        not any(detected.values()),
    )


def _fewer_by_noise(found: Sequence[Heads]) -> Finding:
    count = {
        (c, m): len(claims.one(found, c, m).heads)
        for c in ("STR", "GN")
        for m in ("logit_diff", "kl")
    }
    return Finding(
        "at C_def GN detects fewer heads than STR, by logit difference (1 against 3) and by KL "
        "divergence (none against 4)",
        f"{TABLE}, our reading",
        "; ".join(
            f"{heads.NAMES[m]}: GN {count['GN', m]}, STR {count['STR', m]}"
            for m in ("logit_diff", "kl")
        ),
        all(count["GN", m] < count["STR", m] for m in ("logit_diff", "kl")),
    )


EXPERIMENT = Experiment(
    NAME,
    "docstrings: heads by corruption, metric and position",
    "Zhang & Nanda 2023, Table 2",
    16,
    run,
)
