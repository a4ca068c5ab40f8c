"""Imports run one way, and the source roots do not get in transformers' way."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports from its own level and from those above it in this list; never further down.
LEVELS = (
    (
        "errors",
        "digests",
        "dimensions",
        "distributed",
        "exactness",
        "families",
        "memory",
        "offload",
        "transfer",
        "writer",
    ),
    ("adapters", "devices", "identity", "prefetch", "paths"),
    ("limits",),
    ("sites", "stream", "cone", "sae"),
    ("effect", "edges"),
    ("pairs", "statistics", "audit"),
    ("tasks", "loading", "store", "diagnostics"),
    ("spec", "reader", "integrity", "job"),
    ("attention", "sources", "reads", "circuits", "table", "prefilter"),
    ("layers", "forward", "results", "layout"),
    ("plan", "placement", "report", "metrics", "values"),
    ("model", "modules", "judge", "probe"),
    ("schedule", "prompts"),
    ("taps", "stacked"),
    ("wave", "interventions"),
    ("means", "selftest", "attribution", "splitting", "doubts"),
    ("prepare", "backends"),
    ("append", "assembly", "planning", "provenance"),
    ("joint", "output"),
    ("engine",),
    ("demo", "verification", "reproduce"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
KEEPERS = (
    "patchsweep.store",
    "patchsweep.writer",
    "patchsweep.integrity",
)  # what they know is on disk
COMPUTES = {"torch", "patchsweep_kernels"} | {
    f"patchsweep.{name}"
    for name in ("model", "attention", "wave", "metrics", "sources", "engine", "commands")
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


def backward(graph: Imports) -> list[str]:
    """Imports from a higher to a lower level of LEVELS; a subpackage has the level of its name."""

    def level(module: str) -> int | None:
        return LEVEL.get(module.split(".")[1]) if module.startswith("patchsweep.") else None

    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if (low := level(name)) is not None and (high := level(target)) is not None and high > low
    ]


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
    return imports(ROOT / "engine" / "patchsweep")


def test_imports_run_one_way(engine: Imports) -> None:
    assert backward(engine) == []


def test_no_cycles(engine: Imports) -> None:
    assert cycle(engine) == []


def test_what_keeps_results_does_not_compute(engine: Imports) -> None:
    keepers = [name for name in KEEPERS if name in engine]
    assert "patchsweep.store" in keepers
    for name in keepers:
        assert reach(engine, name) & COMPUTES == set(), name


def test_kernels_import_torch_only() -> None:
    graph = imports(ROOT / "kernels" / "patchsweep_kernels")
    # triton comes with torch where there is a GPU
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    outside = {t for targets in graph.values() for t in targets if t not in graph}
    assert outside - allowed == set()


def test_the_checks_see_a_violation(tmp_path: Path) -> None:
    package = tmp_path / "patchsweep"
    (package / "report").mkdir(parents=True)
    (package / "__init__.py").write_text("from patchsweep.cli import main\n")
    (package / "cli.py").write_text("def main() -> None: ...\n")
    (package / "store.py").write_text("from patchsweep import pairs\n")
    (package / "pairs.py").write_text("def later():\n    from .wave import run\n")
    (package / "wave.py").write_text("import torch.nn\nfrom .report.page import page\n")
    (package / "report" / "__init__.py").write_text("")
    (package / "report" / "page.py").write_text("from .. import pairs\n")
    graph = imports(package)
    assert backward(graph) == ["patchsweep.pairs imports patchsweep.wave"]
    assert reach(graph, "patchsweep.store") & COMPUTES == {"torch", "patchsweep.wave"}
    assert set(cycle(graph)) == {"patchsweep.pairs", "patchsweep.wave", "patchsweep.report.page"}


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
