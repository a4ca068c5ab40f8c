"""head_z is what attention returns for a head, whatever stands before the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

import patchsweep as ps
import tiny
from hooked import PAIR, logit_diff, swept
from patchsweep.judge import Edit, Judge, Prompt

HEADS, WIDTH, LAYERS = 4, 8, 3
ROUNDING = 1e-5  # gates and experts compute in float32 inside; logits reach 10
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Whose norm, or gate, stands between attention and the output projection.
KINDS: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "afmoe": {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 4, **EXPERTS},
    "laguna": {"shared_expert_intermediate_size": 16, **EXPERTS},
    "step3p7": {},
    "llama": {},  # nothing does
}


def step3p7(**sizes: Any) -> PreTrainedModel:
    """It comes with a tower for pictures."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model(
        "step3p7", text_config={**sizes, "sliding_window": 4}, vision_config=vision
    )
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "step3p7":
        hf_model = step3p7(**SIZES)
    else:
        config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
        given = {"experts_implementation": "eager"} if "num_experts" in KINDS[kind] else {}
        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **given)
    return hf_model.double().eval().requires_grad_(False)


# Of a layer's call of attention: what stands in the place of z [1, position, head, width].
Changed = Callable[[int, Tensor], Tensor]


@contextmanager
def attending(change: Changed) -> Iterator[None]:
    """Inside, torch's attention returns what is made of it; calls are counted from 0."""
    registry = AttentionInterface()
    own, calls = registry["sdpa"], iter(range(1000))

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        z, *rest = own(module, *args, **kwargs)
        return (change(next(calls), z), *rest)

    AttentionInterface.register("sdpa", attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", own)


def grid(hf_model: PreTrainedModel) -> NDArray[np.float64]:
    """logit_diff [layer, head, position] of the corrupt run in which z of one head is, at one
    position, that of the clean run: one full forward for every cell."""
    clean: list[Tensor] = []

    def keep(_: int, z: Tensor) -> Tensor:
        clean.append(z.clone())
        return z

    with attending(keep):
        logit_diff(hf_model, PAIR.clean)
    found = np.zeros((LAYERS, HEADS, len(PAIR)))
    for layer, head, at in np.ndindex(found.shape):

        def patch(call: int, z: Tensor, where: tuple[int, int, int] = (layer, head, at)) -> Tensor:
            if call != where[0]:
                return z
            z = z.clone()
            z[:, where[2], where[1]] = clean[where[0]][:, where[2], where[1]]
            return z

        with attending(patch):
            found[layer, head, at] = logit_diff(hf_model, PAIR.corrupt)
    return found


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_backends(kind: str, backend: str, tmp_path: Path) -> None:
    hf_model = build(kind)
    expected = grid(hf_model)
    assert expected.std() > 1e-2
    results = ps.sweep(
        ps.wrap(hf_model, tiny.tokenizer()),
        [PAIR],
        components=["head_z", "head_v"],
        metrics=["logit_diff"],
        direction="denoise",
        backend=backend,
        out=tmp_path / "r",
    )
    np.testing.assert_allclose(swept(results, "head_z"), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge(kind: str) -> None:
    hf_model = build(kind)
    judge, expected = Judge(hf_model, PAIR.clean, LAYERS), grid(hf_model)
    for layer in range(LAYERS):
        _, seen = judge.run([Prompt(PAIR.clean)], record=[("head_z", layer)])
        for head, at in np.ndindex(HEADS, len(PAIR)):
            value = seen["head_z", layer][0, at, head]
            edit = Edit("head_z", layer, torch.tensor([head]), torch.tensor([at]), value[None])
            logits, _ = judge.run([Prompt(PAIR.corrupt)], [[edit]])
            x = logits[0, -1].double()
            found = float(x[PAIR.answer[0]] - x[PAIR.wrong[0]])
            assert found == pytest.approx(expected[layer, head, at], abs=ROUNDING)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    hf_model = build("afmoe")
    before = {name: dict(vars(module)) for name, module in hf_model.named_modules()}
    ps.sweep(
        ps.wrap(hf_model, tiny.tokenizer()),
        [PAIR],
        components=["head_z"],
        backend="nnsight",
        out=tmp_path / "r",
    )
    for name, module in hf_model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert vars(module).get("forward") is before[name].get("forward")


def test_where_attention_cannot_be_reached(tmp_path: Path) -> None:
    """Its forward is a function that calls another: nnsight sees no call of attention in it."""
    hf_model = build("afmoe")
    for layer in hf_model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
    given: dict[str, Any] = {"components": ["head_z"], "metrics": ["logit_diff"]}
    with pytest.raises(ps.BadInput, match="head_z cannot be patched through nnsight") as error:
        ps.sweep(
            ps.wrap(hf_model, tiny.tokenizer()),
            [PAIR],
            backend="nnsight",
            out=tmp_path / "r",
            **given,
        )
    assert "\n" not in str(error.value)
