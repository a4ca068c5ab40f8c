"""The results of a sweep, opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import xarray as xr

from patchsweep import heatmaps, table
from patchsweep.integrity import Check, check, refuse_missing
from patchsweep.reader import one_of
from patchsweep.results.cells import Cells
from patchsweep.results.diagnosis import Diagnosed
from patchsweep.results.intervals import Intervals
from patchsweep.results.lazy import dataset
from patchsweep.results.together import Together
from patchsweep.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Results(Cells, Intervals, Together, Diagnosed):
    """The results of a sweep, read from its folder when asked for."""

    def to_xarray(self, component: str) -> xr.Dataset:
        """One component, opened lazily: nothing but coordinates is read until values are used; with
        dask, where it is installed, chunk by chunk of the store.

        Per metric: `<metric>` (raw, of the patched run), `<metric>_status` and `<metric>_effect`
        (float64), and where the sweep has it `<metric>_estimate` (its attribute `approximation`
        says how), over [direction, source, sample, pair, layer, unit, position]; of the first four
        and `unit` those of size 1 are squeezed, and `unit` is renamed to what it counts (`head`).
        "sets" has the dimension `set`, with the sets' names, in place of the last three.
        """
        return dataset(self, component)

    def to_frame(self) -> pd.DataFrame:
        """A row per patching experiment; cells not done or outside their prompt are left out.

        Columns: component, direction, source, sample, pair, layer, unit (missing where there is
        none), position (of "sets": the set), token (of the destination run), and per metric its raw
        value, `_effect` and `_status`, and `_estimate` where the sweep has estimates.
        """
        return pd.concat(list(table.frames(self)), ignore_index=True)

    def export(self, path: Path, *, overwrite: bool = False) -> None:
        """Write `to_frame` as Parquet, pair by pair: memory does not grow with the results.
        BadInput for a file that is there, without `overwrite`, and for one inside results."""
        table.write_parquet(self, Path(path), overwrite=overwrite)

    def plot(
        self,
        component: str | None = None,
        metric: str | None = None,
        direction: str | None = None,
        view: str | None = None,
        source: str | None = None,
    ) -> Figure:
        """A heatmap of the effect over all pairs, as a figure of matplotlib (shown by notebooks).

        What is left out is the first there is; `view` is "layer_position" or,
        for a component of several units a layer, "layer_head" (or _kv_head, _neuron, _feature).
        BadInput for what the results do not have, and without matplotlib.
        """
        heatmaps.needed()
        from matplotlib import pyplot

        pyplot.install_repl_displayhook()  # else a notebook shows a figure's name only

        component = component or self.components[0]
        metric = metric or self.metrics[0]
        direction = direction or self.grid(component).directions[0]
        _, _, number = self._at(component, metric, direction, source)
        effect = self.shown_effect(component, metric, direction, source)
        found = {picture.view: picture for picture in heatmaps.views(self, component, effect)}
        chosen = found[one_of("view", view or next(iter(found)), tuple(found))]
        return heatmaps.draw(self, component, metric, direction, chosen, number)

    def check(self) -> Check:
        """Decode every chunk: what is damaged and must be redone."""
        return check(self.path)


def open(path: str | Path) -> Results:
    """The results in a folder, in a zip file of one, or at a URL; BadInput if there are none, or if
    chunks that are marked done are missing. Other damage is noticed when it is read, or by
    `check`."""
    store = Store.open(path)
    refuse_missing(store)
    return Results(store)
