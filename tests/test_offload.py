"""Models larger than the device: weights in memory and on disk, brought in once per wave."""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook
from rich.console import Console
from safetensors.torch import save_file

import patchsweep as ps
from oracle.families import FAMILIES, prompts
from patchsweep import engine, forward, placement, planning, selftest, wave
from patchsweep.forward import Forward, layers_of
from patchsweep.loading import memory_limits
from patchsweep.pairs import Pair
from patchsweep.placement import balanced_cut
from patchsweep.prefetch import Prefetch
from patchsweep.report.show import plan_table
from patchsweep.spec import parse_spec
from patchsweep.taps import Editor
from test_sweep import tokenizer, values

METRICS: list[Any] = [
    "logit_diff",
    "logprob",
    "prob",
    "rank",
    {"accuracy": {"k": 25}},
    "kl",
    "kl_reverse",
]
METRICS += ["total_variation", "relative_prob"]
SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out", "resid_pre", "neuron"],
    "metrics": METRICS,
    "direction": "both",
    "token_budget": 600,
}


def saved(folder: Path, family: str, tied: bool, dtype: torch.dtype = torch.float64) -> Path:
    hf_model = FAMILIES[family].build(4, dtype=dtype, tie_word_embeddings=tied)
    hf_model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def limit(model: ps.Model, layers: int) -> dict[int | str, int | str]:
    """Memory for the ends of a model and so many of its layers; without any, for one at a time."""
    sizes = [sum(p.nbytes for p in x.parameters()) for x in layers_of(model.hf_model)]
    ends = sum(p.nbytes for p in model.hf_model.parameters()) - sum(sizes)
    # accelerate leaves room for the largest layer.
    return {"cpu": max(sizes) + (int((layers + 0.2) * max(sizes)) + ends if layers else 0)}


def pairs_of() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [Pair(*prompts(rng, 50, n, 2), (5, 6), (7,)) for n in (7, 6)]


def places(model: ps.Model) -> set[object]:
    return set(model.hf_model.hf_device_map.values())


def same(a: Path, b: Path) -> None:
    """Every value and status is the same, bit by bit."""
    expected, found = values(a), values(b)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert any(np.nanstd(a) > 0 for name, a in expected.items() if not name.endswith("_status"))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that are brought in inside each wave, by hooks or ahead of them."""
    waves: list[int] = []
    bring, fetch = AlignDevicesHook.pre_forward, Prefetch._fetch

    def counting(hook: AlignDevicesHook, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = bring(hook, module, *args, **kwargs)
        if hook.offload and waves:
            waves[-1] += sum(p.nbytes for p in module.parameters(hook.place_submodules))
        return out

    def fetching(self: Prefetch, *args: Any) -> Any:
        out = fetch(self, *args)
        if waves:
            waves[-1] += sum(t.nbytes for tensors in out.values() for t in tensors.values())
        return out

    own = engine.launch_wave

    def next_wave(*args: Any, **kwargs: Any) -> Any:
        waves.append(0)
        return own(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(AlignDevicesHook, "pre_forward", counting)
        patched.setattr(Prefetch, "_fetch", fetching)
        patched.setattr(engine, "launch_wave", next_wave)
        yield waves


@pytest.mark.parametrize(
    ("family", "tied", "layers"),
    [
        ("llama", False, 2),
        ("gpt2", True, 2),
        ("gemma2", True, 2),
        ("qwen3", False, 0),
        ("opt", True, 0),
    ],
)
def test_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, layers: int
) -> None:
    folder = str(saved(tmp_path / "m", family, tied))
    whole = ps.load_model(folder, "float64", "cpu")
    model = ps.load_model(folder, "float64", "balanced", max_memory=limit(whole, layers))
    assert places(model) == ({"cpu", "disk"} if layers else {"disk"})
    assert model.fingerprint == whole.fingerprint
    assert model.dimensions == whole.dimensions
    pairs = pairs_of()
    ps.sweep(whole, pairs, out=tmp_path / "whole", **SETTINGS)
    with counted(monkeypatch) as waves:
        results = ps.sweep(model, pairs, out=tmp_path / "off", **SETTINGS)
    same(tmp_path / "whole", tmp_path / "off")
    plan = results.attrs["plan"]
    assert len(waves) >= plan["waves"] > 1  # joint effects are waves too
    assert set(waves) == {model.offload.moved} == {plan["moved_bytes"] // plan["waves"]}
    if not layers:
        held = sum(p.nbytes for p in whole.hf_model.parameters())
        twice = whole.hf_model.get_input_embeddings().weight.nbytes if tied else 0
        assert model.offload.moved == held + twice
    assert layers or all(p.is_meta for p in model.hf_model.parameters())


@pytest.mark.parametrize(("family", "tied", "layers"), [("llama", False, 0), ("gpt2", True, 2)])
def test_weights_that_come_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, layers: int
) -> None:
    """As for a GPU, though from disk to memory: the same bits, weights once per wave, those of the
    next layer on their way while a layer computes, and never those of three layers."""
    folder = str(saved(tmp_path / "m", family, tied))
    whole = ps.load_model(folder, "float64", "cpu")
    model = ps.load_model(folder, "float64", "balanced", max_memory=limit(whole, layers))
    assert "disk" in places(model)
    before = model.offload
    for module in (forward, placement):
        monkeypatch.setattr(module, "worthwhile", lambda _: True)
    assert model.offload.moved == before.moved
    assert model.offload.held > before.held
    done: list[str] = []
    begin, fetch, layer = Prefetch._begin, Prefetch._fetch, Forward.layer
    alive: dict[int, weakref.WeakSet[torch.Tensor]] = {}

    def beginning(self: Prefetch, index: int) -> None:
        done.append(f"begin {index}")
        begin(self, index)

    def fetching(self: Prefetch, index: int, before: Any) -> Any:
        found = fetch(self, index, before)
        assert {i for i, tensors in alive.items() if len(tensors)} <= {index - 1}
        alive[index] = weakref.WeakSet(t for m in found.values() for t in m.values())
        return found

    def called(self: Forward, index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        done.append(f"layer {index}")
        assert not any(p.is_meta for p in self.layers[index].parameters())
        return layer(self, index, *args, **kwargs)

    pairs, settings = pairs_of(), {**SETTINGS, "components": ["head_z"], "metrics": ["kl"]}
    ps.sweep(whole, pairs, out=tmp_path / "whole", **settings)
    monkeypatch.setattr(Prefetch, "_begin", beginning)
    monkeypatch.setattr(Prefetch, "_fetch", fetching)
    monkeypatch.setattr(Forward, "layer", called)
    # The self-test asks other things of the layers; it is another test's.
    monkeypatch.setattr(selftest, "check", lambda *_: selftest.SelfTest(0, 0.0, 0.0, 0.0))
    with counted(monkeypatch) as waves:
        ps.sweep(model, pairs, out=tmp_path / "off", **settings)
    same(tmp_path / "whole", tmp_path / "off")
    assert set(waves) == {model.offload.moved}
    ahead = [f"{what} {i}" for i in range(4) for what in ("begin", "layer")]
    ahead[1:7:2], ahead[2:8:2] = ahead[2:8:2], ahead[1:7:2]
    assert done[-8 * len(waves) :] == ahead * len(waves)
    assert layers or all(p.is_meta for p in model.hf_model.parameters())


def test_a_wave_that_was_left_has_fetched_for_nobody(tmp_path: Path) -> None:
    """Whatever layer comes next has its own weights inside, and none after."""
    hf_model = FAMILIES["llama"].build(3)
    expected = [[p.detach().clone() for p in layer.parameters()] for layer in layers_of(hf_model)]
    disk_offload(hf_model, str(tmp_path / "weights"), torch.device("cpu"))
    layers = list(layers_of(hf_model))
    ahead = Prefetch(layers)
    for index in (0, 0, 2, 1, 2, 0):
        with ahead.layer(index):
            for p, own in zip(layers[index].parameters(), expected[index], strict=True):
                assert torch.equal(p, own)
        assert all(p.is_meta for p in layers[index].parameters())


def test_through_nnsight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come in with every batch; the ends that a batch does not reach are counted too."""
    folder = str(saved(tmp_path / "m", "llama", False))
    whole = ps.load_model(folder, "float64", "cpu")
    model = ps.load_model(folder, "float64", "balanced", max_memory=limit(whole, 2))
    some = {**SETTINGS, "components": ["head_z", "resid_post"], "positions": [-1]}
    some |= {"backend": "nnsight", "token_budget": 200}
    ps.sweep(whole, pairs_of(), out=tmp_path / "whole", **some)
    with counted(monkeypatch) as waves:
        results = ps.sweep(model, pairs_of(), out=tmp_path / "off", **some)
    same(tmp_path / "whole", tmp_path / "off")
    plan = results.attrs["plan"]
    moved = sum(waves[: plan["waves"]])  # joint effects come after
    assert model.offload.moved * plan["waves"] < moved <= plan["moved_bytes"]


SOURCES: list[dict[str, Any]] = [
    {"source": {"mean": {"prompts": "clean"}}},
    {"corrupt": {"gaussian": {"tokens": [2], "std": "table"}}},
    {
        "components": ["sae_feature"],
        "metrics": ["kl", {"sae_feature": {"feature": 1, "position": 3}}],
    },
    {"components": ["embed", "head_q", "head_pattern", "resid_mid", "resid_post"]},
    {"metrics": [{"callable": {"path": "test_offload:first"}}, "logit"]},
]


def first(logits: torch.Tensor, _: ps.Context) -> torch.Tensor:
    return logits[:, 9]


@pytest.mark.parametrize("settings", SOURCES, ids=lambda s: next(iter(s)))
def test_sources_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    folder = str(saved(tmp_path / "m", "llama", True))
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (48, 5), "W_dec": (5, 48), "b_enc": (5,), "b_dec": (48,)}
    sae = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    save_file(sae, tmp_path / "my.safetensors")
    if "sae_feature" in settings.get("components", ()):
        where = {"file": tmp_path / "my.safetensors", "layer": 1, "at": "resid_post"}
        settings = {**settings, "sae": where}
    settings = {**SETTINGS, "direction": "noise", "metrics": ["kl", "rank"], **settings}
    whole = ps.load_model(folder, "float64", "cpu")
    model = ps.load_model(folder, "float64", "balanced", max_memory=limit(whole, 0))
    ps.sweep(whole, pairs_of(), out=tmp_path / "whole", **settings)
    with counted(monkeypatch) as waves:
        ps.sweep(model, pairs_of(), out=tmp_path / "off", **settings)
    same(tmp_path / "whole", tmp_path / "off")
    assert set(waves) == {model.offload.moved}


def test_experts_are_converted_into_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model's own files do not hold as it is used, is kept as long as the model is."""
    folder = str(saved(tmp_path / "m", "mixtral", False, torch.float32))
    settings = {**SETTINGS, "components": ["head_z", "mlp_out"]}
    whole = ps.load_model(folder, device="cpu")
    kept, memory = tmp_path / "kept", limit(whole, 1)
    model = ps.load_model(folder, device="balanced", max_memory=memory, offload_folder=kept)
    assert "disk" in places(model)
    assert len(list(kept.rglob("*experts*"))) > 0
    assert model.fingerprint == whole.fingerprint
    ps.sweep(whole, pairs_of(), out=tmp_path / "whole", **settings)
    with counted(monkeypatch) as waves:
        ps.sweep(model, pairs_of(), out=tmp_path / "off", **settings)
    same(tmp_path / "whole", tmp_path / "off")
    assert set(waves) == {model.offload.moved}
    del model
    gc.collect()  # hooks and modules hold each other
    assert list(kept.iterdir()) == []


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


def test_weights_that_are_nowhere(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = FAMILIES["llama"].build(2)
    with pytest.raises(ps.BadInput, match=r"weights without values, e\.g\. model"):
        ps.sweep(ps.wrap(empty, tokenizer()), pairs_of(), out=tmp_path / "r", **SETTINGS)


MEMORY = """
import json, sys
from pathlib import Path
import patchsweep as ps
from patchsweep.planning import plan_sweep
from patchsweep.spec import parse_settings

device, memory, settings, out = json.loads(sys.argv[1])

def kilobytes(key):
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{key}:") + 1]) * 1024

import transformers, accelerate, scipy.stats, pandas, xarray, zarr
transformers.LlamaForCausalLM, transformers.AutoTokenizer
before = kilobytes("VmRSS")
model = ps.load_model("smollm2-135m", device=device, max_memory=memory)
pairs = ps.tasks.ioi(model.tokenizer, n=1)
said = parse_settings(settings)
plan = plan_sweep(model.dimensions, pairs, said, model.device, None, None, model.offload)
weights = sum(p.nbytes for p in model.hf_model.parameters() if not p.is_meta)
ps.sweep(model, pairs, out=Path(out), **settings)
peak = kilobytes("VmHWM") - before
print(json.dumps({"taken": peak, "stay": weights, "held": model.offload.held, **plan.counts()}))
"""


@pytest.mark.multiproc
def test_smollm2_in_little_memory(tmp_path: Path) -> None:
    """Most of its layers on disk: the same numbers, within the memory that was allowed."""
    settings = {
        "components": ["head_z", "mlp_out"],
        "metrics": ["logit_diff", "kl", "rank"],
        "positions": [-1, -5],
        "token_budget": 512,
    }
    # What is freed is given back at once: measured is what is held, not what the allocator keeps.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    env = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
    found = {}
    for device, memory in (("balanced", {"cpu": "200MB"}), ("cpu", None)):
        given = json.dumps([device, memory, settings, str(tmp_path / device)])
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, given], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        found[device] = json.loads(done.stdout)
    same(tmp_path / "cpu", tmp_path / "balanced")
    off, whole = found["balanced"], found["cpu"]
    assert off["stay"] < 200e6
    assert off["moved_bytes"] == off["waves"] * (whole["stay"] - off["stay"]) > 0
    assert off["taken"] < 200e6 + off["peak_bytes"], found
    assert off["taken"] < whole["taken"] - off["moved_bytes"] / off["waves"] / 2, found


def test_everything_is_on_the_device_of_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer is said to have a device of its own: what its call uses is asked for there."""
    model = ps.wrap(FAMILIES["llama"].build(4), tokenizer())
    ps.sweep(model, pairs_of(), out=tmp_path / "one", **SETTINGS)
    devices = [torch.device("cpu", i) for i in (0, 1, 2, 3, 3)]
    asked: set[torch.device] = set()
    calls = []
    to, editors_to, layer = wave.to_device, Editor._to, Forward.layer

    def wave_to(index: Any, device: torch.device) -> torch.Tensor:
        asked.add(device)
        return to(index, device)

    def editor_to(editor: Editor, array: Any) -> torch.Tensor:
        asked.add(editor.device)
        return editors_to(editor, array)

    def called(forward: Forward, index: int, *args: Any) -> torch.Tensor:
        calls.append((index, set(asked)))
        asked.clear()
        return layer(forward, index, *args)

    monkeypatch.setattr(Forward, "devices", devices)
    monkeypatch.setattr(wave, "to_device", wave_to)
    monkeypatch.setattr(Editor, "_to", editor_to)
    monkeypatch.setattr(selftest, "check", lambda *_: selftest.SelfTest(0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(Forward, "layer", called)
    ps.sweep(model, pairs_of(), out=tmp_path / "four", **SETTINGS)
    # Before the first layer comes the embedding, and the tail of the wave before.
    found = [(index, there) for index, there in calls if there and index > 0]
    assert len(found) > 6
    for index, there in found:
        assert there == {devices[index]}, index
    same(tmp_path / "one", tmp_path / "four")


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_gpu_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Weights come ahead, waves are launched ahead: the bits of the model on the GPU."""
    folder = str(saved(tmp_path / "m", "llama", True))
    whole = ps.load_model(folder, "float64", "cuda:0")
    memory = {0: limit(whole, 1)["cpu"], **({"cpu": "1GB"} if place == "cpu" else {})}
    model = ps.load_model(folder, "float64", "balanced", max_memory=memory)
    assert places(model) == {0, place}
    assert model.fingerprint == whole.fingerprint
    assert model.offload.moved > 0
    fetched = []
    fetch = Prefetch._fetch

    def fetching(self: Prefetch, index: int, before: Any) -> Any:
        fetched.append(index)
        return fetch(self, index, before)

    monkeypatch.setattr(Prefetch, "_fetch", fetching)
    ps.sweep(whole, pairs_of(), out=tmp_path / "whole", **SETTINGS)
    assert not fetched
    with counted(monkeypatch) as waves:
        ps.sweep(model, pairs_of(), out=tmp_path / "off", **SETTINGS)
    same(tmp_path / "whole", tmp_path / "off")
    assert set(waves) == {model.offload.moved}
    assert set(fetched) == set(range(4))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, backend: str
) -> None:
    """A wave on each GPU: the bits of one wave after another."""
    folder = str(saved(tmp_path / "m", "llama", tied))
    whole = ps.load_model(folder, "float64", "cuda:0")
    memory = {0: "1GB", 1: "1GB"}
    model = ps.load_model(folder, "float64", "balanced", max_memory=memory)
    assert places(model) == {0, 1}
    assert model.offload.moved == 0
    settings = {**SETTINGS, "backend": backend}
    ps.sweep(whole, pairs_of(), out=tmp_path / "whole", **settings)
    ps.sweep(model, pairs_of(), out=tmp_path / "two", **settings)
    monkeypatch.setattr(Forward, "waves_in_flight", 1)
    monkeypatch.setattr(Forward, "shared_by", [])
    ps.sweep(model, pairs_of(), out=tmp_path / "one by one", **settings)
    same(tmp_path / "two", tmp_path / "one by one")
    expected, found = values(tmp_path / "whole"), values(tmp_path / "two")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-9, err_msg=name)


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


def test_a_model_that_accelerate_dispatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model = FAMILIES["llama"].build(3)
    whole = ps.wrap(hf_model, tokenizer(), "tiny")
    fingerprint = whole.fingerprint
    ps.sweep(whole, pairs_of(), out=tmp_path / "whole", **SETTINGS)
    disk_offload(hf_model, str(tmp_path / "weights"), torch.device("cpu"))
    model = ps.wrap(hf_model, tokenizer(), "tiny")
    assert model.fingerprint == fingerprint
    with counted(monkeypatch) as waves:
        ps.sweep(model, pairs_of(), out=tmp_path / "off", **SETTINGS)
    same(tmp_path / "whole", tmp_path / "off")
    assert set(waves) == {model.offload.moved} != {0}
    assert all(p.is_meta for p in hf_model.parameters())
