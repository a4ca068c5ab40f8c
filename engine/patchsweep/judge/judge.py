"""The judge of one model: plain and patched forwards, called as its user calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from patchsweep.device import device_of
from patchsweep.errors import BadInput
from patchsweep.judge.attention import Call, watched
from patchsweep.judge.find import Blind, Layer, find
from patchsweep.judge.forwards import Edit, Forward, Key, Prompt, Recorded, Subject
from patchsweep.sae import SAE

TOKENS = 512  # of rows that go through the model together


class Judge:
    """A model, found out with the first of some `tokens`, and the layers that it is said to have.

    BadInput if it cannot run on `input_ids` alone, or does not have these layers.
    """

    def __init__(
        self, hf_model: PreTrainedModel, tokens: Sequence[int], layers: int, sae: SAE | None = None
    ) -> None:
        self.hf_model, self.sae = hf_model, sae
        self.name = type(hf_model).__name__
        self.device = device_of(hf_model.get_input_embeddings())
        sizes = {hf_model.config.get_text_config().hidden_size, *_head_sizes(hf_model)}
        length = next(n for n in range(5, 64) if n not in sizes)
        vocab = hf_model.get_input_embeddings().weight.shape[0]
        # A prompt whose activations are not finite shows nothing: then other tokens do.
        few = (list(tokens) * length)[:length]
        tried = [few, list(range(vocab))[:length], list(range(vocab))[-length:]]
        self.layers = self._found([ids for ids in tried if len(ids) == length], layers)
        self.stackable = True

    def _found(self, tried: Sequence[Sequence[int]], layers: int) -> list[Layer]:
        """The layers, by the first of some prompts that shows them."""
        for ids in tried:
            try:
                with _quietly():
                    return find(self.hf_model, self._ids([ids]), layers)
            except LookupError as error:
                why = error
        raise BadInput(f"{self.name}: {why}: this model cannot be swept") from why

    @torch.no_grad()
    def watch(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor | None]]:
        """Logits [row, position, vocab] of prompts of one length together; and of every layer which
        keys a query sees in the first, [query, key], None where that is not told."""
        found: list[Tensor | None] = [None] * len(self.layers)
        now: list[int] = []

        def told(call: Call) -> None:
            found[now[-1]] = None if call.allowed is None else call.allowed[0, 0]

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                enter: Any = partial(lambda i, *_: now.append(i), index)
                stack.callback(layer.module.register_forward_pre_hook(enter).remove)
            stack.enter_context(watched(self.hf_model, lambda: Blind() if now else None, told))
            logits = self.logits(rows)
        return logits, found

    def heads(self, layer: int) -> dict[str, int]:
        """How many units the heads' components have in a layer, as attention is given them."""
        calls = self.layers[layer].calls
        if len(calls) != 1:
            return {}
        queries, keys = calls[0].heads, calls[0].kv_heads
        of_queries = dict.fromkeys(("head_q", "head_pattern", "head_z"), queries)
        return of_queries | {"head_k": keys, "head_v": keys}

    @torch.no_grad()
    def plain(self, tokens: Sequence[int]) -> Tensor:
        """Logits [position, vocab] of one prompt, as the model's user gets them."""
        return self.logits([tokens])[0]

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Prompt],
        edits: Sequence[Sequence[Edit]] | None = None,
        record: Sequence[Key] = (),
        reads: Sequence[int] | None = None,
    ) -> tuple[Tensor, Recorded]:
        """Logits [row, position, vocab], or at the positions `reads` alone, and activations of
        prompts of one length, each with its edits. Unseen, with component and layer, for what
        cannot be seen."""
        edits = [()] * len(prompts) if edits is None else edits
        step = max(1, TOKENS // len(prompts[0].tokens)) if self.stackable else 1
        subject = Subject(self.hf_model, self.layers, self.sae, self.logits)
        logits, seen = [], []
        for i in range(0, len(prompts), step):
            forward = Forward(subject, prompts[i : i + step], edits[i : i + step], record)
            found = forward.run()
            logits.append(found if reads is None else found[:, list(reads)])
            seen.append(forward.seen)
        return torch.cat(logits), {k: torch.cat([s[k] for s in seen]) for k in record}

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([list(r) for r in rows], device=self.device)

    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [row, position, vocab] of rows of tokens."""
        with _quietly():
            out = self.hf_model(input_ids=self._ids(rows))
        logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
        return logits


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers warns of: a prompt that holds the padding token has no padding."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _head_sizes(hf_model: PreTrainedModel) -> set[int]:
    """Numbers that a count of tokens must not be taken for."""
    config = hf_model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    found = {heads, config.hidden_size // max(1, int(heads))}
    with suppress(Exception):  # some configs raise where every layer has its own
        found.add(config.head_dim)
    return {int(n) for n in found if isinstance(n, int)}
