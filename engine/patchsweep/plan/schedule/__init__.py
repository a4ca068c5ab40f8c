"""A wave as index arrays: which token goes where in every layer call. Pure, no tensors.

The packed tokens of a layer call are [base rows | patched rows | injected tokens | donors |
climbers]. The base rows are the clean run of every pair and the runs it is set against. Patched
rows are grouped by (pair, direction, first position); the rows of a group share the destination's
prefix. Injected tokens stand for tokens of rows that are born from what comes out of the layer.
Donors are tokens of base rows at another position, for queries and keys that are to be rotated
there. Climbers are what runs of edges begin with (`layout.edges`).

    columns.py the runs and replacements of a wave, in columns
    climb.py   what climbers carry, and what they do in every layer call
    steps.py   the rows and replacements of a wave, and every layer call from the bottom up
    edges.py   the runs of edges, and their climbers
    make.py    a wave laid out so: its base rows, its runs, what they replace, what is embedded
"""

from patchsweep.plan.schedule.climb import Climb
from patchsweep.plan.schedule.columns import Edit, Embedding, Patched, Runs
from patchsweep.plan.schedule.make import NULL, base_only, make_schedule, rows_only
from patchsweep.plan.schedule.steps import RowTokens, Schedule, Step

__all__ = [
    "NULL",
    "Climb",
    "Edit",
    "Embedding",
    "Patched",
    "RowTokens",
    "Runs",
    "Schedule",
    "Step",
    "base_only",
    "make_schedule",
    "rows_only",
]
