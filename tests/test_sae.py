"""Sparse autoencoders: every published layout against plain numpy, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from patchsweep.errors import BadInput
from patchsweep.sae import SAE, SITES, load_sae

Array = NDArray[np.float64]
Weights = dict[str, Array]

WIDTH, FEATURES, TOKENS = 6, 10, 40
HOOK = "blocks.8.hook_resid_pre"
OLD = {  # flat, as SAE-Lens wrote before version 6
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": FEATURES,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "hook_name": HOOK,
    "hook_layer": 8,
    "hook_head_index": None,
    "dtype": "float32",
}
NEW = {  # nested, since version 6
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": FEATURES,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": None},
}
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 32,
    "k": 3,
    "transcode": False,
    "d_in": WIDTH,
}


def draw(*names: str, seed: int = 0) -> Weights:
    """Random weights, float64 so that nothing hides in rounding."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (WIDTH, FEATURES), "W_dec": (FEATURES, WIDTH), "b_dec": (WIDTH,)}
    every = ("W_enc", "W_dec", "b_dec", *(names or ("b_enc",)))
    drawn = {name: rng.normal(size=shapes.get(name, (FEATURES,))) for name in every}
    if "threshold" in drawn:
        drawn["threshold"] = np.abs(drawn["threshold"])
    return drawn


@pytest.fixture
def x() -> Array:
    return np.random.default_rng(99).normal(size=(TOKENS, WIDTH))


def features(sae: SAE, x: Array) -> Array:
    found: Array = sae.encode(torch.from_numpy(x)).numpy()
    assert found.dtype == np.float64
    assert found.shape == (len(x), sae.features)
    return found


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def top(x: Array, k: int) -> Array:
    """The k largest of each row, the rest 0."""
    kept = np.zeros_like(x)
    for row, out in zip(x, kept, strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        out[best] = row[best]
    return kept


def same(found: Array, expected: Array) -> None:
    """Equal up to float64 rounding; and the comparison is about something."""
    assert 0 < np.count_nonzero(expected) < expected.size
    assert np.array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def sae_lens(folder: Path, weights: Weights, cfg: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def sparsify(folder: Path, weights: Weights, cfg: Mapping[str, Any] = SPARSIFY) -> Path:
    folder.mkdir()
    linear = {
        "encoder.weight": np.ascontiguousarray(weights["W_enc"].T),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    save_file(linear, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def gemma_scope(folder: Path, weights: Weights) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights)  # type: ignore[arg-type]
    return folder


def plain(file: Path, weights: Weights, **metadata: str) -> Path:
    save_file(weights, file, metadata=metadata)
    return file


# What is read


def test_by_hand() -> None:
    sae = SAE(
        layer=0,
        at="mlp_out",
        encoder=torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]),
        decoder=torch.eye(3, 2),
        bias=torch.tensor([0.0, -1.0, 0.5]),
        centre=torch.tensor([1.0, 0.0]),
    )
    x = torch.tensor([[3.0, 2.0], [0.0, 1.0]])  # centred: (2, 2) and (-1, 1)
    assert sae.encode(x).tolist() == [[2.0, 1.0, 2.5], [0.0, 0.0, 0.0]]
    assert (sae.width, sae.features) == (2, 3)


@pytest.mark.parametrize("centred", [True, False])
def test_sae_lens_standard(tmp_path: Path, x: Array, centred: bool) -> None:
    w = draw()
    sae = load_sae(sae_lens(tmp_path, w, OLD | {"apply_b_dec_to_input": centred}))
    assert (sae.layer, sae.at, sae.width, sae.features) == (8, "resid_pre", WIDTH, FEATURES)
    same(features(sae, x), relu((x - centred * w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
    assert np.array_equal(sae.decoder.numpy(), w["W_dec"])


def test_sae_lens_centres_where_it_does_not_say(tmp_path: Path, x: Array) -> None:
    w = draw()
    sae = load_sae(sae_lens(tmp_path, w, {"hook_point": HOOK}))  # the oldest name of the hook
    assert (sae.layer, sae.at) == (8, "resid_pre")
    same(features(sae, x), relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))


def test_sae_lens_nested(tmp_path: Path, x: Array) -> None:
    w = draw("b_enc", "threshold")
    sae = load_sae(sae_lens(tmp_path, w, NEW | {"architecture": "jumprelu"}))
    assert (sae.layer, sae.at) == (3, "head_z")
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    same(features(sae, x), np.where(before > w["threshold"], before, 0))


def test_the_weights_file_is_its_folder(tmp_path: Path, x: Array) -> None:
    folder = sae_lens(tmp_path, draw(), OLD)
    file = folder / "sae_weights.safetensors"
    assert np.array_equal(features(load_sae(file), x), features(load_sae(str(folder)), x))


def test_a_threshold_below_zero_is_relu(tmp_path: Path, x: Array) -> None:
    w = draw("b_enc", "threshold")
    w["threshold"] *= -1
    sae = load_sae(sae_lens(tmp_path, w, NEW | {"architecture": "jumprelu"}))
    same(features(sae, x), relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))


def test_log_threshold(tmp_path: Path, x: Array) -> None:
    w = draw("b_enc", "log_threshold")
    sae = load_sae(sae_lens(tmp_path, w, NEW | {"architecture": "jumprelu"}))
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    same(features(sae, x), np.where(before > np.exp(w["log_threshold"]), before, 0))


TOPK = {
    "old": OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
    "new": NEW | {"architecture": "topk", "k": 3},
}


@pytest.mark.parametrize("age", TOPK)
def test_sae_lens_topk(tmp_path: Path, x: Array, age: str) -> None:
    w = draw()
    sae = load_sae(sae_lens(tmp_path, w, TOPK[age]))
    found = features(sae, x)
    same(found, top(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), 3))
    assert np.count_nonzero(found, axis=1).max() == 3


def test_topk_keeps_fewer_where_fewer_are_positive(tmp_path: Path, x: Array) -> None:
    w = draw()
    w["b_enc"] -= 3
    sae = load_sae(sae_lens(tmp_path, w, TOPK["new"]))
    found = features(sae, x)
    same(found, top(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), 3))
    assert np.count_nonzero(found, axis=1).min() < 3


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_topk_is_one_threshold(tmp_path: Path, x: Array, name: str) -> None:
    w = draw() | {"topk_threshold": np.array(0.7)}
    sae = load_sae(sae_lens(tmp_path, w, NEW | {"architecture": name, "k": 2.5}))
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    same(features(sae, x), np.where(before > 0.7, before, 0))


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_measured_by_decoder_norm(tmp_path: Path, x: Array, name: str) -> None:
    """The choice is made on pre-activations times norm; what is written is not changed by it."""
    w = draw()
    cfg = NEW | {"architecture": name, "k": 3, "rescale_acts_by_decoder_norm": True}
    extra = {"threshold": np.full(FEATURES, 0.9)} if name == "batchtopk" else {}
    sae = load_sae(sae_lens(tmp_path, w | extra, cfg))
    norm = np.linalg.norm(w["W_dec"], axis=1)
    before = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    scaled = before * norm
    expected = top(scaled, 3) if name == "topk" else np.where(scaled > 0.9, scaled, 0)
    found = features(sae, x)
    same(found, expected)
    np.testing.assert_allclose(
        found @ sae.decoder.numpy(), (expected / norm) @ w["W_dec"], rtol=1e-10, atol=1e-12
    )
    assert not np.array_equal(top(before, 3) != 0, top(scaled, 3) != 0)  # else this tests nothing


@pytest.mark.parametrize("cfg", [OLD, NEW], ids=["old", "new"])
def test_gated(tmp_path: Path, x: Array, cfg: dict[str, Any]) -> None:
    w = draw("b_gate", "r_mag", "b_mag")
    sae = load_sae(sae_lens(tmp_path, w, cfg | {"architecture": "gated"}))
    centred = x - w["b_dec"]
    gate = centred @ w["W_enc"] + w["b_gate"] > 0
    size = relu(centred @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])
    same(features(sae, x), gate * size)
    assert np.any(gate & (size == 0)) and np.any(~gate & (size > 0))


@pytest.mark.parametrize("where", ["cfg.json", "activation_scaler.json"])
@pytest.mark.parametrize("said", ["expected_average_only_in", True])
def test_a_scaled_input_is_folded_in(tmp_path: Path, x: Array, where: str, said: object) -> None:
    w = draw("b_enc", "threshold")
    cfg = OLD | {"architecture": "jumprelu", "normalize_activations": said}
    factor = {"norm_scaling_factor": 0.4} if where == "cfg.json" else {}
    folder = sae_lens(tmp_path, w, cfg | factor)
    if not factor:
        (folder / where).write_text(json.dumps({"scaling_factor": 0.4, "has_whitening": False}))
    sae = load_sae(folder)
    before = (0.4 * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    same(features(sae, x), np.where(before > w["threshold"], before, 0))
    # the decoder writes in the units of x: one over the factor
    np.testing.assert_allclose(sae.decoder.numpy(), w["W_dec"] / 0.4, rtol=1e-14)


def test_a_scaler_already_folded_in(tmp_path: Path, x: Array) -> None:
    w = draw()
    folder = sae_lens(tmp_path, w, OLD)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null}')
    same(features(load_sae(folder), x), relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_tuned_scale_goes_to_the_decoder(tmp_path: Path, x: Array, name: str) -> None:
    w = draw("b_enc", name)
    sae = load_sae(sae_lens(tmp_path, w, OLD | {"finetuning_scaling_factor": True}))
    same(features(sae, x), relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
    np.testing.assert_allclose(sae.decoder.numpy(), w[name][:, None] * w["W_dec"], rtol=1e-14)


def test_a_tuned_scale_of_ones_is_nothing(tmp_path: Path) -> None:
    w = draw()
    sae = load_sae(sae_lens(tmp_path, w | {"scaling_factor": np.ones(FEATURES)}, OLD))
    assert np.array_equal(sae.decoder.numpy(), w["W_dec"])


@pytest.mark.parametrize(
    ("name", "layer", "at"),
    [
        ("layers.10", 10, "resid_post"),
        ("layers.5.mlp", 5, "mlp_out"),
        ("model.layers.7.self_attn", 7, "attn_out"),
        ("gpt_neox.layers.2.attention", 2, "attn_out"),
        ("h.0.attn", 0, "attn_out"),
    ],
)
def test_sparsify(tmp_path: Path, x: Array, name: str, layer: int, at: str) -> None:
    w = draw()
    sae = load_sae(sparsify(tmp_path / name, w))
    assert (sae.layer, sae.at) == (layer, at)
    same(features(sae, x), top(relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), 3))
    assert np.array_equal(sae.decoder.numpy(), w["W_dec"])


@pytest.mark.parametrize(
    ("repository", "at"),
    [
        ("gemma-scope-2b-pt-res", "resid_post"),
        ("gemma-scope-9b-pt-mlp", "mlp_out"),
        ("models--google--gemma-scope-2b-pt-att", "head_z"),
    ],
)
def test_gemma_scope(tmp_path: Path, x: Array, repository: str, at: str) -> None:
    w = draw("b_enc", "threshold")
    folder = gemma_scope(tmp_path / repository / "layer_20/width_16k/average_l0_71", w)
    before = x @ w["W_enc"] + w["b_enc"]
    for path in (folder, folder / "params.npz"):
        sae = load_sae(path)
        assert (sae.layer, sae.at) == (20, at)
        same(features(sae, x), np.where(before > w["threshold"], before, 0))


def test_plain_standard(tmp_path: Path, x: Array) -> None:
    w = draw()
    renamed = {"encoder": w["W_enc"], "decoder": w["W_dec"], "b_enc": w["b_enc"]}
    sae = load_sae(plain(tmp_path / "mine.safetensors", renamed), layer=1, at="resid_mid")
    assert (sae.layer, sae.at) == (1, "resid_mid")
    same(features(sae, x), relu(x @ w["W_enc"] + w["b_enc"]))


def test_plain_does_not_centre_unless_it_says_so(tmp_path: Path, x: Array) -> None:
    w = draw()
    said = {"layer": "2", "at": "attn_out"}
    here = load_sae(plain(tmp_path / "a.safetensors", w, **said))
    same(features(here, x), relu(x @ w["W_enc"] + w["b_enc"]))
    said["apply_b_dec_to_input"] = "True"
    there = load_sae(plain(tmp_path / "b.safetensors", w, **said))
    same(features(there, x), relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
    assert (here.layer, here.at) == (there.layer, there.at) == (2, "attn_out")


def test_plain_jumprelu_and_topk(tmp_path: Path, x: Array) -> None:
    w = draw("b_enc", "threshold")
    before = x @ w["W_enc"] + w["b_enc"]
    jump = load_sae(plain(tmp_path / "j.safetensors", w, hook_name="blocks.4.hook_mlp_out"))
    assert (jump.layer, jump.at) == (4, "mlp_out")
    same(features(jump, x), np.where(before > w["threshold"], before, 0))
    del w["threshold"]
    k = load_sae(plain(tmp_path / "k.safetensors", w, k="4"), layer=0, at="resid_pre")
    same(features(k, x), top(relu(before), 4))


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        ("hook_resid_pre", "resid_pre"),
        ("hook_resid_mid", "resid_mid"),
        ("hook_resid_post", "resid_post"),
        ("hook_attn_out", "attn_out"),
        ("hook_mlp_out", "mlp_out"),
        ("attn.hook_z", "head_z"),
    ],
)
def test_hook_names(tmp_path: Path, hook: str, at: str) -> None:
    sae = load_sae(sae_lens(tmp_path, draw(), OLD | {"hook_name": f"blocks.11.{hook}"}))
    assert (sae.layer, sae.at) == (11, at)


def test_the_caller_wins(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, draw(), OLD)
    sites = [(s.layer, s.at) for s in (load_sae(folder, layer=2), load_sae(folder, at="mlp_out"))]
    assert sites == [(2, "resid_pre"), (8, "mlp_out")]
    sae_lens(tmp_path, draw(), OLD | {"hook_name": "somewhere.else"})
    sae = load_sae(folder, layer=0, at="resid_post")
    assert (sae.layer, sae.at) == (0, "resid_post")


# Numbers


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)]
)
def test_features_have_the_dtype_of_x(
    tmp_path: Path, x: Array, dtype: torch.dtype, tolerance: float
) -> None:
    w = draw()
    sae = load_sae(sae_lens(tmp_path, w, OLD))
    found = sae.encode(torch.from_numpy(x).to(dtype))
    assert found.dtype == dtype
    expected = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    once = sae.to("cpu", dtype)
    assert once.to("cpu", dtype) is once
    assert torch.equal(once.encode(torch.from_numpy(x).to(dtype)), found)


def test_stored_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    w = {name: torch.from_numpy(t).to(torch.bfloat16) for name, t in draw().items()}
    save_torch(w, str(tmp_path / "half.safetensors"))
    sae = load_sae(tmp_path / "half.safetensors", layer=0, at="resid_pre")
    assert sae.encoder.dtype == torch.float32
    assert torch.equal(sae.encoder, w["W_enc"].float())


def test_leading_axes_are_free(tmp_path: Path, x: Array) -> None:
    w = draw("b_gate", "r_mag", "b_mag")
    sae = load_sae(sae_lens(tmp_path, w, OLD | {"architecture": "gated"}))
    rows = torch.from_numpy(x)
    assert torch.equal(sae.encode(rows.reshape(2, -1, WIDTH)).flatten(0, 1), sae.encode(rows))


# What is refused: one line that names the place


def refused(match: str, do: Callable[[], object]) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        do()
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    refused("no SAE at .*nowhere", lambda: load_sae(tmp_path / "nowhere"))
    refused("no SAE in folder", lambda: load_sae(tmp_path))
    save_file(draw(), tmp_path / "sae_weights.safetensors")
    refused(r"no cfg\.json", lambda: load_sae(tmp_path, layer=0, at="resid_pre"))
    (tmp_path / "cfg.json").write_text("{")
    refused("is not JSON", lambda: load_sae(tmp_path))
    (tmp_path / "cfg.json").write_text("[]")
    refused("not a table", lambda: load_sae(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    refused("cannot read an SAE from", lambda: load_sae(tmp_path / "notes.txt"))


@pytest.mark.parametrize("name", ["ae.pt", "pytorch_model.bin", "sae.pth", "SAE.PKL"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "hit")))
    for path in (file, tmp_path):
        refused("is a pickle.*save_file", lambda path=path: load_sae(path, 0, "resid_pre"))  # type: ignore[misc]
    assert not (tmp_path / "hit").exists()


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.file,))


def test_a_pickle_inside_an_npz(tmp_path: Path) -> None:
    hit = np.array([Bomb(tmp_path / "hit")], dtype=object)
    np.savez(tmp_path / "params.npz", W_enc=hit)
    refused("cannot read SAE", lambda: load_sae(tmp_path, 0, "resid_pre"))
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "hit")))
    refused("cannot read SAE", lambda: load_sae(tmp_path, 0, "resid_pre"))
    assert not (tmp_path / "hit").exists()


def test_broken_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
        refused("cannot read SAE", lambda name=name: load_sae(tmp_path / name, 0, "resid_pre"))  # type: ignore[misc]


NEEDED = {
    "standard": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "jumprelu": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    "batchtopk": ("threshold",),
    "topk": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"),
}
MISSING = [(name, tensor) for name, tensors in NEEDED.items() for tensor in tensors]


@pytest.mark.parametrize(("architecture", "tensor"), MISSING)
def test_missing_tensors(tmp_path: Path, architecture: str, tensor: str) -> None:
    own = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}
    names = own["jumprelu"] if architecture == "batchtopk" else own.get(architecture, ("b_enc",))
    w = draw(*names)
    cfg = NEW | {"architecture": architecture, "k": 2}
    load_sae(sae_lens(tmp_path, w, cfg))
    del w[tensor]
    refused(f"no tensor {tensor}", lambda: load_sae(sae_lens(tmp_path, w, cfg)))


def test_tensors_of_another_architecture(tmp_path: Path) -> None:
    w = draw("b_enc", "threshold")
    refused("threshold, but not of this", lambda: load_sae(sae_lens(tmp_path, w, OLD)))
    w = draw("b_enc") | {"W_skip": np.eye(WIDTH)}
    refused("W_skip, unknown here", lambda: load_sae(sae_lens(tmp_path, w, OLD)))
    file = plain(tmp_path / "p.safetensors", w)
    refused("W_skip, unknown here", lambda: load_sae(file, 0, "resid_pre"))


def test_two_tensors_for_one(tmp_path: Path) -> None:
    w = draw()
    file = plain(tmp_path / "p.safetensors", w | {"encoder": w["W_enc"] + 1})
    refused("two tensors for W_enc", lambda: load_sae(file, 0, "resid_pre"))


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("W_enc", (FEATURES, WIDTH)),
        ("W_enc", (WIDTH * FEATURES,)),
        ("W_dec", (WIDTH, FEATURES)),
        ("b_enc", (FEATURES - 1,)),
        ("b_enc", (1,)),
        ("b_dec", (WIDTH + 1,)),
        ("threshold", (FEATURES + 1,)),
        ("scaling_factor", (WIDTH,)),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, tensor: str, shape: tuple[int, ...]) -> None:
    w = draw("b_enc", "threshold") | {tensor: np.full(shape, 0.5)}
    cfg = OLD | {"architecture": "jumprelu", "finetuning_scaling_factor": True}
    refused(r"\[\d+(, \d+)?\]", lambda: load_sae(sae_lens(tmp_path, w, cfg)))


def test_a_width_that_the_settings_contradict(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, draw(), OLD | {"d_in": 7})
    refused("reads 6 values, its settings say 7", lambda: load_sae(folder))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_weights_that_are_not_finite(tmp_path: Path, tensor: str, bad: float) -> None:
    w = draw("b_enc", "threshold")
    w[tensor].flat[-1] = bad
    folder = sae_lens(tmp_path, w, OLD | {"architecture": "jumprelu"})
    refused("not finite", lambda: load_sae(folder))


def test_weights_that_a_dtype_cannot_hold(tmp_path: Path) -> None:
    w = draw()
    w["W_dec"][0, 0] = 1e6
    sae = load_sae(sae_lens(tmp_path, w, OLD))
    refused("decoder has values that are not finite in float16", lambda: to_half(sae))


def to_half(sae: SAE) -> SAE:
    return sae.to("cpu", torch.float16)


CFG_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("unknown architecture 'transcoder'", {"architecture": "transcoder"}),
    ("unknown architecture 'temporal'", {"architecture": "temporal"}),
    ("activates by 'tanh-relu'", {"activation_fn_str": "tanh-relu"}),
    ("unknown hook 'blocks.1.hook_q'", {"hook_name": "blocks.1.hook_q"}),
    ("unknown hook 'hook_embed'", {"hook_name": "hook_embed"}),
    ("unknown hook 'layers.x'", {"hook_name": "layers.x"}),
    ("does not say its layer", {"hook_name": None}),
    ("a single head", {"hook_head_index": 3}),
    ("by 'layer_norm'", {"normalize_activations": "layer_norm"}),
    ("by 'constant_norm_rescale'", {"normalize_activations": "constant_norm_rescale"}),
    ("does not say by how much", {"normalize_activations": "expected_average_only_in"}),
    ("does not say by how much", {"normalize_activations": True, "norm_scaling_factor": 0}),
    ("apply_b_dec_to_input is 'yes'", {"apply_b_dec_to_input": "yes"}),
    ("k is None", {"architecture": "topk"}),
    ("k is 2.5", {"architecture": "topk", "k": 2.5}),
    ("k is inf", {"architecture": "topk", "k": float("inf")}),
    ("k is True", {"architecture": "topk", "k": True}),
    ("k is 0", {"architecture": "topk", "k": 0}),
    ("k is 11: give one of 1 to 10", {"architecture": "topk", "k": FEATURES + 1}),
    ("metadata is not a table", {"metadata": "none"}),
]


@pytest.mark.parametrize(("match", "change"), CFG_FAULTS, ids=[m for m, _ in CFG_FAULTS])
def test_settings_of_sae_lens(tmp_path: Path, match: str, change: dict[str, Any]) -> None:
    folder = sae_lens(tmp_path, draw(), OLD | change)
    refused(match, lambda: load_sae(folder))


def test_a_scaler_that_cfg_contradicts(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, draw(), OLD)
    scaler = folder / "activation_scaler.json"
    scaler.write_text('{"scaling_factor": 0.3}')
    refused("scales the input, cfg.json does not", lambda: load_sae(folder))
    scaler.write_text('{"scaling_factor": null, "has_whitening": true}')
    refused("whitens its input", lambda: load_sae(folder))


def test_a_tuned_scale_that_cfg_does_not_use(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, draw("b_enc", "scaling_factor"), OLD)
    refused("scaling_factor that its settings do not use", lambda: load_sae(folder))


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("trained with transcode", {"transcode": True}),
        ("trained with signed", {"signed": True}),
        ("trained with gram_lookup", {"gram_lookup": True}),
        ("activates by 'groupmax'", {"activation": "groupmax"}),
        ("k is None", {"k": None}),
    ],
)
def test_settings_of_sparsify(tmp_path: Path, match: str, change: dict[str, Any]) -> None:
    folder = sparsify(tmp_path / "layers.1", draw(), SPARSIFY | change)
    refused(match, lambda: load_sae(folder))


@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.mlp.act", "trained"])
def test_folders_of_sparsify_that_name_no_site(tmp_path: Path, name: str) -> None:
    folder = sparsify(tmp_path / name, draw())
    refused(f"unknown hook '{name}': give layer= and at=", lambda: load_sae(folder))
    assert load_sae(folder, 0, "resid_pre").at == "resid_pre"


@pytest.mark.parametrize(
    "folders", ["gemma-scope-2b-pt-transcoders/layer_3", "gemma-scope-2b-pt-res/embedding/width_4k"]
)
def test_parts_of_gemma_scope_that_are_no_sae_of_a_layer(tmp_path: Path, folders: str) -> None:
    folder = gemma_scope(tmp_path / folders, draw("b_enc", "threshold"))
    refused("transcoder or reads embeddings", lambda: load_sae(folder, 0, "mlp_out"))


def test_what_neither_file_nor_caller_says(tmp_path: Path) -> None:
    file = plain(tmp_path / "p.safetensors", draw())
    refused("does not say its layer: give layer=", lambda: load_sae(file, at="resid_pre"))
    refused("give at= one of resid_pre", lambda: load_sae(file, layer=3))
    npz = gemma_scope(tmp_path / "here", draw("b_enc", "threshold"))
    refused("does not say its layer", lambda: load_sae(npz))
    refused("give at=", lambda: load_sae(npz, layer=3))


def test_sites_that_are_none(tmp_path: Path) -> None:
    file = plain(tmp_path / "p.safetensors", draw())
    refused("cannot read 'head_q'.*head_z", lambda: load_sae(file, 0, "head_q"))
    refused("has layer -1", lambda: load_sae(file, -1, "resid_pre"))
    assert all(load_sae(file, 0, at).at == at for at in SITES)


def test_a_plain_file_of_two_minds(tmp_path: Path) -> None:
    w = draw("b_enc", "threshold")
    file = plain(tmp_path / "p.safetensors", w, k="3")
    refused("topk or jumprelu: say architecture", lambda: load_sae(file, 0, "resid_pre"))
    file = plain(tmp_path / "p.safetensors", w, k="3", architecture="batchtopk")
    assert load_sae(file, 0, "resid_pre").threshold is not None


def test_two_activations_in_memory() -> None:
    parts: dict[str, Any] = {"encoder": torch.ones(2, 3), "decoder": torch.ones(3, 2)}
    parts |= {"layer": 0, "at": "resid_pre", "bias": torch.ones(3)}
    refused("two activations", lambda: SAE(**parts, threshold=torch.ones(3), k=1))
    refused("half gated", lambda: SAE(**parts, gain=torch.ones(3)))


def test_the_width_of_the_model(tmp_path: Path) -> None:
    sae = load_sae(sae_lens(tmp_path, draw(), OLD))
    sae.check_width(WIDTH)
    refused(
        "sae_weights.safetensors reads 6 values, resid_pre of this model has 768",
        lambda: sae.check_width(768),
    )
