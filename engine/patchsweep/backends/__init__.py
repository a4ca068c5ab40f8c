"""Wavefront or nnsight: which way runs are computed, and the trust in it.

choice.py          the wavefront where it is exact, nnsight elsewhere
selftest.py        what a backend computes, against the judge, before a sweep
probe.py           the prompts and cells that a self-test looks at
interventions.py   the nnsight backend: patched runs as full forwards
stacked.py         a wave as batches of full forwards
modules.py         which module of a layer holds which activation

Imports device, errors, judge, model, pairs, passes, plan, processes, sae, sites, spec.
"""

from patchsweep.backends.choice import Backend, opened, taken

__all__ = ["Backend", "opened", "taken"]
