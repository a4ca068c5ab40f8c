"""The example of Heimersheim & Nanda (2024, arXiv:2404.15255): two words that mean something only
together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.task import following, in_random_order, lay, single, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "the {FIRST} {SECOND}"
WORDS = {"FIRST": "Nobel", "SECOND": "Peace"}
ANSWER, WRONG = "Prize", "Medal"
# Corruption -> the words that it replaces.
CORRUPTIONS = {"both": ("FIRST", "SECOND"), "first": ("FIRST",), "second": ("SECOND",)}
# Words parted by white space.
OTHERS = """
    stones rivers lamps clouds walls shoes doors boats roads birds trees hills ships stars coins
    bells
"""


@task(corruption=tuple(CORRUPTIONS))
def nobel(
    tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos, *, corruption: str
) -> Iterator[Pair]:
    """Clean "the Nobel Peace" is answered by "Prize"; wrong is "Medal".

    corruption: which words are replaced with random ones: both, first or second; the clean prompt
    is always the same. Labels FIRST, SECOND, END. Words that are not one token are left out.
    """
    clean = lay(tokenizer, TEMPLATE, WORDS, bos)
    text = TEMPLATE.format(**WORDS)
    answer, wrong = (following(tokenizer, text, f" {word}") for word in (ANSWER, WRONG))
    if not (clean and clean.whole and len(answer) == len(wrong) == 1):
        return
    replaced = CORRUPTIONS[corruption]
    draws = list(permutations(single(tokenizer, OTHERS), len(replaced)))
    for others in in_random_order(random.Random(seed), draws):
        words = WORDS | dict(zip(replaced, others, strict=True))
        corrupt = lay(tokenizer, TEMPLATE, words, bos)
        if corrupt and clean.fits(corrupt):
            yield Pair(clean.ids, corrupt.ids, answer, wrong, clean.labels)
