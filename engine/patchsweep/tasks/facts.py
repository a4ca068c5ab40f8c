"""Statements of common knowledge that end before a one-word object, paired within a relation."""

from __future__ import annotations

import random
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from itertools import permutations, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.task import Prompt, following, lay, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Relation(NamedTuple):
    """A prompt with a {SUBJECT}, and (subject, object) of every fact."""

    prompt: str
    facts: tuple[tuple[str, str], ...]


def _read() -> dict[str, Relation]:
    data = tomllib.loads((files(__package__) / "facts.toml").read_text(encoding="utf-8"))
    return {
        name: Relation(
            said["prompt"],
            tuple((subject, obj) for obj, of in said["objects"].items() for subject in of),
        )
        for name, said in data.items()
    }


RELATIONS = _read()


@task(relation=("all", *RELATIONS))
def facts(
    tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos, *, relation: str
) -> Iterator[Pair]:
    """Clean "The capital of France is" is answered by its object; wrong is the object of the
    corrupt prompt, which is about another subject of the relation with as many tokens.

    relation: one of them, or all, which take turns; every two facts come both ways round. Labels
    SUBJECT_1, SUBJECT_2 ... SUBJECT_LAST, END; group: the relation. Facts whose object is not one
    token are left out.
    """
    rng = random.Random(seed)
    queues = []
    for name in RELATIONS if relation == "all" else (relation,):
        ways = [
            (name, *two)
            for alike in _alike(tokenizer, RELATIONS[name], bos)
            for two in permutations(alike, 2)
            if two[0][1] != two[1][1]
        ]
        rng.shuffle(ways)
        queues.append(ways)
    for turn in zip_longest(*queues):
        for group, (clean, answer), (corrupt, wrong) in filter(None, turn):
            yield Pair(clean.ids, corrupt.ids, (answer,), (wrong,), _labels(clean), group)


def _labels(prompt: Prompt) -> dict[str, int]:
    subject = prompt.parts["SUBJECT"]
    numbered = {f"SUBJECT_{i}": at for i, at in enumerate(subject, start=1)}
    return numbered | {"SUBJECT_LAST": subject[-1], "END": len(prompt.ids) - 1}


def _alike(
    tokenizer: PreTrainedTokenizerBase, relation: Relation, bos: Bos
) -> list[list[tuple[Prompt, int]]]:
    """(prompt, object's token) of the usable facts, those with subjects of one length together."""
    found: dict[range, list[tuple[Prompt, int]]] = defaultdict(list)
    for subject, answer in relation.facts:
        prompt = lay(tokenizer, relation.prompt, {"SUBJECT": subject}, bos)
        after = following(tokenizer, relation.prompt.format(SUBJECT=subject), f" {answer}")
        if prompt and len(after) == 1:
            found[prompt.parts["SUBJECT"]].append((prompt, after[0]))
    return list(found.values())
