"""Many processes that work on one sweep; what can be seen of them.

distributed.py   how they share it: counters in the launcher's store, no collectives
progress.py      a bar, `progress.json`, and a log of every process

Imports errors, store.
"""

from patchsweep.processes.distributed import Processes, alone, end, launched, restarted, together
from patchsweep.processes.progress import Progress, job, log

__all__ = [
    "Processes",
    "Progress",
    "alone",
    "end",
    "job",
    "launched",
    "log",
    "restarted",
    "together",
]
