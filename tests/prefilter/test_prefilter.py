"""The prefilter: all cells estimated, some run, a sample of the others audited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from estimates import built, text
from inputs import Letters, three
from patchsweep import attribution
from patchsweep.engine import loop as engine
from patchsweep.engine import planning
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.prefilter.choice import HIGHEST, NONE, STRATA, Choice, choose, judge
from patchsweep.report.figures import Wanted, _figures
from patchsweep.sites import Status
from patchsweep.spec import Prefilter
from tiny import arrays

COMPONENTS = ["head_z", "head_k", "mlp_out", "neuron"]
METRICS = ["logit_diff", "logprob"]
RUN = (Status.EXACT, Status.AUDITED)


def sweep(out: Path, prefilter: Any, pairs: Sequence[Pair] = (), **more: Any) -> Any:
    given = {"components": COMPONENTS, "metrics": METRICS, "direction": "both"}
    model = ps.wrap(built("llama")[0], Letters())
    settings = {"token_budget": 4000, **given, **more, "prefilter": prefilter}
    return ps.sweep(model, pairs or three(), out=out, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ps.Results:
    """The sweep without a prefilter."""
    return sweep(tmp_path_factory.mktemp("prefilter") / "whole", None)


# Choosing.


def cells(*scores: Sequence[float]) -> np.ndarray:
    """Scores [metric, layer, unit, position] of one layer and unit."""
    return np.array(scores, float)[:, None, None]


def status(scores: np.ndarray, possible: Sequence[int] | None = None, **given: Any) -> list[int]:
    there = np.ones(scores.shape[1:], bool) if possible is None else np.array(possible, bool)
    found = choose(scores, there.reshape(scores.shape[1:]), Prefilter(**given))
    return [int(s) for s in found.status.ravel()]


KEPT, DRAWN, LEFT = int(Status.EXACT), int(Status.AUDITED), int(Status.ESTIMATED)


def test_the_largest_are_kept() -> None:
    scores = cells([0.1, -5, 3, 0, -4])
    assert [s == KEPT for s in status(scores, keep=2, audit=1)] == [0, 1, 0, 0, 1]
    assert [s == KEPT for s in status(scores, keep="41%", audit=1)] == [0, 1, 1, 0, 1]
    assert [s == KEPT for s in status(scores, keep={"threshold": 3}, audit=1)] == [0, 1, 1, 0, 1]
    assert status(scores, keep=99) == [KEPT] * 5
    # Where nothing can change there is nothing to keep.
    assert [s == KEPT for s in status(scores, [1, 0, 1, 1, 0], keep=2, audit=1)] == [1, 0, 1, 0, 0]


def test_a_cell_counts_by_its_best_metric() -> None:
    scores = cells([9, 1, 2, 3, 4], [0.0, 0.4, 0.3, 0.2, 0.1])
    assert [s == KEPT for s in status(scores, keep=2, audit=1)] == [1, 1, 0, 0, 0]


def test_what_has_no_finite_score_comes_first() -> None:
    scores = cells([9, -np.inf, 2, np.inf, 4])
    assert [s == KEPT for s in status(scores, keep=2, audit=1)] == [0, 1, 0, 1, 0]
    left = choose(scores, np.ones((1, 1, 5), bool), None).status.ravel().tolist()
    assert left == [LEFT, Status.NOT_FINITE, LEFT, Status.NOT_FINITE, LEFT]


def test_a_metric_without_effects_says_nothing() -> None:
    """Its scores are NaN: those of the other metrics count."""
    scores = cells([np.nan] * 5, [0, 3, 1, np.nan, 4])
    for keep in (2, {"threshold": 3}):
        assert [s == KEPT for s in status(scores, keep=keep, audit=1)] == [0, 1, 0, 0, 1]
    left = choose(scores, np.ones((1, 1, 5), bool), None).status
    assert (left == LEFT).all()


def test_a_metric_in_which_the_runs_are_equal(tmp_path: Path) -> None:
    """What is not run is not said to be not finite, and what is run is what the other says."""
    metrics = ["logit_diff", {"neuron": {"layer": 0, "neuron": 1, "position": 0}}]
    given = {"components": ["head_z"], "direction": "noise", "pairs": three()[:1]}
    both = [
        sweep(tmp_path / name, {"keep": 4, "audit": 1}, metrics=m, **given)
        for name, m in (("one", metrics[:1]), ("two", metrics))
    ]
    one, two = (x.store.read("head_z/logit_diff_status") for x in both)
    np.testing.assert_array_equal(one, two)
    assert both[1].audit("head_z", both[1].metrics[1], "noise") is None


def test_the_audit_draws_from_each_stratum() -> None:
    scores = np.random.default_rng(0).standard_normal((1, 4, 5, 30))
    possible = np.random.default_rng(1).random((4, 5, 30)) < 0.8
    given = Prefilter(keep="10%", audit=20)
    found = choose(scores, possible, given)
    assert (found.status[possible] == KEPT).sum() == np.ceil(possible.sum() / 10)
    assert (found.stratum[~possible] == NONE).all()
    assert ((found.stratum == NONE) == (~possible | (found.status == KEPT))).all()
    size = np.abs(scores[0])
    assert size[found.stratum == 0].max() < size[found.stratum == 1].min()
    for number in range(STRATA):
        assert (found.status[found.stratum == number] == DRAWN).sum() == 20
    other = choose(scores, possible, Prefilter(keep="10%", audit=20, seed=1))
    assert (other.stratum == found.stratum).all()
    assert (other.status != found.status).any()


def test_theta_is_a_number() -> None:
    """Kept cells that have no effect say nothing of how large one is."""
    effect = np.array([[[np.nan, 3.0, 1.0, 0.5, np.nan]]])
    status = np.array([[[KEPT, KEPT, KEPT, DRAWN, DRAWN]]], np.uint8)
    stratum = np.array([[[NONE, NONE, NONE, 0, 1]]], np.uint8)
    found = judge(effect, Choice(status, stratum), Prefilter(), 1, 1)
    assert found is not None
    assert found.theta == 3
    assert [s.hits for s in found.audit.strata] == [0, 1]
    assert found.precision == 1 / 3
    assert judge(effect * np.nan, Choice(status, stratum), Prefilter(), 1, 1) is None


def test_every_cell_is_drawn_as_often() -> None:
    scores, times = cells(range(12)), np.zeros(12)
    for seed in range(3000):
        found = status(scores, keep=2, audit=2, seed=seed)
        times += np.array(found) == DRAWN
    assert (times[10:] == 0).all()
    np.testing.assert_allclose(times[:10] / 3000, 2 / 5, atol=0.04)  # of 5 in each stratum


# In a sweep.


def test_what_is_run_is_what_a_whole_sweep_finds(tmp_path: Path) -> None:
    given = {"source": ["other", {"resample": {"samples": 2}}], "direction": "noise"}
    pairs = [*three(), *three(8)]
    whole = sweep(tmp_path / "whole", None, pairs=pairs, **given)
    found = sweep(tmp_path / "r", {"keep": "10%", "audit": 5}, pairs=pairs, **given)
    both = whole, found
    for component in COMPONENTS:
        for metric in METRICS:
            (a, b), (before, now) = (
                [x.store.read(f"{component}/{metric}{kind}") for x in both]
                for kind in ("", "_status")
            )
            ran = np.isin(now, RUN)
            np.testing.assert_allclose(b[ran], a[ran], rtol=0, atol=1e-12)
            assert (before[ran] == Status.EXACT).all()
            assert (before[now == Status.ESTIMATED] == Status.EXACT).all()
            assert np.isnan(b[now == Status.ESTIMATED]).all()
            same = ~np.isin(before, RUN)
            assert (now[same] == before[same]).all()
            # A cell is run in every pair and sample where it can change anything, or in none.
            of_columns = [over_pairs(found, component, x) for x in (ran, now == Status.ESTIMATED)]
            assert not (of_columns[0] & of_columns[1]).any()
        chosen = found.store.read(f"choice/{component}_status")
        kept = over_pairs(found, component, now == Status.EXACT)
        assert (chosen[kept] == Status.EXACT).all()
        for s, source in enumerate(("other", "resample")):
            check_kept(found, component, (0, s), "noise", source)
            exact, effect = (x.effect(component, "logit_diff", "noise", source) for x in both)
            there = np.isfinite(effect.values)
            np.testing.assert_allclose(effect.values[there], exact.values[there], 0, atol=1e-11)
            assert (effect.n_pairs.values[there] == exact.n_pairs.values[there]).all()
            # Structural in some pairs, not run in others: that says nothing of all pairs.
            now = found.store.read(f"{component}/logprob_status")
            left = over_pairs(found, component, now == Status.ESTIMATED)[0, s]
            at = (component, "logprob", "noise", source)
            for said in (*found.interval(*at, samples=9), found.p_values(*at)):
                assert np.isnan(said[left]).all()
            assert np.isnan(found.standard_error(*at)[left]).all()
            assert np.isnan(found.effect(*at).values[left]).all()
    assert not [line for line in found.warnings() if "not done" in line]


def over_pairs(found: Any, component: str, true: np.ndarray) -> np.ndarray:
    """Of [direction, source, sample, pair, layer, unit, position] whether any position of a column
    is true in any sample and pair, [direction, source, layer, unit, column]."""
    columns = found.columns(component)
    return np.array([[columns.any(x).any((0, 1)) for x in of_way] for of_way in true])


def check_kept(found: Any, component: str, at: tuple[int, int], *way: str) -> None:
    """The kept cells are the highest by rank, in the estimates that are stored."""
    status = found.store.read(f"{component}/logit_diff_status")
    possible = over_pairs(found, component, np.isin(status, (*RUN, Status.ESTIMATED)))[at]
    sizes = [
        np.abs(found.estimated_effect(component, m, *way, min_pairs=1).values)[possible]
        for m in METRICS
    ]
    rank = np.max([size.argsort().argsort() for size in sizes], axis=0)
    kept = over_pairs(found, component, status == Status.EXACT)[at][possible]
    assert kept.sum() == np.ceil(possible.sum() / 10)
    assert rank[kept].min() >= rank[~kept].max()
    audited = over_pairs(found, component, status == Status.AUDITED)[at][possible]
    assert audited.sum() == min(10, (~kept).sum())


def test_everything_kept_is_an_ordinary_sweep(whole: ps.Results, tmp_path: Path) -> None:
    sweep(tmp_path / "with", {"keep": "100%"})
    both, exact = arrays(tmp_path / "with"), arrays(whole.path)
    assert {name: both[name] for name in exact} == exact
    added = {f"{c}/{m}_estimate" for c in COMPONENTS for m in METRICS}
    added |= {f"choice/{c}_{what}" for c in COMPONENTS for what in ("status", "stratum")}
    assert both.keys() - exact.keys() == {
        *added,
        "completion/estimates",
        "completion/estimates_split",
        "completion/choice",
        "records/estimates",
    }


def test_the_audit_says_what_a_whole_sweep_finds(whole: ps.Results, tmp_path: Path) -> None:
    found = sweep(tmp_path / "r", {"keep": "10%", "audit": 40})
    for direction in ("denoise", "noise"):
        size = np.abs(whole.effect("neuron", "logprob", direction, min_pairs=1).values)
        d = ["denoise", "noise"].index(direction)
        now, stratum = (found.store.read(f"choice/neuron_{x}")[d, 0] for x in ("status", "stratum"))
        possible = size > 0
        kept = np.sort(size[(now == Status.EXACT) & possible])[::-1]
        said = found.audit("neuron", "logprob", direction)
        assert said.theta == pytest.approx(kept[int(np.ceil(len(kept) / HIGHEST)) - 1])
        at_theta = (kept > said.theta - 1e-12).mean()
        assert said.precision == pytest.approx(at_theta - 1 / len(kept), abs=1e-12)
        hits = 0.0
        for number, part in enumerate(said.audit.strata):
            mine = stratum == number
            drawn = mine & (now == Status.AUDITED)
            assert (part.cells, part.drawn) == (mine.sum(), drawn.sum())
            assert part.hits == (size[drawn] > said.theta).sum()
            hits += part.hits * part.cells / part.drawn
        assert said.audit.components == 2 * len(COMPONENTS)
        assert said.audit.metrics == len(METRICS)
        above = (kept > said.theta + 1e-12).sum()
        assert said.recall == pytest.approx(above / (above + hits))
        left = possible & ~np.isin(now, RUN)
        assert said.audit.left == left.sum()
        assert said.audit.missed >= (size[left] > said.theta).sum()
    fixed = sweep(tmp_path / "s", {"keep": 3, "audit": 5, "theta": 0.01}, components=["head_z"])
    assert fixed.audit("head_z", "logit_diff", "noise").theta == 0.01
    assert fixed.audit("head_z", "logit_diff", "noise").audit.components == 2
    assert "exceed 0.01; this bounds how many, not how far" in " ".join(text(fixed).split())
    assert whole.audit("head_z", "logit_diff", "noise") is None


def test_a_choice_that_is_lost_is_said_not_to_be_made(tmp_path: Path) -> None:
    some = {"components": ["head_z"], "metrics": METRICS[:1], "pairs": three()[:1]}
    found = sweep(tmp_path / "r", {"keep": "20%"}, **some)
    assert not ps.check(found.path).undone
    (tmp_path / "r/completion/choice/c/0").unlink()
    assert ps.check(found.path).undone == ("which cells are run is not chosen",)


def test_verified(tmp_path: Path) -> None:
    """Kept and audited cells again, as full forwards; those only estimated are not drawn."""
    found = sweep(tmp_path / "r", {"keep": 4, "audit": 2}, components=["head_z"])
    again = ps.verify(found, 50, model=ps.wrap(built("llama")[0], Letters()))
    ran = sum(found.counts("head_z", "logprob")[s] for s in RUN)
    assert again.cells == min(50, ran) > 20
    assert again.holds


def test_one_component_only(tmp_path: Path) -> None:
    """Those that have no estimator are run whole."""
    found = sweep(tmp_path / "r", {"estimator": {"neuron": "atp"}, "keep": 5, "audit": 5})
    assert found.attrs["estimators"] == {"neuron": "atp"}
    assert found.counts("head_z", "logprob")[Status.ESTIMATED] == 0
    assert found.counts("neuron", "logprob")[Status.ESTIMATED] > 0
    assert found.audit("head_z", "logprob", "noise") is None


def test_figures_of_windows_show_what_was_run(tmp_path: Path) -> None:
    """Beside components that are only estimated, or run where they were chosen."""
    small = {"components": ["mlp_out"], "windows": [2], "positions": [-1], "direction": "noise"}
    for given in ({"estimate": True}, {"prefilter": {"keep": 1, "audit": 1}}):
        found = sweep(tmp_path / "r", **{"prefilter": None, **small, **given}, overwrite=True)
        for name, figure in _figures(found, Wanted()):
            words = [figure.axes[0].get_title(), *(axes.get_ylabel() for axes in figure.axes)]
            assert ("by attribution patching" in words[0]) == ("window" not in name)
            said = "estimated effect" in " ".join(words)
            assert said == ("estimate" in given and "window" not in name)


def test_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen is not chosen again, and the bits are those of an undisturbed sweep."""
    given, few = {"keep": "20%", "audit": 4}, {"components": ["head_z"], "token_budget": 100}
    sweep(tmp_path / "whole", given, **few)
    launch, waves = engine.launch_wave, []

    def some(*args: Any, **more: Any) -> Any:
        if len(waves) == 1:
            raise KeyboardInterrupt
        waves.append(args)
        return launch(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "launch_wave", some)
        sweep(tmp_path / "r", given, **few)
    assert len(waves) == 1
    with monkeypatch.context() as patch:
        patch.setattr(attribution.sweep, "choose", None)
        patch.setattr(attribution.sweep, "estimate_pairs", None)
        sweep(tmp_path / "r", given, **few, resume=True)
    assert arrays(tmp_path / "r") == arrays(tmp_path / "whole")
    with pytest.raises(BadInput, match=r"another sweep \(another prefilter\)"):
        sweep(tmp_path / "r", {**given, "seed": 1}, **few, resume=True)


def test_lost_estimates_are_made_again_and_nothing_else(tmp_path: Path) -> None:
    """Baselines keep the noise floor that their wave has found."""
    given, few = {"keep": "20%", "audit": 4}, {"components": ["head_z"]}
    floor = sweep(tmp_path / "r", given, **few).noise_floor("logit_diff")
    assert np.isfinite(floor).any()
    before = arrays(tmp_path / "r")
    (tmp_path / "r/completion/estimates/c/0/0/0").unlink()
    sweep(tmp_path / "r", given, **few, resume=True)
    assert arrays(tmp_path / "r") == before


def test_what_it_will_take(tmp_path: Path) -> None:
    """As many runs as planned before anything was estimated, give or take where pairs differ."""
    pairs = three()[:1]
    found = sweep(tmp_path / "r", {"keep": "10%", "audit": 4}, pairs=pairs)
    spec = {k: v for k, v in found.attrs["spec"].items() if k != "out"}
    model = ps.wrap(built("llama")[0], Letters())
    settings = engine.parse_settings(spec)
    plan = planning.plan_sweep(model.dimensions, pairs, settings, model.device)
    about = attribution.expected(plan, settings).counts()
    assert about["runs"] == found.attrs["plan"]["runs"] < plan.counts()["runs"] / 3
    assert about["flops"] < plan.counts()["flops"] / 2
    assert about["estimated"] + about["runs"] == plan.counts()["runs"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": 0}, "prefilter: keep: 0 says nothing to keep: use a share such as 5%"),
        ({"keep": "5"}, "prefilter: keep: '5' says nothing to keep"),
        ({"keep": "120%"}, "says nothing to keep"),
        ({"keep": {"threshold": -1}}, "says nothing to keep"),
        ({"kep": 1}, "prefilter: unknown key 'kep': did you mean 'keep'"),
        ({"audit": 0}, "prefilter: audit: should be greater than or equal to 1, and is 0"),
        ({"theta": "big"}, "prefilter: theta: 'big' is no size of an effect"),
        ({"estimator": False}, "prefilter: estimator: false estimates nothing"),
        ({"estimator": "atpp"}, "prefilter: unknown estimator 'atpp'"),
        (3, r"prefilter: should be a mapping, \{key: value\}, and is 3$"),
    ],
)
def test_bad_prefilters(given: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        sweep(tmp_path / "r", given)
    with pytest.raises(BadInput, match="prefilter estimates what it names: leave estimate out"):
        sweep(tmp_path / "r", {}, estimate=True)
    with pytest.raises(BadInput, match="prefilter: rank cannot be estimated: it is a count"):
        sweep(tmp_path / "r", {}, metrics=["rank"])
    assert list(tmp_path.iterdir()) == []
