"""Input that is too deep, too large or not what it says: one line, at once, and no secret in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import patchsweep as ps
from attack import corrupt, fuzz, kills
from patchsweep.cli import _status
from patchsweep.errors import BadInput, one_line
from patchsweep.inputs.limits import PAIRS, SAMPLES
from patchsweep.plan import plan
from patchsweep.reproduce.experiment import Table
from patchsweep.results.table import csv_text, no_formula
from patchsweep.spec import load_spec, parse_settings, parse_spec
from tiny import build, rows, save, tokenizer, write_pairs, write_spec

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)
BASE = {"model": "m", "prompts": {"file": "p.jsonl"}, "components": ["head_z"]}


def refused(call: Any, words: str) -> None:
    """In one line that is no longer than it need be, and soon."""
    began = time.monotonic()
    with pytest.raises(BadInput, match=words) as error:
        call()
    assert time.monotonic() - began < 60
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 2100


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.yaml", BOMB, "s.yaml:2: not YAML: alias .*: aliases are not taken"),
        ("s.yaml", "a: &a [*a]", "aliases are not taken"),
        ("s.yaml", "<<: &a {b: c}\nd: *a", "aliases are not taken"),
        ("s.yaml", "a: " + "[" * 50_000, "more than 20 lists and mappings within one another"),
        ("s.yaml", "a: " + "{a: " * 50_000, "more than 20 lists"),
        ("s.toml", "a = " + "[" * 50_000, "more than 20 lists"),
        ("s.toml", ".".join("a" * 1000) + " = 1", "more than 20 lists"),
        ("s.yaml", "seed: " + "9" * 5000, "thousands of digits: use at most"),
        ("s.toml", "seed = " + "9" * 5000, "thousands of digits: use at most"),
        ("s.yaml", "seed: " + "9" * 4000, "the number is too large: use at most"),
        ("s.yaml", "a: !!timestamp x", "a value is not what it says"),
        ("s.yaml", "a: !!bool x", "a value is not what it says"),
        ("s.yaml", "a: !!int ''", "a value is not what it says"),
        ("s.yaml", "a: " + "x" * (1 << 18), "more than 262,144 bytes"),
        ("s.yaml", "? " + "x" * 300 + "\n: 1", "has 300 characters: use at most 200"),
        ("s.yaml", "model: [" + "a," * 110_000 + "]", "more than 100,000 entries"),
        ("s.yaml", "out: " + "x" * 5000, "s.yaml: out: .*the name is too long"),
        ("s.yaml", "model: " + "x/" * 3000, "s.yaml: model: .*the name is too long"),
        ("s.yaml", 'model: "a\\0b"', "s.yaml: model: .*the character NUL"),
        ("s.yaml", 'model: "\\ud83d"', "surrogate|not YAML"),
    ],
    ids=lambda x: x[:20],
)
def test_files_of_specs(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    refused(lambda: load_spec(tmp_path / name), words)


def test_dates_are_text(tmp_path: Path) -> None:
    """Also those that do not exist."""
    for date in ("2024-13-45", "2024-01-01T99:99:99Z", "2024-01-02"):
        (tmp_path / "s.yaml").write_text(json.dumps(BASE)[:-1] + f', "out": {date}}}')
        assert load_spec(tmp_path / "s.yaml").out == Path(date)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": {"task": "ioi", "n": 10**9}}, f"prompts.n: .*less than or equal to {PAIRS}"),
        ({"prompts": {"task": "ioi", "n": 10**40}}, "prompts.n: the number is too large"),
        (
            {"corrupt": {"gaussian": {"samples": 10**9}}},
            f"samples.*less than or equal to {SAMPLES}",
        ),
        ({"source": {"resample": {"samples": 10**9}}}, f"samples.*less than or equal to {SAMPLES}"),
        (
            {"prompts": {"file": "~nosuchuser/p.jsonl"}},
            "no such user's home: write the path",
        ),
        ({"metrics": [{"kl": {"at": "a/../b"}}]}, "metric 'kl_at_a/../b': use letters"),
        ({"metrics": [{"kl": {"at": "x" * 220}}]}, "has 226 characters: use at most 200"),
        ({"sets": {"x" * 300: ["mlp_out.1"]}}, "has 300 characters: use at most 200"),
    ],
    ids=str,
)
def test_specs_as_data(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """In a file and in a call."""
    data = {**BASE, **changes}
    (tmp_path / "s.yaml").write_text(json.dumps(data))
    refused(lambda: load_spec(tmp_path / "s.yaml"), words)
    if "write the path" not in words:
        refused(lambda: parse_spec(data), words)


def test_a_list_that_holds_itself() -> None:
    deep: Any = []
    deep.append(deep)
    refused(lambda: parse_settings({"components": deep}), "more than 20 lists")
    refused(lambda: parse_settings({"token_budget": 10**5000}), "the number is too large")
    refused(lambda: parse_settings({"positions": ["x"] * 100_001}), "more than 100,000 entries")


def test_many_entries_take_no_time() -> None:
    entries = [*range(90_000), 5]
    refused(lambda: parse_settings({"components": ["embed"], "positions": entries}), "5 is there")


def test_values_are_cut() -> None:
    refused(lambda: parse_settings({"components": ["x " * 120] * 2}), "…|unknown component")
    refused(lambda: parse_settings({"components": {"a": ["y" * 100] * 900}}), "…")
    assert one_line("x" * 5000) == "x" * 200 + "…" + "x" * 75
    assert one_line("\x1b[31m") == r"\x1b[31m"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"clean": ' + "[" * 100_000, ":1: not a JSON object"),
        ('{"clean": ' + "[" * 50 + "]" * 50 + "}", ":1: .*more than 20 lists"),
        ('{"clean": "a", "labels": {"x": ' + "9" * 5000 + "}}", ":1: not a JSON object"),
        ('{"clean": "a", "labels": {"x": ' + "9" * 4000 + "}}", "labels.x: the number is too"),
        ('{"clean": "A \\ud83d", "answer": " b"}', "clean: half a character"),
        (json.dumps({"clean": "a " * 600_000, "answer": " b"}), "1,200,000 characters: use at"),
        (json.dumps({**rows(1)[0], "labels": {"a/../b": 1}}), "label 'a/../b': use letters"),
        (json.dumps({**rows(1)[0], "labels": {"x" * 201: 1}}), "has 201 characters"),
        (json.dumps({**rows(1)[0], "labels": {"a\nb": 1}}), "use letters"),
    ],
    ids=lambda x: x[:20],
)
def test_pairs(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_text(f"{row}\n")
    refused(lambda: ps.read_pairs(tmp_path / "p.jsonl", tokenizer()), words)
    name, keep = tmp_path / "p.csv", io.StringIO()
    csv.writer(keep).writerows([["clean", "answer", "labels"], ["a b", " c", "[" * 100_000]])
    name.write_text(keep.getvalue())
    refused(lambda: ps.read_pairs(name, tokenizer()), ":2: labels is not JSON")


def test_too_many_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsweep.pairs.files.PAIRS", 3)
    write_pairs(tmp_path / "p.jsonl", rows(4))
    refused(lambda: ps.read_pairs(tmp_path / "p.jsonl", tokenizer()), "4: more than 3 pairs")
    monkeypatch.setattr("patchsweep.pairs.files.PAIRS_BYTES", 100)
    refused(lambda: ps.read_pairs(tmp_path / "p.jsonl", tokenizer()), "more than 100 bytes")


def test_calls(tmp_path: Path) -> None:
    loaded = ps.wrap(build(2), tokenizer(), "tiny")
    pairs = [ps.make_pair(loaded.tokenizer, **row) for row in rows(2)]
    long, zero = tmp_path / ("x" * 5000), f"{tmp_path}/a\0b"
    for bad, words in ((long, "the name is too long"), (zero, "the character NUL")):
        for use in (
            ps.open,
            ps.check,
            lambda out: ps.sweep(loaded, pairs, out=out, components=["embed"]),
            lambda path: ps.read_pairs(f"{path}.jsonl", tokenizer()),
            lambda path: ps.load_spec(f"{path}.yaml"),
            lambda path: ps.load_model(str(path)),
        ):
            refused(lambda use=use, bad=bad: use(bad), words)
    refused(lambda: ps.load_model("~nosuchuser/model"), "write the path in full")
    refused(lambda: ps.tasks.ioi(tokenizer(), n=10**9), f"at most {PAIRS:,}")
    refused(lambda: ps.tasks.ioi(tokenizer(), n=10**5000), f"at most {PAIRS:,}")
    assert not [*tmp_path.iterdir()]


def test_too_large_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = ps.wrap(build(2), tokenizer(), "tiny")
    pairs = [ps.make_pair(loaded.tokenizer, **row) for row in rows(3)]
    settings: dict[str, Any] = {
        "components": ["head_z"],
        "direction": "noise",
        "out": tmp_path / "r",
    }
    monkeypatch.setattr(plan, "BLOCKS", 1)
    refused(
        lambda: ps.sweep(loaded, pairs, token_budget=60, **settings), "at most 1 can be planned"
    )
    monkeypatch.setattr("patchsweep.plan.sources.RUNS", 5)
    noise = {"gaussian": {"sigma": [1, 2], "samples": 1}}
    refused(lambda: ps.sweep(loaded, pairs, corrupt=noise, **settings), "6 pairs x samples, over")


SECRET = "hunter2"
URLS = [
    f"s3://user:{SECRET}@bucket/r.zarr",
    f"s3://{SECRET}@bucket/r.zarr",
    f"s3://AKIA:{SECRET}/x@bucket/r.zarr",
    f"s3://bucket/r.zarr?X-Amz-Signature={SECRET}",
    f"az://c/r.zarr?sv=1&sig={SECRET}",
    f"https://x.y/r.zarr?token={SECRET}",
    f"https://user:{SECRET}@x.y/z",
]


@pytest.mark.parametrize("url", URLS)
def test_credentials_are_refused_unsaid(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, Path("m"))
    for arguments in (
        ["show", url],
        ["check", url],
        ["run", url],
        ["run", f"{url}.yaml"],
        ["run", str(spec), "--out", url],
        ["run", str(spec), f"--out={url}"],
        ["run", str(spec), "--set", f"out={url}"],
        ["run", str(spec), "--set", f"model={url}"],
        ["export", "r.zarr", f"{url}.zip"],
        ["plot", "r.zarr", "--out", url],
        ["reproduce", "ioi", "--model", url],
        [url],
        ["--traceback", "show", url],
        ["--traceback", "verify", "r.zarr", "--model", url],
    ):
        assert _status(arguments) == 2, arguments
        said = capfd.readouterr()
        assert SECRET not in said.out + said.err
        assert said.err.startswith("patchsweep: ")
        assert "credentials come from the environment" in said.err
    for key, value in (
        ("out", url),
        ("model", url),
        ("sae", {"file": url}),
        ("prompts", {"file": url}),
        ("source", {"mean": {"prompts": url}}),
        ("metrics", [{"probe": {"file": url}}]),
        ("sets", {url: ["mlp_out.1"]}),
    ):
        with pytest.raises(BadInput) as error:
            parse_spec({**BASE, key: value})
        assert SECRET not in str(error.value)
        assert "credentials" in str(error.value)
    for use in (ps.open, ps.load_model, ps.load_spec, lambda at: ps.read_pairs(at, tokenizer())):
        with pytest.raises(BadInput) as error:
            use(url)
        assert SECRET not in str(error.value)
    assert SECRET not in one_line(f"cannot read {url}: 403")
    assert {p.name for p in tmp_path.iterdir()} == {"spec.yaml"}


def test_a_plain_url_is_said_in_full() -> None:
    for url in ("s3://bucket/a/b.zarr", "file:///a%20b/r.zarr", "s3://bucket/r.zarr/x:y"):
        assert one_line(f"no results at {url}: check") == f"no results at {url}: check"


def test_what_results_say_of_where_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host and no absolute path, in any file, unless asked for; whoever works elsewhere goes
    on with them, and verifies them."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(socket, "gethostname", lambda: "myhost.example")
    model = save(there / "model", build(2))
    write_pairs(there / "pairs.jsonl", rows(2))
    write_pairs(here / "mean.jsonl", rows(2))
    np.save(there / "probe.npy", np.ones(16, np.float32))
    save_file({"v": torch.ones(16)}, here / "v.safetensors")
    probe = {"component": "mlp_out", "layer": 1, "position": -1, "file": str(there / "probe.npy")}
    settings: dict[str, Any] = {
        "components": ["mlp_out"],
        "metrics": ["logit_diff", {"probe": probe}],
        "source": [
            "other",
            {"mean": {"prompts": str(here / "mean.jsonl")}},
            {"vector": {"file": str(here / "v.safetensors")}},
        ],
        "direction": "noise",
        "prompts": {"file": str(there / "pairs.jsonl")},
        "out": str(here / "r.zarr"),
    }
    spec = write_spec(there, model, **settings)
    assert _status(["run", str(spec)]) == 0
    out = here / "r.zarr"
    for file in out.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            assert b"myhost" not in raw, file
            assert str(tmp_path).encode() not in raw, file
    said = ps.open(out).attrs
    assert "host" not in said
    assert said["model"] == said["spec"]["model"] == "…/model"
    assert said["spec"]["prompts"]["file"] == "…/pairs.jsonl"
    assert said["spec"]["metrics"][1]["probe"]["file"] == "…/probe.npy"
    assert said["spec"]["source"][1]["mean"]["prompts"] == "mean.jsonl"
    assert said["spec"]["out"] == "r.zarr"

    refused(lambda: ps.verify(out), "names the model '…/model'")
    refused(lambda: ps.verify(out, trust=True), "say where it is with --model")
    (here / "probe.npy").write_bytes((there / "probe.npy").read_bytes())
    assert _status(["verify", str(out), "--cells", "3", "--model", str(model)]) == 0
    monkeypatch.chdir(there)
    assert _status(["run", str(spec), "--resume"]) == 0
    more = ["--set", "metrics=" + json.dumps([*settings["metrics"], "kl"])]
    assert _status(["run", str(spec), "--append", *more]) == 0
    assert ps.open(out).metrics[-1] == "kl"

    full = there / "full.zarr"
    assert _status(["run", str(spec), "--set", "provenance=full", "--out", str(full)]) == 0
    said = ps.open(full).attrs
    assert (said["host"], said["model"]) == ("myhost.example", str(model))
    assert said["spec"]["prompts"]["file"] == str(there / "pairs.jsonl")


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(A1)", "\t=1", "\r=1", "-0.5 ± 0.1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert no_formula(text) == f"'{text}"
    table = pd.DataFrame({"token": [text, " a"], "kl": [-0.5, 1.0]})
    back = [*csv.reader(io.StringIO(csv_text(table), newline=""))]
    assert back == [["token", "kl"], [f"'{text}", "-0.5"], [" a", "1"]]
    written = Table("t", ("a", text), ((text, "-0.5"), ("−9", "+50 %"))).csv()
    back = [*csv.reader(io.StringIO(written, newline=""))]
    assert back == [["a", f"'{text}"], [f"'{text}", "-0.5"], ["−9", "+50 %"]]


def test_the_page_has_no_formula(tmp_path: Path) -> None:
    import base64

    from patchsweep.report.page import page

    loaded = ps.wrap(build(2), tokenizer(), "tiny")
    pair = ps.make_pair(loaded.tokenizer, **{**rows(1)[0], "labels": {"=cmd": -1}})
    settings: dict[str, Any] = {"components": ["mlp_out"], "positions": ["=cmd"]}
    results = ps.sweep(loaded, [pair], out=tmp_path / "r.zarr", **settings)
    packed = re.search(r"data:application/gzip;base64,([^\"]+)", page(results))
    assert packed
    text = gzip.decompress(base64.b64decode(packed[1])).decode()
    assert "'=cmd" in text
    assert ",=cmd" not in text


def test_some_hostile_input(tmp_path: Path) -> None:
    tries = iter(range(15))
    found = fuzz.attack(tmp_path, 0, lambda: next(tries, None) is None)
    assert found.holds, str(found)
    assert sum(row.total() for row in found.counts.values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_much_hostile_input(tmp_path: Path, seed: int) -> None:
    tries = iter(range(400))
    found = fuzz.attack(tmp_path, seed, lambda: next(tries, None) is None)
    assert found.holds, str(found)


def test_some_kills(tmp_path: Path) -> None:
    found = kills.attack(tmp_path, 0, lambda: True)
    assert found.holds, str(found)
    assert {kind: row.total() for kind, row in found.counts.items()} == dict.fromkeys(
        kills.KINDS, 1
    )


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    tries = iter(range(60))
    found = kills.attack(tmp_path, 1, lambda: next(tries, None) is None)
    assert found.holds, str(found)


def test_some_corruptions(tmp_path: Path) -> None:
    tries = iter(range(24))
    found = corrupt.attack(tmp_path, 1, lambda: next(tries, None) is None)
    assert found.holds, str(found)
    assert {what.split(":")[0] for what in found.counts} == {*corrupt.CORRUPTIONS}


@pytest.mark.slow
def test_every_corruption(tmp_path: Path) -> None:
    """Of every file, in every way."""
    found = corrupt.attack(tmp_path, 0, lambda: False)
    assert found.holds, str(found)
