"""Which cells can differ from the baseline at all: the two maps over (layer, position).

A place *differs* if the source's activation there can differ from the destination's, and *matters*
if it can still influence the logits that are read. Both follow from the tokens and the attention
windows alone. Where either is false a cell equals the baseline by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.bool_]


@dataclass(frozen=True)
class Cone:
    """The maps of one pair, [layer, position]; `pre` maps have a further layer for the output."""

    differs_pre: Map
    differs_attention: Map
    matters_pre: Map
    matters_post: Map

    def exists(self, component: str) -> Map:
        """[layer, position]: where patching `component` can change what is read."""
        if component == "resid_pre":
            return self.differs_pre[:-1] & self.matters_pre
        if component in ("head_z", "attn_out"):
            return self.differs_attention & self.matters_post
        # resid_mid, mlp_out, resid_post: all computed from the stream after attention
        return self.differs_pre[1:] & self.matters_post


def cone(differs: Map, windows: tuple[int | None, ...], read: int) -> Cone:
    """The maps of a pair whose tokens differ where `differs` [position] says, read at `read`."""
    layers, length = len(windows), differs.shape[0]
    pre = np.zeros((layers + 1, length), bool)
    attention = np.zeros((layers, length), bool)
    pre[0] = differs
    for layer, window in enumerate(windows):
        attention[layer] = reach(pre[layer], window)
        pre[layer + 1] = pre[layer] | attention[layer]
    matters_post = np.zeros((layers, length), bool)
    matters_pre = np.zeros((layers, length), bool)
    needed = np.arange(length) == read
    for layer in reversed(range(layers)):
        matters_post[layer] = needed
        needed = needed | reach(needed[::-1], windows[layer])[::-1]
        matters_pre[layer] = needed
    return Cone(pre, attention, matters_pre, matters_post)


def reach(marked: Map, window: int | None) -> Map:
    """[position]: which positions see a marked one at or before them, within `window`."""
    seen = np.cumsum(marked)
    if window is None or window >= marked.shape[0]:
        return seen > 0
    before = np.concatenate([np.zeros(window, seen.dtype), seen[:-window]])
    return seen > before
