"""What numbers over pairs say. Plain numpy and scipy.

effect.py        the effect of a patch: (patched − destination) / (source − destination)
uncertainty.py   intervals, p-values, the 2-SD rule, agreement of estimates
diagnostics.py   what to be told before believing results

Imports errors, sites.
"""

from patchsweep.statistics import diagnostics
from patchsweep.statistics.effect import Array, change, known_mean, ratio
from patchsweep.statistics.uncertainty import (
    Agreement,
    adjusted,
    agreement,
    beyond_sd,
    bootstrap,
    p_values,
    standard_error,
)

__all__ = [
    "Agreement",
    "Array",
    "adjusted",
    "agreement",
    "beyond_sd",
    "bootstrap",
    "change",
    "diagnostics",
    "known_mean",
    "p_values",
    "ratio",
    "standard_error",
]
