"""The prompt pairs of a spec; of those the ones that the model answers right, if asked for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from patchsweep import tasks
from patchsweep.device import exactly
from patchsweep.errors import BadInput
from patchsweep.model import Model, max_positions
from patchsweep.pairs import Pair, read_pairs
from patchsweep.spec import Prompts

TRIED = 20  # pairs of a task that are tried for each one asked for


def build_pairs(prompts: Prompts, tokenizer: Any, model: Model | None = None) -> list[Pair]:
    """The pairs that a spec's prompts stand for.

    `only_correct` needs the model: without one nothing is left out. Of a task pairs are then drawn
    until there are `n` that the model answers right, TRIED for each at most. BadInput if there are
    fewer, of a file if there is none.
    """
    chosen = model if prompts.only_correct else None
    if prompts.file is not None:
        pairs = read_pairs(prompts.file, tokenizer, prompts.bos)
        return _correct(chosen, pairs, prompts.n, 1)[: prompts.n]
    assert prompts.task is not None
    assert prompts.n is not None
    name, options = prompts.task
    task = tasks.find(name)
    if chosen is None:
        return task(tokenizer, prompts.n, prompts.seed, prompts.bos, **options)
    drawn = task.stream(tokenizer, prompts.seed, prompts.bos, **options)
    return _correct(chosen, islice(drawn, TRIED * prompts.n), prompts.n, prompts.n)


def _correct(model: Model | None, pairs: Iterable[Pair], n: int | None, least: int) -> list[Pair]:
    """The first `n` pairs that the model answers right, all without a model; BadInput if they are
    fewer than `least`."""
    if model is None:
        return list(pairs)
    found: list[Pair] = []
    tried = 0
    for pair in pairs:
        if len(found) == n:
            break
        tried += 1
        if answers_right(model, pair):
            found.append(pair)
    if len(found) < least:
        mend = f"ask for {len(found)}, or leave only_correct out" if found else "leave it out"
        raise BadInput(
            f"prompts: only_correct keeps {len(found)} of {tried} pairs, as many as {model.name} "
            f"answers right, which is too few: {mend}"
        )
    return found


def answers_right(model: Model, pair: Pair) -> bool:
    """Whether in the clean run, where the answer is read, the likeliest answer is above every wrong
    one; where there is none, above every other token. BadInput for a prompt that is too long."""
    most = max_positions(model.hf_model)
    if most is not None and len(pair.clean) > most:
        raise BadInput(
            f"prompts: a prompt has {len(pair.clean)} tokens, {model.name} takes {most}: shorten it"
        )
    prompt = torch.tensor([pair.clean[: pair.read + 1]], device=model.device)
    with exactly(model.hf_model), torch.no_grad():
        logits = model.hf_model(input_ids=prompt, use_cache=False).logits[0, -1].float().cpu()
    answer = torch.tensor(pair.answer)
    others = logits.index_fill(0, answer, -torch.inf)
    wrong = others[list(pair.wrong)] if pair.wrong else others
    return bool(logits[answer].max() > wrong.max())
