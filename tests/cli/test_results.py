"""Where results go: what is there already, and disks that refuse."""

from __future__ import annotations

import mmap
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.commands import Command, listing, refused
from tiny import arrays, values


def test_results_that_are_there(command: Command, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.zarr"
    assert command("run", spec).status == 0
    before = arrays(out)
    refused(command("run", spec), str(out), "exists already", "--resume", "--overwrite")
    for other in ("positions=all", "prompts.n=2", "metrics=[kl]", "direction=noise"):
        done = command("run", spec, "--resume", "--set", other)
        refused(done, str(out), "another sweep", "--overwrite to replace it")
    assert arrays(out) == before
    again = command("run", spec, "--resume")  # nothing is left to do
    assert (again.status, again.err) == (0, "")
    assert arrays(out) == before
    replaced = command("run", spec, "--overwrite", "--set", "prompts.n=2")
    assert (replaced.status, replaced.err) == (0, "")
    assert values(out)["head_z/kl"].shape[3] == 2
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl", "r.zarr"}


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=str)
def test_a_folder_that_holds_no_results(
    command: Command, spec: Path, tmp_path: Path, more: list[str]
) -> None:
    out = tmp_path / "r.zarr"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(command("run", spec, *more), str(out))
    refused(command("show", out), str(out), "not a results folder")
    assert listing(out) == {"thesis.txt"}


def test_a_path_below_a_file(command: Command, spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl" / "r.zarr"
    refused(command("run", spec, "--out", out), str(out), "is a file, not a folder")
    assert listing(tmp_path) == {"spec.yaml", "pairs.jsonl"}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts, or mounts again, a file system in memory with these options."""
    place = tmp_path / "mounted"
    place.mkdir()

    def call(options: str) -> Path:
        again = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no command mount")
        if done.returncode:
            pytest.skip(f"not allowed to mount: {done.stderr.strip()}")
        return place

    yield call
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_disk(command: Command, spec: Path, mount: Callable[[str], Path]) -> None:
    out = mount("ro") / "r.zarr"
    refused(command("run", spec, "--out", out), str(out), "read-only", "make it writable")


def test_a_full_disk(
    command: Command, spec: Path, tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    """Full at once: nothing is left. Full on the way: what is there can be gone on with."""
    disk = mount("size=64k")
    out = disk / "r.zarr"
    small = ("--set", "token_budget=100", "--set", "prompts.n=1")
    refused(command("run", spec, *small, "--out", out), str(out), "no space left", "run again")
    assert listing(disk) == set()

    whole = tmp_path / "whole.zarr"
    assert command("run", spec, *small, "--out", whole).status == 0
    files = sum(path.is_file() for path in whole.rglob("*"))
    mount(f"size={(files - 20) * mmap.PAGESIZE}")  # room for all but the last blocks
    refused(command("run", spec, *small, "--out", out), str(out), "no space left", "--resume")
    assert listing(disk) == {"r.zarr"}
    shown = command("show", out)
    assert (shown.status, shown.err) == (0, "")
    mount("size=64m")
    assert command("run", spec, *small, "--out", out, "--resume").status == 0
    assert arrays(out) == arrays(whole)
    mount("ro")
    refused(command("export", out, disk / "t.parquet"), "t.parquet", "read-only")
