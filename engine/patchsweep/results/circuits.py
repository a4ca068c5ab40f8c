"""Circuits as curves: how much of the behaviour the best k sites carry, for k along a grid.

Two ways (Heimersheim & Nanda 2024, section 4): noise everything outside the best k (are they
enough?), and denoise the best k alone. CPR and CMD are those of MIB (Mueller et al. 2025, arXiv
2504.13151): the area under the faithfulness curve, and the area between it and 1; here over what
was measured, from no site at all (everything noised) to the largest size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.sites import Site

if TYPE_CHECKING:
    from patchsweep.spec import Circuit, Sweep

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TOP, OUTSIDE = "circuit top ", "circuit outside "
GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # sizes, when none are given


@dataclass(frozen=True)
class Curve:
    """Performance against circuit size: with the best k sites, k in `sizes`. Arrays are [size].

    fraction: share of the sites of the components `within`, a whole head (or other unit) being as
    many as the sweep has positions. faithfulness: with everything outside the best k noised, 0 the
    corrupt run's behaviour (of a source without a run that of everything patched), 1 the clean
    one's; NaN where only denoising was run; `empty`: the same with everything noised. recovered:
    with the best k denoised in the corrupt run, on the same scale.
    """

    sizes: tuple[int, ...]
    fraction: Floats
    faithfulness: Floats
    recovered: Floats
    empty: float

    @property
    def span(self) -> float:
        """The largest fraction that was measured: `cpr` and `cmd` are over those from 0 to it. They
        are MIB's where it is 1."""
        return float(self.fraction[-1])

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under `faithfulness` over the fraction of sites, up
        to `span`."""
        return self._area(self._faithfulness)

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between `faithfulness` and 1, up to `span`."""
        return self._area(np.abs(1 - self._faithfulness))

    @property
    def areas(self) -> str:
        """Both in words, with their span where it is not the whole."""
        part = "" if self.span == 1 else f", over the first {self.span:.1%} of the sites"
        return f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}{part}"

    @property
    def _faithfulness(self) -> Floats:
        return np.concatenate([[self.empty], self.faithfulness])

    def _area(self, values: Floats) -> float:
        return float(np.trapezoid(values, np.concatenate([[0.0], self.fraction])))


def with_circuit(settings: Sweep, ranking: Sequence[Site]) -> Sweep:
    """The settings with the sets of a circuit: for every size the best sites, and all others; and
    all sites there are."""
    from patchsweep.spec import Complement  # imports pydantic

    circuit = settings.circuit
    if circuit is None:
        return settings
    within = circuit.within or tuple(dict.fromkeys(site.component for site in ranking))
    sets = dict(settings.sets)
    sets[f"{OUTSIDE}0"] = Complement(within=within, besides=())
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
    names: Sequence[str],
    noised: Floats | None,
    denoised: Floats | None,
    sites: Ints,
    normalised: bool = True,
) -> Curve:
    """The curve from the effects [set] of all sets, by their names, in the two directions, None for
    one that was not run; and from how many sites each has [set]. Effects that are not `normalised`
    are differences from the clean run, and shares of that of everything."""
    where = {name: i for i, name in enumerate(names)}
    sizes = tuple(sorted(int(n.removeprefix(TOP)) for n in names if n.startswith(TOP)))
    every = where.get(f"{OUTSIDE}0")
    if not sizes or every is None:
        raise BadInput("these results have no circuit: add circuit: {ranking: [...]} to the spec")
    nothing = np.full(len(names), np.nan)
    outside = [where[f"{OUTSIDE}{k}"] for k in sizes]
    top = [where[f"{TOP}{k}"] for k in sizes]
    noised = nothing if noised is None else noised
    faithfulness = 1 - (noised if normalised else noised / noised[every])
    return Curve(
        sizes=sizes,
        fraction=1 - sites[outside] / sites[every],
        faithfulness=faithfulness[outside],
        recovered=(nothing if denoised is None else denoised)[top],
        empty=float(faithfulness[every]),
    )
