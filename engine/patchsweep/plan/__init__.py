"""From cells to runs, blocks and waves, with their cost: pure, no tensors.

A *run* is one patched forward, carried from its layer and first position on; a *block* is a part
of a component's grid (`sites.Grid`), a chunk of the results one block or several; a *wave* is a set
of blocks of neighbouring pairs and the same source that goes up the layers together; a *unit* is
the waves that settle whole chunks. The plan is a function of the pairs, the model's dimensions
and the token budget; where only chosen cells are run, of these as well.

    dimensions.py  what a plan has to know of a model: numbers
    sources.py     where patched-in values come from
    reads.py       where metrics are read
    cone.py        which cells can differ from the baseline at all
    edges.py       who writes to the residual stream, who reads it further on
    layout/        which runs a sweep has
    context.py     how many keys queries read
    costs.py       what runs take
    edge_costs.py  what runs of edges take
    waves.py       blocks, and waves of them, under the budget
    halves.py      a wave that does not fit the memory, in parts
    chunks.py      how many blocks a chunk holds
    plan.py        the plan and its totals
    schedule/      a wave as index arrays

Imports errors, inputs, pairs, sae, sites, spec.
"""

from patchsweep.plan.context import total_context
from patchsweep.plan.costs import (
    Choice,
    Chosen,
    Ints,
    entries_of,
    null_start,
    variants,
)
from patchsweep.plan.dimensions import WHOLE, Dimensions, Offload, Sizes, uneven
from patchsweep.plan.edges import receivers, senders, upstream
from patchsweep.plan.plan import Plan, make_plan, narrowed
from patchsweep.plan.reads import TAIL_ELEMENTS, TAIL_TILE, Inner, whole_vocabulary
from patchsweep.plan.sources import Kind, Source
from patchsweep.plan.waves import SCORES_ELEMENTS, BudgetTooSmall, Cut, Wave

__all__ = [
    "SCORES_ELEMENTS",
    "TAIL_ELEMENTS",
    "TAIL_TILE",
    "WHOLE",
    "BudgetTooSmall",
    "Choice",
    "Chosen",
    "Cut",
    "Dimensions",
    "Inner",
    "Ints",
    "Kind",
    "Offload",
    "Plan",
    "Sizes",
    "Source",
    "Wave",
    "entries_of",
    "make_plan",
    "narrowed",
    "null_start",
    "receivers",
    "senders",
    "total_context",
    "uneven",
    "upstream",
    "variants",
    "whole_vocabulary",
]
