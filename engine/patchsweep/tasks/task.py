"""What a task is, and what its prompts are made of: parts of text, some of them named."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from patchsweep.errors import BadInput, shown
from patchsweep.inputs import PAIRS
from patchsweep.pairs import Bos, Pair, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Options = Mapping[str, Sequence[str]]  # option -> what it may be, first what it is when left out


class Task:
    """Pairs of one kind of prompt, made for a tokenizer from a seed.

    `task(tokenizer, n=100, seed=0, bos="auto", option="choice")` returns `n` distinct pairs, the
    first of which do not depend on `n`. `bos` is that of `make_pair`. BadInput for an unknown
    option, and where the tokenizer does not allow so many.

    `draw`: what makes the pairs, (tokenizer, seed, bos, **options) -> pairs; the task has its name.
    `options`: what each option may be, first what it is when left out.
    """

    def __init__(self, draw: Callable[..., Iterator[Pair]], options: Options) -> None:
        self.name, self.options, self._draw = draw.__name__, options, draw
        self.__doc__ = draw.__doc__

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        n: int,
        seed: int = 0,
        bos: Bos = "auto",
        **options: str,
    ) -> list[Pair]:
        if not 1 <= n <= PAIRS:
            raise BadInput(
                f"task '{self.name}': {shown(n)} pairs asked for: ask for at least 1, and at most "
                f"{PAIRS:,}"
            )
        pairs = list(islice(self.stream(tokenizer, seed, bos, **options), n))
        if not pairs:
            raise BadInput(
                f"task '{self.name}': {n} pairs asked for, 0 can be had: this tokenizer keeps too "
                "few of its words whole: write the pairs to a file instead"
            )
        if len(pairs) < n:
            raise BadInput(
                f"task '{self.name}': {n} pairs asked for, {len(pairs)} can be had with this "
                "tokenizer: ask for fewer"
            )
        return pairs

    def stream(
        self, tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos = "auto", **options: str
    ) -> Iterator[Pair]:
        """The pairs one after another, as many as there are. BadInput as `check` says."""
        self.check(options)
        chosen = {name: options.get(name, choices[0]) for name, choices in self.options.items()}
        said = (f"{o} {c}" for o, c in chosen.items() if c != self.options[o][0])
        origin = ", ".join([self.name, *said])
        drawn = self._draw(tokenizer, seed, bos, **chosen)
        return (replace(pair, origin=origin) for pair in drawn)

    def check(self, options: Mapping[str, object]) -> None:
        """BadInput unless the task has these options and choices."""
        for option, chosen in options.items():
            if option not in self.options:
                hint = nearest(option, self.options) if self.options else "it has none"
                raise BadInput(f"unknown option '{option}' of {self.name}: {hint}")
            if chosen not in self.options[option]:
                hint = nearest(chosen, self.options[option])
                raise BadInput(f"{option} of {self.name} is {chosen!r}: {hint}")


def task(**options: Sequence[str]) -> Callable[[Callable[..., Iterator[Pair]]], Task]:
    """Makes a Task of a function (tokenizer, seed, bos, **options) -> pairs."""
    return lambda draw: Task(draw, options)


def nearest(word: object, known: Collection[str]) -> str:
    """The mend for a `word` that is not `known`: the one that is most like it, or all."""
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(known)}"


@dataclass(frozen=True)
class Prompt:
    """A prompt of parts: its token ids [position], and where its named parts are."""

    ids: tuple[int, ...]
    parts: Mapping[str, range]

    @property
    def labels(self) -> dict[str, int]:
        """A part of one token has its name; one of several NAME_1, NAME_2 ...; the last token of
        all is END."""
        labels = {}
        for name, part in self.parts.items():
            if len(part) == 1:
                labels[name] = part[0]
            else:
                labels |= {f"{name}_{i}": at for i, at in enumerate(part, start=1)}
        return labels | {"END": len(self.ids) - 1}

    @property
    def whole(self) -> bool:
        """Whether every named part is one token."""
        return all(len(part) == 1 for part in self.parts.values())

    def fits(self, other: Prompt) -> bool:
        """Whether both have as many tokens, and their parts at the same positions."""
        return len(self.ids) == len(other.ids) and self.parts == other.parts


def lay(
    tokenizer: PreTrainedTokenizerBase, template: str, words: Mapping[str, str], bos: Bos
) -> Prompt | None:
    """The prompt of a template with its {slots} filled, the space before a slot being part of it.

    Slots whose name begins with a capital are the named parts; a space that is a token of its own
    is left out of them. None where a token reaches over the edge of a named part.
    """
    pieces = re.split(r"( ?)\{(\w+)\}", template)
    parts = [("", pieces[0])]
    for space, slot, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        parts += [(slot if slot[0].isupper() else "", space + words[slot]), ("", rest)]
    text = "".join(part for _, part in parts)
    body, ids = encode(tokenizer, text, "never"), encode(tokenizer, text, bos)
    first = len(ids) - len(body)
    places = {}
    before = ""
    for name, part in parts:
        if name:
            edges = [encode(tokenizer, prefix, "never") for prefix in (before, before + part)]
            start, stop = map(len, edges)
            if any(body[: len(edge)] != edge for edge in edges):
                return None
            start += stop - start > 1 and not tokenizer.decode(body[start]).strip()
            if start >= stop:
                return None
            places[name] = range(first + start, first + stop)
        before += part
    return Prompt(ids, places)


def in_random_order(rng: random.Random, items: Sequence[T]) -> Iterator[T]:
    """All items; a shuffle that takes as long as items are taken."""
    moved: dict[int, int] = {}  # Fisher & Yates: what lies where something was taken
    for i in range(len(items)):
        j = rng.randrange(i, len(items))
        yield items[moved.get(j, j)]
        moved[j] = moved.pop(i, i)


def following(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> tuple[int, ...]:
    """The tokens of `text` after `before`, none where it merges with that or is not known."""
    head, whole = (encode(tokenizer, t, "never") for t in (before, before + text))
    tail = whole[len(head) :]
    return () if whole[: len(head)] != head or tokenizer.unk_token_id in tail else tail


def single(tokenizer: PreTrainedTokenizerBase, words: str) -> dict[str, int]:
    """The words (parted by white space) that are one token of their own after a space, with it."""
    found: dict[int, str] = {}
    for word in words.split():
        tokens = following(tokenizer, "the", f" {word}")
        if len(tokens) == 1:
            found.setdefault(tokens[0], word)
    return {word: token for token, word in found.items()}


def spaced_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the space before a number is a token of its own, as where digits are."""
    return len(following(tokenizer, "is", " 7")) == 2
