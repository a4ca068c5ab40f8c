"""How many keys queries read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def total_context(length: int, window: int | None) -> Ints:
    """[position]: keys that the queries before a position read together."""
    context = np.minimum(np.arange(1, length + 1), window or length)
    return np.concatenate([[0], np.cumsum(context)])
