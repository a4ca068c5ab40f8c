"""Patched full forwards of a model as its user calls it: the judge, by plain hooks.

What a backend says is held against this: before a sweep (the self-test) and after it (`verify`).
So it shares no code with either backend: it calls `hf_model(input_ids=...)`, passes nothing along,
leaves the model its own attention implementation, and finds activations in a way of its own.

    attention.py   queries, keys, values, patterns and z, where attention takes and returns them
    find.py        the layers, and which modules' outputs are added to the residual stream
    forwards.py    one forward in which activations are replaced and recorded
    judge.py       the judge of a model: plain and patched forwards
    values.py      metrics from logits and activations, in plain terms
    paths.py       edges and paths as two forwards
    cells.py       a cell of results as a prompt and what is replaced in it

Imports device, errors, pairs, passes, plan, sae, sites, spec.
"""

from patchsweep.judge.cells import Cell, Cells, averages, unseen
from patchsweep.judge.forwards import Edit, Prompt, Unseen
from patchsweep.judge.judge import Judge

__all__ = ["Cell", "Cells", "Edit", "Judge", "Prompt", "Unseen", "averages", "unseen"]
