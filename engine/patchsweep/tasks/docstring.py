"""Python docstrings (Heimersheim & Janiak, 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer"), of functions of our own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.task import lay, single, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = '''def {function}(self, {one}, {two}, {A_def}, {B_def}, {C_def}, {last}):
    """{noun1} {noun2} {noun3}

    :param {A_doc}: {noun4} {noun5}
    :param {B_doc}: {noun6} {noun7}
    :param'''
# Corruption -> the arguments that it replaces with random ones.
CORRUPTIONS = {
    "c_def": ("C_def",),
    "def": ("A_def", "B_def"),
    "doc": ("A_doc", "B_doc"),
    "c_def_doc": ("C_def", "A_doc", "B_doc"),
    "def_doc": ("A_def", "B_def", "A_doc", "B_doc"),
}
IDENTIFIERS = ("function", "one", "two", "A_def", "B_def", "C_def", "last")
NOUNS = 7
# Words parted by white space.
ARGUMENTS = """
    path name file data text key value index size type mode user host port client server request
    response message token code status state config option result error log level model table
    column row query field record item list map node tree graph edge parent child root source
    target input output image color shape width height length start stop step limit count total
    date time event action task group project version
"""
DESCRIPTIONS = """
    water house city river market garden music window paper school money sugar ocean winter summer
    weather morning evening doctor teacher student family story letter picture kitchen mountain
    forest island bridge station village church hospital army nation law history science art sport
    food bread coffee salt iron gold silver stone wood glass cotton horse bird fish leaf flower
"""


@task(corruption=tuple(CORRUPTIONS))
def docstring(
    tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos, *, corruption: str
) -> Iterator[Pair]:
    """Clean: def f(self, .., .., A, B, C, ..), then a docstring with :param A:, :param B: and
    :param, which is answered by C; wrong: all other arguments that either prompt names.

    corruption: which arguments are replaced with random ones: c_def (C in the definition), def (A
    and B in it), doc (A and B in the docstring), c_def_doc, def_doc; the clean prompts are the same
    for all. Labels A_def, B_def, C_def, A_doc, B_doc, END. Words that are not one token are left
    out.
    """
    arguments, nouns = single(tokenizer, ARGUMENTS), list(single(tokenizer, DESCRIPTIONS))
    replaced = CORRUPTIONS[corruption]
    if len(arguments) < len(IDENTIFIERS) + len(replaced) or len(nouns) < NOUNS:
        return
    rng, others = random.Random(seed), random.Random(f"{seed} others")
    seen = set()
    while True:
        said = dict(zip(IDENTIFIERS, rng.sample(list(arguments), len(IDENTIFIERS)), strict=True))
        said |= {f"noun{i}": n for i, n in enumerate(rng.sample(nouns, NOUNS), start=1)}
        if (draw := tuple(said.values())) in seen:
            continue
        seen.add(draw)
        said |= {"A_doc": said["A_def"], "B_doc": said["B_def"]}
        free = [name for name in arguments if name not in said.values()]
        new = dict(zip(replaced, others.sample(free, len(replaced)), strict=True))
        clean, corrupt = (lay(tokenizer, TEMPLATE, said | more, bos) for more in ({}, new))
        if not (clean and corrupt and clean.whole and clean.fits(corrupt)):
            raise BadInput(
                "task 'docstring': this tokenizer does not keep the arguments one token each: "
                "write the pairs to a file instead"
            )
        answer = said["C_def"]
        named = [said[name] for name in IDENTIFIERS[1:]] + [*new.values()]
        wrong = tuple(arguments[name] for name in named if name != answer)
        yield Pair(clean.ids, corrupt.ids, (arguments[answer],), wrong, clean.labels)
