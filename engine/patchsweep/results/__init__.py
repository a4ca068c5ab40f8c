"""Results as arrays and tables: the effect of every patch is computed on reading.

effect = (patched − destination) / (source − destination). The destination run is the one that is
patched (corrupt for `denoise`, clean for `noise`), the source run is the donor. 0: nothing changed;
1: the source's behaviour; in both directions. Across pairs it is the ratio of means, never the mean
of ratios. Raw metrics stay raw.

    reader.py     what a results folder says: its parts, baselines, tokens
    columns.py    what positions mean over pairs
    effects.py    effects over pairs, changes of every pair
    estimates.py  estimated effects, their agreement and audit
    edges.py      edges, scored or run
    cells.py      cells by the size of their effect
    intervals.py  bootstrap, p-values, standard errors
    circuits.py   the curve of the best k sites
    together.py   windows and circuits
    diagnosis.py  warnings
    heatmaps.py   what pictures show
    drawing.py    how one is drawn
    lazy.py       xarray datasets
    table.py      a row per patching experiment
    results.py    all of these as one class

Imports errors, prefilter, sites, spec, statistics, store.
"""

from patchsweep.results import drawing, heatmaps
from patchsweep.results.cells import CellEffect
from patchsweep.results.circuits import Curve, with_circuit
from patchsweep.results.columns import Columns, columns_of
from patchsweep.results.effects import layer_parts
from patchsweep.results.estimates import UNSIGNED
from patchsweep.results.heatmaps import LONGEST_NAME, counted
from patchsweep.results.reader import one_of_each
from patchsweep.results.results import Results, open
from patchsweep.results.table import csv_text, no_formula

__all__ = [
    "LONGEST_NAME",
    "UNSIGNED",
    "CellEffect",
    "Columns",
    "Curve",
    "Results",
    "columns_of",
    "counted",
    "csv_text",
    "drawing",
    "heatmaps",
    "layer_parts",
    "no_formula",
    "one_of_each",
    "open",
    "with_circuit",
]
