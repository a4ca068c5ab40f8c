"""What a reader of the results should know of what the sweep was given: two bos tokens, answers
whose other spacing the model holds far likelier, an autoencoder that does not say what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from patchsweep.pairs import Pair
from patchsweep.passes import Carry, Forward, Seen
from patchsweep.plan.schedule import rows_only
from patchsweep.sae import SAE

FAR = 10.0  # times as likely
LEAST = 1e-3  # probability below which no spacing is what the model would say
SPACES = ("Ġ", "▁", " ")  # how vocabularies write a leading space
TOKENS = 4096  # of prompts that go up together
ROWS = 16  # whose logits are in memory together

Tokens = tuple[int, ...]


class _Asked(NamedTuple):
    """The tokens that a pair gives after `prompt`, and the same words with the other spacing after
    `before`: the same prompt, or it without the space that it ends in."""

    pair: int
    what: str
    prompt: Tokens
    given: Tokens
    before: Tokens
    other: Tokens


def doubts(
    forward: Forward, carry: Carry, tokenizer: Any, pairs: Sequence[Pair], sae: SAE | None
) -> list[str]:
    """One line each. Answers are judged in the clean run, wrong ones in the corrupt run, by plain
    forwards of those prompts whose words have another spacing in the vocabulary."""
    lines = []
    bos = getattr(tokenizer, "bos_token_id", None)
    if two := sum((bos, bos) in (pair.clean[:2], pair.corrupt[:2]) for pair in pairs):
        lines.append(
            f"prompts: {two} of {len(pairs)} pairs begin with two bos tokens, which no model is "
            "trained on: leave one out"
        )
    norms = (isinstance(module, nn.LayerNorm) for module in forward.hf_model.modules())
    if sae is not None and not sae.processing_said and sae.at != "head_z" and any(norms):
        lines.append(
            f"sae: {sae.source} does not say whether its model had center_writing_weights (of "
            "gpt2-small-res-jb and others only SAE-Lens's own list says so): if it had, its "
            "features are of activations without their mean, and wrong here"
        )
    if hasattr(tokenizer, "get_vocab"):  # else it only decodes
        vocabulary = tokenizer.get_vocab()
        pieces = {token: piece for piece, token in vocabulary.items()}
        asked = list(_asked(pairs, vocabulary, pieces))
        known = _probabilities(forward, carry, asked)
        lines += _far(asked, known, pieces, len(pairs))
    return lines


def _asked(
    pairs: Sequence[Pair], vocabulary: Mapping[Any, int], pieces: Mapping[int, Any]
) -> Iterator[_Asked]:
    """What has another spacing."""
    for number, pair in enumerate(pairs):
        after = len(pair) - pair.read - 1
        for what, run in (("answer", pair.clean), ("wrong", pair.corrupt)):
            given: Tokens = getattr(pair, what)
            turned = [_other(pieces.get(token), vocabulary) for token in given]
            other = tuple(t for t in turned if t is not None and t not in given)
            if run and other:
                prompt = run[: len(run) - after]
                ends = len(prompt) > 1 and pieces.get(prompt[-1]) in SPACES
                yield _Asked(number, what, prompt, given, prompt[:-1] if ends else prompt, other)


def _other(piece: Any, vocabulary: Mapping[Any, int]) -> int | None:
    """The token of the same word with a leading space if it has none, without if it has one."""
    if not isinstance(piece, str) or piece in SPACES:
        return None
    turned = [piece[1:]] if piece.startswith(SPACES) else [space + piece for space in SPACES]
    return next((vocabulary[word] for word in turned if word in vocabulary), None)


def _far(
    asked: Sequence[_Asked],
    known: Mapping[Tokens, Mapping[int, float]],
    pieces: Mapping[int, str],
    pairs: int,
) -> list[str]:
    """Where the other spacing is far likelier, for every cause one line."""
    found: dict[tuple[str, str], list[tuple[_Asked, float, float]]] = {}
    for one in asked:
        given = sum(known[one.prompt][token] for token in one.given)
        other = sum(known[one.before][token] for token in one.other)
        if other > max(LEAST, FAR * given):
            why = f"a leading space is part of the {one.what}"
            if one.before != one.prompt:
                why = f"the prompt ends in a space, which is part of the {one.what}"
            found.setdefault((one.what, why), []).append((one, other, given))

    def shown(token: int) -> str:
        return repr(" " * pieces[token].startswith(SPACES) + pieces[token].lstrip("".join(SPACES)))

    return [
        f"{what}: in {len(some)} of {pairs} pairs the other spacing is far likelier, in pair "
        f"{some[0][0].pair} {shown(some[0][0].other[0])} ({some[0][1]:.2g}) than "
        f"{shown(some[0][0].given[0])} ({some[0][2]:.2g}): {why}"
        for (what, why), some in found.items()
    ]


@torch.no_grad()
def _probabilities(
    forward: Forward, carry: Carry, asked: Sequence[_Asked]
) -> dict[Tokens, dict[int, float]]:
    """Of every prompt the probabilities of the next tokens that are asked for."""
    wanted: dict[Tokens, set[int]] = {}
    for one in asked:
        wanted.setdefault(one.prompt, set()).update(one.given)
        wanted.setdefault(one.before, set()).update(one.other)
    out = {}
    for prompts in _batched(list(wanted)):
        schedule = rows_only(prompts, len(forward.layers))
        hidden = carry(forward, schedule, lambda *_: Seen({}), lambda _: None)[:, 0]
        for start in range(0, len(prompts), ROWS):
            logits = forward.logits(hidden[start : start + ROWS]).float()
            for prompt, row in zip(prompts[start:], logits.softmax(-1), strict=False):
                tokens = sorted(wanted[prompt])
                out[prompt] = dict(zip(tokens, row[tokens].tolist(), strict=True))
    return out


def _batched(prompts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    batch: list[Tokens] = []
    for prompt in prompts:
        if batch and sum(map(len, batch)) + len(prompt) > TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
