"""The results of a sweep, opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.results import drawing, heatmaps, table
from patchsweep.results.cells import Cells
from patchsweep.results.diagnosis import Diagnosed
from patchsweep.results.intervals import Intervals
from patchsweep.results.reader import one_of
from patchsweep.store import Check, Store, check, refuse_missing

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Results(Cells, Intervals, Diagnosed):
    """The results of a sweep, read from its `store` (folder, zip file or URL) when asked for.

    What recurs: `component` and `metric` are among `components` and `metrics`; `direction`
    (denoise, noise) and `source` among those of the component's grid, the first if left out;
    `align` and `min_pairs` as in `effect`; `columns`: what `columns` returns; `grid`: what `grid`
    returns. Positions are those of `effect`, `unit` counts heads, neurons or features. Arrays are
    numpy and float64 if nothing else is said; metrics are in their own unit, effects are shares of
    the way to the source run (1: all of it), of a source without a run differences in the metric's
    unit.

    BadInput for names that the results do not have, and for a file that is damaged, once it is
    read.
    """

    def to_xarray(
        self, component: str, by: str | None = None, *, squeeze: bool = False
    ) -> xr.Dataset:
        """One component, opened lazily: nothing but coordinates is read until values are used; with
        dask, where it is installed, chunk by chunk of the store.

        Per metric: `<metric>` (raw, of the patched run), `<metric>_status` and `<metric>_effect`
        (float64), and where the sweep has it `<metric>_estimate` (its attribute `approximation`
        says how), over [direction, source, sample, pair, layer, unit, position]. `unit` is named as
        what it counts (`head`), and missing where a layer has no units; "sets" has the dimension
        `set`, with the sets' names, in place of the last three. The first three are there where
        they have several entries; all others always, or with `squeeze` where they have several.

        Coordinates beside them, but of "sets": `token` (clean/corrupt where the prompts differ) and
        `label` [pair, position], `n_pairs` [position], how many pairs' prompts have it. Attributes
        say what an array is, its `units`, and what statuses mean (`flag_values`, `flag_meanings`).

        `by`: labels, end or start: positions are what they mean (see `columns`) instead of what is
        stored: of a segment the mean over its tokens in each pair, `token` [pair, position] their
        text, `n_pairs` [position] how many pairs have it.
        """
        from patchsweep.results.lazy import dataset  # imports xarray

        return dataset(self, component, by, squeeze)

    def to_frame(self) -> pd.DataFrame:
        """A row per patching experiment; cells not done or outside their prompt are left out.

        Columns: component, direction, source, sample, pair, layer, unit (missing where there is
        none), position (of "sets": the set), token (of the destination run), and per metric its raw
        value, `_effect` and `_status`, and `_estimate` where the sweep has estimates.
        """
        import pandas as pd

        return pd.concat(list(table.frames(self)), ignore_index=True)

    def export(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write `to_frame` to `path` as Parquet, pair by pair: memory does not grow with the
        results. BadInput for a file that is there, without `overwrite`, and for one inside
        results."""
        table.write_parquet(self, Path(path), overwrite=overwrite)

    def plot(
        self,
        component: str | None = None,
        metric: str | None = None,
        direction: str | None = None,
        view: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
        layers: range | None = None,
        ax: Axes | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        vmax: float | None = None,
    ) -> Figure:
        """A heatmap of the effect over all pairs, as a figure of matplotlib (shown by notebooks).

        What is left out is the first there is; `view` is "layer_position" or, for a component of
        several units a layer, "layer_head" (or _kv_head, _neuron, _feature). `align` and
        `min_pairs` as in `effect`. `layers`: only these; if left out, all, the lowest in which
        nothing can differ as one row. `ax`: drawn there; else `figsize`, in inches. `title`:
        instead of one that says what is shown. `vmax`: the effect at the ends of the colours. Dots:
        the 95 % bootstrap interval over pairs excludes 0. BadInput for what the results do not
        have, and without matplotlib.
        """
        drawing.needed()
        from matplotlib import pyplot

        pyplot.install_repl_displayhook()  # else a notebook shows a figure's name only

        component = component or self.components[0]
        metric = metric or self.metrics[0]
        direction = direction or self.grid(component).directions[0]
        _, _, number = self._at(component, metric, direction, source)
        columns = self.columns(component, align)
        effects = self.shown(component, metric, direction, source, align=align, min_pairs=min_pairs)
        pictures = heatmaps.views(self, component, effects, columns)
        found = {picture.view: picture for picture in pictures}
        chosen = found[one_of("view", view or next(iter(found)), tuple(found))]
        whole = layers is None
        chosen = drawing.folded(chosen) if whole else chosen.part(self._rows(component, layers))
        sure = self.sure(component, metric, direction, source, chosen.cells, align)
        return drawing.draw(
            self,
            component,
            metric,
            direction,
            chosen,
            number,
            ax=ax,
            figsize=figsize,
            title=title,
            vmax=vmax,
            sure=sure,
        )

    def _rows(self, component: str, layers: range | None) -> slice:
        """Where some layers are in the arrays; BadInput where they are not."""
        grid = self.grid(component)
        known = range(grid.first_layer, grid.first_layer + grid.layers)
        if not layers or layers.step != 1 or not set(layers) <= set(known):
            said = f"range({known.start}, {known.stop})"
            raise BadInput(f"layers is {layers}: {component} has {said}, give a part of it")
        return slice(layers.start - grid.first_layer, layers.stop - grid.first_layer)

    def check(self) -> Check:
        """Decode every chunk: what is damaged and must be redone."""
        return check(self.path)


def open(path: str | Path) -> Results:
    """The results at `path`: in a folder, in a zip file of one, or at a URL; BadInput if there are
    none, or if chunks that are marked done are missing. Other damage is noticed when it is read, or
    by `check`."""
    store = Store.open(path)
    refuse_missing(store)
    return Results(store)
