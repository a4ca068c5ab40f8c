"""Edges that are run, without a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import patchsweep as ps
from inputs import Letters
from patchsweep.engine.planning import plan_sweep
from patchsweep.engine.prepare import prepare
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import take_apart
from patchsweep.passes.wave import run_wave
from patchsweep.plan import Plan
from patchsweep.sites import EDGES, Node, Status
from patchsweep.spec import parse_settings


@dataclass(frozen=True, eq=False)
class Ran:
    """What was found, by metric: values and statuses [direction, source, sample, pair, position,
    receiver, sender], baselines [source, run = clean, corrupt; sample; pair]."""

    plan: Plan
    values: dict[str, NDArray[Any]]
    status: dict[str, NDArray[np.uint8]]
    baseline: dict[str, NDArray[Any]]

    @property
    def senders(self) -> list[Node]:
        assert self.plan.layouts.edges is not None
        return self.plan.layouts.edges.senders

    @property
    def receivers(self) -> list[Node]:
        assert self.plan.layouts.edges is not None
        return self.plan.layouts.edges.receivers

    def changes(self, metric: str = "logit_diff") -> NDArray[Any]:
        """patched − destination, 0 where nothing can differ, NaN where there is no edge."""
        clean = [d == "noise" for d in self.plan.directions]
        ends = np.stack([self.baseline[metric][:, 0 if c else 1] for c in clean])
        moved = self.values[metric] - ends[..., None, None, None]
        return np.where(self.status[metric] == Status.STRUCTURAL, 0, moved)


def ran(hf_model: Any, pairs: Sequence[Pair], edges: Any = "exact", **settings: Any) -> Ran:
    """All edges of some pairs. Waves of one mlp_out grid are beside them."""
    given = {"components": ["mlp_out"], "positions": "all", "direction": "both", "edges": edges}
    parsed = parse_settings(given | {"token_budget": 2000, **settings})
    model = ps.wrap(hf_model, Letters())
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device)
    shape = plan.grids[EDGES].shape
    columns = [m.column for m in parsed.metrics]
    values = {c: np.full(shape, np.nan) for c in columns}
    status = {c: np.zeros(shape, np.uint8) for c in columns}
    ends = {c: np.full((shape[1], 2, *shape[2:4]), np.nan) for c in columns}
    lengths = (plan.layouts.longest, plan.layouts.shortest)
    with attention_is(hf_model), torch.no_grad():
        forward = take_apart(hf_model, *lengths)
        prepared = prepare(forward, plan, parsed, Letters(), None)
        for wave in plan.waves:
            found = run_wave(forward, plan, wave, parsed.metrics, prepared)
            for c in columns:
                pairs_of = slice(wave.pairs.start, wave.pairs.stop)
                ends[c][wave.source, :, wave.sample, pairs_of] = found.baseline[c]
                for block, value, state in found.blocks:
                    if block.component == EDGES:
                        values[c][block.region(plan.grids[EDGES])] = value[c]
                        status[c][block.region(plan.grids[EDGES])] = state[c]
    return Ran(plan, values, status, ends)
