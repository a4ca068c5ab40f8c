"""Which cells can differ from the baseline at all: the two maps over (layer, position).

A place *differs* if the source's activation there can differ from the destination's, and *matters*
if it can still influence what is read. Both follow from the tokens and the attention windows alone.
Where either is false a cell equals the baseline by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.bool_]


@dataclass(frozen=True)
class Cone:
    """The maps of one run, [layer, position]; differs_pre has a further layer for the output."""

    differs_pre: Map
    differs_attention: Map
    matters_pre: Map
    matters_keys: Map
    matters_post: Map

    def exists(self, component: str) -> Map:
        """[layer, position]: where patching `component` can change what is read."""
        match component:
            case "embed":
                return self.differs_pre[:1] & self.matters_pre[:1]
            case "resid_pre":
                return self.differs_pre[:-1] & self.matters_pre
            case "head_k" | "head_v":
                return self.differs_pre[:-1] & self.matters_keys
            case "head_q":
                return self.differs_pre[:-1] & self.matters_post
            case "head_pattern" | "head_z" | "attn_out":
                return self.differs_attention & self.matters_post
        # resid_mid, mlp_out, neuron, resid_post: all computed from the stream after attention
        return self.differs_pre[1:] & self.matters_post


def cone(differs: Map, windows: tuple[int | None, ...], reads: Map, inner: Map) -> Cone:
    """The maps of a run whose embeddings differ from the source's where `differs` [position] says.

    Logits are read where `reads` [position] says, activations inside where `inner` [layer,
    position] does.
    """
    layers, length = len(windows), differs.shape[0]
    pre = np.zeros((layers + 1, length), bool)
    attention = np.zeros((layers, length), bool)
    pre[0] = differs
    for layer, window in enumerate(windows):
        attention[layer] = reach(pre[layer], window)
        pre[layer + 1] = pre[layer] | attention[layer]
    post, keys, matters = (np.zeros((layers, length), bool) for _ in range(3))
    needed = reads
    for layer in reversed(range(layers)):
        post[layer] = needed = needed | inner[layer]
        keys[layer] = reach(needed[::-1], windows[layer])[::-1]
        matters[layer] = needed = needed | keys[layer]
    return Cone(pre, attention, matters, keys, post)


def reach(marked: Map, window: int | None) -> Map:
    """[position]: which positions see a marked one at or before them, within `window`."""
    seen = np.cumsum(marked)
    if window is None or window >= marked.shape[0]:
        return seen > 0
    before = np.concatenate([np.zeros(window, seen.dtype), seen[:-window]])
    return seen > before
