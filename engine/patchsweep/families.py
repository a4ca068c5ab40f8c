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
    "interface run too: every sweep first compares a few of its cells with full forwards. "
    "resid_mid does not exist in parallel blocks. Not on the wavefront: families without that "
    "interface (GPT-J, GPT-Neo, Falcon, BLOOM, MPT, CodeGen), recurrent layers, masks that are "
    "neither causal nor a causal window."
)


@dataclass(frozen=True)
class Family:
    """A family, what is particular about it, and to what the tests hold it in float64."""

    name: str
    particular: str = ""
    parallel: bool = False
    tolerance: float = 1e-6


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
)
