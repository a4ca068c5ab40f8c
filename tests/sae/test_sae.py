"""Sparse autoencoders: every published layout against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dictionaries import (
    FEATURES,
    HOOK,
    NEW,
    OLD,
    TOKENS,
    WIDTH,
    Array,
    draw,
    gemma_scope,
    plain,
    sae_lens,
    sparsify,
)
from patchsweep.errors import BadInput
from patchsweep.sae import SAE, load_sae


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
    sae = load_sae(
        sae_lens(tmp_path, draw(), OLD | {"hook_name": f"blocks.11.{hook}", "hook_layer": 11})
    )
    assert (sae.layer, sae.at) == (11, at)


def test_the_caller_says_what_the_file_does_not(tmp_path: Path) -> None:
    folder = sae_lens(tmp_path, draw(), OLD)
    for at in ({"layer": 8}, {"at": "resid_pre"}, {"layer": 7, "at": "resid_post"}):  # the same
        assert load_sae(folder, **at).layer == at.get("layer", 8)  # type: ignore[arg-type]
    sae_lens(tmp_path, draw(), OLD | {"hook_name": "somewhere.else", "hook_layer": None})
    sae = load_sae(folder, layer=0, at="resid_post")
    assert (sae.layer, sae.at) == (0, "resid_post")


GEMMA_2 = {
    "hf_hook_point_in": "model.layers.12.output",
    "hf_hook_point_out": "model.layers.12.output",
    "width": FEATURES,
    "model_name": "gemma-v3-270m-pt",
    "architecture": "jump_relu",
    "l0": 60,
    "affine_connection": False,
    "type": "sae",
}


def gemma_scope_2(folder: Path, weights: dict[str, Array], **change: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name.lower(): x for name, x in weights.items()}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(GEMMA_2 | change))
    return folder


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        ("model.layers.12.output", "resid_post"),
        ("model.language_model.layers.12.output", "resid_post"),
        ("model.layers.12.self_attn.o_proj.input", "head_z"),
        ("model.layers.12.post_feedforward_layernorm.output", "mlp_out"),
    ],
)
def test_gemma_scope_2(tmp_path: Path, x: Array, hook: str, at: str) -> None:
    w = draw("b_enc", "threshold")
    sae = load_sae(gemma_scope_2(tmp_path, w, hf_hook_point_in=hook, hf_hook_point_out=hook))
    assert (sae.layer, sae.at) == (12, at)
    before = x @ w["W_enc"] + w["b_enc"]
    same(features(sae, x), np.where(before > w["threshold"], before, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "transcoder"}, "is a transcoder"),
        ({"type": "crosscoder"}, "is a crosscoder"),
        (
            {"hf_hook_point_out": "model.layers.13.output"},
            "is a sae, what it writes is not",
        ),
        ({"affine_connection": True}, "affine skip connection"),
        ({"width": 99}, "has 10 features, its settings say 99"),
        ({"architecture": "gelu"}, "unknown architecture 'gelu'"),
        ({"scale": 2.0}, "settings scale, unknown here"),
        ({"hf_hook_point_in": "a.b", "hf_hook_point_out": "a.b"}, "unknown hook 'a.b'"),
    ],
)
def test_gemma_scope_2_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = gemma_scope_2(tmp_path, draw("b_enc", "threshold"), **change)
    with pytest.raises(BadInput, match=words) as error:
        load_sae(folder)
    assert "\n" not in str(error.value)


def test_a_config_beside_any_weights(tmp_path: Path) -> None:
    """Is heard, whatever the weights are called; that of a model is not about them."""
    w = draw("b_enc", "threshold")
    file = plain(tmp_path / "mine.safetensors", w)
    (tmp_path / "config.json").write_text('{"layer": 4, "at": "mlp_out"}')
    assert (load_sae(file).layer, load_sae(file).at) == (4, "mlp_out")
    with pytest.raises(BadInput, match="says layer 4, at mlp_out, the sweep layer 3"):
        load_sae(file, layer=3)
    (tmp_path / "config.json").write_text('{"activation_fn_str": "topk"}')
    with pytest.raises(BadInput, match="settings activation_fn_str, unknown here"):
        load_sae(file, 4, "mlp_out")
    (tmp_path / "config.json").write_text('{"trainer": {"k": 3}}')
    with pytest.raises(BadInput, match="settings trainer, unknown here"):
        load_sae(file, 4, "mlp_out")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 6}')
    assert load_sae(file, 4, "mlp_out").layer == 4
    npz = gemma_scope(tmp_path / "layer_3", w)
    (npz / "config.json").write_text('{"type": "transcoder"}')
    with pytest.raises(BadInput, match="is a transcoder"):
        load_sae(npz, at="resid_post")


FULL = OLD | {
    "model_name": "gpt2-small",
    "prepend_bos": True,
    "context_size": 128,
    "dataset_path": "x",
    "sae_lens_training_version": "3.1.0",
    "l1_coefficient": 8e-5,
    "neuronpedia_id": None,
    "activation_fn_kwargs": {},
    "seqpos_slice": [None],
}


def test_settings_that_change_nothing(tmp_path: Path, x: Array) -> None:
    w = draw()
    kwargs = {"center_unembed": True, "fold_ln": True, "center_writing_weights": False}
    sae = load_sae(sae_lens(tmp_path, w, FULL | {"model_from_pretrained_kwargs": kwargs}))
    same(features(sae, x), relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
    assert sae.processing_said
    assert not load_sae(sae_lens(tmp_path, w, FULL)).processing_said


def test_centred_writing_weights_folded_in_as_the_line_says(tmp_path: Path, x: Array) -> None:
    """What the refusal asks for gives the features of activations without their mean."""
    w = draw()
    wanted = relu((x - x.mean(1, keepdims=True) - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    folded = w | {"b_enc": w["b_enc"] - w["b_dec"] @ w["W_enc"]}
    folded["W_enc"] = w["W_enc"] - w["W_enc"].mean(0)
    sae = load_sae(sae_lens(tmp_path, folded, FULL | {"apply_b_dec_to_input": False}))
    same(features(sae, x), wanted)


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
