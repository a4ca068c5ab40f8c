"""Which families the tests hold against full forwards: the table that `patchsweep models` prints.

The engine itself knows no families. Any causal language model that calls transformers' attention
interface can run; each loaded model is checked on a few cells of the sweep before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

HOW = (
    "Checked: every component, both directions, prompts of different lengths, in float64, against "
    "one full forward with plain hooks per cell; largest difference of any metric as given (1e-06 "
    "where the family computes in float32 inside). Other families with transformers' attention "
    "interface run too: every sweep is first held against the model's own full forwards. "
    "resid_mid does not exist in parallel blocks. What cannot run on the wavefront runs through "
    "nnsight: families that compute attention within a larger function (Falcon, BLOOM, MPT: their "
    "biases by distance are known nowhere else), masks that are neither causal nor a causal "
    "window. head_pattern, and head_q, head_k and head_v where the order of the projection is not "
    "known (grouped Falcon), are patched on the wavefront only. Layers over several GPUs: not yet "
    "verified on hardware."
)


@dataclass(frozen=True)
class Family:
    """A family, what is particular about it, which backend runs it, and to what the tests hold it
    in float64."""

    name: str
    particular: str = ""
    parallel: bool = False
    tolerance: float = 1e-6
    backend: str = "wavefront"


FAMILIES = (
    Family("llama", "grouped-query attention (SmolLM2 among them)"),
    Family("gpt2", "learned positions", tolerance=1e-9),
    Family("gpt_neox", "parallel blocks (Pythia)", parallel=True, tolerance=1e-9),
    Family("gpt_neox_sequential", "sequential blocks", tolerance=1e-9),
    Family("qwen2", "windows in some layers"),
    Family("qwen3", "q and k norms"),
    Family("gemma2", "post-norms, soft-caps, alternating windows"),
    Family("gemma3_text", "post-norms, q and k norms, alternating windows"),
    Family("mistral", "sliding window"),
    Family("olmo2", "post-norms only"),
    Family("opt", "learned positions", tolerance=1e-9),
    Family("phi", "parallel blocks", parallel=True, tolerance=1e-9),
    Family("phi3", "fused projections"),
    Family("cohere", "parallel blocks, scaled logits", parallel=True),
    Family("granite", "residual, attention and logit multipliers"),
    Family("stablelm", "partial rotary", tolerance=1e-9),
    Family("starcoder2", "biases", tolerance=1e-9),
    Family("glm4", "post-norms"),
    Family("mixtral", "experts"),
    Family("qwen3_moe", "experts, q and k norms"),
    Family("gpt_oss", "experts, attention sinks, alternating windows"),
    Family("deepseek_v3", "latent attention, experts"),
    Family("gptj", "parallel blocks, attends in a method of its own", parallel=True),
    Family("gpt_neo", "alternating windows, attends in a method of its own"),
    Family("codegen", "parallel blocks, attends in a method of its own", parallel=True),
    Family(
        "falcon",
        "multi-query attention, parallel blocks",
        parallel=True,
        backend="nnsight",
        tolerance=1e-9,
    ),
    Family("falcon_alibi", "biases by distance", backend="nnsight", tolerance=1e-9),
    Family(
        "falcon_grouped", "two norms side by side", parallel=True, backend="nnsight", tolerance=1e-9
    ),
    Family("bloom", "biases by distance", backend="nnsight", tolerance=1e-9),
    Family("mpt", "biases by distance", backend="nnsight", tolerance=1e-9),
    Family("llama4_text", "chunked mask, experts", backend="nnsight", tolerance=1e-9),
)
