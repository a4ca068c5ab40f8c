"""What a user may name: listed, documented, refusing bad input in words, and typed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import patchsweep as ps
from patchsweep.tasks import TASKS, Task
from tiny import build, tokenizer

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = {
    name: found for name in ps.__all__ if inspect.isfunction(found := getattr(ps, name))
} | {f"tasks.{name}": getattr(ps.tasks, name) for name in ("find", "nearest")}


def ours(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("patchsweep")


def members(kind: type) -> dict[str, Any]:
    """Public methods and properties by name: those that the engine has written."""
    found: dict[str, Any] = {}
    for base in filter(ours, kind.__mro__):
        for name, member in vars(base).items():
            function = underlying(member)
            if inspect.isfunction(function) and not name.startswith("_"):
                found.setdefault(name, member)
    return found


def underlying(member: Any) -> Any:
    """The function of a property or a method."""
    if isinstance(member, cached_property):
        return member.func
    return getattr(member, "fget", getattr(member, "__func__", member))


def classes() -> list[type]:
    """The public ones, and those of what public functions, methods and properties return."""
    found = [kind for name in ps.__all__ if inspect.isclass(kind := getattr(ps, name))] + [Task]
    functions = list(FUNCTIONS.values())
    for kind in found:  # grows
        functions += map(underlying, members(kind).values())
        while functions:
            function = functions.pop()
            said = str(function.__annotations__.get("return", ""))
            for word in re.findall(r"\w+", said):
                returned = function.__globals__.get(word)
                if inspect.isclass(returned) and ours(returned) and returned not in found:
                    found.append(returned)
    return found


def documented() -> Iterator[tuple[str, Any, str]]:
    """Name, function and docstring of every public function, method and property. What a class says
    holds for its methods: what parameters that recur mean is said once."""
    for name, function in FUNCTIONS.items():
        yield name, function, function.__doc__ or ""
    for kind in classes():
        for name, member in members(kind).items():
            function = underlying(member)
            said = function.__doc__ or ""
            yield f"{kind.__name__}.{name}", function, said and f"{said}\n{whole_doc(kind)}"


def whole_doc(kind: type) -> str:
    return "\n".join(base.__dict__.get("__doc__") or "" for base in filter(ours, kind.__mro__))


def test_all_public_names_are_listed() -> None:
    assert dir(ps) == sorted(ps.__all__)
    assert all(hasattr(ps, name) for name in ps.__all__)
    assert all(hasattr(ps.tasks, name) for name in ps.tasks.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sweeep'"):
        ps.sweeep  # noqa: B018


def test_all_have_a_docstring() -> None:
    assert [name for name, _, doc in documented() if not doc] == []
    assert [kind.__name__ for kind in classes() if not kind.__dict__.get("__doc__")] == []
    assert [task.name for task in TASKS.values() if len(task.__doc__ or "") < 200] == []


def test_all_parameters_are_named_in_it() -> None:
    """Those of a method there or in what its class says; fields in what their class says."""
    missing = []
    for name, function, doc in documented():
        for parameter in inspect.signature(function).parameters:
            if parameter not in ("self", "cls") and not re.search(rf"\b{parameter}\b", doc):
                missing.append(f"{name}: {parameter}")
    for kind in filter(is_dataclass, classes()):
        doc = whole_doc(kind)
        named = (f.name for f in fields(kind) if f.name not in members(kind))
        missing += [f"{kind.__name__}.{n}" for n in named if not re.search(rf"\b{n}s?\b", doc)]
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    missing += [
        f"guide: {k}" for k in ps.Spec.model_fields if not re.search(rf"(?m)^ *{k}:|`{k}\b", guide)
    ]
    for task in TASKS.values():
        missing += [
            f"{task.name}: {o}" for o in task.options if f"{o}:" not in (task.__doc__ or "")
        ]
    assert missing == []


def test_what_raises_bad_input_says_so() -> None:
    silent = []
    for name, function, doc in documented():
        body = inspect.getsource(function).replace(function.__doc__ or "", "")
        if re.search(r"raise BadInput|one_of\(|_at\(", body) and "BadInput" not in doc:
            silent.append(name)
    assert silent == []


def call(wrong: Callable[[], Any]) -> None:
    with pytest.raises(ps.BadInput) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_functions_refuse_bad_input(tmp_path: Path) -> None:
    model, nothing = ps.wrap(build(), tokenizer()), tmp_path / "nothing.yaml"
    spec = {"model": "gpt2", "prompts": {"task": "ioi", "n": 1}, "components": ["mlp_out"]}
    wrong: dict[str, Callable[[], Any]] = {
        "check": lambda: ps.check(nothing),
        "load_model": lambda: ps.load_model(str(nothing)),
        "load_spec": lambda: ps.load_spec(nothing),
        "make_pair": lambda: ps.make_pair(model.tokenizer, "a", "a", " b"),
        "open": lambda: ps.open(nothing),
        "parse_site": lambda: ps.parse_site("head_z.1"),
        "read_pairs": lambda: ps.read_pairs(nothing, model.tokenizer),
        "run": lambda: ps.run(ps.Spec.model_validate(spec)),
        "sweep": lambda: ps.sweep(model, [], out=tmp_path / "r", components=["head_z"]),
        "verify": lambda: ps.verify(nothing),
        "wrap": lambda: ps.wrap(nn.Linear(1, 1), None),
        "tasks.find": lambda: ps.tasks.find("nothing"),
    }
    assert set(wrong) == set(FUNCTIONS) - {"tasks.nearest"}
    for name, function in wrong.items():
        call(function)
        assert "BadInput" in (FUNCTIONS[name].__doc__ or ""), name
    for task in TASKS.values():
        call(lambda task=task: task(model.tokenizer, 0))
    assert "BadInput" in (Task.__doc__ or "")


def test_results_refuse_what_they_do_not_have(tmp_path: Path) -> None:
    """Every method, whichever of its names is wrong."""
    out = tmp_path / "r.zarr"
    zipfile.ZipFile(ROOT / "tests" / "schema_2.zip").extractall(out)
    results = ps.open(out)
    given = {"component": "head_z", "metric": "logit_diff", "size": 2, "n": 1}
    given |= {"cells": np.zeros((1, 3), np.intp)}
    given |= {"direction": None, "source": None, "min_pairs": None}
    given |= {"columns": results.columns("head_z"), "grid": results.grid("head_z")}
    given |= {"values": np.zeros((3, 4, 8)), "pairs": np.zeros((3, 4, 8)), "name": "x"}
    accepted, refused = set(), set()
    for name, method in members(ps.Results).items():
        parameters = inspect.signature(underlying(method)).parameters
        known = {k: v for k, v in given.items() if k in parameters}
        names = {n for n, p in parameters.items() if p.annotation != "int"}  # a source's number
        for wrong in {"component", "metric", "direction", "source"} & names:
            try:
                getattr(results, name)(**known | {wrong: "no"})
            except ps.BadInput as error:
                assert "\n" not in str(error)
                refused.add((name, wrong))
            else:
                accepted.add((name, wrong))
    assert accepted == {("window_sizes", "component")}  # it has none
    assert len(refused) > 50
    assert "BadInput" in (ps.Results.__doc__ or "")


# A user's checker, but for packages that take it long and whose types are none of ours.
CONFIG = """
[mypy]
strict = True
[mypy-transformers.*,nnsight.*,accelerate.*,scipy.*]
follow_imports = skip
ignore_missing_imports = True
"""
# Where there is nothing to say: models and tokenizers of transformers, tables of pandas, which has
# no types, settings and attributes as they are written, texts and numbers in one mapping, what a
# user's metric returns.
UNTYPED = {"Model.hf_model", "Model.tokenizer", "wrap", "make_pair", "read_pairs"}
UNTYPED |= {"Results.to_frame", "Results.top", "Results.detections"}
UNTYPED |= {"sweep", "Results.attrs", "Results.texts", "verify"}


def test_types_are_those_that_a_user_sees(tmp_path: Path) -> None:
    """The installed package under mypy --strict: no error in a program that uses every public name,
    what it reveals is what the comments say, and nothing public is Any but what must be."""
    program = (ROOT / "tests" / "typed" / "user.py").read_text("utf-8")
    assert [name for name in ps.__all__ if f"ps.{name}" not in program] == []
    named = [f"ps.{name}" for name in FUNCTIONS]
    for kind in (ps.Results, ps.Model, ps.Pair, ps.Site, ps.Context):
        own = [f.name for f in fields(kind)] + list(members(kind))
        named += [f"x{kind.__name__}.{name}" for name in dict.fromkeys(own)]
    kinds = [f"x{k}: ps.{k}\n" for k in ("Results", "Model", "Pair", "Site", "Context")]
    every = "".join(kinds) + "".join(f"reveal_type({name})\n" for name in named)
    (tmp_path / "user.py").write_text(program)
    (tmp_path / "every.py").write_text(f"import patchsweep as ps\n{every}")
    (tmp_path / "mypy.ini").write_text(CONFIG)
    cache = ROOT / ".mypy_cache" / "as_a_user"
    options = ("--config-file=mypy.ini", f"--cache-dir={cache}")
    environment = {k: v for k, v in os.environ.items() if k not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "user.py", "every.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    revealed = {
        (file, int(line)): re.sub(r"\b(?:\w+\.)+(?=\w)", "", said)
        for file, line, said in re.findall(
            r'^(\w+)\.py:(\d+): note: Revealed type is "(.*)"$', done.stdout, re.MULTILINE
        )
    }
    expected = {
        i: line.split("#", 1)[1].strip()
        for i, line in enumerate(program.splitlines(), 1)
        if "reveal_type(" in line
    }
    assert {line: said for (file, line), said in revealed.items() if file == "user"} == expected
    lines = [said for (file, _), said in sorted(revealed.items()) if file == "every"]
    assert len(lines) == len(named)
    plain = (re.sub(r"tuple\[Any, \.\.\.\]|slice\[Any, Any, Any\]", "", said) for said in lines)
    untyped = {
        name.removeprefix("ps.").removeprefix("x")
        for name, said in zip(named, plain, strict=True)
        if "Any" in said
    }
    assert untyped == UNTYPED
