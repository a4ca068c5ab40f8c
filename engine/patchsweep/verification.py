"""Are results true? Some of their cells again, as full forwards through nnsight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep import results as results_of
from patchsweep.append import cut
from patchsweep.backends import through_nnsight
from patchsweep.errors import BadInput
from patchsweep.exactness import exactly
from patchsweep.interventions import ROTATED, Interventions
from patchsweep.model import Model, load_model
from patchsweep.paths import found as whereabouts
from patchsweep.paths import shortened
from patchsweep.plan import Ints, Plan, Wave
from patchsweep.planning import load_autoencoder, plan_sweep
from patchsweep.prepare import digest, files_of, prepare
from patchsweep.results import Results
from patchsweep.schedule import Schedule, make_schedule
from patchsweep.sites import RUN, SETS
from patchsweep.spec import Sweep, parse_settings
from patchsweep.stacked import only
from patchsweep.store import stored_pairs
from patchsweep.wave import values_of_rows

# Largest difference of two ways to compute the same, as a share of the value where that is above 1.
TOLERANCE = {"float64": 1e-6, "float32": 2e-4, "float16": 5e-2, "bfloat16": 2e-1}
STEPS = ("rank", "accuracy")  # these may differ by one where two tokens are as likely


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
    results: Results | str | Path, cells: int = 20, model: Model | str | None = None, seed: int = 0
) -> Verified:
    """Run some random cells that are no structural ones again and compare.

    Every metric of every chosen cell is compared. `model`, or a name to load it by, is needed only
    where what the results say leads to none: paths are from the working directory on. BadInput for
    another model than the results', for files of vectors, means, probes or an autoencoder that have
    changed, and where there is nothing to compare.
    """
    for name, given, least in (("cells", cells, 1), ("seed", seed, 0)):
        if given < least:
            raise BadInput(f"{name} is {given}: use a whole number, at least {least}")
    found = results if isinstance(results, Results) else results_of.open(results)
    attrs = found.attrs
    said = attrs["spec"]
    said = shortened(said, whereabouts)
    settings = parse_settings({k: v for k, v in said.items() if k in Sweep.model_fields})
    if not isinstance(model, Model):
        model = load_model(model or _model_of(attrs), attrs["model_dtype"])
    if model.fingerprint != attrs["model_fingerprint"]:
        raise BadInput(f"{found.path} holds the results of another model: give that one")
    sae = load_autoencoder(settings)
    pairs = stored_pairs(found.store)
    plan = plan_sweep(
        model.dimensions,
        pairs,
        settings,
        model.device,
        attrs["token_budget"],
        sae,
        cut=cut(found.store, len(pairs)),
    )
    if plan.hash != attrs["plan_hash"]:
        other = "with another autoencoder, or " if sae else ""
        raise BadInput(
            f"{found.path} was planned {other}by another version of patchsweep, "
            f"{attrs['versions']['patchsweep']}: verify it with that one"
        )

    with (
        exactly(model.device),
        through_nnsight(model, plan, settings, "asked for") as (backend, carry),
    ):
        carry.check(plan.layouts, (), settings.metrics)
        left_out = _left_out(plan, carry)
        chosen = _drawn(found, plan, cells, seed, {*left_out, *([SETS] if left_out else [])})
        values = prepare(backend.forward, plan, settings, model.tokenizer, sae, carry)
        files = files_of(settings)
        if files and digest(values, plan, model.tokenizer) != attrs["values"]:
            raise BadInput(
                f"{found.path}: a file that it was made with is not what it was then, "
                f"{' or '.join(files)}: put that back"
            )
        worst = dict.fromkeys(found.metrics, 0.0)
        for wave, drawn in chosen:
            schedule = make_schedule(plan, wave)
            rows = np.concatenate([_rows(schedule, *some) for some in drawn])
            found_again = values_of_rows(
                backend.forward, plan, wave, only(schedule, rows), settings.metrics, values, carry
            )
            again = found_again.result()
            for name in found.metrics:
                stored = np.concatenate([_block(found, wave, n, name)[cell] for n, cell in drawn])
                apart = _apart(name, again[name][-len(rows) :], stored)
                worst[name] = float(np.maximum(worst[name], apart.max()))
    count = sum(len(cell) for _, drawn in chosen for _, cell in drawn)
    return Verified(count, worst, TOLERANCE[attrs["model_dtype"]], left_out)


def _model_of(attrs: Mapping[str, Any]) -> str:
    """What to load the model of results by. BadInput if that is a name without its folder."""
    name: str = attrs["spec"].get("model") or attrs["model"]
    here = whereabouts(name)
    if here != name and not Path(here).exists():
        raise BadInput(
            f"the results say their model's name alone, {here}, which is not in the working "
            "directory: say where it is with --model"
        )
    return here


def _left_out(plan: Plan, carry: Interventions) -> tuple[str, ...]:
    """The components that nnsight cannot patch here."""
    patched = plan.layouts.patched([name for name in plan.grids if name != SETS])
    rotated = any(s.kind in ROTATED for s in plan.sources)
    return tuple(
        c
        for c in patched
        if carry.lacks(plan.layouts, c) or (rotated and c in ("head_q", "head_k"))
    )


def _apart(
    name: str, again: NDArray[np.floating], stored: NDArray[np.floating]
) -> NDArray[np.floating]:
    """How far values of a metric are apart, as a share of those above 1; NaN where only one of two
    is a number."""
    size = np.maximum(1, np.abs(stored))
    with np.errstate(invalid="ignore"):  # what is infinite in one of them is NaN
        apart = np.abs(again - stored) / size
    if name.startswith(STEPS):
        apart = np.maximum(apart - 1 / size, 0)
    equal = (again == stored) | (np.isnan(again) & np.isnan(stored))
    return np.where(equal, 0, apart)


Cells = tuple[int, Ints]  # a block's number in its wave, cells as flat indices into the block


def _drawn(
    found: Results, plan: Plan, cells: int, seed: int, without: set[str]
) -> list[tuple[Wave, list[Cells]]]:
    """Cells that were run, each as likely as any other, by wave and block."""
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
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(cells, total), replace=False))
    block = np.searchsorted(counts, drawn, side="right")
    by_wave: dict[int, tuple[Wave, list[Cells]]] = {}
    for i in np.unique(block):
        wave, number = where[i]
        mine = drawn[block == i] - counts[i]  # from the end
        by_wave.setdefault(wave.index, (wave, []))[1].append(
            (number, _run(found, wave, number)[mine])
        )
    return list(by_wave.values())


def _run(found: Results, wave: Wave, number: int) -> Ints:
    """The cells of a block that were run, as flat indices into it."""
    name = f"{found.metrics[0]}_status"
    return np.flatnonzero(np.isin(_block(found, wave, number, name), RUN))


def _rows(schedule: Schedule, number: int, cell: Ints) -> Ints:
    """The runs of some cells of a block, in the order of the cells."""
    mine = np.flatnonzero(schedule.runs.block == number)
    order = np.argsort(schedule.runs.cell[mine])
    return mine[order[np.searchsorted(schedule.runs.cell[mine], cell, sorter=order)]]


def _block(found: Results, wave: Wave, number: int, name: str) -> NDArray[np.generic]:
    block = wave.blocks[number]
    region = block.region(found.store.grids[block.component])
    return found.store.read(f"{block.component}/{name}", region).ravel()
