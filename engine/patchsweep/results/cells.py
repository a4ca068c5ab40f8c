"""The cells of largest effect, and those that stand out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.results.columns import Columns, Map
from patchsweep.results.effects import OverPairs
from patchsweep.results.estimates import Estimates
from patchsweep.results.reader import one_of
from patchsweep.sites import SETS, unit_name
from patchsweep.statistics import beyond_sd

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CellEffect:
    """A cell of one component, metric and direction, over all pairs: its `layer`, its `unit` (0
    where there is one a layer) and its `effect`.

    `position`: an index, a label or a segment (`Effects.columns`). `token` is the text there where
    all pairs have the same one ("clean/corrupt" if the two runs differ), else empty. `patched` is
    the mean of the patched run's metric; `pairs` is how many have a value.
    """

    layer: int
    unit: int
    position: int | str
    token: str
    patched: float
    effect: float
    pairs: int


class Cells(Estimates):
    """Single cells by the size of their effect."""

    def top(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        n: int = 10,
        source: str | None = None,
        *,
        by: str = "cell",
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> pd.DataFrame:
        """The `n` cells of largest absolute effect, largest first; of a component that was only
        estimated by that estimate, `patched` being NaN. by="head" (or neuron, feature, layer; what
        the component has): of each only the position of largest effect.

        Columns: layer, the unit's name (such as head) where there is one, position (of "sets": set,
        and no layer), token, patched (mean of the patched run's metric), effect, n_pairs. `align`
        and `min_pairs` as in `effect`.
        """
        found = self.largest(
            component, metric, direction, n, source, by=by, align=align, min_pairs=min_pairs
        )
        return self._table(component, found)

    def largest(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        n: int = 10,
        source: str | None = None,
        *,
        by: str = "cell",
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> list[CellEffect]:
        """What `top` returns, the `n` largest, cell by cell: without pandas, whose import takes
        a while."""
        columns = self.columns(component, align)
        found = self.shown(component, metric, direction, source, align=align, min_pairs=min_pairs)
        keep = np.isfinite(found.effect)
        if by != "cell":
            one_of("by", by, ("cell", unit_name(component) or "layer"))
            size = np.where(keep, np.abs(found.effect), -1)
            keep &= np.arange(size.shape[2]) == size.argmax(2)[..., None]
        return self._ranked(component, columns, found, keep, n)

    def detections(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        sd: float = 2.0,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> pd.DataFrame:
        """The cells whose effect lies more than `sd` standard deviations from the mean effect, with
        the columns of `top`.

        Mean and (population) standard deviation are over all finite cells, layer × unit × position.
        The rule is that of Zhang & Nanda, arXiv 2309.16042. Largest absolute effect first.
        """
        found = self.detected(
            component, metric, direction, sd, source, align=align, min_pairs=min_pairs
        )
        return self._table(component, found)

    def detected(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        sd: float = 2.0,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> list[CellEffect]:
        """What `detections` returns, those beyond `sd`, cell by cell."""
        columns = self.columns(component, align)
        found = self.over_pairs(component, metric, direction, source, columns, min_pairs)
        return self._ranked(component, columns, found, beyond_sd(found.effect, sd))

    def top_sites(
        self, component: str, metric: str, direction: str, n: int, min_pairs: int | None = None
    ) -> list[CellEffect]:
        """The `n` cells of largest absolute effect that are one position in every pair: those that
        can be patched again as a site."""
        columns = self.columns(component)
        found = self.shown(component, metric, direction, min_pairs=min_pairs)
        keep = np.isfinite(found.effect) & columns.single
        return self._ranked(component, columns, found, keep, n)

    def _ranked(
        self, component: str, columns: Columns, found: OverPairs, keep: Map, n: int | None = None
    ) -> list[CellEffect]:
        tokens = self.column_tokens(component, columns)
        cells = np.argwhere(keep)
        order = np.argsort(-np.abs(found.effect[keep]), kind="stable")[:n]
        return [
            CellEffect(
                layer=int(layer) + self.grid(component).first_layer,
                unit=int(unit),
                position=columns.names[column],
                token=tokens[column],
                patched=float(found.patched[layer, unit, column]),
                effect=float(found.effect[layer, unit, column]),
                pairs=int(found.pairs[layer, unit, column]),
            )
            for layer, unit, column in cells[order]
        ]

    def _table(self, component: str, cells: list[CellEffect]) -> pd.DataFrame:
        import pandas as pd

        unit = unit_name(component)
        names = {"unit": unit, "pairs": "n_pairs"}
        gone = [] if unit else ["unit"]
        if component == SETS:
            names["position"], gone = "set", ["layer", "unit", "token"]
        frame = pd.DataFrame([asdict(c) for c in cells], columns=list(CellEffect.__annotations__))
        return frame.drop(columns=gone).rename(columns=names)
