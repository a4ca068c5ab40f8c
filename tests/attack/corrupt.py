"""One corruption of one file of results: each reader shows what it shows of undisturbed results, or
less and says so, or ends with one line; `check` finds it; a resumed sweep ends with the bytes of an
undisturbed one."""

from __future__ import annotations

import contextlib
import io
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

import patchsweep as ps
from attack._everything import Sweep, files, sweeps
from attack.table import Outcomes, Until
from patchsweep.report.page import write_page
from patchsweep.report.terminal import show
from patchsweep.sites import Status
from patchsweep.store import pack
from patchsweep.store.damage import decoded

RIGHT, LESS, LINE = "right figures", "right, and said not to be done", "one line"
WRONG, RAW = "WRONG FIGURES", "RAW EXCEPTION"
AGAIN, NOT_AGAIN = "same bytes after --resume", "OTHER BYTES AFTER --resume"
HIDDEN = "CHECK IS CLEAN, AND BYTES ARE OTHERS"
# Readers that take long: every so many corruptions.
RARELY = {
    "page": 7,
    "show": 5,
    "export": 5,
    "zip": 3,
}


def attack(folder: Path, seed: int, until: Until) -> Outcomes:
    """Every file in every way, in an order drawn from the seed, until it is enough."""
    found = Outcomes((RIGHT, LESS, LINE, AGAIN))
    made = [
        (sweep, _shown(sweep.out, folder), _owned(sweep.out, files(sweep.out)))
        for sweep in sweeps(folder)
    ]
    every = [(of, key) for of in made for key in files(of[0].out)]
    rng = random.Random(seed)
    orders = [rng.sample(every, len(every)) for _ in CORRUPTIONS]  # each way in turn
    cases = [
        (*at, how)
        for row in zip(*orders, strict=True)
        for at, how in zip(row, CORRUPTIONS, strict=True)
    ]
    for number, ((sweep, shown, whole), key, how) in enumerate(cases, seed):
        out = folder / "work" / sweep.out.name
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(sweep.out, out)
        if CORRUPTIONS[how](sweep, out, key, random.Random(number)):
            example = f"{sweep.name}: {key}, {how} (seed {number})"
            _read(out, shown, number, how, example, found)
            _mended(sweep, out, whole, how, example, found)
        if until():
            break
    return found


# Ways to corrupt a file, `key`: whether there was something to do.
Corruption = Callable[[Sweep, Path, str, random.Random], bool]


def delete(_: Sweep, out: Path, key: str, __: random.Random) -> bool:
    (out / key).unlink()
    return True


def truncate(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    raw = (out / key).read_bytes()
    (out / key).write_bytes(raw[: rng.choice([0, len(raw) // 2, len(raw) - 1])])
    return True


def zero(_: Sweep, out: Path, key: str, __: random.Random) -> bool:
    (out / key).write_bytes(bytes((out / key).stat().st_size))
    return True


def flip(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    raw = bytearray((out / key).read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    (out / key).write_bytes(raw)
    return True


def swap(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    """With another file of the same size, near it if there is one."""
    mine = (out / key).read_bytes()
    same = {k: p for k, p in files(out).items() if p.stat().st_size == len(mine)}
    same = {k: p for k, p in same.items() if p.read_bytes() != mine}
    near = [k for k in same if _near(k) == _near(key)] or [*same]
    if not near:
        return False
    other = out / rng.choice(near)
    (out / key).write_bytes(other.read_bytes())
    other.write_bytes(mine)
    return True


def replace(sweep: Sweep, out: Path, key: str, _: random.Random) -> bool:
    """By what another sweep has under this name."""
    old = sweep.earlier.get(key)
    if old is None or old == (out / key).read_bytes():
        return False
    (out / key).write_bytes(old)
    return True


def copy(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    """Over another file near it, or to a name that none has yet."""
    near = [k for k in files(out) if _near(k) == _near(key) and k != key]
    raw = (out / key).read_bytes()
    target = out / rng.choice([*near, f"{key}0", f"{key} copy"])
    if target.exists() and target.read_bytes() == raw:
        return False
    target.write_bytes(raw)
    return True


def digit(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    """Another digit in metadata, which are JSON still."""
    if not key.endswith(".json"):
        return False
    text = bytearray((out / key).read_bytes())
    at = rng.choice([i for i, c in enumerate(text) if chr(c).isdigit()])
    text[at] = rng.choice([d for d in b"0123456789" if d != text[at]])
    (out / key).write_bytes(text)
    return True


def _near(key: str) -> str:
    """What chunks of an array share, and metadata of the arrays of a group."""
    array, chunk, _ = key.partition("/c/")
    return array if chunk else key.rpartition("/")[0].rpartition("/")[0]


CORRUPTIONS: dict[str, Corruption] = {
    "deleted": delete,
    "cut": truncate,
    "zeroed": zero,
    "a bit flipped": flip,
    "swapped with one of equal size": swap,
    "replaced by another version": replace,
    "copied over another, or to a new name": copy,
    "a digit changed": digit,
}


def _arrays(path: Path, _: Path) -> dict[str, dict[str, Any]]:
    of = {c: ps.open(path).to_xarray(c) for c in ps.open(path).components}
    return {
        c: {str(n): np.asarray(v) for n, v in ds.reset_coords().data_vars.items()}
        | {f"coordinate {n}": np.asarray(v) for n, v in ds.coords.items()}
        for c, ds in of.items()
    }


def _frame(path: Path, _: Path) -> pd.DataFrame:
    return ps.open(path).to_frame()


def _table(path: Path, folder: Path) -> pd.DataFrame:
    ps.open(path).export(folder / "t.parquet", overwrite=True)
    return pd.read_parquet(folder / "t.parquet")


def _zip(path: Path, folder: Path) -> pd.DataFrame:
    pack(path, folder / "t.zip", overwrite=True)
    return ps.open(folder / "t.zip").to_frame()


def _terminal(path: Path, _: Path) -> str:
    out = io.StringIO()
    show(ps.open(path), Console(file=out, width=100))
    return _nameless(out.getvalue(), path)


def _page(path: Path, folder: Path) -> str:
    write_page(ps.open(path), folder / "report.html")
    return _nameless((folder / "report.html").read_text(encoding="utf-8"), path)


def _nameless(text: str, path: Path) -> str:
    return re.sub(rf"\npath .*|{path}|{path.stem}", "", text, flags=re.DOTALL)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "to_xarray": _arrays,
    "to_frame": _frame,
    "zip": _zip,
    "export": _table,
    "show": _terminal,
    "page": _page,
}


def _shown(out: Path, folder: Path) -> dict[str, Any]:
    """What each reader shows."""
    return {kind: read(out, folder) for kind, read in READERS.items()}


def _read(
    out: Path, shown: Mapping[str, Any], number: int, how: str, example: str, found: Outcomes
) -> None:
    """What each reader shows of corrupted results."""
    for kind, read in READERS.items():
        if number % RARELY.get(kind, 1):
            continue
        said = ""
        try:
            ending = _alike(read(out, out.parent), shown[kind])
        except Exception as error:
            ending, said = _refused(error)
        found.add(f"{how}: {kind}", ending, f"{example}: {said}")


def _refused(error: Exception) -> tuple[str, str]:
    line = isinstance(error, ps.BadInput) and "\n" not in str(error)
    return (LINE if line else RAW), f"{type(error).__name__}: {error}"


def _alike(found: Any, expected: Any) -> str:
    """How what a reader shows compares with what it shows of undisturbed results."""
    if isinstance(found, dict):
        return _alike_arrays(found, expected)
    if isinstance(found, str):
        if found == expected:
            return RIGHT
        return LESS if re.search(r"not (done|scored)", found) else WRONG
    if found.equals(expected):
        return RIGHT
    rows, whole = ({*map(str, table.itertuples(index=False))} for table in (found, expected))
    return LESS if [*found] == [*expected] and rows < whole else WRONG


def _alike_arrays(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Values may be NaN where their status says that they are not done, and differ nowhere."""
    ending = RIGHT
    for component, whole in expected.items():
        mine = found.get(component, {})
        if mine.keys() != whole.keys():
            return WRONG
        for name, values in whole.items():
            same = mine[name] == values
            if values.dtype.kind == "f":
                same = same | np.isnan(mine[name]) & np.isnan(values)
            if np.all(same):
                continue
            status = mine.get(f"{name.removesuffix('_status').removesuffix('_effect')}_status")
            if status is None or np.shape(status) != np.shape(same):
                return WRONG
            if not np.all(same | (status == Status.NOT_DONE)):
                return WRONG
            ending = LESS
    return ending


def _mended(
    sweep: Sweep, out: Path, whole: Mapping[str, bytes], how: str, example: str, found: Outcomes
) -> None:
    """What `check` finds, and how a resumed sweep ends."""
    try:
        check = ps.check(out)
        clean = not check.damages and not check.undone and check.done == check.blocks
    except Exception as error:
        found.add(f"{how}: check", *_ending(error, example))
        clean = False
    changed = _owned(out, whole) != whole
    if clean and changed:
        found.add(f"{how}: check", HIDDEN, example)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            sweep.again(out)
        again = _owned(out, whole) == whole and not ps.check(out).damages
        found.add(f"{how}: --resume", AGAIN if again else NOT_AGAIN, example)
    except Exception as error:
        found.add(f"{how}: --resume", *_ending(error, example))


def _ending(error: Exception, example: str) -> tuple[str, str]:
    ending, said = _refused(error)
    return ending, f"{example}: {said}"


def _owned(out: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of files of these names, but for what changes from run to run."""
    paths = {name: out / name for name in names if not name.startswith("summary/")}
    return {name: _content(path) for name, path in paths.items() if path.is_file()}


def _content(path: Path) -> bytes:
    """Of a chunk what it decodes to: a frame has a bit that says nothing."""
    raw = path.read_bytes()
    try:
        return decoded(raw)
    except ValueError:
        return raw
