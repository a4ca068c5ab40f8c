"""The main loop and its stages: from settings to results on disk.

loop.py           plan, self-test, then wave after wave into the results
planning.py       the plan, under a budget that fits the device
prompts.py        the pairs of a spec; those that the model answers right
prepare.py        what sources and metrics need beside the waves, made and checked
doubts.py         what a reader should know of what the sweep was given
output.py         where results go: what is there already, gone on with, created
append.py         further pairs or metrics for results that are there
provenance.py     where results come from, and whether a sweep may go on with them
splitting.py      waves that do not fit the memory, in parts
assembly.py       blocks of waves put together into chunks
joint.py          the cells of largest effect, patched together
verification.py   some cells again, by the judge

Imports attribution, backends, device, errors, inputs, judge, model, pairs, passes, plan, processes,
results, sae, sites, spec, store, tasks.
"""

from patchsweep.engine.loop import carry_out, run, sweep
from patchsweep.engine.planning import plan_spec
from patchsweep.engine.prompts import answers_right, build_pairs
from patchsweep.engine.verification import verify

__all__ = ["answers_right", "build_pairs", "carry_out", "plan_spec", "run", "sweep", "verify"]
