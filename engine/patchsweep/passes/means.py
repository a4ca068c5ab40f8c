"""Mean activations over prompts: one plain pass up the layers, summed as it goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from patchsweep.passes.forward import Forward
from patchsweep.passes.stream import Tap
from patchsweep.passes.taps import Seen
from patchsweep.passes.wave import Carry
from patchsweep.plan.layout import Layouts
from patchsweep.plan.schedule import Embedding, Step, rows_only
from patchsweep.sae import SAE

TOKENS = 4096  # of prompts that go up together


@torch.no_grad()
def mean_activations(
    forward: Forward,
    layouts: Layouts,
    components: Iterable[str],
    prompts: Sequence[tuple[int, ...]],
    by: str,
    sae: SAE | None,
    carry: Carry,
) -> dict[str, Tensor]:
    """The mean activation of each component, [layer, position or 1, unit, width], in float64.

    by: position (prompts counted from their first token; NaN where no prompt reaches) or all. What
    `carry` does not see has none.
    """
    longest = max(map(len, prompts))
    sums = {
        name: _Sum(layouts, name, longest if by == "position" else 1, sae) for name in components
    }
    batch: list[tuple[int, ...]] = []
    for prompt in (*prompts, None):
        if prompt is None or sum(map(len, batch)) + len(prompt) > TOKENS:
            if batch:
                _add(forward, layouts, sums, batch, carry)
            batch = []
        if prompt is not None:
            batch.append(prompt)
    return {name: total.mean() for name, total in sums.items() if None not in total.total}


class _Sum:
    """The sum of a component's activations over tokens."""

    def __init__(self, layouts: Layouts, name: str, positions: int, sae: SAE | None) -> None:
        self.place, self.sae = layouts.place(name), sae if name == "sae_feature" else None
        self.layers, self.positions = layouts.layers(name), positions
        self.total: list[Tensor | None] = [None] * len(self.layers)
        self.count = torch.zeros(positions, dtype=torch.float64)

    def tap(self, layer: int, position: Tensor) -> Tap:
        """Adds the activations of a layer's tokens [token], which are at `position` [token]."""
        at = position if self.positions > 1 else torch.zeros_like(position)

        def add(x: Tensor) -> None:
            seen = x
            if self.sae is not None:
                seen = self.sae.to(x.device, x.dtype).encode(x.flatten(1))[..., None]
            index, here = layer - self.layers.start, at.to(x.device)
            if self.total[index] is None:
                shape = (self.positions, *seen.shape[1:])
                self.total[index] = torch.zeros(shape, dtype=torch.float64, device=x.device)
            total = self.total[index]
            assert total is not None
            total.index_add_(0, here, seen[: len(here)].double())
            if index == 0:
                self.count += torch.bincount(at.cpu(), minlength=self.positions)

        return add

    def mean(self) -> Tensor:
        # Of layers on several devices: on the first.
        found = [t for t in self.total if t is not None]
        total = torch.stack([t.to(found[0].device) for t in found])
        return total / self.count.to(total.device)[:, None, None]


def _add(
    forward: Forward,
    layouts: Layouts,
    sums: dict[str, _Sum],
    prompts: Sequence[tuple[int, ...]],
    carry: Carry,
) -> None:
    schedule = rows_only(prompts, layouts.dimensions.layers)

    def seen(layer: int, step: Step) -> Seen:
        position = torch.from_numpy(step.positions).to(forward.device)
        taps: dict[str, Tap] = {}
        for total in sums.values():
            at = layer - (total.place == "resid_post")
            if at in total.layers and total.place != "embed":
                previous = taps.get(total.place)
                mine = total.tap(at, position)
                taps[total.place] = mine if previous is None else _both(previous, mine)
        return Seen(taps)

    def embedding(of: Embedding) -> Tap | None:
        position = torch.from_numpy(of.positions).to(forward.device)
        return sums["embed"].tap(0, position) if "embed" in sums else None

    carry(forward, schedule, seen, embedding)


def _both(one: Tap, other: Tap) -> Tap:
    def tap(x: Tensor) -> None:
        one(x)
        other(x)

    return tap
