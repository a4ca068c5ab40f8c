"""The cells of largest effect, patched together in one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from patchsweep import attribution
from patchsweep.engine.planning import site_of
from patchsweep.engine.splitting import Launch, Splitting
from patchsweep.plan import Plan, make_plan
from patchsweep.results import Results
from patchsweep.sites import COMPONENTS, Direction, Site
from patchsweep.spec import Sweep

JOINT = 10  # cells


def joint_effects(launch: Launch, plan: Plan, settings: Sweep, results: Results) -> dict[str, Any]:
    """Per component and direction, one run more: the cells of largest effect that are one position
    in every pair, patched together, by the first metric and source; its effect beside theirs alone.
    Not of the residual stream: what is patched low in it is there again above."""
    found: dict[str, Any] = {}
    metric = settings.metrics[0]
    ran = [c for c in settings.components if COMPONENTS[c].enters != "stream"]
    if settings.prefilter is None:
        ran = [c for c in ran if c not in attribution.chosen(settings)]
    for name in ran:
        for direction in plan.directions:
            top = results.top_sites(name, metric.column, direction, JOINT, len(plan.pairs))
            if len(top) < 2:
                continue
            sites = [site_of(name, cell) for cell in top]
            effect = _effect_of_set(launch, plan, settings, sites, direction)
            singles = [cell.effect for cell in top]
            if not math.isfinite(effect):
                continue
            entry = {"sites": list(map(str, sites)), "joint": effect, "singles": singles}
            found.setdefault(name, {})[direction] = entry
    return found


def _effect_of_set(
    launch: Launch, plan: Plan, settings: Sweep, sites: Sequence[Site], direction: Direction
) -> float:
    """The effect over all pairs of patching some sites together: of the first metric and source."""
    alone = settings.model_copy(
        update={
            "components": (),
            "windows": (),
            "circuit": None,
            "sets": {"joint": tuple(sites)},
            "direction": direction,
            "metrics": settings.metrics[:1],
        }
    )
    one = make_plan(plan.pairs, alone, plan.dimensions, plan.token_budget, plan.layouts.features)
    moved = span = 0.0
    # How a wave of these is split is not kept: they are done in one go, after all others.
    splitting = Splitting(launch, one, alone.metrics, lambda _: 0, lambda *_: None)
    for wave in one.waves:
        if wave.source or wave.sample:
            continue
        result = splitting.begin(wave)()
        [(column, (clean, corrupt))] = result.baseline.items()
        destination, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        moved += sum(float(found[column].sum()) for _, found, _ in result.blocks)
        moved -= float(destination.sum())
        from_run = one.sources[0].kind == "run"
        span += float((source - destination).sum()) if from_run else len(destination)
    return moved / span if span else float("nan")
