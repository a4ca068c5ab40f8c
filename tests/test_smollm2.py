"""The trained SmolLM2-135M in float32: whole grids against full forwards with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchsweep as ps
from oracle import heads, oracle
from oracle.families import Family

IOI = (
    "When John and Mary went to the store, John gave a drink to",
    "When John and Mary went to the store, Mary gave a drink to",
    " Mary",
    " John",
)
FACT = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
GRIDS = [(IOI, "head_z"), (FACT, "head_z"), (IOI, "mlp_out"), (FACT, "resid_pre")]


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.load_model("smollm2-135m")


def sweep(model: ps.Model, texts: tuple[str, ...], out: Path, **settings: Any) -> ps.Results:
    return ps.sweep(model, [ps.make_pair(model.tokenizer, *texts)], out=out, **settings)


def hooked_grid(model: ps.Model, pair: ps.Pair, component: str) -> np.ndarray:
    """logit_diff [layer, unit, position]: every cell a row of a batch of full forwards."""
    layers = model.hf_model.model.layers
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


@pytest.mark.parametrize(("texts", "component"), GRIDS)
def test_whole_grid(
    model: ps.Model, tmp_path: Path, texts: tuple[str, ...], component: str
) -> None:
    pair = ps.make_pair(model.tokenizer, *texts)
    found = sweep(model, texts, tmp_path / "r.zarr", components=[component])
    values = found.store.read(f"{component}/logit_diff")[0, 0, 0, 0]
    assert np.abs(values - hooked_grid(model, pair, component)).max() <= 2e-4


def test_known_figures(model: ps.Model, tmp_path: Path) -> None:
    results = sweep(model, IOI, tmp_path / "r.zarr", components=["head_z"])
    clean, corrupt = results.baseline("logit_diff")[:, 0, 0, 0]
    assert clean == pytest.approx(4.605, abs=5e-4)
    assert corrupt == pytest.approx(-6.474, abs=5e-4)
    top = results.top("head_z", "logit_diff", "denoise", 4)
    assert [(c.layer, c.unit, c.position) for c in top] == [
        (23, 3, 13),
        (29, 1, 13),
        (20, 0, 13),
        (29, 0, 13),
    ]
    assert [c.effect for c in top] == pytest.approx([0.558, 0.306, 0.274, -0.237], abs=5e-4)
    assert float(np.nanmax(results.noise_floor("logit_diff"))) < 1e-4


def test_twice_the_same_bits_and_pairs_share_waves(model: ps.Model, tmp_path: Path) -> None:
    """Prompts of different lengths in one wave; the same plan gives the same bits."""
    pairs = [ps.make_pair(model.tokenizer, *texts) for texts in (IOI, FACT)]
    runs = [
        ps.sweep(
            model,
            pairs,
            components=["mlp_out", "resid_post"],
            metrics=["logit_diff", "kl", "rank"],
            out=tmp_path / name,
        )
        for name in ("a.zarr", "b.zarr")
    ]
    assert runs[0].attrs["plan"]["waves"] == 1
    for metric in ("logit_diff", "kl", "rank"):
        for component in ("mlp_out", "resid_post"):
            a, b = (r.store.read(f"{component}/{metric}").tobytes() for r in runs)
            assert a == b


def test_bfloat16_rounds_like_a_full_forward(tmp_path: Path) -> None:
    """The wave's bfloat16 error is at most 1.5 times that of full bfloat16 forwards."""
    exact, half = (ps.load_model("smollm2-135m", dtype) for dtype in ("float32", "bfloat16"))
    pair = ps.make_pair(exact.tokenizer, *FACT)
    truth = hooked_grid(exact, pair, "mlp_out")
    full = hooked_grid(half, pair, "mlp_out")
    results = sweep(half, FACT, tmp_path / "r.zarr", components=["mlp_out"])
    wave = results.store.read("mlp_out/logit_diff")[0, 0, 0, 0]
    ratio = np.sqrt(((wave - truth) ** 2).mean() / ((full - truth) ** 2).mean())
    assert ratio <= 1.5


KINDS: dict[str, dict[str, Any]] = {
    "pairs": {"direction": "both"},
    "noise": {"corrupt": {"gaussian": {"sigma": 3, "tokens": [3, 9]}}, "direction": "both"},
    "zero": {"source": "zero", "direction": "noise"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_component(model: ps.Model, tmp_path: Path, kind: str) -> None:
    """Cells of every component, and sets of neurons and heads, against full forwards."""
    given = KINDS[kind]
    neurons = [f"neuron.{layer}.{unit}@{at}" for layer, unit, at in ((3, 7, -1), (20, 900, 9))]
    sets = {
        "neurons": [*neurons, "neuron.29.1535@13"],
        "circuit": ["head_z.23.3@-1", "head_v.20.0@9", "head_q.25.1@-1", "mlp_out.27@-1"],
    }
    components = ["embed", "head_q", "head_k", "head_v", "head_pattern", "attn_out", "resid_mid"]
    results = sweep(
        model, IOI, tmp_path / "r", components=components, positions=[9, -1], sets=sets, **given
    )
    pair = ps.make_pair(model.tokenizer, *IOI)
    rng = np.random.default_rng(0)
    cells: list[tuple[str, Any]] = []
    for name in components:
        status = results.store.read(f"{name}/logit_diff_status")
        ran = np.argwhere(status == 1)
        for index in ran[rng.integers(len(ran), size=3)]:
            position = (9, len(pair) - 1)[index[6]]
            cells.append((name, (index, [(name, int(index[4]), int(index[5]), position)])))
    for i, sites in enumerate(sets.values()):
        for d in range(len(results.grid("sets").directions)):
            parts = [ps.parse_site(site) for site in sites]
            places = [(p.component, p.layer, p.unit or 0, int(p.position) % 14) for p in parts]
            cells.append(("sets", ((d, 0, 0, 0, 0, 0, i), places)))

    noise = None
    if kind == "noise":
        width = model.hf_model.config.hidden_size
        scale = 3 * results.attrs["noise_scale"]
        noise = torch.zeros(len(pair), width)
        for slot, position in enumerate((3, 9)):
            drawn = np.random.default_rng([0, 0, 0, slot]).standard_normal(width)
            noise[position] = torch.from_numpy(drawn * scale)
        used = model.hf_model.get_input_embeddings()(torch.tensor([pair.clean[3], pair.clean[9]]))
        assert results.attrs["noise_scale"] == pytest.approx(
            float(used.std(correction=0)), rel=1e-4
        )
    clean = heads.Prompt(pair.clean)
    other = heads.Prompt(pair.corrupt) if noise is None else heads.Prompt(pair.clean, noise)
    llama = Family("llama")
    for name, (index, places) in cells:
        denoise = results.grid(name).directions[index[0]] == "denoise"
        source: Any = clean if denoise else other
        if kind == "zero":
            source = torch.zeros(())
        patches = [heads.Patch(c, layer, unit, {p: p}, source) for c, layer, unit, p in places]
        logits = heads.logits(model.hf_model, llama, other if denoise else clean, patches)[-1]
        expected = float(logits[pair.answer[0]] - logits[pair.wrong[0]])
        found = results.store.read(f"{name}/logit_diff")[tuple(index)]
        assert abs(found - expected) <= 2e-4, (name, index)


LLAMA = Family("llama")


def logit_diff(pair: ps.Pair, logits: Tensor) -> float:
    return float(logits[-1, pair.answer[0]] - logits[-1, pair.wrong[0]])


def test_means_and_other_pairs(model: ps.Model, tmp_path: Path) -> None:
    """Mean and resample ablation of heads' values and MLPs."""
    swapped = (IOI[0].replace("John gave", "Mary gave"), IOI[0], " John", " Mary")
    pairs = [ps.make_pair(model.tokenizer, *texts) for texts in (IOI, swapped)]
    results = ps.sweep(
        model,
        pairs,
        components=["head_v", "mlp_out"],
        positions=[9, -1],
        direction="noise",
        source=[{"mean": {"prompts": "clean"}}, "resample"],
        out=tmp_path / "r",
    )
    runs = [heads.Prompt(pair.clean) for pair in pairs]
    seen = [heads.activations(model.hf_model, LLAMA, run) for run in runs]
    for name, layer, unit in (("head_v", 8, 2), ("mlp_out", 21, 0), ("head_v", 25, 0)):
        mean = (seen[0][name, layer] + seen[1][name, layer])[9, unit] / 2
        for s, source in enumerate((mean, runs[1])):
            patch = heads.Patch(name, layer, unit, {9: 9}, source)
            expected = logit_diff(pairs[0], heads.logits(model.hf_model, LLAMA, runs[0], [patch]))
            found = results.store.read(f"{name}/logit_diff")[0, s, 0, 0, layer, unit, 0]
            assert abs(found - expected) <= 2e-4, (name, layer, s)


def test_unequal_prompts_and_metrics(model: ps.Model, tmp_path: Path) -> None:
    """Queries and keys rotated to another place, read by several metrics."""
    pair = ps.make_pair(
        model.tokenizer,
        IOI[0],
        "Then, " + IOI[1][0].lower() + IOI[1][1:],
        " Mary",
        " John",
        align="end",
    )
    assert len(pair.corrupt) == len(pair.clean) + 2
    results = ps.sweep(
        model,
        [pair],
        components=["head_q", "head_k", "head_z"],
        positions=[5, 9, -1],
        direction="both",
        metrics=["logit_diff", "kl", "kl_reverse", "total_variation", "rank", "logprob"],
        out=tmp_path / "r",
    )
    clean, corrupt = heads.Prompt(pair.clean), heads.Prompt(pair.corrupt)
    reference = heads.logits(model.hf_model, LLAMA, clean)[-1]
    cells = [
        ("head_q", 20, 4, 13),
        ("head_k", 12, 1, 9),
        ("head_z", 23, 3, 13),
        ("head_k", 4, 0, 5),
    ]
    for name, layer, unit, position in cells:
        for d, direction in enumerate(("denoise", "noise")):
            there = {position + 2: position} if direction == "denoise" else {position: position + 2}
            run, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
            patch = heads.Patch(name, layer, unit, there, source)
            logits = heads.logits(model.hf_model, LLAMA, run, [patch])
            at = (d, 0, 0, 0, layer, unit, [5, 9, 13].index(position))
            last = logits[-1]
            expected = {
                "logit_diff": logit_diff(pair, logits),
                "kl": oracle.kl(reference, last),
                "kl_reverse": oracle.kl(last, reference),
                "total_variation": oracle.total_variation(reference, last),
                "rank": oracle.rank(last, pair.answer),
                "logprob": oracle.logprob(last, pair.answer),
            }
            for metric, value in expected.items():
                found = results.store.read(f"{name}/{metric}")[at]
                assert abs(found - value) <= 2e-4, (name, direction, metric)
