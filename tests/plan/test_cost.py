"""What a plan says that a sweep will take is what it takes, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import patchsweep as ps
from inputs import Letters
from oracle.families import EVERY, FAMILIES, prompts
from patchsweep.backends.choice import taken, through_nnsight
from patchsweep.engine.planning import plan_sweep
from patchsweep.engine.prepare import prepare
from patchsweep.pairs import Pair
from patchsweep.passes import attention
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import Forward, take_apart
from patchsweep.passes.wave import run_wave
from patchsweep.plan import Chosen, Plan, narrowed
from patchsweep.plan.schedule import NULL, make_schedule
from patchsweep.sae import SAE
from patchsweep.sites import COMPONENTS, Status
from patchsweep.spec import Sweep, parse_settings

OF_MODELS = [name for name in COMPONENTS if name != "sae_feature"]


@dataclass
class Counted:
    """FLOPs of the layers' weights and of attention, and the largest layer call, in tokens."""

    weights: int = 0
    attention: int = 0
    tokens: int = 0


@contextmanager
def counting(forward: Forward, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted()

    def multiplied(module: Any, args: Any, _: Any) -> None:
        tokens = args[0].numel() // args[0].shape[-1]
        found.weights += 2 * module.weight.numel() * tokens
        found.tokens = max(found.tokens, tokens)

    packed, single = attention.packed_attention, attention.attention_rows

    def attend(
        query: Any, key: Any, value: Any, rows: Any, scaling: Any, window: Any, *rest: Any
    ) -> Any:
        for r in rows:
            places = np.arange(r.prefix_length, r.prefix_length + r.length) + 1
            keys = r.count * np.minimum(places, window or 1 << 40).sum()
            found.attention += 4 * query.shape[0] * value.shape[-1] * int(keys)
        return packed(query, key, value, rows, scaling, window, *rest)

    def attend_rows(
        query: Any,
        key: Any,
        tokens: Any,
        keys: Any,
        count: Any,
        head: Any,
        scaling: Any,
        window: Any,
        *rest: Any,
    ) -> Any:
        found.attention += 4 * query.shape[-1] * int(count.clamp(max=window or 1 << 40).sum())
        return single(query, key, tokens, keys, count, head, scaling, window, *rest)

    hooks = [
        m.register_forward_hook(multiplied)
        for layer in forward.layers
        for m in layer.modules()
        if isinstance(m, nn.Linear | Conv1D)
    ]
    monkeypatch.setattr(attention, "packed_attention", attend)
    monkeypatch.setattr(attention, "attention_rows", attend_rows)
    try:
        yield found
    finally:
        monkeypatch.undo()
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("component", OF_MODELS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("more", ["", "all", "sets", "inner", "chosen", "by column"])
def test_runs_and_flops(
    component: str, name: str, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model = FAMILIES[name].build(3)
    rng = np.random.default_rng(3)
    pairs = [Pair(*prompts(rng, 50, n, 1), (5,), (7,)) for n in (7, 6)]
    settings: dict[str, Any] = {"components": [component], "direction": "both"}
    if more == "all":
        settings["positions"] = "all"
    if more == "sets":
        settings["windows"] = [2] if component in ("resid_pre", "attn_out", "mlp_out") else []
        unit = (
            ""
            if component in ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
            else ".1"
        )
        layer = "" if component == "embed" else ".1"
        sites = [f"{component}{layer}{unit}@-1", "head_z.0.2@-2", "head_q.1.0@-1", "head_k.2.0@-2"]
        settings["sets"] = {"some": sites, "one": sites[:1]}
    if more == "inner":
        settings["metrics"] = [
            "logit",
            {"attention": {"layer": 1, "head": 0, "query": -1, "key": 0}},
        ]
    model = ps.wrap(hf_model, Letters())
    parsed = parse_settings({**settings, "token_budget": 2000})
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device)
    if more in ("chosen", "by column"):
        plan = some_of(plan, component, by_column=more == "by column")
    check_waves(hf_model, plan, parsed, more == "inner", monkeypatch)


def check_waves(
    hf_model: Any, plan: Plan, parsed: Sweep, inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wave takes what the plan says, and all of them have the runs and FLOPs of the plan."""
    runs = flops = 0
    with attention_is(hf_model), torch.no_grad():
        forward = take_apart(hf_model, 7, 6)
        values = prepare(forward, plan, parsed, Letters(), None)
        if "neuron" in parsed.components:
            _ = forward.down_projections  # found once, in a forward of one token
        for wave in plan.waves:
            with counting(forward, monkeypatch) as found:
                run_wave(forward, plan, wave, parsed.metrics, values)
            schedule = make_schedule(plan, wave)
            runs += int((schedule.runs.block != NULL).sum())
            tail = 2 * plan.dimensions.d_model * plan.tail_weights * wave.rows
            read = _read(schedule, plan) if inner else 0
            assert found.weights + found.attention + tail - read == wave.flops
            assert found.tokens == wave.tokens
            assert len(schedule.row_pair) * schedule.reads.shape[1] == wave.rows
            flops += wave.flops
    assert runs == plan.counts()["runs"] > 0
    assert flops == plan.counts()["flops"]


def some_of(plan: Plan, component: str, by_column: bool) -> Plan:
    """A third of the cells, at random, the others left to estimates."""
    rng, shape = np.random.default_rng(0), plan.grids[component].shape[4:]
    kinds = [Status.EXACT, Status.AUDITED, Status.ESTIMATED, Status.ESTIMATED, Status.NOT_FINITE]
    # Two columns that share a token: the last one of either pair, and all from the third on.
    slots = np.arange(7)
    members = np.array([[slots == n, (slots > 1) & (slots <= n)] for n in (6, 5)])
    if by_column:
        shape = (*shape[:2], members.shape[1])
    return narrowed(
        plan,
        {
            (component, d, 0): Chosen(
                rng.choice(kinds, shape).astype(np.uint8), members if by_column else None
            )
            for d in range(2)
        },
    )


EDGES: dict[str, dict[str, Any]] = {
    "all": {"edges": "exact"},
    "each, through MLPs": {"edges": {"exact": {"positions": "each", "through": "mlps"}}},
    "small": {"edges": "exact", "token_budget": 90},
    "inner": {
        "edges": "exact",
        "metrics": [
            "logit",
            {"attention": {"layer": 1, "head": 0, "query": -1, "key": 0}},
        ],
    },
    "chosen": {"edges": {"exact": {"positions": [0, -1]}}},
    "paths": {
        "paths": {
            "one": {"senders": "head_z", "receivers": ["logits"], "positions": "each"},
            "many": {"senders": "mlp_out", "receivers": ["head_q.2.1", "head_k.1.0", "mlp_in.2"]},
            "set": {
                "senders": ["head_z.0.1", "mlp_out.1", "embed"],
                "receivers": ["head_q.2.1", "mlp_in.2", "resid_pre.2"],
                "positions": {"some": [0, -1, -2], "last": [-1]},
                "through": "mlps",
            },
        }
    },
}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize("kind", EDGES)
def test_edges(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their climbers, whatever a wave holds; queries that come from elsewhere need none."""
    hf_model = FAMILIES[name].build(3)
    rng = np.random.default_rng(3)
    pairs = [Pair(*prompts(rng, 50, n, 1), (5,), (7,)) for n in (7, 6)]
    pairs[1] = replace(pairs[1], corrupt=(9, *pairs[1].corrupt), align=(1, 2, -1, 4, 5, 6))
    model = ps.wrap(hf_model, Letters())
    given = {"components": ["mlp_out"], "direction": "both", "token_budget": 2000, **EDGES[kind]}
    parsed = parse_settings(given)
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device)
    if kind == "chosen":
        status = np.random.default_rng(0).choice(
            [Status.EXACT, Status.AUDITED, Status.ESTIMATED], plan.grids["edges"].shape[4:]
        )
        plan = narrowed(plan, {("edges", 1, 0): Chosen(status.astype(np.uint8))})
    assert kind != "small" or len(plan.waves) > 20
    check_waves(hf_model, plan, parsed, kind == "inner", monkeypatch)
    counts = plan.counts()
    assert counts["estimated"] > 0 if kind == "chosen" else not counts["estimated"]


SET = {"pair": ["sae_feature.3@-1", "sae_feature.4@-1"], "with": ["sae_feature.5@-2", "head_z.0.1"]}
FEATURES: dict[str, dict[str, Any]] = {
    "grid": {"components": ["sae_feature"]},
    "sets": {"components": ["sae_feature", "head_z"], "sets": SET, "direction": "both"},
    "only sets": {"sets": SET},
    "sources": {"sets": SET, "source": ["zero", "other"], "direction": "noise"},
    "metric": {
        "components": ["head_z"],
        "metrics": ["logit", {"sae_feature": {"feature": 2, "position": -1}}],
    },
}


@pytest.mark.parametrize("at", ["resid_pre", "mlp_out", "resid_post"])
@pytest.mark.parametrize("kind", FEATURES)
def test_features(kind: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder encodes the unpatched runs once per wave, what sets change, what is read."""
    hf_model = FAMILIES["llama"].build(3)
    rng = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(*s, generator=rng) for s in ((48, 20), (20, 48)))
    sae = SAE(layer=1, at=at, encoder=encoder, decoder=decoder, bias=torch.zeros(20))
    encoded = []
    own = SAE.encode

    def encode(self: SAE, x: torch.Tensor) -> torch.Tensor:
        encoded.append(2 * 48 * 20 * len(x))
        return own(self, x)

    monkeypatch.setattr(SAE, "encode", encode)
    pairs = [Pair(*prompts(np.random.default_rng(3), 50, n, 1), (5,), (7,)) for n in (7, 6)]
    model = ps.wrap(hf_model, Letters())
    parsed = parse_settings({**FEATURES[kind], "sae": {"file": "x"}})
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device, sae=sae)
    with attention_is(hf_model), torch.no_grad():
        forward = take_apart(hf_model, 7, 6)
        values = prepare(forward, plan, parsed, Letters(), sae)
        for wave in plan.waves:
            encoded.clear()
            with pytest.MonkeyPatch.context() as inner, counting(forward, inner) as found:
                run_wave(forward, plan, wave, parsed.metrics, values)
            tail = 2 * plan.dimensions.d_model * plan.tail_weights * wave.rows
            assert sum(encoded) > 0
            assert found.weights + found.attention + tail + sum(encoded) == wave.flops
            assert found.tokens == wave.tokens


def _read(schedule: Any, plan: Any) -> int:
    """What an attention probability costs that a metric reads: not a part of any run."""
    keys = np.minimum(schedule.inner[:, 0] + 1, plan.dimensions.windows[1] or 1 << 40)
    return 4 * plan.dimensions.d_head * int(keys.sum())


FULL: dict[str, dict[str, Any]] = {
    "grid": {"components": ["head_z", "mlp_out"], "direction": "both"},
    "sources": {
        "components": ["resid_pre"],
        "source": ["other", "zero", {"resample": {"samples": 2}}],
        "direction": "noise",
        "sets": {"two": ["head_z.0.1@-1<zero", "mlp_out.1@-1<other"]},
    },
    "features": {**FEATURES["sets"], "metrics": FEATURES["metric"]["metrics"]},
    "nothing to run": {"components": ["mlp_out"], "positions": [0]},
}


@pytest.mark.parametrize("name", ["mistral", "bloom"])
@pytest.mark.parametrize("kind", FULL)
def test_full_forwards(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through nnsight every run is a whole sequence, the unpatched ones again in every batch."""
    hf_model = EVERY[name].build(2)
    rng = np.random.default_rng(3)
    pairs = [Pair(*prompts(rng, 50, n, 2), (5,), (7,)) for n in (7, 7, 6, 6)]
    model = ps.wrap(hf_model, Letters())
    settings = {**FULL[kind], "token_budget": 150, "backend": "nnsight"}
    sae = None
    if kind == "features":
        settings["sae"] = {"file": "x"}
        encoder = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))
        sae = SAE(layer=1, at="mlp_out", encoder=encoder, decoder=encoder.T, bias=torch.zeros(20))
    parsed = parse_settings(settings)
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device, sae=sae)
    whole, d = taken(plan, "nnsight"), plan.dimensions
    assert whole.hash == plan.hash
    encoded: list[int] = []
    own = SAE.encode
    monkeypatch.setattr(SAE, "encode", lambda sae, x: encoded.append(len(x)) or own(sae, x))
    with through_nnsight(model, plan, parsed, "") as (backend, carry):
        values = prepare(backend.forward, plan, parsed, Letters(), sae, carry)
        for wave in whole.waves:
            encoded.clear()
            with called(backend.forward) as (calls, multiplied):
                run_wave(backend.forward, plan, wave, parsed.metrics, values, carry)
            keys = sum(
                rows * min(i + 1, window or n)
                for window in d.windows
                for rows, n in calls
                for i in range(n)
            )
            tail = 2 * d.d_model * plan.tail_weights * wave.rows
            taken_up = sum(multiplied) + 4 * d.d_head * d.heads * keys + tail
            assert wave.flops == taken_up + 2 * 48 * 20 * sum(encoded)
            assert wave.tokens == max(rows * n for rows, n in calls)
            assert wave.scores == max(rows * d.heads * n * n for rows, n in calls)
            assert wave.passes == len(calls)
    assert sum(w.flops for w in whole.waves) > sum(w.flops for w in plan.waves)


@contextmanager
def called(forward: Forward) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
    """(rows, length) of every pass through the layers; FLOPs of every product in them."""
    calls: list[tuple[int, int]] = []
    multiplied: list[int] = []
    linear = [m for x in forward.layers for m in x.modules() if isinstance(m, nn.Linear)]

    def product(module: Any, args: Any, _: Any) -> None:
        multiplied.append(2 * module.weight.numel() * (args[0].numel() // args[0].shape[-1]))
        if module is linear[0]:
            calls.append(tuple(args[0].shape[:2]))

    hooks = [m.register_forward_hook(product) for m in linear]
    try:
        yield calls, multiplied
    finally:
        for hook in hooks:
            hook.remove()


def test_results_say_what_their_backend_took(tmp_path: Path) -> None:
    """Auto decides when the model is there."""
    pairs = [Pair(*prompts(np.random.default_rng(3), 50, 6, 2), (5,), (7,))]
    given = {"components": ["mlp_out"], "token_budget": 200}
    for name, backend in (("bloom", "nnsight"), ("llama", "wavefront")):
        model = ps.wrap(EVERY[name].build(2), Letters())
        attrs = ps.sweep(model, pairs, out=tmp_path / name, **given).attrs
        assert attrs["backend"] == backend
        plan = plan_sweep(model.dimensions, pairs, parse_settings(given), model.device)
        assert attrs["plan"] == taken(plan, backend).counts()
        assert (attrs["plan"] == plan.counts()) == (backend == "wavefront")
