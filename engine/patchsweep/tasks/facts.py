"""Statements of common knowledge that end before a one-word object, paired within a relation."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations, zip_longest
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair, encode, make_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# relation -> (text up to the subject, text after it, "subject: object" ...)
RELATIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "city": (
        "The city that is home to",
        " is",
        (
            " the Eiffel Tower: Paris",
            " the Louvre: Paris",
            " Notre-Dame: Paris",
            " the Colosseum: Rome",
            " the Pantheon: Rome",
            " the Trevi Fountain: Rome",
            " Big Ben: London",
            " the British Museum: London",
            " Buckingham Palace: London",
            " Tower Bridge: London",
            " the Brandenburg Gate: Berlin",
            " the Reichstag: Berlin",
            " the Kremlin: Moscow",
            " Red Square: Moscow",
            " the Bolshoi Theatre: Moscow",
            " the Prado Museum: Madrid",
            " the Sagrada Familia: Barcelona",
            " the Acropolis: Athens",
            " the Parthenon: Athens",
            " the Forbidden City: Beijing",
            " the Hagia Sophia: Istanbul",
            " the Blue Mosque: Istanbul",
            " the Space Needle: Seattle",
            " the Willis Tower: Chicago",
            " the Fushimi Inari Shrine: Kyoto",
        ),
    ),
    "capital": (
        "The capital of",
        " is",
        (
            " France: Paris",
            " Italy: Rome",
            " Germany: Berlin",
            " Spain: Madrid",
            " Japan: Tokyo",
            " China: Beijing",
            " Russia: Moscow",
            " Greece: Athens",
            " Egypt: Cairo",
            " England: London",
            " Austria: Vienna",
            " Ireland: Dublin",
            " Portugal: Lisbon",
            " Poland: Warsaw",
            " Sweden: Stockholm",
            " Cuba: Havana",
            " Kenya: Nairobi",
            " Iraq: Baghdad",
            " Iran: Tehran",
            " Hungary: Budapest",
            " Belgium: Brussels",
        ),
    ),
    "language": (
        "The main language spoken in",
        " is",
        (
            " France: French",
            " Germany: German",
            " Austria: German",
            " Italy: Italian",
            " Spain: Spanish",
            " Mexico: Spanish",
            " Argentina: Spanish",
            " Brazil: Portuguese",
            " Portugal: Portuguese",
            " Japan: Japanese",
            " Russia: Russian",
            " Egypt: Arabic",
            " Iraq: Arabic",
            " Greece: Greek",
            " Australia: English",
            " Poland: Polish",
            " Sweden: Swedish",
            " Turkey: Turkish",
        ),
    ),
    "continent": (
        "The country of",
        " is in",
        (
            " France: Europe",
            " Germany: Europe",
            " Poland: Europe",
            " Norway: Europe",
            " Kenya: Africa",
            " Nigeria: Africa",
            " Ghana: Africa",
            " Ethiopia: Africa",
            " China: Asia",
            " Japan: Asia",
            " India: Asia",
            " Vietnam: Asia",
            " Thailand: Asia",
        ),
    ),
    "maker": (
        "The company that makes the",
        " is",
        (
            " iPhone: Apple",
            " iPad: Apple",
            " MacBook: Apple",
            " Xbox: Microsoft",
            " Windows operating system: Microsoft",
            " PlayStation: Sony",
            " Walkman: Sony",
            " Gmail service: Google",
            " Chrome browser: Google",
            " Kindle: Amazon",
            " Mustang: Ford",
            " Corolla: Toyota",
            " Prius: Toyota",
            " Civic: Honda",
            " Photoshop program: Adobe",
        ),
    ),
    "field": (
        "",
        " worked in the field of",
        (
            "Albert Einstein: physics",
            "Isaac Newton: physics",
            "Niels Bohr: physics",
            "Max Planck: physics",
            "Charles Darwin: biology",
            "Gregor Mendel: biology",
            "Sigmund Freud: psychology",
            "Carl Jung: psychology",
            "Adam Smith: economics",
            "Milton Friedman: economics",
            "Immanuel Kant: philosophy",
            "David Hume: philosophy",
            "Leonhard Euler: mathematics",
            "David Hilbert: mathematics",
            "Antoine Lavoisier: chemistry",
            "Linus Pauling: chemistry",
        ),
    ),
}


@dataclass(frozen=True)
class _Fact:
    prompt: str
    answer: str
    tokens: int
    subject_last: int


def facts(
    tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0, bos: Bos = "auto"
) -> list[Pair]:
    """`n` distinct pairs; the first ones do not depend on `n`, and the relations take turns.

    Clean "The capital of France is" is answered by its own object; wrong is the object of the
    corrupt prompt: another subject of the relation with as many tokens. Labels SUBJECT_LAST,
    END; group: the relation. Facts whose object is not one token are left out; BadInput if `n`
    pairs cannot be had from the others.
    """
    rng = random.Random(seed)
    queues = []
    for relation in RELATIONS:
        ways = [
            (relation, clean, corrupt)
            for alike in _by_shape(tokenizer, relation, bos)
            for clean, corrupt in permutations(alike, 2)
            if clean.answer != corrupt.answer
        ]
        rng.shuffle(ways)
        queues.append(ways)
    chosen = [way for turn in zip_longest(*queues) for way in turn if way is not None]
    if n > len(chosen):
        raise BadInput(
            f"task 'facts': {n} pairs asked for, {len(chosen)} can be had with this tokenizer: "
            "ask for fewer"
        )
    return [
        make_pair(
            tokenizer,
            clean.prompt,
            corrupt.prompt,
            clean.answer,
            corrupt.answer,
            {"SUBJECT_LAST": clean.subject_last, "END": clean.tokens - 1},
            relation,
            bos,
        )
        for relation, clean, corrupt in chosen[:n]
    ]


def _by_shape(tokenizer: PreTrainedTokenizerBase, relation: str, bos: Bos) -> list[list[_Fact]]:
    """The usable facts of a relation, those of one length and one end of the subject together."""
    before, after, entries = RELATIONS[relation]
    alike: dict[tuple[int, int], list[_Fact]] = defaultdict(list)
    for entry in entries:
        subject, answer = entry.split(":")
        prompt = before + subject + after
        ids = encode(tokenizer, prompt, bos)
        head = encode(tokenizer, before + subject, bos)
        answered = encode(tokenizer, prompt + answer, bos)
        # The subject must end between two tokens and the object must be one known token.
        if (
            ids[: len(head)] == head
            and len(answered) == len(ids) + 1
            and answered[:-1] == ids
            and answered[-1] != tokenizer.unk_token_id
        ):
            fact = _Fact(prompt, answer, len(ids), len(head) - 1)
            alike[fact.tokens, fact.subject_last].append(fact)
    return list(alike.values())
