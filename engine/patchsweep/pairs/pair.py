"""A pair of prompts as tokens, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupt prompt, and what to measure behind them.

    `answer` and `wrong` are sets of token ids, read where `read` says; `wrong` may be empty if no
    metric needs it, `corrupt` if no source does. `labels` names positions of the clean prompt;
    `group` names the template, for clustered statistics. `align` [clean position] is the corrupt
    position that stands for each, −1 for none; None: the same one, in prompts of equal length.
    `others` are further corrupt prompts, each as long as the clean one. `continuation` are the
    tokens of an answer of several: all prompts end with all but its last. `origin` is the task
    or the file that the pair is from, for titles. Integers of numpy and torch are taken as ints.
    BadInput if these do not fit together.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]
    wrong: tuple[int, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    group: str = ""
    align: tuple[int, ...] | None = None
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    continuation: tuple[int, ...] = ()
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("clean", "corrupt", "answer", "wrong", "continuation"):
            self._set(name, _whole(name, getattr(self, name)))
        if self.align is not None:
            self._set("align", _whole("align", self.align))
        self._set("others", {name: _whole(name, x) for name, x in self.others.items()})
        places = _whole("labels", self.labels.values())
        self._set("labels", dict(zip(self.labels, places, strict=True)))
        for text in (self.group, *self.labels, *self.others):
            check_text("a pair's names", text)
        _check_labels(self)
        _check_lengths(self)
        _check_align(self)
        _check_tail(self)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen from here on

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def read(self) -> int:
        """The clean position whose next token is the answer."""
        return len(self.clean) - max(1, len(self.continuation))

    @property
    def alignment(self) -> NDArray[np.int64]:
        """[clean position]: the corrupt position that stands for it, −1 for none. BadInput for
        unequal lengths without `align`."""
        if self.align is not None:
            return np.array(self.align, np.int64)
        if not self.corrupt:
            return np.full(len(self.clean), -1, np.int64)
        if len(self.clean) != len(self.corrupt):
            raise BadInput(unequal(len(self.clean), len(self.corrupt)))
        return np.arange(len(self.clean), dtype=np.int64)


def _whole(name: str, numbers: Iterable[object]) -> tuple[int, ...]:
    """Whole numbers of any library as ints."""
    try:
        return tuple(index(n) for n in numbers)  # type: ignore[arg-type]
    except TypeError as error:
        raise BadInput(f"{name}: {error}: give a flat list of whole numbers") from error


def check_text(what: str, text: object) -> None:
    """BadInput for what is no text, or holds half a character."""
    if not isinstance(text, str):
        raise BadInput(f"{what}: {text!r} is no text: write it in quotes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{what}: {text[error.start : error.end]!r} is half a character (a lone surrogate): "
            "write the whole one, or leave it out"
        ) from error


def _check_labels(pair: Pair) -> None:
    for name, at in pair.labels.items():
        if not 0 <= at < len(pair):
            raise BadInput(
                f"label '{name}' at {at} is outside the prompt: "
                f"it has {len(pair)} tokens, use 0 to {len(pair) - 1}"
            )


def _check_lengths(pair: Pair) -> None:
    for name, tokens in pair.others.items():
        if len(tokens) != len(pair):
            raise BadInput(other_length(name, len(tokens), len(pair)))


def _check_align(pair: Pair) -> None:
    if pair.align is None:
        return
    if len(pair.align) != len(pair):
        raise BadInput(
            f"align has {len(pair.align)} entries, clean has {len(pair)} tokens: "
            "give one corrupt position, or −1, for each token"
        )
    if outside := [n for n in pair.align if not -1 <= n < len(pair.corrupt)]:
        raise BadInput(
            f"align: {outside[0]} is outside the corrupt prompt: "
            f"it has {len(pair.corrupt)} tokens, use −1 to {len(pair.corrupt) - 1}"
        )
    known = [n for n in pair.align if n >= 0]
    if twice := [n for n, count in Counter(known).items() if count > 1]:
        raise BadInput(f"align: position {twice[0]} of corrupt is there twice: keep one")


def _check_tail(pair: Pair) -> None:
    tail = pair.continuation[:-1]
    prompts = {"clean": pair.clean, "corrupt": pair.corrupt, **pair.others}
    for name, tokens in prompts.items():
        short = len(tokens) <= len(tail)
        if tail and tokens and (short or tokens[-len(tail) :] != tail):
            raise BadInput(
                f"continuation: prompt '{name}' does not end with all but its last token: "
                "append them"
            )


def unequal(clean: int, corrupt: int) -> str:
    return (
        f"clean has {clean} tokens, corrupt has {corrupt}: word the prompts so that both have the "
        'same number of tokens, or say which positions correspond, e.g. align: "end"'
    )


def other_length(name: str, tokens: int, clean: int) -> str:
    return (
        f"others: '{name}' has {tokens} tokens, clean has {clean}: "
        "word it so that both have the same number of tokens"
    )
