"""A tiny model, pairs and a spec for it, and the arrays of a sweep as they were written."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
import zarr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import patchsweep as ps
from patchsweep.sites import blocks
from patchsweep.store import Store

WORDS = ["?", *string.ascii_letters]
BROKEN = "Z"  # the word whose embedding `broken` makes infinite


def build(
    layers: int = 3, seed: int = 0, intermediate_size: int = 24, vocab: int = len(WORDS)
) -> LlamaForCausalLM:
    """A tiny Llama whose random weights are large enough for effects far above rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a word."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def save(folder: Path, hf_model: PreTrainedModel | None = None) -> Path:
    """The folder, with a model and the tokenizer in it."""
    (hf_model or build()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def broken() -> LlamaForCausalLM:
    hf_model = build()
    with torch.no_grad():
        hf_model.get_input_embeddings().weight[WORDS.index(BROKEN)] = float("inf")
    return hf_model


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of 5 to 8 lower-case letters that differ in one to three places."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = rng.integers(5, 9)
        clean = rng.choice(list(string.ascii_lowercase), length)
        corrupt = clean.copy()
        for place in rng.permutation(length - 1)[: rng.integers(1, 4)]:
            corrupt[place] = rng.choice(list(string.ascii_uppercase[:20]))
        answer, wrong = rng.choice(list(string.ascii_lowercase), 2, replace=False)
        made.append(
            {
                "clean": " ".join(clean),
                "corrupt": " ".join(corrupt),
                "answer": f" {answer}",
                "wrong": f" {wrong}",
                "labels": {"END": -1},
            }
        )
    return made


def pairs_of(model: ps.Model, made: list[dict[str, Any]]) -> list[ps.Pair]:
    return [ps.make_pair(model.tokenizer, **row) for row in made]


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    return path


def write_spec(folder: Path, model: Path, **changes: Any) -> Path:
    """A spec beside `pairs.jsonl`, with some keys changed (None: left out)."""
    data = {
        "model": str(model),
        "device": "cpu",
        "prompts": {"file": "pairs.jsonl"},
        "components": ["head_z", "mlp_out", "resid_pre"],
        "direction": "both",
        "metrics": ["logit_diff", "prob", "rank", "kl"],
        "out": str(folder / "r.zarr"),
        **changes,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return path


def arrays(path: Path) -> dict[str, bytes]:
    """Every array of a results folder, as raw bytes."""
    members = zarr.open_group(path, mode="r").members(max_depth=None)
    found = {n: np.asarray(a[...]) for n, a in members if isinstance(a, zarr.Array)}
    assert found
    text = {n: json.dumps(a.tolist()).encode() for n, a in found.items() if a.dtype.kind in "OUT"}
    return {n: text[n] if n in text else a.tobytes() for n, a in found.items()}


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of metrics, and of their statuses, of every component."""
    group = zarr.open_group(path, mode="r")
    metrics = [m["name"] for m in group.attrs["metrics"]]
    names = [
        f"{component}/{metric}{suffix}"
        for component in group.attrs["components"]
        for metric in metrics
        for suffix in ("", "_status")
    ]
    return {name: np.asarray(group[name][...]) for name in names}


SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out", "resid_pre"],
    "metrics": ["logit_diff", "prob", "rank", "kl"],
    "direction": "both",
}


def rewrite(path: Path, name: str, change: Any) -> None:
    """Write the values of `<component>/<metric>` again as `change` makes them of what they are, by
    the store's own ways: they are wrong, and nothing is damaged."""
    store = Store.open(path, "r+")
    component = name.split("/")[0]
    grid = store.grids[component]
    changed = change(store.read(name))
    for block in blocks(grid):
        region = block.region(grid)
        values, status = (
            {m: store.read(f"{component}/{m}{kind}", region) for m in store.metrics}
            for kind in ("", "_status")
        )
        values[name.split("/")[1]] = changed[region]
        store.write_block(block, values, status)
