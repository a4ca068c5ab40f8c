"""Results as arrays and tables, with the effect of every patch computed on reading.

effect = (patched − destination) / (source − destination). The destination run is the one that is
patched (corrupt for `denoise`, clean for `noise`), the source run is the donor. 0: nothing changed;
1: the source's behaviour; in both directions. Across pairs it is the ratio of means, never the mean
of ratios. Raw metrics stay raw.

    columns.py    what positions mean over pairs
    effects.py    effects over pairs, changes of every pair
    estimates.py  estimated effects, their agreement and audit, edges
    cells.py      cells by the size of their effect
    intervals.py  bootstrap, p-values, standard errors
    together.py   windows and circuits
    diagnosis.py  warnings
    heatmaps.py   what pictures show
    drawing.py    how one is drawn
    lazy.py       xarray datasets
    results.py    all of these as one class
"""

from patchsweep.results.cells import CellEffect
from patchsweep.results.columns import Columns
from patchsweep.results.effects import layer_parts
from patchsweep.results.estimates import UNSIGNED
from patchsweep.results.results import Results, open

__all__ = ["UNSIGNED", "CellEffect", "Columns", "Results", "layer_parts", "open"]
