"""What sweeps make of single runs (curves, joint effects, errors, codes, floors), each against full
forwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import patchsweep as ps
from cells import FEW, check
from expected import Autoencoder, Case, Expected
from inputs import Letters, pair_of, three, unequal
from members import members, site
from oracle import heads
from oracle.families import FAMILIES, prompts
from patchsweep.engine.planning import plan_sweep
from patchsweep.pairs import Pair
from patchsweep.passes.wave import _sorted_out
from patchsweep.plan.schedule import NULL, make_schedule
from patchsweep.plan.sources import resolve
from patchsweep.sites import Status
from patchsweep.spec import parse_settings

LLAMA = FAMILIES["llama"]
CLOSE = {"rtol": 0, "atol": 1e-6}


def four(lengths: tuple[int, ...] = (6, 6, 5, 5), seed: int = 2) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [pair_of(rng, n, 2) for n in lengths]


def oracle_of(
    pairs: list[Pair], settings: dict[str, Any], layers: int = 3, sae: Autoencoder | None = None
) -> Expected:
    hf_model = LLAMA.build(layers, 1)
    return Expected(
        Case("llama", pairs, {"metrics": FEW, **settings}, layers), hf_model, LLAMA, sae
    )


def swept(of: Expected, out: Path, **more: Any) -> ps.Results:
    return ps.sweep(
        ps.wrap(of.hf_model, Letters()), of.case.pairs, out=out, **of.case.settings, **more
    )


def places(pair: Pair, position: Any) -> tuple[int, ...]:
    if position == "all":
        return tuple(range(len(pair)))
    return ((position + len(pair)) if position < 0 else position,)


def moved(
    of: Expected, direction: str, sites: Any, source: str = "other", sample: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Change and span of the logit difference, [pair]; sites: component, layer, unit, position,
    source."""
    out = []
    for i, pair in enumerate(of.case.pairs):
        at = [(c, layer, u, places(pair, p), named) for c, layer, u, p, named in sites]
        patched = of.values(i, direction, source, sample, tuple(at))["logit_diff"]
        clean, corrupt = (
            float(of.values(i, run, source, sample, ())["logit_diff"])
            for run in ("clean", "corrupt")
        )
        start, end = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        out.append((float(patched) - start, end - start))
    change, span = np.array(out).T
    return change, span


def effect(of: Expected, direction: str, sites: Any, **way: Any) -> float:
    change, span = moved(of, direction, sites, **way)
    return float(change.sum() / span.sum())


@pytest.mark.parametrize("circuit", ["heads and MLPs", "of the ranking"])
def test_a_circuits_curve(circuit: str, tmp_path: Path) -> None:
    """With the best denoised, and with everything else noised; the embedding stays as it is."""
    ranking = ["head_z.1.4@-1", "mlp_out.0@-1", "head_z.0.2@-2", "head_z.2.5@-1"]
    given: dict[str, Any] = {
        "positions": [-1, -2],
        "direction": "both",
        "circuit": {"ranking": ranking, "sizes": [1, 3, 4]},
    }
    if circuit == "heads and MLPs":
        given["circuit"]["within"] = ["mlp_out", "head_z", "attn_out"]
    of = oracle_of(four(), given)
    found = swept(of, tmp_path / "r").circuit("logit_diff")
    sets = members(given, 3, {"head_z": 6}, 6)
    assert found.sizes == (1, 3, 4)
    for number, size in enumerate(found.sizes):
        rest, best = sets[f"circuit outside {size}"], sets[f"circuit top {size}"]
        assert len(best) == size
        noised = 1 - effect(of, "noise", rest)
        assert found.faithfulness[number] == pytest.approx(noised, abs=1e-6)
        assert found.recovered[number] == pytest.approx(effect(of, "denoise", best), abs=1e-6)
        assert abs(noised - found.recovered[number]) > 1e-3


def test_what_a_complement_spares() -> None:
    """A site at one position, one at all of them; of several components."""
    rest = {"within": ["head_z", "mlp_out"], "besides": ["head_z.1.2@2", "mlp_out.0", "head_z.2.5"]}
    case = Case("llama", four((5, 4)), {"sets": {"rest": rest}, "direction": "both"}, layers=3)
    assert check(case, None) == 4
    names = members(case.settings, 3, {"head_z": 6}, 5)["rest"]
    assert len(names) == (18 + 3 - 2) * 5 - 1


@pytest.mark.parametrize("direction", ["denoise", "noise", "both"])
def test_the_largest_cells_together(direction: str, tmp_path: Path) -> None:
    """In one run, by the first metric and source; of those alone the effects are stored beside."""
    given = {
        "components": ["head_z"],
        "positions": [-1],
        "direction": direction,
        "source": ["second", "other"],
        "metrics": ["logit_diff", "kl"],
    }
    of = oracle_of(four((6, 6)), given, layers=2)
    joint = swept(of, tmp_path / "r").attrs["joint"]["head_z"]
    assert list(joint) == (["denoise", "noise"] if direction == "both" else [direction])
    for way, found in joint.items():
        alone = {
            f"head_z.{i}.{h}@-1": effect(of, way, [("head_z", i, h, -1, None)], source="second")
            for i, h in product(range(2), range(6))
        }
        best = sorted(alone, key=lambda name, of=alone: -abs(of[name]))[:10]
        assert found["sites"] == best
        np.testing.assert_allclose(found["singles"], [alone[name] for name in best], **CLOSE)
        together = effect(of, way, [site(name) for name in best], source="second")
        assert found["joint"] == pytest.approx(together, abs=1e-6)
        assert abs(together - sum(alone[name] for name in best)) > 1e-3


def test_together_of_differences(tmp_path: Path) -> None:
    """Of a source without a run the change of the metric, a mean over pairs."""
    given = {"components": ["mlp_out"], "positions": [-1], "direction": "noise", "source": "zero"}
    of = oracle_of(four((6, 5)), given, layers=2)
    found = swept(of, tmp_path / "r").attrs["joint"]["mlp_out"]["noise"]
    sites = [("mlp_out", i, None, -1, None) for i in range(2)]
    change = [
        float(of.values(i, "noise", "zero", 0, tuple((*s[:3], places(p, -1), None) for s in sites))[
            "logit_diff"
        ] - of.values(i, "clean", "zero", 0, ())["logit_diff"])
        for i, p in enumerate(of.case.pairs)
    ]  # fmt: skip
    assert found["joint"] == pytest.approx(np.mean(change), abs=1e-6)


def test_noise_samples_and_their_error(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "components": ["mlp_out"],
        "positions": [-1, -2],
        "corrupt": {"gaussian": {"sigma": [1, 3], "samples": 3, "tokens": [1, -2], "seed": 4}},
        "direction": "both",
    }
    of = oracle_of(four((6, 5)), given, layers=2)
    found = swept(of, tmp_path / "r")
    for direction in ("denoise", "noise"):
        got = found.standard_error("mlp_out", "logit_diff", direction, "sigma=3")
        whole = found.effect("mlp_out", "logit_diff", direction, "sigma=3")
        for layer, entry in product(range(2), range(2)):
            cell = [("mlp_out", layer, None, (-1, -2)[entry], None)]
            runs = [moved(of, direction, cell, source="sigma=3", sample=n) for n in range(3)]
            each = [change.sum() / span.sum() for change, span in runs]
            error = np.std(each, ddof=1) / np.sqrt(3)
            assert error > 1e-3 or each == [0, 0, 0]
            np.testing.assert_allclose(got[layer, 0, entry], error, **CLOSE)
            changed, spans = (sum(run[k].sum() for run in runs) for k in (0, 1))
            np.testing.assert_allclose(whole[layer, 0, entry], changed / spans, **CLOSE)


def test_sources_of_more_and_fewer_samples(tmp_path: Path) -> None:
    """Changes and intervals of each are over the samples that it has."""
    given: dict[str, Any] = {
        "components": ["mlp_out"],
        "positions": [-1],
        "source": ["other", {"resample": {"samples": 3, "seed": 1}}],
        "direction": "noise",
    }
    of = oracle_of(four((5, 5, 5, 5)), given, layers=2)
    assert len(set(map(tuple, of.resampled()))) == 3
    found = swept(of, tmp_path / "r")
    drawn = np.random.default_rng(5).integers(4, size=(30, 4))
    for source, samples in (("other", 1), ("resample", 3)):
        got = found.interval(
            "mlp_out", "logit_diff", "noise", source, samples=30, level=0.9, seed=5
        )
        for layer in range(2):
            cell = [("mlp_out", layer, None, -1, None)]
            runs = [moved(of, "noise", cell, source=source, sample=n) for n in range(samples)]
            change, span = np.mean(runs, 0)
            effects = [change[row].sum() / span[row].sum() for row in drawn]
            wanted = np.quantile(effects, [0.05, 0.95])
            np.testing.assert_allclose([end[layer, 0, 0] for end in got], wanted, rtol=1e-5)


def test_relative_probabilities_with_sources_of_their_own() -> None:
    """They compare with the run's own corrupt prompt, whatever its sites are given."""
    sets = {"a": ["head_z.0.1@2<second", "mlp_out.1@-2"], "b": ["resid_pre.1@-1<other", "embed@1"]}
    given = {"sets": sets, "source": ["other", "second"], "direction": "both"}
    given["metrics"] = ["relative_prob", "logit_diff"]
    assert check(Case("llama", four((6, 5)), given, layers=2), None) > 10


def test_features_are_changed_at_once(tmp_path: Path) -> None:
    """Each by what it was before any of them, whatever their sources: none of them is silent."""
    rng = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    encoder, decoder, bias = draw(48, 7) / 48**0.5, draw(7, 48) / 48**0.5, draw(7) + 9
    sae = Autoencoder("resid_pre", 1, encoder, bias, decoder)
    file = tmp_path / "dictionary.safetensors"
    tensors = {"W_enc": encoder, "W_dec": decoder, "b_enc": bias, "b_dec": 0 * draw(48)}
    save_file(tensors, file)
    sets = {
        "three": ["sae_feature.2@-1<second", "sae_feature.3@-1", "sae_feature.5@-1<zero"],
        "below": ["resid_post.0@-1", "sae_feature.3@-1<second", "sae_feature.4@-1<zero"],
    }
    given: dict[str, Any] = {
        "sets": sets,
        "source": ["other", "second", "zero"],
        "direction": "noise",
    }
    of = oracle_of(four((6, 5)), given, layers=2, sae=sae)
    where = {"file": file, "layer": 1, "at": "resid_pre"}
    found = swept(of, tmp_path / "r", sae=where).store.read("sets/logit_diff")
    for (s, source), (k, name), i in product(enumerate(given["source"]), enumerate(sets), range(2)):
        sites = [
            (c, layer, u, places(of.case.pairs[i], p), named)
            for c, layer, u, p, named in (site(text, 1) for text in sets[name])
        ]
        wanted = float(of.values(i, "noise", source, 0, tuple(sites))["logit_diff"])
        np.testing.assert_allclose(found[0, s, 0, i, 0, 0, k], wanted, **CLOSE)


@pytest.mark.parametrize("shape", ["width", "layer", "unit"])
def test_vectors_are_scaled(shape: str, tmp_path: Path) -> None:
    """One for all layers, one a layer, one a layer and head."""
    rng = np.random.default_rng(1)
    sizes = {"width": (8,), "layer": (2, 8), "unit": (2, 6, 8)}[shape]
    vector = rng.standard_normal(sizes)
    np.save(tmp_path / "v.npy", vector)
    source = {"vector": {"file": tmp_path / "v.npy", "scale": -2.5}}
    of = oracle_of(
        four((5,)), {"components": ["head_z"], "positions": [-1], "direction": "noise"}, layers=2
    )
    found = swept(of, tmp_path / "r", source=source).store.read("head_z/logit_diff")
    pair = of.case.pairs[0]
    for layer, head in product(range(2), range(6)):
        mine = {"width": vector, "layer": vector[layer % len(vector)]}.get(shape)
        mine = vector[layer, head] if mine is None else mine
        patch = heads.Patch("head_z", layer, head, {4: 4}, heads.Add(torch.from_numpy(-2.5 * mine)))
        logits = heads.logits(of.hf_model, LLAMA, heads.Prompt(pair.clean), [patch])[-1]
        wanted = of.logit_metrics(pair, logits, logits)["logit_diff"]
        np.testing.assert_allclose(found[0, 0, 0, 0, layer, head, 0], wanted, **CLOSE)


def codes(_: torch.Tensor, context: ps.Context) -> torch.Tensor:
    return torch.from_numpy(context.run.astype(np.float64))


def lasts(_: torch.Tensor, context: ps.Context) -> torch.Tensor:
    return torch.tensor([float(pair.clean[-1]) for pair in context.pairs])


def test_what_a_users_metric_is_told(tmp_path: Path) -> None:
    """Which run a row is, in waves of several runs a pair; and its own pair."""
    metrics = [{"callable": {"path": f"test_by_oracle:{name}"}} for name in ("codes", "lasts")]
    given: dict[str, Any] = {
        "components": ["mlp_out"],
        "sets": {"a": ["mlp_out.0@-1<second", "mlp_out.1@-1<other"]},
        "source": ["other", "second"],
        "metrics": metrics,
        "direction": "both",
    }
    of = oracle_of(four((6, 5)), {**given}, layers=2)
    found = swept(of, tmp_path / "r")
    last = np.array([pair.clean[-1] for pair in of.case.pairs])
    assert last[0] != last[1]
    clean, corrupt = found.baseline("codes")
    assert (clean == 0).all()
    assert (corrupt == 1).all()
    np.testing.assert_array_equal(found.baseline("lasts"), np.broadcast_to(last, (2, 2, 1, 2)))
    for component in ("mlp_out", "sets"):
        status = found.store.read(f"{component}/codes_status")
        ran = status == Status.EXACT
        assert ran.any((0, 1, 2, 4, 5, 6)).all()
        assert (found.store.read(f"{component}/codes")[ran] == 2).all()
        said = found.store.read(f"{component}/lasts")
        wanted = np.broadcast_to(last[:, None, None, None], said.shape)
        np.testing.assert_array_equal(said[ran], wanted[ran])


def test_rank_and_accuracy_of_what_is_not_finite(tmp_path: Path) -> None:
    """No comparison with a NaN is true: it would be the best rank there is."""
    hf_model = LLAMA.build(2, 1)
    pairs = four((6, 5))
    hf_model.get_input_embeddings().weight[pairs[1].clean[2]] = float("nan")
    pairs[0] = Pair(*prompts(np.random.default_rng(7), 40, 6, 1), (41,), (42,))
    assert pairs[1].clean[2] not in pairs[0].clean + pairs[0].corrupt
    metrics: list[Any] = ["rank", "accuracy", {"accuracy": {"k": 49}}, "logprob"]
    found = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        components=["mlp_out"],
        direction="noise",
        metrics=metrics,
        out=tmp_path / "r",
    )
    for metric in found.metrics:
        clean = found.baseline(metric)[0, 0, 0]
        assert np.isfinite(clean).tolist() == [True, False]
        value, status = (found.store.read(f"mlp_out/{metric}{x}")[0, 0, 0] for x in ("", "_status"))
        assert np.isfinite(value[0]).all()
        inside = status[1] != Status.OUTSIDE
        assert np.isnan(value[1]).all()
        assert (status[1][inside] == Status.NOT_FINITE).all()
        assert inside.any()


def test_a_rank_needs_no_more_than_finite_probabilities(tmp_path: Path) -> None:
    """A token that is ruled out has logit −inf, which a rank can be counted with; one NaN among
    the logits says nothing of any rank."""
    made = zip(four((6, 5)), ((4, 9), (8,)), strict=True)  # one is padded
    pairs = [replace(pair, answer=answer, wrong=(7,)) for pair, answer in made]
    used = {t for pair in pairs for t in (*pair.answer, *pair.wrong)}
    for bad, finite in ((float("-inf"), True), (float("nan"), False)):
        hf_model = LLAMA.build(2, 1)
        output = hf_model.get_output_embeddings()
        output.bias = torch.nn.Parameter(torch.zeros(50).double())
        token = next(t for t in (0, *range(3, 50)) if t not in used)
        output.bias.data[token] = bad
        found = ps.sweep(
            ps.wrap(hf_model, Letters()),
            pairs,
            components=["mlp_out"],
            metrics=["rank", "accuracy"],
            out=tmp_path / str(bad),
        )
        with torch.no_grad():
            for i, pair in enumerate(pairs):
                logits = hf_model(torch.tensor([pair.clean])).logits[0, -1].numpy()
                rank = min(int((logits > logits[t]).sum()) for t in pair.answer)
                got = found.baseline("rank")[0, 0, 0, i]
                assert (got == rank) if finite else np.isnan(got)
                got = found.baseline("accuracy")[0, 0, 0, i]
                assert (got == (rank < 1)) if finite else np.isnan(got)


def waves_of(settings: dict[str, Any], pairs: list[Pair]) -> Iterator[Any]:
    model = ps.wrap(LLAMA.build(2, 1), Letters())
    parsed = parse_settings({"metrics": FEW, **settings})
    plan = plan_sweep(model.dimensions, pairs, parsed, model.device)
    for wave in plan.waves:
        yield plan, wave, make_schedule(plan, wave)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_where_rows_go(dtype: Any) -> None:
    """Numbers that are told apart, in place of metrics: each is found where it belongs; floors are
    distances from the null patch's own destination."""
    given = {
        "components": ["mlp_out", "head_z"],
        "source": ["other", {"resample": {"samples": 2}}],
        "direction": "both",
        "token_budget": 200,
    }
    given["direction"] = "noise"
    both = {**given, "source": "other", "direction": "both"}
    seen = 0
    for settings in (given, both):
        for plan, wave, schedule in waves_of(settings, four()):
            seen += 1
            bases, runs = len(schedule.base_offset), schedule.runs
            per_pair, pairs = bases // len(wave.pairs), len(wave.pairs)
            here = wave.sample < plan.sources[wave.source].samples
            base = np.arange(bases) * 100.0  # of pair i: 100·per_pair·i, then its other run
            row = 0.25 + np.arange(len(runs.block)) / 1024
            null = runs.block == NULL
            noise = np.array([d == "noise" for d in plan.directions])[runs.direction]
            # Null patches fall short of the clean run and go beyond the other one.
            own = runs.pair * per_pair + np.where(noise, 0, 1)
            row[null] = (base[own] + np.where(noise, -0.5, 0.125) * (1 + runs.pair))[null]
            found = _sorted_out(
                plan, wave, schedule, {"m": np.concatenate([base, row]).astype(dtype)}
            )
            clean, corrupt = found.baseline["m"]
            if not here:
                assert np.isnan(found.baseline["m"]).all()
                assert np.isnan(found.noise_floor["m"]).all()
                continue
            first = np.arange(pairs) * per_pair
            np.testing.assert_array_equal(clean, base[first])
            np.testing.assert_array_equal(corrupt, base[first + 1])
            i = 1 + np.arange(pairs)
            for number, step, run in ((0, 0.5, "noise"), (1, 0.125, "denoise")):
                floor = found.noise_floor["m"][number]
                if run in plan.directions:
                    np.testing.assert_array_equal(floor, step * i)
                else:
                    assert np.isnan(floor).all()
            for number, (block, values, statuses) in enumerate(found.blocks):
                value, status = values["m"].ravel(), statuses["m"].ravel()
                mine = runs.block == number
                assert (status == Status.EXACT).sum() == mine.sum()
                np.testing.assert_array_equal(value[runs.cell[mine]], row[mine].astype(dtype))
                assert (status[runs.cell[mine]] == Status.EXACT).all()
                way = plan.directions[block.direction]
                ends = base[first + (1 if way == "denoise" else 0)]
                at = block.pairs.start - wave.pairs.start
                by_pair = ends[at : at + len(block.pairs), None, None, None]
                grid = values["m"][0, 0, 0]
                wanted = np.broadcast_to(by_pair, grid.shape)
                same = statuses["m"][0, 0, 0] == Status.STRUCTURAL
                np.testing.assert_array_equal(grid[same], wanted[same])
                outside = statuses["m"][0, 0, 0] == Status.OUTSIDE
                assert np.isnan(grid[outside]).all()
                assert (same | outside).sum() + mine.sum() == grid.size
    assert seen > 3


def test_nobody_is_resampled_by_the_same_prompt() -> None:
    """Pairs may share their clean prompt: that would be no other run."""
    rng = np.random.default_rng(0)
    a, b = (tuple(map(int, rng.integers(3, 50, 6))) for _ in range(2))
    pairs = [Pair(a, b, (4,), (5,)), Pair(a, (*b[:5], 9), (4,), (5,)), Pair(b, a, (4,), (5,))]
    settings = parse_settings(
        {"components": ["mlp_out"], "direction": "noise", "source": {"resample": {"samples": 40}}}
    )
    [source] = resolve(settings, pairs)
    assert source.samples == 40
    for row in source.others:
        assert [other.tokens for other in row] == [b, b, a]
    more = [*pairs, Pair((*a[:5], 8), b, (4,), (5,)), Pair(a[:5], b[:5], (4,), (5,))]
    with pytest.raises(ps.BadInput, match="pair 4: resample needs another pair of the same length"):
        resolve(settings, more)
    [source] = resolve(settings, more[:4])
    drawn = [{row[i].tokens for row in source.others} for i in range(4)]
    fits = [p.clean for p in more[:4]]
    assert drawn == [{t for t in fits if t != p.clean} for p in more[:4]]


def test_small_sweeps_of_every_place() -> None:
    """Every component and both directions at few tokens, in several waves."""
    components = [
        "embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_q", "head_k",
        "head_v", "head_pattern", "head_z", "neuron",
    ]  # fmt: skip
    given = {"components": components, "direction": "both", "token_budget": 300}
    assert check(Case("llama", four((5, 4)), given, layers=2), 60) > 10


def test_small_sweeps_of_queries_and_keys() -> None:
    """Every cell: queries of all positions pass a layer beside the rows, each with its own keys."""
    given = {"components": ["head_q", "head_k"], "direction": "noise"}
    pairs = [pair_of(np.random.default_rng(9), 4, 4)]
    assert check(Case("llama", pairs, given, layers=2), None) > 20


def test_small_sweeps_with_windows() -> None:
    """What differs at one token is seen one further in every layer."""
    components = ["resid_pre", "mlp_out", "head_q", "head_k", "head_v", "head_pattern", "head_z"]
    given = {"components": components, "direction": "noise"}
    pair = four((6,))[0]
    other = tuple(t if i != 3 else 3 + (t - 2) % 47 for i, t in enumerate(pair.clean))
    overrides = {"sliding_window": 2}
    case = Case("mistral", [replace(pair, corrupt=other)], given, layers=2, overrides=overrides)
    assert check(case, 80) > 10


def test_small_sweeps_of_unequal_prompts() -> None:
    rng = np.random.default_rng(4)
    pairs = [unequal(rng, 5, 2), unequal(rng, 4, 1), pair_of(rng, 5, 2)]
    given = {
        "components": ["resid_pre", "head_q", "head_k", "head_z", "mlp_out", "embed"],
        "direction": "both",
        "sets": {"a": ["head_q.1.2@-1", "head_k.0.1@2", "embed@3", "head_v.1.0@-2"]},
    }
    assert check(Case("llama", pairs, given, layers=2), 40) > 10


def test_groups_of_positions_of_unequal_prompts() -> None:
    """An entry is there with those of its positions that have a counterpart; a set's site is where
    its own source has one."""
    rng = np.random.default_rng(4)
    pairs = [
        replace(pair, align=(2, -1, 3, -1, 6), others={"second": tuple(reversed(pair.clean))})
        for pair in [unequal(rng, 5, 2)]
    ]
    given: dict[str, Any] = {
        "components": ["mlp_out"],
        "positions": {"both": [0, 1], "neither": [1, 3], "ends": [0, -1]},
        "direction": "both",
    }
    assert check(Case("llama", pairs, given, layers=2), None) == 3 + 3
    given = {
        "sets": {"a": ["mlp_out.0@1<other", "mlp_out.0@2<second", "mlp_out.1@1", "mlp_out.0@0"]},
        "source": ["other", "second"],
        "direction": "noise",
    }
    assert check(Case("llama", pairs, given, layers=2), None) == 2


@pytest.mark.parametrize("kind", ["ablations", "noise"])
def test_small_sweeps_of_other_sources(kind: str) -> None:
    given: dict[str, Any] = {"components": ["mlp_out", "head_k", "head_z", "embed", "head_pattern"]}
    if kind == "noise":
        noise = {"sigma": [1, 3], "samples": 2, "tokens": [1, -2]}
        given |= {"corrupt": {"gaussian": noise}, "direction": "both"}
    else:
        given["components"].remove("head_pattern")
        sources = ["zero", {"mean": {"prompts": "corrupt"}}, {"resample": {"samples": 2}}]
        given |= {"source": sources, "direction": "noise"}
    check(Case("gpt2", four((5, 5)), given, layers=2), 30)


def test_small_sweeps_of_sets() -> None:
    sets = {
        "a": ["head_z.0.1@2", "head_z.1.4@-1", "mlp_out.1@-2", "resid_pre.1@-2"],
        "b": ["head_q.0.3@-1", "head_k.1.0@1", "head_v.1.1@-2", "attn_out.0"],
        "c": ["embed@1", "embed@3", "resid_pre.1@-1", "head_pattern.1.1@-1", "resid_post.0@-1"],
        "d": ["mlp_out.0@1", "mlp_out.0@2", "head_z.0.0@1", "head_z.0.1@2", "head_k.0.0@2"],
        "e": ["mlp_out.0@-1", "head_q.0.3@-1", "head_v.0.1@-1"],
        # Three runs of one token: of two it attends, of that between it does not.
        "f": ["head_q.0.2@-1"],
        "g": ["mlp_out.0@-1"],
        "h": ["head_q.0.4@-1"],
        "several queries": ["head_q.0.1@1", "head_q.0.2@2", "head_q.0.3@2", "head_q.0.3@-1"],
    }
    given: dict[str, Any] = {"components": ["mlp_out"], "windows": [2], "positions": [1, -1]}
    given |= {"sets": sets, "direction": "both"}
    pairs = [pair_of(np.random.default_rng(9), 6, 6)]
    assert check(Case("llama", pairs, given, layers=2), None) > 16
    mixed = {
        "mixed": ["head_z.0.1@2<second", "mlp_out.1@-2", "head_q.1.1@-1<second", "embed@2<second"],
        "undone": ["resid_pre.0<second", "head_z.1.0@-1<other", "mlp_out.1@-1<other"],
    }
    given = {"sets": mixed, "source": ["other", "second"], "direction": "both"}
    assert check(Case("llama", three(9)[:2], given), None) > 10


def test_small_sweeps_with_inner_metrics() -> None:
    given = {"components": ["head_z", "resid_post", "head_pattern"], "direction": "both"}
    check(Case("llama", three(3)[:2], {**given, "metrics": "inner"}, sae_at="mlp_out"), 40)


def test_small_sweeps_of_answers_of_several_tokens() -> None:
    rng = np.random.default_rng(6)
    pairs = []
    for length, count in ((6, 3), (5, 1)):
        pair = pair_of(rng, length, 1)
        tail = pair.clean[length - count + 1 :]
        corrupt = (3 + (pair.clean[0] - 2) % 40, *pair.clean[1 : length - count + 1], *tail)
        pairs.append(Pair(pair.clean, corrupt, pair.answer, pair.wrong, continuation=(*tail, 9)))
    metrics = [*FEW, "sequence_logprob", "relative_prob", "rank", {"accuracy": {"k": 5}}]
    given = {"components": ["head_z", "mlp_out"], "direction": "both", "metrics": metrics}
    assert check(Case("llama", pairs, given, layers=2), 40) > 5
