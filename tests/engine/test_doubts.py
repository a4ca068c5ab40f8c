"""What is said of answers with the wrong spacing and of two bos tokens, on a real model. The
probabilities come from the model's own forward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from dictionaries import sae_lens
from inputs import Letters
from oracle.families import FAMILIES
from patchsweep.pairs import Pair

CITIES = {"France": "Paris", "Italy": "Rome", "England": "London"}
SETTINGS: dict[str, Any] = {"components": ["resid_post"], "positions": [-1]}


@pytest.fixture(scope="module")
def model(smollm2: ps.Model) -> ps.Model:
    return smollm2


def pairs(
    model: ps.Model, answer: str = " {}", wrong: str = " {}", prompt: str = "The capital of {} is"
) -> list[Pair]:
    countries = list(CITIES)
    return [
        ps.make_pair(
            model.tokenizer,
            clean=prompt.format(a),
            corrupt=prompt.format(b),
            answer=answer.format(CITIES[a]),
            wrong=wrong.format(CITIES[b]),
        )
        for a, b in zip(countries, countries[1:] + countries[:1], strict=True)
    ]


def said(model: ps.Model, some: list[Pair], out: Path, **settings: Any) -> list[str]:
    results = ps.sweep(model, some, out=out, **{**SETTINGS, **settings})
    return [w for w in results.warnings() if re.match("answer|wrong|prompts:", w)]


def probability(model: ps.Model, prompt: str, token: str) -> float:
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    [last] = model.tokenizer(token)["input_ids"]
    with torch.no_grad():
        logits = model.hf_model(input_ids=ids).logits[0, -1].double()
    return float(logits.softmax(-1)[last])


@pytest.mark.parametrize("backend", ["wavefront", "nnsight"])
def test_a_leading_space_that_is_lost(model: ps.Model, tmp_path: Path, backend: str) -> None:
    [answer, wrong] = said(model, pairs(model, "{}", "{}"), tmp_path / "r", backend=backend)
    assert answer.startswith("answer: in 3 of 3 pairs the other spacing is far likelier, in pair 0")
    assert answer.endswith("a leading space is part of the answer")
    there, here = re.findall(r"'([ A-Za-z]+)' \(([\d.e-]+)\)", answer)
    assert (there[0], here[0]) == (" Paris", "Paris")
    for token, number in (there, here):
        expected = probability(model, "The capital of France is", token)
        assert float(number) == pytest.approx(expected, rel=0.05)
    assert wrong.startswith("wrong: in 3 of 3 pairs")
    assert "' Rome'" in wrong


def test_only_some_pairs(model: ps.Model, tmp_path: Path) -> None:
    right, lost = pairs(model), pairs(model, "{}")
    [line] = said(model, [*right[:2], lost[2]], tmp_path / "r")
    assert line.startswith("answer: in 1 of 3 pairs")
    assert "in pair 2 ' London'" in line


def test_a_prompt_that_ends_in_a_space(model: ps.Model, tmp_path: Path) -> None:
    ends = pairs(model, "{}", "{}", "The capital of {} is ")
    answer, wrong = said(model, ends, tmp_path / "r")
    assert answer.startswith("answer: in 3 of 3 pairs the other spacing is far likelier")
    assert answer.endswith("the prompt ends in a space, which is part of the answer")
    [there, here] = re.findall(r"'([ A-Za-z]+)' \(([\d.e-]+)\)", answer)
    assert float(there[1]) == pytest.approx(
        probability(model, "The capital of France is", " Paris"), rel=0.05
    )
    assert float(here[1]) == pytest.approx(
        probability(model, "The capital of France is ", "Paris"), rel=0.05
    )
    assert wrong.startswith("wrong: ")


@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring", "facts", "arithmetic"])
def test_the_tasks_are_spaced_right(model: ps.Model, tmp_path: Path, task: str) -> None:
    """With digits apart, too, where a space of its own stands before a number."""
    assert said(model, getattr(ps.tasks, task)(model.tokenizer, n=3), tmp_path / "r") == []


def test_with_a_continuation(model: ps.Model, tmp_path: Path) -> None:
    """What is judged is read where the answer is, not at the end."""
    for answer, count in ((" Paris", 0), ("Paris", 1)):
        pair = ps.make_pair(
            model.tokenizer,
            clean="The capital of France is",
            corrupt="The capital of Italy is",
            answer=answer,
            wrong=" Rome",
            continuation=" Paris, and the capital",
        )
        assert len(said(model, [pair], tmp_path / f"{count}")) == count


@pytest.mark.parametrize(
    ("family", "change", "count"),
    [
        ("gpt2", {}, 1),
        ("gpt2", {"model_from_pretrained_kwargs": {}}, 0),
        ("gpt2", {"hook_name": "blocks.1.attn.hook_z"}, 0),  # what attention reads has its mean
        ("llama", {}, 0),  # TransformerLens centres what LayerNorm reads only
    ],
)
def test_an_autoencoder_whose_publisher_alone_knows_how_its_model_was_loaded(
    tmp_path: Path, family: str, change: dict[str, Any], count: int
) -> None:
    hf_model = FAMILIES[family].build(2)
    width = hf_model.config.hidden_size
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (width, 7), "W_dec": (7, width), "b_enc": (7,), "b_dec": (width,)}
    cfg = {"hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1, "d_in": width} | change
    folder = sae_lens(
        tmp_path / "sae", {name: rng.normal(size=shape) for name, shape in shapes.items()}, cfg
    )
    results = ps.sweep(
        ps.wrap(hf_model, Letters()),
        [Pair((5, 6, 7), (5, 1, 7), (2,), (3,))],
        components=["sae_feature"],
        sae={"file": folder},
        out=tmp_path / "r",
    )
    lines = [line for line in results.warnings() if "center_writing_weights" in line]
    assert len(lines) == count


def test_two_bos_tokens(model: ps.Model, tmp_path: Path) -> None:
    """Of pairs made by hand; texts never get a second one."""
    one = pairs(model)[0]
    bos = model.tokenizer.bos_token_id
    twice = Pair((bos, bos, *one.clean), (bos, bos, *one.corrupt), one.answer, one.wrong)
    [line] = said(model, [one, twice], tmp_path / "r")
    assert line.startswith("prompts: 1 of 2 pairs begin with two bos tokens")
    once = Pair((bos, *one.clean), (bos, *one.corrupt), one.answer, one.wrong)
    assert said(model, [once], tmp_path / "s") == []


def test_said_again_when_opened_and_after_a_resume(model: ps.Model, tmp_path: Path) -> None:
    lost = pairs(model, "{}")
    first = said(model, lost, tmp_path / "r")
    assert len(first) == 1
    assert said(model, lost, tmp_path / "r", resume=True) == first
    assert first[0] in ps.open(tmp_path / "r").warnings()
    longer = said(model, [*lost, pairs(model)[0]], tmp_path / "r", append=True)
    assert [line[:26] for line in longer] == ["answer: in 3 of 4 pairs th"]
