"""Single corruptions of every file of results: each reader shows the right figures or ends with one
line, `check` finds what matters, and a resumed sweep ends with the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from safetensors.numpy import save_file

import patchsweep as ps
from attack.table import Outcomes, Until
from dictionaries import draw
from patchsweep.report.page import write_page
from patchsweep.report.show import show
from patchsweep.sites import Status
from patchsweep.store import pack
from tiny import arrays, build, rows, tokenizer

RIGHT = "right figures"
LINE = "one line"
UNDONE = "right, and said not to be done"
WRONG, RAW = "WRONG FIGURES", "RAW EXCEPTION"
AGAIN, NOT_AGAIN = "same bits after --resume", "OTHER BITS AFTER --resume"
HIDDEN = "CHECK IS CLEAN, --resume CHANGES BITS"
SLOW = {"page": 8, "show": 2}  # readers that only every so many corruptions are tried with
METRICS = ["logit_diff", "prob"]


@dataclass(frozen=True)
class Sweep:
    """A sweep, whole in `out`; `earlier`: files as they were before, by name."""

    name: str
    model: ps.Model
    pairs: list[ps.Pair]
    settings: dict[str, Any]
    out: Path
    earlier: Mapping[str, bytes]

    def again(self, out: Path) -> ps.Results:
        return ps.sweep(self.model, self.pairs, out=out, resume=True, **self.settings)


def sweeps(folder: Path) -> Iterator[Sweep]:
    """Sweeps that have, together, every part that results can have."""
    model = ps.wrap(build().double(), tokenizer())
    pairs = [ps.make_pair(model.tokenizer, **row) for row in rows(2)]
    of_six = [row for row in rows(40) if len(row["clean"].split()) == 6][:2]
    equal = [ps.make_pair(model.tokenizer, **row) for row in of_six]
    aligned = [ps.make_pair(model.tokenizer, **longer(row)) for row in rows(2, seed=1)]
    weights = draw("b_enc")
    rng = np.random.default_rng(0)
    weights["W_enc"], weights["W_dec"] = rng.normal(size=(16, 5)), rng.normal(size=(5, 16))
    weights["b_dec"], weights["b_enc"] = rng.normal(size=16), rng.normal(size=5)
    save_file(
        {k: v.astype(np.float32) for k, v in weights.items()}, folder / "dictionary.safetensors"
    )
    sae = {"file": str(folder / "dictionary.safetensors"), "layer": 1, "at": "mlp_out"}
    common = {"metrics": METRICS, "token_budget": 400}
    given: dict[str, tuple[list[ps.Pair], dict[str, Any]]] = {
        "prefilter, edges, windows": (
            pairs,
            {
                "components": ["head_z", "mlp_out"],
                "windows": [2],
                "prefilter": {"keep": "20%", "audit": 2},
                "edges": "eap",
                "direction": "both",
            },
        ),
        "sources, samples, features": (
            equal,
            {
                "components": ["mlp_out", "sae_feature"],
                "source": [
                    "zero",
                    {"mean": {"prompts": "clean", "by": "all"}},
                    {"resample": {"samples": 2}},
                ],
                "direction": "noise",
                "positions": ["END"],
                "sae": sae,
            },
        ),
        "circuit, sets, alignment": (
            aligned,
            {
                "components": ["resid_pre"],
                "circuit": {"ranking": ["head_z.0.0", "mlp_out.1"], "sizes": [1]},
                "sets": {"two": ["mlp_out.0@2", "head_z.1.1@END"]},
            },
        ),
    }
    for name, (of, settings) in given.items():
        out = folder / f"{re.sub(r'[^a-z]', '-', name)}.zarr"
        settings = {**common, **settings}
        earlier = stages(model, of, out, settings)
        yield Sweep(name, model, of, settings, out, earlier)


def longer(row: dict[str, Any]) -> dict[str, Any]:
    """A corrupt prompt with a token more in front, aligned from the end."""
    size = len(row["clean"].split())
    return {**row, "corrupt": f"Q {row['corrupt']}", "align": [[i, i + 1] for i in range(size)]}


def stages(
    model: ps.Model, pairs: list[ps.Pair], out: Path, settings: dict[str, Any]
) -> dict[str, bytes]:
    """Do a sweep; the files of a similar one, of one pair less, of the same names and others' bits:
    what an append, or another sweep, would have had there."""
    other = out.with_name(f"other-{out.name}")
    ps.sweep(model, pairs[:-1], out=other, **settings)
    ps.sweep(model, pairs, out=out, **settings)
    return {key: path.read_bytes() for key, path in files(other).items()}


def files(out: Path) -> dict[str, Path]:
    return {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}


Corruption = Callable[[Sweep, Path, str, random.Random], bool]  # whether there was something to do


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
    """With another file of the same size, and of the same kind if there is one."""
    mine = (out / key).read_bytes()
    found = files(out)
    same = [k for k, p in found.items() if p.stat().st_size == len(mine)]
    same = [k for k in same if found[k].read_bytes() != mine]
    near = [k for k in same if k.split("/c/")[0] == key.split("/c/")[0]] or same
    if not near:
        return False
    other = out / rng.choice(near)
    theirs = other.read_bytes()
    other.write_bytes(mine)
    (out / key).write_bytes(theirs)
    return True


def earlier(sweep: Sweep, out: Path, key: str, _: random.Random) -> bool:
    old = sweep.earlier.get(key)
    if old is None or old == (out / key).read_bytes():
        return False
    (out / key).write_bytes(old)
    return True


def copy(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    """Over another file of its folder or array, or to a name that none has yet."""
    near = [k for k in files(out) if k.split("/c/")[0] == key.split("/c/")[0] and k != key]
    raw = (out / key).read_bytes()
    target = out / rng.choice([*near, f"{key}0", f"{key} copy"])
    same = target.exists() and target.read_bytes() == raw
    target.write_bytes(raw)
    return not same


def digit(_: Sweep, out: Path, key: str, rng: random.Random) -> bool:
    text = (out / key).read_bytes()
    if not key.endswith(".json"):
        return False
    at = rng.choice([i for i, c in enumerate(text) if chr(c).isdigit()])
    other = rng.choice([d for d in b"0123456789" if d != text[at]])
    (out / key).write_bytes(text[:at] + bytes([other]) + text[at + 1 :])
    return True


CORRUPTIONS: dict[str, Corruption] = {
    "deleted": delete,
    "cut": truncate,
    "zeroed": zero,
    "a bit flipped": flip,
    "swapped with one of equal size": swap,
    "replaced by another version": earlier,
    "copied over another, or to a new name": copy,
    "a digit changed": digit,
}


@dataclass(frozen=True)
class Seen:
    """What readers show of results."""

    data: dict[str, dict[str, Any]]
    frame: pd.DataFrame
    shown: str
    edges: Any
    page: str


def seen(path: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """What each reader shows, one after another; every one opens the results by itself."""
    yield (
        "to_xarray",
        lambda: {
            c: {
                name: np.asarray(v.values)
                for name, v in ps.open(path).to_xarray(c).reset_coords().data_vars.items()
            }
            for c in ps.open(path).components
        },
    )
    yield "to_frame", lambda: ps.open(path).to_frame()
    yield "show", lambda: shown(path)
    yield "page", lambda: page(path, folder)
    yield "export", lambda: exported(path, folder)
    yield "zip", lambda: packed(path, folder)


def loaded(path: Path) -> dict[str, dict[str, Any]]:
    results = ps.open(path)
    of = {c: results.to_xarray(c).reset_coords() for c in results.components}
    return {
        c: {name: ds[name].values for name in [*ds.data_vars, *ds.coords]} for c, ds in of.items()
    }


def shown(path: Path) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(ps.open(path), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\npath .*", "", text.replace(str(path), "PATH"), flags=re.DOTALL)


def page(path: Path, folder: Path) -> str:
    text = write_page(ps.open(path), folder / "report.html").read_text(encoding="utf-8")
    return text.replace(str(path), "PATH").replace(path.name, "NAME").replace(path.stem, "NAME")


def exported(path: Path, folder: Path) -> pd.DataFrame:
    ps.open(path).export(folder / "t.parquet")
    return pd.read_parquet(folder / "t.parquet")


def packed(path: Path, folder: Path) -> pd.DataFrame:
    target = folder / "t.zip"
    pack(path, target)
    return ps.open(target).to_frame()


def alike(kind: str, found: Any, expected: Any) -> str:
    """How what a reader shows compares with what it shows of undisturbed results."""
    if kind == "to_xarray":
        return _alike_arrays(found, expected)
    if isinstance(found, pd.DataFrame):
        if found.equals(expected):
            return RIGHT
        return UNDONE if _part_of(found, expected) else WRONG
    if found == expected:
        return RIGHT
    return UNDONE if re.search(r"not (done|scored)", found) else WRONG


def _alike_arrays(found: Any, expected: Any) -> str:
    if found.keys() != expected.keys():
        return WRONG
    ending = RIGHT
    for component, arrays_of in expected.items():
        mine = found[component]
        if mine.keys() != arrays_of.keys():
            return WRONG
        for name, values in arrays_of.items():
            if np.array_equal(mine[name], values, equal_nan=values.dtype.kind == "f"):
                continue
            metric = next((m for m in METRICS if name.startswith(m)), "")
            status = mine.get(f"{metric}_status")
            if status is None or status.shape != values.shape:
                return WRONG
            known = status != Status.NOT_DONE
            same = (mine[name] == values) | (mine[name] != mine[name]) & (values != values)
            if name.endswith("_estimate") or not same[known].all():
                return WRONG
            ending = UNDONE
    return ending


def _part_of(found: pd.DataFrame, expected: pd.DataFrame) -> bool:
    """Whether a table has only rows of another."""
    if list(found.columns) != list(expected.columns) or len(found) >= len(expected):
        return False
    whole = {tuple(map(str, row)) for row in expected.itertuples(index=False)}
    return {tuple(map(str, row)) for row in found.itertuples(index=False)} <= whole


def outcome(kind: str, read: Callable[[], Any], expected: Any) -> tuple[str, str]:
    try:
        found = read()
    except ps.BadInput as error:
        return (RAW if "\n" in str(error) else LINE), str(error)
    except Exception as error:
        return RAW, f"{type(error).__name__}: {error}"
    return alike(kind, found, expected), ""


def corrupted(
    sweep: Sweep,
    expected: Mapping[str, Any],
    whole: Mapping[str, bytes],
    key: str,
    how: str,
    seed: int,
    work: Path,
    outcomes: Outcomes,
) -> None:
    """Corrupt a copy of results in one way, and see what comes of it."""
    out = work / sweep.out.name
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(sweep.out, out)
    if not CORRUPTIONS[how](sweep, out, key, random.Random(seed)):
        return
    example = f"{sweep.name}: {key}, {how} (seed {seed})"
    for kind, read in seen(out, work):
        if kind in SLOW and seed % SLOW[kind]:
            continue
        ending, said = outcome(kind, read, expected[kind])
        outcomes.add(f"{how}: {kind}", ending, f"{example}: {said}")
    try:
        check = ps.check(out)
        clean, said = not check.damages and not check.undone and check.done == check.blocks, ""
    except ps.BadInput as error:
        clean, said = False, str(error)
    except Exception as error:
        outcomes.add(f"{how}: check", RAW, f"{example}: {error!r}")
        return
    before = _bits(out)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            sweep.again(out)
    except ps.BadInput as error:
        outcomes.add(f"{how}: check, --resume", LINE, f"{example}: {error}")
        return
    except Exception as error:
        outcomes.add(f"{how}: check, --resume", RAW, f"{example}: {error!r}")
        return
    again = _bits(out) == whole and not ps.check(out).damages
    ending = AGAIN if again else NOT_AGAIN
    if again and clean and before != whole:
        ending = HIDDEN
    outcomes.add(f"{how}: check, --resume", ending, f"{example}: {said}")


def _bits(out: Path) -> dict[str, bytes] | None:
    """What plain Zarr reads, and all metadata but what changes from run to run; None if it
    cannot."""
    try:
        return arrays(out) | {
            key: path.read_bytes()
            for key, path in files(out).items()
            if key.endswith("zarr.json") and not key.startswith("summary/")
        }
    except Exception:
        return None


def attack(folder: Path, seed: int, until: Until) -> Outcomes:
    """Every file in every way, in an order drawn from the seed, until time is up."""
    outcomes = Outcomes((RIGHT, LINE, UNDONE, AGAIN))
    made = list(sweeps(folder))
    expected = {s.name: {kind: read() for kind, read in seen(s.out, folder)} for s in made}
    whole = {s.name: _bits(s.out) or {} for s in made}
    cases = [(s, key, how) for s in made for key in files(s.out) for how in CORRUPTIONS]
    random.Random(seed).shuffle(cases)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for number, (sweep, key, how) in enumerate(cases):
        of = (expected[sweep.name], whole[sweep.name])
        corrupted(sweep, *of, key, how, seed + number, work, outcomes)
        if until():
            break
    return outcomes


def main(seconds: float, seed: int = 0) -> Outcomes:
    """`attack` in a folder of its own, for so many seconds."""
    import tempfile
    import time

    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        return attack(Path(folder), seed, lambda: time.monotonic() > end)


if __name__ == "__main__":
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(found)
    print(json.dumps({what: dict(row) for what, row in found.counts.items()}))
