"""What a user gives: how it is said, and how large it may be; else one line.

paths.py     paths, made usable; how they are written down
limits.py    sizes: of files, lists, texts, names
devices.py   devices, and the memory on them

Imports errors.
"""

from patchsweep.inputs.devices import DEVICES, check_placement, memory_limits
from patchsweep.inputs.limits import (
    BLOCKS,
    DEPTH,
    ENTRIES,
    LARGEST,
    PAIRS,
    PAIRS_BYTES,
    RUNS,
    SAMPLES,
    SPEC_BYTES,
    TEXT,
    TOO_DEEP,
    check_data,
    check_name,
)
from patchsweep.inputs.paths import SECRETS, by_name, found, home, short, shortened, usable

__all__ = [
    "BLOCKS",
    "DEPTH",
    "DEVICES",
    "ENTRIES",
    "LARGEST",
    "PAIRS",
    "PAIRS_BYTES",
    "RUNS",
    "SAMPLES",
    "SECRETS",
    "SPEC_BYTES",
    "TEXT",
    "TOO_DEEP",
    "by_name",
    "check_data",
    "check_name",
    "check_placement",
    "found",
    "home",
    "memory_limits",
    "short",
    "shortened",
    "usable",
]
