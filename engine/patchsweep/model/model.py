"""A model ready to be swept: loaded or wrapped, and what a plan has to know of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from patchsweep.device import device_of, exactly, offloaded
from patchsweep.errors import BadInput
from patchsweep.inputs import check_placement, home
from patchsweep.model import loading
from patchsweep.model.adapters import unwrapped
from patchsweep.model.identity import identity
from patchsweep.model.placement import device_map, offload
from patchsweep.passes import Shape, layers_of, matrices, shapes_of
from patchsweep.plan import Dimensions, Offload, Sizes, uneven

KV_HEADS = ("num_key_value_heads", "num_kv_heads")  # as configs call them


@dataclass(frozen=True)
class Model:
    """A causal language model, `hf_model`, and its `tokenizer`, as transformers has them. `name` is
    what the results call it, `weights` what was loaded, where the name does not say it."""

    hf_model: PreTrainedModel
    tokenizer: Any
    name: str
    weights: str = ""

    @property
    def device(self) -> torch.device:
        """Where the model begins to compute."""
        return device_of(self.hf_model.get_input_embeddings())

    @property
    def dimensions(self) -> Dimensions:
        """How many layers, heads and so on there are: seen in a forward of a few tokens, in eval
        mode; the model is as it was after it. BadInput for a model without attention."""
        with exactly(self.hf_model):
            return dimensions_of(self.hf_model)

    @property
    def offload(self) -> Offload:
        """What a wave moves of the weights that are kept off the device."""
        with exactly(self.hf_model):
            return offload(self.hf_model, offloaded(self.hf_model), self.device)

    @property
    def fingerprint(self) -> str:
        """Identifies everything that changes what the model computes, as it is now (see
        `identity`)."""
        return identity(self.hf_model)


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    *,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Model:
    """Load a model by its `name`: a packaged one (smollm2-135m, which is SmolLM2-135M-Instruct), a
    local folder, a .gguf file or a Hub id.

    `dtype`: float32, bfloat16, float16 or float64, of weights and of what is computed.
    `trust_remote_code`: as in transformers: a model's own code runs only if it is set. `device`:
    auto, cpu, cuda, cuda:N, or balanced: over all GPUs, then the host's memory, then disk. With
    balanced, `max_memory` limits the weights by place ({0: "10GB", "cpu": "20GB"}; places left out
    are not used), and `offload_folder` keeps weights that cannot be read from the model's own
    files. BadInput says what is missing if it cannot be loaded.
    """
    check_placement(device, max_memory, offload_folder)
    where: str | dict[str, int | str] = device
    if device == "balanced":
        empty = empty_model(loading.load_config(name, trust_remote_code), dtype)
        where = device_map(empty, max_memory)
    folder = home(offload_folder) if offload_folder else None
    return Model(
        *loading.load(name, dtype, where, trust_remote_code, folder), name, loading.weights(name)
    )


def wrap(hf_model: nn.Module, tokenizer: Any, name: str = "") -> Model:
    """Use `hf_model`, a model that is already loaded, as it is: with its hooks, its adapters and
    its attention; with its `tokenizer`, under `name` (if empty, that of its config). Of a compiled
    model and of one of PEFT that is the transformers model inside. Nothing of it is changed; sweeps
    run it in eval mode and leave it as it was. BadInput for anything else."""
    inner = unwrapped(hf_model)
    return Model(inner, tokenizer, name or inner.config.name_or_path or "wrapped model")


def empty_model(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """A model without its weights: they are on the meta device. It can be called there: of the ways
    to compute experts one asks for no values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), experts_implementation="batched_mm"
        )


def dimensions_of(hf_model: PreTrainedModel) -> Dimensions:
    """A model's dimensions, seen in a forward of a few tokens; its weights may be on the meta
    device. Where a model does not show them, those of its config."""
    config = hf_model.config.get_text_config()
    if config.is_encoder_decoder or _named(config, "num_attention_heads") is None:
        raise BadInput(
            f"{type(hf_model).__name__} is no causal language model with attention: "
            "neither backend can run it"
        )
    layers = layers_of(hf_model)
    shapes = shapes_of(hf_model, [*layers])
    sizes = [
        _sizes(config, layer, number, shapes[number] if shapes else None)
        for number, layer in enumerate(layers)
    ]
    neurons = [size.neurons for size in sizes]
    weight = hf_model.get_input_embeddings().weight
    return Dimensions(
        layers=len(layers),
        heads=max(size.heads for size in sizes),
        kv_heads=max(size.kv_heads for size in sizes),
        d_model=config.hidden_size,
        d_head=max(size.d_head for size in sizes),
        vocab=config.vocab_size,
        windows=windows(config),
        layer_weights=max(_active_weights(layer, config) for layer in layers),
        widest=max(max(_widths(*layer.modules())) for layer in layers),
        bytes_per_value=weight.dtype.itemsize,
        max_positions=max_positions(hf_model),
        neurons=None if None in neurons else max(n for n in neurons if n is not None),
        d_qk=max(size.d_qk for size in sizes),
        uneven=uneven(sizes),
        parallel=tuple(i for i, s in enumerate(shapes or ()) if "resid_mid" not in s.stream.found),
    )


def _sizes(config: PretrainedConfig, layer: nn.Module, number: int, shape: Shape | None) -> Sizes:
    """How large a layer is: what it showed, else what the config says."""
    neurons = None
    if not _experts(config):
        neurons = shape.neurons(config.hidden_size) if shape is not None else None
        neurons = neurons or _neurons(config, layer, number)
    if shape is None:
        heads = config.num_attention_heads
        d_head = _named(config, "v_head_dim", "head_dim") or config.hidden_size // heads
        d_qk = _named(config, "qk_head_dim") or d_head
        return Sizes(heads, _kv_heads(config, layer), d_qk, d_head, neurons)
    if shape.z is None:  # it has no attention
        return Sizes(0, 0, 0, 0, neurons)
    heads, d_head = shape.z.shape[2:]
    # Some families give attention copies of the heads that they have.
    copied = shape.different == _named(config, *KV_HEADS)
    kv_heads = shape.different if copied else shape.kv_heads
    return Sizes(heads, kv_heads, shape.d_qk, d_head, neurons)


def _named(config: PretrainedConfig, *names: str, layer: int | None = None) -> int | None:
    """The first of these numbers that a config has, for the whole model or a layer."""
    for name in names:
        # Of what each layer has its own of, some configs raise errors of their own.
        with suppress(Exception):
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)) and layer is not None:
                value = value[layer]
            if value:
                return value if isinstance(value, int) else None
    return None


def windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """The attention window of every layer, None where there is none; the self-test checks it."""
    count = config.num_hidden_layers
    size = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        size = None
    if getattr(config, "attention_layers", None):  # GPT-Neo's names
        return tuple(config.window_size if k == "local" else None for k in config.attention_layers)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _kv_heads(config: PretrainedConfig, layer: nn.Module) -> int:
    """Physical key-value heads. A config may name a number that its family does not use, so a
    projection has to have that size."""
    heads: int = config.num_attention_heads
    named: list[int | None] = [1] if getattr(config, "multi_query", False) else []
    named += [_named(config, name) for name in KV_HEADS]
    d_head = _named(config, "head_dim") or config.hidden_size // heads
    sizes = _widths(*layer.modules())
    for kv in filter(None, named):
        if sizes & {kv * d_head, 2 * kv * d_head, (heads + 2 * kv) * d_head}:
            return kv
    return heads


def _neurons(config: PretrainedConfig, layer: nn.Module, number: int) -> int | None:
    """The width of an MLP's hidden layer: of those that configs name one that a weight has."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    attention = [m for m in layer.modules() if "Attention" in type(m).__name__]
    inside = {m for each in attention for m in each.modules()}
    sizes = _widths(*(m for m in layer.modules() if m not in inside))
    named = [_named(config, name, layer=number) for name in names]
    return next((n for n in (*named, 4 * config.hidden_size) if n in sizes), None)


def _experts(config: PretrainedConfig) -> int | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for n in (getattr(config, name, None) for name in names) if n), None)


def _active_weights(layer: nn.Module, config: PretrainedConfig) -> int:
    """Weights that multiply one token in this layer; of experts, those that one token visits."""
    total = 0.0
    experts = _experts(config)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    for name, module in layer.named_modules():
        times = share if ".experts." in f"{name}." else 1.0
        total += times * sum(math.prod(shape) for shape in matrices(module))
    return round(total)


def _widths(*modules: nn.Module) -> set[int]:
    """The sizes of the modules' own matrices: of experts, those of the one that a token is in."""
    return {size for module in modules for shape in matrices(module) for size in shape[-2:]}


def max_positions(hf_model: PreTrainedModel) -> int | None:
    """Prompt length that learned position embeddings allow; None without a table."""
    vocab_rows = hf_model.get_input_embeddings()
    for module in hf_model.modules():
        if isinstance(module, nn.Embedding) and module is not vocab_rows:
            return getattr(hf_model.config.get_text_config(), "max_position_embeddings", None)
    return None
