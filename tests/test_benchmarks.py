"""The benchmarks run, on tiny models, and their two ways to the same cell agree. No timings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 1e-6  # float32, logits around 0.1


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found, and one thread is enough for the process that measures memory."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT))


def check(case: dict[str, Any]) -> None:
    """A case holds what it says, and wave and full forwards agree where effects are larger."""
    grid, tight = case["grid"], case["grid"]["dtype"] == "float32"
    full, wave = np.array(grid["by_full_forward"]), np.array(grid["by_wave"])
    runs = np.array(grid["is_run"])
    assert len(full) == 12
    assert np.ptp(full[runs]) > 100 * CLOSE
    assert np.allclose(full, wave, rtol=0, atol=CLOSE if tight else 1e-2)
    assert np.ptp(wave[~runs]) == 0  # structural: the baseline
    assert 0 < grid["runs"] < grid["cells"]
    assert all(value > 0 for r in grid["rounds"] for value in r.values())
    assert case["memory"]["planned"] > 0
    if not tight:
        assert case["low"]["full_max"] < 1e-2


def test_cpu_sweep_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.cpu_sweep import cpu_sweep

    cpu_sweep(tiny=True, out=tmp_path / "new" / "cpu.json")
    case = json.loads((tmp_path / "new" / "cpu.json").read_text())
    check(case)
    assert case["pairs"]["runs"]["many"] == 8 * case["pairs"]["runs"]["one"]
    assert case["low"]["cells"] == sum(case["grid"]["is_run"])
    printed = capsys.readouterr().out
    assert printed.count("PASS") + printed.count("MISS") == len(case["targets"])


def test_every_cell_can_be_measured() -> None:
    from benchmarks._measure import Effort, measure
    from benchmarks._models import load, middle_pairs

    model = load("tiny-gpt2", "float32", "cpu")
    pair = middle_pairs(model, 5, 1)[0]
    found = measure(model, pair, Effort(rounds=2, singles=None, batches=None, side=8))
    assert found.whole
    assert found.timed_cells == {"single": found.cells, "batch_32": found.cells}
    assert sorted(map(tuple, found.sampled)) == list(np.ndindex(2, 4, 5))
    assert np.allclose(found.by_wave, found.by_full_forward, rtol=0, atol=CLOSE)


def test_gpu_sweep_runs(tmp_path: Path) -> None:
    from benchmarks.gpu_sweep import gpu_sweep

    gpu_sweep(tiny=True, out=tmp_path / "gpu.json")
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert len({(c["grid"]["model"], c["grid"]["dtype"], c["grid"]["tokens"]) for c in cases}) == 8
    for case in cases:
        check(case)


def test_gpu_sweep_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu_sweep import gpu_sweep

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_sweep()
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_backends_run(tmp_path: Path) -> None:
    from benchmarks.backends import WAYS, backends

    backends(tiny=True, rounds=1, cells=8, out=tmp_path / "backends.json")
    found = json.loads((tmp_path / "backends.json").read_text())
    assert found["differences"].keys() == WAYS.keys()
    assert max(found["differences"].values()) < 2e-4
    assert found["differences"]["offloaded"] == 0


def test_edges_run(tmp_path: Path) -> None:
    """Both ways agree over edges and over a path; scores stand beside all edges that are run."""
    from benchmarks.edges import edges

    edges(tiny=True, pairs=1, batches=1, rounds=1, out=tmp_path / "edges.json")
    found = json.loads((tmp_path / "edges.json").read_text())
    assert found["edges"]["sampled"] == 32
    assert found["edges"]["difference"] < CLOSE
    assert found["paths"]["difference"] < CLOSE
    assert found["paths"]["heads"] == 8
    names = {s["estimator"]: s["cells"] for s in found["scores"]["tiny"]}
    assert names == dict.fromkeys(("eap", "eap_ig"), found["edges"]["runs"])


def test_attribution_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are those of the estimates that a sweep writes beside its exact results."""
    from benchmarks._models import load, middle_pairs
    from benchmarks.attribution import attribution

    import patchsweep as ps

    out, names = tmp_path / "attribution.json", ("head_q", "mlp_out", "neuron")
    attribution(tiny=True, pairs=1, ig=1, rounds=1, components=names, out=out)
    found = json.loads(out.read_text())
    scores = {
        (s["component"], s["estimator"]): s
        for case in found["cases"]
        for s in case["scores"] + case["by_path"]
    }
    kept = {k["component"]: k for case in found["cases"] for k in case["kept"]}
    assert set(scores) == {
        *(("head_q", e) for e in ("atp", "atp_qk", "atp_star")),
        *(("mlp_out", e) for e in ("atp", "relp", "atp_star", "ig")),
        *(("neuron", e) for e in ("atp", "relp", "atp_star")),
    }
    model = load("tiny-llama", "float32", "cpu")
    for estimator in ("atp", "atp_star"):
        swept = ps.sweep(
            model,
            middle_pairs(model, 8, 1),
            out=tmp_path / estimator,
            components=names,
            metrics=["logit_diff"],
            direction="denoise",
            prefilter={"estimator": estimator, "keep": "100%"},
        )
        for name in names:
            said, score = swept.agreement(name, "logit_diff"), scores[name, estimator]
            assert score["cells"] == said.cells
            assert score["pearson"] == pytest.approx(said.pearson, abs=1e-5)
            assert score["spearman"] == pytest.approx(said.spearman, abs=1e-5)
    assert kept["neuron"]["kept"] == -(-kept["neuron"]["cells"] // 20)
    assert kept["neuron"]["cells"] == scores["neuron", "atp"]["cells"]
    spent = {c["estimator"]: c["in_flops"] for c in found["cost"]}
    assert spent["forward"] == 1
    assert 1 < spent["atp"] < 4
    assert spent["atp_star"] > spent["atp"]  # a backward for every layer
    printed = capsys.readouterr().out
    assert printed.count("PASS") + printed.count("MISS") == len(found["targets"])


def test_recall() -> None:
    from benchmarks._faithful import recall

    exact = np.array([-9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    estimated = np.array([5.0, 0, -9, 0, 0, 0, 8, 0, 0, 0])  # largest: 2, 6, 0
    assert recall(estimated, exact, 10, 10) == 0
    assert recall(estimated, exact, 1, 30) == 1  # one cell: rounded up
    assert recall(estimated, exact, 40, 30) == 0.5
    assert recall(exact, exact, 25, 25) == 1


def test_scaling_is_simulated() -> None:
    from benchmarks._models import SHAPES
    from benchmarks.scaling import PLANNED, planned, schedule, simulate, store_rate

    assert schedule([4, 3, 3, 2, 1], 2) == 7  # 4 + 2 and 3 + 3 + 1
    assert schedule([1.0] * 7, 3) == 3
    plan = planned(SHAPES["tiny-llama"], (5, 8), 300, 2 * PLANNED)
    once, twice = (simulate("tiny", plan, 3, n * PLANNED) for n in (1, 2))
    assert 2 * once.units == twice.units == 2 * len(plan.units)
    assert 0 < once.idle < 1
    assert simulate("tiny", plan, 1, PLANNED).idle == pytest.approx(0, abs=1e-9)
    assert store_rate(plan) > 0
