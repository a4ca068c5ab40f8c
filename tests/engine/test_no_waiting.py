"""While a wave goes up the layers the host asks nothing of the device, until values are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patchsweep as ps
from inputs import Letters
from oracle.families import FAMILIES, prompts
from patchsweep.device import transfer
from patchsweep.engine import loop as engine
from patchsweep.engine.planning import plan_sweep
from patchsweep.engine.prepare import prepare
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import Forward, take_apart
from patchsweep.passes.values import Values
from patchsweep.passes.wave import Launched, launch_wave, run_wave, wavefront
from patchsweep.sae import SAE
from patchsweep.sites import COMPONENTS
from patchsweep.spec import parse_settings
from patchsweep.store import Store
from tiny import values as values_of

# Of each the result's size or value is needed on the host, for which a GPU is waited for.
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}
METRICS: list[Any] = [
    "logit_diff",
    "logit",
    "logprob",
    "prob",
    "prob_diff",
    "relative_prob",
    "rank",
    {"accuracy": {"k": 5}},
    "kl",
    "kl_reverse",
    "total_variation",
    "sequence_logprob",
    {"attention": {"layer": 1, "head": 0, "query": -1, "key": 0}},
    {"neuron": {"layer": 1, "neuron": 3, "position": -1}},
    {"sae_feature": {"feature": 2, "position": -1}},
    {"callable": {"path": "test_no_waiting:first"}},
]


def first(logits: torch.Tensor, _: ps.Context) -> torch.Tensor:
    return logits[:, 9]


class Waits(AssertionError):
    """A GPU would have been waited for."""


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name in WAITS:
            raise Waits(name)
        if name in MASKED and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        ):
            raise Waits(f"{name} with a mask")
        counts = name == "repeat_interleave" and isinstance(args[-1], torch.Tensor)
        if counts and kwargs.get("output_size") is None:
            raise Waits(f"{name} with counts")
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, nothing may be read back, and arrays go to the device by `to_device` alone."""

    def refused(name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise Waits(name)

        return call

    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        for name in ("cpu", "numpy", "tolist", "item"):
            patch.setattr(torch.Tensor, name, refused(f"Tensor.{name}"))
        from_numpy = torch.from_numpy
        for name in ("from_numpy", "tensor", "as_tensor"):
            patch.setattr(torch, name, refused(f"torch.{name}"))
        patch.setattr(transfer, "from_numpy", from_numpy)
        yield


def launch_all(family: str, device: str, more: dict[str, Any], guard: Any) -> int:
    """Launches every wave of a sweep inside `guard`, reads them after; how many there were."""
    hf_model = FAMILIES[family].build(3).to(device)
    rng = np.random.default_rng(3)
    pairs = []
    for n in (7, 6):
        clean, corrupt = prompts(rng, 50, n, 1)
        tail = (9, 3)[: n - 5]  # what follows the last read but for its last token is in the prompt
        clean, corrupt = (x + tail[:-1] for x in (clean, corrupt))
        pairs.append(Pair(clean, corrupt, (5, 8), (7,), continuation=tail))
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(*s, generator=generator) for s in ((48, 20), (20, 48)))
    sae = SAE(layer=1, at="resid_post", encoder=encoder, decoder=decoder, bias=torch.zeros(20))
    model = ps.wrap(hf_model, Letters())
    settings = {"metrics": METRICS, "sae": {"file": "x"}, "token_budget": 900, **more}
    parsed = parse_settings(settings)
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device, sae=sae)
    with attention_is(hf_model):
        forward = take_apart(hf_model, plan.layouts.longest, plan.layouts.shortest)
        values: Values = prepare(forward, plan, parsed, Letters(), sae)
        _ = forward.finishes  # asked once, of the model
        if "neuron" in settings["components"]:
            _ = forward.down_projections
        with guard():
            launched = [
                launch_wave(forward, plan, wave, parsed.metrics, values, wavefront)
                for wave in plan.waves
            ]
        finite = 0
        for wave, each in zip(plan.waves, launched, strict=True):
            again = run_wave(forward, plan, wave, parsed.metrics, values)
            one_by_one = zip(each.result().blocks, again.blocks, strict=True)
            for (_, found, _), (_, expected, _) in one_by_one:
                for column, value in expected.items():
                    np.testing.assert_array_equal(found[column], value)
                    finite += int(np.isfinite(value).sum())
        assert finite > 1000
    return len(launched)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (
        "llama",
        {"components": [*COMPONENTS], "direction": "both", "windows": [2]},
    ),
    "sets": (
        "gemma2",  # soft-caps, windows
        {
            "components": ["head_z", "sae_feature"],
            "sets": {"some": ["sae_feature.3@-1", "head_z.0.2@-2", "head_pattern.1.0@-1"]},
        },
    ),
    "no run": (
        "gpt2",
        {
            "components": ["head_z", "embed", "mlp_out", "sae_feature"],
            "source": ["zero", {"mean": {"prompts": "clean"}}],
            "direction": "noise",
            "metrics": [m for m in METRICS if m != "relative_prob"],
        },
    ),
    "noise": (
        "gpt2",
        {"components": ["head_z"], "corrupt": {"gaussian": {"tokens": [2], "std": "table"}}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wave_reads_nothing_back(case: str) -> None:
    """Experts are left out: transformers asks the device which tokens each of them gets."""
    family, settings = CASES[case]
    assert launch_all(family, "cpu", settings, no_waiting)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda _: torch.tensor([1, 2]),
        lambda _: torch.from_numpy(np.arange(2)),
    ],
)
def test_waiting_is_seen(asks: Any) -> None:
    x = torch.arange(3.0)
    with pytest.raises(Waits), no_waiting():
        asks(x)
    x[x > 0] = 1


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_is_not_waited_for(case: str) -> None:
    family, settings = CASES[case]
    assert launch_all(family, "cuda", settings, no_synchronisation)


def test_waves_are_launched_ahead_and_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are said to be worth it, and not one more, are there when the first is read."""
    model = ps.wrap(FAMILIES["llama"].build(2), Letters())
    pairs = [Pair(*prompts(np.random.default_rng(i), 50, 6, 1), (5,), (7,)) for i in range(3)]
    settings: dict[str, Any] = {"components": ["head_z"], "token_budget": 60}
    launched, read, written = [], [], []
    launch, result, write = engine.launch_wave, Launched.result, Store.write_block

    def launching(forward: Any, plan: Any, wave: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(wave)
        return launch(forward, plan, wave, *args, **kwargs)

    def reading(self: Launched) -> Any:
        read.append((self.wave.index, len(launched)))
        return result(self)

    def writing(self: Store, block: Any, *args: Any) -> None:
        written.append(block)
        write(self, block, *args)

    expected = values_of(ps.sweep(model, pairs, out=tmp_path / "one", **settings).path)
    monkeypatch.setattr(engine, "launch_wave", launching)
    monkeypatch.setattr(Launched, "result", reading)
    monkeypatch.setattr(Store, "write_block", writing)
    for ahead in (1, 3):
        for seen in (launched, read, written):
            seen.clear()
        monkeypatch.setattr(Forward, "waves_in_flight", ahead)
        results = ps.sweep(model, pairs, out=tmp_path / f"{ahead}", **settings)
        count = results.attrs["plan"]["waves"]  # those after them are of the summary
        assert count > 5
        assert read[:count] == [(i, min(i + ahead, count)) for i in range(count)]
        assert written == [block for wave in launched[:count] for block in wave.blocks]
        found = values_of(results.path)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
