"""Indirect object identification by path patching: every number against two full forwards with
plain hooks, every step from the heads of the one before."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from oracle import oracle
from oracle import paths as by_hooks
from oracle.families import FAMILIES
from patchsweep.model.loading import load_tokenizer
from patchsweep.reproduce import ioi_paths, published, roles
from patchsweep.reproduce.experiment import Report, Setting
from patchsweep.reproduce.heads import Heads, text
from patchsweep.reproduce.path_steps import LAST, QUERIES, THROUGH, Step, steps_of
from patchsweep.sites import RECEIVERS, parse_node
from tiny import build

LAYERS, HEADS = 4, 4
LLAMA = FAMILIES["llama"]
KNOWN: dict[str, tuple[str, ...]] = dict.fromkeys(roles.CLASSES, ()) | {
    roles.MOVERS: ("3.1", "2.2"),
    roles.NEGATIVE: ("3.0",),
    roles.INHIBITION: ("0.3", "1.2", "1.3", "2.0"),
    roles.DUPLICATE: ("0.1",),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two pairs, and a small random model in float64 that reads the packaged tokenizer's texts."""
    hf_model = build(LAYERS, seed=4, intermediate_size=32, vocab=49152).double()
    model = ps.wrap(hf_model, load_tokenizer("smollm2-135m"), "tiny")
    return Setting(model, 2, 0, tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def report(setting: Setting) -> Report:
    """As if its circuit were published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "circuit", lambda _: KNOWN)
        return ioi_paths.run(setting)


DETECTED = "Detected heads by step"
# Step -> its receivers, label; of the first three the receivers are found, of the others published.
STEPS = {
    "heads to the logits at END": (["logits"], "END"),
    "heads to the queries of the name movers at END": (["head_q.2.0"], "END"),
    "heads to the values of the S-inhibition heads at S2": (["head_v.1.1"], "S2"),
    "heads to the queries of the published name movers at END": (
        ["head_q.3.1", "head_q.2.2"],
        "END",
    ),
    # Without head 0.3, which no head lies below; heads 1.2 and 1.3 share their values.
    "heads to the values of the published S-inhibition heads at S2": (
        ["head_v.1.1", "head_v.2.0"],
        "S2",
    ),
}


def rows(report: Report, title: str) -> list[dict[str, str]]:
    [table] = [t for t in report.tables if t.title == title]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@pytest.fixture(scope="module")
def by_hand(setting: Setting) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Step, through -> effects and relative changes [layer, head], NaN where a head lies below no
    receiver."""
    model, ends = setting.model.hf_model, np.zeros(2)
    moved = {(step, t): np.zeros((LAYERS, HEADS)) for step in STEPS for t in THROUGH}
    for pair in setting.pairs("ioi", corruption="abc"):
        runs = by_hooks.two(model, LLAMA, pair.clean, pair.corrupt)
        own = [oracle.baseline(model, ids) for ids in (pair.clean, pair.corrupt)]
        clean, corrupt = (float(oracle.logit_diff(x, pair.answer, pair.wrong)) for x in own)
        ends += clean, corrupt
        for (step, through), total in moved.items():
            receivers, label = STEPS[step]
            nodes = [parse_node(text, RECEIVERS) for text in receivers]
            at = pair.labels[label]
            for layer, head in np.ndindex(LAYERS, HEADS):
                sender = ("head_z", layer, head)
                read = [(r.component, r.layer or 0, r.unit or 0) for r in nodes]
                above = [r for r in read if r[0] == "logits" or runs.below(sender, r)]
                logits, would_be = runs.first([sender], {at: at}, through)
                if receivers != ["logits"]:
                    logits = runs.second(above, [at], would_be)
                patched = float(oracle.logit_diff(logits[-1], pair.answer, pair.wrong))
                total[layer, head] += patched - clean if above else np.nan
    return {key: (m / (ends[1] - ends[0]), m / ends[0]) for key, m in moved.items()}


def far(effect: np.ndarray) -> np.ndarray:
    return np.abs(effect - np.nanmean(effect)) > 2 * np.nanstd(effect)


def cells(effect: np.ndarray, change: np.ndarray, *head: int) -> tuple[str, str]:
    return f"{effect[head]:+.3f}{' *' if far(effect)[head] else ''}", f"{change[head]:+.1%}"


def named(cells: np.ndarray) -> list[str]:
    return [f"{layer}.{head}" for layer, head in np.argwhere(cells)]


@pytest.mark.parametrize("step", STEPS)
def test_effects_and_changes(report: Report, by_hand: Any, step: str) -> None:
    sides = [by_hand[step, through] for through in THROUGH]
    title = f"{step[0].upper()}{step[1:]} (* detected)"
    first = np.abs(sides[0][0])
    wanted = [
        (f"{layer}.{head}", *(shown for side in sides for shown in cells(*side, layer, head)))
        for layer, head in sorted(
            np.argwhere(far(sides[0][0]) | far(sides[1][0])), key=lambda at: -first[tuple(at)]
        )
    ]
    assert [tuple(row.values()) for row in rows(report, title)] == wanted
    both = np.stack([effect[np.isfinite(effect)] for effect, _ in sides])
    assert [tuple(r.values()) for r in rows(report, DETECTED) if r["step"] == step] == [
        (
            step,
            " ".join(STEPS[step][0]),
            THROUGH[through],
            text(named(far(effect) & (effect < 0))),
            text(named(far(effect) & (effect > 0))),
            f"{np.corrcoef(both)[0, 1]:.3f}",
        )
        for through, (effect, _) in zip(THROUGH, sides, strict=True)
    ]


def test_a_step_begins_with_what_the_one_before_found(report: Report, by_hand: Any) -> None:
    """The receivers in STEPS, which the report is held to, are these."""
    steps = [*STEPS]
    for step, following, component in zip(steps, steps[1:3], ("head_q", "head_v"), strict=False):
        effect = by_hand[step, "mlps"][0]
        found = [(layer, n) for layer, n in np.argwhere(far(effect) & (effect > 0)) if layer]
        shared = 2 if component == "head_v" else 1
        assert found
        assert STEPS[following][0] == [f"{component}.{layer}.{n // shared}" for layer, n in found]
    assert [row["step"] for row in rows(report, DETECTED)][::2] == [
        steps[i] for i in (0, 1, 3, 2, 4)
    ]


def test_against_published_classes(report: Report) -> None:
    shown = {row["step"]: [*row.values()][1:] for row in rows(report, "Against Wang et al. 2022")}
    assert shown["heads to the logits at END"] == [
        "name movers, negative name movers",
        "none",
        "+2.2 −3.0 +3.1",
        "+2.0",
    ]
    assert shown["heads to the queries of the name movers at END"] == [
        "S-inhibition",
        "+1.2",
        "+0.3 +1.3 +2.0",
        "none",
    ]
    assert "those of Wang et al. 2022: name movers 2.2 3.1;" in report.lines[-1]


def test_claims() -> None:
    """By hand: every claim holds, and fails by one head."""
    names = dict(zip(roles.LOOKS, np.zeros(5), strict=True))
    to = {"IO": names | {("END", "IO"): 0.6}, "S2": names | {("END", "S2"): 0.6}}
    same, after = (names | {at: 0.3} for at in (("S2", "S1"), ("S2", roles.AFTER)))
    looks = {"9.9": to["IO"], "9.6": to["IO"], "10.7": to["IO"], "8.6": to["S2"]}
    looks |= {"3.0": same, "5.5": after}
    found = {roles.MOVERS: ("9.9", "9.6"), roles.NEGATIVE: ("10.7",), LAST: ("3.0", "5.5")}
    found[roles.INHIBITION] = ("8.6",)
    effect = np.random.default_rng(0).normal(0, 0.01, (12, 12))
    effect[10, 7] = -0.8

    def holds(
        effect: np.ndarray = effect, changed: Any = None, **other: dict[Any, float]
    ) -> list[bool | None]:
        own = looks | {head.replace("_", "."): look for head, look in other.items()}
        heads = Heads("", "logit_diff", effect)
        return [f.holds for f in ioi_paths._findings(heads, changed or found, own)]

    assert holds() == [True, True, True, True]
    for i, (head, look) in enumerate(
        {"9_6": to["S2"], "10_7": to["S2"], "8_6": to["IO"], "5_5": names}.items()
    ):
        assert holds(**{head: look}) == [j != i for j in range(4)]
    assert holds(-effect) == [True, False, True, True]
    none: dict[str, tuple[str, ...]] = dict.fromkeys(found, ())
    assert holds(changed=none) == [None, False, None, None]


def test_a_step_without_receivers_is_not_run(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, tuple[str, ...]] = {roles.MOVERS: ("0.1",)}
    pairs = setting.pairs("ioi", corruption="abc")
    assert steps_of(setting, pairs, QUERIES, found, {}) == []
    flat = np.linspace(-1, 1, 16).reshape(4, 4)  # none is detected
    monkeypatch.setattr(Step, "heads", lambda *_: Heads("", "logit_diff", flat))
    report = ioi_paths.run(replace(setting, out=setting.out / "none"))
    assert "No name movers were found" in "".join(report.lines)
    assert len(rows(report, DETECTED)) == 2
    assert report.findings == ()


def test_its_figure_can_be_drawn(report: Report) -> None:
    drawn = BytesIO()
    report.figures["steps"].savefig(drawn, dpi=40)
    assert drawn.getbuffer().nbytes > 5000


@pytest.mark.slow
def test_on_smollm2(tmp_path: Path) -> None:
    """Its largest heads, by every step: as docs/reproductions.md has them."""
    report = ioi_paths.run(Setting(ps.load_model("smollm2-135m"), 2, 0, tmp_path))
    assert "nan" not in report.write(tmp_path / "report").read_text()
    shown = [row for row in rows(report, DETECTED) if row["path"] == THROUGH["mlps"]]
    for row, head in zip(shown, ("23.3", "20.0", "17.4"), strict=True):
        assert head in row["positive"].split()
