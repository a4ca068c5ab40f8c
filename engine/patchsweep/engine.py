"""The main loop: plan, self-test, then wave after wave into the results."""

from __future__ import annotations

import math
import os
import platform
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from patchsweep import append as appending
from patchsweep import attribution
from patchsweep import results as results_of
from patchsweep.assembly import Assembly
from patchsweep.backends import opened, taken
from patchsweep.circuits import with_circuit
from patchsweep.dimensions import WHOLE, Dimensions, Offload
from patchsweep.distributed import Processes, alone, launched, restarted
from patchsweep.edges import Node, receivers, senders
from patchsweep.errors import BadInput
from patchsweep.integrity import withdraw
from patchsweep.job import Progress, job, log
from patchsweep.layout import NAMES, Features
from patchsweep.loading import load_config, load_tokenizer, resolve_device
from patchsweep.memory import enough_memory
from patchsweep.metrics import check as check_metrics
from patchsweep.model import Model, dimensions_of, empty_model, load_model
from patchsweep.offload import unreachable
from patchsweep.pairs import Pair
from patchsweep.placement import device_map, foreseen
from patchsweep.plan import BudgetTooSmall, Cut, Plan, Wave, make_plan
from patchsweep.prepare import digest, prepare
from patchsweep.prompts import build_pairs
from patchsweep.results import CellEffect, Results
from patchsweep.sae import SAE, load_sae
from patchsweep.sites import SETS, Direction, Site, unit_name
from patchsweep.spec import Spec, Sweep, parse_settings
from patchsweep.splitting import Launch, Splitting
from patchsweep.store import WAVES_SPLIT, Store, exists, put_back, remove
from patchsweep.wave import launch_wave, wavefront
from patchsweep.writer import background

T = TypeVar("T")
# A larger wave no longer fills the device better; on CPU its activations also leave the caches.
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
JOINT = 10  # cells that are patched together once a sweep is done
MEMORY_SHARE = 0.5  # of the memory that is free, for a wave


def run(
    spec: Spec, *, resume: bool = False, overwrite: bool = False, append: bool = False
) -> Results:
    """Do what a spec says, together with all processes that a launcher has started for it; every
    one returns when all is done. BadInput if `out` is missing from it, and as `sweep` does."""
    if spec.out is None:
        raise BadInput("the spec has no out: say where the results go, e.g. out: results/ioi.zarr")
    attribution.chosen(spec)  # says what cannot be estimated before the model is loaded
    attribution.check_edges(spec)
    processes = launched()
    model = load_model(
        spec.model,
        spec.dtype,
        processes.device(spec.device),
        max_memory=spec.max_memory,
        offload_folder=spec.offload_folder,
    )
    with exactly(model.device):
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


def plan_spec(spec: Spec) -> Plan:
    """The plan of a spec, from the model's config and tokenizer alone: pairs that `only_correct`
    would leave out are in it."""
    empty = empty_model(load_config(spec.model), spec.dtype)
    device, offload = resolve_device(spec.device), WHOLE
    if spec.device == "balanced":
        device, offload = foreseen(empty, device_map(empty, spec.max_memory))
    pairs = build_pairs(spec.prompts, load_tokenizer(spec.model))
    sae = load_autoencoder(spec)
    plan = plan_sweep(dimensions_of(empty), pairs, spec, device, sae=sae, offload=offload)
    return taken(attribution.expected(plan, spec), spec.backend)


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
    """Patch every cell that `settings` ask for, and write the results to `out`, a path or a URL.

    settings are those of a spec: components, metrics, direction, positions, token_budget. With
    `resume` a sweep that was interrupted goes on; with `overwrite` earlier results are replaced;
    with `append` they get the further pairs, after those that they have, or metrics.
    BadInput for wrong settings, for results that belong to another sweep, and for a model that the
    self-test refuses. Cells whose metric is not finite are marked and counted, not an error.
    """
    said = parse_settings(settings)
    return carry_out(model, pairs, said, out, resume=resume, overwrite=overwrite, append=append)


def plan_sweep(
    dimensions: Dimensions,
    pairs: Sequence[Pair],
    settings: Sweep,
    device: torch.device,
    token_budget: int | None = None,
    sae: SAE | None = None,
    offload: Offload = WHOLE,
    cut: Cut | None = None,
) -> Plan:
    """The plan of a sweep; `token_budget` and `cut` are those of results to go on with, if there
    are any."""
    if not pairs:
        raise BadInput("there are no prompt pairs: give at least one")
    attribution.chosen(settings)
    attribution.check_edges(settings)
    check_metrics(pairs, settings.metrics)
    for i, pair in enumerate(pairs):
        others = [t for tokens in pair.others.values() for t in tokens]
        used = {*pair.clean, *pair.corrupt, *others, *pair.answer, *pair.wrong, *pair.continuation}
        if min(used) < 0 or max(used) >= dimensions.vocab:
            raise BadInput(f"pair {i} has a token that is not in the model's vocabulary")
        unequal = pair.align is None and len(pair.clean) != len(pair.corrupt)
        if pair.corrupt and (unequal or pair.clean == pair.corrupt):
            raise BadInput(f"pair {i}: the prompts must differ and have equal numbers of tokens")
    settings = with_circuit(settings, ranking_of(settings))
    features = None
    if sae is not None:
        d = dimensions
        sae.check_width(d.heads * d.d_head if sae.at == "head_z" else d.d_model)
        features = Features(sae.layer, sae.at, sae.features, sae.width)
    if settings.token_budget == "auto":
        usual, most = auto_budget(dimensions, device, offload.held)
        usual = token_budget or usual
    else:
        usual = most = token_budget or settings.token_budget
    try:
        plan = make_plan(pairs, settings, dimensions, usual, features, cut)
    except BudgetTooSmall as error:
        if error.least > most:
            raise
        plan = make_plan(pairs, settings, dimensions, error.least, features, cut)
    return replace(plan, offload=offload)


def ranking_of(settings: Sweep) -> tuple[Site, ...]:
    """The sites of a sweep's circuit, best first."""
    if settings.circuit is None:
        return ()
    given = settings.circuit.ranking
    if isinstance(given, tuple):
        return given
    found = results_of.open(given.results).top(
        given.component, given.metric, given.direction, given.top
    )
    return tuple(_site_of(given.component, cell) for cell in found)


def load_autoencoder(settings: Sweep) -> SAE | None:
    """The sweep's sparse autoencoder, if it has one."""
    given = settings.sae
    return load_sae(given.file, given.layer, given.at) if given else None


def auto_budget(dimensions: Dimensions, device: torch.device, held: int) -> tuple[int, int]:
    """Packed tokens per layer call: what is usual, and the most that fits in half of the memory
    that is free now but for `held` bytes."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + held  # what torch keeps is free for it
    else:
        free = psutil.virtual_memory().available
    fits = int(max(0, free - held) * MEMORY_SHARE) // dimensions.bytes_per_token
    return max(1, min(fits, MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"]))), fits


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
    first = processes.first
    if missing := unreachable(model.hf_model):
        raise BadInput(f"{model.name} has weights without values, e.g. {missing[0]}: load it whole")
    found = None
    if first:
        put_back(out)
    if first and (resume or overwrite or append) and exists(out):
        found = Store.open(out, "r+", settings.fsync)
    existing = None if overwrite else found
    budget, cut = None, None
    if existing:
        cut = appending.cut(existing, len(pairs))
        if not append or settings.token_budget == "auto":
            budget = existing.attrs["token_budget"]
    if not first:
        budget = processes.told("token_budget")
        cut = Cut(*map(processes.told, ("most", "apart", "blocks")))
    sae = load_autoencoder(settings)
    plan = plan_sweep(
        model.dimensions, pairs, settings, model.device, budget, sae, model.offload, cut
    )
    if first and exists(out) and not found:
        _create(out, plan, settings, model, {})  # says what is wrong with the folder
    processes.tell("token_budget", plan.token_budget)
    processes.tell("most", cut.most if cut else plan.pairs_per_block)
    processes.tell("apart", cut.apart if cut else 0)
    processes.tell("blocks", plan.chunks.blocks)

    fingerprint = model.fingerprint
    with (
        job(out, processes),
        exactly(model.device),
        enough_memory(),
        opened(model, plan, settings, sae, fingerprint) as backend,
    ):
        forward, carry = backend.forward, backend.carry
        estimators = attribution.chosen(settings)
        if (estimators or settings.edges) and carry is not wavefront:
            names = () if estimators else attribution.EDGES
            raise attribution.not_on(backend.record["backend_reason"], *names)
        values = prepare(forward, plan, settings, model.tokenizer, sae, carry)
        attrs = provenance(model, plan, settings, fingerprint) | backend.record
        attrs["plan"] = taken(plan, attrs["backend"]).counts()
        attrs["values"] = digest(values, plan, model.tokenizer)
        attrs["noise_scale"] = values.noise_scale
        fill = None
        if existing and (what := _difference(existing, attrs)):
            refused = appending.refusal(existing, plan, settings, attrs, values, model.tokenizer)
            _check_append(existing, what, refused, append)
            attrs |= appending.described(existing)
            fill = partial(appending.copy, existing)
        if existing:
            for damage in withdraw(existing):
                log.warning("done again: %s", damage)
        if fill or not existing:
            attribution.tried(forward, plan, settings, values)
        if overwrite and found:
            remove(out)  # only now can nothing be refused any more
        if first:
            goes_on = existing if not fill else None
            store = goes_on or _create(out, plan, settings, model, attrs, fill)
        else:
            processes.told("created")
            store = Store.open(out, "r+", settings.fsync)
            _same_sweep(store, attrs)
        done = {name: store.done(name) for name in plan.grids}
        processes.tell("created", 1)
        if estimators:
            attribution.write_estimates(forward, plan, settings, values, store, processes)
            plan = _chosen(plan, settings, store, processes)
        if settings.edges:
            attribution.write_edges(forward, plan, settings, values, store, processes)
        launch = partial(launch_wave, forward, values=values, carry=carry)
        _run_waves(launch, forward.waves_in_flight, plan, settings, store, done, processes)
        with processes.after_first("finished"):
            if first:
                store.set_attrs(joint=_joint(launch, plan, settings, results_of.open(out)))
    processes.leave()
    return results_of.open(out)


def _chosen(plan: Plan, settings: Sweep, store: Store, processes: Processes) -> Plan:
    """The plan with only the chosen cells of what was estimated, chosen by the first process."""
    processes.wait("estimated")
    with processes.after_first("chosen"):
        plan = attribution.chosen_cells(plan, settings, store)
        if processes.first:
            store.set_attrs(plan=plan.counts())
    return plan


def _joint(launch: Launch, plan: Plan, settings: Sweep, results: Results) -> dict[str, Any]:
    """Per component and direction, one run more: the cells of largest effect patched together, by
    the first metric and source; its effect beside theirs alone."""
    found: dict[str, Any] = {}
    metric = settings.metrics[0]
    ran = [c for c in plan.grids if c != SETS]
    if settings.prefilter is None:
        ran = [c for c in ran if c not in attribution.chosen(settings)]
    for name in ran:
        for direction in plan.directions:
            top = results.top(name, metric.column, direction, JOINT)
            if len(top) < 2:
                continue
            sites = [_site_of(name, cell) for cell in top]
            effect = _effect_of_set(launch, plan, settings, sites, direction)
            singles = [cell.effect for cell in top]
            if not math.isfinite(effect):
                continue
            entry = {"sites": list(map(str, sites)), "joint": effect, "singles": singles}
            found.setdefault(name, {})[direction] = entry
    return found


def _site_of(component: str, cell: CellEffect) -> Site:
    layer = None if component in ("embed", "sae_feature") else cell.layer
    position = cell.position
    if isinstance(position, str) and re.fullmatch(r"-?\d+", position):
        position = int(position)  # an index among labels
    return Site(component, layer, cell.unit if unit_name(component) else None, position)


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


def _create(
    out: str | Path,
    plan: Plan,
    settings: Sweep,
    model: Model,
    attrs: dict[str, Any],
    fill: Callable[[Store], None] | None = None,
) -> Store:
    double = model.hf_model.dtype == torch.float64
    return Store.create(
        out,
        list(plan.chunks.grids.values()),
        [m.column for m in settings.metrics],
        plan.pairs,
        lambda token: model.tokenizer.decode([token]),
        attrs,
        "float64" if double else "float32",
        _site_columns(plan),
        (_texts(senders(plan.dimensions)), _texts(receivers(plan.dimensions))),
        settings.fsync,
        fill,
    )


def _texts(nodes: Sequence[Node]) -> list[str]:
    return list(map(str, nodes))


def _site_columns(plan: Plan) -> dict[str, Any]:
    """The sites of the sets, as the results keep them, [site]."""
    table = plan.layouts.table
    if table is None:
        return {}
    sources = ["", *(s.name for s in plan.sources)]
    return {
        "set": table.set,
        "component": [NAMES[code] for code in table.component],
        "layer": table.layer,
        "unit": table.unit,
        "position": [table.entries[entry] for entry in table.entry],
        "source": [sources[number + 1] for number in table.source],
    }


def provenance(model: Model, plan: Plan, settings: Sweep, fingerprint: str) -> dict[str, Any]:
    """What the results say about where they come from."""
    spec = settings.model_dump(mode="json")
    packages = ("patchsweep", "torch", "transformers", "accelerate", "nnsight", "numpy", "zarr")
    device = model.device
    return {
        "spec": spec,
        "estimators": attribution.chosen(settings),
        "edges": spec["edges"],
        "plan_hash": plan.hash,
        "token_budget": plan.token_budget,
        "blocks_per_chunk": plan.chunks.blocks,
        "pairs_per_block": plan.pairs_per_block,
        "model": model.name,
        "model_class": type(model.hf_model).__name__,
        "model_fingerprint": fingerprint,
        "model_dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "sources": [
            {"name": s.name, "normalised": s.kind == "run", "samples": s.samples}
            for s in plan.sources
        ],
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


# What must be equal for a sweep to go on where another one stopped.
IDENTITY = {
    "plan_hash": "other prompts, components, positions or directions",
    "model_fingerprint": "another model",
    "metrics": "other metrics",
    "estimators": "other estimates",
    "prefilter": "another prefilter",
    "edges": "other scores of edges",
    "backend": "another backend",
    "values": "other means, vectors, probes or autoencoder",
}


def _same_sweep(store: Store, attrs: dict[str, Any]) -> None:
    """BadInput unless the results in `store` are those of this very sweep."""
    if what := _difference(store, attrs):
        raise _another(store, what)


def _difference(store: Store, attrs: dict[str, Any]) -> str | None:
    """What makes the results in `store` those of another sweep; None if they are of this one."""
    spec = store.attrs["spec"]
    said = {key: spec.get(key) for key in ("metrics", "prefilter", "edges")}
    before = {**store.attrs, **said, "estimators": store.estimators}
    now = {**attrs, **{key: attrs["spec"][key] for key in said}}
    for key, what in IDENTITY.items():
        if before.get(key) != now[key]:
            return what
    return None


def _check_append(store: Store, what: str, refusal: str | None, append: bool) -> None:
    """BadInput where results of another sweep cannot be appended to, or were not asked to be."""
    if append and refusal:
        raise BadInput(
            f"{store.path}: pairs and metrics can be added, nothing else, and {refusal}: "
            "choose another --out, or --overwrite to replace it"
        )
    if not append:
        raise _another(store, what, "" if refusal else "--append to add to it, ")


def _another(store: Store, what: str, mend: str = "") -> BadInput:
    return BadInput(
        f"{store.path} holds the results of another sweep ({what}): "
        f"{mend}choose another --out, or --overwrite to replace it"
    )


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Deterministic, and in the dtype of the model whatever the user has switched on."""
    with deterministic(device), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same plan gives the same bits twice. CUDA needs to be told; a CPU does it anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
