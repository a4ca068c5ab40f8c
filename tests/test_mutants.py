"""What `scripts/mutate` changes is still there, and so are the tests that must notice."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = tomllib.loads((ROOT / "tests/mutants.toml").read_text("utf-8"))
FILES = list(dict.fromkeys(mutant["file"] for mutant in DATA["mutant"]))
KEYS = {"name", "file", "old", "new"}


def of(file: str) -> list[dict[str, Any]]:
    return [mutant for mutant in DATA["mutant"] if mutant["file"] == file]


@pytest.mark.parametrize("file", FILES)
def test_each_can_be_made(file: str) -> None:
    text = (ROOT / "engine/patchsweep" / file).read_text("utf-8")
    for mutant in of(file):
        assert KEYS <= mutant.keys() <= KEYS | {"tests", "harmless"}, mutant
        assert text.count(mutant["old"]) == 1, mutant["name"]
        assert mutant["new"] != mutant["old"], mutant["name"]
        compile(text.replace(mutant["old"], mutant["new"]), file, "exec")
    names = [mutant["name"] for mutant in of(file)]
    assert len(set(names)) == len(names)


def test_their_tests_are_there() -> None:
    assert set(DATA["tests"]) == set(FILES)
    named = [*DATA["tests"].values(), *(m["tests"] for m in DATA["mutant"] if "tests" in m)]
    for test in {test for some in named for test in some}:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text("utf-8")
        assert f"def {name.partition('[')[0] or 'test_'}" in text, test
