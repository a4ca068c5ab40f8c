"""Greater-than: the heads that token replacement and noise detect, by metric (Table 3, App. E)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from patchsweep.pairs import Pair
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
from patchsweep.results import Results, counted

NAME = "greater-than"
METRICS = ("logit_diff_sum", "prob", "kl")  # the paper's
MEANS = "logit_diff"


def run(setting: Setting) -> Report:
    """Heads over all positions, the year replaced by 01 or noised, by the paper's three metrics and
    by the logit difference of means."""
    pairs = setting.pairs("greater_than", wrong="below")
    year = [label for label in pairs[0].labels if label.split("_")[0] == "YY"]
    results = {
        corruption: setting.sweep(
            corruption,
            pairs,
            components=["head_z"],
            positions="all",
            metrics=[{"logit_diff": {"reduce": "sum"}}, *METRICS[1:], MEANS],
            corrupt=corrupt,
        )
        for corruption, corrupt in (("STR", "pairs"), ("GN", setting.gaussian(year)))
    }
    every = (*METRICS, MEANS)
    found = heads.all_effects(results, metrics=every)
    lists, applies = published.applies(NAME, setting.model)
    tables = [
        baselines(results, every),
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
            "Right are the two-digit years above the first, wrong those below it (or their tens, "
            "where digits are tokens). Probability is the sum over those that are right; the "
            "paper's logit difference (App. E) the sum of the logits of those that are right less "
            "the sum of the others.",
            unequal(pairs),
            answered(results["STR"]),
            applies,
            *saturated(results),
        ),
        tuple(tables),
        {"heads": heads.figure((title, *setting.caption), found)},
        sure(_findings, results, setting.n),
    )


def unequal(pairs: Sequence[Pair]) -> str:
    """In how many pairs right and wrong years differ in number, and what that does to sums."""
    sizes = [(len(pair.answer), len(pair.wrong)) for pair in pairs]
    differ = sum(right != wrong for right, wrong in sizes)
    right, wrong = (f"{min(side)} to {max(side)}" for side in zip(*sizes, strict=True))
    return (
        f"There are {right} right and {wrong} wrong ones; in {differ} of {counted(len(pairs))} "
        "they differ in number: the difference of sums then also measures what all their logits "
        "have in common. The difference of means, which does not, is beside it."
    )


def _findings(results: Mapping[str, Results], _: Sequence[int]) -> Iterator[Finding]:
    found, paper = heads.all_effects(results, metrics=METRICS), published.lists(NAME)
    yield claims.metrics_agree(found, paper, "Table 3")
    yield claims.only_by_noise(found, paper, METRICS[0], "Table 3")


EXPERIMENT = Experiment(
    NAME,
    "greater-than: heads by corruption and metric",
    "Zhang & Nanda 2023, Table 3, App. E",
    32,
    run,
)
