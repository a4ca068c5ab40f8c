"""What a plan has to know of a model: numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchsweep.errors import BadInput


@dataclass(frozen=True)
class Offload:
    """Weights that are kept off the device that computes, in bytes: those `moved` to it in every
    wave, each module's once; the most that are `held` there at one time, of two layers where they
    come ahead."""

    moved: int = 0
    held: int = 0


WHOLE = Offload()  # every weight is there


@dataclass(frozen=True)
class Sizes:
    """How large one layer is: heads and key-value heads, 0 without attention; the widths of queries
    and keys, and of values and z; neurons of the MLP, None where it has experts."""

    heads: int
    kv_heads: int
    d_qk: int
    d_head: int
    neurons: int | None


# What the sizes of a layer count.
COUNTED = {
    "heads": "{} heads",
    "kv_heads": "{} key-value heads",
    "d_qk": "queries and keys of width {}",
    "d_head": "values and z of width {}",
    "neurons": "{} neurons",
}


@dataclass(frozen=True)
class Dimensions:
    """What a plan has to know of a model: how many `layers`, `heads`, `kv_heads` (physical ones),
    `neurons` of an MLP (None where it has experts) and words in `vocab` there are; the width
    `d_model` of the residual stream; `bytes_per_value`, and `max_positions` of a table of
    positions.

    `windows` has one entry per layer, None where attention sees everything; `layer_weights` counts
    the weights that multiply one token in one layer (of experts, those that are active); `widest`
    is the width of the largest activation inside a layer; `d_qk` is the width of queries and keys,
    `d_head` that of values and z. Of sizes in which layers differ these are the largest, and
    `uneven` says by name how they do. `parallel` are the layers whose MLP reads what their
    attention reads.
    """

    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_head: int
    vocab: int
    windows: tuple[int | None, ...]
    layer_weights: int
    widest: int
    bytes_per_value: int
    max_positions: int | None
    neurons: int | None = None
    d_qk: int = 0
    uneven: tuple[tuple[str, str], ...] = ()
    parallel: tuple[int, ...] = ()

    def check_even(self, what: str, *names: str) -> None:
        """BadInput, saying `what` is not possible, if layers differ in a size of these `names`."""
        for name, how in self.uneven:
            if name in names:
                raise BadInput(f"{what} in this model: {how}")

    @property
    def bytes_per_token(self) -> int:
        """Upper bound of what one packed token holds while a layer computes."""
        attention = (3 * self.heads + 4 * self.kv_heads) * max(self.d_qk, self.d_head)
        values = 10 * self.d_model + 4 * self.widest + 2 * attention
        return values * max(4, self.bytes_per_value)


def uneven(layers: Sequence[Sizes]) -> tuple[tuple[str, str], ...]:
    """In which sizes layers differ, and how: the first layer and the first that differs from it."""
    found = []
    for name, counted in COUNTED.items():
        sizes = [getattr(layer, name) for layer in layers]
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            said = [f"layer {i} {_has(counted, sizes[i])}" for i in (0, other)]
            found.append((name, ", ".join(said)))
    return tuple(found)


def _has(counted: str, size: int | None) -> str:
    return f"has {counted.format(size)}" if size else "shows no attention"
