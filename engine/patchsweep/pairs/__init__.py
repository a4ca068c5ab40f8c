"""Prompt pairs: tokens, alignment, labels, files.

pair.py        a pair as tokens, checked
alignment.py   which corrupt position stands for each clean one
make.py        texts to tokens, and to a pair
positions.py   the positions of a sweep, over pairs
files.py       pairs from .jsonl and .csv

Imports errors, inputs.
"""

from patchsweep.pairs.files import read_pairs
from patchsweep.pairs.make import Bos, encode, make_pair
from patchsweep.pairs.pair import Pair
from patchsweep.pairs.positions import Positions, resolve_positions

__all__ = ["Bos", "Pair", "Positions", "encode", "make_pair", "read_pairs", "resolve_positions"]
