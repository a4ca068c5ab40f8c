"""Both ends of edges and paths: where what is sent can differ, and where what is read matters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patchsweep.plan.cone import Map, cone
from patchsweep.plan.layout.columns import CODES, Frame, Ints

# What a receiver's input is seen in, and so what is overwritten.
SEEN_IN = {"mlp_in": "mlp_out", "logits": "resid_post"}


@dataclass(frozen=True, eq=False)
class Ends:
    """What ends of paths do in one pair and variant, by clean position.

    position [clean position]: the destination's; known: whether both runs have it; differs [sender,
    clean position]; matters [receiver, clean position].
    """

    position: Ints
    known: Map
    differs: Map
    matters: Map


def ends(
    frame: Frame,
    windows: tuple[int | None, ...],
    senders: tuple[Ints, Ints],
    receivers: tuple[Ints, Ints],
) -> Ends:
    """Those of senders and receivers by component (of what is overwritten) and layer."""
    maps = cone(frame.differs, windows, frame.reads, frame.inner)
    known = (frame.to_dst >= 0) & (frame.to_src >= 0)
    position = np.where(known, frame.to_dst, 0)
    component, layer = senders
    differs = np.where(
        (component == CODES["head_z"])[:, None],
        maps.differs_attention[layer],
        maps.differs_pre[np.where(component == CODES["embed"], 0, layer + 1)],
    )
    component, layer = receivers
    matters = maps.matters_post[layer]
    of_keys = np.isin(component, (CODES["head_k"], CODES["head_v"]))
    matters[of_keys] = maps.matters_keys[layer[of_keys]]
    of_stream = component == CODES["resid_pre"]
    matters[of_stream] = maps.matters_pre[layer[of_stream]]
    matters[component == CODES["resid_post"]] = frame.reads
    return Ends(position, known, differs[:, position] & known, matters[:, position])
