"""Models larger than the device: weights in memory and on disk, brought in once per wave."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import save_file

import patchsweep as ps
from offloaded import SETTINGS, counted, limit, pairs_of, places, same, saved
from oracle.families import FAMILIES
from tiny import tokenizer


@pytest.mark.parametrize(
    ("family", "tied", "layers"),
    [
        ("llama", False, 2),
        ("gemma2", True, 2),
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


def test_weights_that_are_nowhere(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = FAMILIES["llama"].build(2)
    with pytest.raises(ps.BadInput, match=r"weights without values, e\.g\. model"):
        ps.sweep(ps.wrap(empty, tokenizer()), pairs_of(), out=tmp_path / "r", **SETTINGS)


MEMORY = """
import json, sys
from pathlib import Path
import patchsweep as ps
from patchsweep.engine.planning import plan_sweep
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
        "positions": [-1],
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
