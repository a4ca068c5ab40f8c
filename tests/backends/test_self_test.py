"""The self-test: models that lie in one place are refused, each time, whichever backend runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import doubles
import patchsweep as ps
from inputs import Letters, three
from oracle.families import FAMILIES, Family
from patchsweep.backends import choice as backends
from patchsweep.backends import interventions, selftest
from patchsweep.backends.probe import CELLS
from patchsweep.pairs import Pair
from patchsweep.sites import Status

PAIRS = three()[:2]  # of 9 and 6 tokens
Double = Callable[[], PreTrainedModel]


def sweep(hf_model: PreTrainedModel, out: Path, **settings: Any) -> ps.Results:
    given = {"components": ["resid_post", "head_z"], "metrics": ["logit_diff"], **settings}
    return ps.sweep(ps.wrap(hf_model, Letters()), PAIRS, out=out, direction="denoise", **given)


def true(
    results: ps.Results, hf_model: PreTrainedModel, family: Family = FAMILIES["llama"]
) -> None:
    """Its numbers are those of one hooked forward per cell."""
    found = results.store.read("resid_post/logit_diff")[0, 0, 0, :, :, 0]
    for i, pair in enumerate(PAIRS):
        expected = doubles.resid_post(hf_model, pair, family)
        np.testing.assert_allclose(found[i, :, : len(pair)], expected, rtol=0, atol=1e-6)


# What differs wherever it runs, and what the line says.
NEITHER: list[tuple[Double, str]] = [
    (doubles.another_tail, r"through nnsight: the baseline of .* has a logit [\d.e+-]+ from"),
    (doubles.own_head, r"through nnsight: the baseline of .* has a logit [\d.e+-]+ from"),
    (doubles.own_last_logit, r"through nnsight: the baseline of .* has a logit [\d.e+-]+ from"),
    (doubles.two_ways, "is not causal .* neither backend can run it"),
    (partial(doubles.mixing_mlp, 0.01), "patched in layer 2 where .* nothing can change moves"),
]


@pytest.mark.parametrize(("double", "says"), NEITHER)
def test_what_no_backend_computes(double: Double, says: str, tmp_path: Path) -> None:
    for backend in ("auto", "nnsight"):
        with pytest.raises(ps.BadInput, match=says) as error:
            sweep(double(), tmp_path / "r", backend=backend)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "r").exists()


# What only the wavefront gets wrong.
WAVEFRONT: list[tuple[Double, str, str]] = [
    (doubles.own_positions, "gpt2", r"the baseline of .* from the model's own forward"),
    (partial(doubles.scaled_for, 1e-3), "llama", r"has a logit [\d.e+-]+ from .* \(tolerance"),
    (doubles.hidden_key, "llama", "the attention mask of layer 1 is not causal"),
    (doubles.short_prompts, "llama", "the baseline of a prompt of 6 tokens"),
]


@pytest.mark.parametrize(("double", "family", "says"), WAVEFRONT)
def test_auto_leaves_the_wavefront(
    double: Double, family: str, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_model = double()
    results = sweep(hf_model, tmp_path / "r")
    assert results.attrs["backend"] == "nnsight"
    assert results.attrs["self_test"]["cells"] > 0
    match = pytest.raises(ps.BadInput, match=says)
    with match as error:
        sweep(hf_model, tmp_path / "w", backend="wavefront")
    assert str(error.value) in results.attrs["backend_reason"]
    assert results.attrs["backend_reason"] in caplog.text
    true(results, hf_model, FAMILIES[family])


def test_tolerances_are_no_wider_than_they_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred times as wide, they would let these pass."""
    scaled, mixing = doubles.scaled_for(1e-4), doubles.mixing_mlp(1e-4)
    with pytest.raises(ps.BadInput, match="self-test on the wavefront"):
        sweep(scaled, tmp_path / "r", backend="wavefront")
    with pytest.raises(ps.BadInput, match="nothing can change moves a logit"):
        sweep(mixing, tmp_path / "r")
    for wide, double in (("TOLERANCE", scaled), ("NOTHING", mixing)):
        with monkeypatch.context() as changed:
            was = getattr(selftest, wide)
            value = {k: v * 100 for k, v in was.items()} if wide == "TOLERANCE" else was * 100
            changed.setattr(selftest, wide, value)
            # The wavefront packs prompts, which mixing notices.
            backend = "wavefront" if double is scaled else "nnsight"
            sweep(double, tmp_path / wide, backend=backend)


def test_a_model_that_differs_by_less_than_rounding_runs(tmp_path: Path) -> None:
    results = sweep(doubles.scaled_for(1e-9), tmp_path / "r")
    assert results.attrs["backend"] == "wavefront"


def test_only_nnsight_is_wrong(tmp_path: Path) -> None:
    """It goes by the names of projections; the wavefront by what attention is given."""
    hf_model = doubles.another_k_proj()
    assert sweep(hf_model, tmp_path / "w", components=["head_k"]).attrs["backend"] == "wavefront"
    with pytest.raises(ps.BadInput, match=r"through nnsight: head_k patched in layer \d, kv_head"):
        sweep(hf_model, tmp_path / "n", components=["head_k"], backend="nnsight")


LIES: list[tuple[dict[str, Any], list[str], str]] = [
    ({"kv_heads": 3}, ["head_v"], "head_v of layer 0 .* given 2 heads, .* say 3"),
    ({"heads": 3, "d_head": 16}, ["head_z"], "head_z of layer 0 .* given 6 heads, .* say 3"),
    ({"neurons": 32}, ["neuron"], "neuron of layer 0 .* has 64 of them, .* say 32"),
    ({"windows": (4, 4, 4)}, ["head_v"], "head_v patched in layer .* nothing can change moves"),
    ({"windows": (None, None, 4)}, ["resid_pre"], "resid_pre patched in layer 2 where"),
]


@pytest.mark.parametrize("backend", ["auto", "wavefront", "nnsight"])
@pytest.mark.parametrize(("said", "components", "says"), LIES)
def test_sizes_that_are_not_the_models(
    said: dict[str, Any],
    components: list[str],
    says: str,
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a config makes a plan believe."""
    hf_model = doubles.build()
    wrong = replace(ps.wrap(hf_model, Letters()).dimensions, **said)
    monkeypatch.setattr(ps.Model, "dimensions", property(lambda _: wrong))
    with pytest.raises(ps.BadInput, match=says):
        sweep(hf_model, tmp_path / "r", components=components, backend=backend)


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
@pytest.mark.parametrize("component", ["head_z", "mlp_out", "resid_pre", "head_q"])
def test_a_backend_that_lies_about_one_component(
    component: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch that is a little too weak, of one component in one layer; baselines are right."""
    from patchsweep.passes.taps import Editor

    own = Editor._write

    def write(self: Editor, edit: Any, layer: int) -> Any:
        tap = own(self, edit, layer)
        if (edit.component, layer) != (component, 1):
            return tap

        def weaker(x: torch.Tensor) -> None:
            before = x.clone()
            tap(x)
            x += 1e-2 * (before - x)

        return weaker

    monkeypatch.setattr(Editor, "_write", write)
    with pytest.raises(ps.BadInput, match=f"self-test .*: {component} patched in layer 1"):
        sweep(
            doubles.build(), tmp_path / "r", components=["resid_post", component], backend=backend
        )


@pytest.mark.parametrize("backend", ["auto", "wavefront", "nnsight"])
def test_a_window_of_some_heads_is_none(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Structural cells of the first ones are right; all tokens differ, so that no others matter."""
    hf_model = doubles.window_of_one_head(3)
    said = replace(ps.wrap(hf_model, Letters()).dimensions, windows=(3, 3, 3))
    monkeypatch.setattr(ps.Model, "dimensions", property(lambda _: said))
    pair = Pair(tuple(range(5, 14)), tuple(range(25, 34)), (40,), (41,))
    given: dict[str, Any] = {"components": ["head_v"], "metrics": ["logit_diff"]}
    with pytest.raises(ps.BadInput, match=r"head_v patched in layer 0 .* nothing can change moves"):
        ps.sweep(ps.wrap(hf_model, Letters()), [pair], out=tmp_path / "r", backend=backend, **given)


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
def test_where_no_cell_can_change_anything(backend: str, tmp_path: Path) -> None:
    """Windows so small that what differs never reaches the last token."""
    hf_model = doubles.build("mistral", sliding_window=2)
    results = sweep(hf_model, tmp_path / "r", components=["head_v"], backend=backend)
    test = results.attrs["self_test"]
    assert test["cells"] == 0 < test["structural"]
    status = results.store.read("head_v/logit_diff_status")[0, 0, 0, 0]  # the probe is of this pair
    assert set(np.unique(status)) <= {Status.STRUCTURAL, Status.OUTSIDE}


def test_windows_that_are_the_models(tmp_path: Path) -> None:
    hf_model = doubles.build("mistral", sliding_window=4)
    results = sweep(hf_model, tmp_path / "r", components=["resid_post"], backend="wavefront")
    true(results, hf_model, FAMILIES["mistral"])


def test_what_is_not_finite_is_as_far_as_can_be() -> None:
    a, b = torch.tensor([1.0, np.nan, np.inf, 3.0]), torch.tensor([np.nan, np.nan, np.inf, 2.5])
    far = torch.finfo(torch.float32).max
    assert selftest.difference(a, b).tolist() == [far, 0, 0, 0.5]


def test_results_say_what_was_compared(tmp_path: Path) -> None:
    for backend in ("wavefront", "nnsight"):
        given = {"components": ["head_q", "head_z"], "backend": backend}
        results = sweep(doubles.build(), tmp_path / backend, **given)
        test = results.attrs["self_test"]
        assert test["components"] == ["head_q", "head_z"]
        assert test["prompts"] == [6, 9]
        assert test["cells"] == 2 * CELLS
        # All there are on the longest pair.
        names = [f"{c}/logit_diff_status" for c in ("head_q", "head_z")]
        status = [results.store.read(name)[0, 0, 0, 0] for name in names]
        assert test["structural"] == sum(int((s == Status.STRUCTURAL).sum()) for s in status)
        assert 0 <= test["baseline_difference"] < 1e-7 < test["tolerance"]
        assert 0 <= test["cell_difference"] < 1e-7
        assert test["structural_difference"] < 1e-12


class _Odd(Exception):
    pass


def test_whatever_goes_wrong_on_the_wavefront_moves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise _Odd("a layer\nreturned a bat")

    monkeypatch.setattr(backends, "take_apart", fail)
    results = sweep(doubles.build(), tmp_path / "r")
    assert results.attrs["backend"] == "nnsight"
    assert "_Odd: a layer returned a bat" in results.attrs["backend_reason"]
    with pytest.raises(ps.BadInput, match="LlamaForCausalLM: _Odd: a layer returned a bat"):
        sweep(doubles.build(), tmp_path / "w", backend="wavefront")
    for stop in (KeyboardInterrupt(), MemoryError()):

        def end(*_: Any, stop: BaseException = stop, **__: Any) -> Any:
            raise stop

        monkeypatch.setattr(backends, "take_apart", end)
        kind = ps.BadInput if isinstance(stop, MemoryError) else KeyboardInterrupt
        with pytest.raises(kind, match="memory" if kind is ps.BadInput else None):
            sweep(doubles.build(), tmp_path / "r2")


def test_whatever_goes_wrong_through_nnsight_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise _Odd("no\nsuch thing")

    monkeypatch.setattr(interventions.Interventions, "_inside", fail)
    with pytest.raises(ps.BadInput) as error:
        sweep(doubles.build(), tmp_path / "r", backend="nnsight", components=["mlp_out"])
    said = str(error.value)
    assert "\n" not in said
    assert "LlamaForCausalLM" in said
    assert "layer" in said
    assert "nnsight" in said


def test_positions_that_are_counted_from_the_padding_token(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "roberta",
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=64,
        is_decoder=True,
        initializer_range=0.3,
    )
    hf_model = AutoModelForCausalLM.from_config(config).double().eval()
    results = sweep(hf_model, tmp_path / "r", components=["resid_post"])
    true(results, hf_model, replace(FAMILIES["llama"], layer="roberta.encoder.layer.{}"))


def test_attention_that_is_bidirectional_in_its_own_implementation(tmp_path: Path) -> None:
    hf_model = doubles.build("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ps.BadInput, match="is not causal"):
        sweep(hf_model, tmp_path / "r")


def test_a_window_that_the_model_ignores(tmp_path: Path) -> None:
    """Moshi's config names one."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "vocab_size": 50}
    config = AutoConfig.for_model("moshi", **sizes, ffn_dim=64, sliding_window=4, head_dim=8)
    hf_model = AutoModelForCausalLM.from_config(config).double().eval()
    layers = replace(FAMILIES["llama"], layer="model.layers.{}")
    try:
        results = sweep(hf_model, tmp_path / "r")
    except ps.BadInput as error:
        assert "nothing can change moves a logit" in str(error)
    else:
        true(results, hf_model, layers)


def test_a_model_that_cannot_be_called_at_all(tmp_path: Path) -> None:
    hf_model = doubles.build()
    own = hf_model.forward

    def forward(input_ids: Any, picture: Any = None, **kwargs: Any) -> Any:
        if picture is None:
            raise TypeError("no picture\nwas given")
        return own(input_ids=input_ids, **kwargs)

    hf_model.forward = forward
    with pytest.raises(ps.BadInput, match=r"cannot be run as .*TypeError: no picture was"):
        sweep(hf_model, tmp_path / "r")
