"""Are results true? Some of their cells again, as full forwards through nnsight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchsweep import results as results_of
from patchsweep.backends import through_nnsight
from patchsweep.engine import exactly, load_autoencoder, plan_sweep
from patchsweep.errors import BadInput
from patchsweep.interventions import ROTATED
from patchsweep.model import Model, load_model
from patchsweep.plan import Plan, Wave
from patchsweep.prepare import prepare
from patchsweep.results import Results
from patchsweep.schedule import make_schedule
from patchsweep.sites import SETS, Status
from patchsweep.spec import Sweep, parse_settings
from patchsweep.stacked import only
from patchsweep.wave import values_of_rows

# Largest difference of two ways to compute the same, as a share of the value where that is above 1.
TOLERANCE = {"float64": 1e-6, "float32": 2e-4, "float16": 5e-2, "bfloat16": 2e-1}
STEPS = ("rank", "accuracy")  # these may differ by one where two tokens are as likely
RUN = (Status.EXACT, Status.AUDITED)


@dataclass(frozen=True)
class Verified:
    """What was found: the cells that were run again; the largest difference by metric (of values
    above 1 relative to them), and the tolerance; the components that nnsight cannot patch here."""

    cells: int
    differences: dict[str, float]
    tolerance: float
    left_out: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether no difference exceeds the tolerance; NaN never holds."""
        return all(d <= self.tolerance for d in self.differences.values())


def verify(
    results: Results | str | Path, cells: int = 20, model: Model | None = None, seed: int = 0
) -> Verified:
    """Run some random cells that are no structural ones again and compare.

    Every metric of every chosen cell is compared. `model` is needed only for results of a model
    that has no name to load it by. BadInput for another model than the results', and where there is
    nothing to compare.
    """
    for name, given, least in (("cells", cells, 1), ("seed", seed, 0)):
        if given < least:
            raise BadInput(f"{name} is {given}: use a whole number, at least {least}")
    found = results if isinstance(results, Results) else results_of.open(results)
    attrs = found.attrs
    said = attrs["spec"]
    settings = parse_settings({k: v for k, v in said.items() if k in Sweep.model_fields})
    if model is None:
        model = load_model(said.get("model") or attrs["model"], attrs["model_dtype"])
    if model.fingerprint != attrs["model_fingerprint"]:
        raise BadInput(f"{found.path} holds the results of another model: give that one")
    sae = load_autoencoder(settings)
    pairs = found.store.pairs()
    plan = plan_sweep(model.dimensions, pairs, settings, model.device, attrs["token_budget"], sae)
    if plan.hash != attrs["plan_hash"]:
        raise BadInput(
            f"{found.path} was planned by another version of patchsweep, "
            f"{attrs['versions']['patchsweep']}: verify it with that one"
        )

    patched = plan.layouts.patched([name for name in plan.grids if name != SETS])
    with (
        exactly(model.device),
        through_nnsight(model, plan, settings, "asked for") as (backend, carry),
    ):
        forward = backend.forward
        carry.check(plan.layouts, (), settings.metrics)
        rotated = any(s.kind in ROTATED for s in plan.sources)
        left_out = tuple(
            c
            for c in patched
            if carry.lacks(plan.layouts, c) or (rotated and c in ("head_q", "head_k"))
        )
        without = {*left_out, *([SETS] if left_out else [])}
        chosen = _drawn(found, plan, cells, seed, without)
        values = prepare(forward, plan, settings, model.tokenizer, sae, carry)
        worst = dict.fromkeys(found.metrics, 0.0)
        for wave, some in chosen:
            schedule = make_schedule(plan, wave)
            runs = schedule.runs
            rows = [
                int(np.flatnonzero((runs.block == number) & (runs.cell == cell))[0])
                for number, cell in some
            ]
            part = only(schedule, np.array(rows))
            found_by = values_of_rows(forward, plan, wave, part, settings.metrics, values, carry)
            again = found_by.result()
            for name in found.metrics:
                stored = _stored(found, wave, name, some)
                found_again = again[name][-len(rows) :]
                with np.errstate(invalid="ignore"):  # what is infinite in one of them is NaN
                    apart = np.abs(found_again - stored) / np.maximum(1, np.abs(stored))
                if name.startswith(STEPS):
                    apart = np.maximum(apart - 1 / np.maximum(1, np.abs(stored)), 0)
                equal = (found_again == stored) | (np.isnan(found_again) & np.isnan(stored))
                worst[name] = float(np.maximum(worst[name], np.where(equal, 0, apart).max()))
    return Verified(
        sum(len(some) for _, some in chosen), worst, TOLERANCE[attrs["model_dtype"]], left_out
    )


Chosen = list[tuple[Wave, list[tuple[int, int]]]]  # (block in its wave, cell in its block)


def _drawn(found: Results, plan: Plan, cells: int, seed: int, without: set[str]) -> Chosen:
    """Cells that were run, each as likely as any other, by wave."""
    where = [
        (wave, number)
        for wave in plan.waves
        for number, block in enumerate(wave.blocks)
        if block.component not in without
    ]
    counts = np.cumsum([len(_run(found, wave, number)) for wave, number in where])
    total = int(counts[-1]) if len(counts) else 0
    if not total:
        raise BadInput(f"{found.path} has no cells that could be run again through nnsight")
    drawn = np.random.default_rng(seed).choice(total, min(cells, total), replace=False)
    by_wave: dict[int, tuple[Wave, list[tuple[int, int]]]] = {}
    for i in np.sort(drawn):
        at = int(np.searchsorted(counts, i, side="right"))
        wave, number = where[at]
        known = _run(found, wave, number)
        cell = int(known[i - counts[at]])  # from the end
        by_wave.setdefault(wave.index, (wave, []))[1].append((number, cell))
    return list(by_wave.values())


def _run(found: Results, wave: Wave, number: int) -> NDArray[np.int64]:
    """The cells of a block that were run, as flat indices into it."""
    name = f"{found.metrics[0]}_status"
    return np.flatnonzero(np.isin(_block(found, wave, number, name), RUN))


def _stored(
    found: Results, wave: Wave, metric: str, some: list[tuple[int, int]]
) -> NDArray[np.floating]:
    return np.array([_block(found, wave, number, metric)[cell] for number, cell in some])


def _block(found: Results, wave: Wave, number: int, name: str) -> NDArray[np.generic]:
    block = wave.blocks[number]
    region = block.region(found.store.grids[block.component])
    return found.store.read(f"{block.component}/{name}", region).ravel()
