"""Imports run one way, and the source roots do not get in transformers' way."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "engine" / "patchsweep"

# A room (a package, or a file of the top level) imports from those below it in this list, and from
# nothing else of patchsweep. What computes is above, what a question and its results are below.
ROOMS = (
    "__main__",
    "cli",
    "commands",
    "demo",
    "reproduce",
    "engine",
    "attribution",
    "backends",
    "judge",
    "model",
    "passes",
    "processes",
    "report",
    "results",
    "prefilter",
    "plan",
    "spec",
    "store",
    "tasks",
    "sae",
    "pairs",
    "statistics",
    "sites",
    "device",
    "inputs",
    "errors",
)
KEEPS = "patchsweep.store"  # what it knows is on disk
COMPUTES = {"torch", "patchsweep_kernels"} | {
    f"patchsweep.{room}" for room in ROOMS[: ROOMS.index("plan") + 1]
}

Imports = Mapping[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package in this folder."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Dotted name -> what it imports anywhere in the file; outside the package only the top name.

    `from package import x` counts as an import of the module `package.x` where there is one.
    """
    files = modules(package)
    found = {}
    for name, file in files.items():
        anchor = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        targets = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = anchor[: len(anchor) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                dotted = {f"{base}.{alias.name}" for alias in node.names}
                targets |= {d if d in files else base for d in dotted}
        own = package.name
        found[name] = {t if t.split(".")[0] == own else t.split(".")[0] for t in targets} - {name}
    return found


def room(module: str) -> str:
    """The top level's own name where it is no room: the package's `__init__`."""
    return module.split(".")[1] if "." in module else module


def backward(graph: Imports) -> list[str]:
    """Imports from a room to one that is not below it in ROOMS; a new room has no place there."""
    found = []
    for name, targets in graph.items():
        for target in sorted(t for t in targets if t.startswith("patchsweep.")):
            here, there = room(name), room(target)
            if here not in (there, "patchsweep") and ROOMS.index(here) >= ROOMS.index(there):
                found.append(f"{name} imports {target}")
    return found


def given(package: Path) -> dict[str, set[str]]:
    """Dotted name of every package -> what its `__all__` holds."""
    found = {}
    for name, file in modules(package).items():
        if file.name == "__init__.py":
            assigned = [n for n in ast.parse(file.read_text("utf-8")).body if _is_all(n)]
            found[name] = {s for n in assigned for s in ast.literal_eval(n.value)}
    return found


def _is_all(node: ast.stmt) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def past(package: Path) -> list[str]:
    """What a room takes from another that the other does not give: names that are not in the
    `__all__` of a package, files that are not there either."""
    files, gives, found = modules(package), given(package), []
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module or "." not in node.module:
                continue
            base = node.module
            if base.split(".")[0] != package.name or room(base) == room(name):
                continue
            if base in gives:  # a package
                short = {alias.name for alias in node.names} - gives[base]
                found += [f"{name} takes {base}.{n}" for n in sorted(short)]
            parent, _, leaf = base.rpartition(".")
            if parent != package.name and base not in gives and leaf not in gives[parent]:
                found.append(f"{name} takes {base}")
    return found


def reach(graph: Imports, name: str) -> set[str]:
    """Everything that `name` imports, directly or not; the `__init__` above it is not counted."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        for target in graph.get(todo.pop(), ()):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def cycle(graph: Imports) -> list[str]:
    """The modules of one import cycle; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def engine() -> Imports:
    return imports(PACKAGE)


def test_imports_run_one_way(engine: Imports) -> None:
    assert backward(engine) == []


def test_no_cycles(engine: Imports) -> None:
    assert cycle(engine) == []


def test_rooms_take_what_is_given() -> None:
    assert past(PACKAGE) == []


def test_what_keeps_results_does_not_compute(engine: Imports) -> None:
    assert reach(engine, KEEPS) & COMPUTES == set()


def test_rooms_say_what_they_hold(engine: Imports) -> None:
    """Each package's docstring: every file of it, and which rooms it imports."""
    for name in given(PACKAGE):
        if name == "patchsweep":
            continue
        folder = PACKAGE.parent / name.replace(".", "/")
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
        files = {f.name for f in folder.glob("*.py")} - {"__init__.py"}
        assert files - set(re.findall(r"\w+\.py", doc)) == set(), name
        if name.count(".") > 1:
            continue
        under = [t for module, ts in engine.items() if room(module) == room(name) for t in ts]
        rooms = {room(t) for t in under if t.startswith("patchsweep.")} - {room(name)}
        said = re.search(r"^Imports ((?:\w+,? ?\n?)+)\.$", doc, re.MULTILINE)
        assert said, name
        assert set(re.findall(r"\w+", said[1])) == rooms, name


def test_kernels_import_torch_only() -> None:
    graph = imports(ROOT / "kernels" / "patchsweep_kernels")
    # triton comes with torch where there is a GPU
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    outside = {t for targets in graph.values() for t in targets if t not in graph}
    assert outside - allowed == set()


def test_the_checks_see_a_violation(tmp_path: Path) -> None:
    package = tmp_path / "patchsweep"
    for name in ("store", "passes", "report"):
        (package / name).mkdir(parents=True)
    (package / "__init__.py").write_text("from patchsweep.cli import main\n")
    (package / "cli.py").write_text("def main() -> None: ...\n")
    (package / "store" / "__init__.py").write_text("from patchsweep.store.files import put\n")
    (package / "store" / "files.py").write_text("def put():\n    from patchsweep import passes\n")
    (package / "passes" / "__init__.py").write_text(
        "from patchsweep.report import page\n__all__ = ['wave']\n"
    )
    (package / "passes" / "wave.py").write_text("import torch.nn\n")
    (package / "report" / "__init__.py").write_text("")
    (package / "report" / "page.py").write_text(
        "from patchsweep.store.files import put\nfrom patchsweep.passes.wave import run\n"
    )
    graph = imports(package)
    assert backward(graph) == [
        "patchsweep.report.page imports patchsweep.passes.wave",
        "patchsweep.store.files imports patchsweep.passes",
    ]
    assert past(package) == [
        "patchsweep.passes takes patchsweep.report.page",
        "patchsweep.report.page takes patchsweep.store.files",
    ]
    assert reach(graph, KEEPS) & COMPUTES == {"torch", "patchsweep.passes"}
    assert set(cycle(graph)) == {
        "patchsweep.passes",
        "patchsweep.report.page",
        "patchsweep.store.files",
    }


@pytest.mark.parametrize("folder", ["engine", "kernels"])
def test_a_source_root_is_no_package(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert list((ROOT / folder).glob("*.py")) == []


def test_transformers_beside_the_folder_kernels() -> None:
    """transformers imports any package `kernels` that it finds; -c puts the cwd on the path."""
    script = """
import sys, transformers, patchsweep, torch
config = transformers.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)
logits = transformers.LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits
assert logits.shape == (1, 3, 11)
assert sys.path[0] == ""
print(getattr(sys.modules.get("kernels"), "__file__", None))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "{results}"],
        ["show", "{results}", "--json"],
        ["plot", "{results}", "--out", "{folder}/figures"],
        ["export", "{results}", "{folder}/cells.parquet"],
        ["check", "{results}"],
        ["tasks", "--help"],
        ["run", "--help"],
    ],
    ids=lambda arguments: " ".join(arguments[::2]),
)
def test_results_are_read_without_torch(arguments: list[str], tmp_path: Path) -> None:
    """Nor transformers: both take seconds, which who reads a few arrays would wait."""
    results = tmp_path / "results.zarr"
    with zipfile.ZipFile(ROOT / "tests" / "schema_2.zip") as kept:
        kept.extractall(results)
    given = [a.format(results=results, folder=tmp_path) for a in arguments]
    script = f"""
import sys
from patchsweep.cli import main
sys.argv = ["patchsweep", *{given!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *{{"torch", "transformers"}} & sys.modules.keys())
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
