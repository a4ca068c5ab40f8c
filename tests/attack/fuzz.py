"""Hostile specs, pairs, overrides and paths: each ends with its work done, or with one line and
status 2; quickly."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from attack.table import Outcomes, Until
from patchsweep.cli import _status
from tiny import build, rows, save, write_pairs

DONE, REFUSED = "done", "one line, status 2"
SECONDS = 60  # longer is a hang
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3.5, 10**9, 2**63, 10**40, float("nan"), float("inf"), 1e-320),
    *("", " ", "x" * 5000, "x/" * 3000, "~nosuchuser/x", "~", ".", "..", "/", "/dev/null/x"),
    *("a\0b", "a/../b", "../../x", "\x1b[31mred", "a\nb", "\u2028", "ключ", "%s%n", "{}", "'"),
    *("s3://user:secret@bucket/x", "s3://bucket/x?X-Amz-Signature=secret", "file://host/x"),
    *("memory://", "http://localhost/x", "1e9", "2024-13-45", "0x10", "50%", "-5%", "auto"),
    *([], {}, [[]], [None], [1, 1], {"a": {}}, {"": ""}, {"x" * 300: 1}, DEEP, ["a"] * 200_000),
    *(list(range(3000)), {"mean": {"prompts": "clean"}}, {"gaussian": {"sigma": [0]}}),
    *("head_z", "head_z.99.99@END", ["neuron"], ["sae_feature"], {"kl": {"at": "a/../b"}}),
    *({"task": "ioi", "n": 10**9}, {"resample": {"samples": 10**9}}, {"probe": {"file": "\0"}}),
]
TEXTS = [
    "a: &x [1, 1]\nb: *x\n",
    "a: &a [l]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    "model: 2024-13-45\n",
    "out: 2024-01-01T99:99:99Z\n",
    "token_budget: " + "9" * 5000 + "\n",
    "components: " + "[" * 5000 + "]" * 5000 + "\n",
    "components: " + "{a: " * 5000 + "\n",
    "seed: 1:60:99\nout: 0b2\n",
    "? [a, b]\n: c\n",
    "!!python/object:os.system x\n",
    "!!int 'x'\n",
    "out: !!timestamp x\n",
    "a: !!set {b, c}\n",
    "<<: [a, b]\n",
    "%YAML 9.9\n---\na: b\n",
    "--- a\n--- b\n",
    "\ufeffmodel: x\n",
    "\t\tx",
    "a: \x00b",
]


def attack(folder: Path, seed: int, until: Until) -> Outcomes:
    """Mutate until it is enough."""
    rng = random.Random(seed)
    base = _base(folder)
    kinds = {
        "a spec with another value": _other_value,
        "a spec with other bytes": _other_bytes,
        "a spec of its own": _own_text,
        "--set": _override,
        "pairs with another value": _other_pair,
        "pairs with other bytes": _other_pair_bytes,
        "paths and options": _paths,
    }
    found = Outcomes((DONE, REFUSED))
    names = list(kinds)
    there = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    try:
        while True:
            for name in names:
                arguments = kinds[name](folder, copy.deepcopy(base), rng)
                ending, example = ended(arguments)
                found.add(name, ending, f"{arguments!r:.600}: {example:.600}")
            if until():
                return found
    finally:
        os.chdir(there)


def ended(arguments: list[str]) -> tuple[str, str]:
    """How a command ended, and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _patience():
        try:
            status = _status(arguments)
        except _Hangs:
            return "hangs", ""
        except BaseException as error:  # what a command must never let out
            return "traceback", f"{type(error).__name__}: {error}"
    said = err.getvalue()
    if "secret" in said or "secret" in out.getvalue():
        return "says a secret", said
    if status == 0:
        return DONE, said
    if status != 2:
        return f"status {status}", said
    whole = said.startswith("patchsweep: ") and said.count("\n") == 1 and len(said) < 2500
    return (REFUSED, "") if whole else ("not one line", said)


class _Hangs(BaseException):
    pass


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def enough(_: int, __: FrameType | None) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, enough)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _base(folder: Path) -> dict[str, Any]:
    """A spec with something in every part; its model and its pairs."""
    model = save(folder / "model", build(2))
    write_pairs(folder / "pairs.jsonl", rows(3))
    return {
        "model": str(model),
        "device": "cpu",
        "prompts": {"file": "pairs.jsonl", "n": 2, "seed": 0},
        "corrupt": "pairs",
        "source": ["other"],
        "components": ["head_z", "mlp_out"],
        "positions": "each",
        "windows": [2],
        "sets": {"two": ["head_z.0.1@-1", "mlp_out.1"]},
        "metrics": ["logit_diff", {"kl": {"at": "END"}}],
        "direction": "denoise",
        "token_budget": 200,
        "out": "r.zarr",
    }


MORE = {
    "prefilter": {"keep": "30%", "audit": 5},
    "edges": {"eap_ig": {"steps": 2}},
    "circuit": {"ranking": ["mlp_out.1"], "sizes": [1]},
    "estimate": True,
    "sae": {"file": "sae.safetensors"},
    "max_memory": {"cpu": "1GB"},
    "offload_folder": "weights",
    "provenance": "full",
    "remote": False,
}


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key)."""
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    found = [(data, key) for key, _ in items]
    for _, part in items:
        if isinstance(part, dict | list):
            found += _places(part)
    return found


def _mutated(data: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(_places(data))
        what = rng.random()
        if what < 0.8:
            container[key] = rng.choice(VALUES)
        elif isinstance(container, dict) and what < 0.9:
            container[rng.choice(["", "x" * 300, "modl", 1, "a/../b", "nan"])] = rng.choice(VALUES)
        else:
            del container[key]
        if not data:
            break
    return data


def _written(folder: Path, name: str, content: str | bytes) -> str:
    raw = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    (folder / name).write_bytes(raw)
    return str(folder / name)


def _planned(path: str, rng: random.Random) -> list[str]:
    """Mostly planned only, which is quick."""
    run = ["run", path, "--overwrite"]
    return run if rng.random() < 0.05 else ["plan", path]


def _other_value(folder: Path, base: dict[str, Any], rng: random.Random) -> list[str]:
    for key in rng.sample(sorted(MORE), rng.choice([0, 0, 1, 2])):
        base[key] = copy.deepcopy(MORE[key])
    text = yaml.safe_dump(_mutated(base, rng))
    return _planned(_written(folder, "spec.yaml", text), rng)


def _other_bytes(folder: Path, base: dict[str, Any], rng: random.Random) -> list[str]:
    kind = rng.choice(["yaml", "toml"])
    text = yaml.safe_dump(base) if kind == "yaml" else _toml(base)
    return ["plan", _written(folder, f"spec.{kind}", _scrambled(text.encode(), rng))]


def _toml(base: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {_toml_value(value)}" for key, value in base.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value)


def _scrambled(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice([1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(5)
        if what == 0:
            del data[at : at + rng.randrange(20)]
        elif what == 1:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
        elif what == 2:
            data[at:at] = rng.choice([b"[" * 3000, b"9" * 5000, b"*x", b"&x ", b"\xed\xa0\xbd"])
        elif what == 3:
            data[at:at] = data[at : at + rng.randrange(200)]
        else:
            data[at:at] = rng.choice(
                [b": ", b"- ", b"\n", b'"', b"'", b"{", b"}", b",", b"\\u0000"]
            )
    return bytes(data)


def _own_text(folder: Path, _: dict[str, Any], rng: random.Random) -> list[str]:
    raw = rng.choice(TEXTS).encode()
    raw = _scrambled(raw, rng) if rng.random() < 0.5 else raw
    return ["plan", _written(folder, rng.choice(["own.yaml", "own.toml"]), raw)]


def _override(folder: Path, base: dict[str, Any], rng: random.Random) -> list[str]:
    path = _written(folder, "spec.yaml", yaml.safe_dump(base))
    keys = rng.choice([*base, *MORE, "prompts.n", "prompts.seed", "a.b", ".", "x." * 500, "sets.x"])
    value = rng.choice([*VALUES, *TEXTS])
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    return ["plan", path, "--set", f"{keys}={text}".replace("\0", "\\0")]


def _other_pair(folder: Path, base: dict[str, Any], rng: random.Random) -> list[str]:
    made = rows(3)
    made[0] |= {"group": "g", "others": {"random": made[0]["clean"]}, "align": "end"}
    made[rng.randrange(3)] = _mutated(made[rng.randrange(3)], rng)
    name = rng.choice(["pairs.jsonl", "pairs.csv"])
    if name.endswith("l"):
        text = "".join(f"{json.dumps(row)}\n" for row in made)
    else:
        text = "clean,corrupt,answer,wrong,labels\n" + "".join(
            ",".join(f'"{json.dumps(v)}"' for v in row.values()) + "\n" for row in made
        )
    return _with_pairs(folder, base, f"other-{name}", text.encode(errors="surrogatepass"))


def _other_pair_bytes(folder: Path, base: dict[str, Any], rng: random.Random) -> list[str]:
    raw = _scrambled((folder / "pairs.jsonl").read_bytes(), rng)
    return _with_pairs(folder, base, rng.choice(["bytes.jsonl", "bytes.csv"]), raw)


def _with_pairs(folder: Path, base: dict[str, Any], name: str, raw: bytes) -> list[str]:
    _written(folder, name, raw)
    base["prompts"]["file"] = name
    return ["plan", _written(folder, "spec.yaml", yaml.safe_dump(base))]


def _paths(folder: Path, base: dict[str, Any], rng: random.Random) -> list[str]:
    texts = [v.replace("\0", "") for v in VALUES if isinstance(v, str)]
    texts += [str(folder), str(folder / "model"), "pairs.jsonl", "-x", "--", "9" * 5000, "1e9"]
    some, other = rng.choice(texts), rng.choice(texts)
    spec = _written(folder, "spec.yaml", yaml.safe_dump(base))
    commands: list[Callable[[], list[str]]] = [
        lambda: [rng.choice(["show", "check", "verify", "plan", "run", "plot"]), some],
        lambda: ["run", spec, "--out", some, "--resume"],
        lambda: ["export", some, other],
        lambda: ["plot", some, "--out", other],
        lambda: ["verify", some, "--cells", other, "--seed", some],
        lambda: ["reproduce", some, "--model", other, "--n", "1"],
        lambda: ["reproduce", "greater-than", "--model", some, "--n", other],
        lambda: [some, other],
    ]
    return rng.choice(commands)()
