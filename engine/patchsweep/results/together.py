"""Sites patched together: windows of layers, and circuits."""

from __future__ import annotations

import numpy as np

from patchsweep.circuits import OUTSIDE, Curve, curve
from patchsweep.effect import Array
from patchsweep.errors import BadInput
from patchsweep.results.effects import Effects
from patchsweep.sites import SETS, WINDOWED, window_name


class Together(Effects):
    """What sets of sites have as windows and circuits."""

    def windows(
        self, component: str, size: int, metric: str, direction: str, source: str | None = None
    ) -> tuple[Array, Array]:
        """Sliding windows of `size` adjacent layers: their joint effect, and the sum of the effects
        of their single layers, [first layer, position] each. `source`: the first if left out.

        BadInput if the sweep had no such windows, or not the component on its own.
        """
        grid, sets = self.grid(component), self.grid(SETS)
        joint = self.effect(SETS, metric, direction, source)[0, 0]
        single = self.effect(component, metric, direction, source)[:, 0]
        where = {name: i for i, name in enumerate(sets.positions)}
        firsts = range(grid.layers - size + 1)
        try:
            found = [
                [where[window_name(component, range(i, i + size), p)] for p in grid.positions]
                for i in firsts
            ]
        except KeyError as error:
            raise BadInput(
                f"no windows of {size} layers of {component} in these results"
            ) from error
        total = np.stack([single[i : i + size].sum(0) for i in firsts])
        return joint[np.array(found)], total

    def window_sizes(self, component: str) -> tuple[int, ...]:
        """The sizes of the sliding windows of a component, in layers."""
        sizes: list[int] = self.attrs["spec"].get("windows", [])
        return tuple(sizes) if component in WINDOWED and SETS in self.store.grids else ()

    @property
    def has_circuit(self) -> bool:
        """Whether the sweep measured a circuit's curve."""
        sets = self.store.grids.get(SETS)
        return sets is not None and f"{OUTSIDE}0" in sets.positions

    def circuit(self, metric: str, source: str | None = None) -> Curve:
        """Performance against circuit size; BadInput if the sweep had no circuit."""
        grid = self.grid(SETS)
        effects = {d: self.effect(SETS, metric, d, source)[0, 0] for d in grid.directions}
        names = [str(name) for name in grid.positions]
        sites = np.bincount(self.store.read(f"{SETS}/site_set"), minlength=len(names))
        number = grid.sources.index(source or grid.sources[0])
        normalised = self.normalised(number)
        return curve(names, effects.get("noise"), effects.get("denoise"), sites, normalised)
