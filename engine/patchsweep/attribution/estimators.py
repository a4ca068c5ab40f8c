"""Which estimator a component has, and what cannot be estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from patchsweep.errors import BadInput
from patchsweep.passes import DIVERGENCES
from patchsweep.sites import EDGES, Direction, component
from patchsweep.spec import INNER, Mean, Metric, Prefilter, Sweep, Vector

# What each computes is said in `estimate.estimate_pairs`.
Estimator = Literal["atp", "atp_qk", "atp_star", "relp", "ig"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

# The most faithful one of each component, in the papers or as measured (docs/attribution.md).
DEFAULT: dict[str, Estimator] = {
    "embed": "relp",
    "resid_pre": "relp",
    "resid_mid": "relp",
    "resid_post": "relp",
    "attn_out": "atp",
    "mlp_out": "relp",
    "head_q": "atp_qk",
    "head_k": "atp_qk",
    "head_v": "atp",
    "head_pattern": "atp_qk",
    "neuron": "atp",
    "sae_feature": "relp",
    "head_z": "atp",
}
THROUGH_PATTERNS = ("head_q", "head_k", "head_pattern")
NO_GRADIENT = ("rank", "accuracy")


def chosen(settings: Sweep) -> dict[str, str]:
    """The estimator of every component that a sweep estimates, in the sweep's order; none without
    `estimate` or `prefilter`. BadInput for what has no estimate, also for a backend that makes
    none."""
    given, components = settings.estimate, settings.components
    key = "prefilter" if settings.prefilter else "estimate"
    if settings.prefilter:
        given = settings.prefilter.estimator
    if given is False:
        return {}
    if not components:
        raise BadInput(f"{key}: sets have no estimates: name components, or leave {key} out")
    if isinstance(given, dict):
        if strange := [name for name in given if name not in components]:
            raise BadInput(
                f"{key}: {strange[0]} is not patched: add it to components or leave it out"
            )
        estimators = {name: given[name] for name in components if name in given}
    elif given is True:
        estimators = {name: DEFAULT[name] for name in components}
    else:
        estimators = dict.fromkeys(components, given)
    try:
        check(estimators, settings.metrics, settings.directions)
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from error
    if settings.backend == "nnsight":
        raise _not_on("it is asked for")
    return estimators


def check_edges(settings: Sweep) -> None:
    """BadInput for edges that cannot be scored, or run, and for paths that cannot be run: of which
    metric, source and backend."""
    if by := settings.edges and settings.edges.estimator:
        # Between two runs a divergence has a gradient.
        directions = settings.directions if by == "eap" else ()
        try:
            check({}, settings.metrics, directions)
        except BadInput as error:
            raise BadInput(f"edges: {error}") from error
    for what, how in _ends(settings).items():
        if what == "paths" or not scored(settings):
            _check_reads(settings, what)
        for name, given in settings.sources:
            if name == "zero" or isinstance(given, Mean | Vector):
                raise BadInput(
                    f"{what}: source {name} has no run that senders could be taken from: use other "
                    f"or resample, or leave {what} out"
                )
        if settings.backend == "nnsight":
            raise _not_on("it is asked for", how, what)


def _ends(settings: Sweep) -> dict[str, str]:
    """Of what a sweep does between senders and receivers, the key, and how a line speaks of it."""
    edges = "scores of edges are not made" if scored(settings) else "edges are not run"
    found = {"edges": edges} if settings.edges else {}
    return found | ({"paths": "paths are not run"} if settings.paths else {})


def _check_reads(settings: Sweep, what: str) -> None:
    """BadInput for metrics that read what no edge leads to: the residual stream, or an MLP
    inside."""
    for m in settings.metrics:
        at = settings.sae.at if settings.sae else ""
        place = {"probe": m.component, "sae_feature": at}.get(m.name, m.name)
        if m.name in INNER and place in ("resid_pre", "resid_mid", "resid_post", "neuron"):
            where = "inside an MLP" if place == "neuron" else "in the residual stream"
            raise BadInput(
                f"{what}: {m.column} is read {where}, where no {what[:-1]} ends: leave it out, or "
                "read queries, keys, values, patterns, z or what attention and MLPs put out"
            )


def check_weights(settings: Sweep, hf_model: nn.Module) -> None:
    """BadInput where autograd cannot follow what is computed with a model's weights."""
    edges = settings.edges is not None and settings.edges.estimator
    if not (settings.estimate or settings.prefilter or edges):
        return
    if any(p.is_inference() for p in hf_model.parameters()):
        raise BadInput(
            "estimates and edges need gradients, and this model's weights were made inside "
            "torch.inference_mode(): load or build the model outside it"
        )


def chosen_with_edges(settings: Sweep) -> dict[str, str]:
    """The same as `chosen`, with edges, if a prefilter chooses among them."""
    edges = settings.edges
    own = {EDGES: str(edges.estimator)} if edges and edges.prefilter else {}
    return chosen(settings) | own


def prefilter_of(settings: Sweep, name: str) -> Prefilter | None:
    """What chooses among the cells of a component, or among edges."""
    if name == EDGES:
        return settings.edges.prefilter if settings.edges else None
    return settings.prefilter


def scored(settings: Sweep) -> bool:
    """Whether edges are scored, and not run."""
    return settings.edges is not None and not settings.edges.exact


def check_backend(settings: Sweep, record: Mapping[str, Any]) -> None:
    """BadInput where a sweep with estimates or edges runs through nnsight after all; `record` says
    why it does (`backends.Backend`)."""
    if record["backend"] == "nnsight":
        reason = record["backend_reason"]
        if chosen(settings):
            raise _not_on(reason)
        for what, how in _ends(settings).items():
            raise _not_on(reason, how, what)


def _not_on(
    reason: str, how: str = "estimates are not made", keys: str = "estimate and prefilter"
) -> BadInput:
    """What is said where a sweep runs through nnsight, for this reason."""
    return BadInput(f"{how} through nnsight ({reason}): leave {keys} out, or use the wavefront")


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
