"""Cells of a sweep against the oracle: a full forward each, read by every metric asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import patchsweep as ps
from expected import SCALE, Autoencoder, Case, Expected, d_head, probe_direction
from inputs import Letters
from members import Member, members
from oracle.families import EVERY, FAMILIES, Family
from patchsweep.sites import SETS, Status

METRICS: list[Any] = [
    "logit_diff",
    {"logit_diff": {"reduce": "sum"}},
    "logit",
    "logprob",
    "prob",
    "prob_diff",
    "rank",
    {"accuracy": {"k": 5}},
    "kl",
    "kl_reverse",
    "total_variation",
]
# Most tests measure few things, so that they can look at many cells.
FEW: list[Any] = ["logit_diff", "kl"]


def inner_metrics(case: Case, hf_model: Any, folder: Path) -> list[Any]:
    """Every metric that reads inside the model."""
    stream, ones = folder / "probe.safetensors", folder / "ones.npy"
    save_file({"direction": probe_direction(hf_model)}, stream)
    np.save(ones, np.ones(d_head(hf_model)))
    at = {"layer": case.middle}
    out: list[Any] = [
        {"probe": {**at, "component": "resid_post", "position": -1, "file": str(stream)}},
        {"probe": {**at, "component": "head_z", "unit": 2, "position": -2, "file": str(ones)}},
        {"kl": {"at": -2}},
        {"callable": {"path": "expected:spread"}},
    ]
    if case.family in FAMILIES:  # of others the oracle does not see patterns
        out.append({"attention": {**at, "head": 1, "query": -1, "key": 1}})
    if EVERY[case.family].down is not None:
        out.append({"neuron": {**at, "neuron": 3, "position": -1}})
    if case.sae_at:
        out.append({"sae_feature": {"feature": 2, "position": -1}})
    return out


def autoencoder(case: Case, hf_model: Any, folder: Path) -> Autoencoder:
    """Random, of 7 features; written to dictionary.safetensors."""
    rng = torch.Generator().manual_seed(case.seed)
    config = hf_model.config
    width = config.hidden_size
    if case.sae_at == "head_z":
        width = config.num_attention_heads * d_head(hf_model)
    made = {
        "encoder": torch.randn(width, 7, generator=rng, dtype=torch.float64) / width**0.5,
        "bias": torch.randn(7, generator=rng, dtype=torch.float64),
        "decoder": torch.randn(7, width, generator=rng, dtype=torch.float64) / width**0.5,
    }
    names = {"encoder": "W_enc", "bias": "b_enc", "decoder": "W_dec"}
    tensors = {names[k]: v for k, v in made.items()} | {"b_dec": torch.zeros(width).double()}
    save_file(tensors, folder / "dictionary.safetensors")
    return Autoencoder(case.sae_at, case.sae_layer, **made)


def check(case: Case, cells: int | None) -> int:
    """Sweep, then compare `cells` random cells (all if None) with the oracle; how many were run."""
    family = EVERY[case.family]
    model = case.model or ps.wrap(family.build(case.layers, case.seed, **case.overrides), Letters())
    hf_model = model.hf_model
    with TemporaryDirectory() as name:
        folder = Path(name)
        given = {"metrics": FEW, "token_budget": 20000, **case.settings}
        if given["metrics"] == "inner":
            given["metrics"] = inner_metrics(case, hf_model, folder)
        sae = None
        if case.sae_at:
            sae = autoencoder(case, hf_model, folder)
            given["sae"] = {
                "file": folder / "dictionary.safetensors",
                "layer": sae.layer,
                "at": sae.at,
            }
        case.settings["metrics"] = given["metrics"]
        if "_vector" in given:
            np.save(folder / "v.npy", given.pop("_vector").numpy())
            given["source"] = {"vector": {"file": folder / "v.npy", "scale": SCALE}}
        results = ps.sweep(model, case.pairs, out=folder / "r.zarr", **given)
        assert results.complete
        grids = {c: load(results, c) for c in results.components}
        floors = {m: results.noise_floor(m) for m in results.metrics}
        sites = members_of(case, hf_model, family)
        if SETS in results.components:
            assert {k: set(v) for k, v in stored_sites(results).items()} == {
                k: {as_stored(site) for site in some} for k, some in sites.items()
            }
    scale = case.tolerance or family.tolerance
    for metric in results.metrics:
        assert float(np.nanmax(floors[metric], initial=0)) <= scale * wide(metric)

    expected = Expected(case, hf_model, family, sae)
    rng = np.random.default_rng(case.seed)
    candidates = [(c, *i) for c in grids for i in np.ndindex(*grids[c]["_shape"])]
    if cells is not None:
        chosen = [rng.integers(len(candidates)) for _ in range(cells)]
        by_name = {c: [x for x in candidates if x[0] == c] for c in grids}
        candidates = [candidates[i] for i in chosen[: cells // 2]] + [
            some[rng.integers(len(some))]
            for some in by_name.values()
            for _ in range(-(-cells // 2 // len(by_name)))
        ]
    return sum(compare(expected, grids[c], sites, c, index, scale) for c, *index in candidates)


def load(results: ps.Results, component: str) -> dict[str, Any]:
    """Values and statuses of a component, by column."""
    arrays: dict[str, Any] = {"_grid": results.grid(component)}
    for metric in results.metrics:
        for name in (metric, f"{metric}_status"):
            arrays[name] = results.store.read(f"{component}/{name}")
    arrays["_shape"] = arrays[metric].shape
    return arrays


def wide(column: str) -> float:
    """How much further from each other than logits two exact values of a metric may be: those of
    activations are sums of as many terms as a layer is wide, a ratio of probabilities is as far off
    as its smallest is small."""
    if column == "relative_prob":
        return 30
    return 5 if column.startswith(("probe_", "neuron_", "sae_feature_")) else 1


def members_of(case: Case, hf_model: Any, family: Family) -> dict[str, list[Member]]:
    """The sites of the sets that a case asks for."""
    config = hf_model.config
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads if family.grouped else heads
    units = dict.fromkeys(("head_z", "head_q", "head_pattern"), heads)
    units |= {"head_k": kv_heads, "head_v": kv_heads}
    return members(case.settings, case.layers, units, max(map(len, case.pairs)), case.sae_layer)


def stored_sites(results: ps.Results) -> dict[str, list[Any]]:
    """The sites of every set, as the results keep them."""
    columns = [
        results.store.read(f"{SETS}/site_{c}").tolist()
        for c in ("set", "component", "layer", "unit", "position", "source")
    ]
    names = results.grid(SETS).positions
    sites: dict[str, list[Any]] = {str(name): [] for name in names}
    for number, *site in zip(*columns, strict=True):
        sites[str(names[number])].append(tuple(site))
    assert all(len(set(some)) == len(some) for some in sites.values())
    return sites


def as_stored(site: Member) -> tuple[str, int, int, str, str]:
    component, layer, unit, position, source = site
    return component, layer, unit or 0, str(position), source or ""


def compare(
    expected: Expected,
    found: dict[str, Any],
    sites: Mapping[str, Sequence[Any]],
    component: str,
    index: Sequence[int],
    scale: float,
) -> bool:
    """One cell: its status, and every metric against a full forward. Whether it was run."""
    case, grid = expected.case, found["_grid"]
    d, s, n, i, layer, unit, entry = index
    at, pair = tuple(index), case.pairs[i]
    direction, source = grid.directions[d], grid.sources[s]
    columns = [c for c in found if not c.startswith("_") and not c.endswith("_status")]

    def places(position: Any) -> list[int]:
        if position == "all":
            return list(range(len(pair)))
        if isinstance(position, str) and position in case.settings.get("positions", {}):
            some = case.settings["positions"][position]
        else:
            some = [int(position)]
        # From the end: from where the answer is read, before a continuation.
        inside = {p + pair.read + 1 if p < 0 else p for p in some}
        return sorted(p for p in inside if 0 <= p < len(pair))

    samples = {"resample": 2}.get(source, grid.samples if source.startswith("sigma") else 1)
    if n >= samples:  # of another source
        assert all(found[f"{m}_status"][at] == Status.OUTSIDE for m in columns)
        return False
    if component == SETS:
        cell = tuple(
            (c, layer, u, tuple(places(p)), named or None)
            for c, layer, u, p, named in sites[str(grid.positions[entry])]
        )
    else:
        positions = tuple(places(grid.positions[entry]))
        reached = [p for p in positions if source != "other" or pair.alignment[p] >= 0]
        if not reached:
            assert all(found[f"{m}_status"][at] == Status.OUTSIDE for m in columns)
            assert all(np.isnan(found[m][at]) for m in columns)
            return False
        cell = ((component, layer + grid.first_layer, unit, positions, None),)
    for column, value in expected.values(i, direction, source, n, cell).items():
        if column in columns:
            difference = abs(found[column][at] - float(value))
            assert difference <= scale * wide(column), (component, at, cell, column, difference)
            assert found[f"{column}_status"][at] in (Status.EXACT, Status.STRUCTURAL)
    ran = bool(found[f"{columns[0]}_status"][at] == Status.EXACT)
    if expected.knows_reach(columns, component, source, cell):
        reaches = expected.reaches(i, direction, source, n, cell)
        assert ran == reaches, (component, at, cell, "run" if ran else "structural")
    return ran
