"""Which cells are run after all have been estimated; what a sample says of the others. Pure.

choice.py   which are kept, which are drawn; the verdict once both have been run
audit.py    strata, draws, and the bound on how many of the others may matter

Imports sites, spec, statistics.
"""

from patchsweep.prefilter.choice import Bytes, Choice, Map, Verdict, choose, judge

__all__ = ["Bytes", "Choice", "Map", "Verdict", "choose", "judge"]
