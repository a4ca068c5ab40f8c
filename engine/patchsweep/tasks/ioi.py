"""Indirect object identification (Wang et al., 2022, arXiv:2211.00593), on sentences of our own."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair, encode, make_pair

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
)
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


def ioi(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0, bos: Bos = "auto") -> list[Pair]:
    """`n` distinct pairs; the first ones do not depend on `n`, and the templates take turns.

    Clean "When A and B went to the store, B gave a drink to" is answered by A; the corrupt
    prompt has A in place of the second B, which swaps answer and wrong. Labels IO, S1, S2, END;
    group: the template, e.g. "ABBA-3". Words that are not one token are left out; BadInput if `n`
    pairs cannot be had from the others.
    """
    names = _single(tokenizer, NAMES)
    places = _single(tokenizer, PLACES)
    objects = _single(tokenizer, OBJECTS)
    kinds = [(order, i) for order in ORDERS for i in range(len(TEMPLATES))]
    possible = len(kinds) * len(names) * (len(names) - 1) * len(places) * len(objects)
    if n > possible:
        raise BadInput(
            f"task 'ioi': {n} pairs asked for, {possible} can be had with this tokenizer "
            f"({len(names)} names, {len(places)} places, {len(objects)} objects are one token): "
            "ask for fewer"
        )
    rng = random.Random(seed)
    rng.shuffle(kinds)
    seen = set()
    pairs: list[Pair] = []
    while len(pairs) < n:
        # All kinds hold equally many pairs, so one that takes its turn always has some left.
        order, template = kinds[len(pairs) % len(kinds)]
        io, s = rng.sample(names, 2)
        key = (order, template, io, s, rng.choice(places), rng.choice(objects))
        if key not in seen:
            seen.add(key)
            pairs.append(_pair(tokenizer, *key, bos))
    return pairs


def _pair(
    tokenizer: PreTrainedTokenizerBase,
    order: str,
    template: int,
    io: str,
    s: str,
    place: str,
    thing: str,
    bos: Bos,
) -> Pair:
    a, b = (io, s) if order == "ABBA" else (s, io)
    clean, corrupt = (
        TEMPLATES[template].format(A=a, B=b, S=again, place=place, object=thing)
        for again in (s, io)
    )
    pair = make_pair(
        tokenizer, clean, corrupt, f" {io}", f" {s}", group=f"{order}-{template}", bos=bos
    )
    io_at = [i for i, token in enumerate(pair.clean) if token == pair.answer[0]]
    s_at = [i for i, token in enumerate(pair.clean) if token == pair.wrong[0]]
    swapped = [
        i for i, two in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if len({*two}) > 1
    ]
    if len(io_at) != 1 or len(s_at) != 2 or swapped != s_at[1:]:
        raise BadInput(
            f"task 'ioi': this tokenizer does not keep the names one token each in {clean!r}: "
            "write the pairs to a file instead"
        )
    labels = {"IO": io_at[0], "S1": s_at[0], "S2": s_at[1], "END": len(pair) - 1}
    return Pair(pair.clean, pair.corrupt, pair.answer, pair.wrong, labels, pair.group)


def _single(tokenizer: PreTrainedTokenizerBase, words: str) -> list[str]:
    """The words that are one known token of their own after a space."""
    before = encode(tokenizer, "the", "never")
    unknown = tokenizer.unk_token_id
    found: dict[int, str] = {}
    for word in words.split():
        after = encode(tokenizer, f"the {word}", "never")
        if len(after) == len(before) + 1 and after[:-1] == before and after[-1] != unknown:
            found.setdefault(after[-1], word)
    return list(found.values())
