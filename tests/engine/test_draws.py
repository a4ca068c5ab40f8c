"""Noise and resampled prompts hang on the prompts themselves, not on where they stand in a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from inputs import Letters, pair_of
from oracle.families import FAMILIES
from patchsweep.engine import prepare
from patchsweep.pairs import Pair

NOISE: dict[str, Any] = {
    "corrupt": {"gaussian": {"sigma": 3, "tokens": [1, 2], "samples": 2, "std": "table"}}
}
RESAMPLED: dict[str, Any] = {
    "source": {"resample": {"samples": 3, "seed": 4}},
    "direction": "noise",
}


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.wrap(FAMILIES["llama"].build(2), Letters())


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(3)
    return [pair_of(rng, 6, 2, group=str(i)) for i in range(5)]


def corrupt(model: ps.Model, pairs: list[Pair], out: Path, **settings: Any) -> np.ndarray:
    """What the run of every pair says that it is set against, [pair, sample]."""
    results = ps.sweep(model, pairs, components=["mlp_out"], positions=[-1], out=out, **settings)
    assert results.attrs["backend"] == settings.get("backend", "wavefront")
    return results.baseline("logit_diff")[1, 0].T


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
@pytest.mark.parametrize("settings", [NOISE, RESAMPLED], ids=["noise", "resample"])
def test_a_reordered_list_keeps_its_draws(
    model: ps.Model, pairs: list[Pair], tmp_path: Path, settings: dict[str, Any], backend: str
) -> None:
    before = corrupt(model, pairs, tmp_path / "a", backend=backend, **settings)
    assert len(np.unique(before.round(6))) > len(pairs)
    order = [3, 0, 4, 2, 1]
    after = corrupt(model, [pairs[i] for i in order], tmp_path / "b", backend=backend, **settings)
    np.testing.assert_allclose(after, before[order], atol=1e-9)


def test_a_filtered_list_keeps_its_noise(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    before = corrupt(model, pairs, tmp_path / "a", **NOISE)
    after = corrupt(model, pairs[2:], tmp_path / "b", **NOISE)
    np.testing.assert_allclose(after, before[2:], atol=1e-9)
    assert not np.allclose(before[0], before[1])
    assert not np.allclose(before[:, 0], before[:, 1])


def test_a_filtered_list_keeps_the_prompts_drawn_that_it_has(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    """Which prompt was drawn is told by the run alone: that of its tokens."""
    before = corrupt(model, pairs, tmp_path / "a", **RESAMPLED)
    after = corrupt(model, pairs[1:], tmp_path / "b", **RESAMPLED)
    moved = 0
    for i, pair in enumerate(pairs[1:], start=1):
        with torch.no_grad():
            logits = model.hf_model(input_ids=torch.tensor([p.clean for p in pairs])).logits[:, -1]
        answer, wrong = (logits[:, list(t)].mean(1) for t in (pair.answer, pair.wrong))
        runs = (answer - wrong).numpy()
        for n in range(3):
            [drawn] = np.flatnonzero(np.isclose(runs, before[i, n], atol=1e-9))
            assert drawn != i
            if drawn == 0:  # gone: another is drawn
                moved += 1
                assert not np.isclose(after[i - 1, n], before[i, n])
            else:
                np.testing.assert_allclose(after[i - 1, n], before[i, n], atol=1e-9)
    assert 0 < moved < 12


def test_an_estimate_sees_the_same_noise(
    model: ps.Model, pairs: list[Pair], tmp_path: Path
) -> None:
    found = []
    for name, some in (("a", pairs), ("b", pairs[::-1])):
        results = ps.sweep(
            model, some, components=["mlp_out"], estimate=True, out=tmp_path / name, **NOISE
        )
        estimate = results.store.read("mlp_out/logit_diff_estimate")
        found.append(estimate[0, 0])  # [sample, pair, layer, unit, position]
    np.testing.assert_allclose(found[1][:, ::-1], found[0], atol=1e-9)


def test_older_results_with_other_draws_are_of_another_sweep(
    model: ps.Model, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a version that drew by the place in the list says of its values has no noise in it."""
    with monkeypatch.context() as before:
        before.setattr(prepare, "DRAWS", "")
        corrupt(model, pairs, tmp_path / "a", **NOISE)
    with pytest.raises(ps.BadInput, match="another sweep"):
        corrupt(model, pairs, tmp_path / "a", resume=True, **NOISE)
