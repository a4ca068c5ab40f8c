"""Greater-than: the heads that token replacement and noise detect, by metric (Table 3)."""

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
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Results

NAME = "greater-than"


def run(setting: Setting) -> Report:
    """Heads over all positions, the year replaced by 01 or noised, by three metrics."""
    pairs = setting.pairs("greater_than")
    year = [label for label in pairs[0].labels if label.split("_")[0] == "YY"]
    results = {
        corruption: setting.sweep(
            corruption,
            pairs,
            components=["head_z"],
            positions="all",
            metrics=list(heads.METRICS),
            corrupt=corrupt,
        )
        for corruption, corrupt in (("STR", "pairs"), ("GN", setting.gaussian(year)))
    }
    found = heads.all_effects(results)
    lists, applies = published.applies(NAME, setting.model)
    tables = [
        baselines(results, heads.METRICS),
        heads.detections("Detected heads, the year corrupted", found),
    ]
    if lists:
        tables.append(heads.against(lists, found, "Against Table 3"))
    title = "Greater-than: heads by corruption and metric"
    return Report(
        title,
        (
            f"Model: {setting.subject}.",
            "Every head patched at all positions at once, clean into corrupt.",
            "STR: the first year's last two digits become 01. "
            f"GN: their embeddings get {setting.noise}.",
            f"{heads.SCALES} {heads.RULE}",
            "Answers are the two-digit years above the first (or their tens, where digits are "
            "tokens): logits are means over them, probabilities sums.",
            answered(results["STR"]),
            applies,
            *saturated(results),
        ),
        tuple(tables),
        {"heads": heads.figure((title, *setting.caption), found)},
        sure(_findings, results, setting.n),
    )


def _findings(results: Mapping[str, Results], _: Sequence[int]) -> list[Finding]:
    found, paper = heads.all_effects(results), published.lists(NAME)
    return [
        claims.metrics_agree(found, paper, "Table 3"),
        claims.only_by_noise(found, paper, "logit_diff", "Table 3"),
    ]


EXPERIMENT = Experiment(
    NAME,
    "greater-than: heads by corruption and metric",
    "Zhang & Nanda 2023, Table 3",
    32,
    run,
)
