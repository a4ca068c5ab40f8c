"""What the passes of an estimate return, cost, and leave behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

import patchsweep as ps
from estimates import EXACT, VIA, built, estimated
from inputs import Letters, components_of, pair_of, three
from oracle.families import FAMILIES
from patchsweep import attribution
from patchsweep.engine.planning import plan_sweep
from patchsweep.sites import Status
from patchsweep.spec import parse_settings


def test_shapes_and_statuses(tmp_path: Path) -> None:
    """As in exact results, with the same structural cells; a part of the pairs like all of them."""
    hf_model, _ = built("mistral")
    pairs, names = three(), ["head_z", "head_k", "embed", "neuron"]
    exact = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        components=names,
        direction="both",
        metrics=["logit_diff", "prob"],
        out=tmp_path / "r.zarr",
    )
    how = {name: attribution.DEFAULT[name] for name in names}
    found = estimated(hf_model, pairs, how, metrics=["logit_diff", "prob"])
    part = estimated(hf_model, pairs, how, metrics=["logit_diff", "prob"], part=range(1, 3))
    for name in names:
        for column in ("logit_diff", "prob"):
            values, status = found.values[name][column], found.status[name][column]
            known = exact.store.read(f"{name}/{column}_status")
            assert values.shape == status.shape == known.shape
            assert values.dtype == exact.store.read(f"{name}/{column}").dtype
            assert ((known == Status.EXACT) == (status == Status.ESTIMATED)).all()
            same = known != Status.EXACT
            assert (status[same] == known[same]).all()
            np.testing.assert_allclose(
                values[same], exact.store.read(f"{name}/{column}")[same], atol=EXACT
            )
            few = part.values[name][column]
            np.testing.assert_allclose(
                few[..., : values.shape[-1]], values[:, :, :, 1:], atol=EXACT
            )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("estimator", "most"), [("atp", 5), ("relp", 5), ("atp_qk", 6)])
def test_cost(name: str, estimator: str, most: float) -> None:
    """All cells of a pair cost a few forwards: both runs, then one and a backward of one."""
    hf_model, _ = built(name)
    pair = pair_of(np.random.default_rng(1), 40, 40)
    names = [c for c in components_of(name) if c not in VIA or estimator != "relp"]
    before = hf_model.config._attn_implementation
    with FlopCounterMode(display=False) as one:
        hf_model.set_attn_implementation("eager")
        hf_model(torch.tensor([pair.clean]), use_cache=False)
        hf_model.set_attn_implementation(before)
    count = FlopCounterMode(display=False)
    how = dict.fromkeys(names, estimator)
    estimated(hf_model, [pair], how, direction="denoise", counted=count)
    assert count.get_total_flops() < most * one.get_total_flops()


def test_half_precision() -> None:
    """numpy has no bfloat16: what is estimated there is float32."""
    hf_model = FAMILIES["llama"].build(3, 1, dtype=torch.bfloat16)
    values = estimated(hf_model, three(), {"head_z": "atp"}).values["head_z"]["logit_diff"]
    assert values.dtype == np.float32
    assert np.isfinite(values).any()


def test_pairs_are_cut_by_the_budget() -> None:
    """Activations of all layers are held: a pass has fewer pairs than a wave."""
    model = ps.wrap(built("llama")[0], Letters())
    pairs = [pair_of(np.random.default_rng(i), 10, 2) for i in range(7)]
    given = parse_settings({"components": ["head_z"], "direction": "denoise"})
    for budget, sizes in ((120, [2, 2, 2, 1]), (60, [1] * 7), (10_000, [7])):
        plan = plan_sweep(model.dimensions, pairs, given, model.device, budget)
        ranges = attribution.pair_ranges(plan, range(len(plan.pairs)))
        assert [len(r) for r in ranges] == sizes
        assert [i for r in ranges for i in r] == list(range(7))


def test_parameters_that_learn() -> None:
    """Parameters that take gradients are left as they are, and change nothing."""
    hf_model, _ = built("llama")
    how = {"head_z": "atp", "mlp_out": "relp", "head_q": "atp_qk"}
    found = estimated(hf_model, three(), how)
    hf_model.requires_grad_(True)
    again = estimated(hf_model, three(), how)
    assert all(p.requires_grad and p.grad is None for p in hf_model.parameters())
    hf_model.requires_grad_(False)
    for name in how:
        np.testing.assert_array_equal(
            found.values[name]["logit_diff"], again.values[name]["logit_diff"]
        )


def test_models_larger_than_the_device(tmp_path: Path) -> None:
    """Weights that hooks bring in: the same estimates."""
    hf_model = FAMILIES["llama"].build(3, 1)
    how = {"head_z": "atp", "mlp_out": "relp", "head_k": "atp_qk", "neuron": "atp_star"}
    metrics = ["logit_diff", "prob"]
    whole = estimated(hf_model, three(), how, metrics=metrics)
    disk_offload(hf_model, str(tmp_path), torch.device("cpu"))
    found = estimated(hf_model, three(), how, metrics=metrics)
    for name in how:
        for column in metrics:
            np.testing.assert_array_equal(whole.values[name][column], found.values[name][column])
    assert all(p.is_meta for p in hf_model.parameters())


def test_a_trained_model(smollm2: ps.Model, tmp_path: Path) -> None:
    """On SmolLM2 the estimates order the heads nearly as exact patching does."""
    texts = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
    pairs = [ps.make_pair(smollm2.tokenizer, *texts)]
    out = tmp_path / "r.zarr"
    exact = ps.sweep(smollm2, pairs, components=["head_z"], metrics=["logit_diff"], out=out)
    found = estimated(smollm2.hf_model, pairs, {"head_z": "atp"}, direction="denoise")
    there = found.status["head_z"]["logit_diff"] == Status.ESTIMATED
    want = exact.store.read("head_z/logit_diff")[there]
    assert spearmanr(found.values["head_z"]["logit_diff"][there], want).statistic > 0.9
