"""Weights that come ahead of their layer, and layers on devices of their own: the same bits."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload

import patchsweep as ps
from offloaded import SETTINGS, counted, limit, pairs_of, places, same, saved
from oracle.families import FAMILIES
from patchsweep.backends import choice as backends
from patchsweep.backends.selftest import SelfTest
from patchsweep.device.prefetch import Prefetch
from patchsweep.model import placement
from patchsweep.passes import forward, wave
from patchsweep.passes.forward import Forward
from patchsweep.passes.layers import layers_of
from patchsweep.passes.taps import Editor
from tiny import tokenizer, values

NOTHING = SelfTest([], [], 0, 0, 0.0, 0.0, 0.0, 0.0)


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
    monkeypatch.setattr(backends._SelfTests, "ask_for", lambda *_: None)
    monkeypatch.setattr(backends._SelfTests, "passed", lambda *_: NOTHING)
    with counted(monkeypatch) as waves:
        ps.sweep(model, pairs, out=tmp_path / "off", **settings)
    same(tmp_path / "whole", tmp_path / "off")
    assert set(waves) == {model.offload.moved}
    ahead = [f"{what} {i}" for i in range(4) for what in ("begin", "layer")]
    ahead[1:7:2], ahead[2:8:2] = ahead[2:8:2], ahead[1:7:2]
    assert done[-8 * len(waves) :] == ahead * len(waves)
    assert layers or all(p.is_meta for p in model.hf_model.parameters())


NOTHING = SelfTest([], [], 0, 0, 0.0, 0.0, 0.0, 0.0)


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
    monkeypatch.setattr(backends._SelfTests, "ask_for", lambda *_: None)
    monkeypatch.setattr(backends._SelfTests, "passed", lambda *_: NOTHING)
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
