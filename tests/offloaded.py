"""Models larger than the device: saved, limited to a part of their memory, and watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook

import patchsweep as ps
from oracle.families import FAMILIES, prompts
from patchsweep.device.prefetch import Prefetch
from patchsweep.engine import loop as engine
from patchsweep.pairs import Pair
from patchsweep.passes.layers import layers_of
from tiny import tokenizer, values

SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out", "neuron"],
    "metrics": ["logit_diff", "kl", "rank"],
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
