"""The first pass of an edge: one token that goes up the layers with what its sender changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsweep.device import to_device
from patchsweep.passes.stream import Tap
from patchsweep.passes.taps import in_turn
from patchsweep.plan.schedule import Climb


@dataclass(frozen=True)
class Climbing:
    """The climbers of a wave: what each adds to the residual stream, [climber, d_model]."""

    changes: Tensor

    def enter(self, climb: Climb, hidden: Tensor) -> None:
        """Add the changes to what a layer call receives, [token, d_model], where they belong."""
        if "resid_pre" in climb.sent:
            self._measured(climb, "resid_pre")(hidden[:, None])
        by, lifted = to_device(climb.by, hidden.device), to_device(climb.lifted, hidden.device)
        hidden[lifted] += self.changes[by].to(hidden.device)

    def watched(self, climb: Climb, taps: Mapping[str, Tap]) -> dict[str, Tap]:
        """These taps, and those that measure what is sent inside the layer."""
        out = dict(taps)
        for place in climb.sent.keys() - {"resid_pre"}:
            measured = self._measured(climb, place)
            out[place] = in_turn([out[place], measured]) if place in out else measured
        return out

    def _measured(self, climb: Climb, place: str) -> Tap:
        """The tap that measures what is sent at a place, where it is added to the stream."""
        climber, sent, own = climb.sent[place]

        def tap(x: Tensor) -> None:
            new, after, before = (to_device(i, x.device) for i in (climber, sent, own))
            change = x[after, 0] - x[before, 0]
            self.changes[new.to(self.changes.device)] += change.to(self.changes.device)

        return tap


def climbing(count: int, hidden: Tensor) -> Climbing:
    """So many climbers in a stream like `hidden`, before any of them has begun."""
    return Climbing(torch.zeros(count, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device))
