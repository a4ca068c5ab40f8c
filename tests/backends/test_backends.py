"""The nnsight backend, and which backend a sweep takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import CONFIG  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import patchsweep as ps
from cells import FEW, METRICS, check
from expected import Case
from inputs import SOURCES, Letters, pair_of, three, unequal
from oracle.families import ELSEWHERE, EVERY, FAMILIES
from patchsweep.backends import choice as backends
from patchsweep.backends import selftest
from patchsweep.sites import COMPONENTS

# Of these the order of queries, keys and values in their projection is not known.
WITHOUT_QKV = ("falcon_grouped", "codegen", "deepseek_v3")
# What attends in a method of its own, which patchsweep's attention can stand in for.
METHOD = ("gptj", "gpt_neo", "codegen")
BOTH = ("llama", "gpt2", "gpt_neox", "gemma2", "opt", "granite")
BOTH += ("mixtral", "gpt_oss", "deepseek_v3")


def able(name: str) -> list[str]:
    """The components that nnsight can patch in a family."""
    family = EVERY[name]
    missing = {"sae_feature", "head_pattern"} | ({"resid_mid"} if family.parallel else set())
    missing |= {"neuron"} if family.down is None else set()
    missing |= {"head_q", "head_k", "head_v"} if name in WITHOUT_QKV else set()
    return [c for c in COMPONENTS if c not in missing]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_families_without_the_interface(name: str) -> None:
    """Through nnsight every component and metric is the oracle's."""
    metrics = METRICS if name == "bloom" else FEW
    given = {"components": able(name), "direction": "both", "metrics": metrics}
    assert check(Case(name, three()[:2], {**given, "backend": "nnsight"}), 45) > 10


@pytest.mark.parametrize("name", METHOD)
def test_families_that_attend_in_a_method(name: str) -> None:
    """They run on the wavefront too."""
    given = {"components": able(name), "direction": "both"}
    assert check(Case(name, three(), {**given, "backend": "wavefront"}), 60) > 10


@pytest.mark.parametrize("name", [n for n in ELSEWHERE if n not in METHOD])
def test_auto_takes_nnsight_and_says_why(name: str, tmp_path: Path) -> None:
    model = ps.wrap(EVERY[name].build(3, 1), Letters())
    one = {"components": ["head_z"], "positions": [-1]}
    attrs = ps.sweep(model, three(), out=tmp_path / "r.zarr", **one).attrs
    assert attrs["backend"] == "nnsight"
    assert "cannot run on the wavefront" in attrs["backend_reason"]
    with pytest.raises(ps.BadInput, match="cannot run on the wavefront"):
        ps.sweep(model, three(), out=tmp_path / "w.zarr", backend="wavefront", **one)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_model_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    hf_model = EVERY[name].build(2, 1)

    def state() -> dict[str, Any]:
        return {k: dict(vars(m)) for k, m in hf_model.named_modules()}

    before, attention = state(), hf_model.config._attn_implementation
    given = {"components": ["head_z"], "backend": "nnsight"}
    ps.sweep(ps.wrap(hf_model, Letters()), three(), out=tmp_path / "r", **given)
    assert state().keys() == before.keys()
    for module, after in state().items():
        assert after.keys() == before[module].keys()
        assert after.get("forward") is before[module].get("forward")
        assert not after["_forward_hooks"]
        assert not after["_forward_pre_hooks"]
    assert hf_model.config._attn_implementation == attention


def test_a_method_of_another_kind(tmp_path: Path) -> None:
    """OpenAI GPT attends in a method of the same name that takes more; its layers return lists."""
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=50, n_embd=48, n_layer=2, n_head=6, n_positions=64
    )
    hf_model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    one: dict[str, Any] = {"components": ["resid_pre"], "metrics": ["logit"]}
    results = ps.sweep(ps.wrap(hf_model, Letters()), three(), out=tmp_path / "r", **one)
    assert results.attrs["backend"] == "nnsight"
    for pair, found in zip(three(), results.store.read("baseline/logit")[0, 0, 0], strict=True):
        logits = hf_model(torch.tensor([pair.clean])).logits[0, -1]
        assert found == pytest.approx(float(logits[list(pair.answer)].mean()), abs=1e-6)


def arrays(results: ps.Results) -> dict[str, np.ndarray]:
    """Everything that was measured."""
    names = [f"{c}/{m}{s}" for c in results.components for m in results.metrics for s in SUFFIXES]
    names += [f"baseline/{m}" for m in results.metrics]
    return {name: results.store.read(name) for name in names}


SUFFIXES = ("", "_status")


def agree(case: Case, out: Path, tolerance: float) -> None:
    """One sweep through both backends: whole grids are equal, statuses exactly."""
    model = ps.wrap(EVERY[case.family].build(case.layers, case.seed), Letters())
    found = [
        arrays(ps.sweep(model, case.pairs, out=out / b, backend=b, **case.settings))
        for b in ("wavefront", "nnsight")
    ]
    for name, one in found[0].items():
        np.testing.assert_allclose(one, found[1][name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", BOTH)
def test_both_backends_agree(name: str, tmp_path: Path) -> None:
    metrics = METRICS if name == "llama" else FEW
    given = {"components": able(name), "direction": "both", "metrics": metrics}
    agree(Case(name, three()[:2], given, layers=2), tmp_path, FAMILIES[name].tolerance)


@pytest.mark.parametrize("multi_query", [True, False])
def test_both_backends_agree_on_gpt_bigcode(multi_query: bool, tmp_path: Path) -> None:
    """Its projection lies by head, but for one key-value head."""
    config = {"model_type": "gpt_bigcode", "config": {"multi_query": multi_query}}
    hf_model = replace(FAMILIES["gpt2"], **config).build(2, 1)
    model = ps.wrap(hf_model, Letters())
    given: dict[str, Any] = {"components": ["head_q", "head_k", "head_v", "head_z"]}
    one, other = (
        arrays(ps.sweep(model, three(), out=tmp_path / b, backend=b, **given))
        for b in ("wavefront", "nnsight")
    )
    for name, found in one.items():
        np.testing.assert_allclose(found, other[name], rtol=0, atol=1e-9, err_msg=name)


# Granite multiplies embeddings, Gemma scales them.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in SOURCES if kind != "pairs"),
        ("gemma2", "noise of the table"),
        ("granite", "ablations"),
    ],
)
def test_both_backends_agree_on_every_source(name: str, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pairs = [pair_of(rng, 6, 1), pair_of(rng, 6, 2), pair_of(rng, 5, 1), pair_of(rng, 5, 1)]
    unrotated = "mean" in str(SOURCES[kind])
    some = [c for c in able(name) if not (unrotated and c in ("head_q", "head_k"))]
    given = {"components": some, "direction": "both", **SOURCES[kind]}
    agree(Case(name, pairs, given, layers=2), tmp_path, FAMILIES[name].tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_both_backends_agree_on_prompts_of_unequal_length(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    given = {"components": able(name), "direction": "both"}
    pairs = [unequal(rng, 6, 2), unequal(rng, 7, 1)]
    agree(Case(name, pairs, given, layers=2), tmp_path, FAMILIES[name].tolerance)


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_sets_features_and_what_metrics_read_inside(name: str) -> None:
    """Through nnsight against the oracle."""
    given: dict[str, Any] = {
        "components": [*able(name), "sae_feature"],
        "direction": "both",
        "metrics": "inner",
        "windows": [2],
        "sets": {"some": ["mlp_out.0", "head_z.1.2@-1", "sae_feature.3@-2"]},
        "backend": "nnsight",
    }
    assert check(Case(name, three(3)[:2], given, sae_at="mlp_out"), 60) > 10


def test_both_backends_on_the_real_model(smollm2: ps.Model, tmp_path: Path) -> None:
    texts = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
    pair = ps.make_pair(smollm2.tokenizer, *texts)
    given: dict[str, Any] = {
        "components": ["head_z", "mlp_out", "head_k"],
        "positions": [-1],
        "metrics": ["logit_diff", "kl", "rank"],
    }
    one, other = (
        arrays(ps.sweep(smollm2, [pair], out=tmp_path / b, backend=b, **given))
        for b in ("wavefront", "nnsight")
    )
    for name, found in one.items():
        atol = 1 if name.endswith("/rank") else 2e-4  # two tokens may be as likely as each other
        np.testing.assert_allclose(found, other[name], rtol=0, atol=atol, err_msg=name)


class _Normed(torch.nn.Module):
    """A projection with a norm of its own, before it or after; there it sees [token, head,
    width]."""

    def __init__(self, own: torch.nn.Linear, name: str, before: bool) -> None:
        super().__init__()
        self.own, self.name, self.before = own, name, before
        width = own.in_features if before else 8
        norm = torch.nn.LayerNorm(width, dtype=own.weight.dtype)
        norm.weight.data = torch.linspace(0.5, 2, width, dtype=own.weight.dtype)
        norm.bias.data += 0.3
        self.add_module(name, norm.requires_grad_(False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = getattr(self, self.name)
        if self.before:
            return self.own(norm(hidden))
        by_head = norm(self.own(hidden).reshape(-1, self.own.out_features // 8, 8))
        return by_head.view(*hidden.shape[:-1], -1)


@pytest.mark.parametrize("before", [True, False])
def test_norms_of_another_shape(before: bool, tmp_path: Path) -> None:
    """Where they do not show queries and keys by head, what comes after them does."""
    hf_model = FAMILIES["llama"].build(2, 1)
    for layer in hf_model.model.layers:
        for name in ("q", "k"):
            own = getattr(layer.self_attn, f"{name}_proj")
            setattr(layer.self_attn, f"{name}_proj", _Normed(own, f"{name}_norm", before))
    pairs = three()[:2]
    given: dict[str, Any] = {"components": ["head_q", "head_k"], "source": "zero"}
    one, other = (
        arrays(
            ps.sweep(
                ps.wrap(hf_model, Letters()),
                pairs,
                out=tmp_path / b,
                backend=b,
                direction="noise",
                **given,
            )
        )
        for b in ("wavefront", "nnsight")
    )
    for name, found in one.items():
        np.testing.assert_allclose(found, other[name], rtol=0, atol=1e-9, err_msg=name)


class _Attention(torch.nn.Module):
    """Attention that returns a tuple of one."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (self.own(*args, **kwargs)[0],)


class _Two(torch.nn.Module):
    """Makes two of it."""

    def __init__(self, core: torch.nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return (*self.core(*args, **kwargs), None)


def test_attention_that_returns_a_tuple_of_one(tmp_path: Path) -> None:
    hf_model = FAMILIES["llama"].build(2, 1)

    def sweep(out: str) -> dict[str, np.ndarray]:
        given = {"components": ["head_z"], "positions": [-1], "backend": "nnsight"}
        model = ps.wrap(hf_model, Letters())
        return arrays(ps.sweep(model, three()[:1], out=tmp_path / out, **given))

    before = sweep("before")
    for layer in hf_model.model.layers:
        layer.self_attn = _Two(_Attention(layer.self_attn))
    for name, found in sweep("after").items():
        np.testing.assert_array_equal(found, before[name], err_msg=name)


class _TwoWays(torch.nn.Module):
    """An MLP that also looks ahead, a little."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.own(hidden + 0.001 * hidden.mean(1, keepdim=True), *args, **kwargs)


def test_what_neither_backend_can_run(tmp_path: Path) -> None:
    hf_model = FAMILIES["llama"].build(2, 1)
    hf_model.model.layers[0].mlp = _TwoWays(hf_model.model.layers[0].mlp)
    with pytest.raises(ps.BadInput, match=r"not causal .* neither backend can run it"):
        ps.sweep(ps.wrap(hf_model, Letters()), three(), out=tmp_path / "r", components=["head_z"])


def test_pairs_of_unequal_length_where_positions_depend_on_it(tmp_path: Path) -> None:
    """A shorter prompt is padded, which must not change what it computes."""
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 8
    hf_model = FAMILIES["phi3"].build(
        2, 1, rope_parameters=rope, original_max_position_embeddings=8
    )
    pairs = [unequal(np.random.default_rng(2), 7, 2)]
    for backend in ("auto", "nnsight"):
        with pytest.raises(ps.BadInput, match=r"here 7 and 9 tokens.*: sweep pairs of one length"):
            ps.sweep(
                ps.wrap(hf_model, Letters()),
                pairs,
                out=tmp_path / "r",
                backend=backend,
                components=["resid_pre"],
            )


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_what_is_no_causal_model_with_attention(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, vocab_size=50, num_hidden_layers=2, num_layers=2)
    hf_model = (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_config(config)
    with pytest.raises(ps.BadInput, match="no causal language model with attention"):
        ps.sweep(ps.wrap(hf_model, Letters()), three(), out=tmp_path / "r", components=["mlp_out"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"components": ["head_pattern"]}, "head_pattern cannot be patched through nnsight"),
    ({"components": ["resid_mid"]}, "resid_mid cannot be patched through nnsight .*parallel"),
    (
        {"components": ["head_q"], "source": [{"mean": {"prompts": "clean"}}]},
        "before they are rotated, a mean or a vector is meant after: .* or use the wavefront",
    ),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_refused_in_one_line(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = ps.wrap(FAMILIES["gpt_neox"].build(2, 1), Letters())
    with pytest.raises(ps.BadInput, match=says) as error:
        ps.sweep(model, three(), out=tmp_path / "r", backend="nnsight", direction="noise", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


def test_remote_needs_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    model = ps.wrap(FAMILIES["gpt2"].build(2, 1), Letters())
    given: dict[str, Any] = {"components": ["head_z"], "remote": True}
    with pytest.raises(ps.BadInput, match="needs a key for NDIF: set NDIF_API_KEY"):
        ps.sweep(model, three(), out=tmp_path / "r", backend="nnsight", **given)
    with pytest.raises(ps.BadInput, match="remote runs through nnsight"):
        ps.sweep(model, three(), out=tmp_path / "r", **given)


def test_a_self_test_is_done_once_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "kept_in", lambda: tmp_path / "kept")
    done: list[int] = []
    ask = selftest.ask
    monkeypatch.setattr(selftest, "ask", lambda *args: done.append(1) or ask(*args))

    def sweep(seed: int, out: str, component: str = "head_z", **more: Any) -> dict[str, Any]:
        model = ps.wrap(FAMILIES["llama"].build(2, seed), Letters())
        return ps.sweep(model, three(), out=tmp_path / out, components=[component], **more).attrs

    first, again = sweep(1, "a"), sweep(1, "b")
    assert len(done) == 1
    assert first["self_test"] == again["self_test"]
    sweep(2, "another model")
    sweep(1, "another component", "mlp_out")
    assert len(done) == 3
    one, other = (sweep(1, out, backend="nnsight") for out in ("n", "m"))
    assert len(done) == 4
    assert one["self_test"] == other["self_test"]
    for file in (tmp_path / "kept").iterdir():
        file.write_text("{")  # cut off
    sweep(1, "c")
    assert len(done) == 5


def test_what_is_kept_hangs_on_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the engine and of the kernels: a change in any of them is tested anew."""
    root = Path(__file__).parents[2]
    files = {*root.glob("engine/**/*.py"), *root.glob("kernels/**/*.py")}
    read, read_bytes = set[Path](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path) or read_bytes(path))
    backends._code.__wrapped__()
    assert read == files
