"""What documents and docstrings refer to is there; the picture of the rooms is that of the code."""

from __future__ import annotations

import ast
import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from test_imports import PACKAGE, ROOMS, ROOT, given, imports, modules

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
FILE = re.compile(r"(?:[\w.-]+/)*(?:[\w-]+\.(?:py|toml|svg)|(?:scripts|examples)/[\w.-]+)")
DOTTED = re.compile(r"[a-z_]+(?:\.\w+)+")
MODULES = modules(PACKAGE)


def names(module: str) -> set[str]:
    """What a module defines, in classes too; of a package, what it gives and its modules."""
    file = MODULES[module]
    if file.name == "__init__.py":
        inside = {m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == module}
        return given(PACKAGE)[module] | inside | {"__all__"}
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target) for target in targets}
    return found


def is_there(dotted: str, room: str) -> bool:
    """Whether a name of the engine is that of something: as who imports it writes it, or from
    within a room its module and what that defines."""
    parts = dotted.removeprefix("patchsweep.").split(".")
    for base in ("patchsweep", f"patchsweep.{room}" if room else "patchsweep"):
        module, rest = base, list(parts)
        while rest and f"{module}.{rest[0]}" in MODULES:
            module = f"{module}.{rest.pop(0)}"
        whole = module != base or dotted.startswith("patchsweep.")
        if whole and (not rest or rest[0] in names(module)):
            return True
    return False


def of_the_engine(dotted: str) -> bool:
    first = dotted.split(".")[0]
    return first == "patchsweep" or first in {part for m in MODULES for part in m.split(".")[1:]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_documents_refer_to_what_is_there(document: Path) -> None:
    text = document.read_text("utf-8")
    code = re.findall(r"`([^`\n]+)`", text)
    places = (ROOT, PACKAGE, document.parent)
    files = [word for words in code for word in words.split() if FILE.fullmatch(word)]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [f for f in files if not any((place / f).exists() for place in places)] == []
    assert [link for link in links if not (document.parent / link).exists()] == []
    dotted = [word for word in code if DOTTED.fullmatch(word) and word.startswith("patchsweep.")]
    assert [word for word in dotted if not is_there(word, "")] == []


def test_docstrings_refer_to_what_is_there() -> None:
    wrong = []
    for module, file in MODULES.items():
        room = (*module.split("."), "")[1]
        for word in re.findall(r"`([^`\s]+)`", file.read_text("utf-8")):
            if FILE.fullmatch(word):
                there = any((place / word).exists() for place in (ROOT, PACKAGE, file.parent))
            else:
                named = DOTTED.fullmatch(word) and of_the_engine(word)
                there = not named or word.endswith(".json") or is_there(word, room)
            if not there:
                wrong.append(f"{module}: {word}")
    assert wrong == []


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    """scripts/rooms"""
    loader = SourceFileLoader("rooms", str(ROOT / "scripts" / "rooms"))
    spec = spec_from_loader("rooms", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_code(rooms: ModuleType) -> None:
    """Else: python scripts/rooms"""
    assert rooms.PICTURE.read_text("utf-8") == rooms.drawn()


def test_arrows_are_the_imports(rooms: ModuleType) -> None:
    """No fewer than the code has once those that follow are put back, none that follows."""
    whole = rooms.arrows(imports(PACKAGE))
    assert set(whole) == {*ROOMS, rooms.KERNELS} - {"__main__"}
    assert {"plan", "passes", "device"} <= whole["attribution"]
    few = rooms.reduced(whole)
    assert sum(map(len, few.values())) < sum(map(len, whole.values())) / 3

    def all_below(graph: dict[str, set[str]], name: str) -> set[str]:
        return graph[name].union(*(all_below(graph, other) for other in graph[name]))

    for name in whole:
        assert all_below(few, name) == all_below(whole, name)
        for other in few[name]:
            assert other not in set().union(*(all_below(few, b) for b in few[name] - {other}))
