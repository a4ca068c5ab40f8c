"""Prompt sets that are built in: made for the tokenizer at hand, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.facts import facts
from patchsweep.tasks.ioi import ioi

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# name -> (tokenizer, n, seed, bos) -> pairs
TASKS: dict[str, Callable[[PreTrainedTokenizerBase, int, int, Bos], list[Pair]]] = {
    "ioi": ioi,
    "facts": facts,
}

__all__ = ["TASKS", "build", "check", "facts", "ioi"]


def check(name: str) -> None:
    """BadInput with the known tasks unless there is one of this name."""
    if name not in TASKS:
        raise BadInput(f"unknown task '{name}': use one of {', '.join(TASKS)}")


def build(
    name: str, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0, bos: Bos = "auto"
) -> list[Pair]:
    """The first `n` pairs of a task; BadInput for an unknown task or more pairs than it has."""
    check(name)
    if n < 1:
        raise BadInput(f"task '{name}': {n} pairs asked for: ask for at least 1")
    return TASKS[name](tokenizer, n, seed, bos)
