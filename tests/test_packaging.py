"""The wheel: what is in it, and that it works where the repository is not."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "engine" / "patchsweep", ROOT / "kernels" / "patchsweep_kernels")

Python = Callable[..., str]


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip")
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it, without its dependencies."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip")
    call(*pip, "install", "-q", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def python(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs Python outside the repository on the installed wheel and this Python's dependencies."""
    # -S reads no .pth file, so an editable install of the repository stays out of sight.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = os.pathsep.join([str(site), *dependencies])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return lambda *args: call(sys.executable, "-S", *args, cwd=elsewhere, PYTHONPATH=path)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        file.relative_to(source.parent).as_posix()
        for source in SOURCES
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == files
    assert {"patchsweep/py.typed", "patchsweep_kernels/py.typed"} <= names


def test_the_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_imports_from_the_wheel(python: Python, site: Path) -> None:
    for name in ("patchsweep", "patchsweep_kernels"):
        file = Path(python("-c", f"import {name}; print({name}.__file__)").strip())
        assert file.resolve() == (site / name / "__init__.py").resolve()


def test_help_from_the_wheel(python: Python) -> None:
    assert "demo" in python("-m", "patchsweep", "--help")


def test_the_command_of_the_wheel(python: Python) -> None:
    script = """
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="patchsweep")
assert callable(command.load())
"""
    python("-c", script)
