"""verify: some cells of results again, by the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import patchsweep as ps
from cells import METRICS
from inputs import SOURCES, Letters, components_of, pair_of, three, unequal
from oracle.families import EVERY, FAMILIES
from patchsweep.passes.taps import Editor
from patchsweep.store import Store
from tiny import rewrite


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results say where files are from the working directory on."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def results(tmp_path: Path) -> tuple[ps.Model, ps.Results]:
    model = ps.wrap(FAMILIES["llama"].build(3, 1), Letters())
    given = {"components": ["head_z", "head_pattern"], "metrics": ["logit_diff", "rank"]}
    return model, ps.sweep(model, three(), out=tmp_path / "r.zarr", **given)


def test_verify(results: tuple[ps.Model, ps.Results]) -> None:
    model, found = results
    verified = ps.verify(found, 50, model)
    assert verified.holds
    assert (verified.cells, verified.structural) == (50, 12)
    assert verified.left_out == ()
    assert max(verified.differences.values()) < 1e-9


@pytest.mark.parametrize("kind", [1, 2])  # a cell that was run, a structural one
def test_verify_finds_what_is_wrong(results: tuple[ps.Model, ps.Results], kind: int) -> None:
    """One wrong value, once all cells are run again."""
    model, found = results
    names = [f"{c}/logit_diff_status" for c in ("head_z", "head_pattern")]
    status = [found.store.read(name) for name in names]
    first = tuple(int(i[0]) for i in np.nonzero(status[0] == kind))
    rewrite(found.path, "head_z/logit_diff", at(first, lambda value: value + 1e-4))
    verified = ps.verify(found, 10**6, model)
    assert verified.cells == sum(int((s == 1).sum()) for s in status)
    assert verified.structural == sum(int((s == 2).sum()) for s in status)
    assert not verified.holds
    assert verified.differences["logit_diff"] == pytest.approx(1e-4, rel=0.5)
    assert verified.differences["rank"] == 0


def at(cell: tuple[int, ...], change: Callable[[float], float]) -> Callable[[Any], Any]:
    """A change of one value of an array."""

    def changed(values: Any) -> Any:
        values[cell] = change(values[cell])
        return values

    return changed


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_verify_finds_what_is_not_finite(
    results: tuple[ps.Model, ps.Results], wrong: float
) -> None:
    model, found = results
    status = found.store.read("head_z/logit_diff_status")
    first = tuple(int(i[0]) for i in np.nonzero(status == 1))
    rewrite(found.path, "head_z/logit_diff", at(first, lambda _: wrong))
    assert not ps.verify(found, 10**6, model).holds


def test_verify_refuses_to_compare_nothing(results: tuple[ps.Model, ps.Results]) -> None:
    model, found = results
    for cells in (0, -1):
        with pytest.raises(ps.BadInput, match=f"cells is {cells}: .*at least 1"):
            ps.verify(found, cells, model)
    with pytest.raises(ps.BadInput, match="seed is -1"):
        ps.verify(found, 5, model, seed=-1)


def test_verify_of_means_of_what_is_rotated(tmp_path: Path) -> None:
    model = ps.wrap(FAMILIES["llama"].build(2, 1), Letters())
    given: dict[str, Any] = {"components": ["head_q", "head_k", "head_v"], "direction": "noise"}
    given["source"] = [{"mean": {"prompts": "clean", "by": "all"}}]
    verified = ps.verify(ps.sweep(model, three(), out=tmp_path / "r", **given), 50, model)
    assert verified.holds
    assert verified.left_out == ()


def test_verify_refuses_another_model(results: tuple[ps.Model, ps.Results]) -> None:
    other = ps.wrap(FAMILIES["llama"].build(3, 2), Letters())
    with pytest.raises(ps.BadInput, match="another model"):
        ps.verify(results[1], 5, other)


def test_verify_reads_a_block_once(
    results: tuple[ps.Model, ps.Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every metric, however many of its cells are compared."""
    model, found = results
    read: list[tuple[str, str]] = []
    own = Store.read

    def counted(self: Store, name: str, region: Any = ...) -> Any:
        read.append((name, str(region)))
        return own(self, name, region)

    monkeypatch.setattr(Store, "read", counted)
    ps.verify(found, 200, model)
    values = [r for r in read if r[0] in ("head_z/logit_diff", "head_z/rank")]
    blocks = set(values)
    # Once for cells that were run, once for structural ones.
    assert 0 < len(values) <= 2 * len(blocks)


class Words(Letters):
    """A tokenizer of words that are numbers."""

    unk_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return {"input_ids": [int(word) for word in text.split()]}


def sae_of(seed: int) -> dict[str, torch.Tensor]:
    """The weights of an autoencoder for 48 values; only its bias is another for another seed."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (48, 20), "W_dec": (20, 48), "b_dec": (48,)}
    weights = {name: torch.randn(*shape, generator=rng) for name, shape in shapes.items()}
    return weights | {"b_enc": torch.full((20,), float(seed))}


def write(kind: str, folder: Path, seed: int) -> None:
    """The file that a sweep is given, with other content for another seed."""
    if kind == "mean":
        line = {"clean": f"{seed} 2 3", "corrupt": "4 5 6", "answer": "7"}
        (folder / "mean.jsonl").write_text(json.dumps(line))
    elif kind == "sae":
        save_file(sae_of(seed), folder / "features.safetensors")
    else:
        np.save(folder / "v.npy", np.random.default_rng(seed).standard_normal(48))


def given(kind: str, folder: Path) -> dict[str, Any]:
    """Settings of a sweep that is given a file."""
    settings: dict[str, Any] = {"components": ["mlp_out"], "direction": "noise"}
    if kind == "mean":
        settings["source"] = {"mean": {"prompts": str(folder / "mean.jsonl"), "by": "all"}}
    elif kind == "vector":
        settings["source"] = {"vector": {"file": str(folder / "v.npy")}}
    elif kind == "probe":
        probe = {"component": "resid_post", "layer": 1, "position": -1}
        settings["metrics"] = [{"probe": {**probe, "file": str(folder / "v.npy")}}]
    else:
        file = str(folder / "features.safetensors")
        settings |= {"components": ["sae_feature"]}
        settings |= {"sae": {"file": file, "layer": 1, "at": "mlp_out"}}
    return settings


@pytest.mark.parametrize("kind", ["mean", "vector", "probe", "sae"])
def test_verify_refuses_files_that_have_changed(kind: str, tmp_path: Path) -> None:
    """What they hold counts, not when they were written; means may round differently."""
    model = ps.wrap(FAMILIES["llama"].build(2, 1), Words())
    write(kind, tmp_path, 1)
    results = ps.sweep(model, three(), out=tmp_path / "r", **given(kind, tmp_path))
    write(kind, tmp_path, 1)
    assert ps.verify(results, 20, model).holds
    write(kind, tmp_path, 2)
    with pytest.raises(ps.BadInput, match=r"is not what it was then, .*: put that back") as error:
        ps.verify(results, 20, model)
    name = {"mean": "mean.jsonl", "sae": "features.safetensors"}.get(kind, "v.npy")
    assert name in str(error.value)


def test_verify_where_no_module_holds_values(tmp_path: Path) -> None:
    model = ps.wrap(FAMILIES["deepseek_v3"].build(2, 1), Letters())
    settings: dict[str, Any] = {"components": ["head_v", "head_z"], "direction": "noise"}
    settings["source"] = {"mean": {"prompts": "clean", "by": "all"}}
    verified = ps.verify(ps.sweep(model, three(), out=tmp_path / "r", **settings), 20, model)
    assert verified.holds
    assert verified.left_out == ()


def test_verify_is_no_backends_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both backends get wrong in the same way, and no self-test looks at: a vector's scale."""
    model = ps.wrap(FAMILIES["llama"].build(2, 1), Letters())
    np.save(tmp_path / "v.npy", np.ones(48))
    settings: dict[str, Any] = {"components": ["mlp_out"], "direction": "noise"}
    settings["source"] = {"vector": {"file": str(tmp_path / "v.npy"), "scale": 2.0}}
    own = Editor._value

    def value(self: Editor, edit: Any, layer: int) -> Any:
        kind, given = own(self, edit, layer)
        return kind, given / 2 if kind == "vector" else given

    monkeypatch.setattr(Editor, "_value", value)
    for backend in ("wavefront", "nnsight"):
        results = ps.sweep(model, three(), out=tmp_path / backend, backend=backend, **settings)
        assert not ps.verify(results, 20, model).holds


# Everything that a sweep can be given, on families of many kinds, and what the backends make of it.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"components": components_of("llama"), "direction": "both", "metrics": METRICS}),
    ("gemma2", {"components": ["resid_mid", "head_k", "head_pattern"], "metrics": "inner"}),
    ("gpt2", {"components": ["resid_pre"], "windows": [2], "direction": "both"}),
    ("bloom", {"components": ["head_q", "head_z", "attn_out", "neuron"], "direction": "both"}),
    ("qwen3", {"components": ["embed", "mlp_out"], **SOURCES["noise"]}),
    ("granite", {"components": ["mlp_out", "head_q", "head_v"], **SOURCES["ablations"]}),
    ("mistral", {"components": ["attn_out"], **SOURCES["mean over all"]}),
    ("gptj", {"components": ["head_k"], "sets": {"a": ["mlp_out.0", "head_z.1.2@-1<second"]}}),
]


@pytest.mark.parametrize(("family", "given"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_verify_holds(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pairs = [pair_of(rng, 6, 1), pair_of(rng, 6, 2), pair_of(rng, 5, 1), pair_of(rng, 5, 1)]
    if "sets" in given:
        given = given | SOURCES["many"]
    if given.get("metrics") == "inner":
        inner = {"attention": {"layer": 1, "head": 2, "query": -1, "key": 1}}
        neuron = {"neuron": {"layer": 0, "neuron": 3, "position": -2}}
        given = given | {"metrics": ["logit_diff", inner, neuron]}
    model = ps.wrap(EVERY[family].build(3, 1), Letters())
    results = ps.sweep(model, pairs, out=tmp_path / "r", **given)
    verified = ps.verify(results, 40, model)
    assert verified.left_out == ()
    assert verified.structural > 0
    assert verified.differences == dict.fromkeys(results.metrics, pytest.approx(0, abs=1e-7))


def test_verify_holds_where_positions_move(tmp_path: Path) -> None:
    """Prompts of unequal length: queries and keys are rotated to where they go."""
    rng = np.random.default_rng(4)
    pairs = [unequal(rng, 6, 2), unequal(rng, 7, 1)]
    given = {"components": ["head_q", "head_k", "resid_pre"], "direction": "both"}
    for family in ("llama", "gpt2"):
        model = ps.wrap(FAMILIES[family].build(3, 1), Letters())
        results = ps.sweep(model, pairs, out=tmp_path / family, **given)
        verified = ps.verify(results, 60, model)
        assert max(verified.differences.values()) < 1e-7


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "qwen3_moe"])
def test_edges_and_paths(name: str, tmp_path: Path) -> None:
    model = ps.wrap(FAMILIES[name].build(3, 1), Letters())
    rng = np.random.default_rng(4)
    several = {"senders": ["head_z.0.1", "mlp_out.1", "embed"], "through": "mlps"}
    inside = {"attention": {"layer": 2, "head": 1, "query": -1, "key": -1}}
    found = ps.sweep(
        model,
        [pair_of(rng, 7, 1), unequal(rng, 6, 2)],
        out=tmp_path / "r",
        direction="both",
        metrics=["logit_diff", "kl", inside],
        edges={"exact": {"positions": "each", "through": "mlps" if name == "llama" else "nothing"}},
        paths={
            "a": {"senders": "head_z", "receivers": ["head_q.2.1", "mlp_in.2", "head_k.1.0"]},
            "b": {**several, "receivers": ["mlp_in.2", "resid_pre.2"], "positions": [-1, -2]},
            "c": {**several, "receivers": ["logits"], "positions": "each"},
        },
    )
    verified = ps.verify(found, 80, model, seed=1)
    assert verified.left_out == ()
    assert verified.cells == 80
    assert verified.structural == 20
    assert max(verified.differences.values()) < max(1e-9, FAMILIES[name].tolerance)
