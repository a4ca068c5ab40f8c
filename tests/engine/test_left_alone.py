"""The model and the caller's switches are after a sweep what they were before, whatever happens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import patchsweep as ps
import tiny
from hooked import PAIR, grid, swept
from patchsweep.engine.prompts import answers_right

ATTENTION = {"layer": 1, "head": 0, "query": -1, "key": 0}
WAYS: dict[str, dict[str, Any]] = {
    "wavefront": {"backend": "wavefront"},
    "nnsight": {"backend": "nnsight"},
    "attention of a head": {"backend": "nnsight", "metrics": [{"attention": ATTENTION}]},
    "estimates": {"estimate": True},
    "edges": {"edges": "eap"},
}


def ask(hf_model: nn.Module, out: Path, **settings: Any) -> ps.Results:
    settings = {"components": ["resid_post"], "metrics": ["logit_diff"], **settings}
    return ps.sweep(ps.wrap(hf_model, tiny.tokenizer()), [PAIR], out=out, **settings)


def dynamic() -> PreTrainedModel:
    """A Llama whose rotary frequencies change with the length of a prompt, and stay changed."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny.WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=3,
        initializer_range=0.4,
        rope_parameters=rope,
    )
    return LlamaForCausalLM(config).eval()


def nested() -> PreTrainedModel:
    """A language model in a model of images and text, each part with a config of its own."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    text = {
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": 2,
        "vocab_size": len(tiny.WORDS),
        "initializer_range": 0.4,
    }
    vision = {"model_type": "clip_vision_model", **sizes, "num_hidden_layers": 3, "image_size": 8}
    config = AutoConfig.for_model(
        "llava", text_config=text, vision_config={**vision, "patch_size": 4}, image_token_index=1
    )
    torch.manual_seed(0)
    from transformers import AutoModelForImageTextToText

    hf_model = AutoModelForImageTextToText.from_config(config).eval()
    hf_model.model.vision_tower.set_attn_implementation("eager")
    return hf_model


def plain(value: Any) -> Any:
    """Dictionaries, lists and sets as they are now; anything else by itself."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return list(value) if isinstance(value, list | set) else value


def state(hf_model: nn.Module) -> dict[str, Any]:
    """All that modules and configs hold, the values of buffers, and which parameters learn."""
    found: dict[str, Any] = {}
    for name, module in hf_model.named_modules():
        found |= {f"{name} {k}": plain(v) for k, v in vars(module).items()}
        config = getattr(module, "config", None)
        inside = [config, *vars(config).values()] if isinstance(config, PretrainedConfig) else []
        for i, each in enumerate(c for c in inside if isinstance(c, PretrainedConfig)):
            found |= {f"{name} config {i} {k}": plain(v) for k, v in vars(each).items()}
    found |= {f"{n} values": b.tolist() for n, b in hf_model.named_buffers()}
    found |= {f"{n} learns": p.requires_grad for n, p in hf_model.named_parameters()}
    return found


def unusual() -> PreTrainedModel:
    """One module in train mode, one parameter frozen, a hook, a forward of one module's own."""
    hf_model = tiny.build()
    hf_model.model.layers[0].mlp.train()
    hf_model.lm_head.weight.requires_grad_(False)
    hf_model.model.layers[1].register_forward_hook(lambda _, __, out: out * 1.01)
    down = hf_model.model.layers[2].mlp.down_proj
    own = down.forward
    down.forward = lambda x: own(x) * 0.99  # type: ignore[method-assign]
    return hf_model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "unusual": unusual,
    "dynamic": dynamic,
    "nested": nested,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_it_was(name: str, way: str, tmp_path: Path) -> None:
    hf_model = MODELS[name]()
    before = state(hf_model)
    if (name, way) == ("unusual", "edges"):  # its hook scales the stream, which no edge tells
        with pytest.raises(ps.BadInput, match="depends on the residual stream through more"):
            ask(hf_model, tmp_path / "r", **WAYS[way])
    else:
        ask(hf_model, tmp_path / "r", **WAYS[way])
    assert state(hf_model) == before


def raises(*_: Any) -> torch.Tensor:
    raise ValueError("in the middle")


def interrupts(*_: Any) -> torch.Tensor:
    raise KeyboardInterrupt("in the middle")


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
@pytest.mark.parametrize("ends", [raises, interrupts])
def test_it_is_after_a_sweep_that_ends_early(ends: Any, backend: str, tmp_path: Path) -> None:
    hf_model = unusual()
    before = state(hf_model)
    metric = {"callable": {"path": f"{__name__}:{ends.__name__}"}}
    with pytest.raises((ValueError, KeyboardInterrupt), match="in the middle"):
        ask(hf_model, tmp_path / "r", metrics=[metric], backend=backend)
    assert state(hf_model) == before


def test_logits_are_what_they_were(tmp_path: Path) -> None:
    """A sweep through nnsight of longer prompts than before moved the frequencies for good."""
    hf_model = dynamic()
    short = torch.tensor([[1, 2]])
    with torch.no_grad():
        before = hf_model(short).logits
        ask(hf_model, tmp_path / "r", backend="nnsight")
        assert torch.equal(hf_model(short).logits, before)


def test_verify_and_questions_leave_it_too(tmp_path: Path) -> None:
    hf_model = unusual()
    results = ask(hf_model, tmp_path / "r")
    hf_model.model.layers[0].mlp.train()
    before = state(hf_model)
    model = ps.wrap(hf_model, tiny.tokenizer())
    assert ps.verify(results, model=model).holds
    answers_right(model, PAIR)
    assert state(hf_model) == before


def test_in_train_mode_the_model_is_swept_without_dropout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny.WORDS),
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=16,
        initializer_range=0.4,
        resid_pdrop=0.5,
    )
    hf_model = GPT2LMHeadModel(config).double().eval()
    truth = grid(hf_model, hf_model.transformer.h)
    asked = answers_right(ps.wrap(hf_model, None), PAIR)
    hf_model.train()
    for backend in ("wavefront", "nnsight"):
        results = ask(hf_model, tmp_path / backend, backend=backend)
        np.testing.assert_allclose(swept(results), truth, atol=1e-9)
        assert ps.verify(results, model=ps.wrap(hf_model, tiny.tokenizer())).holds
        assert all(module.training for module in hf_model.modules())
    assert {answers_right(ps.wrap(hf_model, None), PAIR) for _ in range(9)} == {asked}


@contextmanager
def no_gradients() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def defaults(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def strict() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SWITCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "set_grad_enabled(False)": no_gradients,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: defaults(torch.float64),
    "default dtype bfloat16": lambda: defaults(torch.bfloat16),
    "default device": elsewhere,
    "a device around": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": strict,
    "two threads": nullcontext,
}


def switches() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
    }


def numbers(results: ps.Results) -> dict[str, np.ndarray[Any, Any]]:
    """Every array of numbers that a sweep has written, but digests: they hang on the last bit."""
    members = zarr.open_group(results.path, mode="r").members(max_depth=None)
    found = {n: np.asarray(a[...]) for n, a in members if isinstance(a, zarr.Array)}
    return {n: a for n, a in found.items() if a.dtype.kind in "fiu" and a.dtype != np.uint64}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What sweeps find where nothing is switched on."""
    out, hf_model = tmp_path_factory.mktemp("usual"), tiny.build().double()
    return {way: numbers(ask(hf_model, out / way, **WAYS[way])) for way in WAYS}


@pytest.mark.parametrize("name", SWITCHES)
def test_whatever_the_caller_has_switched_on(
    name: str, usual: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Cells are those of plain hooks, estimates and edges those of a sweep without it."""
    hf_model = tiny.build().double()
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if name == "two threads" else threads)
    try:
        with warnings.catch_warnings(), SWITCHES[name]():
            warnings.simplefilter("ignore")  # anomaly mode says that it is on
            before = switches()
            found = {way: ask(hf_model, tmp_path / way, **WAYS[way]) for way in WAYS}
            assert switches() == before
    finally:
        torch.set_num_threads(threads)
    truth = grid(hf_model, hf_model.model.layers)
    for way in ("wavefront", "nnsight"):
        np.testing.assert_allclose(swept(found[way]), truth, atol=1e-9)
    for way, results in found.items():
        again = numbers(results)
        assert again.keys() == usual[way].keys()
        for array, content in again.items():
            np.testing.assert_allclose(content, usual[way][array], atol=1e-9, err_msg=array)


def test_a_model_loaded_in_inference_mode(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    with torch.inference_mode():
        model = ps.load_model(str(folder), device="cpu")
        built = tiny.build().requires_grad_(False)
        asked: Any = {"components": ["mlp_out"], "metrics": ["logit_diff"], "estimate": True}
        loaded = ps.sweep(model, [PAIR], out=tmp_path / "loaded", **asked)
        ask(built, tmp_path / "built")
        with pytest.raises(ps.BadInput, match="outside it"):
            ask(built, tmp_path / "edges", edges="eap")
    outside = ps.sweep(model, [PAIR], out=tmp_path / "outside", **asked)
    assert tiny.arrays(loaded.path) == tiny.arrays(outside.path)


def test_wrap_changes_nothing() -> None:
    hf_model = AutoModelForCausalLM.from_config(tiny.build().config).train()
    before = state(hf_model)
    ps.wrap(hf_model, tiny.tokenizer())
    assert state(hf_model) == before
