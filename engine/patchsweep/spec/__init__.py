"""The sweep as data: validated, saved with the results.

data.py     names with options, lists, and what is wrong with them in one line
metric.py   the metrics and their options
source.py   the corrupt run, and where patched values come from
prompts.py  where the prompt pairs come from
sets.py     sets of sites, circuits, the autoencoder
estimates.py  what is estimated, and what is run after all
positions.py  which positions
edges.py    how edges are scored, or that they are run
paths.py    paths, as path patching follows them
sweep.py    a sweep; with its model and its prompts, a spec
files.py    a spec from a file, with overrides

Imports errors, inputs, pairs, sites, store, tasks.
"""

from patchsweep.spec.edges import Edges
from patchsweep.spec.estimates import Prefilter
from patchsweep.spec.files import load_spec
from patchsweep.spec.metric import INNER, METRICS, REQUIRED, Metric, Place, parse_metric
from patchsweep.spec.paths import PatchedPath
from patchsweep.spec.prompts import Prompts
from patchsweep.spec.sets import Circuit, Complement
from patchsweep.spec.source import Gaussian, Mean, Resample, Vector
from patchsweep.spec.sweep import Dtype, Spec, Sweep, parse_settings, parse_spec

__all__ = [
    "INNER",
    "METRICS",
    "REQUIRED",
    "Circuit",
    "Complement",
    "Dtype",
    "Edges",
    "Gaussian",
    "Mean",
    "Metric",
    "PatchedPath",
    "Place",
    "Prefilter",
    "Prompts",
    "Resample",
    "Spec",
    "Sweep",
    "Vector",
    "load_spec",
    "parse_metric",
    "parse_settings",
    "parse_spec",
]
