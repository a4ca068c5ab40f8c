"""Prompt sets that are built in: made for the tokenizer at hand, from a seed.

    task.py   what a task is, and what prompts are made of
    ioi.py, greater_than.py, docstring.py, facts.py, arithmetic.py, nobel.py: one each
    known_circuits.py   a small model whose circuits are known, and its prompts

Imports errors, inputs, pairs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchsweep.errors import BadInput
from patchsweep.tasks.arithmetic import OPERATIONS, arithmetic
from patchsweep.tasks.docstring import docstring
from patchsweep.tasks.facts import facts
from patchsweep.tasks.greater_than import greater_than
from patchsweep.tasks.ioi import ioi
from patchsweep.tasks.nobel import nobel
from patchsweep.tasks.task import Task, nearest

if TYPE_CHECKING:
    from patchsweep.tasks import known_circuits

TASKS: dict[str, Task] = {
    task.name: task for task in (ioi, greater_than, docstring, facts, arithmetic, nobel)
}

__all__ = [
    "OPERATIONS",
    "TASKS",
    "Task",
    "arithmetic",
    "docstring",
    "facts",
    "find",
    "greater_than",
    "ioi",
    "known_circuits",
    "nearest",
    "nobel",
]


def find(name: str) -> Task:
    """The task of this name; BadInput if there is none."""
    if name not in TASKS:
        raise BadInput(f"unknown task '{name}': {nearest(name, TASKS)}")
    return TASKS[name]


def __getattr__(name: str) -> Any:
    """The model whose circuits are known is imported when first used: it needs torch."""
    if name == "known_circuits":
        return import_module("patchsweep.tasks.known_circuits")
    raise AttributeError(f"module 'patchsweep.tasks' has no attribute '{name}'")
