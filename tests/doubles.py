"""Doubles of a real tiny model, not what they seem in one place, and what is true of them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oracle.families import FAMILIES, Family
from patchsweep.pairs import Pair

LAYERS = 3


def build(name: str = "llama", **config: Any) -> PreTrainedModel:
    return FAMILIES[name].build(LAYERS, seed=1, **config)


class _Changed(nn.Module):
    """A module whose output is changed by what a function makes of it and of its input."""

    def __init__(self, own: nn.Module, change: Any) -> None:
        super().__init__()
        self.own, self.change = own, change

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.own(x, *args, **kwargs), x)


def another_tail() -> PreTrainedModel:
    """Its logits take something of what the first layer returns."""
    model, kept = build(), []
    model.model.layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
    model.model.norm = _Changed(model.model.norm, lambda out, _: out + 0.1 * kept[-1])
    return model


def own_head() -> PreTrainedModel:
    """The unembedding adds what its weight does not say."""
    model = build()
    model.lm_head.forward = lambda x: (
        nn.functional.linear(x, model.lm_head.weight) + x[..., :1] ** 2
    )
    return model


def own_last_logit() -> PreTrainedModel:
    """Of one token alone the unembedding does not say the logit."""
    model = build()
    own = model.lm_head.forward
    last = torch.arange(model.config.vocab_size) == model.config.vocab_size - 1
    model.lm_head.forward = lambda x: own(x) + last * x[..., :1] ** 2
    return model


def window_of_one_head(size: int) -> PreTrainedModel:
    """Queries see so many keys, but in the first layer those of the last key-value head all."""
    model = build()
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    wide = torch.arange(config.num_attention_heads) >= config.num_attention_heads - group
    for index, layer in enumerate(model.model.layers):

        def forward(
            hidden: Tensor,
            own: Any = layer.forward,
            free: Tensor = wide & (index == 0),
            **kwargs: Any,
        ) -> Any:
            seen = torch.ones((hidden.shape[1],) * 2, dtype=torch.bool).tril()
            mask = torch.where(free[:, None, None], seen, seen & ~seen.tril(-size))
            return own(hidden, **(kwargs | {"attention_mask": mask[None]}))

        layer.forward = forward
    return model


def own_positions() -> PreTrainedModel:
    """It counts positions from 3, unless it is told them."""
    model = build("gpt2")
    own = model.forward

    def forward(input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is None:
            position_ids = 3 + torch.arange(input_ids.shape[1])[None]
        return own(input_ids=input_ids, position_ids=position_ids, **kwargs)

    model.forward = forward
    return model


def scaled_for(share: float) -> PreTrainedModel:
    """Its last layer's attention is off by a share where the implementation is not its own."""
    model = build()
    attention = model.model.layers[-1].self_attn

    def change(_: nn.Module, __: Any, out: tuple[Tensor, Any]) -> Any:
        own = model.config._attn_implementation == "sdpa"
        return out if own else (out[0] * (1 + share), out[1])

    attention.register_forward_hook(change)
    return model


def two_ways() -> PreTrainedModel:
    """Its attention sees one token ahead where the implementation is its own."""
    model = build()
    own = model.model.layers[1].forward

    def forward(hidden: Tensor, **kwargs: Any) -> Any:
        if model.config._attn_implementation == "sdpa":
            length = hidden.shape[1]
            ahead = torch.ones(length, length, dtype=torch.bool).tril(1)
            kwargs["attention_mask"] = ahead[None, None]
        return own(hidden, **kwargs)

    model.model.layers[1].forward = forward
    return model


def hidden_key() -> PreTrainedModel:
    """In one layer the first key is hidden from all later queries."""
    model = build()
    own = model.model.layers[1].forward

    def forward(hidden: Tensor, **kwargs: Any) -> Any:
        length = hidden.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[1:, 0] = False
        return own(hidden, **(kwargs | {"attention_mask": seen[None, None]}))

    model.model.layers[1].forward = forward
    return model


def mixing_mlp(share: float) -> PreTrainedModel:
    """The last layer's MLP looks at the token before."""
    model = build()
    layer = model.model.layers[-1]

    def mix(out: Tensor, _: Tensor) -> Tensor:
        return out + share * nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]

    layer.mlp = _Changed(layer.mlp, mix)
    return model


def another_k_proj() -> PreTrainedModel:
    """What is called k_proj and comes last makes the values."""
    model = build()
    for layer in model.model.layers:
        layer.self_attn.v_proj = nn.Sequential(OrderedDict(k_proj=layer.self_attn.v_proj))
    return model


def short_prompts() -> PreTrainedModel:
    """It computes other things where few tokens come at a time."""
    model = build()
    embedding = model.model.embed_tokens
    embedding.register_forward_hook(lambda _, __, out: out * (1.1 if out.shape[1] <= 6 else 1))
    return model


def resid_post(
    model: PreTrainedModel, pair: Pair, family: Family = FAMILIES["llama"]
) -> np.ndarray:
    """logit_diff [layer, position] of the corrupt run with the residual stream after a layer from
    the clean run at one position: one hooked forward per cell, called as a user calls it."""

    def value(tokens: tuple[int, ...]) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        return float(logits[list(pair.answer)].mean() - logits[list(pair.wrong)].mean())

    out = np.zeros((LAYERS, len(pair.clean)))
    for number in range(LAYERS):
        layer, kept = model.get_submodule(family.layer.format(number)), []
        hook = layer.register_forward_hook(lambda _, __, x, kept=kept: kept.append(x))
        value(pair.clean)
        hook.remove()
        clean = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        for at in range(len(pair.clean)):

            def patch(_: Any, __: Any, x: Any, at: int = at, clean: Tensor = clean) -> Any:
                new = (x[0] if isinstance(x, tuple) else x).clone()
                new[:, at] = clean[:, at]
                return (new, *x[1:]) if isinstance(x, tuple) else new

            hook = layer.register_forward_hook(patch)
            out[number, at] = value(pair.corrupt)
            hook.remove()
    return out
