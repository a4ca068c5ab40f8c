"""Sweeps through the library: bad input, values that are not finite, determinism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import patchsweep as ps
from patchsweep.engine import loop as engine
from patchsweep.sites import Status
from tiny import BROKEN, SETTINGS, arrays, broken, build, pairs_of, rows, tokenizer, values


@pytest.fixture
def model() -> ps.Model:
    return ps.wrap(build(), tokenizer(), "tiny")


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


def test_results_that_another_run_has_just_changed(
    model: ps.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at them and the lock, while the sweep is planned."""
    pairs, some = pairs_of(model, rows(2)), {**SETTINGS, "components": ["mlp_out"]}
    ps.sweep(model, pairs[:1], out=tmp_path / "r.zarr", **some)
    lock = engine.job

    def late(*args: Any) -> Any:
        monkeypatch.setattr(engine, "job", lock)
        ps.sweep(model, pairs, out=tmp_path / "r.zarr", append=True, **some)
        return lock(*args)

    monkeypatch.setattr(engine, "job", late)
    with pytest.raises(ps.BadInput, match=r"r\.zarr was just changed by another run: run again"):
        ps.sweep(model, pairs[:1], out=tmp_path / "r.zarr", resume=True, **some)
    assert len(ps.open(tmp_path / "r.zarr").attrs["appended"]) == 1


def test_going_on_keeps_the_token_budget(
    model: ps.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free by now: the waves have to be the same ones."""
    pairs = pairs_of(model, rows(3))
    for out, budget in (("a", 60), ("b", 300), ("a", 300)):
        monkeypatch.setattr("patchsweep.engine.planning.auto_budget", lambda *_, b=budget: (b, b))
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
