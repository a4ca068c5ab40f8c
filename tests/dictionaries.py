"""Sparse autoencoders drawn at random, saved in every published layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

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
