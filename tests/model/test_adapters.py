"""Adapters and compiled models: taken as they are, against plain hooks; what is refused says the
mend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, pipeline

import patchsweep as ps
import tiny
from hooked import PAIR, grid, logit_diff, swept
from patchsweep.engine.planning import plan_spec
from patchsweep.model import adapters

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2S = ["c_attn", "c_proj", "c_fc"]
COMPONENTS = ("resid_post", "head_z", "neuron")


def trained(peft_model: Any, size: float = 0.2) -> Any:
    """The adapter's weights are no longer those that change nothing."""
    generator = torch.Generator().manual_seed(3)
    for name, p in peft_model.named_parameters():
        if p.requires_grad:
            noise = size * torch.randn(p.shape, generator=generator)
            p.data = (1 + noise if "ia3" in name else noise).to(p.dtype)
    return peft_model.double().eval()


def adapted(targets: list[str] = EVERY, **settings: Any) -> Any:
    """A model of PEFT around a tiny Llama."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=0.1, **settings)
    return trained(get_peft_model(tiny.build(2), config))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny.WORDS), n_embd=16, n_layer=2, n_head=4, n_positions=16)
    config.initializer_range = 0.4
    given = LoraConfig(r=2, target_modules=GPT2S, fan_in_fan_out=True)
    return trained(get_peft_model(GPT2LMHeadModel(config).eval(), given))


def scaled() -> Any:
    """An adapter that multiplies what goes into the MLP's last map."""
    given = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return trained(get_peft_model(tiny.build(2), IA3Config(**given)))


def ask(hf_model: Any, out: Path, **settings: Any) -> ps.Results:
    given: dict[str, Any] = {"components": list(COMPONENTS), "metrics": ["logit_diff"], **settings}
    return ps.sweep(ps.wrap(hf_model, tiny.tokenizer()), [PAIR], out=out, **given)


def truth(hf_model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The cells of every component, by plain hooks on a model of transformers."""
    if isinstance(hf_model, GPT2LMHeadModel):
        layers: Any = hf_model.transformer.h
        out, down, width = "attn.c_proj", "mlp.c_proj", 64
    else:
        layers, out, down, width = hf_model.model.layers, "self_attn.o_proj", "mlp.down_proj", 24
    inside = {name: [x.get_submodule(name) for x in layers] for name in (out, down)}
    return {
        "resid_post": grid(hf_model, layers),
        "head_z": grid(hf_model, inside[out], "input", 4),
        "neuron": grid(hf_model, inside[down], "input", width),
    }


ADAPTED: dict[str, Callable[[], Any]] = {
    "all linear maps": adapted,
    "DoRA": lambda: adapted(use_dora=True),
    "attention": lambda: adapted(["q_proj", "v_proj"]),
    "GPT-2": gpt2,
    "IA3": scaled,
}


@pytest.mark.parametrize("name", ADAPTED)
def test_a_model_of_peft_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    """Neurons too, on both backends, under the adapter."""
    peft_model = ADAPTED[name]()
    wanted = truth(peft_model.get_base_model())
    with peft_model.disable_adapter():
        base = logit_diff(peft_model, PAIR.clean)
    assert abs(logit_diff(peft_model, PAIR.clean) - base) > 1e-3
    for backend, taken in (("auto", "wavefront"), ("nnsight", "nnsight")):
        results = ask(peft_model, tmp_path / backend, backend=backend)
        assert results.attrs["backend"] == taken
        for component, cells in wanted.items():
            np.testing.assert_allclose(swept(results, component), cells, atol=1e-9)


def test_an_adapter_that_is_switched_off_or_merged(tmp_path: Path) -> None:
    peft_model = adapted()
    with peft_model.disable_adapter():
        off = ask(peft_model, tmp_path / "off")
        base = truth(peft_model.get_base_model())
    on = truth(peft_model.get_base_model())
    merged = ask(peft_model.merge_and_unload(), tmp_path / "merged")
    for component in COMPONENTS:
        np.testing.assert_allclose(swept(off, component), base[component], atol=1e-9)
        np.testing.assert_allclose(swept(merged, component), on[component], atol=1e-9)


def test_neurons_as_a_metric(tmp_path: Path) -> None:
    hf_model = adapted().get_base_model()
    seen: list[torch.Tensor] = []
    down = hf_model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hf_model(torch.tensor([PAIR.clean]))
    hook.remove()
    metric = {"neuron": {"layer": 1, "neuron": 5, "position": 3}}
    results = ask(hf_model, tmp_path / "r", components=["resid_pre"], metrics=[metric])
    found = results.store.read(f"baseline/{results.metrics[0]}").ravel()[0]
    assert results.attrs["backend"] == "wavefront"
    assert found == pytest.approx(float(seen[0][0, 3, 5]), abs=1e-9)


class Split(nn.Module):
    """A linear map in two halves: none of them alone has all neurons."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(12, 16, bias=False) for _ in range(2))
        self.a.weight.data, self.b.weight.data = whole.weight.data.split(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = x.split(12, -1)
        out: torch.Tensor = self.a(one) + self.b(other)
        return out


@pytest.mark.parametrize("asked", ["component", "metric"])
def test_what_the_wavefront_lacks(asked: str, tmp_path: Path) -> None:
    """`auto` goes on with nnsight, which says why where it cannot either; neurons that are not as
    many as weights and config say are refused before."""
    hf_model = tiny.build(2).double()
    for layer in hf_model.model.layers:
        layer.mlp.down_proj = Split(layer.mlp.down_proj).double()
    metric = {"neuron": {"layer": 1, "neuron": 5, "position": 3}}
    given = {"components": ["neuron"]} if asked == "component" else {"metrics": [metric]}
    other = "the model has 12 of them" if asked == "component" else None
    with pytest.raises(ps.BadInput, match=other or "through nnsight in this model"):
        ask(hf_model, tmp_path / "r", **{"components": ["resid_pre"], **given})
    with pytest.raises(ps.BadInput, match=other or "does not end in one linear map"):
        ask(hf_model, tmp_path / "w", **{"components": ["resid_pre"], **given}, backend="wavefront")


def whole(hf_model: PreTrainedModel) -> Any:
    return torch.compile(hf_model, backend="eager")


def itself(hf_model: PreTrainedModel) -> Any:
    hf_model.compile(backend="eager")
    return hf_model


def forward(hf_model: PreTrainedModel) -> Any:
    hf_model.forward = torch.compile(hf_model.forward, backend="eager")
    return hf_model


def layers(hf_model: Any) -> Any:
    for layer in hf_model.model.layers:
        layer.compile(backend="eager")
    return hf_model


def in_the_list(hf_model: Any) -> Any:
    for i, layer in enumerate(hf_model.model.layers):
        hf_model.model.layers[i] = torch.compile(layer, backend="eager")
    return hf_model


def around_adapters(_: Any) -> Any:
    return torch.compile(adapted(), backend="eager")


@pytest.mark.parametrize("way", [whole, itself, forward, layers, in_the_list, around_adapters])
def test_compiled_models(way: Callable[[Any], Any], tmp_path: Path) -> None:
    plain = adapted().get_base_model() if way is around_adapters else tiny.build(2).double()
    wanted = truth(plain)
    compiled = way(tiny.build(2).double())
    for backend in ("wavefront", "nnsight"):
        results = ask(compiled, tmp_path / backend, backend=backend)
        for component, cells in wanted.items():
            np.testing.assert_allclose(swept(results, component), cells, atol=1e-9)


LEARNT = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("name", LEARNT)
def test_learnt_prompts_are_refused(name: str) -> None:
    """The model inside does not have them."""
    with pytest.raises(ps.BadInput, match=r"_TUNING\) computes other logits.*merge_and_unload"):
        ps.wrap(trained(get_peft_model(tiny.build(2), LEARNT[name])), None)


def test_what_is_no_model_of_transformers() -> None:
    hf_model = tiny.build(2)
    piped = pipeline("text-generation", hf_model, tokenizer=tiny.tokenizer())
    for given, mend in (
        (nn.DataParallel(hf_model), r"give its \.module \(LlamaForCausalLM\)"),
        (piped, r"give its \.model \(LlamaForCausalLM\)"),
        ("gpt2", r"load_model\('gpt2'\)"),
        (nn.Linear(2, 2), "AutoModelForCausalLM"),
        (torch.compile(nn.Linear(2, 2)), "AutoModelForCausalLM"),
    ):
        with pytest.raises(ps.BadInput, match=mend):
            ps.wrap(given, None)  # type: ignore[arg-type]


def test_layers_that_were_taken_out(tmp_path: Path) -> None:
    """Whole numbers of the model that is left, or the line that says what to set."""
    hf_model = tiny.build().double()
    hf_model.model.layers = hf_model.model.layers[:2]
    wanted = grid(hf_model, hf_model.model.layers)
    try:
        found = swept(ask(hf_model, tmp_path / "r"))
    except ps.BadInput as error:
        assert str(error).endswith("set config.num_hidden_layers to 2")
        hf_model.config.num_hidden_layers = 2
        found = swept(ask(hf_model, tmp_path / "r"))
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter, saved beside the model that it is for."""
    tiny.save(tmp_path / "base")
    base = tiny.build(2).from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=EVERY)
    trained(get_peft_model(base, config)).float().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_folder_of_an_adapter(folder: Path, dtype: str) -> None:
    model = ps.load_model(str(folder), dtype, "cpu")
    kind = getattr(torch, dtype)
    base = tiny.build(2).from_pretrained(folder.parent / "base", dtype=kind)
    theirs = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()
    theirs = theirs.to(kind)
    ids = torch.tensor([PAIR.clean])
    with torch.no_grad():
        wanted, found = theirs(input_ids=ids).logits, model.hf_model(input_ids=ids).logits
        plain = base.from_pretrained(folder.parent / "base", dtype=kind)(input_ids=ids).logits
    assert found.dtype == kind
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if dtype == "float64" else 1e-5)
    assert (found - plain).abs().max() > 0.1
    assert not any(p.requires_grad for p in model.hf_model.parameters())


def test_a_spec_that_names_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, planned and verified by its name."""
    tiny.write_pairs(folder.parent / "pairs.jsonl", tiny.rows(2))
    spec = tiny.write_spec(folder.parent, folder, components=["neuron"], direction="denoise")
    monkeypatch.chdir(folder.parent)
    given = ps.load_spec(spec)
    results = ps.run(given)
    assert results.attrs["backend"] == "wavefront"
    assert ps.verify(results, trust=True).holds
    assert plan_spec(given).counts()["cells"] == results.attrs["plan"]["cells"]


def test_adapters_that_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(mend: str, **settings: Any) -> None:
        with pytest.raises(ps.BadInput, match=mend):
            ps.load_model(str(folder), device=settings.get("device", "cpu"))

    refused("another device than balanced", device="balanced")
    with monkeypatch.context() as patch:
        patch.setattr(adapters.importlib.util, "find_spec", lambda _: None)
        refused("pip install peft")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_model.safetensors").rename(folder / "kept")
    refused("adapter_model.safetensors")
    (folder / "kept").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({**said, "base_model_name_or_path": None})
    )
    refused("base_model_name_or_path")
    gone = {**said, "base_model_name_or_path": str(folder.parent / "gone")}
    (folder / "adapter_config.json").write_text(json.dumps(gone))
    refused("no such folder")
