"""A model ready to be swept: loaded or wrapped, and what a plan has to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from patchsweep import loading
from patchsweep.adapters import unwrapped
from patchsweep.devices import check_placement
from patchsweep.dimensions import Dimensions, Offload
from patchsweep.errors import BadInput
from patchsweep.forward import layers_of
from patchsweep.identity import identity
from patchsweep.offload import device_of, offloaded
from patchsweep.paths import home
from patchsweep.placement import device_map, offload


@dataclass(frozen=True)
class Model:
    """A causal language model and its tokenizer. `name` is what the results call it, `weights` what
    was loaded, where the name does not say it."""

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
        return dimensions_of(self.hf_model)

    @property
    def offload(self) -> Offload:
        """What a wave moves of the weights that are kept off the device."""
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
    """Load a packaged model (smollm2-135m, which is SmolLM2-135M-Instruct), a local folder, a .gguf
    file or a Hub id.

    `device`: auto, cpu, cuda, cuda:N, or balanced: over all GPUs, then the host's memory, then
    disk. With balanced, `max_memory` limits the weights by place ({0: "10GB", "cpu": "20GB"};
    places left out are not used), and `offload_folder` keeps weights that cannot be read from the
    model's own files. BadInput says what is missing if it cannot be loaded.
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
    """Use a model that is already loaded, as it is: with its hooks, its adapters and its attention.
    Of a compiled model and of one of PEFT that is the transformers model inside. Nothing of it is
    changed; sweeps run it in eval mode and leave it as it was. BadInput for anything else."""
    inner = unwrapped(hf_model)
    return Model(inner, tokenizer, name or inner.config.name_or_path or "wrapped model")


def empty_model(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """A model without its weights: they are on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def dimensions_of(hf_model: PreTrainedModel) -> Dimensions:
    """A model's dimensions; its weights may be on the meta device."""
    config = hf_model.config.get_text_config()
    if config.is_encoder_decoder or not hasattr(config, "num_attention_heads"):
        raise BadInput(
            f"{type(hf_model).__name__} is no causal language model with attention: "
            "neither backend can run it"
        )
    layers = layers_of(hf_model)
    heads = config.num_attention_heads
    d_head = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    weight = hf_model.get_input_embeddings().weight
    return Dimensions(
        layers=len(layers),
        heads=heads,
        kv_heads=_kv_heads(config, layers[0]),
        d_model=config.hidden_size,
        d_head=d_head or config.hidden_size // heads,
        vocab=config.vocab_size,
        windows=windows(config),
        layer_weights=max(_active_weights(layer, config) for layer in layers),
        widest=max(_widest(layer) for layer in layers),
        bytes_per_value=weight.dtype.itemsize,
        max_positions=_max_positions(hf_model),
        neurons=_neurons(config, layers[0]),
    )


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
    projection has to have that size; the self-test checks it."""
    heads: int = config.num_attention_heads
    names = ("num_key_value_heads", "num_kv_heads")
    named = [1] if getattr(config, "multi_query", False) else []
    named += [n for n in (getattr(config, name, None) for name in names) if n]
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {size for p in layer.parameters() for size in p.shape}
    for kv in named:
        if sizes & {kv * d_head, 2 * kv * d_head, (heads + 2 * kv) * d_head}:
            return int(kv)
    return heads


def _neurons(config: PretrainedConfig, layer: nn.Module) -> int | None:
    """The width of an MLP's hidden layer, of those that configs name one that a weight has; None
    where layers have experts."""
    if _experts(config):
        return None
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    attention = [m for m in layer.modules() if "Attention" in type(m).__name__]
    inside = {p for m in attention for p in m.parameters()}
    sizes = {size for p in layer.parameters() if p not in inside for size in p.shape}
    named = [getattr(config, name, None) for name in names]
    return next((n for n in (*named, 4 * config.hidden_size) if n in sizes), None)


def _experts(config: PretrainedConfig) -> int | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for n in (getattr(config, name, None) for name in names) if n), None)


def _active_weights(layer: nn.Module, config: PretrainedConfig) -> int:
    """Weights that multiply one token in this layer; of experts, those that one token visits."""
    total = 0.0
    experts = _experts(config)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    for name, p in layer.named_parameters():
        if p.dim() >= 2:
            total += p.numel() * (share if ".experts." in name else 1.0)
    return round(total)


def _widest(layer: nn.Module) -> int:
    """The largest width of an activation: of experts, of the one that a token is in."""
    return max(max(p.shape[-2:]) for p in layer.parameters() if p.dim() >= 2)


def _max_positions(hf_model: PreTrainedModel) -> int | None:
    """Prompt length that learned position embeddings allow; None without a table."""
    vocab_rows = hf_model.get_input_embeddings()
    for module in hf_model.modules():
        if isinstance(module, nn.Embedding) and module is not vocab_rows:
            return getattr(hf_model.config.get_text_config(), "max_position_embeddings", None)
    return None
