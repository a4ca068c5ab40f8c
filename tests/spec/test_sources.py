"""Sources, sets, circuits and inner metrics: what is refused in one line, what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import patchsweep as ps
from inputs import Letters
from oracle.families import FAMILIES, prompts
from patchsweep.pairs import Pair


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(FAMILIES["llama"].build(3), Letters())


@pytest.fixture
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [
        Pair(*prompts(rng, 50, n, 2), (5,), (7,), {"S2": 2}, group=f"t{i % 2}")
        for i, n in enumerate((7, 7, 6, 6))
    ]


def bad_shape(logits: torch.Tensor, _: ps.Context) -> torch.Tensor:
    return logits.mean(0)


def written(folder: Path) -> dict[str, str]:
    """Files of wrong sizes."""
    np.save(folder / "v.npy", np.ones(7))
    np.save(folder / "nan.npy", np.full(48, np.nan))
    tensors = {"W_enc": torch.ones(9, 4), "W_dec": torch.ones(4, 9), "b_enc": torch.ones(4)}
    save_file({**tensors, "b_dec": torch.zeros(9)}, folder / "narrow.safetensors")
    (folder / "v.pt").write_bytes(b"x")
    return {name: str(folder / name) for name in ("v.npy", "nan.npy", "narrow.safetensors", "v.pt")}


HEADS: dict[str, Any] = {"components": ["head_z"]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"components": ["mlp_out"], "windows": [4]}, "windows: 4 layers, but the model has 3"),
    ({**HEADS, "positions": ["S9"]}, "unknown label 'S9'"),
    ({"sets": {"a": ["head_z.3.0"]}}, "set 'a': head_z.3.0@all: no layer 3: use 0 to 2"),
    ({"sets": {"a": ["head_k.0.2"]}}, "no kv_head 2: use 0 to 1"),
    ({"sets": {"a": ["mlp_out.0@S9"]}}, "unknown label 'S9'"),
    ({"sets": {"a": ["mlp_out.0<mean"]}}, "no source 'mean' in this sweep"),
    ({**HEADS, "source": "zero"}, "nothing to restore: set direction: noise"),
    ({**HEADS, "source": "second"}, "pair 0 has no prompt 'second' as a source"),
    ({**HEADS, "corrupt": {"gaussian": {"tokens": ["S9"]}}}, "unknown label 'S9'"),
    (
        {**HEADS, "source": {"vector": {"file": "v.npy"}}, "direction": "noise"},
        r"v.npy: the vector is \[7\], head_z of this model needs \[8\]",
    ),
    (
        {**HEADS, "source": {"vector": {"file": "v.pt"}}, "direction": "noise"},
        "v.pt: unknown kind of file",
    ),
    (
        {
            "components": ["mlp_out"],
            "source": {"vector": {"file": "nan.npy"}},
            "direction": "noise",
        },
        "nan.npy: has values that are not finite",
    ),
    (
        {
            "components": ["head_pattern"],
            "source": {"mean": {"prompts": "clean"}},
            "direction": "noise",
        },
        "a row of attention has no mean",
    ),
    (
        {
            "components": ["sae_feature"],
            "sae": {"file": "narrow.safetensors", "layer": 1, "at": "resid_pre"},
        },
        "9 values",
    ),
    (
        {
            **HEADS,
            "metrics": [
                {"probe": {"component": "mlp_out", "layer": 0, "position": 0, "file": "v.npy"}}
            ],
        },
        r"the probe is \[7\], mlp_out of this model needs \[48\]",
    ),
    (
        {**HEADS, "metrics": [{"attention": {"layer": 9, "head": 0, "query": 1, "key": 0}}]},
        "no layer 9: use 0 to 2",
    ),
    (
        {**HEADS, "metrics": [{"attention": {"layer": 0, "head": 0, "query": 1, "key": 2}}]},
        "the key comes after the query",
    ),
    (
        {**HEADS, "metrics": [{"neuron": {"layer": 0, "neuron": 64, "position": 0}}]},
        "no neuron 64: use 0 to 63",
    ),
    ({**HEADS, "metrics": ["sequence_logprob"]}, "pair 0 has no continuation"),
    ({**HEADS, "metrics": [{"kl": {"at": "S9"}}]}, "unknown label 'S9'"),
    (
        {**HEADS, "metrics": [{"callable": {"path": "test_sources:bad_shape"}}]},
        r"returned the shape \[50\] for \d+ rows of logits: return one value per row",
    ),
    (
        {**HEADS, "metrics": [{"callable": {"path": "test_sources:nothing"}}]},
        "callable test_sources:nothing: .*write package.module:function",
    ),
    (
        {**HEADS, "metrics": ["relative_prob"], "source": "zero", "direction": "noise"},
        "relative_prob compares with the corrupt run",
    ),
    (
        {"sets": {"a": {"within": ["head_z"], "besides": ["head_z.0.0@S2"]}}},
        "position S2 is none of this sweep's",
    ),
    ({"circuit": {"ranking": ["head_z.0.0"], "sizes": [2]}}, "2 is more than the 1 sites"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_refused_in_one_line(
    model: ps.Model, pairs: list[Pair], tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    files = written(tmp_path)

    def at_home(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: at_home(v) for k, v in value.items()}
        if isinstance(value, list):
            return [at_home(v) for v in value]
        return files.get(value, value) if isinstance(value, str) else value

    with pytest.raises(ps.BadInput, match=words) as error:
        ps.sweep(model, pairs, out=tmp_path / "r.zarr", **at_home(settings))
    assert "\n" not in str(error.value)
    if "callable" not in str(settings):
        assert not (tmp_path / "r.zarr").exists()


def test_prompts_without_a_corrupt_one(model: ps.Model, tmp_path: Path) -> None:
    pair = Pair((3, 4, 5, 6), (), (5,), (7,))
    with pytest.raises(ps.BadInput, match="pair 0 has no corrupt prompt: add one, or use a source"):
        ps.sweep(model, [pair], components=["head_z"], out=tmp_path / "r.zarr")
    results = ps.sweep(
        model, [pair], components=["head_z"], source="zero", direction="noise", out=tmp_path / "r"
    )
    ds = results.to_xarray("head_z")
    assert ds.logit_diff.sizes == {"pair": 1, "layer": 3, "head": 6, "position": 4}
    clean = results.baseline("logit_diff")[0].item()
    change = ds.logit_diff - clean  # no source run: effects are differences
    np.testing.assert_allclose(
        ds.logit_diff_effect.where(ds.logit_diff_status == 1),
        change.where(ds.logit_diff_status == 1),
    )
    assert np.isnan(results.baseline("logit_diff")[1]).all()


def test_noise_of_several_sizes(model: ps.Model, pairs: list[Pair], tmp_path: Path) -> None:
    results = ps.sweep(
        model,
        pairs,
        components=["mlp_out"],
        corrupt={"gaussian": {"sigma": [1, 3], "samples": 3, "tokens": ["S2"]}},
        out=tmp_path / "r",
    )
    ds = results.to_xarray("mlp_out")
    assert ds.source.values.tolist() == ["sigma=1", "sigma=3"]
    assert ds.logit_diff.dims == ("source", "sample", "pair", "layer", "position")
    assert results.attrs["noise_scale"] > 0
    # The same draws, larger: the common random numbers of all sigmas.
    again = ps.sweep(
        model,
        pairs,
        components=["mlp_out"],
        corrupt={"gaussian": {"sigma": 3, "samples": 3, "tokens": ["S2"]}},
        out=tmp_path / "again",
    )
    alone = again.to_xarray("mlp_out").logit_diff.values
    np.testing.assert_allclose(alone, ds.logit_diff.sel(source="sigma=3").values, atol=1e-9)


def test_windows_beside_the_sum_of_their_layers(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    results = ps.sweep(
        model, pairs, components=["mlp_out"], windows=[2], positions=["S2", -1], out=tmp_path / "r"
    )
    joint, total = results.windows("mlp_out", 2, "logit_diff", "denoise")
    single = results.effect("mlp_out", "logit_diff", "denoise").values[:, 0]
    np.testing.assert_allclose(total, single[:-1] + single[1:])
    sets = results.to_xarray("sets").logit_diff_effect
    names = ["mlp_out.0-1@S2", "mlp_out.0-1@-1", "mlp_out.1-2@S2", "mlp_out.1-2@-1"]
    assert sorted(sets.set.values.tolist()) == sorted(names)
    assert joint.shape == (2, 2)
    effects = results.effect("sets", "logit_diff", "denoise").values[0, 0]
    by_name = dict(zip(sets.set.values.tolist(), effects, strict=True))
    np.testing.assert_array_equal(joint.ravel(), [by_name[name] for name in names])
    assert not np.allclose(joint, total)
    with pytest.raises(ps.BadInput, match="no windows of 3 layers"):
        results.windows("mlp_out", 3, "logit_diff", "denoise")


def test_a_resumed_sweep_has_the_same_vectors(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", np.ones(48))
    settings: dict[str, Any] = {
        "components": ["mlp_out"],
        "source": {"vector": {"file": tmp_path / "v.npy"}},
        "direction": "noise",
    }
    ps.sweep(model, pairs, out=tmp_path / "r", **settings)
    ps.sweep(model, pairs, out=tmp_path / "r", resume=True, **settings)
    np.save(tmp_path / "v.npy", np.zeros(48))
    with pytest.raises(ps.BadInput, match=r"another sweep .other means, vectors"):
        ps.sweep(model, pairs, out=tmp_path / "r", resume=True, **settings)
