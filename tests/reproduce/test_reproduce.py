"""The papers' experiments: their frame and what is compared, on tiny models and planted effects;
one short run of each on SmolLM2-135M-Instruct."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2Config

import patchsweep as ps
from made_tokenizers import byte_level
from patchsweep.cli import _status
from patchsweep.errors import BadInput
from patchsweep.model.model import empty_model
from patchsweep.reproduce import (
    EXPERIMENTS,
    claims,
    greater_than,
    heads,
    movers,
    published,
    reproduce,
    roles,
)
from patchsweep.reproduce.experiment import Finding, Report, Setting, Table, markdown
from patchsweep.reproduce.heads import Heads
from tiny import build

IOI, GREATER_THAN = "best-practices-ioi", "greater-than"
PLANTED = {"9.6": 0.8, "9.9": 0.9, "10.7": -0.7}


@pytest.fixture(scope="module")
def tiny() -> ps.Model:
    """A Llama with shared key-value heads and random weights that do something."""
    tokenizer = byte_level()
    return ps.wrap(build(layers=4, vocab=len(tokenizer)), tokenizer, "tiny")


@pytest.fixture(scope="module")
def folder(tiny: ps.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved."""
    path = tmp_path_factory.mktemp("model")
    tiny.hf_model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def setting(tiny: ps.Model, tmp_path: Path) -> Setting:
    return Setting(tiny, 3, 0, tmp_path / "out")


def planted(corruption: str = "STR", metric: str = "logit_diff", **changed: float) -> Heads:
    """Effects of 12 × 12 heads: small noise, and some large ones."""
    effect = np.random.default_rng(0).normal(0, 0.01, (12, 12))
    for head, value in (PLANTED | {k.replace("_", "."): v for k, v in changed.items()}).items():
        layer, number = map(int, head.split("."))
        effect[layer, number] = value
    return Heads(corruption, metric, effect)


def sized(config: GPT2Config) -> ps.Model:
    return ps.Model(empty_model(config, "float32"), None, "some folder")


def test_the_papers_models_are_known_by_their_size() -> None:
    small = sized(GPT2Config())
    assert published.model_of(small) == "gpt2-small"
    said, line = published.applies(IOI, small)
    assert len(said) == 12
    assert "GPT-2 small" in line
    circuit = roles.circuit(Setting(small, 1, 0, Path()), [], [])  # whatever was detected
    assert circuit.known
    assert circuit.heads == {
        roles.MOVERS: ("9.6", "9.9", "10.0"),
        roles.NEGATIVE: ("10.7", "11.10"),
        roles.INHIBITION: ("7.3", "7.9", "8.6", "8.10"),
        roles.DUPLICATE: ("0.1", "0.10", "3.0"),
        roles.INDUCTION: ("5.5", "5.8", "5.9", "6.9"),
    }
    assert "those of Wang et al. 2022" in circuit.lines[0]
    xl = sized(GPT2Config(n_layer=48, n_head=25, n_embd=1600))
    assert published.model_of(xl) == "gpt2-xl"
    assert published.circuit("gpt2-xl") is None
    for name, known in (("best-practices-windows", True), ("arithmetic", False)):
        said, line = published.applies(name, xl)
        assert said == []
        assert ("whose architecture and size this is" in line) == known
    for other in (xl, sized(GPT2Config(n_layer=6)), sized(GPT2Config(vocab_size=50258))):
        assert published.applies(IOI, other) == (
            [],
            "No published list applies to this model (they hold for GPT-2 small).",
        )


def test_the_published_lists() -> None:
    ioi = published.lists(IOI, "gpt2-small")
    [found] = [said for said in ioi if (said.corrupted, said.corruption) == ("s1_io", "STR")][1:2]
    assert (found.where, found.metric) == ("Table 4", "prob")
    assert found.heads == {"+9.9"}
    by_noise = [said for said in ioi if (said.corrupted, said.corruption) == ("s1_io", "GN")]
    assert {said.metric: said.negative for said in by_noise} == {
        "logit_diff": {"10.7", "11.10"},
        "prob": set(),
        "kl": {"10.7", "11.10"},
    }
    assert [said.metric for said in published.lists(GREATER_THAN)][::3] == ["logit_diff_sum"] * 2
    docstring = published.lists("docstring")
    assert [said.reading for said in docstring].count(True) == 6
    assert len({(said.corruption, said.metric, said.position) for said in docstring}) == 12
    for name in (IOI, GREATER_THAN):
        for said in published.lists(name):
            assert said.positive
            assert not said.positive & said.negative
            for head in said.positive | said.negative:
                assert all(0 <= int(number) < 12 for number in head.split("."))


def test_heads_are_compared_with_their_sign() -> None:
    said = published.List("T", "s2", "STR", "kl", frozenset({"9.9", "2.0"}), frozenset({"10.7"}))
    found = published.compare(said, ("10.7", "9.9", "11.2"), ())
    assert found == published.Comparison(("+9.9",), ("+2.0", "−10.7"), ("+10.7", "+11.2"))
    unsigned = replace(said, positive=frozenset({"9.9"}), signed=False)
    found = published.compare(unsigned, ("9.9",), ())
    assert found == published.Comparison(("9.9",), (), ())


def test_planted_heads_are_detected_and_compared() -> None:
    here = planted()
    assert here.positive == ("9.6", "9.9")
    assert here.negative == ("10.7",)
    table4 = [said for said in published.lists(IOI) if said.corrupted == "s1_io"]
    rows = heads.against(table4, [here], "Against Table 4").rows
    assert rows == (
        ("Table 4", "STR", "logit difference", "+9.6 +9.9 −10.7", "+10.0 −11.10", "none"),
    )


def test_the_claims_can_hold_and_fail() -> None:
    three = [planted("STR", metric) for metric in heads.METRICS]
    other = planted("GN", "kl", **{"0_3": -0.8, "1_4": 0.8})
    noisy = [planted("GN", "logit_diff"), planted("GN", "prob"), other]
    paper = [said for said in published.lists(IOI) if said.corrupted == "s2"]
    agree = claims.metrics_agree([*three, *noisy], paper, "Table 5")
    # Table 5 by hand: STR (6/7 + 7/7 + 6/7) / 3; GN (6/9 + 5/9 + 6/7) / 3.
    assert "0.90 against 0.69" in agree.claim
    assert (agree.measured, agree.holds) == ("1.00 against 0.73", True)
    swapped = [Heads({"STR": "GN", "GN": "STR"}[h.corruption], h.metric, h.effect) for h in noisy]
    same = [Heads("GN", h.metric, h.effect) for h in three]
    assert claims.metrics_agree([*swapped, *same], paper, "Table 5").holds is False
    more = claims.only_by_noise([*three, *noisy], paper, "logit_diff", "Table 5")
    assert "+3.0" in more.claim
    assert more.holds is False
    more = claims.only_by_noise([*three, *noisy], paper, "kl", "Table 5")
    assert (more.measured, more.holds) == ("−0.3 +1.4", True)


def test_effects_as_the_paper_has_them(setting: Setting) -> None:
    """From the raw arrays: a ratio of means, and differences that are positive towards clean."""
    pairs = setting.pairs("ioi")
    cells = {"components": ["head_z"], "positions": "all", "metrics": list(heads.METRICS)}
    results = setting.sweep("s2", pairs, corrupt=setting.gaussian(["S2"]), **cells)
    for metric in heads.METRICS:
        found = heads.effects(results, "GN", metric)
        patched = results.store.read(f"head_z/{metric}")[0, 0, 0, ..., 0].astype(float)
        clean, corrupt = results.baseline(metric)[:, 0, 0]
        moved = patched.mean(0) - corrupt.mean()
        by_hand = {"prob": moved, "kl": -moved}.get(metric, moved / (clean - corrupt).mean())
        assert np.ptp(by_hand) > 1e-5
        np.testing.assert_allclose(found.effect, by_hand, rtol=0, atol=1e-4 * np.ptp(by_hand))
        assert found.effect.shape == (4, 4)
        cells_ = results.detections("head_z", metric, "denoise")
        assert {f"{c.layer}.{c.head}" for c in cells_.itertuples()} == {
            *found.positive,
            *found.negative,
        }


def test_the_circuit_is_measured_as_the_model_attends(setting: Setting) -> None:
    """Attention and restored logits against the model's own forwards, one pair at a time."""
    circuit = roles.Circuit({roles.MOVERS: ("3.1", "2.3"), roles.INHIBITION: ("0.1", "1.2")}, 2)
    pairs = setting.pairs("ioi", corruption="s2")
    results = {"STR": movers.restored(setting, circuit, "STR", pairs, "pairs")}
    table, shares = movers.attention(circuit, results)
    hf = setting.model.hf_model
    hf.set_attn_implementation("eager")
    for run, tokens in (("clean", [p.clean for p in pairs]), ("STR", [p.corrupt for p in pairs])):
        seen = []
        for pair, ids in zip(pairs, tokens, strict=True):
            with torch.no_grad():
                patterns = hf(torch.tensor([ids]), output_attentions=True).attentions
            at = [pair.labels[name] for name in movers.NAMES]
            seen.append([patterns[i][0, h, -1, at].tolist() for i, h in ((3, 1), (2, 3))])
        means = np.mean(seen, 0)
        rows = [row[2:] for row in table.rows if row[0] == run]
        np.testing.assert_allclose(np.array(rows, float), means, atol=6e-4)
        assert shares[run] == pytest.approx(means[:, 0].sum() / means[:, :2].sum(), abs=1e-5)
    _, gains = movers.recovered(results)
    gain = gains["STR"]
    for end, ids in ((gain.clean, "clean"), (gain.corrupt, "corrupt")):
        with torch.no_grad():
            logits = [hf(torch.tensor([getattr(p, ids)])).logits[0, -1, p.answer[0]] for p in pairs]
        assert end == pytest.approx(float(np.mean(logits)), abs=1e-5)
    # Heads 0.1 and 1.2 read the key-value heads 0.0 and 1.1.
    sites = ["head_v.0.0", "head_v.1.1"]
    again = setting.sweep("again", pairs, sets={"x": sites}, metrics=["logit"])
    patched = again.store.read("sets/logit")[..., 0].mean()
    assert gain.restored == pytest.approx(float(patched), abs=1e-5)
    assert abs(gain.restored - gain.corrupt) > 1e-3


def test_a_share_of_nothing_lost_is_not_decided() -> None:
    assert movers.Gain(2.0, 1.0, 1.75, 0.1).share == pytest.approx(0.75)
    assert np.isnan(movers.Gain(1.0, 2.0, 1.75, 0.1).share)


def test_classes_are_assigned_by_effect_and_attention(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rule in plain numpy, from the attention that the model itself returns."""
    late, early, other = np.zeros((3, 4, 4))
    late[2, 1], late[3, :3], late[2, 3] = 0.6, (0.7, 0.9, 0.8), -0.9
    early[0, :3], early[1, :], early[2, 3] = 0.9, 0.9, 0.9  # the last has its class already
    other[0, 3], other[3, 2] = 0.9, 0.9  # by another metric; above the name movers
    far = {name: values != 0 for name, values in (("late", late), ("s2", early), ("kl", other))}
    s1_io = [Heads("STR", "logit_diff", late, far["late"])]
    s2 = [Heads("STR", "logit_diff", early, far["s2"]), Heads("GN", "kl", other, far["kl"])]
    hf = setting.model.hf_model
    hf.set_attn_implementation("eager")
    seen = []
    for pair in setting.pairs("ioi", corruption="s2"):
        with torch.no_grad():
            attentions = hf(torch.tensor([pair.clean]), output_attentions=True).attentions
        pattern = torch.stack([layer[0] for layer in attentions]).numpy()  # [layer, head, to, from]
        io, s1, s2_at = (pair.labels[name] for name in ("IO", "S1", "S2"))
        end = pattern[:, :, -1, [io, s1, s2_at]]
        seen.append(np.concatenate([end, pattern[:, :, s2_at, [s1, s1 + 1]]], -1))
    look = np.mean(seen, 0)  # [layer, head, where to]
    least = float(np.median(look[:2, :, 3:].max(-1)))
    monkeypatch.setattr(roles, "ATTENDED", least)
    found = roles.circuit(setting, s2, s1_io)
    below = [(layer, head) for layer in range(2) for head in range(4)]
    inhibition = [at for at in below if early[at] > 0 and look[at][:3].argmax() == 2]
    rest = [at for at in below if at not in inhibition and look[at][3:].max() >= least]

    def named(cells: list[tuple[int, int]]) -> tuple[str, ...]:
        return tuple(f"{layer}.{head}" for layer, head in cells)

    assert found.heads == {
        roles.MOVERS: ("3.1", "3.2", "3.0"),
        roles.NEGATIVE: ("2.3",),
        roles.INHIBITION: named(inhibition),
        roles.DUPLICATE: named([at for at in rest if look[at][3] > look[at][4]]),
        roles.INDUCTION: named([at for at in rest if look[at][3] <= look[at][4]]),
    }
    assert 0 < len(inhibition) < 7  # the rules tell heads apart
    assert 0 < len(rest) < 8 - len(inhibition)
    assert not found.known
    assert "Values are those of key-value heads, shared by 2" in found.lines[-1]


def test_years_are_summed(setting: Setting) -> None:
    """The paper's form and that of means, by the model's own logits; the year itself is neither."""
    pairs = setting.pairs("greater_than", wrong="below")
    metrics = [{"logit_diff": {"reduce": "sum"}}, "logit_diff"]
    results = setting.sweep("years", pairs, sets={"one": ["head_z.0.0"]}, metrics=metrics)
    tokenizer = setting.tokenizer
    for i, pair in enumerate(pairs):
        year = int(tokenizer.decode([pair.clean[pair.labels["YY"]]]))
        wrong = [int(tokenizer.decode([token])) for token in pair.wrong]
        assert sorted(wrong) == list(range(year))
        with torch.no_grad():
            logits = setting.model.hf_model(torch.tensor([pair.clean])).logits[0, -1].double()
        right, left = logits[[*pair.answer]], logits[[*pair.wrong]]
        ends = [results.baseline(name)[0, 0, 0, i] for name in ("logit_diff_sum", "logit_diff")]
        forms = (right.sum() - left.sum(), right.mean() - left.mean())
        assert ends == pytest.approx([float(form) for form in forms], rel=1e-4, abs=1e-4)
    sizes = [(len(pair.answer), len(pair.wrong)) for pair in pairs]
    said = greater_than.unequal(pairs)
    assert f"in {sum(a != b for a, b in sizes)} of 3 pairs they differ in number" in said
    even = [replace(pair, answer=(1, 2), wrong=(3, 4)) for pair in pairs]
    assert "in 0 of 3 pairs they differ" in greater_than.unequal(even)


def test_what_is_done_is_used_again(setting: Setting) -> None:
    cells = {"components": ["head_z"], "positions": "all"}
    first = setting.sweep("s2", setting.pairs("ioi"), **cells)
    again = setting.sweep("s2", setting.pairs("ioi"), **cells)
    assert again.attrs["measured"] == first.attrs["measured"]
    others = replace(setting, seed=1)
    with pytest.raises(BadInput, match=r"results of another sweep .* choose another --out, or"):
        others.sweep("s2", others.pairs("ioi"), **cells)
    more = replace(setting, n=4)
    with pytest.raises(BadInput, match="holds 3 pairs, and 4 are asked for: choose another --out"):
        more.sweep("s2", more.pairs("ioi"), **cells)
    fresh = replace(more, overwrite=True)
    assert fresh.sweep("s2", fresh.pairs("ioi"), **cells).grid("head_z").pairs == 4


def test_a_report_is_written_and_shown(tmp_path: Path) -> None:
    report = Report(
        "A title",
        ("how it was run [sic]",),
        (Table("Heads, found", ("a", "b|c"), (("1", "x|y"), ("2", ""))),),
        {"heads": heads.figure(("planted", "12 × 12"), [planted(), planted("GN", "prob")])},
        (Finding("it is so", "§1", "0.5", True), Finding("it is not", "§2", "0.1", None)),
    )
    text = report.write(tmp_path / "out").read_text(encoding="utf-8")
    assert "| it is so | §1 | 0.5 | holds |" in text
    assert "| it is not | §2 | 0.1 | not decided |" in text
    assert "| 1 | x\\|y |" in text
    assert "![heads](heads.png)" in text
    with (tmp_path / "out" / "heads-found.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b|c"], ["1", "x|y"], ["2", ""]]
    for suffix in ("png", "svg"):
        assert (tmp_path / "out" / f"heads.{suffix}").stat().st_size > 5000
    console = Console(width=80, record=True)
    report.show(console)
    assert "how it was run [sic]" in console.export_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="choose another --out"):
        report.write(tmp_path / "file")


def test_ioi_on_a_tiny_model(folder: Path, tmp_path: Path) -> None:
    report = reproduce(IOI, str(folder), tmp_path / "out", n=2, device="cpu")
    said = "4 layers of 4 heads (2 for keys and values), float32; 2 pairs, seed 0"
    assert said in report.lines[0]
    assert any("No published list applies to this model" in line for line in report.lines)
    assert [t.title for t in report.tables[:2]] == [
        "Unpatched runs",
        "Detected heads, S2 corrupted",
    ]
    assert len(report.tables[0].rows) == len(report.tables[1].rows) == 6
    assert any(t.title == "Detected heads by class, S2 corrupted" for t in report.tables)
    assert {*report.figures} == {"heads-s2", "heads-s1_io", "heads-abc"}
    assert len(report.findings) >= 6


def test_the_command_and_the_library_say_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run is the same sweep: it goes on where the first stopped, at its end."""
    out = tmp_path / "out"
    asked = ["reproduce", GREATER_THAN, "--model", str(folder), "--n", "2", "--out", str(out)]
    assert _status([*asked, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    text = (out / "report.md").read_text(encoding="utf-8")
    report = reproduce(GREATER_THAN, str(folder), out, n=2, device="cpu")
    assert markdown(report) == text
    assert text.startswith(f"# {report.title}")
    assert report.title in printed
    assert printed.endswith(f"{out / 'report.md'}\n")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"did you mean '{IOI}'"):
        reproduce("best-practice-ioi", out=tmp_path)
    with pytest.raises(BadInput, match="n is 0"):
        reproduce(IOI, out=tmp_path, n=0)


def test_every_experiment_says_what_it_is() -> None:
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name
        assert experiment.source
        assert experiment.pairs > 0


def test_greater_than_on_smollm2(tmp_path: Path) -> None:
    report = reproduce(GREATER_THAN, out=tmp_path, n=1)
    [detected] = [t for t in report.tables if t.title.startswith("Detected")]
    assert len(detected.rows) == 8
    assert "20.8" in detected.rows[0][3].split()


@pytest.mark.slow
def test_ioi_on_smollm2(tmp_path: Path) -> None:
    report = reproduce(IOI, out=tmp_path, n=2)
    holds = {f.claim.split(":")[0]: f.holds for f in report.findings}
    assert holds["S2, STR"]
    assert len(report.figures) == 3
