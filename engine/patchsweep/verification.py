"""Are results true? Some of their cells again, as full forwards through nnsight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchsweep import results as results_of
from patchsweep.append import cut
from patchsweep.backends import through_nnsight
from patchsweep.errors import BadInput
from patchsweep.exactness import exactly
from patchsweep.interventions import ROTATED, Interventions
from patchsweep.loading import PACKAGED
from patchsweep.metrics import Function, given_functions
from patchsweep.model import Model, load_model
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
    results: Results | str | Path,
    cells: int = 20,
    model: Model | None = None,
    seed: int = 0,
    *,
    trust: bool = False,
    functions: Mapping[str, Function] | None = None,
) -> Verified:
    """Run some random cells that are no structural ones again and compare.

    Every metric of every chosen cell is compared. What results name is not run because they name
    it: their model is given as `model`, unless a package ships it, and the functions of their
    callable metrics as `functions`, by their names package.module:name. With `trust`, for results
    of one's own, both are loaded by those names. BadInput for another model than the results', for
    files of vectors, means, probes or an autoencoder that have changed, and where there is nothing
    to compare.
    """
    for name, given, least in (("cells", cells, 1), ("seed", seed, 0)):
        if given < least:
            raise BadInput(f"{name} is {given}: use a whole number, at least {least}")
    found = results if isinstance(results, Results) else results_of.open(results)
    attrs = found.attrs
    said = attrs["spec"]
    settings = parse_settings({k: v for k, v in said.items() if k in Sweep.model_fields})
    known = dict(functions or {})
    if not trust:
        _check_trusted(found, settings, model is not None, known)
    if model is None:
        model = load_model(said.get("model") or attrs["model"], attrs["model_dtype"])
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
        given_functions(known),
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


def _check_trusted(
    found: Results, settings: Sweep, has_model: bool, functions: Mapping[str, Function]
) -> None:
    """BadInput for what would run because the results name it."""
    name = found.attrs["spec"].get("model") or found.attrs["model"]
    paths = [m.path for m in settings.metrics if m.name == "callable" and m.path not in functions]
    what = ""
    if not has_model and name not in PACKAGED:
        what = f"the model {name!r} (give it with model=)"
    elif paths:
        what = f"the function {paths[0]} (give it with functions=)"
    elif settings.remote:
        what = "remote: true, and would send the prompts to another machine"
    if what:
        raise BadInput(f"{found.path} names {what}: if these results are your own, add --trust")


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
