"""Circuits whose answer is known: full forwards and sweeps must find them, and nothing else."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import patchsweep as ps
from oracle import paths as by_hooks
from oracle.families import FAMILIES
from patchsweep.sites import RECEIVERS, SENDERS, parse_node, parse_site
from patchsweep.tasks.known_circuits import (
    ANSWERS,
    HEADS,
    KNOWN,
    KNOWN_EDGES,
    KNOWN_PATHS,
    KNOWN_SETS,
    LAYERS,
    NEURONS,
    WORDS,
    circuit_pairs,
    known_circuits,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIRECTIONS = ("denoise", "noise")
TOKENS = 3
# component -> layers, units
SHAPE = {"embed": (1, 1), "head_z": (LAYERS, HEADS), "neuron": (LAYERS, NEURONS), "mlp_out": (2, 1)}
EXACT = 1e-12  # sums of small whole numbers, and their ratios
MODEL, TOKENIZER = known_circuits()
PAIRS = circuit_pairs(TOKENIZER)

Cell = tuple[str, int, int, int]  # component, layer, unit, position
Swap = Callable[[Tensor], Tensor]


def cell(text: str, labels: dict[str, int]) -> Cell:
    site = parse_site(text)
    return site.component, site.layer or 0, site.unit or 0, labels[str(site.position)]


def expected(circuit: str, direction: str, component: str) -> NDArray[np.float64]:
    """The known effects on the logit difference, [layer, unit, position]."""
    grid = np.zeros((*SHAPE[component], TOKENS))
    for text, effect in KNOWN[circuit].items():
        name, *index = cell(text, PAIRS[circuit][0].labels)
        if name == component:
            grid[tuple(index)] = getattr(effect, direction)
    return grid


def test_the_task_has_their_prompts() -> None:
    """The words of the task that this tokenizer knows are those that no circuit reads."""
    for corruption, circuit, many in (("both", "and", 12), ("second", "and_second", 4)):
        drawn = ps.tasks.nobel(TOKENIZER, many, corruption=corruption)
        runs = {(p.clean, p.corrupt, p.answer, p.wrong) for p in drawn}
        assert runs >= {(p.clean, p.corrupt, p.answer, p.wrong) for p in PAIRS[circuit]}
        with pytest.raises(ps.BadInput, match=f"{many} can be had with this tokenizer"):
            ps.tasks.nobel(TOKENIZER, many + 1, corruption=corruption)


# The model by plain full forwards, without the engine.


def hooked(component: str, layer: int, swap: Swap) -> Any:
    """Passes a component's activation through `swap`; the hook's handle."""
    block = MODEL.transformer.h[layer]
    if component in ("head_z", "neuron"):
        reader = {"head_z": block.attn, "neuron": block.mlp}[component].c_proj
        return reader.register_forward_pre_hook(lambda _m, args: (swap(args[0]),))
    module = {"embed": MODEL.transformer.wte, "mlp_out": block.mlp}[component]
    return module.register_forward_hook(lambda _m, _args, out: swap(out))


def logits(ids: tuple[int, ...], *hooks: tuple[str, int, Swap]) -> Tensor:
    with ExitStack() as stack, torch.no_grad():
        for hook in hooks:
            stack.callback(hooked(*hook).remove)
        out: Tensor = MODEL(torch.tensor([ids])).logits
    return out[0, -1]


def recorded(ids: tuple[int, ...]) -> dict[tuple[str, int], Tensor]:
    """Activations [1, position, width] by (component, layer)."""
    seen: dict[tuple[str, int], Tensor] = {}
    logits(ids, *((*key, lambda x, k=key: seen.setdefault(k, x)) for key in places()))
    return seen


def places() -> Iterator[tuple[str, int]]:
    return ((component, i) for component, (layers, _) in SHAPE.items() for i in range(layers))


def forward_effect(pair: ps.Pair, direction: str, cells: list[Cell]) -> float:
    """The effect on the logit difference of one full forward with these cells patched."""
    clean, corrupt = pair.clean, pair.corrupt
    destination, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    donor = recorded(source)

    def hook(component: str, layer: int, unit: int, position: int) -> tuple[str, int, Swap]:
        def swap(x: Tensor) -> Tensor:
            width = x.shape[-1] // SHAPE[component][1]
            at = (0, position, slice(unit * width, (unit + 1) * width))
            new = x.clone()
            new[at] = donor[component, layer][at]
            return new

        return component, layer, swap

    runs = (logits(destination), logits(source), logits(destination, *(hook(*c) for c in cells)))
    start, end, patched = (float(x[pair.answer[0]] - x[pair.wrong[0]]) for x in runs)
    return (patched - start) / (end - start)


def test_the_baselines() -> None:
    for circuit, pairs in PAIRS.items():
        corrupt_difference = -10.0 if circuit == "negative" else 0.0
        for pair in pairs:
            for ids, difference in ((pair.clean, 10.0), (pair.corrupt, corrupt_difference)):
                out = logits(ids)
                others = set(range(len(WORDS))) - {*pair.answer, *pair.wrong}
                assert float(out[pair.answer[0]] - out[pair.wrong[0]]) == difference
                assert not out[list(others)].any()


def test_the_pairs() -> None:
    differing = {"and": {1, 2}, "and_first": {1}, "and_second": {2}, "or": {1}, "negative": {1}}
    assert differing.keys() == PAIRS.keys() == KNOWN.keys()
    for circuit, pairs in PAIRS.items():
        assert len({(p.clean, p.corrupt) for p in pairs}) == len(pairs) >= 2
        for p in pairs:
            both = zip(p.clean, p.corrupt, strict=True)
            assert {i for i, (a, b) in enumerate(both) if a != b} == differing[circuit]
            assert {WORDS[i] for i in p.answer + p.wrong} < set(ANSWERS)
            assert TOKENIZER.unk_token_id not in {*p.clean, *p.corrupt}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("circuit", KNOWN)
def test_full_forwards_find_what_is_known(circuit: str, direction: str) -> None:
    pair = PAIRS[circuit][0]
    for component, (layers, units) in SHAPE.items():
        wanted = expected(circuit, direction, component)
        found = np.zeros_like(wanted)
        for index in product(range(layers), range(units), range(TOKENS)):
            found[index] = forward_effect(pair, direction, [(component, *index)])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT, err_msg=component)
    for name, known in KNOWN_SETS.get(circuit, {}).items():
        effect = forward_effect(pair, direction, [cell(s, pair.labels) for s in known.sites])
        assert effect == pytest.approx(getattr(known.effect, direction), abs=EXACT), name


def path_effect(
    pair: ps.Pair, direction: str, senders: list[str], receivers: list[str], at: int
) -> float:
    """The same of two full forwards, from some senders to some receivers at a position."""
    runs = (pair.corrupt, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupt)
    two = by_hooks.two(MODEL, FAMILIES["gpt2"], *runs)
    given, read = (
        [
            (n.component, n.layer or 0, n.unit or 0)
            for n in (parse_node(text, known) for text in texts)
        ]
        for texts, known in ((senders, SENDERS), (receivers, RECEIVERS))
    )
    last, would_be = two.first(given, {at: at}, "nothing")
    if receivers != ["logits"]:
        last = two.second(read, [at], would_be)
    ends = [logits(ids) for ids in runs]
    start, end, patched = (float(x[pair.answer[0]] - x[pair.wrong[0]]) for x in (*ends, last[-1]))
    return (patched - start) / (end - start)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("circuit", KNOWN_EDGES)
def test_full_forwards_find_known_edges_and_paths(circuit: str, direction: str) -> None:
    pair = PAIRS[circuit][0]
    for text, effect in KNOWN_EDGES[circuit].items():
        edge, label = text.split("@")
        ends = ([end] for end in edge.split("->"))
        found = path_effect(pair, direction, *ends, pair.labels[label])
        assert found == pytest.approx(getattr(effect, direction), abs=EXACT), text
    for name, path in KNOWN_PATHS.get(circuit, {}).items():
        at = pair.labels[path.label]
        found = path_effect(pair, direction, [*path.senders], [*path.receivers], at)
        assert found == pytest.approx(getattr(path.effect, direction), abs=EXACT), name


# The same through the engine.


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ps.Results]:
    """A sweep of every circuit's prompts."""
    folder = tmp_path_factory.mktemp("known")
    return {
        circuit: ps.sweep(
            ps.wrap(MODEL, TOKENIZER),
            pairs,
            components=list(SHAPE),
            sets={name: list(known.sites) for name, known in KNOWN_SETS.get(circuit, {}).items()},
            direction="both",
            edges={"exact": {"positions": "each"}},
            paths={
                name: {"senders": p.senders, "receivers": p.receivers, "positions": [p.label]}
                for name, p in KNOWN_PATHS.get(circuit, {}).items()
            },
            metrics=["logit_diff", "prob"],
            positions="each",
            out=folder / f"{circuit}.zarr",
        )
        for circuit, pairs in PAIRS.items()
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("component", SHAPE)
@pytest.mark.parametrize("circuit", KNOWN)
def test_a_sweep_finds_what_is_known(
    results: dict[str, ps.Results], circuit: str, component: str, direction: str
) -> None:
    wanted = expected(circuit, direction, component)
    found = results[circuit].effect(component, "logit_diff", direction).values
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT)
    # And so does every pair by itself.
    each = results[circuit].to_xarray(component).logit_diff_effect.sel(direction=direction)
    for pair in each.transpose("pair", ...).values:
        np.testing.assert_allclose(pair.reshape(wanted.shape), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("circuit", KNOWN_SETS)
def test_joint_runs_find_what_is_known(
    results: dict[str, ps.Results], circuit: str, direction: str
) -> None:
    found = results[circuit].effect("sets", "logit_diff", direction).values
    assert found.shape == (1, 1, len(KNOWN_SETS[circuit]))
    wanted = [getattr(known.effect, direction) for known in KNOWN_SETS[circuit].values()]
    assert list(results[circuit].to_xarray("sets").coords["set"].values) == list(
        KNOWN_SETS[circuit]
    )
    np.testing.assert_allclose(found[0, 0], wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("circuit", KNOWN_EDGES)
def test_all_edges_are_those_known(
    results: dict[str, ps.Results], circuit: str, direction: str
) -> None:
    clean, corrupt = results[circuit].baseline("logit_diff").mean((1, 2, 3))
    span = clean - corrupt if direction == "denoise" else corrupt - clean
    found = results[circuit].edges("logit_diff", direction) / span
    wanted = found.copy(data=np.where(np.isfinite(found), 0.0, np.nan))
    for text, effect in KNOWN_EDGES[circuit].items():
        edge, label = text.split("@")
        sender, receiver = edge.split("->")
        place = {"sender": sender, "receiver": receiver}
        wanted[{"position": PAIRS[circuit][0].labels[label]}].loc[place] = getattr(
            effect, direction
        )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT)
    for name, path in KNOWN_PATHS.get(circuit, {}).items():
        effect = results[circuit].effect(f"set.{name}", "logit_diff", direction).values.item()
        assert effect == pytest.approx(getattr(path.effect, direction), abs=EXACT), name


def found_in(
    results: ps.Results, component: str, direction: str, metric: str = "logit_diff"
) -> set[str]:
    """The cells "layer.unit" at END with an effect of more than 5%."""
    effect = results.effect(component, metric, direction).values[..., -1]
    return {f"{layer}.{unit}" for layer, unit in np.argwhere(np.abs(effect) > 0.05)}


def test_and_denoising_finds_the_end_noising_the_parts(results: dict[str, ps.Results]) -> None:
    both = results["and"]
    assert found_in(both, "neuron", "denoise") == found_in(both, "neuron", "noise") == {"1.42"}
    assert found_in(both, "head_z", "denoise") == found_in(both, "embed", "denoise") == set()
    assert found_in(both, "head_z", "noise") == {"0.0"}
    assert found_in(both, "embed", "noise") == {"0.0"}
    # Which part reads which word, shown in both directions by corrupting one word at a time.
    for direction in DIRECTIONS:
        assert found_in(results["and_first"], "head_z", direction) == {"0.0"}
        assert found_in(results["and_first"], "embed", direction) == set()
        assert found_in(results["and_second"], "head_z", direction) == set()
        assert found_in(results["and_second"], "embed", direction) == {"0.0"}


def test_or_noising_needs_joint_runs(results: dict[str, ps.Results]) -> None:
    assert found_in(results["or"], "head_z", "denoise") == {"0.1", "0.2"}
    assert found_in(results["or"], "head_z", "noise") == set()
    joint = dict(
        zip(
            KNOWN_SETS["or"],
            results["or"].effect("sets", "logit_diff", "noise").values[0, 0],
            strict=True,
        )
    )
    # The backup is in no cell of the grid: it is what the third site adds to the first two.
    assert joint["both heads and backup"] - joint["both heads"] == pytest.approx(0.7, abs=EXACT)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_probability_misses_the_negative_head(
    results: dict[str, ps.Results], direction: str
) -> None:
    negative = results["negative"]
    assert found_in(negative, "head_z", direction, "logit_diff") == {"1.1", "1.2"}
    assert found_in(negative, "head_z", direction, "prob") == {"1.1"}
    # How small it is follows from the logits of answer and wrong; all others are 0.
    ends = [(0.0, 10.0), (10.0, 0.0)]
    start, end = ends if direction == "denoise" else ends[::-1]
    sign = -1.0 if direction == "denoise" else 1.0
    patched = (start[0] + sign * 3.0, start[1] - sign * 3.0)
    p0, p1, p = (probability(*pair) for pair in (start, end, patched))
    effect = negative.effect("head_z", "prob", direction).values[1, 2, 2]
    assert effect == pytest.approx((p - p0) / (p1 - p0), abs=EXACT)
    assert -0.001 < effect < 0


def probability(answer: float, wrong: float) -> float:
    others = len(WORDS) - 2
    return float(np.exp(answer) / (np.exp(answer) + np.exp(wrong) + others))


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["known_circuits.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "known_circuits.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows, paths = {}, {}
    for line in filter(None, lines):
        if len(line) == 1:
            circuit = line[0]
        elif "@" in line[0]:
            rows[circuit, line[0]] = [float(number) for number in line[1:3]]
        elif line[0] in KNOWN_PATHS.get(circuit, {}):
            paths[circuit, line[0]] = [float(number) for number in line[1:3]]
    wanted = {
        (circuit, site): [round(value, 2) for value in effect]
        for known in (KNOWN, KNOWN_EDGES)
        for circuit, cells in known.items()
        for site, effect in cells.items()
    }
    assert rows == wanted
    assert paths == {
        (circuit, name): [*path.effect]
        for circuit, of in KNOWN_PATHS.items()
        for name, path in of.items()
    }
    assert ["both", "heads", "and", "backup", "+1.00", "+1.00"] in [line[:6] for line in lines]
    assert (Path(__file__).parents[2] / "docs" / "known-circuits.md").is_file()
