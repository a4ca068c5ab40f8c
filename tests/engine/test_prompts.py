"""The prompt pairs of a spec, and those of them that a model answers right."""

from __future__ import annotations

import copy
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.made_tokenizers import byte_level
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from patchsweep import tasks
from patchsweep.engine.loop import run
from patchsweep.engine.planning import plan_spec
from patchsweep.engine.prompts import TRIED, answers_right, build_pairs
from patchsweep.errors import BadInput
from patchsweep.model.model import Model, wrap
from patchsweep.pairs import Pair, make_pair
from patchsweep.report.terminal import show
from patchsweep.spec import Prompts, parse_spec
from patchsweep.store import Store, stored_pairs


@pytest.fixture(scope="module")
def model() -> Model:
    """A small model of random weights: it is right about half of the time."""
    torch.manual_seed(0)
    tokenizer = byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return wrap(LlamaForCausalLM(config).double(), tokenizer)


def built(model: Model, **said: Any) -> list[Pair]:
    return build_pairs(Prompts.model_validate(said), model.tokenizer, model)


def logit_diffs(model: Model, pairs: list[Pair]) -> torch.Tensor:
    """Answer minus wrong [pair], of pairs with one of each and prompts of one length."""
    with torch.no_grad():
        logits = model.hf_model(torch.tensor([p.clean for p in pairs])).logits[:, -1]
    answer, wrong = (torch.tensor([getattr(p, n) for p in pairs]) for n in ("answer", "wrong"))
    return (logits.gather(1, answer) - logits.gather(1, wrong))[:, 0]


def test_only_the_pairs_that_the_model_answers_right(model: Model) -> None:
    """The first six of those in the order of the task, judged here in one batch."""
    said: dict[str, Any] = {"task": {"facts": {"relation": "country"}}, "seed": 3}
    found = built(model, **said, n=6, only_correct=True)
    drawn = tasks.facts.stream(model.tokenizer, 3, relation="country")
    pairs = [p for p in islice(drawn, 200) if len(p) == 9]
    right = logit_diffs(model, pairs) > 0
    assert 0 < right.sum() < len(pairs)
    kept = [p for p, is_right in zip(pairs, right.tolist(), strict=True) if is_right]
    assert [p for p in found if len(p) == 9] == kept[: sum(len(p) == 9 for p in found)] != []
    assert len(found) == 6
    assert built(model, **said, n=3, only_correct=True) == found[:3]
    assert (
        found != built(model, **said, n=6) == tasks.facts(model.tokenizer, 6, 3, relation="country")
    )


def test_sets_and_pairs_without_a_wrong_answer(model: Model) -> None:
    """The likeliest answer counts; without wrongs every other token is one."""
    t = model.tokenizer
    text = "The capital of France is"
    with torch.no_grad():
        logits = model.hf_model(torch.tensor([t(text)["input_ids"]])).logits[0, -1]
    first, second, *_, last = logits.argsort(descending=True).tolist()
    pair = make_pair(t, text, None, " Paris")

    def right(answer: list[int], wrong: list[int]) -> bool:
        return answers_right(model, Pair(pair.clean, (), tuple(answer), tuple(wrong)))

    assert right([last, first], [second])
    assert not right([last, second], [first])
    assert right([second], [last])
    assert right([last, first], [])
    assert not right([second], [])


def test_a_file(model: Model, tmp_path: Path) -> None:
    pairs = tasks.facts(model.tokenizer, 40, relation="capital")
    decode = model.tokenizer.decode
    keys = ("clean", "corrupt", "answer", "wrong")
    rows = [{key: decode(getattr(p, key)) for key in keys} for p in pairs]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    right = [p.clean for p in pairs if answers_right(model, p)]
    assert 5 < len(right) < 40
    assert [p.clean for p in built(model, file=file, only_correct=True)] == right
    assert [p.clean for p in built(model, file=file, only_correct=True, n=5)] == right[:5]
    assert len(built(model, file=file, n=7)) == 7
    # without a model, as in a plan, nothing is left out
    assert len(build_pairs(Prompts(file=file, only_correct=True), model.tokenizer)) == 40
    wrong = next(row for row, p in zip(rows, pairs, strict=True) if not answers_right(model, p))
    file.write_text(json.dumps(wrong))
    with pytest.raises(BadInput, match=r"keeps 0 of 1 pairs.*: leave it out"):
        built(model, file=file, only_correct=True)


def test_a_model_that_knows_too_little(model: Model) -> None:
    """One that gives every token the same logit."""
    ignorant = copy.deepcopy(model.hf_model)
    ignorant.lm_head.weight.data.zero_()
    with pytest.raises(BadInput, match=f"keeps 0 of {2 * TRIED} pairs"):
        built(wrap(ignorant, model.tokenizer), task="facts", n=2, only_correct=True)


def test_a_sweep_from_a_spec(model: Model, tmp_path: Path) -> None:
    """Noise on the numbers of sums that the model answers right."""
    for part in (model.hf_model, model.tokenizer):
        part.save_pretrained(tmp_path / "model")
    prompts = {"task": {"arithmetic": {"operation": "addition"}}, "n": 2, "only_correct": True}
    data = {
        "model": str(tmp_path / "model"),
        "dtype": "float64",
        "device": "cpu",
        "prompts": prompts,
        "corrupt": {"gaussian": {"tokens": ["A", "B"]}},
        "components": ["head_z"],
        "positions": ["A", "END"],
        "out": str(tmp_path / "r.zarr"),
    }
    spec = parse_spec(data)
    assert parse_spec(spec.model_dump(mode="json")) == spec
    results = run(spec)
    pairs = built(model, **prompts)
    assert stored_pairs(Store.open(tmp_path / "r.zarr")) == pairs
    assert list(plan_spec(spec).pairs) != pairs  # knows no weights
    assert (results.effect("head_z", "logit_diff", "denoise") != 0).any()
    out = io.StringIO()
    show(results, Console(file=out, width=200, color_system=None))
    assert "(arithmetic, operation addition)" in out.getvalue()


def test_a_prompt_that_is_too_long(model: Model) -> None:
    """Refused before the model, whose positions end, is run on it."""
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    small = wrap(GPT2LMHeadModel(config).eval(), model.tokenizer)
    with pytest.raises(BadInput, match=r"a prompt has 9 tokens, .* takes 8: shorten it"):
        answers_right(small, Pair(clean=(1,) * 9, corrupt=(), answer=(1,), wrong=(2,)))
