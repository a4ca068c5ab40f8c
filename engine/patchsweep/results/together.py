"""Sites patched together: windows of layers, and circuits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.results.circuits import OUTSIDE, Curve, curve
from patchsweep.results.effects import Effects
from patchsweep.sites import SETS, WINDOWED, window_name
from patchsweep.statistics import Array


class Together(Effects):
    """What sets of sites have as windows and circuits."""

    def windows(
        self,
        component: str,
        size: int,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> tuple[Array, Array]:
        """Sliding windows of `size` adjacent layers: their joint effect, and the sum of the effects
        of their single layers, [first layer, position] each, positions as in `effect`.

        BadInput if the sweep had no such windows, or not the component on its own.
        """
        columns = self.columns(component, align)
        asked = metric, direction, source, columns, min_pairs
        found = self.window_sets(component, size)
        joint = self.over_pairs(SETS, *asked, found).effect[:, 0]
        single = self.over_pairs(component, *asked).effect[:, 0]
        return joint, np.stack([single[i : i + size].sum(0) for i in range(len(found))])

    def window_sets(self, component: str, size: int) -> NDArray[np.intp]:
        """Which of the sets is the window of `size` layers, [first layer, position]; BadInput if
        the sweep had no such windows, or not the component on its own."""
        grid = self.grid(component)
        where = {name: i for i, name in enumerate(self.grid(SETS).positions)}
        try:
            found = [
                [where[window_name(component, range(i, i + size), p)] for p in grid.positions]
                for i in range(grid.layers - size + 1)
            ]
        except KeyError as error:
            raise BadInput(
                f"no windows of {size} layers of {component} in these results"
            ) from error
        return np.array(found, np.intp)

    def window_sizes(self, component: str) -> tuple[int, ...]:
        """The sizes of the sliding windows of a component, in layers; none for one without."""
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
        effects = {d: self.effect(SETS, metric, d, source).values[0, 0] for d in grid.directions}
        names = [str(name) for name in grid.positions]
        sites = np.bincount(self.store.read(f"{SETS}/site_set"), minlength=len(names))
        number = grid.sources.index(source or grid.sources[0])
        normalised = self.normalised(number)
        return curve(names, effects.get("noise"), effects.get("denoise"), sites, normalised)
