"""Sweeps through the library: bad input, values that are not finite, determinism, memory.

The small model, pairs and spec here are those of test_cli.py and test_resume.py too.
"""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import patchsweep as ps
from patchsweep.sites import Status

WORDS = ["?", *string.ascii_letters]
BROKEN = "Z"  # the word whose embedding `broken` makes infinite


def build(layers: int = 3, seed: int = 0, intermediate_size: int = 24) -> LlamaForCausalLM:
    """A tiny Llama whose random weights are large enough for effects far above rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a word."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def save(folder: Path, hf_model: PreTrainedModel | None = None) -> Path:
    """The folder, with a model and the tokenizer in it."""
    (hf_model or build()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def broken() -> LlamaForCausalLM:
    hf_model = build()
    with torch.no_grad():
        hf_model.get_input_embeddings().weight[WORDS.index(BROKEN)] = float("inf")
    return hf_model


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of 5 to 8 lower-case letters that differ in one to three places."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = rng.integers(5, 9)
        clean = rng.choice(list(string.ascii_lowercase), length)
        corrupt = clean.copy()
        for place in rng.permutation(length - 1)[: rng.integers(1, 4)]:
            corrupt[place] = rng.choice(list(string.ascii_uppercase[:20]))
        answer, wrong = rng.choice(list(string.ascii_lowercase), 2, replace=False)
        made.append(
            {
                "clean": " ".join(clean),
                "corrupt": " ".join(corrupt),
                "answer": f" {answer}",
                "wrong": f" {wrong}",
                "labels": {"END": -1},
            }
        )
    return made


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    return path


def write_spec(folder: Path, model: Path, **changes: Any) -> Path:
    """A spec beside `pairs.jsonl`, with some keys changed (None: left out)."""
    data = {
        "model": str(model),
        "device": "cpu",
        "prompts": {"file": "pairs.jsonl"},
        "components": ["head_z", "mlp_out", "resid_pre"],
        "direction": "both",
        "metrics": ["logit_diff", "prob", "rank", "kl"],
        "out": str(folder / "r.zarr"),
        **changes,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return path


def arrays(path: Path) -> dict[str, bytes]:
    """Every array of a results folder, as raw bytes."""
    members = zarr.open_group(path, mode="r").members(max_depth=None)
    found = {n: np.asarray(a[...]) for n, a in members if isinstance(a, zarr.Array)}
    assert found
    text = {n: json.dumps(a.tolist()).encode() for n, a in found.items() if a.dtype.kind in "OUT"}
    return {n: text[n] if n in text else a.tobytes() for n, a in found.items()}


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of metrics, and of their statuses, of every component."""
    group = zarr.open_group(path, mode="r")
    metrics = [m["name"] for m in group.attrs["metrics"]]
    names = [
        f"{component}/{metric}{suffix}"
        for component in group.attrs["components"]
        for metric in metrics
        for suffix in ("", "_status")
    ]
    return {name: np.asarray(group[name][...]) for name in names}


SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out", "resid_pre"],
    "metrics": ["logit_diff", "prob", "rank", "kl"],
    "direction": "both",
}


@contextmanager
def one_thread() -> Iterator[None]:
    """For tiny products more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> ps.Model:
    return ps.wrap(build(), tokenizer(), "tiny")


def pairs_of(model: ps.Model, made: list[dict[str, Any]]) -> list[ps.Pair]:
    return [ps.make_pair(model.tokenizer, **row) for row in made]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"components": ["head_x"]}, ["unknown component 'head_x'", "head_z"]),
        ({"metrics": ["logit_dif"]}, ["unknown metric 'logit_dif'", "logit_diff"]),
        ({"metric": ["kl"]}, ["unknown key 'metric'", "metrics"]),
        ({"direction": "sideways"}, ["direction", "denoise", "sideways"]),
        ({"positions": [8]}, ["8 is outside every prompt", "use -8 to 7"]),
        ({"positions": ["S2"]}, ["unknown label 'S2'", "END"]),
        ({"token_budget": 0}, ["token_budget", "above 0"]),
        ({"token_budget": 3}, ["token_budget 3 is too small", "it needs"]),
    ],
)
def test_bad_settings(
    model: ps.Model, tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ps.BadInput) as error:
        pairs = pairs_of(model, rows(6))
        ps.sweep(model, pairs, out=tmp_path / "r.zarr", **{**SETTINGS, **settings})
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_pairs(model: ps.Model, tmp_path: Path) -> None:
    with pytest.raises(ps.BadInput, match="no prompt pairs: give at least one"):
        ps.sweep(model, [], out=tmp_path / "r.zarr", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_no_wrong_answer(model: ps.Model, tmp_path: Path) -> None:
    made = rows(2)
    del made[1]["wrong"]
    pairs = pairs_of(model, made)
    with pytest.raises(ps.BadInput, match="pair 1 has no wrong answer"):
        ps.sweep(model, pairs, out=tmp_path / "r.zarr", **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    only_kl = {**SETTINGS, "metrics": ["kl", "prob"]}
    assert ps.sweep(model, pairs, out=tmp_path / "r.zarr", **only_kl).complete


def test_results_of_another_sweep(model: ps.Model, tmp_path: Path) -> None:
    """Going on needs the same pairs, settings and weights."""
    out, pairs = tmp_path / "r.zarr", pairs_of(model, rows(2))
    ps.sweep(model, pairs, out=out, **SETTINGS)
    before = arrays(out)
    other = ps.wrap(build(seed=1), tokenizer(), "tiny")
    for changed, what in (
        ((model, pairs_of(model, rows(2, seed=1)), SETTINGS), "other prompts"),
        ((model, pairs, {**SETTINGS, "components": ["head_z"]}), "components"),
        ((model, pairs, {**SETTINGS, "metrics": ["kl"]}), "other metrics"),
        ((other, pairs, SETTINGS), "another model"),
    ):
        with pytest.raises(ps.BadInput, match=f"results of another sweep .*{what}"):
            ps.sweep(changed[0], changed[1], out=out, resume=True, **changed[2])
    with pytest.raises(ps.BadInput, match=r"exists already: use --resume .* or --overwrite"):
        ps.sweep(model, pairs, out=out, **SETTINGS)
    assert arrays(out) == before
    ps.sweep(other, pairs, out=out, overwrite=True, **SETTINGS)
    assert arrays(out) != before
    assert {p.name for p in tmp_path.iterdir()} == {"r.zarr", ".r.zarr.job"}


def test_going_on_keeps_the_token_budget(
    model: ps.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free by now: the waves have to be the same ones."""
    pairs = pairs_of(model, rows(3))
    for out, budget in (("a", 60), ("b", 300), ("a", 300)):
        monkeypatch.setattr("patchsweep.planning.auto_budget", lambda *_, b=budget: (b, b))
        before = arrays(tmp_path / out) if (tmp_path / out).exists() else {}
        results = ps.sweep(model, pairs, out=tmp_path / out, resume=bool(before), **SETTINGS)
        assert results.attrs["token_budget"] == {"a": 60, "b": 300}[out]
        assert before in ({}, arrays(tmp_path / out))
    assert arrays(tmp_path / "a") != arrays(tmp_path / "b")


def test_the_same_sweep_twice(model: ps.Model, tmp_path: Path) -> None:
    pairs = pairs_of(model, rows(5))
    for name in "ab":
        ps.sweep(model, pairs, out=tmp_path / name, **SETTINGS, token_budget=200)
    assert arrays(tmp_path / "a") == arrays(tmp_path / "b")


def test_both_directions_are_each_apart(tmp_path: Path) -> None:
    model = ps.wrap(build().double(), tokenizer())
    pairs = pairs_of(model, rows(4))
    found = {}
    for direction in ("both", "denoise", "noise"):
        settings = {**SETTINGS, "direction": direction}
        ps.sweep(model, pairs, out=tmp_path / direction, **settings)
        found[direction] = values(tmp_path / direction)
    for name, both in found["both"].items():
        apart = np.concatenate([found["denoise"][name], found["noise"][name]])
        np.testing.assert_allclose(both, apart, rtol=1e-10, atol=1e-12, err_msg=name)
    assert not np.array_equal(*found["both"]["head_z/kl"])


def test_the_token_budget_changes_no_number(tmp_path: Path) -> None:
    model = ps.wrap(build().double(), tokenizer())
    pairs = pairs_of(model, rows(6))
    waves = []
    for name, budget in (("small", 60), ("large", 100_000)):
        results = ps.sweep(model, pairs, out=tmp_path / name, **SETTINGS, token_budget=budget)
        waves.append(results.attrs["plan"]["waves"])
    assert waves[0] > 50
    assert waves[1] == 1
    large = values(tmp_path / "large")
    for name, small in values(tmp_path / "small").items():
        np.testing.assert_allclose(small, large[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("longest", [False, True], ids=["short", "longest"])
@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite(
    tmp_path: Path, longest: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are marked and counted where they arise, and every other number stays what it was.

    `longest`: of the pairs, the one that is not finite is the one that the self-test looks at.
    """
    made = [r for r in rows(20) if len(r["clean"].split()) == 6][:3]
    bad = made[1]
    if longest:
        bad["clean"], bad["corrupt"] = f"{bad['clean']} a b", f"{bad['corrupt']} a b"
    words = bad["clean"].split()
    bad["clean"] = " ".join([words[0], BROKEN, *words[2:]])
    sound = ps.wrap(build(), tokenizer())
    pairs = pairs_of(sound, made)
    ps.sweep(sound, pairs, out=tmp_path / "sound", **SETTINGS)
    results = ps.sweep(ps.wrap(broken(), tokenizer()), pairs, out=tmp_path / "r", **SETTINGS)
    assert results.complete
    expected, found = values(tmp_path / "sound"), values(tmp_path / "r")
    for name, numbers in found.items():
        others = np.delete(numbers, 1, axis=3)
        np.testing.assert_allclose(others, np.delete(expected[name], 1, axis=3), rtol=1e-5)
        if name.endswith("_status"):
            value = found[name.removesuffix("_status")]
            assert (numbers != Status.NOT_DONE).all()
            inside = numbers != Status.OUTSIDE
            assert ((numbers == Status.NOT_FINITE) == (inside & ~np.isfinite(value))).all()
            before = expected[name][:, :, :, 1]
            assert ((numbers[:, :, :, 1] == Status.OUTSIDE) == (before == Status.OUTSIDE)).all()
    status = found["head_z/logit_diff_status"][:, 0, 0, 1]
    # The corrupt run is sound: patched into it, some cells are not finite. Nothing mends the other.
    assert set(np.unique(status[0])) >= {Status.NOT_FINITE, Status.STRUCTURAL}
    assert set(np.unique(status[1])) <= {Status.NOT_FINITE, Status.OUTSIDE, Status.EXACT}
    assert (found["head_z/kl_status"][0, 0, 0, 1] != Status.EXACT).all()  # the clean run is not
    assert results.counts("head_z", "logit_diff")[Status.NOT_FINITE] == (
        (found["head_z/logit_diff_status"] == Status.NOT_FINITE).sum()
    )
    json.loads((tmp_path / "r" / "zarr.json").read_text(), parse_constant=pytest.fail)
    assert capsys.readouterr() == ("", "")


MEMORY = """
import json, sys
from pathlib import Path
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
import patchsweep as ps
from patchsweep.planning import plan_sweep
from patchsweep.spec import parse_settings

counts, settings, folder = json.loads(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=20_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4,
)
model = ps.wrap(LlamaForCausalLM(config), type("T", (), {"decode": lambda self, t: str(t)})())
pairs = []
for i in range(max(counts)):
    clean, corrupt = torch.randint(20_000, (2, 16)).tolist()
    corrupt[:9], corrupt[10:] = clean[:9], clean[10:]
    pairs.append(ps.Pair(tuple(clean), tuple(corrupt), (1,), (2,)))
with torch.no_grad():
    model.hf_model(torch.tensor([pairs[0].clean]))
before = psutil.Process().memory_info().rss
for n in counts:
    plan = plan_sweep(model.dimensions, pairs[:n], parse_settings(settings), model.device)
    ps.sweep(model, pairs[:n], out=Path(folder, str(n)), **settings)
    # This process's own: the peak that getrusage tells may be that of the process it came from.
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    print(json.dumps({"taken": peak - before, **plan.counts()}))
"""


@pytest.mark.multiproc
def test_memory_stays_under_what_the_plan_says(tmp_path: Path) -> None:
    """And four times the pairs are more waves, not more memory."""
    settings = {**SETTINGS, "direction": "denoise", "token_budget": 512}
    command = [sys.executable, "-c", MEMORY, json.dumps([[1, 4, 16], settings, str(tmp_path)])]
    # One arena: what is freed can be used again, whichever thread had it.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    sweeps = [json.loads(line) for line in done.stdout.splitlines()]
    first, few, many = sweeps
    assert [sweep["waves"] for sweep in sweeps] == [2, 8, 32]
    assert {sweep["peak_tokens"] for sweep in sweeps} == {first["peak_tokens"]}
    assert first["peak_tokens"] > 400
    assert first["peak_bytes"] < 8 * first["taken"], first
    assert all(sweep["taken"] < sweep["peak_bytes"] for sweep in sweeps), sweeps
    # The allocator settles during the first sweeps; 24 more waves would take far more than this.
    assert many["taken"] < few["taken"] + 24 * 2**20, sweeps


FLAT = """
import json, sys
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
import patchsweep as ps
from patchsweep.store import Store

torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)
model = ps.wrap(LlamaForCausalLM(config), type("T", (), {"decode": lambda self, t: str(t)})())
pairs = []
for _ in range(123):
    clean, corrupt = torch.randint(3, 26, (8,)), torch.randint(26, 50, (8,))
    pairs.append(ps.Pair(tuple(clean.tolist()), tuple(corrupt.tolist()), (1,), (2,)))
write, taken, cells = Store.write_block, [], 0

def watched(self, block, values, status):
    global cells
    write(self, block, values, status)
    cells += status["logit_diff"].size
    taken.append((cells, psutil.Process().memory_info().rss))

Store.write_block = watched
metrics = ["logit_diff", "prob", "rank", "kl"]
ps.sweep(model, pairs, components=["neuron"], metrics=metrics, out=sys.argv[1], token_budget=8192)
print(json.dumps(taken))
"""


@pytest.mark.slow
@pytest.mark.multiproc
def test_memory_is_flat_over_a_million_cells(tmp_path: Path) -> None:
    """What is resident in the second tenth of them is so in the last one, but for less than half of
    what the values take. Each time the least: what a wave needs comes and goes."""
    command = [sys.executable, "-c", FLAT, str(tmp_path / "r.zarr")]
    # What is freed goes back at once: what is resident is what is used.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    env["MALLOC_TRIM_THRESHOLD_"] = "131072"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    cells = taken[-1][0]
    assert cells >= 1_000_000
    second = min(resident for n, resident in taken if 0.1 < n / cells <= 0.2)
    last = min(resident for n, resident in taken if n / cells > 0.9)
    values = cells * len(SETTINGS["metrics"]) * (4 + 1)  # with their statuses, in bytes
    assert last - second < values / 2, (second, last)


def test_what_is_refused_replaces_nothing(model: ps.Model, tmp_path: Path) -> None:
    out, pairs = tmp_path / "r.zarr", pairs_of(model, rows(2))
    ps.sweep(model, pairs, out=out, **SETTINGS)
    before = arrays(out)
    with pytest.raises(ps.BadInput, match="99 is outside every prompt"):
        ps.sweep(model, pairs, out=out, overwrite=True, **{**SETTINGS, "positions": [99]})
    assert arrays(out) == before


def test_positions_that_depend_on_the_length(tmp_path: Path) -> None:
    """Dynamic rotary scaling turns a prompt longer than the table by other angles: not for a wave,
    but each prompt by itself is no trouble."""
    hf_model = build()
    config = hf_model.config
    config.max_position_embeddings = 6
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = ps.wrap(LlamaForCausalLM(config).eval(), tokenizer())
    pairs = [
        ps.make_pair(model.tokenizer, " ".join(words), " ".join(["X", *words[1:]]), "a", "b")
        for words in (["c", "d", "e", "f"], ["c", "d", "e", "f", "g", "h", "i", "j", "k"])
    ]
    with pytest.raises(ps.BadInput, match="positions that depend on the prompt's length"):
        ps.sweep(model, pairs, out=tmp_path / "r.zarr", backend="wavefront", **SETTINGS)
    results = ps.sweep(model, pairs, out=tmp_path / "r.zarr", **SETTINGS)
    assert results.attrs["backend"] == "nnsight"
    for i, pair in enumerate(pairs):
        logits = model.hf_model(torch.tensor([pair.clean])).logits[0, -1].detach()
        expected = float(logits[pair.answer[0]] - logits[pair.wrong[0]])
        assert results.baseline("logit_diff")[0, 0, 0, i] == pytest.approx(expected, abs=1e-5)
