"""Small random models of many families, and the facts about each that plain hooks need.

Module names and the order of the additions are read off the modeling files of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

# Float64 all the way: two ways to the same numbers differ by rounding alone.
EXACT = 1e-9
# The family's own code converts to float32 inside even in a float64 model (RMSNorm of every layer;
# Cohere's norm and rotary; the routers of mixtures of experts). There a difference of 1e-16
# in the input can flip a float32 rounding, which shows as 1e-7 or so in a logit.
FLOAT32_INSIDE = 1e-6

SOFTCAP_ATTENTION = "oracle_softcap"


def softcap_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention with soft-capped scores in the dtype of its inputs.

    Gemma 2's own eager function takes the softmax in float32, and sdpa has no soft cap.
    query [batch, head, query, d_head], key and value [batch, kv_head, position, d_head],
    attention_mask [batch, 1, query, position] added to the scores; z [batch, query, head, d_head].
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    pattern = torch.softmax(scores + attention_mask, dim=-1)
    return torch.einsum("bhqk,bhkd->bqhd", pattern, value), None


AttentionInterface.register(SOFTCAP_ATTENTION, softcap_attention)
# Without a mask function of the same name transformers passes no mask at all.
AttentionMaskInterface.register(SOFTCAP_ATTENTION, eager_mask)


@dataclass(frozen=True)
class Family:
    """A kind of model: how to build a small one, and where its activations are.

    `layer` is the path of a layer within the model with `{}` for its number; the other paths are
    relative to the layer. `attn_norm` and `mlp_norm` are the norms between a block and the residual
    stream, None where a block's output is added as it is. `mid` is the module whose input is the
    residual stream between attention and MLP; a parallel block has none. `residual_multiplier`
    scales what a block adds. `down` is the module whose input are the neurons, None for experts.

    `qkv` are the modules whose outputs become queries, keys and values without anything that mixes
    heads or tokens; () where there are none. One module for all three is `fused`: "blocks" are all
    queries, all keys, all values; "heads" are query, key and value of each head in turn. `grouped`
    says whether the family can have fewer heads of keys and values than of queries.

    `tolerance`: largest difference of logits in float64 between two exact implementations.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    layer: str = "model.layers.{}"
    attn: str = "self_attn"
    o_proj: str = "self_attn.o_proj"
    mlp: str = "mlp"
    attn_norm: str | None = None
    mlp_norm: str | None = None
    mid: str = "post_attention_layernorm"
    down: str | None = "mlp.down_proj"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    fused: Literal["", "blocks", "heads"] = ""
    grouped: bool = True
    parallel: bool = False
    residual_multiplier: float = 1.0
    attention: str = "sdpa"
    tolerance: float = FLOAT32_INSIDE

    def build(
        self,
        n_layers: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        **overrides: Any,
    ) -> PreTrainedModel:
        """A random model in eval mode; `overrides` are arguments of the family's config.

        The weights depend on the seed and the sizes, not on the dtype. Matrices are three times
        their usual size so that patches have large effects; vectors (biases, norms, sinks) get
        noise, because as zeros and ones they would hide mistakes.
        """
        config = AutoConfig.for_model(
            self.model_type, **{**SIZES, **self.config, "num_hidden_layers": n_layers, **overrides}
        )
        kwargs = {"experts_implementation": "eager"} if self.model_type in EXPERTS else {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=self.attention, dtype=torch.float32, **kwargs
            )
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).eval().requires_grad_(False)


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# torch's grouped matmul for experts takes no float64; the plain loop does.
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text")

NEOX: dict[str, Any] = {
    "layer": "gpt_neox.layers.{}",
    "attn": "attention",
    "o_proj": "attention.dense",
    "down": "mlp.dense_4h_to_h",
    "qkv": ("attention.query_key_value",),
    "fused": "heads",
    "grouped": False,
    "tolerance": EXACT,
}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "gpt2": Family(
        "gpt2",
        layer="transformer.h.{}",
        attn="attn",
        o_proj="attn.c_proj",
        mid="ln_2",
        down="mlp.c_proj",
        qkv=("attn.c_attn",),
        fused="blocks",
        grouped=False,
        tolerance=EXACT,
    ),
    "gpt_neox": Family("gpt_neox", {"use_parallel_residual": True}, parallel=True, **NEOX),
    "gpt_neox_sequential": Family("gpt_neox", {"use_parallel_residual": False}, **NEOX),
    # Full attention in the layers 0 and 1, a window above.
    "qwen2": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    ),
    # All heads together are wider than the residual stream.
    "qwen3": Family("qwen3", {"head_dim": 12}),
    # Both caps low enough to bite.
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 3.0,
        },
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mid="pre_feedforward_layernorm",
        attention=SOFTCAP_ATTENTION,
    ),
    # Every second layer has a window; the family's default is five of six.
    "gemma3_text": Family(
        "gemma3_text",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
        },
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mid="pre_feedforward_layernorm",
    ),
    "mistral": Family("mistral", {"sliding_window": 4}),
    # The MLP reads the residual stream without a norm before it. Queries and keys have a norm over
    # all heads together.
    "olmo2": Family(
        "olmo2",
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mid="mlp",
        qkv=("self_attn.q_norm", "self_attn.k_norm", "self_attn.v_proj"),
    ),
    # The MLP is no module of its own: its output is that of fc2.
    "opt": Family(
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 48},
        layer="model.decoder.layers.{}",
        o_proj="self_attn.out_proj",
        mlp="fc2",
        mid="final_layer_norm",
        down="fc2",
        grouped=False,
        tolerance=EXACT,
    ),
    "phi": Family("phi", o_proj="self_attn.dense", parallel=True, down="mlp.fc2", tolerance=EXACT),
    "phi3": Family("phi3", qkv=("self_attn.qkv_proj",), fused="blocks"),
    "cohere": Family("cohere", {"logit_scale": 0.5}, parallel=True),
    "granite": Family(
        "granite",
        {
            "residual_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.5,
            "logits_scaling": 0.5,
        },
        residual_multiplier=0.3,
    ),
    "stablelm": Family("stablelm", tolerance=EXACT),
    "starcoder2": Family("starcoder2", down="mlp.c_proj", tolerance=EXACT),
    "glm4": Family(
        "glm4",
        {"head_dim": 8},
        attn_norm="post_self_attn_layernorm",
        mlp_norm="post_mlp_layernorm",
    ),
    "mixtral": Family("mixtral", {"num_local_experts": 4}, down=None),
    "qwen3_moe": Family(
        "qwen3_moe",
        {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        down=None,
    ),
    # Sinks; the family's eager attention keeps the dtype, and it has no sdpa.
    "gpt_oss": Family(
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "max_position_embeddings": 131072,  # its YaRN factor is relative to this
        },
        down=None,
        attention="eager",
    ),
    # The first layer is dense, the others have experts; v is narrower than q and k, and of these
    # only a part is rotated, that of the keys shared by all heads.
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "num_key_value_heads": 6,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "num_mtp_layers": 0,
        },
        down=None,
        qkv=(),
    ),
}


# Families that do not call transformers' attention interface.
BLOCK: dict[str, Any] = {"layer": "transformer.h.{}", "attention": "eager"}
FALCON = BLOCK | {
    "attn": "self_attention",
    "o_proj": "self_attention.dense",
    "down": "mlp.dense_4h_to_h",
    "tolerance": EXACT,
}
ELSEWHERE: dict[str, Family] = {
    "gptj": Family(
        "gptj",
        {"rotary_dim": 4, "n_positions": 64},
        attn="attn",
        o_proj="attn.out_proj",
        down="mlp.fc_out",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        grouped=False,
        parallel=True,
        **BLOCK,
    ),
    "gpt_neo": Family(
        "gpt_neo",
        {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
        attn="attn",
        o_proj="attn.attention.out_proj",
        mid="ln_2",
        down="mlp.c_proj",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        grouped=False,
        **BLOCK,
    ),
    # One key-value head, parallel blocks, rotary positions.
    "falcon": Family(
        "falcon",
        {"num_key_value_heads": 1},
        qkv=("self_attention.query_key_value",),
        fused="blocks",
        parallel=True,
        **FALCON,
    ),
    # Biases that grow with distance in place of positions.
    "falcon_alibi": Family(
        "falcon",
        {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        qkv=("self_attention.query_key_value",),
        fused="heads",
        grouped=False,
        **FALCON,
    ),
    # Two norms beside each other; groups of heads lie in an order of their own.
    "falcon_grouped": Family(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        qkv=(),
        parallel=True,
        **FALCON,
    ),
    # What attention and the MLP return has the stream in it already.
    "bloom": Family(
        "bloom",
        attn="self_attention.dense",
        o_proj="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        down="mlp.dense_4h_to_h",
        qkv=("self_attention.query_key_value",),
        fused="heads",
        grouped=False,
        tolerance=EXACT,
        **BLOCK,
    ),
    "mpt": Family(
        "mpt",
        {"max_seq_len": 64},
        layer="transformer.blocks.{}",
        attn="attn",
        o_proj="attn.out_proj",
        mlp="ffn.down_proj",
        mid="norm_2",
        down="ffn.down_proj",
        qkv=("attn.Wqkv",),
        fused="blocks",
        grouped=False,
        attention="eager",
        tolerance=EXACT,
    ),
    "codegen": Family(
        "codegen",
        {"rotary_dim": 4, "n_positions": 64, "num_attention_heads": 8},
        attn="attn",
        o_proj="attn.out_proj",
        down="mlp.fc_out",
        qkv=(),
        parallel=True,
        **BLOCK,
    ),
    # A mask of chunks: neither causal nor a window once the prompt is longer than one.
    "llama4_text": Family(
        "llama4_text",
        {
            "head_dim": 8,
            "attention_chunk_size": 4,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
        },
        mlp="feed_forward",
        down=None,
        tolerance=EXACT,
    ),
}
EVERY = FAMILIES | ELSEWHERE


def prompts(
    rng: np.random.Generator, vocab: int, length: int, n_differ: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A clean and a corrupt prompt of `length` tokens that differ at `n_differ` random positions.

    Token ids lie in [3, vocab): 0, 1 and 2 are padding, beginning and end.
    """
    clean = rng.integers(3, vocab, size=length)
    corrupt = clean.copy()
    where = rng.choice(length, size=n_differ, replace=False)
    corrupt[where] = 3 + (clean[where] - 3 + rng.integers(1, vocab - 3, size=n_differ)) % (
        vocab - 3
    )
    return tuple(clean.tolist()), tuple(corrupt.tolist())
