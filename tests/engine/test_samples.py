"""Sources with different numbers of samples in one sweep: none loses what it says because another
has more. Expected: what the first source says in a sweep of its own."""

from __future__ import annotations

import json
import re
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import patchsweep as ps
from inputs import Letters
from oracle.families import FAMILIES
from patchsweep.pairs import Pair
from patchsweep.report.page_data import page_data
from patchsweep.report.terminal import show

SETTINGS: dict[str, Any] = {
    "components": ["mlp_out"],
    "metrics": ["logit_diff", "prob", "rank"],
    "direction": "noise",
    "positions": [-1],
}


def pairs(hf_model: Any) -> list[Pair]:
    """Four: the answers of three are the least likely tokens; the right and wrong one of the last
    are of the unlikely ones those whose difference the two runs change least."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 50, (4, 2, 6)).tolist()
    with torch.no_grad():
        logits = hf_model(input_ids=torch.tensor(prompts).flatten(0, 1)).logits[:, -1]
    clean, corrupt = logits[::2], logits[1::2]
    answer, wrong = clean.argmin(-1).tolist(), [20, 21, 22, 23]
    low = clean[-1].argsort()[:8]
    moved, order = (clean - corrupt)[-1, low].sort()
    least = int(moved.diff().argmin())
    answer[-1], wrong[-1] = low[order[least : least + 2]].tolist()
    return [Pair(tuple(a), tuple(b), (answer[i],), (wrong[i],)) for i, (a, b) in enumerate(prompts)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ps.Results]:
    """The same sweep from one source, and beside one that is drawn three times."""
    folder = tmp_path_factory.mktemp("samples")
    hf_model = FAMILIES["llama"].build(2)
    model = ps.wrap(hf_model, Letters())
    sources: dict[str, Any] = {
        "alone": "other",
        "beside": ["other", {"resample": {"samples": 3}}],
    }
    return {
        name: ps.sweep(model, pairs(hf_model), source=source, out=folder / name, **SETTINGS)
        for name, source in sources.items()
    }


def test_the_warnings_are_the_same(both: dict[str, ps.Results]) -> None:
    alone = both["alone"].warnings()
    assert any("|clean − corrupt| is below 5%" in line for line in alone)
    assert any("prob is " in line and "before anything is patched" in line for line in alone)
    assert both["beside"].warnings() == alone


def test_the_baselines_are_shown(both: dict[str, ps.Results]) -> None:
    rows = []
    for results in both.values():
        text = StringIO()
        show(results, Console(file=text, width=80))
        [row] = re.findall(r"^ *logit_diff +(\S+) +(\S+) ", text.getvalue(), re.MULTILINE)
        rows.append(row)
    assert rows[0] == rows[1]
    clean, corrupt = both["alone"].baseline("logit_diff")[:, 0, 0].mean(1)
    assert [float(x) for x in rows[0]] == pytest.approx([clean, corrupt], rel=1e-3)


def test_the_page_has_the_same_numbers(both: dict[str, ps.Results]) -> None:
    alone, beside = (
        page_data(results)["alignments"][0]["components"][0]["ways"][0]["metrics"]
        for results in both.values()
    )
    assert None not in alone["logit_diff"]["destination"]
    assert None not in alone["logit_diff"]["patched"]
    assert json.dumps(beside) == json.dumps(alone)


@pytest.mark.parametrize("metric", SETTINGS["metrics"])
def test_statistics_are_the_same(both: dict[str, ps.Results], metric: str) -> None:
    at = {"component": "mlp_out", "metric": metric, "direction": "noise", "source": "other"}
    for name in ("effect", "interval", "p_values", "changes", "top", "standard_error"):
        alone, beside = (getattr(results, name)(**at) for results in both.values())
        if name == "top":
            assert alone.equals(beside) and len(alone)
        else:
            for a, b in zip(alone, beside, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_source_of_more_samples_is_the_mean_over_them(both: dict[str, ps.Results]) -> None:
    """Nor does the one with more lose any."""
    results = both["beside"]
    raw = results.store.read("mlp_out/logit_diff")[0, 1].astype(float)  # [sample, pair, layer, ...]
    assert np.isfinite(raw).all()
    clean, corrupt = results.baseline("logit_diff")[:, 1]
    structural = results.store.read("mlp_out/logit_diff_status")[0, 1] == 2
    moved = np.where(structural, 0, raw - clean[..., None, None, None])
    found, span = results.changes("mlp_out", "logit_diff", "noise", "resample")
    np.testing.assert_allclose(found, moved.mean(0), atol=1e-9)
    assert span is not None
    np.testing.assert_allclose(span, (corrupt - clean).mean(0), atol=1e-9)
