"""Attribution patching: every cell of a sweep estimated from a few passes, before or instead of
running it.

    estimators.py   which estimator a component has, and what is refused
    runs.py         the runs of a pair as packed tokens, and where positions lie in them
    patterns.py     attention of whole rows in plain terms
    rules.py        RelP's backward
    gradients.py    the passes: activations of both runs, gradients at the destination
    changes.py      what a patch changes: differences of activations, patterns computed again
    estimate.py     estimates as arrays shaped like the exact ones
    ends.py         what heads write to the residual stream, gradients as each receiver reads it
    eap.py          scores of all edges
    sweep.py        the estimates and edges of a sweep, and which cells are run after them

Imports device, errors, passes, plan, prefilter, processes, results, sae, sites, spec, store.
"""

from patchsweep.attribution.eap import score_edges
from patchsweep.attribution.estimate import STEPS, Estimates, estimate_pairs
from patchsweep.attribution.estimators import (
    DEFAULT,
    ESTIMATORS,
    Estimator,
    check,
    check_backend,
    check_edges,
    check_weights,
    chosen,
    chosen_with_edges,
    scored,
)
from patchsweep.attribution.runs import pair_ranges
from patchsweep.attribution.sweep import (
    chosen_cells,
    chosen_columns,
    expected,
    tried,
    write_edges,
    write_estimates,
)

__all__ = [
    "DEFAULT",
    "ESTIMATORS",
    "STEPS",
    "Estimates",
    "Estimator",
    "check",
    "check_backend",
    "check_edges",
    "check_weights",
    "chosen",
    "chosen_cells",
    "chosen_columns",
    "chosen_with_edges",
    "estimate_pairs",
    "expected",
    "pair_ranges",
    "score_edges",
    "scored",
    "tried",
    "write_edges",
    "write_estimates",
]
