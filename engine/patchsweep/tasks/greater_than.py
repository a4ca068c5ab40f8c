"""Greater-than (Hanna et al., 2023, arXiv:2305.00586): the end of a span comes after its start."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.task import following, in_random_order, lay, single, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "The {NOUN} lasted from the year {XX}{YY} to the year {XX2}"
CENTURIES = range(11, 18)
YEARS = range(2, 99)  # so that two-digit years lie on both sides
START = "01"  # what the corrupt prompt has in place of YY: nearly every year comes after it
# Words parted by white space.
NOUNS = """
    war siege conflict campaign expedition voyage journey dynasty empire reign rule alliance truce
    treaty peace crisis famine plague drought recession boom depression reform revolution rebellion
    revolt uprising dispute debate trial investigation project program construction restoration
    renovation partnership marriage engagement friendship rivalry tradition festival exhibition
    tour season tournament career strike boycott blockade occupation invasion migration settlement
    colony trade contract lease loan study experiment survey era period movement regime
"""


@task(wrong=("up_to", "below"))
def greater_than(
    tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos, *, wrong: str
) -> Iterator[Pair]:
    """Clean "The war lasted from the year 1732 to the year 17"; the corrupt prompt starts in 1701.

    answer: the two-digit years above 32; wrong: those up to it (Hanna et al.), or those below it
    (Zhang & Nanda 2023, App. E); any metric over sets reads them.
    Where every digit is a token, the answer is read at the tens: digits that make every such year
    come after 32, against those that make none (of 32: 4 to 9 against 0 to 2).
    Labels NOUN, XX, YY, XX2, END (of digits XX_1, XX_2 ...); group: the noun.
    """
    nouns = single(tokenizer, NOUNS)
    years = _years(tokenizer, own=wrong == "up_to")
    draws = list(product(nouns, years))
    for noun, (century, year) in in_random_order(random.Random(seed), draws):
        words = {"NOUN": noun, "XX": f"{century}", "XX2": f"{century}"}
        clean, corrupt = (
            lay(tokenizer, TEMPLATE, words | {"YY": yy}, bos) for yy in (f"{year:02}", START)
        )
        if clean and corrupt and clean.fits(corrupt):
            yield Pair(clean.ids, corrupt.ids, *years[century, year], clean.labels, noun)


def _years(
    tokenizer: PreTrainedTokenizerBase, own: bool
) -> dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]]:
    """(century, year) -> the tokens of the answers and of the wrongs; own: the year itself may be
    one of these."""
    ends = {
        (century, year): following(tokenizer, f"the year {century}", f"{year:02}")
        for century in CENTURIES
        for year in range(100)
    }
    for width, span in ((1, 1), (2, 10)):  # the token read is a year, or the tens of ten years
        tokens = {y // span * span: t[0] for (_, y), t in ends.items() if len(t) == width}
        sides = {
            (century, year): (
                tuple(token for first, token in tokens.items() if first > year),
                tuple(token for first, token in tokens.items() if first + span - own <= year),
            )
            for century, year in product(CENTURIES, YEARS)
            if len(ends[century, year]) == len(ends[century, int(START)]) == width
        }
        if sides := {which: both for which, both in sides.items() if all(both)}:
            return sides
    raise BadInput(
        "task 'greater_than': this tokenizer splits years neither into century and year nor into "
        "digits: take a model with another tokenizer, or write the pairs to a file"
    )
