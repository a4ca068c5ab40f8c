"""Which device holds which layers, from limits of memory, and what a plan foresees of it."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import patchsweep as ps
from offloaded import SETTINGS, limit, saved
from oracle.families import FAMILIES
from patchsweep.engine import planning
from patchsweep.inputs.devices import memory_limits
from patchsweep.model import placement
from patchsweep.model.placement import balanced_cut
from patchsweep.report.terminal import plan_table
from patchsweep.spec import parse_spec
from tiny import tokenizer


def test_the_cut_shares_the_work() -> None:
    assert balanced_cut(32, 1) == [0]
    assert balanced_cut(32, 4) == [0, 16, 23, 28]
    for layers in (24, 80):
        for devices in (2, 3, 8):
            ends = [*balanced_cut(layers, devices), layers]
            work = [sum(range(a, b)) for a, b in itertools.pairwise(ends)]
            assert max(work) - min(work) <= 2 * layers


def test_the_plan_foresees_what_is_moved(tmp_path: Path) -> None:
    """From the config alone: the same map, hence the same figures."""
    folder = saved(tmp_path / "m", "gpt2", True)
    whole = ps.load_model(str(folder), "float64", "cpu")
    memory = limit(whole, 1)
    model = ps.load_model(str(folder), "float64", "balanced", max_memory=memory)
    row = {"clean": "a b c d e", "corrupt": "a b B d e", "answer": "f", "wrong": "g"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row))
    spec = {"model": str(folder), "dtype": "float64", "prompts": {"file": str(file)}, **SETTINGS}
    offloaded = parse_spec({**spec, "device": "balanced", "max_memory": memory})
    plan = planning.plan_spec(offloaded)
    assert plan.offload == model.offload
    assert plan.counts()["moved_bytes"] == model.offload.moved * len(plan.waves) > 0
    here = planning.plan_spec(parse_spec({**spec, "device": "cpu"}))
    assert plan.peak_bytes == here.peak_bytes + model.offload.held
    assert here.counts()["moved_bytes"] == 0
    assert plan.hash == here.hash
    table = Console(width=100, record=True, file=io.StringIO())
    table.print(plan_table(plan))
    assert "brought in" in table.export_text()
    table.print(plan_table(here))
    assert "brought in" not in table.export_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_memory": {"cpu": "10KB"}}, ["cpu cannot hold model.layers.0", "124 KB"]),
        ({"max_memory": {"cpu": "much"}}, ["cpu is 'much'", "200MB"]),
        ({"max_memory": {"cpu": True}}, ["cpu is True"]),
        ({"max_memory": {"disk": "1GB"}}, ["unknown place 'disk'"]),
        ({"max_memory": {}}, ["max_memory is {}", "write"]),
        ({"max_memory": {"cpu": "1MB", 99: "1GB"}}, ["GPU 99", "torch sees"]),
        ({"max_memory": {"cpu": "1MB"}, "device": "cpu"}, ["for device balanced, not cpu"]),
        ({"offload_folder": "x", "device": "auto"}, ["offload_folder", "not auto"]),
        (
            {"max_memory": {"cpu": "300KB"}, "offload_folder": "pairs.jsonl/x"},
            ["cannot keep weights in", "set offload_folder"],
        ),
    ],
)
def test_what_cannot_be_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: list[str]
) -> None:
    saved(tmp_path / "m", "llama", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("a file\n")
    with pytest.raises(ps.BadInput) as error:
        ps.load_model("m", **{"dtype": "float64", "device": "balanced", **options})
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_memory": {"cpu": "1GB"}}, "max_memory is for device balanced, not auto"),
        ({"device": "balanced", "max_memory": {"cpu": "1 cup"}}, "cpu is '1 cup'"),
        ({"device": "balanced", "max_memory": 5}, "max_memory is 5"),
        ({"device": "balance"}, "use auto, cpu, cuda, cuda:N or balanced"),
    ],
)
def test_specs(keys: dict[str, Any], words: str) -> None:
    spec = {"model": "m", "prompts": {"task": "ioi", "n": 1}, "components": ["head_z"]}
    with pytest.raises(ps.BadInput, match=words):
        parse_spec({**spec, **keys})
    good = {"device": "balanced", "max_memory": {"cpu": "1.5GiB", 0: 7}, "offload_folder": "x"}
    said = parse_spec({**spec, **good})
    assert (
        parse_spec(json.loads(said.model_dump_json())).model_dump_json() == said.model_dump_json()
    )
    assert memory_limits(said.max_memory) == {"cpu": 3 * 2**29, 0: 7}


def test_the_map_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are cut by their work where they fit so, else as accelerate does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for tied in (False, True):
        with torch.device("meta"):
            empty = FAMILIES["llama"].build(8, tie_word_embeddings=tied)
        placed = placement.device_map(empty, {0: "1GB", 1: "1GB"})
        layers = [placed[f"model.layers.{i}"] for i in range(8)]
        assert layers == [0] * 6 + [1] * 2
        assert placed["model.embed_tokens"] == 0
        assert placed["lm_head"] == (0 if tied else 1)
        assert placement.foreseen(empty, placed)[1].moved == 0
        named = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
        assert all(any(n.startswith(f"{part}.") for part in placed) for n in named)


def test_waves_leave_room_for_the_weights_that_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = type("Memory", (), {"available": 1_000_000})
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: free)
    dimensions = ps.wrap(FAMILIES["llama"].build(2), tokenizer()).dimensions
    _, most = planning.auto_budget(dimensions, torch.device("cpu"), 0)
    _, left = planning.auto_budget(dimensions, torch.device("cpu"), 400_000)
    assert left == int(600_000 * planning.MEMORY_SHARE) // dimensions.bytes_per_token < most
    assert planning.auto_budget(dimensions, torch.device("cpu"), 2_000_000)[1] == 0
