"""Heads, widths, neurons and the decoder layers: seen in a forward, whatever weights and configs
look like."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

import patchsweep as ps
import tiny
from hooked import PAIR, grid, swept
from oracle.families import EVERY
from patchsweep.engine.planning import plan_spec
from patchsweep.model.model import dimensions_of, empty_model
from patchsweep.passes.attention import NAME, attention_is
from patchsweep.passes.layers import layers_of
from patchsweep.plan.dimensions import Dimensions
from patchsweep.spec import parse_spec

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {
    "sliding_window": 4,
    "layer_types": KINDS,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 60,
}
# Of which the CPU's kernels make whole tiles.
BITS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}


def build(kind: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | config))
    return made.double().eval().requires_grad_(False)


def sweep(
    hf_model: nn.Module,
    out: Path,
    component: str = "resid_post",
    backend: str = "auto",
    **more: Any,
) -> ps.Results:
    return ps.sweep(
        ps.wrap(hf_model, tiny.tokenizer()),
        [PAIR],
        components=[component],
        metrics=["logit_diff"],
        direction="denoise",
        backend=backend,
        out=out,
        **more,
    )


def dimensions(hf_model: PreTrainedModel) -> Dimensions:
    return ps.wrap(hf_model, tiny.tokenizer()).dimensions


def refused(hf_model: PreTrainedModel, out: Path, says: str, component: str, **more: Any) -> None:
    for backend in ("auto", "wavefront", "nnsight"):
        with pytest.raises(ps.BadInput, match=says) as error:
            sweep(hf_model, out, component, backend, **more)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EVERY)
def test_without_weights_as_with_them(name: str) -> None:
    """What a plan is made of without the weights is what it is made of with them."""
    hf_model = EVERY[name].build(3, 1)
    found = dimensions(hf_model)
    empty = empty_model(copy.deepcopy(hf_model.config), str(hf_model.dtype).split(".")[1])
    assert dimensions_of(empty) == found
    assert found.heads == hf_model.config.num_attention_heads
    assert found.uneven == ()


def four_bits(folder: Path) -> PreTrainedModel:
    """A Llama in 4 bits, whose weights lie in one column each."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES | BITS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    given: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, **given)
    return made.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
def test_weights_in_four_bits(backend: str, tmp_path: Path) -> None:
    hf_model = four_bits(tmp_path / "m")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert dimensions(hf_model) == dimensions(whole)
    assert dimensions(hf_model).kv_heads == 2
    values = [layer.self_attn.v_proj for layer in hf_model.model.layers]
    found = swept(sweep(hf_model, tmp_path / "v", "head_v", backend), "head_v")
    expected = grid(hf_model, values, units=2)
    assert expected.std() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_neurons_in_four_bits(tmp_path: Path) -> None:
    hf_model = four_bits(tmp_path / "m")
    neurons = [layer.mlp.down_proj for layer in hf_model.model.layers]
    found = swept(sweep(hf_model, tmp_path / "n", "neuron"), "neuron")
    expected = grid(hf_model, neurons, "input", units=64)
    assert expected.std() > 0.2
    # On a CPU its kernel rounds to bfloat16 inside.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-2)


def test_weights_in_eight_bits(tmp_path: Path) -> None:
    """torch's own: there is no weight to ask for its shape. What a token is rounded to depends on
    the others, so that no cell is structural."""
    whole = build("llama").float()
    hf_model = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(whole), {nn.Linear}, dtype=torch.qint8
    )
    assert dimensions(hf_model) == dimensions(whole)
    refused(hf_model, tmp_path / "r", "nothing can change moves a logit", "resid_post")


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
def test_heads_of_a_width_of_their_own_in_every_layer(backend: str, tmp_path: Path) -> None:
    """Gemma 4's config raises an error where one width is asked for."""
    hf_model = build("gemma4_text", **GEMMA4)
    d = dimensions(hf_model)
    assert (d.heads, d.kv_heads, d.d_qk, d.d_head, d.neurons) == (4, 2, 16, 16, 48)
    said = "layer 0 has {} of width 8, layer 1 has {0} of width 16"
    assert dict(d.uneven) == {
        name: said.replace("{}", what).replace("{0}", what)
        for name, what in (("d_qk", "queries and keys"), ("d_head", "values and z"))
    }
    layers = hf_model.model.layers
    for component, module, side in (
        ("resid_post", None, "output"),
        ("head_z", "self_attn.o_proj", "input"),
        ("mlp_out", "post_feedforward_layernorm", "output"),
    ):
        modules = [layer.get_submodule(module) if module else layer for layer in layers]
        units = 4 if component == "head_z" else 1
        expected = grid(hf_model, modules, side, units)  # type: ignore[arg-type]
        found = swept(sweep(hf_model, tmp_path / component, component, backend), component)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    given: dict[str, Any] = {"source": {"mean": {"prompts": "clean"}}, "direction": "noise"}
    with pytest.raises(ps.BadInput, match=r"head_z has no mean.*: layer 0 has values and z of"):
        ps.sweep(
            ps.wrap(hf_model, tiny.tokenizer()),
            [PAIR],
            components=["head_z"],
            backend=backend,
            out=tmp_path / "mean",
            **given,
        )


def test_layers_that_differ_in_key_value_heads(tmp_path: Path) -> None:
    more = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    hf_model = build("gemma4_text", **GEMMA4, **more)
    says = "head_v cannot be swept .*: layer 0 has 2 key-value heads, layer 1 has 1 key-value heads"
    refused(hf_model, tmp_path / "r", says, "head_v")
    out = [layer.self_attn.o_proj for layer in hf_model.model.layers]
    found = swept(sweep(hf_model, tmp_path / "z", "head_z"), "head_z")
    np.testing.assert_allclose(found, grid(hf_model, out, "input", 4), rtol=0, atol=1e-6)


def test_layers_that_differ_in_neurons(tmp_path: Path) -> None:
    more = {"use_double_wide_mlp": True, "num_kv_shared_layers": 2}
    hf_model = build("gemma4_text", **GEMMA4 | more | {"hidden_size_per_layer_input": 8})
    says = "neuron cannot be swept .*: layer 0 has 48 neurons, layer 2 has 96 neurons"
    refused(hf_model, tmp_path / "r", says, "neuron")
    refused(hf_model, tmp_path / "s", says, "mlp_out", sets={"one": ["neuron.0.3@-1"]})
    found = swept(sweep(hf_model, tmp_path / "x"))
    np.testing.assert_allclose(found, grid(hf_model, hf_model.model.layers), rtol=0, atol=1e-6)


def test_layers_that_differ_in_heads(tmp_path: Path) -> None:
    hf_model = build("llama")
    config = copy.deepcopy(hf_model.config)
    config.num_attention_heads = 2
    attention = type(hf_model.model.layers[1].self_attn)(config, 1).double().eval()
    attention.config = hf_model.config
    hf_model.model.layers[1].self_attn = attention.requires_grad_(False)
    says = "layer 0 has 4 heads, layer 1 has 2 heads"
    for component in ("head_z", "head_q", "head_pattern"):
        refused(hf_model, tmp_path / "r", f"{component} cannot be swept .*{says}", component)
    refused(hf_model, tmp_path / "r", says, "resid_post", sets={"one": ["head_z.1.3@-1"]})
    with pytest.raises(ps.BadInput, match=f"edges cannot be estimated .*{says}"):
        sweep(hf_model, tmp_path / "r", edges="eap")
    found = swept(sweep(hf_model, tmp_path / "x"))
    np.testing.assert_allclose(found, grid(hf_model, hf_model.model.layers), rtol=0, atol=1e-6)


def test_a_list_of_widths(tmp_path: Path) -> None:
    """Gemma 3n's config has one per layer. Its residual stream is several beside each other, so
    what a sweep takes for it is refused."""
    more = {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "vocab_size_per_layer_input": 60}
    more |= {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4}  # type: ignore[dict-item]
    hf_model = build("gemma3n_text", **more, sliding_window=4, layer_types=KINDS).float()
    d = dimensions(hf_model)
    assert (d.heads, d.kv_heads, d.d_head) == (4, 2, 8)
    for component in ("resid_post", "mlp_out", "head_z", "neuron"):
        refused(hf_model, tmp_path / "r", "Gemma3n|in this model", component)


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_the_plan_of_what_each_layer_has_its_own_of(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {**GEMMA4, "layer_types": KINDS}
    if kind == "gemma3n_text":
        more = {"layer_types": KINDS, "activation_sparsity_pattern": [0.0] * 4}
        more |= {"vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0}
    tiny.save(tmp_path / "m", build(kind, **more))
    (tmp_path / "pairs.jsonl").write_text(
        '{"clean": "a b c", "corrupt": "a k c", "answer": " g", "wrong": " h"}\n'
    )
    spec = parse_spec(
        {
            "model": str(tmp_path / "m"),
            "prompts": {"file": str(tmp_path / "pairs.jsonl")},
            "components": ["head_z", "head_v", "mlp_out"],
        }
    )
    counts = plan_spec(spec).counts()
    assert counts["cells"] == 4 * (4 + 2 + 1) * 3  # layers, units, positions


def with_pictures(kind: str) -> Any:
    """A config with a tower for pictures that is as deep as the text model."""
    text = {"internvl": "qwen2", "gemma3": "gemma3_text", "llava": "llama"}[kind]
    vision: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes: Any = ([8, 8], [4, 4]) if kind == "internvl" else (8, 4)
    vision |= {"intermediate_size": 16, "image_size": sizes[0], "patch_size": sizes[1]}
    if kind == "llava":
        vision["model_type"] = "clip_vision_model"
    return AutoConfig.for_model(
        kind, text_config={**SIZES, "model_type": text}, vision_config=vision, image_token_id=59
    )


@pytest.mark.parametrize("kind", ["internvl", "gemma3", "llava"])
def test_a_tower_for_pictures_as_deep_as_the_text_model(kind: str, tmp_path: Path) -> None:
    """It comes first among the model's modules."""
    config = with_pictures(kind)
    torch.manual_seed(0)
    hf_model = AutoModelForImageTextToText.from_config(config).double().eval()
    layers = hf_model.model.language_model.layers
    assert layers_of(hf_model) is layers
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    assert layers_of(empty) is empty.model.language_model.layers
    assert dimensions(hf_model).heads == 4
    for backend in ("auto", "nnsight"):
        found = swept(sweep(hf_model, tmp_path / backend, backend=backend))
        np.testing.assert_allclose(found, grid(hf_model, layers), rtol=0, atol=1e-6)


def test_each_part_keeps_its_own_attention() -> None:
    hf_model = AutoModelForImageTextToText.from_config(with_pictures("llava"))
    parts = (hf_model, hf_model.model.vision_tower, hf_model.model.language_model)
    hf_model.model.vision_tower.set_attn_implementation("eager")
    before = [part.config._attn_implementation for part in parts]
    assert len(set(before)) == 2
    with attention_is(hf_model):
        assert {part.config._attn_implementation for part in parts} == {NAME}
    assert [part.config._attn_implementation for part in parts] == before


@pytest.mark.parametrize("kind", ["bart", "mbart", "whisper"])
def test_an_encoder_with_other_heads(kind: str, tmp_path: Path) -> None:
    """The config's number of heads is the encoder's."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 60}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    more = {"max_target_positions": 64, "init_std": 0.3, "is_encoder_decoder": False}
    config = AutoConfig.for_model(kind, **sizes, **more, pad_token_id=0)
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    assert dimensions(hf_model).heads == 4
    layers = hf_model.model.decoder.layers
    out = [layer.self_attn.out_proj for layer in layers]
    for backend in ("auto", "nnsight"):
        found = swept(sweep(hf_model, tmp_path / backend, "head_z", backend), "head_z")
        expected = grid(hf_model, out, "input", 4)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_widths_of_queries_and_of_values() -> None:
    d = dimensions(EVERY["deepseek_v3"].build(2, 1))
    config = EVERY["deepseek_v3"].build(2, 1).config
    assert d.d_qk == config.qk_nope_head_dim + config.qk_rope_head_dim
    assert d.d_head == config.v_head_dim
    assert d.d_qk != d.d_head


@pytest.mark.parametrize("multi_query", [True, False])
def test_one_key_value_head_for_all(multi_query: bool) -> None:
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}
    made = AutoConfig.for_model("gpt_bigcode", multi_query=multi_query, **config)
    hf_model = AutoModelForCausalLM.from_config(made).eval()
    assert dimensions(hf_model).kv_heads == (1 if multi_query else 4)


def test_neurons_that_the_config_does_not_name() -> None:
    """Moshi's config says how many there are together with their gates."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model("moshi", **sizes, ffn_dim=48, vocab_size=60, head_dim=8)
    assert dimensions(AutoModelForCausalLM.from_config(config).eval()).neurons == 24


def test_copies_of_key_value_heads(tmp_path: Path) -> None:
    """JetMoE gives attention every one of them once for each expert that a token visits."""
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    config = AutoConfig.for_model("jetmoe", **SIZES | more)
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config).eval()
    assert dimensions(hf_model).kv_heads == 2
    says = "head_v of layer 0 .* attention is given 4 heads, .* say 2"
    refused(hf_model, tmp_path / "r", says, "head_v")


def test_layers_without_attention(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "lfm2", **SIZES, layer_types=["conv", "full_attention"] * 2, block_ff_dim=48
    )
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config).double().eval()
    says = "head_z cannot be swept .*: layer 0 shows no attention, layer 1 has 4 heads"
    refused(hf_model, tmp_path / "r", says, "head_z")


def test_what_shows_no_sizes_has_those_of_its_config(caplog: pytest.LogCaptureFixture) -> None:
    """A forward that asks for values, which weights on the meta device do not have."""
    config = AutoConfig.for_model("llama", **SIZES)
    empty = empty_model(config, "float32")
    layer = empty.model.layers[1]
    layer.register_forward_hook(lambda _, __, out: out * float(out.sum()))
    d = dimensions_of(empty)
    assert d == dimensions_of(empty_model(config, "float32"))
    [said] = [r.getMessage() for r in caplog.records]
    assert "LlamaForCausalLM does not show its sizes, they are taken from its config: " in said
    assert "\n" not in said


def test_the_model_is_left_as_it_was() -> None:
    """Its mode, its attention and the caller's random numbers."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=60)
    hf_model = AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    dimensions(hf_model)
    assert torch.equal(torch.rand(3), drawn)
    assert hf_model.training
    assert hf_model.config._attn_implementation == "sdpa"
