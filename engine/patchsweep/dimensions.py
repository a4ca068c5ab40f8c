"""What a plan has to know of a model: numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Offload:
    """Weights that are kept off the device that computes, in bytes: moved to it in every wave, each
    module's once; the most that are there at one time, of two layers where they come ahead."""

    moved: int = 0
    held: int = 0


WHOLE = Offload()  # every weight is there


@dataclass(frozen=True)
class Dimensions:
    """What a plan has to know of a model.

    `windows` has one entry per layer, None where attention sees everything; `layer_weights` counts
    the weights that multiply one token in one layer (of experts, those that are active); `widest`
    is the width of the largest activation inside a layer; `d_head` is that of z.
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
    neurons: int | None = None  # in the MLP of a layer; None where it has experts

    @property
    def bytes_per_token(self) -> int:
        """Upper bound of what one packed token holds while a layer computes."""
        attention = (3 * self.heads + 4 * self.kv_heads) * self.d_head
        values = 10 * self.d_model + 4 * self.widest + 2 * attention
        return values * max(4, self.bytes_per_value)
