"""Where the prompt pairs come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, StrictInt, model_validator

from patchsweep import tasks
from patchsweep.inputs import PAIRS
from patchsweep.pairs import Bos
from patchsweep.spec.data import Data, named

TaskOf = tuple[str, Mapping[str, Any]]  # a task's name, and its options


def _task(value: object) -> object:
    """A task from "name" or {name: {option: choice}}."""
    if value is None or isinstance(value, tuple):  # parsed already
        return value
    name, options = named(value, "task")
    tasks.find(name).check(options)
    return name, dict(options)


def _task_data(task: TaskOf | None) -> Any:
    return task and ({task[0]: dict(task[1])} if task[1] else task[0])


class Prompts(Data):
    """Where the pairs come from: `n` of a built-in task, or a file (its first `n`, or all).

    only_correct: only pairs whose answer the model puts above every wrong one in the clean run.
    """

    task: Annotated[TaskOf | None, BeforeValidator(_task), PlainSerializer(_task_data)] = None
    file: Path | None = None
    n: Annotated[StrictInt, Field(ge=1, le=PAIRS)] | None = None
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    bos: Bos = "auto"
    only_correct: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.task is None) == (self.file is None):
            raise ValueError("give either task or file")
        if self.task is not None and self.n is None:
            raise ValueError("n is missing: say how many pairs of the task, e.g. n: 8")
        return self
