"""Circuits as curves: how much of the behaviour the best k sites carry, for k along a grid.

Two ways (Heimersheim & Nanda 2024, section 4): noise everything outside the best k (are they
enough?), and denoise the best k alone. CPR and CMD are those of MIB (Mueller et al. 2025, arXiv
2504.13151): the area under the faithfulness curve, and the area between it and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.sites import Site
from patchsweep.spec import Circuit, Complement, Sweep

Floats = NDArray[np.float64]
TOP, OUTSIDE = "circuit top ", "circuit outside "
GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # sizes, when none are given


@dataclass(frozen=True)
class Curve:
    """Performance against circuit size. Arrays are [size].

    fraction: share of all sites. faithfulness: with everything outside the best k noised, 0 the
    corrupt run's behaviour, 1 the clean one's; NaN where only denoising was run. recovered: with
    the best k denoised in the corrupt run, on the same scale.
    """

    sizes: tuple[int, ...]
    fraction: Floats
    faithfulness: Floats
    recovered: Floats

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under `faithfulness` over the fraction of sites."""
        return float(np.trapezoid(*self._whole()))

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between `faithfulness` and 1."""
        faithfulness, fraction = self._whole()
        return float(np.trapezoid(np.abs(1 - faithfulness), fraction))

    def _whole(self) -> tuple[Floats, Floats]:
        """The curve from no site to all of them: with none the behaviour is the corrupt run's, with
        all it is the clean one's."""
        faithfulness = np.concatenate([[0.0], self.faithfulness, [1.0]])
        return faithfulness, np.concatenate([[0.0], self.fraction, [1.0]])


def with_circuit(settings: Sweep, ranking: Sequence[Site]) -> Sweep:
    """The settings with the sets of a circuit: for every size the best sites, and all others."""
    circuit = settings.circuit
    if circuit is None:
        return settings
    within = circuit.within or tuple(dict.fromkeys(site.component for site in ranking))
    sets = dict(settings.sets)
    for size in sizes_of(circuit, len(ranking)):
        best = tuple(ranking[:size])
        sets[f"{TOP}{size}"] = best
        sets[f"{OUTSIDE}{size}"] = Complement(within=within, besides=best)
    return settings.model_copy(update={"sets": sets})


def sizes_of(circuit: Circuit, ranked: int) -> tuple[int, ...]:
    """The sizes of a circuit's curve; BadInput if one is larger than the ranking."""
    if circuit.sizes == "auto":
        return (*(k for k in GRID if k < ranked), ranked)
    if max(circuit.sizes) > ranked:
        raise BadInput(
            f"circuit.sizes: {max(circuit.sizes)} is more than the {ranked} sites of the ranking"
        )
    return circuit.sizes


def curve(
    names: Sequence[str], noised: Floats | None, denoised: Floats | None, total: int
) -> Curve:
    """The curve from the effects [set] of all sets, by their names, in the two directions; None for
    one that was not run."""
    where = {name: i for i, name in enumerate(names)}
    sizes = tuple(sorted(int(n.removeprefix(TOP)) for n in names if n.startswith(TOP)))
    if not sizes:
        raise BadInput("these results have no circuit: add circuit: {ranking: [...]} to the spec")
    nothing = np.full(len(sizes), np.nan)
    outside = [where[f"{OUTSIDE}{k}"] for k in sizes]
    top = [where[f"{TOP}{k}"] for k in sizes]
    return Curve(
        sizes=sizes,
        fraction=np.array(sizes) / total,
        faithfulness=nothing if noised is None else 1 - noised[outside],
        recovered=nothing if denoised is None else denoised[top],
    )
