"""The main loop: plan, self-test, then wave after wave into the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchsweep import attribution
from patchsweep import results as results_of
from patchsweep.backends import Backend, opened, taken
from patchsweep.device import enough_memory, exactly, unreachable
from patchsweep.engine import append as appending
from patchsweep.engine.assembly import Assembly
from patchsweep.engine.doubts import doubts
from patchsweep.engine.joint import joint_effects
from patchsweep.engine.output import (
    check_same_there,
    check_seen,
    check_unchanged,
    found,
    further,
    shared,
    to_replace,
)
from patchsweep.engine.planning import load_autoencoder, plan_sweep
from patchsweep.engine.prepare import digest, prepare
from patchsweep.engine.prompts import build_pairs
from patchsweep.engine.provenance import provenance
from patchsweep.engine.splitting import Launch, Splitting
from patchsweep.errors import BadInput
from patchsweep.model import Model, load_model
from patchsweep.pairs import Pair
from patchsweep.passes import Forward, Values, launch_wave
from patchsweep.plan import Cut, Plan, Wave
from patchsweep.processes import Processes, Progress, alone, job, launched, log, restarted, together
from patchsweep.results import Results
from patchsweep.sae import SAE
from patchsweep.spec import Spec, Sweep, parse_settings
from patchsweep.store import WAVES_SPLIT, Store, background, check_outside, remove, withdraw

T = TypeVar("T")


def run(
    spec: Spec, *, resume: bool = False, overwrite: bool = False, append: bool = False
) -> Results:
    """Do what `spec` says, together with all processes that a launcher has started for it; every
    one returns when all is done. `resume`, `overwrite`, `append`, and BadInput: as in `sweep`;
    BadInput too if `out` is missing from the spec."""
    if spec.out is None:
        raise BadInput("the spec has no out: say where the results go, e.g. out: results/ioi.zarr")
    attribution.chosen(spec)  # says what cannot be estimated before the model is loaded
    attribution.check_edges(spec)
    if spec.offload_folder:
        check_outside(spec.offload_folder / "weights")
    processes = launched()
    model = load_model(
        spec.model,
        spec.dtype,
        processes.device(spec.device),
        max_memory=spec.max_memory,
        offload_folder=spec.offload_folder,
    )
    pairs = build_pairs(spec.prompts, model.tokenizer, model)
    resume = resume or (restarted() and not overwrite)
    return carry_out(
        model,
        pairs,
        spec,
        spec.out,
        resume=resume,
        overwrite=overwrite,
        append=append,
        processes=processes,
    )


def sweep(
    model: Model,
    pairs: Sequence[Pair],
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    append: bool = False,
    **settings: Any,
) -> Results:
    """Patch every cell that `settings` ask for in a `model`, on prompt `pairs`, and write the
    results to `out`, a path or a URL.

    settings are the keys of a spec (see the guide) that say what to patch and measure: components,
    metrics, direction, positions, source and so on. With `resume` a sweep that was interrupted goes
    on; with `overwrite` earlier results are replaced; with `append` they get the further pairs,
    after those that they have, or metrics. BadInput for wrong settings, for results that belong to
    another sweep, and for a model that the self-test refuses. Cells whose metric is not finite are
    marked and counted, not an error.
    """
    said = parse_settings(settings)
    return carry_out(model, pairs, said, out, resume=resume, overwrite=overwrite, append=append)


@together()
def carry_out(
    model: Model,
    pairs: Sequence[Pair],
    settings: Sweep,
    out: str | Path,
    *,
    resume: bool,
    overwrite: bool,
    append: bool = False,
    processes: Processes | None = None,
) -> Results:
    """Run the waves whose blocks are not done yet, or are damaged. The first of the processes says
    what is wrong, creates the results and finishes them; what is between is done by all."""
    processes = processes or alone()
    if missing := unreachable(model.hf_model):
        raise BadInput(f"{model.name} has weights without values, e.g. {missing[0]}: load it whole")
    attribution.check_weights(settings, model.hf_model)
    check_seen(out, processes)
    existing, replaced = None, None
    if processes.first and overwrite:
        replaced = to_replace(out)
    elif processes.first:
        existing = found(out, settings, resume or append, append)
    fingerprint = model.fingerprint
    with exactly(model.hf_model):
        sae = load_autoencoder(settings)
        plan = _planned(model, pairs, settings, sae, existing, append, processes)
    with (
        job(out, processes),
        exactly(model.hf_model),
        enough_memory(),
        opened(model, plan, settings, sae, fingerprint) as backend,
    ):
        if existing:
            check_unchanged(existing)
        if processes.first and overwrite:
            check_same_there(out, replaced)
        attribution.check_backend(settings, backend.record)
        values = prepare(backend.forward, plan, settings, model.tokenizer, sae, backend.carry)
        attrs = _attributes(model, plan, settings, fingerprint, backend, values)
        fill = None
        if existing:
            fill = further(existing, append, plan, settings, attrs, values, model.tokenizer)
            attrs |= appending.described(existing, attrs) if fill else {}
            for damage in withdraw(existing):
                log.warning("done again: %s", damage)
        if fill or not existing:
            attribution.tried(backend.forward, plan, settings, values)
        if processes.first and (fill or not existing):
            attrs["doubts"] = doubts(
                backend.forward, backend.carry, model.tokenizer, plan.pairs, sae
            )
        if replaced is not None:
            remove(out)  # only now can nothing be refused any more
        goes_on = existing if not fill else None
        store = shared(out, goes_on, plan, settings, model, attrs, fill, processes)
        _filled(backend, plan, settings, values, store, processes)
    processes.leave()
    return results_of.open(out)


def _planned(
    model: Model,
    pairs: Sequence[Pair],
    settings: Sweep,
    sae: SAE | None,
    existing: Store | None,
    append: bool,
    processes: Processes,
) -> Plan:
    """The plan, cut as the results that are there; the same in all processes."""
    budget, cut = None, None
    if existing:
        cut = appending.cut(existing, len(pairs))
        if not append or settings.token_budget == "auto":
            budget = existing.attrs["token_budget"]
    if not processes.first:
        budget = processes.told("token_budget")
        cut = Cut(*map(processes.told, ("most", "apart", "blocks")))
    plan = plan_sweep(
        model.dimensions, pairs, settings, model.device, budget, sae, model.offload, cut
    )
    processes.tell("token_budget", plan.token_budget)
    processes.tell("most", cut.most if cut else plan.pairs_per_block)
    processes.tell("apart", cut.apart if cut else 0)
    processes.tell("blocks", plan.chunks.blocks)
    return plan


def _attributes(
    model: Model, plan: Plan, settings: Sweep, fingerprint: str, backend: Backend, values: Values
) -> dict[str, Any]:
    """The root attributes of the results."""
    attrs = provenance(model, plan, settings, fingerprint) | backend.record
    attrs["plan"] = taken(plan, attrs["backend"]).counts()
    attrs["values"] = digest(values, plan, model.tokenizer)
    attrs["noise_scale"] = values.noise_scale
    return attrs


def _filled(
    backend: Backend,
    plan: Plan,
    settings: Sweep,
    values: Values,
    store: Store,
    processes: Processes,
) -> None:
    """Compute and write what is not there yet; returns when nothing is missing."""
    done = {name: store.done(name) for name in plan.grids}
    processes.tell("created", 1)
    plan = _estimated(backend.forward, plan, settings, values, store, processes)
    launch = partial(launch_wave, backend.forward, values=values, carry=backend.carry)
    in_flight = backend.forward.waves_in_flight
    _run_waves(launch, in_flight, plan, settings, store, done, processes)
    with processes.after_first("finished"):
        if processes.first:
            whole = results_of.open(store.path)
            store.set_attrs(joint=joint_effects(launch, plan, settings, whole))


def _estimated(
    forward: Forward,
    plan: Plan,
    settings: Sweep,
    values: Values,
    store: Store,
    processes: Processes,
) -> Plan:
    """Write what is estimated; the plan with only those cells that are run after that, chosen by
    the first process."""
    if attribution.chosen_with_edges(settings):
        attribution.write_estimates(forward, plan, settings, values, store, processes)
        processes.wait("estimated")
        with processes.after_first("chosen"):
            plan = attribution.chosen_cells(plan, settings, store)
            if processes.first:
                store.set_attrs(plan=plan.counts())
    if attribution.scored(settings):
        attribution.write_edges(forward, plan, settings, values, store, processes)
    return plan


def _run_waves(
    launch: Launch,
    in_flight: int,
    plan: Plan,
    settings: Sweep,
    store: Store,
    done: Mapping[str, NDArray[np.bool_]],
    processes: Processes,
) -> None:
    """Compute and write, in order, the waves that are not done and fall to this process; up to
    `in_flight` are launched before the first of them is read, and up to three are in memory to be
    written. Returns when all are written.

    done: which chunks were written before any process began, by component.
    """

    def written(wave: Wave) -> bool:
        return all(done[b.component][chunks[b.component].number(b)] for b in wave.blocks)

    def missing(waves: Sequence[Wave]) -> list[Wave]:
        return [
            w
            for w in waves
            if not written(w) or (w.owner and not store.has_baseline(w.source, w.sample, w.pairs))
        ]

    chunks, assembly = store.grids, Assembly(store, done)
    cells = sum(map(plan.cells_of, plan.waves))
    before = sum(plan.cells_of(w) for w in plan.waves if written(w))
    todo = (wave for unit in processes.claim("waves", plan.units) for wave in missing(unit))
    with Progress(processes, store.path, cells, before) as progress:

        def split(wave: Wave, depth: int) -> None:
            store.write_split(WAVES_SPLIT, (wave.index,), depth)
            progress.split()
            log.warning("wave %d of %d: out of memory, again in parts", wave.index, len(plan.waves))

        def depth(wave: Wave) -> int:
            return store.split(WAVES_SPLIT, (wave.index,))

        splitting = Splitting(launch, plan, settings.metrics, depth, split)
        coming = ((wave, splitting.begin(wave)) for wave in todo)
        with background(assembly.take) as write:
            for wave, result in _ahead(coming, in_flight - 1):
                write(wave, result())
                progress.settled(plan.cells_of(wave))
                log.info("wave %d of %d: computed", wave.index, len(plan.waves))
        processes.wait("written", progress.show)
    if not before and processes.first:
        seconds = progress.seconds
        store.set_attrs(measured={"seconds": seconds, "cells_per_second": cells / seconds})


def _ahead(coming: Iterator[T], count: int) -> Iterator[T]:
    """The same, each given out only once `count` more have been taken."""
    taken: deque[T] = deque()
    for each in coming:
        taken.append(each)
        if len(taken) > count:
            yield taken.popleft()
    yield from taken
