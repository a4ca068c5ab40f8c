"""Reproductions over heads and of the known circuits: against full forwards, and what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from oracle import oracle
from oracle.families import FAMILIES
from patchsweep.model.loading import load_tokenizer
from patchsweep.reproduce import docstring, gates, heads, how_to
from patchsweep.reproduce.experiment import Report, Setting
from patchsweep.tasks.known_circuits import KNOWN, KNOWN_SETS
from tiny import build

LLAMA = FAMILIES["llama"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two pairs, and a small random model in float64 that reads the packaged tokenizer's texts."""
    hf_model = build(3, intermediate_size=32, vocab=49152).double()
    model = ps.wrap(hf_model, load_tokenizer("smollm2-135m"), "tiny")
    return Setting(model, 2, 0, tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def report(setting: Setting) -> Report:
    return how_to.run(setting)


def recovered(setting: Setting, found: Sequence[tuple[int, int]], denoise: bool) -> float:
    """The share of the logit difference with some heads clean, and all others corrupt: only those
    heads patched into the corrupt run, or all others into the clean one."""
    model, every = setting.model.hf_model, [(layer, h) for layer in range(3) for h in range(4)]
    patched = found if denoise else [cell for cell in every if cell not in found]
    moved, spans = [], []
    for pair in setting.pairs("ioi"):
        ids = (pair.corrupt, pair.clean) if denoise else (pair.clean, pair.corrupt)
        positions = range(len(pair))
        sites = [("head_z", layer, head, positions) for layer, head in patched]
        runs = [oracle.run_set(model, LLAMA, *ids, sites)]
        runs += [oracle.baseline(model, x) for x in (pair.clean, pair.corrupt)]
        value, clean, corrupt = (oracle.logit_diff(x, pair.answer, pair.wrong) for x in runs)
        moved.append(float(value - corrupt))
        spans.append(float(clean - corrupt))
    return sum(moved) / sum(spans)


def rows(report: Report, title: str) -> list[dict[str, str]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_circuits_are_the_best_heads_and_the_best_that_help(
    setting: Setting, report: Report
) -> None:
    alone = {
        (layer, head): recovered(setting, [(layer, head)], True)
        for layer in range(3)
        for head in range(4)
    }
    best = sorted(alone, key=lambda cell: -abs(alone[cell]))
    assert min(alone.values()) < 0  # or there is only one circuit
    rankings = {
        "largest effects": best,
        "largest positive effects": [cell for cell in best if alone[cell] > 0],
    }
    shown = rows(report, "Logit difference recovered by circuit size")
    for name, ranking in rankings.items():
        for size in (2, 5):
            (row,) = [r for r in shown if (r["ranking"], r["heads"]) == (name, str(size))]
            wanted = [recovered(setting, ranking[:size], way) for way in (False, True)]
            found = [row["all others noised"], row["these alone denoised"]]
            assert found == [f"{value:.3f}" for value in wanted]


def test_a_row_per_head_and_a_column_per_metric(setting: Setting, report: Report) -> None:
    title = "Effects of the heads that any metric detects, a column per metric (* detects it)"
    shown = [row for row in rows(report, title) if row["direction"] == "denoise"]
    every = {
        f"{layer}.{head}": recovered(setting, [(layer, head)], True)
        for layer in range(3)
        for head in range(4)
    }
    values = np.array([*every.values()])
    far = np.abs(values - values.mean()) > 2 * values.std()
    assert far.any()
    for (head, value), detected in zip(every.items(), far, strict=True):
        found = [row["logit_diff"] for row in shown if row["head"] == head]
        assert found == [f"{value:+.3f}{' *' if detected else ''}"] * len(found)
        assert found or not detected
    sizes = [abs(every[row["head"]]) for row in shown]
    assert sizes == sorted(sizes, reverse=True)


def test_its_figures_can_be_drawn(report: Report) -> None:
    for figure in report.figures.values():
        drawn = BytesIO()
        figure.savefig(drawn, dpi=40)
        assert drawn.getbuffer().nbytes > 5000


def test_noise_levels_are_those_of_the_corrupt_runs(setting: Setting, report: Report) -> None:
    shown = rows(report, "Gaussian noise on S2 by its level")
    one = setting.gaussian(["S2"])["gaussian"]
    results = setting.sweep(
        "one-level",
        setting.pairs("ioi"),
        corrupt={"gaussian": one},
        components=["mlp_out"],
        positions=["END"],
    )
    clean, corrupt = results.baseline("logit_diff").mean((1, 2, 3))
    (row,) = [r for r in shown if r["sigma"] == "3"]
    assert row["logit difference left"] == f"{corrupt / clean:.2f}"


@pytest.mark.usefixtures("report")
def test_gates_are_as_they_were_set(setting: Setting) -> None:
    found = gates.sweeps(setting)
    for circuit, results in found.items():
        for site, known in KNOWN[circuit].items():
            assert gates.effect(results, site) == pytest.approx(known, abs=1e-6)
        for name, known_set in KNOWN_SETS.get(circuit, {}).items():
            assert gates.of_set(results, name) == pytest.approx(known_set.effect, abs=1e-6)
    assert all(finding.holds for finding in gates.findings(found))
    # What is said of one gate is not true of the other.
    swapped = {**found, "and": found["or"], "and_first": found["and_second"]}
    assert [f.holds for f in gates.findings(swapped)] == [False, True, False, True]


def test_docstring_heads_are_detected_over_both_positions(setting: Setting) -> None:
    own = replace(setting, out=setting.out / "docstring")
    report = docstring.run(own)
    for corruption in ("STR", "GN"):
        results = ps.open(own.out / f"{corruption.lower()}.zarr")
        cells = list(results.detections("head_z", "logit_diff", "denoise").itertuples())
        for at, called in docstring.POSITIONS.items():
            (row,) = [
                r
                for r in rows(report, f"Detected heads at {called}")
                if (r["corruption"], r["metric"]) == (corruption, "logit difference")
            ]
            for sign, column in ((1, "positive"), (-1, "negative")):
                wanted = [
                    f"{c.layer}.{c.head}"
                    for c in cells
                    if c.position == at and np.sign(c.effect) == sign
                ]
                assert row[column] == heads.text(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("run", [docstring.run, how_to.run])
def test_on_a_trained_model(run: Any, tmp_path: Any) -> None:
    setting = Setting(ps.load_model("smollm2-135m"), 2, 0, tmp_path)
    report = run(setting)
    text = report.write(tmp_path / "report").read_text()
    assert "| here it |" in text
    assert "nan" not in text
