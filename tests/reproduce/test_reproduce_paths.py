"""Indirect object identification by path patching: every number against two full forwards with
plain hooks, every step from the heads of the one before."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from oracle import oracle
from oracle import paths as by_hooks
from oracle.families import FAMILIES
from patchsweep.model.loading import load_tokenizer
from patchsweep.reproduce import ioi_paths, published, roles
from patchsweep.reproduce.experiment import Report, Setting
from patchsweep.reproduce.heads import Heads, text
from patchsweep.reproduce.path_steps import ATTENDS, LAST, QUERIES, THROUGH, Step, steps_of
from patchsweep.sites import RECEIVERS, parse_node
from tiny import build

LAYERS, HEADS = 4, 4
LLAMA = FAMILIES["llama"]
KNOWN: dict[str, tuple[str, ...]] = dict.fromkeys(roles.CLASSES, ()) | {
    roles.MOVERS: ("3.0", "2.2"),
    roles.NEGATIVE: ("2.3",),
    roles.INHIBITION: ("0.3", "1.2", "1.3", "2.0"),
    roles.DUPLICATE: ("0.1",),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two pairs, and a small random model in float64 that reads the packaged tokenizer's texts."""
    hf_model = build(LAYERS, seed=20, intermediate_size=32, vocab=49152).double()
    model = ps.wrap(hf_model, load_tokenizer("smollm2-135m"), "tiny")
    return Setting(model, 2, 0, tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def report(setting: Setting) -> Report:
    """As if its circuit were published, and S-inhibition heads attended as name movers do: here
    those that act on queries do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTENDS, roles.INHIBITION, ATTENDS[roles.MOVERS])
        patch.setattr(published, "circuit", lambda _: KNOWN)
        return ioi_paths.run(setting)


DETECTED = "Detected heads by step"
# Step -> its receivers, label; of the first three the receivers are found, of the others published.
STEPS = {
    "heads to the logits at END": (["logits"], "END"),
    "heads to the queries of the name movers at END": (["head_q.3.1"], "END"),
    "heads to the values of the S-inhibition heads at S2": (["head_v.2.1"], "S2"),
    "heads to the queries of the published name movers at END": (
        ["head_q.3.0", "head_q.2.2"],
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


def test_a_step_begins_with_what_the_one_before_found(
    setting: Setting, report: Report, by_hand: Any
) -> None:
    """The receivers in STEPS, which the report is held to, from effects and attention."""
    steps = [*STEPS]
    logits, queries = (
        {
            (layer, head): attention(setting, layer, head)
            for layer, head in np.argwhere(
                np.any([far(e) & (e > 0) for e in (by_hand[step, t][0] for t in THROUGH)], axis=0)
            )
        }
        for step in steps[:2]
    )
    movers, found = (
        [at for at, (io, *others) in heads.items() if io > max(others)]
        for heads in (logits, queries)
    )
    assert STEPS[steps[1]][0] == [f"head_q.{layer}.{head}" for layer, head in movers if layer]
    assert STEPS[steps[2]][0] == [f"head_v.{layer}.{head // 2}" for layer, head in found]
    assert len(found) < len(queries)  # attention tells heads apart
    shown = rows(report, "Attention of the detected heads")
    for name, heads in (("logits", logits), ("queries", queries)):
        assert [[*row.values()][1:5] for row in shown if row["step"] == name] == [
            [f"{layer}.{n}", *(f"{share:.3f}" for share in to)] for (layer, n), to in heads.items()
        ]
    order = [row["step"] for row in rows(report, DETECTED)][::2]
    assert order == [steps[i] for i in (0, 1, 3, 2, 4)]


def attention(setting: Setting, layer: int, head: int) -> list[float]:
    """From END to IO, S1 and S2 in the clean run, mean over pairs."""
    hf_model, seen = setting.model.hf_model, []
    hf_model.set_attn_implementation("eager")
    for pair in setting.pairs("ioi", corruption="abc"):
        with torch.no_grad():
            pattern = hf_model(torch.tensor([pair.clean]), output_attentions=True).attentions[layer]
        at = [pair.labels[name] for name in ("IO", "S1", "S2")]
        seen.append(pattern[0, head, pair.labels["END"], at].tolist())
    return [float(share) for share in np.mean(seen, 0)]


def test_against_published_classes(report: Report) -> None:
    """Heads of the step to the logits through MLPs, as STEPS and KNOWN have them."""
    shown = {row["step"]: [*row.values()][1:] for row in rows(report, "Against Wang et al. 2022")}
    [here] = [r for r in rows(report, DETECTED) if r["step"] == next(iter(STEPS))][:1]
    assert (here["negative"], here["positive"]) == ("none", "0.1")
    assert shown[here["step"]] == [
        "name movers, negative name movers",
        "none",
        "+2.2 −2.3 +3.0",
        "+0.1",
    ]
    assert shown.keys() == STEPS.keys()
    assert "those of Wang et al. 2022: name movers 2.2 3.0;" in report.lines[-1]


def test_claims() -> None:
    """By hand: every claim holds, and fails with the heads that decide it."""
    look = dict.fromkeys(roles.LOOKS, 0.0)
    to_io, to_s2 = (look | {("END", name): 0.6} for name in ("IO", "S2"))
    same, after = (look | {("S2", name): 0.3} for name in ("S1", roles.AFTER))
    looks = {"9.9": to_io, "9.6": to_io, "9.1": to_s2, "10.7": to_io, "8.6": to_s2}
    looks |= {"3.0": same, "5.5": after, "5.6": look}
    detected = {
        roles.MOVERS: ("9.9", "9.6", "9.1"),
        roles.NEGATIVE: ("10.7",),
        roles.INHIBITION: ("8.6",),
        LAST: ("3.0", "5.5", "5.6"),
    }

    def holds(heads: Any = detected, **changed: Any) -> list[bool | None]:
        return [f.holds for f in ioi_paths._findings(heads, {**looks, **changed})]

    assert holds() == [True] * 4
    for i, (head, other) in enumerate(
        {"9.6": to_s2, "10.7": to_s2, "8.6": to_io, "5.5": look}.items()
    ):
        assert holds(**{head: other}) == [n != i for n in range(4)]
    assert holds(dict.fromkeys(detected, ())) == [None] * 4
    first = next(iter(ioi_paths._findings(detected, looks)))
    assert first.measured == "9.6 9.9; others: 9.1"


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
    assert [f.holds for f in report.findings] == [None] * 4


def test_its_figure_can_be_drawn(report: Report) -> None:
    drawn = BytesIO()
    report.figures["steps"].savefig(drawn, dpi=40)
    assert drawn.getbuffer().nbytes > 5000


@pytest.mark.slow
def test_on_smollm2(tmp_path: Path) -> None:
    """Its largest heads, by every step: as docs/reproductions.md has them."""
    report = ioi_paths.run(Setting(ps.load_model("smollm2-135m"), 2, 0, tmp_path))
    assert "nan" not in report.write(tmp_path / "report").read_text()
    shown = [row for row in rows(report, DETECTED) if row["path"] == THROUGH["nothing"]]
    for row, head in zip(shown, ("23.3", "20.0", "17.4"), strict=True):
        assert head in row["positive"].split()
