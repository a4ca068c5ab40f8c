"""The models that are measured, and prompt pairs for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Final

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from patchsweep.errors import BadInput
from patchsweep.model.model import Model, load_model, wrap
from patchsweep.pairs import Pair, encode, make_pair

REAL: Final = "smollm2-135m"

# Random weights in shapes that people sweep; speed does not depend on the values.
SHAPES: dict[str, PretrainedConfig] = {
    "gpt2-small": GPT2Config(),
    "llama-1b": LlamaConfig(
        num_hidden_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
    ),
    "llama-7b": LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
    ),
    "llama-70b": LlamaConfig(
        num_hidden_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    ),
    "tiny-llama": LlamaConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=96,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "tiny-gpt2": GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_positions=32,
        vocab_size=96,
        bos_token_id=1,
        eos_token_id=2,
    ),
}

SENTENCE = "When {a} and {b} went to the store, {s} gave a drink to"
# The first couple is the benchmark's pair; the others give prompts of the same shape.
COUPLES = (
    ("John", "Mary"),
    ("Tom", "Anna"),
    ("James", "Sarah"),
    ("David", "Laura"),
    ("Paul", "Lisa"),
    ("Mark", "Susan"),
    ("Peter", "Alice"),
    ("George", "Helen"),
)

PASSAGE = (
    "The old harbour lies where the river meets the sea, and for many years the fishing boats came "
    "in before sunrise. Women and men sorted the catch on long wooden tables, while children "
    "carried baskets up the hill to the market. When the new bridge was built, the large ships "
    "moved further north, the warehouses stood empty, and most of the families found work in the "
    "town. Today a museum shows the nets and the lamps of that time, and on summer evenings "
    "visitors walk along the quiet wall and watch the last two boats return with a few silver fish."
)


def load(name: str, dtype: str, device: str) -> Model:
    """The real model, or one of SHAPES with random weights made on the device.

    BadInput for another name.
    """
    if name == REAL:
        return load_model(name, dtype, device)
    if name not in SHAPES:
        raise BadInput(f"unknown model '{name}': use one of {', '.join([REAL, *SHAPES])}")
    torch.manual_seed(0)
    return _from_config(SHAPES[name], name, getattr(torch, dtype), torch.device(device))


def _from_config(
    config: PretrainedConfig, name: str, dtype: torch.dtype, device: torch.device
) -> Model:
    own = copy.deepcopy(config)  # a model keeps and changes the one it is given
    with torch.device(device):
        hf_model = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation="sdpa")
    hf_model.eval().requires_grad_(False)
    tokenizer = SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens)))
    return wrap(hf_model, tokenizer, name)


def rounded(model: Model, dtype: torch.dtype) -> Model:
    """A copy of a model with its weights in another dtype, buffers as that dtype's model has
    them."""
    low = _from_config(model.hf_model.config, model.name, dtype, model.device)
    low.hf_model.load_state_dict(model.hf_model.state_dict())
    return Model(low.hf_model, model.tokenizer, model.name)


def sentence_pairs(model: Model) -> list[Pair]:
    """Pairs of one shape that differ in the names: clean "..., John gave ... to" is answered by
    Mary, corrupt "..., Mary gave ... to" by John."""
    pairs = [
        make_pair(
            model.tokenizer,
            SENTENCE.format(a=a, b=b, s=a),
            SENTENCE.format(a=a, b=b, s=b),
            f" {b}",
            f" {a}",
        )
        for a, b in COUPLES
    ]
    shapes = {(len(p), first_difference(p)) for p in pairs}
    if len(shapes) > 1:
        raise BadInput(f"the pairs are not of one shape (tokens, first difference): {shapes}")
    return pairs


def middle_pairs(model: Model, length: int, count: int) -> list[Pair]:
    """Pairs of `length` tokens that differ in the middle one: of the real model from a text, of the
    others at random."""
    rng = np.random.default_rng(0)
    vocab = model.dimensions.vocab
    if model.name == REAL:
        text = encode(model.tokenizer, PASSAGE)
        if length > len(text):
            raise BadInput(f"length {length}: the benchmark's text has {len(text)} tokens")
        prompts: Sequence[Sequence[int]] = [text[:length]] * count
    else:
        prompts = rng.integers(vocab, size=(count, length)).tolist()
    pairs = []
    for i, clean in enumerate(prompts):
        corrupt = list(clean)
        corrupt[length // 2] = (corrupt[length // 2] + 1 + i) % vocab
        answer, wrong = rng.choice(vocab, 2, replace=False).tolist()
        pairs.append(Pair(tuple(clean), tuple(corrupt), (answer,), (wrong,)))
    return pairs


def first_difference(pair: Pair) -> int:
    """The first position at which the prompts' tokens differ."""
    return int(np.not_equal(pair.clean, pair.corrupt).argmax())
