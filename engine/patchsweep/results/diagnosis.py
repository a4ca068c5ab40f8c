"""What a reader of results must know before believing them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep import diagnostics
from patchsweep.results.effects import Effects, layer_parts
from patchsweep.sites import RUN, SETS, Status
from patchsweep.spec import INNER
from patchsweep.store import EDGES


class Diagnosed(Effects):
    """Warnings: what is not done, not finite, or not what it seems."""

    @cached_property
    def inner_metrics(self) -> list[str]:
        """The metrics that read inside the model: their cells are not about the answer."""
        said = self.attrs["spec"].get("metrics", [])
        return [
            m
            for m, given in zip(self.metrics, said, strict=False)
            if set(given) & INNER and isinstance(given, dict)
        ]

    def warnings(self) -> list[str]:
        """What a reader of these results must know: one line each."""
        out = []
        if not self.store.vouched:
            out.append(
                "of an older version, which notices less of what is damaged: --resume takes it over"
            )
        for name in self.components:
            done = self.store.done(name)
            if not done.all():
                missing = int((~done).sum())
                out.append(
                    f"{name}: {missing} of {done.size} blocks not done: continue with --resume"
                )
        if self.store.estimators and (missing := self._missing(self.store.estimated())):
            out.append(f"estimates of {_count(missing, 'pair')} not done: continue with --resume")
        if self.attrs.get(EDGES) and (missing := self._missing(self.store.scored())):
            out.append(f"edges of {_count(missing, 'pair')} not scored: continue with --resume")
        for name in self.components:
            for metric in self.metrics:
                bad = self.counts(name, metric)[Status.NOT_FINITE]
                if bad:
                    out.append(f"{name}: {metric} is not finite in {_count(bad, 'cell')}")
        return [*out, *_diagnose(self)]

    def _missing(self, done: NDArray[np.bool_]) -> int:
        """How many pairs have something that is not done [source, sample, pair] yet."""
        sources = self.attrs["sources"]
        missing = [~of[: said["samples"]].all(0) for of, said in zip(done, sources, strict=True)]
        return int(np.any(missing, axis=0).sum())


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _diagnose(results: Diagnosed) -> list[str]:
    """What the diagnostics say of every component and direction, by the first source."""
    lines: list[str] = []
    ends = {m: results.baseline(m)[:, 0].mean(1) for m in results.metrics}
    for metric, (clean, corrupt) in ends.items():
        if results.normalised(0):
            lines += diagnostics.small_denominators(clean - corrupt, metric)
        for direction in results.grid(results.components[0]).directions:
            if metric.startswith(("prob", "logprob")) and not metric.startswith("prob_diff"):
                destination = corrupt if direction == "denoise" else clean
                lines += diagnostics.saturated(metric, destination, direction)
    for component in results.components:
        for direction in results.grid(component).directions:
            said = _diagnose_cells(results, component, direction)
            lines += [f"{component}, {direction}: {line}" for line in said]
        if results.grid(component).directions == ("denoise", "noise"):
            metric = results.metrics[0]
            denoise, noise = (results.effect(component, metric, d) for d in ("denoise", "noise"))
            if component != SETS:
                said = diagnostics.and_or(denoise, noise, results.cell_namer(component))
                lines += [f"{component}: {line}" for line in said]
    return lines


def _diagnose_cells(results: Diagnosed, component: str, direction: str) -> list[str]:
    """The diagnoses of one component in one direction."""
    lines: list[str] = []
    name, grid = results.cell_namer(component), results.grid(component)
    outcomes = [m for m in results.metrics if m not in results.inner_metrics]
    effects = {m: results.effect(component, m, direction) for m in outcomes}
    run = np.zeros((grid.layers, grid.units, len(grid.positions)), np.bool_)
    for metric in outcomes:
        floor = results.noise_floor(metric)[int(direction == "denoise"), 0, 0]
        runs = changed = under = 0
        for part in layer_parts(grid):
            region = (grid.directions.index(direction), 0, 0, slice(None), part)
            status = results.store.read(f"{component}/{metric}_status", region)
            ran = np.isin(status, RUN)
            size = np.abs(results.changes(component, metric, direction, None, part)[0])
            runs += int(ran.sum())
            changed += int((ran & (size > 0)).sum())
            under += int((ran & (size <= floor[:, None, None, None])).sum())
            run[part] |= ran.any(0)
        if metric.startswith(("rank", "accuracy")):
            lines += diagnostics.never_changed(metric, changed, runs)
        else:
            highest = float(np.nanmax(floor, initial=0.0))
            lines += diagnostics.below_noise(metric, under, runs, highest)
    if component != SETS:
        lines += diagnostics.disagreement(effects, run, name)
        if outcomes:
            lines += diagnostics.negative(effects[outcomes[0]], name)
        joint = results.attrs.get("joint", {}).get(component, {}).get(direction)
        if joint:
            lines += diagnostics.backup(joint["joint"], joint["singles"], direction)
    return lines
