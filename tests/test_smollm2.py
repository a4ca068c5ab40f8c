"""The trained SmolLM2-135M-Instruct in float32: grids and cells against full forwards with plain
hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchsweep as ps
from cells import FEW, METRICS, check
from expected import Case

IOI = (
    "When John and Mary went to the store, John gave a drink to",
    "When John and Mary went to the store, Mary gave a drink to",
    " Mary",
    " John",
)
FACT = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
# Of the layers, from the last one down, each so many-th: all of them with `-m slow`.
SOME_LAYERS = [
    (IOI, "head_z", 15),
    (FACT, "head_z", 6),
    (IOI, "mlp_out", 4),
    (FACT, "resid_pre", 2),
]
ALL_LAYERS = [(texts, c, 1) for texts in (IOI, FACT) for c in ("head_z", "mlp_out", "resid_pre")]


@pytest.fixture(scope="module")
def model(smollm2: ps.Model) -> ps.Model:
    return smollm2


def sweep(model: ps.Model, texts: tuple[str, ...], out: Path, **settings: Any) -> ps.Results:
    return ps.sweep(model, [ps.make_pair(model.tokenizer, *texts)], out=out, **settings)


def hooked_grid(model: ps.Model, pair: ps.Pair, component: str, step: int = 1) -> np.ndarray:
    """logit_diff [layer, unit, position]: every cell a row of a batch of full forwards. Of the
    layers, from the last one down, only each `step`-th."""
    layers = model.hf_model.model.layers[::-1][::step][::-1]
    heads = model.hf_model.config.num_attention_heads if component == "head_z" else 1
    units, positions = np.divmod(np.arange(heads * len(pair)), len(pair))
    rows = torch.arange(len(units))
    where = {
        "head_z": lambda layer: (layer.self_attn.o_proj, True),
        "mlp_out": lambda layer: (layer.mlp, False),
        "resid_pre": lambda layer: (layer, True),
    }[component]

    def logits(ids: Tensor, module: Any, change: Callable[[Tensor], Tensor], at_input: bool) -> Any:
        if at_input:
            handle = module.register_forward_pre_hook(lambda _, a: (change(a[0]), *a[1:]))
        else:
            handle = module.register_forward_hook(lambda _, __, out: change(out))
        with torch.no_grad():
            out = model.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0]
        handle.remove()
        return out

    grid = []
    for layer in layers:
        module, at_input = where(layer)
        source: list[Tensor] = []
        logits(torch.tensor([pair.clean]), module, lambda x, s=source: s.append(x) or x, at_input)

        def patch(x: Tensor, donor: Tensor = source[0]) -> Tensor:
            x = x.clone()
            view, given = (t.view(*t.shape[:2], heads, -1) for t in (x, donor))
            view[rows, positions, units] = given[0, positions, units]
            return x

        out = logits(torch.tensor([pair.corrupt] * len(units)), module, patch, at_input)
        grid.append(out[:, pair.answer[0]] - out[:, pair.wrong[0]])
    return torch.stack(grid).view(len(layers), heads, len(pair)).float().numpy()


@pytest.mark.parametrize("n", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_heads_by_label_over_pairs_of_unequal_length(
    model: ps.Model, n: int, tmp_path: Path
) -> None:
    """The table of heads equals a loop over the stored arrays; with 8 pairs it is the demo's."""
    pairs = ps.tasks.ioi(model.tokenizer, n=n)
    assert len({len(pair) for pair in pairs}) > 1
    results = ps.sweep(model, pairs, components=["head_z"], out=tmp_path / "r.zarr")
    raw = results.store.read("head_z/logit_diff")[0, 0, 0].astype(float)  # [pair, layer, ...]
    clean, corrupt = results.store.read("baseline/logit_diff")[:, 0, 0].astype(float)
    span = sum(clean - corrupt)
    for label in ("S2", "END"):
        at = [pair.labels[label] for pair in pairs]
        moved = sum(raw[i, :, :, p] - corrupt[i] for i, p in enumerate(at))
        found = results.effect("head_z", "logit_diff").sel(position=label)
        np.testing.assert_allclose(found, moved / span, atol=1e-9)
    if n < 8:
        return
    first, second = results.top("head_z", "logit_diff", n=2).itertuples()
    assert (first.layer, first.head, first.position) == (20, 0, "END")
    assert (second.layer, second.head, second.position) == (23, 3, "END")
    assert (first.effect, second.effect) == pytest.approx((0.483, 0.463), abs=5e-4)


@pytest.fixture(scope="module")
def grids(
    model: ps.Model, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...], str], ps.Results]:
    """The sweep of one pair and component, made once."""
    folder = tmp_path_factory.mktemp("grids")
    return cache(
        lambda texts, c: sweep(model, texts, folder / f"{len(texts[0])}-{c}", components=[c])
    )


@pytest.mark.parametrize(
    ("texts", "component", "step"),
    [*SOME_LAYERS, *(pytest.param(*grid, marks=pytest.mark.slow) for grid in ALL_LAYERS)],
)
def test_whole_grid(
    model: ps.Model,
    grids: Callable[[tuple[str, ...], str], ps.Results],
    texts: tuple[str, ...],
    component: str,
    step: int,
) -> None:
    values = grids(texts, component).store.read(f"{component}/logit_diff")[0, 0, 0, 0]
    hooked = hooked_grid(model, ps.make_pair(model.tokenizer, *texts), component, step)
    assert np.abs(values[::-1][::step][::-1] - hooked).max() <= 2e-4


def test_known_figures(grids: Callable[[tuple[str, ...], str], ps.Results]) -> None:
    results = grids(IOI, "head_z")
    clean, corrupt = results.baseline("logit_diff")[:, 0, 0, 0]
    assert clean == pytest.approx(4.605, abs=5e-4)
    assert corrupt == pytest.approx(-6.474, abs=5e-4)
    top = results.top("head_z", "logit_diff", "denoise", 4)
    assert list(zip(top.layer, top["head"], top.position, strict=True)) == [
        (23, 3, 13),
        (29, 1, 13),
        (20, 0, 13),
        (29, 0, 13),
    ]
    assert top.effect.tolist() == pytest.approx([0.558, 0.306, 0.274, -0.237], abs=5e-4)
    assert float(np.nanmax(results.noise_floor("logit_diff"))) < 1e-4


def test_twice_the_same_bits_and_pairs_share_waves(model: ps.Model, tmp_path: Path) -> None:
    """Prompts of different lengths in one wave; the same plan gives the same bits."""
    pairs = [ps.make_pair(model.tokenizer, *texts) for texts in (IOI, FACT)]
    runs = [
        ps.sweep(
            model,
            pairs,
            components=["mlp_out"],
            metrics=["logit_diff", "kl", "rank"],
            out=tmp_path / name,
        )
        for name in ("a.zarr", "b.zarr")
    ]
    assert runs[0].attrs["plan"]["waves"] == 1
    for metric in ("logit_diff", "kl", "rank"):
        a, b = (r.store.read(f"mlp_out/{metric}").tobytes() for r in runs)
        assert a == b


def test_bfloat16_rounds_like_a_full_forward(model: ps.Model, tmp_path: Path) -> None:
    """The wave's bfloat16 error is at most 1.5 times that of full bfloat16 forwards."""
    half = ps.load_model("smollm2-135m", "bfloat16")
    pair = ps.make_pair(model.tokenizer, *FACT)
    truth = hooked_grid(model, pair, "mlp_out", 3)
    full = hooked_grid(half, pair, "mlp_out", 3)
    results = sweep(half, FACT, tmp_path / "r.zarr", components=["mlp_out"])
    wave = results.store.read("mlp_out/logit_diff")[0, 0, 0, 0][::-1][::3][::-1]
    ratio = np.sqrt(((wave - truth) ** 2).mean() / ((full - truth) ** 2).mean())
    assert ratio <= 1.5


def cells(
    model: ps.Model, pairs: list[ps.Pair], count: int, sae_at: str = "", **settings: Any
) -> int:
    """`count` cells of a sweep, each against a full forward; how many were run."""
    case = Case("llama", pairs, settings, 30, 1, sae_at, 15, model=model, tolerance=2e-4)
    return check(case, count)


KINDS: dict[str, dict[str, Any]] = {
    "pairs": {"direction": "both", "components": ["head_q", "resid_mid"]},
    "noise": {
        "corrupt": {"gaussian": {"sigma": [3], "tokens": [3, 9]}},
        "direction": "denoise",
        "components": ["embed", "head_k", "attn_out"],
    },
    "zero": {"source": "zero", "direction": "noise", "components": ["head_v", "head_pattern"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_component(model: ps.Model, kind: str) -> None:
    """And sets of neurons and heads."""
    sets = {
        "neurons": ["neuron.3.7@-1", "neuron.20.900@9", "neuron.29.1535@13"],
        "circuit": ["head_z.23.3@-1", "head_v.20.0@9", "head_q.25.1@-1", "mlp_out.27@-1"],
    }
    given = {"positions": [9], "sets": sets, **KINDS[kind]}
    assert cells(model, [ps.make_pair(model.tokenizer, *IOI)], 16, **given) > 6


def test_windows_and_what_is_read_inside(model: ps.Model) -> None:
    """Attention, a neuron, probes and a user's own metric, of several layers at once."""
    given = {"components": ["mlp_out", "head_z"], "windows": [5], "positions": [-1]}
    given |= {"metrics": "inner", "direction": "both"}
    assert cells(model, [ps.make_pair(model.tokenizer, *IOI)], 10, **given) > 3


def test_features(model: ps.Model) -> None:
    """Of a random autoencoder: alone, several at one token, with a head, and as a metric."""
    sets = {
        "at one token": ["sae_feature.1@9", "sae_feature.2@9", "sae_feature.5@9"],
        "with a head": ["sae_feature.2@-1", "head_v.12.1@9", "head_z.23.3@-1"],
    }
    pair = ps.make_pair(model.tokenizer, *IOI)
    given = {"components": ["sae_feature"], "positions": [9], "metrics": "inner", "sets": sets}
    assert cells(model, [pair], 6, "resid_post", **given, direction="both") > 3
    ablated = {**given, "source": ["zero", "other"], "direction": "noise", "metrics": METRICS}
    assert cells(model, [pair], 6, "mlp_out", **ablated) > 2


def test_steering(model: ps.Model) -> None:
    vector = torch.from_numpy(4 * np.random.default_rng(0).standard_normal(576))
    given = {"components": ["resid_pre", "mlp_out"], "positions": [9], "source": "vector"}
    pair = ps.make_pair(model.tokenizer, *IOI)
    assert cells(model, [pair], 6, **given, direction="noise", _vector=vector) > 3


def test_means_and_other_pairs(model: ps.Model) -> None:
    """Mean and resample ablation of heads' values and MLPs."""
    swapped = (IOI[0].replace("John gave", "Mary gave"), IOI[0], " John", " Mary")
    pairs = [ps.make_pair(model.tokenizer, *texts) for texts in (IOI, swapped)]
    sources = [{"mean": {"prompts": "clean"}}, {"resample": {"samples": 2}}]
    sets = {"several": ["head_v.8.2", "head_v.25.0@9", "mlp_out.0@-1", "mlp_out.21@9"]}
    given = {"components": ["head_v", "mlp_out"], "positions": [9], "sets": sets}
    assert cells(model, pairs, 8, **given, source=sources, direction="noise") > 3


def test_unequal_prompts_and_metrics(model: ps.Model) -> None:
    """Queries and keys rotated to another place, read by several metrics."""
    text = "Then, " + IOI[1][0].lower() + IOI[1][1:]
    pair = ps.make_pair(model.tokenizer, IOI[0], text, *IOI[2:], align="end")
    assert len(pair.corrupt) == len(pair.clean) + 2
    given = {"components": ["head_q", "head_k", "head_z"], "positions": [9]}
    given |= {"direction": "both", "metrics": METRICS}
    assert cells(model, [pair], 8, **given) > 3


def test_answers_of_several_tokens(model: ps.Model) -> None:
    pair = ps.make_pair(model.tokenizer, *FACT, continuation=" Paris, of course")
    assert len(pair.continuation) == 4
    given = {"components": ["head_z", "mlp_out"], "positions": [3, -1], "direction": "both"}
    assert cells(model, [pair], 6, **given, metrics=[*FEW, "sequence_logprob"]) > 3
