"""Sparse autoencoders that are refused, each in one line that names the place."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dictionaries import (
    FEATURES,
    NEW,
    OLD,
    SPARSIFY,
    WIDTH,
    draw,
    gemma_scope,
    plain,
    sae_lens,
    sparsify,
)
from patchsweep.errors import BadInput
from patchsweep.sae import SAE, SITES, load_sae


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
    lens = tmp_path / "lens"
    w = draw("b_enc", "threshold")
    refused("threshold, but not of this", lambda: load_sae(sae_lens(lens, w, OLD)))
    w = draw("b_enc") | {"W_skip": np.eye(WIDTH)}
    refused("W_skip, unknown here", lambda: load_sae(sae_lens(lens, w, OLD)))
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
    ("does not say its layer", {"hook_name": None, "hook_layer": None}),
    ("layer is 8 and 7", {"hook_layer": 7}),
    ("settings what_is_this, unknown here", {"what_is_this": False}),
    (
        "hook_name is 'blocks.1.hook_mlp_out' and",
        {"metadata": {"hook_name": "blocks.1.hook_mlp_out"}},
    ),
    ("settings new_one, unknown here", {"metadata": {"new_one": 1}}),
    ("without their mean", {"model_from_pretrained_kwargs": {"center_writing_weights": True}}),
    (
        "loaded with fold_value_biases",
        {"model_from_pretrained_kwargs": {"fold_value_biases": True}},
    ),
    ("settings x, unknown here", {"model_from_pretrained_kwargs": {"x": 0}}),
    ("settings scale, unknown", {"activation_fn_kwargs": {"scale": 2}}),
    ("reshapes its input by 'hook_z'", {"reshape_activations": "hook_z"}),
    ("a single head", {"metadata": {"hook_head_index": 0}}),
    ("is a transcoder", {"hook_name_out": "blocks.8.hook_mlp_out"}),
    ("is a transcoder", {"d_out": 7}),
    ("has 10 features, its settings say 11", {"d_sae": 11}),
    ("tuned by a scaling_factor that is not", {"finetuning_scaling_factor": True}),
    ("norm_scaling_factor that its settings do not use", {"norm_scaling_factor": 0.5}),
    ("no setting of standard", {"rescale_acts_by_decoder_norm": True}),
    ("k is 3 and 4", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "k": 3}),
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
        ("trained with skip_connection", {"skip_connection": True}),
        ("settings bandwidth, unknown here", {"bandwidth": 2}),
        ("has 10 features, its settings say 11", {"num_latents": 11}),
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


def test_settings_in_the_metadata(tmp_path: Path) -> None:
    plain(tmp_path / "p.safetensors", draw(), format="pt", license="mit")
    assert load_sae(tmp_path / "p.safetensors", 0, "resid_pre").layer == 0
    file = plain(tmp_path / "p.safetensors", draw(), temperature="2")
    refused("settings temperature, unknown here", lambda: load_sae(file, 0, "resid_pre"))
    folder = sae_lens(tmp_path / "a", draw(), OLD)
    save_file(draw(), folder / "sae_weights.safetensors", metadata={"k": "3"})
    refused("settings k, unknown here", lambda: load_sae(folder))


@pytest.mark.parametrize(
    "given", [{"layer": 2}, {"at": "mlp_out"}, {"layer": 8, "at": "resid_post"}]
)
def test_a_sweep_that_says_another_place(tmp_path: Path, given: dict[str, Any]) -> None:
    folder = sae_lens(tmp_path / "a", draw(), OLD)
    refused("says layer 8, at resid_pre, the sweep", lambda: load_sae(folder, **given))
    other = sparsify(tmp_path / "layers.8", draw())
    refused("says layer 8, at resid_post, the sweep", lambda: load_sae(other, layer=9))
    npz = gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_8/w", draw("b_enc", "threshold"))
    refused("says layer 8, at resid_post, the sweep", lambda: load_sae(npz, at="mlp_out"))


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
