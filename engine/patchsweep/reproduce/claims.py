"""What the tables of detected heads say, and whether it holds of the heads found here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchsweep.reproduce.experiment import Finding
from patchsweep.reproduce.heads import NAMES, Heads, overlap, text
from patchsweep.reproduce.published import List, ordered


def metrics_agree(found: Sequence[Heads], lists: Sequence[List], where: str) -> Finding:
    """The metrics detect the same heads under STR more than under GN."""
    paper, here = (
        [overlap(side, corruption) for corruption in ("STR", "GN")] for side in (lists, found)
    )
    return Finding(
        "the metrics agree on the detected heads more under STR than under GN (heads in both lists "
        f"/ heads in either: {paper[0]:.2f} against {paper[1]:.2f})",
        f"{where}, our reading",
        f"{here[0]:.2f} against {here[1]:.2f}",
        None if np.isnan(here).any() else here[0] > here[1],
    )


def only_by_noise(
    found: Sequence[Heads], lists: Sequence[List], metric: str, where: str
) -> Finding:
    """GN detects heads by a metric that STR does not detect by it."""
    paper, here = (_extra(side, metric) for side in (lists, found))
    return Finding(
        f"by {NAMES[metric]} GN detects heads that STR does not ({text(paper)})",
        where,
        text(here),
        bool(here),
    )


def one(found: Sequence[Heads], corruption: str, metric: str) -> Heads:
    """The effects of one corruption on one metric."""
    return next(h for h in found if (h.corruption, h.metric) == (corruption, metric))


def _extra(found: Sequence[Heads | List], metric: str) -> tuple[str, ...]:
    by = {h.corruption: h.heads for h in found if h.metric == metric}
    return ordered([*by["GN"] - by["STR"]])
