"""Exact grids and their estimates, and what both cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._machine import timed
from patchsweep import attribution
from patchsweep.attribution import estimators
from patchsweep.device.exactness import deterministic
from patchsweep.engine.loop import sweep
from patchsweep.engine.planning import plan_sweep
from patchsweep.engine.prepare import prepare
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import Forward, take_apart
from patchsweep.passes.values import Values
from patchsweep.plan import Plan
from patchsweep.results import Results
from patchsweep.sites import Status
from patchsweep.spec import Sweep, parse_settings

METRIC = "logit_diff"
Floats = NDArray[np.float64]


def ways(component: str) -> tuple[str, ...]:
    """The estimators that say something of their own about a component, but for ig."""
    if component == "head_pattern":
        return "atp_qk", "atp_star"  # atp takes the change of patterns as it is, too
    if component in estimators.THROUGH_PATTERNS:
        return "atp", "atp_qk", "atp_star"
    return "atp", "relp", "atp_star"


def settings(components: Sequence[str], direction: str) -> Sweep:
    """One metric, one direction, every position."""
    given = {"components": list(components), "metrics": [METRIC], "direction": direction}
    return parse_settings(given)


@dataclass(frozen=True, eq=False)
class Grid:
    """Changes of the metric, patched − destination, [pair, layer, unit, position], NaN at cells
    that need no run."""

    changes: Floats

    @property
    def by_pair(self) -> list[Floats]:
        """[cell] of every pair, those that need a run."""
        return [pair[np.isfinite(pair)] for pair in self.changes]


def swept(
    model: Model,
    pairs: Sequence[Pair],
    components: Sequence[str],
    direction: str,
    out: Path,
    **more: Any,
) -> Results:
    """A sweep into a folder; one that is there already is gone on with."""
    given = settings(components, direction).model_dump(include={"components", "metrics"})
    return sweep(model, pairs, out=out, resume=True, direction=direction, **given, **more)


def exact_grid(results: Results, component: str) -> Grid:
    """What an exact sweep measured."""
    found, status = (results.store.read(f"{component}/{METRIC}{kind}") for kind in ("", "_status"))
    destination, _ = results.ends(METRIC, results.grid(component))
    changes = found - destination[..., None, None, None]
    return Grid(np.where(status == Status.EXACT, changes, np.nan)[0, 0, 0].astype(np.float64))


@dataclass(frozen=True, eq=False)
class Ready:
    """A model that is set to make estimates of a plan's pairs."""

    forward: Forward
    plan: Plan
    given: Sweep
    values: Values

    def estimate(self, how: Mapping[str, str]) -> dict[str, Grid]:
        """By component."""
        parts = [
            attribution.estimate_pairs(
                self.forward, self.plan, pairs, how, self.given.metrics, self.values
            )
            for pairs in attribution.pair_ranges(self.plan, range(len(self.plan.pairs)))
        ]
        return {
            name: Grid(np.concatenate([self._changes(part, name) for part in parts]))
            for name in how
        }

    def _changes(self, found: attribution.Estimates, component: str) -> Floats:
        clean, other = found.baseline[METRIC]
        destination = other if self.plan.directions == ("denoise",) else clean
        changes = found.values[component][METRIC][0, 0, 0] - destination[:, None, None, None]
        ran = found.status[component][METRIC][0, 0, 0] == Status.ESTIMATED
        return np.where(ran, changes, np.nan).astype(np.float64)


@contextmanager
def ready(
    model: Model, pairs: Sequence[Pair], components: Sequence[str], direction: str
) -> Iterator[Ready]:
    """A plan of these pairs, and the model under patchsweep's attention."""
    given = settings(components, direction)
    plan = plan_sweep(model.dimensions, pairs, given, model.device)
    with attention_is(model.hf_model), deterministic(model.device):
        forward = take_apart(model.hf_model, plan.layouts.longest, plan.layouts.shortest)
        values = prepare(forward, plan, given, model.tokenizer, None)
        yield Ready(forward, plan, given, values)


@dataclass(frozen=True)
class Cost:
    """Estimating all cells of one pair: median seconds and FLOPs, and both in forwards: the model's
    own, of both prompts as one batch, logits of the last token alone."""

    estimator: str
    components: tuple[str, ...]
    seconds: float
    flops: int
    in_seconds: float
    in_flops: float


def costs(
    model: Model, pair: Pair, how: Mapping[str, Mapping[str, str]], direction: str, rounds: int
) -> list[Cost]:
    """What the estimators take, by name, each for its components; they take turns."""
    prompts = torch.tensor([pair.clean, pair.corrupt], device=model.device)
    names = list(dict.fromkeys(name for of in how.values() for name in of))

    @torch.no_grad()
    def forward() -> Any:
        return model.hf_model(prompts, use_cache=False, logits_to_keep=1)

    flops: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in ("forward", *how)}
    for turn in range(rounds + 1):  # the first one counts, and is not timed
        take = partial(_take, model.device, flops, times, turn == 0)
        take("forward", forward)
        with ready(model, [pair], names, direction) as made:
            for name, of in how.items():
                take(name, partial(made.estimate, of))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return [
        Cost(
            estimator=name,
            components=tuple(how.get(name, ())),
            seconds=seconds[name],
            flops=flops[name],
            in_seconds=seconds[name] / seconds["forward"],
            in_flops=flops[name] / flops["forward"],
        )
        for name in times
    ]


def _take(
    device: torch.device,
    flops: dict[str, int],
    times: dict[str, list[float]],
    count: bool,
    name: str,
    call: Callable[[], Any],
) -> None:
    """Count a call's FLOPs, or time it."""
    if not count:
        times[name].append(timed(device, call)[0])
        return
    with FlopCounterMode(display=False) as counter:
        call()
    flops[name] = counter.get_total_flops()
