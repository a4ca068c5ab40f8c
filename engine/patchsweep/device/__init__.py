"""Memory, transfers, and arithmetic that repeats: the same numbers twice.

memory.py      calls that may run out of memory
transfer.py    arrays to a device and back, without waiting
offload.py     weights that accelerate keeps off the device
prefetch.py    those weights, brought in one layer ahead
exactness.py   what a computation needs to be repeatable, and what is as it was after it

Imports errors.
"""

from patchsweep.device.exactness import exactly
from patchsweep.device.memory import MEND, OutOfMemory, enough_memory, out_of_memory, within_memory
from patchsweep.device.offload import (
    device_of,
    hook_of,
    offloaded,
    replaced,
    state,
    unreachable,
    weights_of,
)
from patchsweep.device.prefetch import Prefetch, worthwhile
from patchsweep.device.transfer import Arriving, aside, to_device, to_host

__all__ = [
    "MEND",
    "Arriving",
    "OutOfMemory",
    "Prefetch",
    "aside",
    "device_of",
    "enough_memory",
    "exactly",
    "hook_of",
    "offloaded",
    "out_of_memory",
    "replaced",
    "state",
    "to_device",
    "to_host",
    "unreachable",
    "weights_of",
    "within_memory",
    "worthwhile",
]
