"""Indirect object identification (Wang et al., 2022, arXiv:2211.00593), on sentences of our own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.task import lay, single, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# {A} and {B}: the two people in the order of their first mention; {S}: the one named again.
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "While {A} and {B} were walking through the {place}, {S} handed a {object} to",
    "After {A} and {B} had met at the {place}, {S} offered a {object} to",
    "Yesterday {A} and {B} came back from the {place}, and {S} passed a {object} to",
    "Last week {A} and {B} stopped by the {place}, where {S} sold a {object} to",
    "As soon as {A} and {B} got to the {place}, {S} threw a {object} to",
    "Because {A} and {B} worked together at the {place}, {S} lent a {object} to",
    "In the evening {A} and {B} sat down in the {place}. Then {S} showed a {object} to",
    "Once {A} and {B} were inside the {place}, {S} wanted to give a {object} to",
    "Before {A} and {B} could leave the {place}, {S} brought a {object} to",
    "Although {A} and {B} were late for the {place}, {S} still carried a {object} to",
    "On Sunday {A} and {B} cleaned the {place} together. Later {S} sent a {object} to",
    "Every time {A} and {B} visit the {place}, {S} takes a {object} to",
    "It was quiet when {A} and {B} found the {place}, so {S} slowly gave a {object} to",
    "Since {A} and {B} both liked the {place}, {S} bought a {object} for",
    "Soon after {A} and {B} reached the {place}, {S} returned a {object} to",
    "This morning {A} and {B} waited outside the {place} until {S} gave a {object} to",
    "People saw {A} and {B} leave the {place} together, and then {S} handed a {object} to",
    "Whenever {A} and {B} meet near the {place}, {S} brings a {object} for",
    "Years ago {A} and {B} lived beside the {place}, and {S} often lent a {object} to",
    "Though {A} and {B} had argued at the {place}, {S} later mailed a {object} to",
    "Right before {A} and {B} entered the {place}, {S} tossed a {object} to",
    "At noon {A} and {B} ate lunch behind the {place}, where {S} offered a {object} to",
    "The day {A} and {B} moved into the {place}, {S} presented a {object} to",
)
OLDEST = 14  # come first, so that small samples stay what they were when there were no others
ORDERS = ("ABBA", "BABA")  # who is named first: the indirect object, or the subject

# Words parted by white space.
NAMES = """
    John Mary James Robert Michael William David Richard Joseph Thomas Charles Daniel
    Matthew Anthony Mark Paul Steven Andrew Kenneth George Kevin Brian Edward Jason
    Jeffrey Ryan Jacob Gary Eric Stephen Jonathan Larry Justin Scott Frank Brandon
    Benjamin Samuel Gregory Patrick Alexander Jack Dennis Jerry Tyler Aaron Henry
    Douglas Peter Adam Nathan Walter Kyle Carl Arthur Roger Keith Sean Alan Simon
    Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Nancy Lisa
    Margaret Sandra Ashley Kimberly Emily Donna Michelle Carol Amanda Melissa
    Stephanie Rebecca Laura Sharon Cynthia Kathleen Amy Angela Anna Ruth Nicole
    Katherine Christine Helen Rachel Maria Heather Diane Julie Victoria Kelly
    Christina Joan Evelyn Judith Andrea Hannah Jane Martha Alice Julia Sara Anne
"""
PLACES = """
    store garden school park office library market station restaurant hospital church museum
    house farm theater kitchen hotel beach castle studio
"""
OBJECTS = """
    drink book ring ball bag bottle box card cup gift hat key letter map pen phone picture
    ticket watch coat flower lamp
"""

# Corruption -> the names that it replaces.
CORRUPTIONS = {"s2": ("S2",), "s1_io": ("S1", "IO"), "abc": ("S1", "IO", "S2")}


@task(corruption=tuple(CORRUPTIONS), templates=("all", "abba", "baba"))
def ioi(
    tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos, *, corruption: str, templates: str
) -> Iterator[Pair]:
    """Clean "When A and B went to the store, B gave a drink to" is answered by A; wrong is B.

    corruption: s2 (A in place of the second B: swaps answer and wrong), s1_io (random names in
    place of the first B and of A), abc (three different random names); the clean prompts are the
    same for all. templates: abba (A is named first), baba, all; they take turns. Labels IO, S1, S2,
    END; group: the template, e.g. "ABBA-3". Words that are not one token are left out.
    """
    names = single(tokenizer, NAMES)
    replaced = CORRUPTIONS[corruption]
    others = random.Random(f"{seed} others")
    for order, i, words in _draws(tokenizer, seed, list(names), templates):
        io, s = words["IO"], words["S1"]
        new = [io]
        if corruption != "s2":
            free = [name for name in names if name not in (io, s)]
            if len(free) < len(replaced):
                return
            new = others.sample(free, len(replaced))
        first, second = ("IO", "S1") if order == "ABBA" else ("S1", "IO")
        template = TEMPLATES[i].format(
            A=f"{{{first}}}", B=f"{{{second}}}", S="{S2}", place="{place}", object="{object}"
        )
        clean, corrupt = (
            lay(tokenizer, template, words | changed, bos)
            for changed in ({}, dict(zip(replaced, new, strict=True)))
        )
        if not (clean and corrupt and clean.whole and clean.fits(corrupt)):
            raise BadInput(
                "task 'ioi': this tokenizer does not keep the names one token each in "
                f"{template.format(**words)!r}: write the pairs to a file instead"
            )
        group = f"{order}-{i}"
        yield Pair(clean.ids, corrupt.ids, (names[io],), (names[s],), clean.labels, group)


def _draws(
    tokenizer: PreTrainedTokenizerBase, seed: int, names: list[str], templates: str
) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Distinct (order, template, words of the clean prompt)."""
    places, objects = (list(single(tokenizer, words)) for words in (PLACES, OBJECTS))
    orders = ORDERS if templates == "all" else (templates.upper(),)
    rng = random.Random(seed)
    kinds = [(order, i) for order in orders for i in range(OLDEST)]
    rng.shuffle(kinds)
    kinds += [(order, i) for i in range(OLDEST, len(TEMPLATES)) for order in orders]
    possible = len(kinds) * len(names) * (len(names) - 1) * len(places) * len(objects)
    seen: set[tuple[str, int, str, str, str, str]] = set()
    while len(seen) < possible:
        # All kinds hold equally many draws, so one that takes its turn always has some left.
        order, i = kinds[len(seen) % len(kinds)]
        io, s = rng.sample(names, 2)
        place, thing = rng.choice(places), rng.choice(objects)
        if (draw := (order, i, io, s, place, thing)) not in seen:
            seen.add(draw)
            yield order, i, {"IO": io, "S1": s, "S2": s, "place": place, "object": thing}
