"""Attribution patching: every cell of a sweep estimated from a few passes, before or instead of
running it.

    estimators.py   which estimator a component has, and what is refused
    runs.py         the runs of a pair as packed tokens, and where positions lie in them
    patterns.py     attention of whole rows in plain terms
    rules.py        RelP's backward
    gradients.py    the passes: activations of both runs, gradients at the destination
    changes.py      what a patch changes: differences of activations, patterns computed again
    estimate.py     estimates as arrays shaped like the exact ones
    sweep.py        the estimates of a sweep, and which cells are run after them
"""

from patchsweep.attribution.estimate import STEPS, Estimates, estimate_pairs
from patchsweep.attribution.estimators import DEFAULT, ESTIMATORS, Estimator, check, chosen, not_on
from patchsweep.attribution.runs import pair_ranges
from patchsweep.attribution.sweep import chosen_cells, expected, write_estimates

__all__ = [
    "DEFAULT",
    "ESTIMATORS",
    "STEPS",
    "Estimates",
    "Estimator",
    "check",
    "chosen",
    "chosen_cells",
    "estimate_pairs",
    "expected",
    "not_on",
    "pair_ranges",
    "write_estimates",
]
