"""The cells of largest effect, and those that stand out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.effect import Array
from patchsweep.results.estimates import Estimates
from patchsweep.statistics import beyond_sd


@dataclass(frozen=True)
class CellEffect:
    """A cell of one component, metric and direction, over all pairs.

    `token` is the text at the position where all pairs have the same one ("clean/corrupt" if the
    two runs differ), else empty. `patched` is the mean of the patched run's metric.
    """

    layer: int
    unit: int
    position: int | str
    token: str
    patched: float
    effect: float


class Cells(Estimates):
    """Single cells by the size of their effect."""

    def top(
        self,
        component: str,
        metric: str,
        direction: str,
        n: int = 10,
        source: str | None = None,
    ) -> list[CellEffect]:
        """The `n` cells of largest absolute effect, largest first; of a component that was only
        estimated by that estimate, `patched` being NaN."""
        patched, effect = self._over_pairs(component, metric, direction, source)
        if component in self.only_estimated:
            effect = self.estimated_effect(component, metric, direction, source)
        return self._ranked(component, patched, effect, np.isfinite(effect), n)

    def detections(
        self,
        component: str,
        metric: str,
        direction: str,
        sd: float = 2.0,
        source: str | None = None,
    ) -> list[CellEffect]:
        """The cells whose effect lies more than `sd` standard deviations from the mean effect.

        Mean and (population) standard deviation are over all finite cells, layer × unit × position.
        The rule is that of Zhang & Nanda, arXiv 2309.16042. Largest absolute effect first.
        """
        patched, effect = self._over_pairs(component, metric, direction, source)
        far = beyond_sd(effect, sd)
        return self._ranked(component, patched, effect, far)

    def _ranked(
        self,
        component: str,
        patched: Array,
        effect: Array,
        keep: NDArray[np.bool_],
        n: int | None = None,
    ) -> list[CellEffect]:
        positions, tokens = self.grid(component).positions, self.position_tokens(component)
        cells = np.argwhere(keep)
        order = np.argsort(-np.abs(effect[keep]), kind="stable")[:n]
        return [
            CellEffect(
                layer=int(layer) + self.grid(component).first_layer,
                unit=int(unit),
                position=positions[position],
                token=tokens[position],
                patched=float(patched[layer, unit, position]),
                effect=float(effect[layer, unit, position]),
            )
            for layer, unit, position in cells[order]
        ]
