"""What a model's identity holds: all that changes its forward, and nothing else."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from nnsight import NNsight  # type: ignore[import-untyped]
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import patchsweep as ps
import tiny
from hooked import PAIR, grid, swept
from patchsweep.backends import choice as backends

GIVEN = torch.linspace(-1, 1, 16)  # what hooks below refer to


def identity(hf_model: nn.Module) -> str:
    return ps.wrap(hf_model, None).fingerprint


def logits(hf_model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = hf_model(input_ids=torch.tensor([PAIR.clean])).logits
    return found


def layer(hf_model: Any, index: int = 1) -> Any:
    return hf_model.model.layers[index]


def steer(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    return out + GIVEN


def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
    return (args[0] * 2, *args[1:])


def lora(hf_model: Any, name: str = "default", scale: float = 0.3) -> Any:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    hf_model.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    for key, p in hf_model.named_parameters():
        if f".{name}." in key:
            p.data = scale * torch.randn(p.shape, generator=generator)
    return hf_model.eval()


class Louder(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


class OwnHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 3


def own_head(hf_model: Any) -> None:
    head = OwnHead(16, len(tiny.WORDS), bias=False)
    head.weight = hf_model.lm_head.weight
    hf_model.lm_head = head


def buffer(hf_model: Any) -> None:
    hf_model.model.rotary_emb.inv_freq.mul_(0.5)  # it is in no state dict


def other_forward(hf_model: Any) -> None:
    mlp = layer(hf_model).mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))


def normal(hf_model: Any) -> None:
    nn.utils.weight_norm(layer(hf_model).mlp.up_proj)
    layer(hf_model).mlp.up_proj.weight_g.data.mul_(2)


def sometimes(_: nn.Module, __: Any, kwargs: Any, out: Tensor) -> Tensor:
    return out * len(kwargs)


# Each makes the model compute something else.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda m: layer(m).register_forward_hook(steer),
    "a hook with keywords": lambda m: layer(m).register_forward_hook(sometimes, with_kwargs=True),
    "a pre-hook": lambda m: layer(m).self_attn.o_proj.register_forward_pre_hook(before),
    "a weight": lambda m: layer(m).mlp.up_proj.weight.data[3].mul_(2),
    "a buffer": buffer,
    "an epsilon": lambda m: setattr(layer(m).input_layernorm, "variance_epsilon", 0.5),
    "a scale": lambda m: setattr(layer(m).self_attn, "scaling", 0.1),
    "the rotary's scale": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 2.0),
    "an activation": lambda m: setattr(layer(m).mlp, "act_fn", nn.GELU()),
    "a function for it": lambda m: (
        layer(m).mlp.__dict__.update(act_fn=torch.tanh) or layer(m).mlp._modules.pop("act_fn")
    ),
    "a forward": other_forward,
    "a module": own_head,
    "layers in another order": lambda m: setattr(
        m.model, "layers", nn.ModuleList([layer(m, i) for i in (1, 0, 2)])
    ),
    "a parametrisation": lambda m: parametrize.register_parametrization(
        layer(m).mlp.up_proj, "weight", Louder()
    ),
    "a weight norm": normal,
    "an adapter": lora,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_forward_makes_another_model(name: str) -> None:
    """And the same one again where the same is done to it."""
    hf_model, other = tiny.build(), tiny.build()
    known, usual = identity(hf_model), logits(hf_model)
    assert identity(other) == known
    CHANGES[name](hf_model)
    assert not torch.allclose(logits(hf_model), usual, atol=1e-4)
    assert identity(hf_model) != known
    CHANGES[name](other)
    logits(other)  # an old weight norm computes the weight now
    assert identity(other) == identity(hf_model)


def test_training_flags() -> None:
    hf_model = tiny.build()
    known = identity(hf_model)
    layer(hf_model).self_attn.train()
    one = identity(hf_model)
    assert len({known, one, identity(hf_model.train())}) == 3
    assert identity(hf_model.eval()) == known


def test_hooks_of_all_modules() -> None:
    hf_model = tiny.build()
    known = identity(hf_model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert identity(hf_model) != known
    finally:
        handle.remove()
    assert identity(hf_model) == known


def test_which_attention_it_came_with() -> None:
    hf_model = tiny.build()
    known = identity(hf_model)
    hf_model.set_attn_implementation("eager")
    assert identity(hf_model) != known


@pytest.fixture
def registered() -> Iterator[str]:
    AttentionInterface.register(
        "of_a_user", lambda *a, **k: modeling_llama.eager_attention_forward(*a, **k)
    )
    yield "of_a_user"
    AttentionInterface._global_mapping.pop("of_a_user")


def test_an_attention_function_of_the_users(registered: str) -> None:
    hf_model = tiny.build()
    hf_model.set_attn_implementation(registered)
    known = identity(hf_model)
    AttentionInterface.register(registered, lambda *_, **__: None)
    assert identity(hf_model) != known


def test_methods_and_functions_that_were_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = tiny.build()
    found = [identity(hf_model)]
    own = modeling_llama.LlamaMLP.forward
    replaced: list[tuple[Any, str, Any]] = [
        (modeling_llama.LlamaMLP, "forward", lambda self, x: own(self, x) * 2),
        (modeling_llama.LlamaMLP, "forward", lambda self, x: own(self, x) * 3),
        (modeling_llama.LlamaMLP, "forward", functools.wraps(own)(lambda self, x: own(self, x))),
        (modeling_llama.LlamaMLP, "forward", modeling_llama.LlamaRMSNorm.forward),
        (modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k)),
        (nn.functional, "silu", lambda x: x),
    ]
    for owner, name, instead in replaced:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            found.append(identity(hf_model))
    assert len(set(found)) == len(found)
    assert identity(hf_model) == found[0]


def test_adapters_as_they_are() -> None:
    """Which are active, how strong, merged or not."""
    hf_model = lora(lora(tiny.build()), "second")
    found = {"second": identity(hf_model)}
    hf_model.set_adapter("default")
    found["default"] = identity(hf_model)
    hf_model.disable_adapters()
    found["none"] = identity(hf_model)
    hf_model.enable_adapters()
    assert identity(hf_model) == found["default"]
    layer(hf_model).mlp.down_proj.scaling["default"] *= 2
    found["stronger"] = identity(hf_model)
    layer(hf_model).mlp.down_proj.merge()
    found["merged"] = identity(hf_model)
    assert len(set(found.values())) == len(found)


def four_bit(scale: float = 1.0) -> Any:
    hf_model = tiny.build()
    linear = Linear4bit(16, 24, bias=False, compute_dtype=torch.float32, compress_statistics=False)
    linear.load_state_dict(layer(hf_model).mlp.up_proj.state_dict())
    layer(hf_model).mlp.up_proj = linear.to("cpu")
    linear.weight.quant_state.absmax *= scale
    return hf_model


def eight_bit(scale: float = 1.0) -> Any:
    hf_model = tiny.build()
    linear = Linear8bitLt(16, 24, bias=False, has_fp16_weights=False)
    linear.load_state_dict(layer(hf_model).mlp.up_proj.state_dict())
    layer(hf_model).mlp.up_proj = linear.to("cpu")
    linear.weight.SCB *= scale
    return hf_model


@pytest.mark.parametrize("build", [four_bit, eight_bit])
def test_quantised_weights(build: Callable[..., Any]) -> None:
    """By their codes and their scales, whatever a first forward has moved."""
    hf_model = build()
    known = identity(hf_model)
    assert identity(build()) == known
    assert identity(build(2.0)) != known
    usual = logits(hf_model)
    assert identity(hf_model) == known
    assert not torch.allclose(logits(build(2.0)), usual)


def test_dynamically_quantised_weights() -> None:
    def build(seed: int) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(tiny.build(seed=seed), {nn.Linear})

    assert identity(build(0)) == identity(build(0)) != identity(build(1))


def make(vector: Tensor, factor: float = 1.0) -> Any:
    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + factor * vector

    return hook


class Steering:
    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    def hook(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + self.vector

    def __call__(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out - self.vector


def test_hooks_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their code, and by what it takes from around it."""

    def found(hook: Any) -> str:
        hf_model = tiny.build()
        layer(hf_model).register_forward_hook(hook)
        return identity(hf_model)

    one, two = torch.ones(16), torch.full((16,), 2.0)
    hooks: list[Callable[[], Any]] = [
        lambda: lambda *_: None,
        lambda: make(one),
        lambda: make(two),
        lambda: make(one, 2.0),
        lambda: functools.partial(lambda v, *a: a[2] + v, one),
        lambda: functools.partial(lambda v, *a: a[2] + v, two),
        lambda: Steering(one),
        lambda: Steering(two),
        lambda: Steering(one).hook,
        lambda: Steering(two).hook,
        lambda: steer,
    ]
    first = [found(hook()) for hook in hooks]
    assert len(set(first)) == len(hooks)
    assert [found(hook()) for hook in hooks] == first
    known = found(steer)
    monkeypatch.setitem(globals(), "GIVEN", GIVEN * 2)
    assert found(steer) != known


def test_a_hook_that_cannot_be_read() -> None:
    """It is one with itself, and with none before."""
    hf_model = tiny.build()
    known = identity(hf_model)
    counter = itertools.count()
    layer(hf_model).register_forward_hook(lambda _, __, out: out * next(counter))
    assert identity(hf_model) == identity(hf_model) != known


def of_three() -> list[str]:
    """Of a plain model, one with readable hooks, one with a hook that cannot be read."""
    hooked, unreadable = lora(tiny.build()), tiny.build()
    for hook in (steer, make(GIVEN), Steering(GIVEN).hook, {1, "a", 2.0}.union):
        layer(hooked).register_forward_hook(hook)
    counter = itertools.count()
    unreadable.register_forward_hook(lambda *_: next(counter))
    return [identity(tiny.build()), identity(hooked), identity(unreadable)]


def test_between_processes() -> None:
    script = "import json, test_identity; print(json.dumps(test_identity.of_three()))"
    env = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    there, here = json.loads(done.stdout.splitlines()[-1]), of_three()
    assert there[:2] == here[:2]
    assert len({*there, *here}) == 4


def compiled(hf_model: Any) -> None:
    layer(hf_model, 0).compile(backend="eager")
    layer(hf_model, 1).mlp.forward = torch.compile(layer(hf_model, 1).mlp.forward, backend="eager")
    hf_model.model.layers[2] = torch.compile(layer(hf_model, 2), backend="eager")


def looked_at(hf_model: Any) -> None:
    """transformers puts hooks on for good."""
    hf_model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert layer(hf_model)._forward_hooks


def sweeps(hf_model: Any, folder: Path) -> None:
    for backend in ("wavefront", "nnsight"):
        ask(hf_model, folder / backend, backend=backend)


# Each changes nothing that is computed.
NOTHING: dict[str, Callable[[Any], Any]] = {
    "learning": lambda m: m.requires_grad_(False),
    "the cache": lambda m: setattr(m.config, "use_cache", False),
    "checkpoints": lambda m: m.gradient_checkpointing_enable(),
    "a forward": logits,
    "generating": lambda m: m.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0),
    "looking": looked_at,
    "compiling": compiled,
    "accelerate": lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True),
    "offloading": lambda m: dispatch_model(
        m, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True
    ),
    "nnsight": NNsight,
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing(name: str) -> None:
    hf_model = tiny.build()
    known = identity(hf_model)
    NOTHING[name](hf_model)
    assert identity(hf_model) == known


def test_a_sweep_changes_nothing(tmp_path: Path) -> None:
    hf_model = tiny.build()
    known = identity(hf_model)
    sweeps(hf_model, tmp_path)
    assert identity(hf_model) == known


def test_saved_and_loaded(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    one = ps.load_model(str(tmp_path / "model"), device="cpu")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert identity(other) == one.fingerprint


def ask(hf_model: nn.Module, out: Path, pairs: Any = (PAIR,), **settings: Any) -> ps.Results:
    model = ps.wrap(hf_model, tiny.tokenizer())
    given: dict[str, Any] = {"components": ["resid_post"], "metrics": ["logit_diff"], **settings}
    return ps.sweep(model, list(pairs), out=out, **given)


def last(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """No packed call knows which token is the last one."""
    out = out.clone()
    out[:, -1] += 2 * GIVEN.to(out.dtype)
    return out


def test_a_self_test_that_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not believed of a model that has a hook since."""
    monkeypatch.setattr(backends, "kept_in", lambda: tmp_path / "kept")
    hf_model = tiny.build().double()
    assert ask(hf_model, tmp_path / "one").attrs["backend"] == "wavefront"
    layer(hf_model).register_forward_hook(last)
    results = ask(hf_model, tmp_path / "other")
    assert results.attrs["backend"] == "nnsight"
    assert abs(swept(results) - grid(hf_model, hf_model.model.layers)).max() < 1e-9


@pytest.mark.parametrize("way", [{"append": True}, {"resume": True}])
@pytest.mark.parametrize("change", ["a hook", "a forward"])
def test_two_models_are_not_joined(change: str, way: dict[str, Any], tmp_path: Path) -> None:
    hf_model = tiny.build()
    results = ask(hf_model, tmp_path / "r")
    CHANGES[change](hf_model)
    more = [PAIR, PAIR] if "append" in way else [PAIR]
    with pytest.raises(ps.BadInput, match="another model"):
        ask(hf_model, tmp_path / "r", more, **way)
    with pytest.raises(ps.BadInput, match="another model"):
        ps.verify(results, model=ps.wrap(hf_model, tiny.tokenizer()))


def test_an_adapter_switched_off_is_not_joined(tmp_path: Path) -> None:
    hf_model = lora(tiny.build())
    ask(hf_model, tmp_path / "r")
    hf_model.disable_adapters()
    with pytest.raises(ps.BadInput, match="another model"):
        ask(hf_model, tmp_path / "r", [PAIR, PAIR], append=True)
