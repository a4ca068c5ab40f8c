"""Prompt sets that are built in: made for the tokenizer at hand, from a seed."""

from __future__ import annotations

from patchsweep.errors import BadInput
from patchsweep.tasks.arithmetic import arithmetic
from patchsweep.tasks.docstring import docstring
from patchsweep.tasks.facts import facts
from patchsweep.tasks.greater_than import greater_than
from patchsweep.tasks.ioi import ioi
from patchsweep.tasks.nobel import nobel
from patchsweep.tasks.task import Task, nearest

TASKS: dict[str, Task] = {
    task.name: task for task in (ioi, greater_than, docstring, facts, arithmetic, nobel)
}

__all__ = [
    "TASKS",
    "Task",
    "arithmetic",
    "docstring",
    "facts",
    "find",
    "greater_than",
    "ioi",
    "nobel",
]


def find(name: str) -> Task:
    """The task of this name; BadInput if there is none."""
    if name not in TASKS:
        raise BadInput(f"unknown task '{name}': {nearest(name, TASKS)}")
    return TASKS[name]
