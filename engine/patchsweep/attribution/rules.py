"""RelP's rules: a forward whose backward passes relevance on instead of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from patchsweep.passes import Forward

P = ParamSpec("P")
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
PRODUCTS_IN_PLACE = {"mul_", "__imul__"}
QUOTIENTS = {"div", "__truediv__", "true_divide", "divide"}
POWERS = {"pow", "__pow__", "square"}
# Non-linear functions of one number, through which relevance passes as through f(x)/x · x.
ACTIVATIONS = {"silu", "gelu", "relu", "relu6", "mish", "elu", "selu", "celu", "leaky_relu"}
# What only scales something else: norms' 1/σ, the gates of x·σ(x), routers' and patterns' weights.
SCALES = {"rsqrt", "sigmoid", "tanh", "softmax"}


class Relevance(TorchFunctionMode):
    """While active, what is computed has its value, and the rules of RelP as its gradient.

    After Rezaei Jafari et al. 2025 (arXiv 2508.21258; layer-wise relevance propagation): LN rule,
    a norm's scale, or what something is divided by, is a constant; identity rule, an activation is
    x times the constant f(x)/x; half rule, of a product of two activations each gets half. What a
    model without biases computes is thereby shared out in full. Functions decide, not modules or
    families, so tanh and sigmoid are taken for the factors that they are in GELU and SiLU: an MLP
    whose activation is one of them alone passes nothing on.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        both = len(args) == 2 and all(map(_active, args))
        if both and name in PRODUCTS:
            return _half(*args)
        if both and name in PRODUCTS_IN_PLACE:
            return args[0].copy_(_half(args[0].clone(), args[1]))
        if len(args) == 2 and name in QUOTIENTS and _active(args[1]):
            return func(args[0], args[1].detach(), **kwargs)
        if name in SCALES:
            return func(*args, **kwargs).detach()
        if name in ACTIVATIONS:
            return _secant(func, args, kwargs)
        if name in POWERS:
            return _power(func, *args)
        if name == "layer_norm":
            return _layer_norm(*args, **kwargs)
        if name == "rms_norm":
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _active(x: Any) -> bool:
    """Whether something is an activation, and no weight or constant."""
    return isinstance(x, Tensor) and x.requires_grad


def _half(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.detach() + a.detach() * b) / 2


def _secant(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """x · f(x)/x with the factor held fixed; at 0 the factor is that of the smallest number."""
    kwargs.pop("inplace", None)
    x: Tensor = args[0]
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    away = x.detach().masked_fill(x.detach() == 0, tiny)
    factor = func(away, *args[1:], **kwargs) / away
    return x * factor


def _power(func: Callable[..., Tensor], x: Tensor, exponent: Any = 2) -> Tensor:
    """x^n as a product with x held fixed in all factors but one; x^−½ is a scale."""
    if not isinstance(exponent, int | float):
        return func(x, exponent)
    if exponent < 0:
        return x.pow(exponent).detach()
    return x * x.detach().pow(exponent - 1) if exponent >= 1 else x.pow(exponent)


def _layer_norm(
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    scale = (x.detach().var(dims, keepdim=True, correction=0) + eps).rsqrt()
    return _affine(centred * scale, weight, bias)


def _rms_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    squares = x.detach().square().mean(tuple(range(-len(shape), 0)), keepdim=True)
    scale = (squares + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _affine(x * scale, weight, None)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_the_rules(method: Callable[P, Tensor]) -> Callable[P, Tensor]:
    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with Relevance():
            return method(*args, **kwargs)

    return call


class RelevanceForward(Forward):
    """A model's forward under RelP's rules, from the embedding to the final norm. Logits are linear
    in what follows but for a soft-cap, which belongs to the metric."""

    @classmethod
    def of(cls, forward: Forward) -> RelevanceForward:
        return cls(**{f.name: getattr(forward, f.name) for f in fields(forward)})

    embed = _by_the_rules(Forward.embed)
    layer = _by_the_rules(Forward.layer)
    final_norm = _by_the_rules(Forward.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        with self.unembedding() as (weight, bias):
            normed = self.final_norm(hidden).to(weight.device)
            return self.finish(F.linear(normed, weight, bias))
