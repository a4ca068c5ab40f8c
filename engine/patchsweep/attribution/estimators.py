"""Which estimator a component has, and what cannot be estimated. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from patchsweep.errors import BadInput
from patchsweep.metrics import DIVERGENCES
from patchsweep.sites import Direction, component
from patchsweep.spec import Metric

# What each computes is said in `estimate.estimate_pairs`.
Estimator = Literal["atp", "atp_qk", "atp_star", "relp", "ig"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

# The most faithful one of each component in the papers.
DEFAULT: dict[str, Estimator] = {
    "embed": "relp",
    "resid_pre": "relp",
    "resid_mid": "relp",
    "resid_post": "relp",
    "attn_out": "relp",
    "mlp_out": "relp",
    "head_q": "atp_qk",
    "head_k": "atp_qk",
    "head_v": "atp",
    "head_pattern": "atp_qk",
    "neuron": "relp",
    "sae_feature": "relp",
    "head_z": "atp",
}
THROUGH_PATTERNS = ("head_q", "head_k", "head_pattern")
NO_GRADIENT = ("rank", "accuracy")


def check(
    estimators: Mapping[str, str], metrics: Sequence[Metric], directions: Sequence[Direction]
) -> None:
    """BadInput for what has no estimate: `estimators` are by component."""
    for name, estimator in estimators.items():
        component(name)
        if estimator not in ESTIMATORS:
            raise BadInput(f"unknown estimator '{estimator}': use one of {', '.join(ESTIMATORS)}")
        if estimator == "relp" and name in THROUGH_PATTERNS:
            raise BadInput(
                f"relp cannot estimate {name}: its rules hold attention patterns fixed, so every "
                "estimate would be zero; use atp_qk"
            )
    for m in metrics:
        if m.name in NO_GRADIENT:
            raise BadInput(
                f"{m.column} cannot be estimated: it is a count and has no gradient; use logit_diff"
            )
        if m.name in DIVERGENCES and "noise" in directions:
            raise BadInput(
                f"{m.column} cannot be estimated in direction noise: the destination is its "
                "reference, where its gradient is zero; use direction: denoise"
            )
