"""The effect of a patch: (patched − destination) / (source − destination)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.sites import Status

Array = NDArray[np.float64]


def change(patched: NDArray[Any], status: NDArray[np.uint8], destination: Array) -> Array:
    """patched − destination; exactly 0 where a cell is structural, whatever wave it was in."""
    moved = patched.astype(np.float64) - destination
    return np.where(status == Status.STRUCTURAL, 0.0, moved)


def known_mean(values: Array, axis: int = 0) -> Array:
    """Mean along an axis of what is there; NaN (not done, or a sample that only another source has)
    is left out, and stays where there is nothing else."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis), known.sum(axis))


def ratio(numerator: Array, denominator: Array) -> Array:
    """Their quotient, NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)
