"""The plan of a sweep or a spec, under a budget that fits the device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch

from patchsweep import attribution
from patchsweep import results as results_of
from patchsweep.backends import taken
from patchsweep.engine.prompts import build_pairs
from patchsweep.errors import BadInput
from patchsweep.model import (
    device_map,
    dimensions_of,
    empty_model,
    foreseen,
    load_config,
    load_tokenizer,
    resolve_device,
)
from patchsweep.pairs import Pair
from patchsweep.passes import check_metrics
from patchsweep.plan import WHOLE, BudgetTooSmall, Cut, Dimensions, Offload, Plan, make_plan
from patchsweep.plan.layout import Features
from patchsweep.results import CellEffect, with_circuit
from patchsweep.sae import SAE, load_sae
from patchsweep.sites import Site, unit_name
from patchsweep.spec import Spec, Sweep

# A larger wave no longer fills the device better; on CPU its activations also leave the caches.
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
MEMORY_SHARE = 0.5  # of the memory that is free, for a wave


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
    if settings.edges is not None:
        how = "run" if settings.edges.exact else "estimated"
        dimensions.check_even(f"edges cannot be {how}", "heads", "kv_heads")
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
        if sae.at == "head_z":
            d.check_even("sae: head_z is not of one width", "heads", "d_head")
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
    found = results_of.open(given.results).top_sites(
        given.component, given.metric, given.direction, given.top
    )
    return tuple(site_of(given.component, cell) for cell in found)


def site_of(component: str, cell: CellEffect) -> Site:
    layer = None if component in ("embed", "sae_feature") else cell.layer
    position = cell.position
    if isinstance(position, str) and re.fullmatch(r"-?\d+", position):
        position = int(position)  # an index among labels
    return Site(component, layer, cell.unit if unit_name(component) else None, position)


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
